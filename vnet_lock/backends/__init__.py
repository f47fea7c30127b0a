"""QEMU implementations, one file each: how a guest is connected to a port.

The file of a backend is named like its member of ``Backend`` and has two functions:

``missing(settings)``
    why this host can't do it, empty where it can.
``connect(settings, intent, opened, combination)``
    opens what a QEMU of ours is handed; the caller owns the descriptors.
"""

from __future__ import annotations

import os
from types import ModuleType

from vnet_lock.combination import Backend, Combination
from vnet_lock.dataclass import dataclass
from vnet_lock.model import PciAddress, Process
from vnet_lock.ports import load


@dataclass(frozen=True, slots=True)
class Connection:
    """What one interface's words on QEMU's command line are made of.

    ``fds`` and ``vhost_fds`` have one descriptor for each queue; ``pci`` is set for VFIO alone, ``path``, a
    unix socket, for socket+vhost; ``iommufd`` says that the kernel offers the function through it, too. QEMU
    inherits ``kept`` without knowing of it: what serves the guest ends with its last holder. ``datapath`` is
    the process of ours that carries the packets, where there is one.
    """

    combination: Combination
    mac: str | None = None
    fds: tuple[int, ...] = ()
    vhost_fds: tuple[int, ...] = ()
    pci: PciAddress | None = None
    netdev: str | None = None
    path: str | None = None
    kept: tuple[int, ...] = ()
    iommufd: bool = False
    datapath: Process | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All that the caller owns, in the order in which they are handed on."""
        return (*self.fds, *self.vhost_fds, *self.kept)

    def close(self) -> None:
        """Let go of them all: what was to serve the guest ends."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def find(backend: Backend) -> ModuleType | None:
    """The backend's own file, None while there is none."""
    return load(f"{__name__}.{backend.name.lower()}")
