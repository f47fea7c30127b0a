"""A vnet-qemu whose session is written by hand: ``python fake_vnet_qemu.py FOLDER BEHAVIOUR ARGUMENTS…``.

The session notes what it is asked for in FOLDER/log; BEHAVIOUR says what goes wrong.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from vnet_lock.backends import Connection
from vnet_lock.combination import Combination
from vnet_lock.errors import Refused, VnetLockError
from vnet_lock.front import wrapper
from vnet_lock.front.command import serve
from vnet_lock.model import Mode, Owner, Resource, Wanted
from vnet_lock.request import Assignment, Intent
from vnet_lock.settings import DEFAULT


def assignment(request: Intent, text: str, resource: Resource) -> Assignment:
    return Assignment(request, Combination.parse(text), (Wanted(resource, Mode.SHARED),))


@dataclass(frozen=True)
class Grant:
    assignment: Assignment

    def close(self) -> None:
        """Nothing is held open by it."""


class Session:
    def __init__(self, folder: Path, behave: str) -> None:
        self.folder = folder
        self.behave = behave
        self.opened: list[int] = []

    def note(self, text: str) -> None:
        with open(self.folder / "log", "a") as log:
            log.write(text + "\n")

    def acquire(self, owner: Owner, requests: tuple[Intent, ...]) -> tuple[Grant, ...]:
        self.note(f"acquire {owner.name} {owner.process.pid} {owner.process.start_ticks}")
        if self.behave == "refuse":
            raise Refused("PF eth0 is held by another")
        if self.behave == "slow":
            try:
                time.sleep(30)
            except BaseException:
                self.note("undone")
                raise
        return tuple(Grant(assignment(one, "vepa-macvlan-tap", Resource.nic("eth0"))) for one in requests)

    def connect(self, grant: Grant) -> Connection:
        if self.behave == "fail":
            raise VnetLockError("cannot open vl0")
        fd = os.open(self.folder / "tap", os.O_RDWR | os.O_CREAT)
        self.opened.append(fd)
        return Connection(grant.assignment.combination, "52:54:00:00:00:01", (fd,))

    def hand_over(self, old: Owner, new: Owner) -> None:
        self.note(f"hand_over {old.process.pid} {new.process.pid}")

    def release(self, owner: Owner) -> None:
        self.note(f"release {owner.process.pid} {owner.process.start_ticks}")
        if any(os.path.exists(f"/proc/self/fd/{number}") for number in self.opened):
            # Nobody can wait for a device to become free that he holds himself.
            self.note("the tap is open still")
        if self.behave == "stuck":
            raise VnetLockError("cannot remove vl0")


def main() -> int:
    folder, behave = Path(sys.argv[1]), sys.argv[2]
    settings = replace(DEFAULT, run=str(folder))
    words, session = sys.argv[3:], lambda: Session(folder, behave)
    return serve("vnet-qemu", lambda: wrapper.run(words, settings, session, lambda: None))


if __name__ == "__main__":
    sys.exit(main())
