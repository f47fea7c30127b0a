"""vnet-lock watch: claims what libvirt's guests get by a hot-plug that no hook is told of; says conflicts.

A raw hostdev or direct interface can't be refused there: libvirt tells of it when the guest has it. Optional,
one process for a host, in addition to the hooks: what they claimed it finds claimed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from vnet_lock.claims import ClaimTable
from vnet_lock.dataclass import dataclass
from vnet_lock.domain_devices import read_user_aliases
from vnet_lock.domain_document import parse
from vnet_lock.domain_xml import read_fixed
from vnet_lock.errors import BadInput, VnetLockError
from vnet_lock.front import resident
from vnet_lock.front.command import print_error
from vnet_lock.front.libvirt_client.connection import DEFAULT_URI, Libvirt
from vnet_lock.front.libvirt_client.domain import Domain
from vnet_lock.front.libvirt_client.errors import Disconnected
from vnet_lock.front.libvirt_client.events import Happened
from vnet_lock.front.libvirt_guest import find_tokens, is_own_daemon, read_owner
from vnet_lock.front.pool_ports import PoolPorts
from vnet_lock.model import Owner, PciAddress
from vnet_lock.request import Fixed, Request
from vnet_lock.settings import Settings

_PROGRAM = "vnet-lock"
_RETRY_S = 1.0
# After some of these it may run on: undefined it is transient, crashed it may be kept.
_LOOK = (
    *(Happened.STARTED, Happened.RESUMED, Happened.DEVICE_ADDED, Happened.DEVICE_REMOVED),
    *(Happened.CRASHED, Happened.UNDEFINED),
)


class WatchSession(Protocol):
    """What this needs of a session."""

    table: ClaimTable

    def adopt(self, owner: Owner, requests: Iterable[Request], running: bool = False) -> list[str]:
        """Claim what a guest has."""

    def release_tokens(self, owner: Owner, tokens: Iterable[str]) -> None:
        """Give back some of what a guest had."""

    def held_vfs(self, pcis: Collection[PciAddress]) -> set[PciAddress]:
        """Those VFs that can't be given to anybody now."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a guest had when it was looked at: devices that libvirt opened, and aliases of its interfaces."""

    fixed: frozenset[Fixed] = frozenset()
    aliases: frozenset[str] = frozenset()


def follow(settings: Settings, session: WatchSession, uri: str | None) -> int:
    """Watch until SIGTERM or SIGINT; 0 then. A daemon that is away is waited for.

    BadInput where it isn't the daemon of this host's own guests, Refused where another watches already.
    """
    uri = _choose_uri(uri)
    watch = Watch(settings, session)
    was_there = True
    session.table.make_directories()
    alone = resident.alone(settings, settings.watch_lock_path, "vnet-lock watch")
    with alone, _told_to_end(watch):
        while not watch.is_over:
            try:
                with Libvirt(uri) as libvirt:
                    was_there = True
                    watch.run(libvirt)
            except Disconnected as error:
                if was_there:
                    print_error(_PROGRAM, error)
                was_there = False
                time.sleep(_RETRY_S)
    return 0


def _choose_uri(uri: str | None) -> str:
    """The daemon that is named, as of all verbs; BadInput where its guests aren't root's on this host."""
    chosen = uri or os.environ.get("LIBVIRT_DEFAULT_URI") or DEFAULT_URI
    if not is_own_daemon(chosen):
        whose, word = ("", "") if uri else (" of LIBVIRT_DEFAULT_URI", "-c ")
        raise BadInput(
            f"{chosen}{whose} has guests that aren't root's on this host; watch {word}{DEFAULT_URI}"
        )
    return chosen


class Watch:
    """What is known of each guest, by its UUID."""

    def __init__(self, settings: Settings, session: WatchSession) -> None:
        self.is_over = False
        self._settings = settings
        self._session = session
        self._seen: dict[str, Seen] = {}
        # What is wrong with a guest, as it was said; one with a conflict is looked at until there is none.
        self._wrong: dict[str, list[str]] = {}
        self._ports = PoolPorts(settings, session)

    def run(self, libvirt: Libvirt) -> None:
        """Look at all guests, and again at each one that something happens to; Disconnected at the end."""
        libvirt.listen()
        self._seen.clear()
        for domain in libvirt.read_active():
            self.look(domain)
        print(f"watching libvirt at {libvirt.uri}", flush=True)
        while not self.is_over:
            for event in libvirt.events(_RETRY_S):
                if event.what is Happened.STOPPED:
                    self._forget(event.uuid)
                elif event.what in _LOOK:
                    self._look_again(libvirt, event.uuid)
            for uuid in tuple(self._wrong):
                self._look_again(libvirt, uuid)
            self._ports.update(libvirt)
        self._ports.remove(libvirt)

    def look(self, domain: Domain) -> None:
        """Claim what the guest has, and give back what it has had."""
        try:
            root = parse(domain.read_xml().encode())
            owner = read_owner(self._settings, domain.name, domain.uuid)
            found = read_fixed(root).requests
        except Disconnected:
            raise
        except VnetLockError as error:  # it has just ended, or it has what nobody can read
            self._say(domain.uuid, [f'guest "{domain.name}": {error}'])
            return
        fixed = frozenset(request for request in found if isinstance(request, Fixed))
        now = Seen(fixed, read_user_aliases(root))
        before = self._seen.get(domain.uuid, Seen())
        self._seen[domain.uuid] = now
        wrong: list[str] = []
        added = [request for request in now.fixed if self._claim(owner, request, wrong)]
        self._release(owner, before, now, wrong)
        self._say(domain.uuid, wrong)
        if added and not domain.is_active:
            # Its hook may have given back what it had before we claimed this.
            self._release(owner, Seen(frozenset(added)), Seen(), wrong)
            self._forget(domain.uuid)

    def _look_again(self, libvirt: Libvirt, uuid: str) -> None:
        domain = libvirt.find_or_none(uuid)
        if domain is not None and domain.is_active:
            self.look(domain)
        else:
            self._forget(uuid)

    def _forget(self, uuid: str) -> None:
        self._seen.pop(uuid, None)
        self._wrong.pop(uuid, None)

    def _claim(self, owner: Owner, request: Fixed, wrong: list[str]) -> bool:
        """Claim a device that the guest has; whether it wasn't claimed before."""
        try:
            added = self._session.adopt(owner, [request], running=True)
            for resource in added:
                print(f"{resource} is claimed for {owner.text}, which has it", flush=True)
        except VnetLockError as error:
            wrong.append(
                f"conflict: {owner.text} has {request.device}, but {error}; unplug it from one of them"
            )
            return False
        return bool(added)

    def _release(self, owner: Owner, before: Seen, now: Seen, wrong: list[str]) -> None:
        """Give back what the guest has no more."""
        kept = {_key(request) for request in now.fixed}
        tokens: list[str] = []
        for request in before.fixed:
            if _key(request) not in kept:
                tokens += find_tokens(self._settings, self._session.table, owner, request)
        gone = before.aliases - now.aliases
        if gone:
            claims = self._session.table.read().of(owner)
            tokens += [claim.token for claim in claims if claim.interface in gone]
        if not tokens:
            return
        try:
            self._session.release_tokens(owner, tokens)
            print(f"what was unplugged from {owner.text} is given back", flush=True)
        except VnetLockError as error:
            wrong.append(f"{owner.text}: {error}")

    def _say(self, uuid: str, wrong: list[str]) -> None:
        """Tell an operator what is wrong with a guest that wasn't before."""
        for line in wrong:
            if line not in self._wrong.get(uuid, ()):
                print_error(_PROGRAM, line)
        if wrong:
            self._wrong[uuid] = wrong
        else:
            self._wrong.pop(uuid, None)


def _key(request: Fixed) -> tuple[object, ...]:
    """What of a device stays the same while others come and go; a network device may be in it twice."""
    return (request.device, None if isinstance(request.device, PciAddress) else request.mac)


@contextmanager
def _told_to_end(watch: Watch) -> Iterator[None]:
    def end(*_: object) -> None:
        watch.is_over = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
