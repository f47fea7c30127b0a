"""Kernel implementations, one file each: what a guest's interface can be on this host.

The file of a port is named like its member of ``Port`` and has two functions:

``candidates(intent, backend, situation)``
    pure: yields each device that could be used, or why it can't.
``open_port(job)``
    changes the kernel, each change journalled before it is made; the way back is undo.py's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from vnet_lock.combination import Port
from vnet_lock.journal import Entry
from vnet_lock.model import Assignment, Intent, Inventory, PciAddress, Resource
from vnet_lock.settings import Settings


@dataclass(frozen=True, slots=True)
class Opened:
    """What a port made for the guest: a link in this network namespace, or a PCI function for VFIO."""

    netdev: str | None = None
    mac: str | None = None
    pci: PciAddress | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A granted claim and what is to be done with it. No claim, no job.

    ``journal`` writes entries to the claim's record; what it returned for may be changed.
    """

    settings: Settings
    inventory: Inventory
    assignment: Assignment
    intent: Intent
    token: str
    journal: Callable[[tuple[Entry, ...]], None]

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
