"""What a QEMU knows, asked from itself: distributions build it in many ways, so its version says little."""

from __future__ import annotations

import re

_PROBE_S = 20


def knows_iommufd(program: str) -> bool:
    """Whether this QEMU's vfio-pci takes an iommufd; False where it can't be asked."""
    import subprocess  # 10 ms, and only where the kernel has iommufd

    try:
        done = subprocess.run(
            [program, "-device", "vfio-pci,help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return False
    return done.returncode == 0 and bool(re.search(r"^\s*iommufd=", done.stdout, re.MULTILINE))
