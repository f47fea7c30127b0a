"""Finishes a guest's interface once the guest runs here, which its hook can't: libvirt waits for a hook.

One process for each such interface, forked by the hook, that waits for libvirt to say that the guest's vCPUs
run on this host, does one thing, and ends. It stands in the claim's journal as long as that is not done, so
whoever gives the claim back ends it first, and an audit sees what is missing if it failed or was killed.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from vnet_lock.claims import ClaimTable
from vnet_lock.dataclass import replace
from vnet_lock.errors import BadInput, VnetLockError
from vnet_lock.journal import Companion, Entry
from vnet_lock.kernel import background
from vnet_lock.kernel.liveness import Liveness
from vnet_lock.model import Owner, PciAddress, Process, State
from vnet_lock.request import Intent

if TYPE_CHECKING:
    from vnet_lock.front.libvirt_client.connection import Libvirt
    from vnet_lock.front.libvirt_client.domain import Domain
    from vnet_lock.session import Grant
    from vnet_lock.settings import Settings

# What is left to do for a guest that runs here; it raises VnetLockError where that can't be done, and is done
# again, from its start, where libvirt's daemon went away meanwhile or had no time for the guest.
Finish = Callable[["Domain"], None]

_COMMAND = "vnet-companion"
# When a daemon that went away, or was busy, is asked again, and when a claim is looked at though nothing
# happened.
_RETRY_S = 1.0
_LOOK_S = 10.0


def start_all(settings: Settings, owner: Owner, grants: Iterable[Grant]) -> None:
    """Start a process for each grant of which something is left to do; VnetLockError where that can't be."""
    for grant in grants:
        intent = grant.assignment.request
        if isinstance(intent, Intent) and intent.hotplug:
            start(settings, owner, grant.token, plugging(intent, grant))
        elif grant.opened and grant.opened.left:
            start(settings, owner, grant.token, raising(grant.opened.left), grant.opened.netdev)


def start(settings: Settings, owner: Owner, token: str, finish: Finish, link: str | None = None) -> None:
    """Have ``finish`` done, by another process, for the interface whose claims have this token.

    ``link`` is what it raises, None where it plugs a device in.
    """

    def serve() -> None:
        # The hook that we were has garbage collection off, and a deadline.
        gc.enable()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with open(f"{settings.proc}/self/comm", "w", encoding="ascii") as file:
            file.write(_COMMAND)
        _Companion(settings, owner, token, finish).run()

    def journal(process: Process) -> bool:
        entry = Companion(process.pid, process.start_ticks, link=link)
        return _rewrite_journal(settings, token, lambda entries: (*entries, entry))

    background.start(settings, serve, journal)


def raising(left: Callable[[], None]) -> Finish:
    """Do what was left undone of a guest that came from another host."""

    def finish(_: Domain) -> None:
        left()

    return finish


def plugging(intent: Intent, grant: Grant) -> Finish:
    """Plug the VF of a grant in, unless that has been done."""
    assert grant.opened is not None  # noqa: S101 - a port has set it up
    assert grant.opened.pci is not None  # noqa: S101 - it was asked for VFIO
    pci, mac = grant.opened.pci, grant.opened.mac or ""

    def finish(domain: Domain) -> None:
        if f"<alias name='{intent.interface}'/>" not in domain.read_xml():
            domain.attach(hostdev_xml(intent, pci, mac))

    return finish


def hostdev_xml(intent: Intent, pci: PciAddress, mac: str) -> str:
    """The VF as libvirt takes it."""
    from vnet_lock.domain_rewrite import vf, write_interface  # not in the hook

    return write_interface(intent.interface, vf(pci, intent.vlan, intent.teaming, mac))


class _Companion:
    """The process itself."""

    def __init__(self, settings: Settings, owner: Owner, token: str, finish: Finish) -> None:
        self._settings = settings
        self._owner = owner
        self._token = token
        self._finish = finish

    def run(self) -> None:
        """Until it is done, or has failed, or nobody needs it any more."""
        failure = ""
        try:
            if not self._serve():
                return
        except VnetLockError as error:
            failure = " ".join(str(error).split()).removeprefix(f"{self._owner.text}: ")
        except Exception as error:
            failure = f"unexpected {type(error).__name__}: {error}; please report it"
        if failure:
            _log(f"{self._owner.text}: {failure}; see: vnet-lock status")
        self._note(failure)

    def _serve(self) -> bool:
        """Whether it was done; False where it needn't be."""
        from vnet_lock.front.libvirt_client.connection import DEFAULT_URI, Libvirt  # 50 ms
        from vnet_lock.front.libvirt_client.errors import Busy, Disconnected

        while True:
            try:
                with Libvirt(DEFAULT_URI) as libvirt:
                    domain = self._wait_until_it_runs(libvirt)
                    if domain is None:
                        return False
                    self._finish(domain)
                    return True
            except (Disconnected, Busy):
                time.sleep(_RETRY_S)
                if not self._is_needed():
                    return False

    def _wait_until_it_runs(self, libvirt: Libvirt) -> Domain | None:
        """The guest, once its vCPUs run; None where nobody waits for it any more."""
        from vnet_lock.front.libvirt_client.domain import RUNNING

        libvirt.listen()
        uuid = self._owner.uuid or ""
        while True:
            # While a hook of the guest runs, this waits, for libvirt holds the guest's lock then.
            with suppress(BadInput):  # a transient guest that has ended meanwhile
                domain = libvirt.find(uuid)
                if domain.state in RUNNING:
                    return domain if self._is_needed() else None
            while not any(event.uuid == uuid for event in libvirt.events(_LOOK_S)):
                if not self._is_needed():
                    return None

    def _is_needed(self) -> bool:
        claims = ClaimTable(self._settings).read().with_token(self._token)
        is_active = bool(claims) and all(claim.state is State.ACTIVE for claim in claims)
        return is_active and not Liveness(self._settings).is_stale(claims)

    def _note(self, failure: str) -> None:
        """Take our entry out of the journal, or let it say why not."""

        def change(journal: tuple[Entry, ...]) -> tuple[Entry, ...]:
            own = [one for one in journal if isinstance(one, Companion) and one.pid == os.getpid()]
            rest = tuple(one for one in journal if one not in own)
            return (*rest, *(replace(one, failure=failure) for one in own if failure))

        _rewrite_journal(self._settings, self._token, change)


def _rewrite_journal(
    settings: Settings, token: str, change: Callable[[tuple[Entry, ...]], tuple[Entry, ...]]
) -> bool:
    """Change the journal of an interface's claims; False where they are gone."""
    with ClaimTable(settings).guarded() as writer:
        claims = writer.read().with_token(token)
        if claims:
            first = min(claims, key=lambda claim: claim.resource)
            writer.replace(replace(first, journal=change(first.journal)))
    return bool(claims)


def _log(text: str) -> None:
    import syslog

    syslog.openlog("vnet-lock", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_ERR, text)
