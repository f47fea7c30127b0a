"""Claims against observed use: the state of each resource, and what is wrong. Changes nothing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import StrEnum

from vnet_lock.config import Config, read_config
from vnet_lock.dataclass import dataclass, field
from vnet_lock.errors import VnetLockError
from vnet_lock.journal import Companion, Datapath, SharedLink
from vnet_lock.kernel.kinship import Kinship
from vnet_lock.kernel.liveness import Liveness
from vnet_lock.kernel.marks import PREFIX, read_mark
from vnet_lock.kernel.processes import is_alive
from vnet_lock.model import (
    Claim,
    Claims,
    Inventory,
    Mode,
    Owner,
    OwnerKind,
    Process,
    Resource,
    ResourceKind,
    State,
    UseKind,
    User,
    Wanted,
    name_of,
)
from vnet_lock.rules import conflict, holder_text
from vnet_lock.settings import Settings
from vnet_lock.use import foreign_users

# What tells whose a use is that no process was found for.
_WHO_HAS_IT = {
    UseKind.VFIO: "fuser -v {dev}/vfio/*",
    UseKind.UPPER: "ip -details link",
    UseKind.NAMESPACE: "lsns --type net",
    UseKind.ADDRESS: "ip address, ip route",
    UseKind.SOCKET: "ss --packet --processes",
    UseKind.DRIVER: "fuser -v {dev}/uio*",
    UseKind.UNSEEN: "lsns --type net",
    UseKind.LIBVIRT: "virsh list",
}


class Standing(StrEnum):
    """What is the matter with a resource; worse ones come later."""

    FREE = "free"
    LEFT = "host"  # left to the host by its configuration
    STALE = "stale"
    RESERVED = "reserved"
    RELEASING = "releasing"
    ACTIVE = "active"
    FOREIGN = "foreign"
    CONFLICT = "conflict"


class Severity(StrEnum):
    """An error means that a guest is or may be disturbed; a warning heals by itself or by a command."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong; ``message`` names object, cause and next step."""

    severity: Severity
    kind: str
    resource: str
    message: str


@dataclass(frozen=True, slots=True)
class ResourceState:
    """One resource: what it is in, its claims (living ones first) and everybody who uses it."""

    resource: Resource
    standing: Standing = Standing.FREE
    claims: tuple[Claim, ...] = ()
    users: tuple[User, ...] = ()


@dataclass(frozen=True, slots=True)
class Audit:
    """The judgement on one host at one moment.

    ``states`` has an entry for each VF, PF and NIC of the inventory, and for each other thing claimed.
    ``pids`` are the pids of the guests that have claims, None where a guest has none now; ``stale`` are the
    tokens of claims that nobody will give back; ``pools`` are those that a VF is in.
    """

    inventory: Inventory
    states: Mapping[Resource, ResourceState]
    findings: tuple[Finding, ...] = ()
    pids: Mapping[Owner, int | None] = field(default_factory=dict)
    stale: frozenset[str] = frozenset()
    pools: Mapping[Resource, tuple[str, ...]] = field(default_factory=dict)

    @property
    def has_error(self) -> bool:
        """Whether something is an error, not just a warning."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)

    def state_of(self, resource: Resource) -> ResourceState:
        """The state of a resource, of an unknown one too."""
        return self.states.get(resource) or ResourceState(resource)


def audit(
    settings: Settings, inventory: Inventory, claims: Claims, devices: Collection[str] | None = None
) -> Audit:
    """Judge every resource of the inventory, and every claim.

    ``devices`` are what the inventory was restricted to: claims on what else there may be are left out.
    """
    return _Auditor(settings, inventory, claims, devices).audit()


class _Auditor:
    """One pass. All lookups are by dict: there may be thousands."""

    def __init__(
        self, settings: Settings, inventory: Inventory, claims: Claims, devices: Collection[str] | None
    ) -> None:
        self.settings = settings
        self.inventory = inventory
        self.kinship = Kinship(settings)
        self.liveness = Liveness(settings)
        self.findings: list[Finding] = []
        config = self._read_config()
        self.left = config.left_to_host(inventory) if config else frozenset()
        self.pools = {vf.resource: config.pools_of(pf, vf) for pf in inventory.pfs for vf in pf.vfs if config}
        self.known = dict.fromkeys(self._resources())
        self.damaged = claims.damaged
        self.marks = {claim.token for claim in claims.records}
        # What guests share is known by the journal of each of them.
        entries = (entry for claim in claims.records for entry in claim.journal)
        self.marks |= {one.alias.removeprefix(PREFIX) for one in entries if isinstance(one, SharedLink)}
        self.distrusted = {record.resource for record in claims.damaged}
        self.claims: dict[Resource, list[Claim]] = defaultdict(list)
        pfs = {pf.pci for pf in inventory.pfs}
        for claim in claims.records:
            asked = devices is None or claim.resource.name in devices
            if asked or claim.resource in self.known or claim.pf in pfs:
                self.claims[claim.resource].append(claim)
        tokens = {claim.token for found in self.claims.values() for claim in found}
        whole = tuple(claim for claim in claims.records if claim.token in tokens)
        self.stale = frozenset(self.liveness.stale(Claims(whole)))

    def audit(self) -> Audit:
        disputed = self._find_conflicts()
        states = {}
        for resource in dict.fromkeys([*self.known, *self.claims]):
            states[resource] = self._judge(resource, resource in disputed)
        self._find_stale()
        self._find_unplugged()
        self._find_cut_off()
        self._find_vanished()
        self._find_damaged()
        self._find_orphans()
        self._find_same_macs()
        everything = [claim for claims in self.claims.values() for claim in claims]
        pids = {claim.owner: self.kinship.guest_pid(claim.owner) for claim in everything}
        return Audit(self.inventory, states, tuple(self.findings), pids, self.stale, self.pools)

    def lives(self, claim: Claim) -> bool:
        """Whether somebody will still give this claim back; what session.heal takes away doesn't live."""
        return claim.token not in self.stale

    def _living(self) -> Iterator[tuple[Resource, Claim]]:
        return ((one, claim) for one, claims in self.claims.items() for claim in claims if self.lives(claim))

    def _resources(self) -> Iterator[Resource]:
        functions = set()
        for pf in self.inventory.pfs:
            functions.add(pf.pci)
            yield pf.resource
            for vf in pf.vfs:
                functions.add(vf.pci)
                yield vf.resource
        for nic in self.inventory.nics:
            if nic.pci is None:
                yield Resource.nic(nic.netdev)
            elif nic.pci not in functions:
                yield Resource.pf(nic.pci)

    def _read_config(self) -> Config | None:
        try:
            return read_config(self.settings)
        except VnetLockError as error:
            self._error("config", "", f"{error}; until then no guest gets a device")
            return None

    # --- one resource ---------------------------------------------------------------------------

    def _judge(self, resource: Resource, disputed: bool) -> ResourceState:
        claims = sorted(self.claims.get(resource, ()), key=self.lives, reverse=True)
        living = [claim for claim in claims if self.lives(claim)]
        users = self.inventory.users_of(resource)
        # What the host does with a VF that is left to it is its own affair; libvirt's guests aren't the host.
        is_left = resource in self.left
        judged = [user for user in users if user.kind is UseKind.LIBVIRT] if is_left and not claims else users
        exclusive = any(claim.mode is Mode.EXCLUSIVE for claim in claims)
        mode = Mode.EXCLUSIVE if exclusive else Mode.SHARED
        strangers = foreign_users(resource, judged, claims, self.kinship.is_own, mode=mode)
        standing = Standing.LEFT if is_left and not claims else _standing(claims, living)
        if is_left:
            self._report_tenants(resource, living)
        if strangers:
            standing = Standing.CONFLICT if living else Standing.FOREIGN
            self._report_strangers(resource, strangers, living)
        if disputed or resource in self.distrusted:
            standing = Standing.CONFLICT
        return ResourceState(resource, standing, tuple(claims), users)

    def _report_strangers(self, resource: Resource, strangers: tuple[User, ...], living: list[Claim]) -> None:
        name = name_of(resource)
        if living:
            holder = holder_text(living[0], self.kinship.guest_pid)
            who = "; ".join(user.text for user in strangers)
            self._error(
                "conflict", resource, f"{name} is held by {holder}, but used by {who}; stop one of them"
            )
            return
        who = "; ".join((strangers[0].by_whom, *(user.text for user in strangers[1:])))
        said = f"{name} is in use without a claim {who}"
        pid = next((user.pid for user in strangers if user.pid), None)
        if pid:
            self._error(
                "foreign", resource, f"{said}; stop it, or claim it: vnet-lock claim {resource} --pid {pid}"
            )
        elif os.geteuid() != 0 and all(user.kind is UseKind.UNSEEN for user in strangers):
            self._warn("foreign", resource, f"{said}; run as root to see where that is")
        else:
            how = _WHO_HAS_IT[strangers[0].kind].format(dev=self.settings.dev)
            self._error("foreign", resource, f"{said}; who has it: {how}")

    def _report_tenants(self, resource: Resource, living: list[Claim]) -> None:
        """Guests that have what is left to the host: from before it was, or where nobody could refuse it."""
        for claim in living:
            if claim.owner.kind is not OwnerKind.PROCESS:
                holder = holder_text(claim, self.kinship.guest_pid)
                message = (
                    f"{name_of(resource)} is left to the host, but held by {holder}; stop the guest, "
                    "or take the VF out of [host.vfs]"
                )
                self._warn("left-to-host", resource, message)

    # --- claims against claims ------------------------------------------------------------------

    def _find_conflicts(self) -> set[Resource]:
        """Resources whose living claims exclude each other; that is reported once for each pair."""
        near: dict[str, list[Claim]] = defaultdict(list)
        for resource, claim in self._living():
            near[resource.name].append(claim)
            if claim.mode is Mode.EXCLUSIVE and claim.pf and claim.pf.text != resource.name:
                near[claim.pf.text].append(claim)
        disputed: set[Resource] = set()
        for place, claims in near.items():
            for claim, other in _excluding_pairs(place, claims):
                disputed |= {claim.resource, other.resource}
                one, two = (holder_text(each, self.kinship.guest_pid) for each in (claim, other))
                what = name_of(claim.resource)
                if other.resource != claim.resource:
                    two = f"{name_of(other.resource)} by {two}"
                message = f"{what} is held by {one}, and {two}: they exclude each other; stop one of them"
                self._error("conflict", claim.resource, message)
        return disputed

    def _find_same_macs(self) -> None:
        first: dict[tuple[str, str], Claim] = {}
        for resource, claim in self._living():
            if claim.mac is None:
                continue
            place = claim.pf.text if claim.pf else resource.name
            other = first.setdefault((place, claim.mac), claim)
            if not other.owner.is_same_guest(claim.owner):
                message = (
                    f"MAC {claim.mac} on {name_of(resource)} is {claim.owner.text}'s and, on "
                    f"{name_of(other.resource)}, {other.owner.text}'s; give one of them another"
                )
                self._warn("same-mac", resource, message)

    # --- claims against the host ----------------------------------------------------------------

    def _find_stale(self) -> None:
        for resource, claims in self.claims.items():
            for claim in claims:
                if self.lives(claim):
                    continue
                why = "which is dead"
                if self.liveness.is_owner_alive(claim.owner):
                    why = f"but what was working on it died (it is {claim.state})"
                message = (
                    f"{name_of(resource)} is claimed by {claim.owner.text}, {why}; "
                    "the next claim heals it, or: vnet-lock gc"
                )
                self._warn("stale", resource, message)

    def _find_unplugged(self) -> None:
        """Guests that run without a device which was to be plugged in."""
        for resource, claim in self._living():
            entry = next((one for one in claim.journal if isinstance(one, Companion)), None)
            pid = self.kinship.guest_pid(claim.owner)
            if entry is None or pid is None or (not entry.failure and self._runs(entry)):
                continue
            if entry.link is not None:
                why = entry.failure or f"the process that was to raise it (pid {entry.pid}) is gone"
                message = (
                    f"{claim.owner.text} (pid {pid}) came from another host, and its link {entry.link} "
                    f"is not up here: {why}; stop and start the guest"
                )
                self._error("unraised", resource, message)
                continue
            if any(user.pid == pid for user in self.inventory.users_of(resource)):
                continue
            why = entry.failure or f"the process that was to plug it in (pid {entry.pid}) is gone"
            message = (
                f"{claim.owner.text} (pid {pid}) has not got {name_of(resource)} for its interface "
                f"{claim.interface}: {why}; stop and start the guest, "
                f"or give the device back: vnet-lock release {resource} --force"
            )
            self._error("unplugged", resource, message)

    def _find_cut_off(self) -> None:
        """Guests whose packets nobody carries any more."""
        for resource, claim in self._living():
            entry = next((one for one in claim.journal if isinstance(one, Datapath)), None)
            if entry is None or self._runs(entry):
                continue
            message = (
                f"{claim.owner.text} has no network at its interface {claim.interface}: the process that "
                f"carried its packets (pid {entry.pid}) is gone; stop and start the guest"
            )
            self._error("cut-off", resource, message)

    def _runs(self, entry: Companion | Datapath) -> bool:
        return is_alive(self.settings, Process(entry.pid, entry.start_ticks))

    def _find_vanished(self) -> None:
        for resource, claim in self._living():
            if resource in self.known or resource.kind is ResourceKind.IP:
                continue
            holder = holder_text(claim, self.kinship.guest_pid)
            message = (
                f"{name_of(resource)} is held by {holder}, but isn't there any more; "
                f"stop the guest, then: vnet-lock release {resource} --force"
            )
            self._error("vanished", resource, message)

    def _find_damaged(self) -> None:
        for record in self.damaged:
            about = (
                f"{name_of(record.resource)} counts as held"
                if record.resource
                else "nobody knows what it holds"
            )
            message = (
                f"{record.path}: {record.reason}; {about}; look at it, and remove it if its guest is gone"
            )
            self._error("damaged", record.resource or "", message)

    def _find_orphans(self) -> None:
        """Links with our mark, made for a claim that isn't there any more."""
        for nic in self.inventory.nics:
            if nic.kind == "physical":
                continue
            mark = read_mark(self.settings, nic.netdev)
            if mark is not None and mark not in self.marks:
                message = (
                    f"device {nic.netdev} was made for a guest, but no claim knows it; "
                    f"if no guest uses it: ip link del {nic.netdev}"
                )
                self._error("orphan", Resource.nic(nic.netdev), message)

    def _error(self, kind: str, resource: Resource | str, message: str) -> None:
        self.findings.append(Finding(Severity.ERROR, kind, str(resource), message))

    def _warn(self, kind: str, resource: Resource | str, message: str) -> None:
        self.findings.append(Finding(Severity.WARNING, kind, str(resource), message))


def _standing(claims: Iterable[Claim], living: list[Claim]) -> Standing:
    """What the claims themselves say."""
    if not living:
        return Standing.STALE if tuple(claims) else Standing.FREE
    states = {claim.state for claim in living}
    for state in (State.ACTIVE, State.RELEASING, State.RESERVED):
        if state in states:
            return Standing(state)
    raise AssertionError(states)


def _excluding_pairs(place: str, claims: list[Claim]) -> Iterator[tuple[Claim, Claim]]:
    """Pairs of different guests' claims that exclude each other, one of them on the place itself at least."""
    on_it = [claim for claim in claims if claim.resource.name == place]
    if all(claim.mode is Mode.SHARED for claim in on_it):
        return
    rest = [claim for claim in claims if claim.resource.name != place]
    for index, claim in enumerate(on_it):
        wanted = Wanted(claim.resource, claim.mode, claim.pf)
        for other in (*on_it[index + 1 :], *rest):
            if not claim.owner.is_same_guest(other.owner) and conflict(wanted, other):
                yield claim, other
