"""A guest of libvirt's."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Any

import libvirt

from vnet_lock.errors import BadInput, VnetLockError
from vnet_lock.front.libvirt_client.errors import About


class DomainState(StrEnum):
    """A guest's state, as ``virsh domstate`` names it."""

    NONE = "no state"
    RUNNING = "running"
    IDLE = "idle"
    PAUSED = "paused"
    SHUTDOWN = "in shutdown"
    SHUT_OFF = "shut off"
    CRASHED = "crashed"
    PMSUSPENDED = "pmsuspended"


_STATES = tuple(DomainState)  # in the order of virDomainState
# Its vCPUs run, in this host: on a migration's destination a guest is paused until they do.
RUNNING = (DomainState.RUNNING, DomainState.IDLE)


class Domain:
    """A guest of libvirt's; all of its methods raise VnetLockError where libvirt refuses."""

    def __init__(self, about: About, handle: Any) -> None:
        """``handle`` is libvirt-python's own guest, ``about`` says whatever fails."""
        self.handle = handle
        self.name: str = handle.name()
        self.uuid: str = handle.UUIDString()
        self._about = partial(about, f'guest "{self.name}"')

    @property
    def state(self) -> DomainState:
        """What it does now; BadInput when it isn't known any more (a transient guest that ended)."""
        with self._about():
            number = self.handle.state()[0]
        return _STATES[number] if number < len(_STATES) else DomainState.NONE

    @property
    def is_active(self) -> bool:
        """Whether it has a QEMU; a transient guest that has ended isn't known any more."""
        try:
            with self._about():
                return bool(self.handle.isActive())
        except BadInput:
            return False

    @property
    def has_saved_state(self) -> bool:
        """Whether its next start would go on where a managed save ended."""
        with self._about():
            return bool(self.handle.hasManagedSaveImage())

    def read_xml(self, inactive: bool = False, secrets: bool = False) -> str:
        """Its XML as it runs, or (``inactive``) as it will start the next time."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        flags |= libvirt.VIR_DOMAIN_XML_SECURE if secrets else 0
        with self._about():
            return str(self.handle.XMLDesc(flags))

    def start(self, paused: bool = False) -> None:
        """Start it."""
        with self._about():
            self.handle.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)

    def destroy(self) -> None:
        """End its QEMU; it is no error where it has none."""
        try:
            with self._about():
                self.handle.destroy()
        except VnetLockError:
            if self.is_active:
                raise

    def attach(self, xml: str) -> None:
        """Plug a device into what runs."""
        with self._about():
            self.handle.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def detach_alias(self, alias: str) -> None:
        """Unplug the device with an alias; Vanished where there is none.

        This only asks: DEVICE_REMOVED tells when it is gone.
        """
        with self._about():
            self.handle.detachDeviceAlias(alias, libvirt.VIR_DOMAIN_AFFECT_LIVE)
