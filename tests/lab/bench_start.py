"""`virsh start` of a guest with one VF: without a hook, with vnet-lock's, and with one that does nothing.

    python -m tests.lab.vm --counted --deadline 1800 -- python -u -m tests.lab.bench_start

In turns, and the middle of each one's times counts. The VM's clock counts instructions: by any other, a start
here takes now four seconds, now eight. It has one CPU, so what the hook's server does meanwhile counts, too.
What does nothing is the least that a hook in Python can take: a shell at each step of a guest's, and an
interpreter at `prepare`. Ours is as a package has it: the system's interpreter, and modules on a disk of the
machine itself. The lab's checkout is on its host's, and nothing of it stays in memory.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import filelock
import pyroute2

import vnet_lock
from tests.bench.row import Row
from tests.bench.run import quantity
from tests.kernel.host import is_running
from tests.lab.contenders import hostdev_xml, owner_of
from tests.lab.daemons import HOOKS, LIBVIRTD, hook_with, hooks_served
from tests.lab.machines import Guests, LibvirtGuest
from tests.lab.nic import Nic, run, wait_until
from vnet_lock.settings import DEFAULT

ROUNDS = 6
LIMIT = 1.10
OURS = HOOKS / "50-vnet-lock"
PYTHON = "/usr/bin/python3"
SERVED = "served"


def start_s(nic: Nic, made: LibvirtGuest) -> float:
    """Seconds until virsh has started the guest; it is destroyed again, and its VF is as it was."""
    began = time.monotonic()
    made.start()
    took_s = time.monotonic() - began
    made.destroy()
    wait_until(lambda: nic.vfs[0].netdev, "libvirt has given the VF back")
    run("udevadm", "settle")
    return took_s


def copied() -> str:
    """Where a package's modules would be: a path of Python's."""
    place = tempfile.mkdtemp()
    shutil.copytree(Path(vnet_lock.__file__).parent, f"{place}/vnet_lock")
    time.sleep(1)  # a server ends where it may have loaded what was changed meanwhile
    return ":".join((place, *(str(Path(one.__file__ or "").parents[1]) for one in (filelock, pyroute2))))


def server_of(path: str) -> tuple[str, ...]:
    """The command line of the hook's server, with the same modules as the hook."""
    code = (
        f"import sys; sys.path += {path!r}.split(':')\n"
        "from vnet_lock.front.cli import main; sys.exit(main(['hooks', 'serve']))"
    )
    return (PYTHON, "-I", "-S", "-c", code)


def measure(nic: Nic, made: LibvirtGuest) -> dict[str, float]:
    """Seconds with each hook, by its name; round 0 is left out."""
    path = copied()
    ours = hook_with(OURS.read_text(encoding="utf-8"), PYTHON, path)
    hooks = {
        "none": None,
        "nothing": f'#!/bin/sh\ncat >/dev/null\n[ "$2" != prepare ] || {PYTHON} -I -S -c pass\n',
        "alone": ours,
        SERVED: ours,
    }
    times_s: dict[str, list[float]] = {name: [] for name in hooks}
    with hooks_served(*server_of(path)) as server:
        _take_turns(nic, made, hooks, times_s)
        assert is_running(server), "the hook's server has ended"
    return {name: statistics.median(each[1:]) for name, each in times_s.items()}


def _take_turns(
    nic: Nic, made: LibvirtGuest, hooks: Mapping[str, str | None], times_s: Mapping[str, list[float]]
) -> None:
    socket = Path(DEFAULT.hooks_socket_path)
    for number in range(ROUNDS + 1):
        # None always comes after the same.
        for name in random.Random(number).sample(list(hooks), len(hooks)):
            text = hooks[name]
            # libvirt looks into the folder at each call.
            OURS.unlink(missing_ok=True)
            if text is not None:
                OURS.write_text(text, encoding="utf-8")
                OURS.chmod(0o755)
            # Where there is nobody, nobody is asked.
            place = socket if name == SERVED else socket.with_suffix(".aside")
            socket.rename(place)
            times_s[name].append(start_s(nic, made))
            place.rename(socket)
        told = (f"{name} {each[-1]:.2f}" for name, each in times_s.items())
        print(f"round {number} of {ROUNDS}, in s:", *told, file=sys.stderr, flush=True)


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
        Row("virsh start of a guest with one VF, served hook", found[SERVED], found["none"], LIMIT),
        Row("the same, the hook answering itself", found["alone"], found["none"], LIMIT),
        Row("the same, a hook in Python that does nothing", found["nothing"], found["none"], LIMIT),
    )
    for row in rows:
        measured, floor = quantity(row.measured, row.unit), quantity(row.floor, row.unit)
        print(f"{row.what:52} {measured:>10} {floor:>10} {row.ratio:8.3f} {row.limit_ratio:8.3f}")
    return 0 if rows[0].is_met else 1


if __name__ == "__main__":
    sys.exit(main())
