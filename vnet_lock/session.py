"""What a guest gets, in the only order: observe, plan, claim, journal, change, activate; and back.

A crash anywhere leaves a claim that says what to undo; the next claim does.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable

from vnet_lock import backends, ports
from vnet_lock.backends import Connection
from vnet_lock.claims import ClaimTable, Writer
from vnet_lock.combination import Backend, Policy
from vnet_lock.dataclass import dataclass, replace
from vnet_lock.deciding import Deciding
from vnet_lock.errors import Unsupported, VnetLockError
from vnet_lock.giving_back import GivingBack
from vnet_lock.holding import Holding
from vnet_lock.journal import Datapath, Entry, EswitchMode, Keeper, LibvirtMacvtap
from vnet_lock.kernel import processes
from vnet_lock.kernel.liveness import Liveness
from vnet_lock.locks import pf_lock
from vnet_lock.model import (
    Claim,
    Claims,
    Inventory,
    Mode,
    Owner,
    PciAddress,
    Process,
    Reservation,
    State,
    UseKind,
)
from vnet_lock.outlook import Outlook
from vnet_lock.ports import Job, Opened
from vnet_lock.request import Assignment, Fixed, Form, Intent, Plan, Refusal, Request
from vnet_lock.rules import uncovered
from vnet_lock.settings import DEFAULT, Settings

# Evidence of what libvirt itself did for a guest that is about to run, or runs.
_OF_LIBVIRT = frozenset(UseKind) - {UseKind.VFIO}


@dataclass(frozen=True, slots=True)
class Grant:
    """What one request got; ``opened`` is None where somebody else (libvirt) opens the device.

    A user network takes no claim, and has no token.
    """

    assignment: Assignment
    token: str
    opened: Opened | None = None

    @property
    def is_unfinished(self) -> bool:
        """Whether something is left to be done once the guest runs here."""
        request = self.assignment.request
        is_plugged = isinstance(request, Intent) and request.hotplug
        return is_plugged or (self.opened is not None and self.opened.left is not None)

    def close(self) -> None:
        """Let go of what it holds open, where nobody will connect to it."""
        if self.opened:
            self.opened.close()


@dataclass(frozen=True, slots=True)
class Healed:
    """Claims of one interface whose owner is gone, and what of them could not be undone."""

    claims: tuple[Claim, ...]
    failures: tuple[str, ...] = ()


class Session:
    """What a front does for guests: to their claims, and to devices.

    A configuration that can't be read keeps nothing from being given back, but nothing new is given out.
    """

    def __init__(self, settings: Settings = DEFAULT) -> None:
        self._outlook = Outlook(settings)
        self.settings = settings = self._outlook.settings
        self.table = ClaimTable(settings)
        self._me = processes.this_process(settings)
        self._holding = Holding(settings, self.table, self._me)
        self._back = GivingBack(settings, self.table, self._me)
        self._deciding = Deciding(self._outlook, self.table, self._back.heal)

    # --- asking -------------------------------------------------------------------------------

    def plan(
        self, requests: Iterable[Request], owner: Owner | None = None, beside: bool = False
    ) -> Plan | Refusal:
        """What would be done now, in the place of what the owner has or ``beside`` it; changes nothing."""
        return self._deciding.plan(self._outlook.resolve(requests), owner, beside)

    def held_vfs(self, pcis: Collection[PciAddress]) -> set[PciAddress]:
        """Those VFs that can't be given to anybody now: claimed, or in use."""
        return self._deciding.held_vfs(pcis)

    # --- taking -------------------------------------------------------------------------------

    def acquire(self, owner: Owner, requests: Iterable[Request], beside: bool = False) -> tuple[Grant, ...]:
        """Claim what the requests need and make what they want: all or nothing.

        What the same guest held before is undone and replaced, without a moment in which another could
        take it. With ``beside`` it stays, and what is new comes to it: reserved by this process until
        ``activate``. Raises Refused, Unsupported, BadInput, or VnetLockError where the kernel refuses.
        """
        requests = self._outlook.resolve(requests)
        if not requests:
            return ()
        is_awaited = not beside and self._is_awaited(owner)
        earlier = () if beside else self._undo_earlier(owner)
        try:
            # What takes no claim is for anybody, not only for who can write the table.
            unclaimed = None if earlier else self._unclaimed(requests, owner)
            inventory, reserved = unclaimed or self._reserve(owner, requests, beside)
        except BaseException:
            # Nothing is left of it to be used, so nobody else need be kept from it.
            for token in earlier:
                self._back.give(token)
            raise
        grants: list[Grant] = []
        try:
            for assignment, token in reserved:
                opened, journal = self._open(assignment, token, inventory, is_awaited)
                grants.append(Grant(assignment, token, opened))
                if not token:
                    continue
                if opened:
                    self._holding.note_mac(token, opened.mac)
                if not beside:
                    self._holding.activate(token, journal)
                elif journal:
                    self._holding.journal_of(token)(journal)
        except BaseException:
            # Also where a deadline or ^C cut it short: nothing may stay half-done.
            for grant in grants:
                grant.close()
            for _, token in reserved:
                self._back.give(token)
            raise
        return tuple(grants)

    def reserve(self, owner: Owner, requests: Iterable[Request], operation: str) -> tuple[Assignment, ...]:
        """Keep what a guest needs that is to come here by libvirt's ``operation``, for a bounded time.

        All or nothing; no device is touched. ``acquire`` for the same guest takes it over. What the guest
        has here already stays, but for an earlier reservation. Raises as ``acquire`` does.
        """
        requests = self._outlook.resolve(requests)
        if not requests or self._unclaimed(requests, owner):
            return ()
        until_s = processes.read_uptime_s() + self.settings.reservation_s
        reservation = Reservation(operation, until_s)

        def write(writer: Writer, claims: Claims, found: Plan) -> tuple[Assignment, ...]:
            made = [self._holding.claims_for(owner, one, State.RESERVED) for one in found.assignments]
            writer.add(replace(one, worker=None, reservation=reservation) for each in made for one in each)
            for claim in claims.of(owner):
                if claim.reservation:
                    writer.drop(claim)
            return found.assignments

        return self._deciding.decide(owner, requests, write, beside=True)[1]

    def activate(self, grants: Iterable[Grant]) -> None:
        """What was acquired ``beside`` is the owner's from now on, and lives as long as he does."""
        for grant in grants:
            if grant.token:
                self._holding.activate(grant.token)

    def connect(self, grant: Grant) -> Connection:
        """Open what a QEMU of ours is handed for a grant, once; the caller owns the descriptors."""
        combination, intent = grant.assignment.combination, grant.assignment.request
        if combination is None or grant.opened is None or not isinstance(intent, Intent):
            raise VnetLockError(f"{intent.interface}: nothing of ours to connect to")
        backend = backends.find(combination.backend)
        if backend is None:
            raise Unsupported(f"{intent.interface}: {combination.text} is not built in this version")
        try:
            if combination.backend is Backend.SOCKET_VHOST:
                grant.opened.path = self._holding.name_socket(grant.token, intent.socket)
            connection = backend.connect(self.settings, intent, grant.opened, combination)
        finally:
            grant.close()
        assert isinstance(connection, Connection)  # noqa: S101 - a module's function has no static type
        try:
            if process := connection.datapath:
                self._holding.journal_of(grant.token)((Datapath(process.pid, process.start_ticks),))
        except BaseException:
            connection.close()
            raise
        return connection

    def serve(self, grants: Iterable[Grant]) -> None:
        """Connect those of the grants whose QEMU only knows a socket's path, and inherits nothing of ours.

        What serves it ends when the grant is given back.
        """
        from vnet_lock.kernel import background

        for grant in grants:
            if not isinstance(grant.assignment.request, Intent) or not grant.assignment.request.socket:
                continue

            def journal(process: Process, token: str = grant.token) -> bool:
                self._holding.journal_of(token)((Keeper(process.pid, process.start_ticks),))
                return True

            connection = self.connect(grant)
            try:
                background.start(self.settings, background.keep, journal, kept=connection.kept)
            finally:
                connection.close()

    def adopt(self, owner: Owner, requests: Iterable[Request], running: bool = False) -> list[str]:
        """Claim what libvirt itself set up for a guest that is about to run, or runs.

        Only claims and VFIO descriptors of others count against it, and for one that isn't ``running`` yet
        what is left to the host. Returns the resources that were claimed anew; raises Refused where another
        guest has one.
        """
        requests = tuple(requests)
        if not requests:
            return []

        def write(writer: Writer, claims: Claims, found: Plan) -> list[Claim]:
            self._holding.take_over(writer, claims, found, owner)
            held = claims.of(owner)
            added: list[Claim] = []
            for assignment in found.assignments:
                # Shares are counted: each interface gives its own back.
                own = (one for one in held if one.mode is Mode.EXCLUSIVE or _is_for(one, assignment.request))
                missing = uncovered(assignment.wanted, own)
                made = self._holding.claims_for(owner, replace(assignment, wanted=missing), State.ACTIVE)
                journal = _left_by_libvirt(assignment)
                added += [replace(claim, journal=journal) for claim in made[:1]] + made[1:]
            writer.add(added)
            return added

        _, added = self._deciding.decide(owner, requests, write, ignored=_OF_LIBVIRT, running=running)
        return [claim.resource.text for claim in added]

    def hand_over(self, old: Owner, new: Owner) -> None:
        """The same claims, held by another owner from now on (a QEMU that became a daemon).

        Of a libvirt guest only those that the same daemon made: who comes late must not touch a next start's.
        """
        if os.geteuid() and not self.table.read().of(old):
            return  # a user network has nothing to hand over, and who isn't root couldn't write it
        with self.table.guarded() as writer:
            for claim in writer.read().records:
                if claim.owner == old:
                    writer.replace(replace(claim, owner=new))

    # --- giving back --------------------------------------------------------------------------

    def release(self, owner: Owner) -> None:
        """Undo, wait until the devices are free, and drop the claims of a guest; again is no error.

        What a later start of it has, by another daemon that lives, stays. Carries on after a failure, and
        raises one VnetLockError for all of them at the end.
        """

        def is_later(holder: Process | None) -> bool:
            # The hook of a daemon that was killed goes on, while its guest is started by the next one.
            return holder not in (None, owner.process) and processes.is_alive(self.settings, holder)

        claims = self.table.read().of(owner)
        self._back.give_all(
            dict.fromkeys(claim.token for claim in claims),
            lambda found: _are_of(owner, found) and not any(is_later(one.owner.process) for one in found),
        )

    def release_tokens(self, owner: Owner, tokens: Iterable[str]) -> None:
        """As ``release``, of some interfaces of a guest, whichever daemon started it."""
        self._back.give_all(dict.fromkeys(tokens), lambda found: _are_of(owner, found))

    def give_back(self, grants: Iterable[Grant]) -> None:
        """Undo and drop what these grants are about, and nothing else that the guest has."""
        self._back.give_all(grant.token for grant in grants)

    def heal(self, dry_run: bool = False) -> list[Healed]:
        """Undo and drop the claims whose owner is proven dead, and those left half given back."""
        stale = Liveness(self.settings).stale(self.table.read())
        if dry_run:
            return [Healed(claims) for claims in stale.values()]
        if not stale and self.table.has_leftover():
            with self.table.guarded():
                pass  # taking the guard removes it
        return [Healed(claims, tuple(self._back.heal(token))) for token, claims in stale.items()]

    # --- the steps ----------------------------------------------------------------------------

    def _unclaimed(
        self, requests: tuple[Request, ...], owner: Owner
    ) -> tuple[Inventory, list[tuple[Assignment, str]]] | None:
        """What each gets, where none of them takes a claim: user networks; None otherwise."""
        if not all(isinstance(one, Intent) and one.policy is Policy.NAT for one in requests):
            return None
        found = self.plan(requests, owner)
        if not isinstance(found, Plan) or any(assignment.wanted for assignment in found.assignments):
            return None
        return Inventory(), [(assignment, "") for assignment in found.assignments]

    def _reserve(
        self, owner: Owner, requests: tuple[Request, ...], beside: bool
    ) -> tuple[Inventory, list[tuple[Assignment, str]]]:
        """Write the claims that the requests need, in the place of what the guest had before.

        Returns what each gets, with the token of its claims.
        """

        def write(writer: Writer, claims: Claims, found: Plan) -> list[tuple[Assignment, str]]:
            made = [self._holding.claims_for(owner, one, State.RESERVED) for one in found.assignments]
            writer.add(claim for each in made for claim in each)
            for claim in () if beside else claims.of(owner):
                writer.drop(claim)
            tokens = [each[0].token if each else "" for each in made]
            return list(zip(found.assignments, tokens, strict=True))

        return self._deciding.decide(owner, requests, write, beside=beside)

    def _open(
        self, assignment: Assignment, token: str, inventory: Inventory, is_awaited: bool
    ) -> tuple[Opened | None, tuple[Entry, ...]]:
        """Do what the assignment says; what libvirt does itself is only noted, to be put right later.

        Of a guest that ``is_awaited``, traffic is drawn here only once it runs here: that is left to do.
        """
        request = assignment.request
        if isinstance(request, Fixed):
            device = assignment.device
            if assignment.wanted[0].mode is not Mode.EXCLUSIVE or device.pci is None:
                return None, _left_by_libvirt(assignment)
            from vnet_lock.kernel.before import read_before

            self._keep_eswitch(assignment, token, inventory)
            return None, (*read_before(self.settings, device.pci), *_left_by_libvirt(assignment))
        port = ports.find(assignment.combination.port) if assignment.combination else None
        if port is None:
            raise Unsupported(f"{request.interface}: no port of this version opens {assignment.combination}")
        job = Job(
            self.settings, inventory, assignment, request, token,
            journal=self._holding.journal_of(token), sharing=lambda: self._holding.sharing(token),
            left=[] if is_awaited else None,
        )  # fmt: skip
        pf = assignment.wanted[0].pf if assignment.wanted else None
        with pf_lock(self.settings, pf):
            opened = port.open_port(job)
        assert isinstance(opened, Opened)  # noqa: S101 - a module's function has no static type
        if job.left:
            opened.left = lambda: self._finish(job, pf)
        return opened, ()

    def _finish(self, job: Job, pf: PciAddress | None) -> None:
        with pf_lock(self.settings, pf):
            for step in job.left or ():
                step()

    def _keep_eswitch(self, assignment: Assignment, token: str, inventory: Inventory) -> None:
        """Let the embedded switch stay in its mode, where another guest had it set, as long as this one."""
        pf = inventory.pf_at(assignment.wanted[0].pf) if assignment.wanted[0].pf else None
        if pf and pf.eswitch:
            with self._holding.sharing(token) as share:
                share(EswitchMode(pf.pci.text, pf.eswitch, pf.eswitch))

    def _is_awaited(self, owner: Owner) -> bool:
        """Whether the guest runs elsewhere until it runs here."""
        reservations = (claim.reservation for claim in self.table.read().of(owner))
        return any(one is not None and one.operation == "migrate" for one in reservations)

    def _undo_earlier(self, owner: Owner) -> tuple[str, ...]:
        """Undo what the same guest left from an earlier start, but hold on to it; its tokens."""
        tokens = dict.fromkeys(claim.token for claim in self.table.read().of(owner))
        failures = [failure for token in tokens for failure in self._back.give(token, drop=False)]
        if failures:
            raise VnetLockError("an earlier start of this guest can't be undone: " + "; ".join(failures))
        return tuple(tokens)


def _are_of(owner: Owner, claims: Iterable[Claim]) -> bool:
    return all(claim.owner.is_same_guest(owner) for claim in claims)


def _left_by_libvirt(assignment: Assignment) -> tuple[Entry, ...]:
    """What libvirt makes for a request by itself, and may be killed before it takes it away again."""
    request = assignment.request
    if not isinstance(request, Fixed) or request.form is Form.HOSTDEV or not request.mac:
        return ()
    return (LibvirtMacvtap(str(request.device), request.mac, request.ifname),)


def _is_for(claim: Claim, request: Request) -> bool:
    """Whether a guest's claim was made for this interface, under whichever name."""
    return claim.interface == request.interface or (claim.mac is not None and claim.mac == request.mac)
