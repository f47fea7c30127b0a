"""Kernel implementations, one file each: what a guest's interface can be on this host.

The file of a port is named like its member of ``Port`` and has two functions:

``candidates(intent, backend, situation)``
    pure: yields each device that could be used, or why it can't.
``open_port(job)``
    changes the kernel, each change journalled before it is made; the way back is undo.py's.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Protocol

from vnet_lock.combination import Port
from vnet_lock.dataclass import dataclass
from vnet_lock.journal import Entry
from vnet_lock.model import Inventory, PciAddress, Resource
from vnet_lock.request import Assignment, Intent
from vnet_lock.settings import Settings


@dataclass(slots=True)
class Opened:
    """What a port made for the guest: a link, or a PCI function for VFIO; neither for a user network.

    The link is in the network namespace that the descriptor ``netns`` keeps, in this one without. A
    namespace has no name and no process: it goes with the last descriptor of it, or socket in it. ``path``
    is where a backend that needs one may have a unix socket; it is in the claim's journal. ``left`` is to be
    called once the guest runs here, where something was left undone until then.
    """

    netdev: str | None = None
    mac: str | None = None
    pci: PciAddress | None = None
    netns: int | None = None
    path: str | None = None
    left: Callable[[], None] | None = None

    def close(self) -> None:
        """Let go of the namespace; whoever has opened something in it keeps it."""
        if self.netns is not None:
            os.close(self.netns)
            self.netns = None


class Share(Protocol):
    """Journals what several guests share, and returns the entry as it is to be.

    That is another claim's where one has it already: of the same ``share_key``, or such that ``like`` says
    so. Asked under the guard, ``like`` must not wait for anything.
    """

    def __call__(self, entry: Entry, like: Callable[[Entry], bool] | None = None) -> Entry: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Job:
    """A granted claim and what is to be done with it. No claim, no job.

    ``journal`` writes entries to the claim's record; what it returned for may be changed. What several
    guests share is journalled and changed inside ``with job.sharing() as share``, by ``share(entry)``: it
    returns the entry as another guest's claim has it already, so that the last one restores what was before
    the first.
    """

    settings: Settings
    inventory: Inventory
    assignment: Assignment
    intent: Intent
    token: str
    journal: Callable[[tuple[Entry, ...]], None]
    sharing: Callable[[], AbstractContextManager[Share]]
    # What is left undone, of a guest that runs elsewhere still; None where nothing is to be.
    left: list[Callable[[], None]] | None = None

    def once_it_runs(self, step: Callable[[], None]) -> None:
        """Do what draws traffic here: now, or once a guest that comes from another host runs on this one.

        It journals nothing: whoever undoes may be at it already.
        """
        if self.left is None:
            step()
        else:
            self.left.append(step)

    @property
    def device(self) -> Resource:
        """The device that was granted."""
        return self.assignment.device


def find(port: Port) -> ModuleType | None:
    """The port's own file, None while there is none."""
    return load(f"{__name__}.{port.name.lower()}")


def load(name: str) -> ModuleType | None:
    """A module, None where there is none; an import that fails inside it stays an error."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
