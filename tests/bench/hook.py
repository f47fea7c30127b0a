"""What libvirt's hook costs a guest's start: the whole shim, as libvirt runs it, against the least there is.

Each measured run is followed by a run of its floor, and the medians are compared: a busy machine is busy for
both. The hook is a copy that ``hooks install`` makes for a host of files (the VFs) or for a network namespace
of its own (the macvtap, which needs root); this machine's own hooks and claims are never touched.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.bench.row import Row
from tests.fake_host import FakeHost
from vnet_lock.front import hooks_install
from vnet_lock.settings import Settings

TOP = Path(__file__).parents[2]
ROUNDS = 15
# A shell is ten times quicker than Python, and its noise as much larger.
SHELL_ROUNDS = 100

_LOWER = "bench0"


def rows() -> tuple[Row, ...]:
    """The three rows; takes some 20 s. PermissionError where we aren't root."""
    if os.geteuid() != 0:
        raise PermissionError("the hook's benchmark makes a macvtap in a network namespace: run it as root")
    return (measure_other_guest(), measure_fixed(), measure_macvtap())


def measure_other_guest() -> Row:
    """A guest that touches no device of ours, of the size that libvirt's XML usually has."""
    disk = (
        "    <disk type='file' device='disk'>\n      <source file='/var/lib/images/a.qcow2'/>\n    </disk>\n"
    )
    xml = (TOP / "xml/no-device.xml").read_bytes().partition(b"-->")[2]
    xml = xml.replace(b"<devices>\n", b"<devices>\n" + disk.encode() * 80)
    with _fake_host() as settings:
        measured_s, floor_s = _medians(
            [_hook(settings), "web13", "prepare", "begin", "-"],
            ["/bin/sh", "-c", "cat >/dev/null"],
            xml,
            SHELL_ROUNDS,
        )
    return Row("hook, guest that touches no device of ours", measured_s, floor_s, 2)


def measure_fixed() -> Row:
    """`prepare` of a guest with two VFs that libvirt opens."""
    xml = (TOP / "xml/hostdev-device.xml").read_bytes()
    with _fake_host() as settings:

        def release() -> None:
            claims = list(Path(settings.claims_dir).iterdir())
            if len(claims) != 2:
                raise RuntimeError(f"prepare made {len(claims)} claims instead of 2")
            for claim in claims:
                claim.unlink()

        measured_s, floor_s = _medians(
            [_hook(settings), "web2", "prepare", "begin", "-"],
            [sys.executable, "-I", "-c", "import lxml.etree"],
            xml,
            ROUNDS,
            release,
        )
    return Row("hook prepare, two fixed VFs", measured_s, floor_s, 2)


def measure_macvtap() -> Row:
    """`prepare` of a guest that gets one macvtap, in namespaces of its own."""
    argv = [
        "unshare",
        "--net",
        "--mount",
        "--propagation",
        "private",
        sys.executable,
        "-m",
        "tests.bench.hook",
    ]
    done = subprocess.run(argv, cwd=TOP, stdout=subprocess.PIPE, check=True)
    measured_s, floor_s = json.loads(done.stdout)
    return Row("hook prepare, making one macvtap", measured_s, floor_s, 2)


def measure_in_namespaces() -> tuple[float, float]:
    """The two medians of ``measure_macvtap``; to be called where network and mounts are ours."""
    with tempfile.TemporaryDirectory(prefix="vnet-lock-bench-") as root:
        for name in ("proc", "dev"):
            os.symlink(f"/{name}", f"{root}/{name}")
        os.mkdir(f"{root}/sys")
        _run(["mount", "-t", "sysfs", "sysfs", f"{root}/sys"])
        try:
            _run(["ip", "link", "add", _LOWER, "up", "type", "veth", "peer", "name", f"{_LOWER}p"])
            settings = Settings.under(root)
            hooks_install.install(settings)
            xml = (
                (TOP / "xml/intent-vepa.xml")
                .read_bytes()
                .replace(b'dev="enp1s0"', f'dev="{_LOWER}"'.encode())
            )

            def release() -> None:
                if not os.path.exists(f"{settings.sys}/class/net/web6-net0"):
                    raise RuntimeError("prepare made no macvtap")
                _run([_hook(settings), "web6", "release", "end", "-"], xml)
                if os.listdir(settings.claims_dir):
                    raise RuntimeError("release left a claim")

            return _medians(
                [_hook(settings), "web6", "prepare", "begin", "-"],
                [sys.executable, "-I", "-c", "import lxml.etree, pyroute2"],
                xml,
                ROUNDS,
                release,
            )
        finally:
            _run(["umount", f"{root}/sys"])


def _medians(
    measured: Sequence[str],
    floor: Sequence[str],
    xml: bytes,
    rounds: int,
    after: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Medians in seconds of both commands, run in turns with the XML on stdin; the first turn is left out."""
    times_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for argv, into in zip((measured, floor), times_s, strict=True):
            before = time.perf_counter()
            _run(argv, xml)
            into.append(time.perf_counter() - before)
            if argv is measured:
                after()
    return statistics.median(times_s[0][1:]), statistics.median(times_s[1][1:])


def _run(argv: Sequence[str], xml: bytes = b"") -> None:
    subprocess.run(argv, input=xml, stdout=subprocess.DEVNULL, check=True)


def _hook(settings: Settings) -> str:
    return f"{settings.etc_libvirt}/hooks/qemu.d/{hooks_install.NAME}"


@contextmanager
def _fake_host() -> Iterator[Settings]:
    """Two free VFs in files, the real /proc, and an installed hook."""
    with tempfile.TemporaryDirectory(prefix="vnet-lock-bench-") as root:
        host = FakeHost(root)
        vfs = ("0000:01:10.0", "0000:01:10.2")
        host.pf("0000:01:00.0", vfs=vfs, driver="vfio-pci")
        for group, vf in enumerate(vfs):
            host.vf(vf, "0000:01:00.0", driver=None, group=group)
        shutil.rmtree(f"{root}/proc")
        os.symlink("/proc", f"{root}/proc")
        hooks_install.install(host.settings)
        yield host.settings


if __name__ == "__main__":
    print(json.dumps(measure_in_namespaces()))
