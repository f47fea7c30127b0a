"""`virsh start` of a guest with one VF, with vnet-lock's hook and without it, in turns.

    python -m tests.lab.vm --deadline 1800 -- python -u -m tests.lab.bench_start

The middle of each side's times counts; the ratio is what it is for: everything here is emulated and slow.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.row import Row
from tests.bench.run import quantity
from tests.lab.contenders import hostdev_xml, owner_of
from tests.lab.daemons import HOOKS, LIBVIRTD
from tests.lab.machines import Guests, LibvirtGuest
from tests.lab.nic import Nic, run, wait_until

ROUNDS = 9
LIMIT = 1.10
OURS = HOOKS / "50-vnet-lock"


def start_s(nic: Nic, made: LibvirtGuest) -> float:
    """Seconds until virsh has started the guest; it is destroyed again, and its VF is as it was."""
    began = time.monotonic()
    made.start()
    took_s = time.monotonic() - began
    made.destroy()
    wait_until(lambda: nic.vfs[0].netdev, "libvirt has given the VF back")
    run("udevadm", "settle")
    return took_s


def measure(nic: Nic, made: LibvirtGuest) -> tuple[float, float]:
    """The medians with the hook and without it; the first round is left out."""
    aside = HOOKS.parent / OURS.name
    times_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):
        times_s[0].append(start_s(nic, made))
        # libvirt looks into the folder at each call.
        OURS.rename(aside)
        try:
            times_s[1].append(start_s(nic, made))
        finally:
            aside.rename(OURS)
    print([[f"{one:.2f}" for one in each] for each in times_s], file=sys.stderr, flush=True)
    return statistics.median(times_s[0][1:]), statistics.median(times_s[1][1:])


def main() -> int:
    """Measure and print; 1 where the hook takes more than it may."""
    nic = Nic(os.environ["VNET_LAB_PF"])
    nic.reset()
    vf = nic.set_numvfs(1)[0]
    run("vnet-lock", "hooks", "install")
    os.kill(LIBVIRTD.pid, signal.SIGHUP)
    guests = Guests(Path(tempfile.mkdtemp()))
    try:
        made = guests.libvirt("measured", hostdev_xml(vf, "52:54:00:00:0c:01"))
        # What isn't there with the hook would be measured twice.
        assert owner_of(vf) == "measured"
        made.destroy()
        row = Row("virsh start of a guest with one VF, with the hook", *measure(nic, made), LIMIT)
    finally:
        guests.end()
        run("vnet-lock", "hooks", "remove")
    measured, floor = quantity(row.measured, row.unit), quantity(row.floor, row.unit)
    print(f"{row.what:52} {measured:>10} {floor:>10} {row.ratio:8.3f} {row.limit_ratio:8.3f}")
    return 0 if row.is_met else 1


if __name__ == "__main__":
    sys.exit(main())
