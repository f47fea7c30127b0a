"""What stands in a guest's claims while it has them: whose they are, and what is to be undone.

Each change is under the guard and by itself: the order of changes is session.py's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vnet_lock.claims import ClaimTable, Writer, new_token
from vnet_lock.dataclass import replace
from vnet_lock.errors import BadInput, Refused, VnetLockError
from vnet_lock.journal import Entry, SocketFile, share_key
from vnet_lock.kernel import processes
from vnet_lock.locks import host_lock
from vnet_lock.model import Claim, Claims, Owner, Process, State, name_of
from vnet_lock.ports import Share
from vnet_lock.request import Assignment, Plan
from vnet_lock.settings import Settings


class Holding:
    """Writes claims, each interface's by its token, as the process ``me``."""

    def __init__(self, settings: Settings, table: ClaimTable, me: Process) -> None:
        self._settings = settings
        self._table = table
        self._me = me

    def claims_for(self, owner: Owner, assignment: Assignment, state: State) -> list[Claim]:
        """The claims, not yet in the table, that an assignment takes: under one token that is new."""
        token = new_token()
        has_host_pids = processes.sees_host_pids(self._settings)
        has_host_network = processes.sees_host_network(self._settings)
        return [
            Claim(
                resource=item.resource,
                mode=item.mode,
                state=state,
                owner=owner,
                token=token,
                interface=assignment.request.interface,
                since=time.time(),
                combination=assignment.combination.text if assignment.combination else None,
                mac=assignment.request.mac,
                vlan=assignment.request.vlan,
                pf=item.pf,
                worker=self._me if state is State.RESERVED else None,
                has_host_pids=has_host_pids,
                has_host_network=has_host_network,
            )
            for item in assignment.wanted
        ]

    @contextmanager
    def sharing(self, token: str) -> Iterator[Share]:
        """Hold the host's lock, and journal what other claims may have in their journals, too."""

        def share(entry: Entry, like: Callable[[Entry], bool] | None = None) -> Entry:
            key = share_key(entry)
            with self._table.guarded() as writer:
                claims = writer.read()
                entries = (one for claim in claims.records for one in claim.journal)
                known = [one for one in entries if (like(one) if like else share_key(one) == key)]
                entry = known[0] if known else entry
                first = _first(claims, token)
                if entry not in first.journal:
                    writer.replace(replace(first, journal=(*first.journal, entry)))
            return entry

        with host_lock(self._settings):
            yield share

    def journal_of(self, token: str) -> Callable[[tuple[Entry, ...]], None]:
        """What adds to the journal of an interface's claims."""

        def journal(entries: tuple[Entry, ...]) -> None:
            with self._table.guarded() as writer:
                first = _first(writer.read(), token)
                writer.replace(replace(first, journal=first.journal + entries))

        return journal

    def name_socket(self, token: str, wanted: str | None) -> str:
        """The path at which a guest's QEMU finds its network, in our journal before anything is there."""
        path = wanted or self._settings.socket_path(token)
        if not re.fullmatch(re.escape(self._settings.run) + r"/[\w.-]+\.sock", path):
            raise BadInput(f"{path} is no place for a socket of ours; use {self._settings.run}/NAME.sock")
        # What is in the journal goes at the guest's end.
        if path == self._settings.hooks_socket_path:
            raise BadInput(f"{path} is no place for a socket of a guest: libvirt's hooks call there")
        entry = SocketFile(path)
        with self._table.guarded() as writer:
            claims = writer.read()
            for claim in claims.records:
                if claim.token != token and entry in claim.journal:
                    raise Refused(f"{path} is the socket of {claim.owner.text}; choose another name")
            first = _first(claims, token)
            writer.replace(replace(first, journal=(*first.journal, entry)))
        return path

    def note_mac(self, token: str, mac: str | None) -> None:
        """Keep the MAC that an interface got in the end."""
        with self._table.guarded() as writer:
            for claim in writer.read().with_token(token):
                if claim.mac != mac:
                    writer.replace(replace(claim, mac=mac))

    def activate(self, token: str, journal: tuple[Entry, ...] = ()) -> None:
        """An interface's claims are its guest's from now on, with more in their journal."""
        with self._table.guarded() as writer:
            claims = writer.read()
            first = _first(claims, token)
            for claim in claims.with_token(token):
                entries = claim.journal + (journal if claim == first else ())
                writer.replace(replace(claim, state=State.ACTIVE, worker=None, journal=entries))

    def take_over(self, writer: Writer, claims: Claims, found: Plan, owner: Owner) -> None:
        """Let the owner's claims on what it needs live by this owner, whatever an earlier one left of them.

        A killed `release`, or a daemon that is dead, left them to be healed. Their journals stay: what they
        say is still what the device was like before.
        """
        wanted = {item.resource for assignment in found.assignments for item in assignment.wanted}
        for token in dict.fromkeys(claim.token for claim in claims.of(owner) if claim.resource in wanted):
            for claim in claims.with_token(token):
                if claim.worker and processes.is_alive(self._settings, claim.worker):
                    if claim.state is State.RESERVED:
                        continue  # who plugs it in makes it the owner's
                    raise Refused(f"{name_of(claim.resource)} is being worked on by pid {claim.worker.pid}")
                if claim.owner != owner or claim.state is not State.ACTIVE:
                    writer.replace(
                        replace(claim, owner=owner, state=State.ACTIVE, worker=None, reservation=None)
                    )


def _first(claims: Claims, token: str) -> Claim:
    """The claim of an interface that has the journal."""
    found = claims.with_token(token)
    if not found:
        raise VnetLockError("the claim that is being worked on is gone; was it released by hand?")
    return min(found, key=lambda claim: claim.resource)
