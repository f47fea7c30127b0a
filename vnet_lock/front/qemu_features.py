"""Asks a QEMU what words it knows, by runs of it that end at once (50 ms each). Compares no versions."""

from __future__ import annotations

import re
from collections.abc import Collection

from vnet_lock.qemu_rewrite import RECONNECT_MS, RECONNECT_S, Connected, Dialect

_PROBE_S = 20


def read_dialect(program: str, connections: Collection[Connected]) -> Dialect:
    """What it takes to write its words for these connections; nothing else is asked."""
    return Dialect(
        reconnect=_reconnect_words(program) if any(one.path for one in connections) else RECONNECT_MS,
        iommufd=any(one.iommufd for one in connections) and _knows_iommufd(program),
    )


def _reconnect_words(program: str) -> tuple[str, int]:
    """How it is told to connect to a socket again; it ends at an option that it doesn't know."""
    key, value = RECONNECT_MS
    done = _ask(program, "-chardev", f"null,id=probe,{key}={value}", "-version")
    return RECONNECT_MS if done in (None, 0) or isinstance(done, str) else RECONNECT_S


def _knows_iommufd(program: str) -> bool:
    """Whether its vfio-pci takes an iommufd."""
    done = _ask(program, "-device", "vfio-pci,help")
    return isinstance(done, str) and bool(re.search(r"^\s*iommufd=", done, re.MULTILINE))


def _ask(program: str, *words: str) -> str | int | None:
    """What it prints; its exit status where it fails, None where it can't be run."""
    import subprocess  # 10 ms, and only where there is something to ask

    try:
        done = subprocess.run(
            [program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PROBE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode or done.stdout
