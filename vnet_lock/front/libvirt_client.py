"""libvirt as a client sees it: connections, guests, events; its errors as one line of ours each.

The only importer of libvirt-python (50 ms). No hook loads this: libvirt holds the guest's lock while it waits
for the hook, so a call about the guest would wait for itself. One thread: events are taken in while somebody
waits for them, by libvirt's own loop, of which a process has one.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Any, Self

from vnet_lock.dataclass import dataclass
from vnet_lock.errors import BadInput, Unsupported, Vanished, VnetLockError

try:
    import libvirt
except ImportError as error:  # built for a later libvirt than this host's
    raise Unsupported(
        f"libvirt-python does not load ({error}); build it here: pip install --force-reinstall libvirt-python"
    ) from error

DEFAULT_URI = "qemu:///system"

# A daemon that doesn't answer is given up after 15 s; one that is killed closes its socket at once.
_KEEPALIVE_S = 5
_KEEPALIVE_COUNT = 3


class Disconnected(VnetLockError):
    """There is no libvirt daemon at the other end (any more)."""


class Busy(VnetLockError):
    """Something else is done to the guest, and libvirt gave up waiting for its end (after 30 s)."""


class State(StrEnum):
    """A guest's state, as ``virsh domstate`` names it."""

    NONE = "no state"
    RUNNING = "running"
    IDLE = "idle"
    PAUSED = "paused"
    SHUTDOWN = "in shutdown"
    SHUT_OFF = "shut off"
    CRASHED = "crashed"
    PMSUSPENDED = "pmsuspended"


_STATES = (
    State.NONE, State.RUNNING, State.IDLE, State.PAUSED, State.SHUTDOWN, State.SHUT_OFF, State.CRASHED,
    State.PMSUSPENDED,
)  # fmt: skip
# Its vCPUs run, in this host: on a migration's destination a guest is paused until they do.
RUNNING = (State.RUNNING, State.IDLE)


class Happened(StrEnum):
    """What an event tells of a guest."""

    DEFINED = "defined"
    UNDEFINED = "undefined"
    STARTED = "started"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    STOPPED = "stopped"
    SHUTDOWN = "shutdown"
    PMSUSPENDED = "pmsuspended"
    CRASHED = "crashed"
    DEVICE_ADDED = "device-added"
    DEVICE_REMOVED = "device-removed"
    DEVICE_REMOVAL_FAILED = "device-removal-failed"


_LIFECYCLE = tuple(Happened)[:9]  # in the order of virDomainEventType
_ENDS = (Happened.STOPPED, Happened.CRASHED, Happened.UNDEFINED)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a guest.

    ``alias`` is the device's, of an event about one; ``detail`` is libvirt's reason of a lifecycle event
    (virDomainEventStartedDetailType and so on).
    """

    name: str
    uuid: str
    what: Happened
    alias: str = ""
    detail: int = 0

    @property
    def is_failure(self) -> bool:
        """Whether it tells that a guest ended by a crash, or couldn't be started."""
        ends = (libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED, libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED)
        return self.what is Happened.CRASHED or (self.what is Happened.STOPPED and self.detail in ends)


class Libvirt:
    """A connection to a libvirt daemon, or to a driver within this process (``qemu:///embed``)."""

    def __init__(self, uri: str | None = None) -> None:
        """Connect; without a URI as LIBVIRT_DEFAULT_URI says, else to the host's own QEMU driver.

        Disconnected where nobody answers.
        """
        self.uri = uri or os.environ.get("LIBVIRT_DEFAULT_URI") or DEFAULT_URI
        _prepare_process()
        self._events: deque[Event] = deque()
        self._callbacks: list[int] = []
        with _translated(f"libvirt at {self.uri}"):
            self._connection: Any = libvirt.open(self.uri)
            with suppress(libvirt.libvirtError):  # a driver within this process has no connection to keep
                self._connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_COUNT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; again is no error."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with suppress(libvirt.libvirtError):
            for callback in self._callbacks:
                connection.domainEventDeregisterAny(callback)
        with suppress(libvirt.libvirtError):
            connection.close()

    @property
    def is_alive(self) -> bool:
        """Whether the daemon is still there, as far as was noticed."""
        try:
            return self._connection is not None and bool(self._connection.isAlive())
        except libvirt.libvirtError:
            return False

    def find(self, guest: str) -> Domain:
        """The guest with a name or UUID; BadInput where there is none."""
        with self._about(f'guest "{guest}"'):
            if re.fullmatch("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", guest):
                with suppress(libvirt.libvirtError):
                    return Domain(self, self._connection.lookupByUUIDString(guest))
            return Domain(self, self._connection.lookupByName(guest))

    def find_or_none(self, guest: str) -> Domain | None:
        """As ``find``; None where there is none."""
        try:
            return self.find(guest)
        except BadInput:
            return None

    def read_active(self) -> list[Domain]:
        """The guests that have a QEMU now."""
        with self._about("guests"):
            found = self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            return [Domain(self, one) for one in found]

    def define(self, xml: str, validate: bool = False) -> Domain:
        """Define a persistent guest, or a new definition of one; BadInput where libvirt can't read it."""
        flags = libvirt.VIR_DOMAIN_DEFINE_VALIDATE if validate else 0
        with self._about(_name_in(xml, "define")):
            return Domain(self, self._connection.defineXMLFlags(xml, flags))

    def create(self, xml: str, paused: bool = False, auto_destroy: bool = False) -> Domain:
        """Start a transient guest; ``auto_destroy`` ends it with this connection."""
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        flags |= libvirt.VIR_DOMAIN_START_AUTODESTROY if auto_destroy else 0
        with self._about(_name_in(xml, "start")):
            return Domain(self, self._connection.createXML(xml, flags))

    def read_networks(self) -> list[Network]:
        """The networks that are active."""
        with self._about("networks"):
            found = self._connection.listAllNetworks(libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE)
            return [Network(self, one) for one in found]

    def listen(self, domain: Domain | None = None) -> None:
        """From now on ``events`` tells what happens, to one guest or to all.

        Ask for a state after this, not before, and no change of it is missed.
        """
        of = domain._domain if domain else None
        with self._about("events"):
            for kind, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, self._on_device_added),
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, self._on_device_removed),
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, self._on_device_removal_failed),
            ):
                self._callbacks.append(self._connection.domainEventRegisterAny(of, kind, callback, None))

    def events(self, timeout_s: float) -> Iterator[Event]:
        """What happened, as it happens, for ``timeout_s`` seconds; Disconnected when the daemon is gone.

        A signal that Python handles is noticed within a second.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            while self._events:
                yield self._events.popleft()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            if not self.is_alive:
                raise Disconnected(f"libvirt at {self.uri} is gone")
            _run_loop_once(min(left_s, 1.0))

    @contextmanager
    def _about(self, what: str) -> Iterator[None]:
        if self._connection is None:
            raise Disconnected(f"libvirt at {self.uri} was hung up on")
        with _translated(what, lambda: self.is_alive):
            yield

    def _on_lifecycle(self, _: object, domain: Any, event: int, detail: int, __: object) -> None:
        if event < len(_LIFECYCLE):
            self._events.append(_event(domain, _LIFECYCLE[event], detail=detail))

    def _on_device_added(self, _: object, domain: Any, alias: str, __: object) -> None:
        self._events.append(_event(domain, Happened.DEVICE_ADDED, alias))

    def _on_device_removed(self, _: object, domain: Any, alias: str, __: object) -> None:
        self._events.append(_event(domain, Happened.DEVICE_REMOVED, alias))

    def _on_device_removal_failed(self, _: object, domain: Any, alias: str, __: object) -> None:
        self._events.append(_event(domain, Happened.DEVICE_REMOVAL_FAILED, alias))


class Domain:
    """A guest of libvirt's; all of its methods raise VnetLockError where libvirt refuses."""

    def __init__(self, owner: Libvirt, domain: Any) -> None:
        self._libvirt = owner
        self._domain = domain
        self.name: str = domain.name()
        self.uuid: str = domain.UUIDString()

    @property
    def state(self) -> State:
        """What it does now; BadInput when it isn't known any more (a transient guest that ended)."""
        with self._about():
            number = self._domain.state()[0]
        return _STATES[number] if number < len(_STATES) else State.NONE

    @property
    def is_active(self) -> bool:
        """Whether it has a QEMU."""
        with self._about():
            return bool(self._domain.isActive())

    @property
    def is_persistent(self) -> bool:
        """Whether it has a definition that stays."""
        with self._about():
            return bool(self._domain.isPersistent())

    @property
    def has_saved_state(self) -> bool:
        """Whether its next start would go on where a managed save ended."""
        with self._about():
            return bool(self._domain.hasManagedSaveImage())

    def read_xml(self, inactive: bool = False, secrets: bool = False) -> str:
        """Its XML as it runs, or (``inactive``) as it will start the next time."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        flags |= libvirt.VIR_DOMAIN_XML_SECURE if secrets else 0
        with self._about():
            return str(self._domain.XMLDesc(flags))

    def start(self, paused: bool = False) -> None:
        """Start it."""
        with self._about():
            self._domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)

    def destroy(self) -> None:
        """End its QEMU; it is no error where it has none."""
        self._end(self._domain.destroy)

    def shutdown(self) -> None:
        """Ask it to power off; it is no error where it has no QEMU."""
        self._end(self._domain.shutdown)

    def suspend(self) -> None:
        """Let its vCPUs stand still."""
        with self._about():
            self._domain.suspend()

    def resume(self) -> None:
        """Let its vCPUs run."""
        with self._about():
            self._domain.resume()

    def undefine(self) -> None:
        """Remove its definition."""
        with self._about():
            self._domain.undefine()

    def attach(self, xml: str, live: bool = True, config: bool = False) -> None:
        """Plug a device in, into what runs, what is defined, or both."""
        with self._about():
            self._domain.attachDeviceFlags(xml, _affect(live, config))

    def detach(self, xml: str, live: bool = True, config: bool = False) -> None:
        """Unplug a device; Vanished where there is none like that.

        Of a running guest this only asks: DEVICE_REMOVED tells when it is gone.
        """
        with self._about():
            self._domain.detachDeviceFlags(xml, _affect(live, config))

    def detach_alias(self, alias: str, live: bool = True, config: bool = False) -> None:
        """As ``detach``, of the device with an alias."""
        with self._about():
            self._domain.detachDeviceAlias(alias, _affect(live, config))

    def update(self, xml: str, live: bool = True, config: bool = False) -> None:
        """Change a device."""
        with self._about():
            self._domain.updateDeviceFlags(xml, _affect(live, config))

    def wait_for(self, is_it: Callable[[State], bool], timeout_s: float) -> State:
        """Its state, as soon as it is one of those, or it has ended, or the time is over.

        Takes in all events of the connection. A guest that is shut off may be about to start: it has ended
        when an event says so, or libvirt doesn't know it any more (SHUT_OFF is returned then, too).
        Disconnected where the daemon goes meanwhile.
        """
        self._libvirt.listen(self)
        events = self._libvirt.events(timeout_s)
        while True:
            try:
                state = self.state
            except BadInput:
                return State.SHUT_OFF
            if is_it(state):
                return state
            event = next(events, None)
            if event is None or (event.uuid == self.uuid and event.what in _ENDS):
                return state if event is None else State.SHUT_OFF

    def wait_until_running(self, timeout_s: float) -> State:
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
        with self._libvirt._about(f'guest "{self.name}"'):
            yield


class Network:
    """A network of libvirt's, with the ports by which guests are connected to it."""

    def __init__(self, owner: Libvirt, network: Any) -> None:
        self._libvirt = owner
        self._network = network
        self.name: str = network.name()

    def read_xml(self) -> str:
        """Its XML as it is now, with the devices that it found for itself."""
        with self._about():
            return str(self._network.XMLDesc(0))

    def read_ports(self) -> list[tuple[str, str]]:
        """The UUID and XML of each port."""
        with self._about():
            return [(port.UUIDString(), str(port.XMLDesc(0))) for port in self._network.listAllPorts()]

    def add_port(self, xml: str) -> None:
        """Make a port with the device that its XML names; VnetLockError where another port has it."""
        with self._about():
            self._network.portCreateXML(xml, libvirt.VIR_NETWORK_PORT_CREATE_RECLAIM)

    def remove_port(self, uuid: str) -> None:
        """Remove a port; absent is success."""
        with self._about():
            try:
                self._network.portLookupByUUIDString(uuid).delete()
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_NETWORK_PORT:
                    raise

    @contextmanager
    def _about(self) -> Iterator[None]:
        with self._libvirt._about(f'network "{self.name}"'):
            yield


# --- errors ---------------------------------------------------------------------------------------

_BAD_INPUT = (
    libvirt.VIR_ERR_NO_DOMAIN,
    libvirt.VIR_ERR_XML_ERROR,
    libvirt.VIR_ERR_XML_DETAIL,
    libvirt.VIR_ERR_XML_INVALID_SCHEMA,
)
_UNSUPPORTED = (
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
    libvirt.VIR_ERR_NO_SUPPORT,
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
)
# What libvirt puts around a hook's own words.
_OF_A_HOOK = re.compile(r".*?\bvnet-lock: (.*)", re.DOTALL)


@contextmanager
def _translated(what: str, is_alive: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Libvirt's errors as ours, with what they are about before them."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise _error_of(error, what, is_alive) from error


def _error_of(error: Any, what: str, is_alive: Callable[[], bool]) -> VnetLockError:
    code = error.get_error_code()
    message = " ".join(str(error.get_error_message() or error).split())
    if code == libvirt.VIR_ERR_HOOK_SCRIPT_FAILED and (match := _OF_A_HOOK.fullmatch(message)):
        message = match[1]
    message = f"{what}: {message}"
    if code == libvirt.VIR_ERR_NO_CONNECT or error.get_error_domain() == libvirt.VIR_FROM_RPC:
        return Disconnected(f"{message}; is libvirt's daemon running?")
    if not is_alive():
        return Disconnected(message)
    if code in _BAD_INPUT:
        return BadInput(message)
    if code in _UNSUPPORTED:
        return Unsupported(message)
    if code == libvirt.VIR_ERR_DEVICE_MISSING:
        return Vanished(message)
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return Busy(f"{message}; try again")
    return VnetLockError(message)


def _name_in(xml: str, otherwise: str) -> str:
    found = re.search("<name>([^<]*)</name>", xml)
    return f'guest "{found[1]}"' if found else otherwise


def _affect(live: bool, config: bool) -> int:
    return (libvirt.VIR_DOMAIN_AFFECT_LIVE if live else 0) | (
        libvirt.VIR_DOMAIN_AFFECT_CONFIG if config else 0
    )


def _event(domain: Any, what: Happened, alias: str = "", detail: int = 0) -> Event:
    return Event(domain.name(), domain.UUIDString(), what, alias, detail)


# --- this process ---------------------------------------------------------------------------------

_is_prepared = False


def _prepare_process() -> None:
    """Once, and before the first connection: the event loop, and no words of libvirt's own on stderr."""
    global _is_prepared  # noqa: PLW0603 - libvirt's loop is the process's, too
    if not _is_prepared:
        libvirt.virEventRegisterDefaultImpl()
        libvirt.registerErrorHandler(lambda *_: None, None)
        _is_prepared = True


def _run_loop_once(at_most_s: float) -> None:
    """Let libvirt's loop take in what there is, or wait for it ``at_most_s`` seconds."""
    timer = libvirt.virEventAddTimeout(max(int(at_most_s * 1000), 1), lambda *_: None, None)
    try:
        libvirt.virEventRunDefaultImpl()
    finally:
        libvirt.virEventRemoveTimeout(timer)
