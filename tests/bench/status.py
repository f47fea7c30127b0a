"""What ``vnet-lock status --json`` costs on a host with thousands of VFs, as a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.row import Row
from tests.fake_host import VFIO, FakeHost
from vnet_lock.model import Claim, Mode, PciAddress, Resource, State
from vnet_lock.settings import Settings

PFS = 16
VFS = 2048
REPETITIONS = 5
FILES_OF_A_PROCESS = 30
COMMAND = """
import sys
from vnet_lock.front.cli import main
from vnet_lock.settings import Settings
sys.exit(main(["status", "--json"], Settings.under(sys.argv[1])))
"""


def rows() -> tuple[Row, ...]:
    """Both rows; takes half a minute, most of it to make the hosts."""
    small_s, large_s = measure(VFS), measure(4 * VFS)
    return (
        Row(f"status --json, {VFS:,} VFs on {PFS} PFs", small_s, 1.0, 1.0),
        Row("status --json, 4 x the VFs", large_s, small_s, 4.5),
    )


def measure(vfs: int) -> float:
    """The best of some runs in seconds, the interpreter's start included: all else is other load."""
    with busy_host(vfs) as settings:
        return min(time_status(settings) for _ in range(REPETITIONS))


def time_status(settings: Settings) -> float:
    """One run in seconds; raises where the command fails or finds an error."""
    command = [sys.executable, "-c", COMMAND, settings.sys.removesuffix("/sys")]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


@contextmanager
def busy_host(vfs: int) -> Iterator[Settings]:
    """A host with every second VF claimed for a QEMU of its own, which has it through VFIO."""
    root = tempfile.mkdtemp(prefix="vnet-lock-bench-")
    try:
        host = FakeHost(root)
        each = vfs // PFS
        drivers = ["iavf", VFIO] * (each // 2)
        claims = []
        for number in range(PFS):
            # Room for the VFs behind each PF: 512 of them take 4 buses.
            pf = PciAddress(0, 8 * number + 1, 0, 0)
            found = host.add_pf(pf.text, f"p{number}", drivers, totalvfs=each, driver="ice")
            claims += [
                _claim(host, pf, vf, 10_000 + each * number + at) for at, vf in enumerate(found) if at % 2
            ]
        host.claim(*claims)
        yield host.settings
    finally:
        shutil.rmtree(root)


def _claim(host: FakeHost, pf: PciAddress, vf: PciAddress, pid: int) -> Claim:
    host.add_process(pid)
    # No two groups have one number, and no file that there is has any of these (major 4095 is free).
    host.number_vfio(vf, os.makedev(4095, pid))
    for number in range(FILES_OF_A_PROCESS):
        host.open_file(pid, f"/dev/vfio/{number}" if number % 3 == 0 else f"anon_inode:[{number}]")
    return Claim(
        resource=Resource.vf(vf),
        mode=Mode.EXCLUSIVE,
        state=State.ACTIVE,
        owner=host.owner(pid, f"guest{pid}"),
        token=f"{pid:016x}",
        interface="net0",
        since=1.7e9,
        combination="veb-sriov-vfio",
        pf=pf,
    )


if __name__ == "__main__":
    for row in rows():
        print(f"{row.what}: {row.measured_s:.3f} s, {row.ratio:.2f} of {row.limit_ratio}")
