"""What happens to guests, as libvirt tells it: by its own loop, of which a process has one.

One thread: events are taken in while somebody waits for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from typing import Any

import libvirt

from vnet_lock.dataclass import dataclass


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


class Inbox:
    """What one connection was told and nobody has read yet."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._callbacks: list[int] = []

    def listen(self, connection: Any, domain: Any | None) -> None:
        """Take in from now on what happens to one guest, or to all; both are libvirt-python's own."""
        for kind, callback in (
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, self._on_device_added),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, self._on_device_removed),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, self._on_device_removal_failed),
        ):
            self._callbacks.append(connection.domainEventRegisterAny(domain, kind, callback, None))

    def close(self, connection: Any) -> None:
        """Take in nothing more."""
        with suppress(libvirt.libvirtError):
            for callback in self._callbacks:
                connection.domainEventDeregisterAny(callback)

    def read(self) -> Iterator[Event]:
        """What has come, each once."""
        while self._events:
            yield self._events.popleft()

    def _on_lifecycle(self, _: object, domain: Any, event: int, detail: int, __: object) -> None:
        if event < len(_LIFECYCLE):
            self._events.append(_event(domain, _LIFECYCLE[event], detail=detail))

    def _on_device_added(self, _: object, domain: Any, alias: str, __: object) -> None:
        self._events.append(_event(domain, Happened.DEVICE_ADDED, alias))

    def _on_device_removed(self, _: object, domain: Any, alias: str, __: object) -> None:
        self._events.append(_event(domain, Happened.DEVICE_REMOVED, alias))

    def _on_device_removal_failed(self, _: object, domain: Any, alias: str, __: object) -> None:
        self._events.append(_event(domain, Happened.DEVICE_REMOVAL_FAILED, alias))


def _event(domain: Any, what: Happened, alias: str = "", detail: int = 0) -> Event:
    return Event(domain.name(), domain.UUIDString(), what, alias, detail)


# --- this process ---------------------------------------------------------------------------------

_is_prepared = False


def prepare_process() -> None:
    """Once, and before the first connection: the event loop, and no words of libvirt's own on stderr."""
    global _is_prepared  # noqa: PLW0603 - libvirt's loop is the process's, too
    if not _is_prepared:
        libvirt.virEventRegisterDefaultImpl()
        libvirt.registerErrorHandler(lambda *_: None, None)
        _is_prepared = True


def run_loop_once(at_most_s: float) -> None:
    """Let libvirt's loop take in what there is, or wait for it ``at_most_s`` seconds."""
    timer = libvirt.virEventAddTimeout(max(int(at_most_s * 1000), 1), lambda *_: None, None)
    try:
        libvirt.virEventRunDefaultImpl()
    finally:
        libvirt.virEventRemoveTimeout(timer)
