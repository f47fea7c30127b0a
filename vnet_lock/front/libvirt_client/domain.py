"""A guest of libvirt's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import StrEnum
from typing import Any, Protocol

import libvirt

from vnet_lock.errors import BadInput, VnetLockError
from vnet_lock.front.libvirt_client.events import ENDS, Event


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


class Connection(Protocol):
    """What a guest needs of the connection that it was found by."""

    def about(self, what: str) -> AbstractContextManager[None]:
        """Libvirt's errors as ours, with what they are about before them."""

    def listen(self, domain: Domain | None = None) -> None:
        """From now on ``events`` tells what happens."""

    def events(self, timeout_s: float) -> Iterator[Event]:
        """What happened."""


class Domain:
    """A guest of libvirt's; all of its methods raise VnetLockError where libvirt refuses."""

    def __init__(self, connection: Connection, domain: Any) -> None:
        self._connection = connection
        self.handle = domain
        self.name: str = domain.name()
        self.uuid: str = domain.UUIDString()

    @property
    def state(self) -> DomainState:
        """What it does now; BadInput when it isn't known any more (a transient guest that ended)."""
        with self._about():
            number = self.handle.state()[0]
        return _STATES[number] if number < len(_STATES) else DomainState.NONE

    @property
    def is_active(self) -> bool:
        """Whether it has a QEMU."""
        with self._about():
            return bool(self.handle.isActive())

    @property
    def is_persistent(self) -> bool:
        """Whether it has a definition that stays."""
        with self._about():
            return bool(self.handle.isPersistent())

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
        self._end(self.handle.destroy)

    def shutdown(self) -> None:
        """Ask it to power off; it is no error where it has no QEMU."""
        self._end(self.handle.shutdown)

    def suspend(self) -> None:
        """Let its vCPUs stand still."""
        with self._about():
            self.handle.suspend()

    def resume(self) -> None:
        """Let its vCPUs run."""
        with self._about():
            self.handle.resume()

    def undefine(self) -> None:
        """Remove its definition."""
        with self._about():
            self.handle.undefine()

    def attach(self, xml: str, live: bool = True, config: bool = False) -> None:
        """Plug a device in, into what runs, what is defined, or both."""
        with self._about():
            self.handle.attachDeviceFlags(xml, _affect(live, config))

    def detach(self, xml: str, live: bool = True, config: bool = False) -> None:
        """Unplug a device; Vanished where there is none like that.

        Of a running guest this only asks: DEVICE_REMOVED tells when it is gone.
        """
        with self._about():
            self.handle.detachDeviceFlags(xml, _affect(live, config))

    def detach_alias(self, alias: str, live: bool = True, config: bool = False) -> None:
        """As ``detach``, of the device with an alias."""
        with self._about():
            self.handle.detachDeviceAlias(alias, _affect(live, config))

    def update(self, xml: str, live: bool = True, config: bool = False) -> None:
        """Change a device."""
        with self._about():
            self.handle.updateDeviceFlags(xml, _affect(live, config))

    def wait_for(self, is_it: Callable[[DomainState], bool], timeout_s: float) -> DomainState:
        """Its state, as soon as it is one of those, or it has ended, or the time is over.

        Takes in all events of the connection. A guest that is shut off may be about to start: it has ended
        when an event says so, or libvirt doesn't know it any more (SHUT_OFF is returned then, too).
        Disconnected where the daemon goes meanwhile.
        """
        self._connection.listen(self)
        events = self._connection.events(timeout_s)
        while True:
            try:
                state = self.state
            except BadInput:
                return DomainState.SHUT_OFF
            if is_it(state):
                return state
            event = next(events, None)
            if event is None or (event.uuid == self.uuid and event.what in ENDS):
                return state if event is None else DomainState.SHUT_OFF

    def wait_until_running(self, timeout_s: float) -> DomainState:
        """As ``wait_for``: until its vCPUs run on this host."""
        return self.wait_for(lambda state: state in RUNNING, timeout_s)

    def _end(self, end: Callable[[], object]) -> None:
        try:
            with self._about():
                end()
        except VnetLockError:
            with suppress(BadInput):  # it was transient, and is gone
                if self.is_active:
                    raise

    @contextmanager
    def _about(self) -> Iterator[None]:
        with self._connection.about(f'guest "{self.name}"'):
            yield


def _affect(live: bool, config: bool) -> int:
    return (libvirt.VIR_DOMAIN_AFFECT_LIVE if live else 0) | (
        libvirt.VIR_DOMAIN_AFFECT_CONFIG if config else 0
    )
