"""`virsh start` of a guest with one VF: without a hook, with vnet-lock's, and with one that does nothing.

    python -m tests.lab.vm --cpus 2 --deadline 1800 -- python -u -m tests.lab.bench_start

In turns, and the middle of each one's times counts; the ratios are what it is for: everything here is
emulated and slow. What does nothing is the least that a hook in Python can take: a shell at each step of a
guest's, and an interpreter at `prepare`. Ours is as a package has it: the system's interpreter, and modules
on a disk of the machine itself. The lab's checkout is on its host's, and nothing of it stays in memory.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import vnet_lock
from tests.bench.row import Row
from tests.bench.run import quantity
from tests.lab.contenders import hostdev_xml, owner_of
from tests.lab.daemons import HOOKS, LIBVIRTD, hook_with
from tests.lab.machines import Guests, LibvirtGuest
from tests.lab.nic import Nic, run, wait_until

ROUNDS = 15
LIMIT = 1.10
OURS = HOOKS / "50-vnet-lock"
PYTHON = "/usr/bin/python3"


def start_s(nic: Nic, made: LibvirtGuest) -> float:
    """Seconds until virsh has started the guest; it is destroyed again, and its VF is as it was."""
    began = time.monotonic()
    made.start()
    took_s = time.monotonic() - began
    made.destroy()
    wait_until(lambda: nic.vfs[0].netdev, "libvirt has given the VF back")
    run("udevadm", "settle")
    return took_s


def installed(shim: str) -> str:
    """The hook with an interpreter and modules where a package would have them."""
    place = tempfile.mkdtemp()
    shutil.copytree(Path(vnet_lock.__file__).parent, f"{place}/vnet_lock")
    return hook_with(shim, PYTHON, place)


def measure(nic: Nic, made: LibvirtGuest) -> dict[str, float]:
    """The median with each hook, by its name; the first round is left out."""
    ours = installed(OURS.read_text(encoding="utf-8"))
    nothing = f'#!/bin/sh\ncat >/dev/null\n[ "$2" != prepare ] || {PYTHON} -I -S -c pass\n'
    hooks = {"none": None, "nothing": nothing, "ours": ours}
    times_s: dict[str, list[float]] = {name: [] for name in hooks}
    for _ in range(ROUNDS + 1):
        for name, text in hooks.items():
            # libvirt looks into the folder at each call.
            OURS.unlink(missing_ok=True)
            if text is not None:
                OURS.write_text(text, encoding="utf-8")
                OURS.chmod(0o755)
            times_s[name].append(start_s(nic, made))
    for name, each in times_s.items():
        print(f"{name:8}", *(f"{one:6.2f}" for one in each), file=sys.stderr, flush=True)
    return {name: statistics.median(each[1:]) for name, each in times_s.items()}


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
        found = measure(nic, made)
    finally:
        guests.end()
        run("vnet-lock", "hooks", "remove")
    rows = (
        Row("virsh start of a guest with one VF, with the hook", found["ours"], found["none"], LIMIT),
        Row("the same, with a hook in Python that does nothing", found["nothing"], found["none"], LIMIT),
    )
    for row in rows:
        measured, floor = quantity(row.measured, row.unit), quantity(row.floor, row.unit)
        print(f"{row.what:52} {measured:>10} {floor:>10} {row.ratio:8.3f} {row.limit_ratio:8.3f}")
    return 0 if rows[0].is_met else 1


if __name__ == "__main__":
    sys.exit(main())
