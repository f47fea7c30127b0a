"""A connection to libvirt, by which guests and networks are found."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import libvirt

from vnet_lock.errors import BadInput
from vnet_lock.front.libvirt_client.domain import Domain
from vnet_lock.front.libvirt_client.errors import Disconnected, translated
from vnet_lock.front.libvirt_client.events import Event, Inbox, prepare_process, run_loop_once
from vnet_lock.front.libvirt_client.network import Network

DEFAULT_URI = "qemu:///system"

# A daemon that doesn't answer is given up after 15 s; one that is killed closes its socket at once.
_KEEPALIVE_S = 5
_KEEPALIVE_COUNT = 3


class Libvirt:
    """A connection to a libvirt daemon, or to a driver within this process (``qemu:///embed``)."""

    def __init__(self, uri: str | None = None) -> None:
        """Connect; without a URI as LIBVIRT_DEFAULT_URI says, else to the host's own QEMU driver.

        Disconnected where nobody answers.
        """
        self.uri = uri or os.environ.get("LIBVIRT_DEFAULT_URI") or DEFAULT_URI
        prepare_process()
        self._inbox = Inbox()
        with translated(f"libvirt at {self.uri}"):
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
        self._inbox.close(connection)
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
                    return Domain(self._about, self._connection.lookupByUUIDString(guest))
            return Domain(self._about, self._connection.lookupByName(guest))

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
            return [Domain(self._about, one) for one in found]

    def define(self, xml: str) -> Domain:
        """Define a persistent guest, or a new definition of one; BadInput where libvirt can't read it."""
        with self._about(_name_in(xml, "define")):
            return Domain(self._about, self._connection.defineXMLFlags(xml))

    def create(self, xml: str, paused: bool = False) -> Domain:
        """Start a transient guest."""
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        with self._about(_name_in(xml, "start")):
            return Domain(self._about, self._connection.createXML(xml, flags))

    def read_networks(self) -> list[Network]:
        """The networks that are active."""
        with self._about("networks"):
            found = self._connection.listAllNetworks(libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE)
            return [Network(self._about, one) for one in found]

    def listen(self, domain: Domain | None = None) -> None:
        """From now on ``events`` tells what happens, to one guest or to all.

        Ask for a state after this, not before, and no change of it is missed.
        """
        with self._about("events"):
            self._inbox.listen(self._connection, domain.handle if domain else None)

    def events(self, timeout_s: float) -> Iterator[Event]:
        """What happened, as it happens, for ``timeout_s`` seconds; Disconnected when the daemon is gone.

        A signal that Python handles is noticed within a second.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            yield from self._inbox.read()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            if not self.is_alive:
                raise Disconnected(f"libvirt at {self.uri} is gone")
            run_loop_once(min(left_s, 1.0))

    @contextmanager
    def _about(self, what: str) -> Iterator[None]:
        if self._connection is None:
            raise Disconnected(f"libvirt at {self.uri} was hung up on")
        with translated(what, lambda: self.is_alive):
            yield


def _name_in(xml: str, otherwise: str) -> str:
    found = re.search("<name>([^<]*)</name>", xml)
    return f'guest "{found[1]}"' if found else otherwise
