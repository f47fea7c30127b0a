"""Decides who gets what: requests, inventory and claims in, a plan or a refusal out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import assert_never

from vnet_lock.combination import DEFAULT_BACKENDS, Backend, Combination, Policy, Port, backends_of, ports_of
from vnet_lock.dataclass import dataclass, field, replace
from vnet_lock.errors import BadInput, Refused, Unsupported, VnetLockError
from vnet_lock.journal import Link
from vnet_lock.model import (
    Claim,
    Claims,
    Inventory,
    Mode,
    Nic,
    Owner,
    PciAddress,
    Resource,
    ResourceKind,
    UseKind,
    Vf,
    Wanted,
)
from vnet_lock.neighbours import find_discord, sibling_in_the_way
from vnet_lock.request import Assignment, Fixed, Form, Intent, Plan, Refusal, RefusalKind, Rejection, Request
from vnet_lock.rules import PidOf, Tenancy, conflict, holder_text, same_mac
from vnet_lock.use import IsOwn, foreign_users


@dataclass(frozen=True, slots=True)
class Candidate:
    """One device that a port could use; ``reason`` says why it can't, empty where it can."""

    name: str
    wanted: tuple[Wanted, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Somebody in the way."""

    resource: Resource
    holder: str
    message: str
    claim: Claim | None = None


@dataclass(frozen=True, slots=True)
class Situation:
    """What a decision is made on.

    ``stale`` are tokens of claims that are proven dead and count as gone; ``lacking`` says of a port or
    backend why this host can't do it; ``sources`` gives the candidates of each port that is built.
    """

    inventory: Inventory
    claims: Claims
    owner: Owner | None
    pid_of: PidOf
    is_own: IsOwn
    stale: frozenset[str] = frozenset()
    lacking: Mapping[Port | Backend, str] = field(default_factory=dict)
    sources: Mapping[Port, Source] = field(default_factory=dict)
    # Which of the programs that a port may need are here.
    programs: frozenset[str] = frozenset()
    # Whether what the guest has already stays with it, so that none of it is given to it again; what is
    # only reserved for it doesn't.
    beside: bool = False
    # Evidence of use that doesn't count: what libvirt did for a guest that it is starting.
    ignored: frozenset[UseKind] = frozenset()
    # Why this host makes no VLAN devices, empty where it can.
    no_vlans: str = ""
    # VFs that the host's configuration keeps from guests.
    left_to_host: frozenset[Resource] = frozenset()
    # What the guest's other interfaces get.
    planned: tuple[Assignment, ...] = ()

    def others(self) -> Iterator[Claim]:
        """Living claims that are not to be replaced by what is being planned: those of other guests."""
        for claim in self.claims.records:
            own = self.owner is not None and claim.owner.is_same_guest(self.owner)
            stays = self.beside and claim.reservation is None
            if claim.token not in self.stale and (stays or not own):
                yield claim

    def obstacle(
        self, wanted: Iterable[Wanted], mac: str | None = None, tenancy: Tenancy | None = None
    ) -> Obstacle | None:
        """The first thing in the way of claiming all of these, None where they are free.

        ``tenancy`` is what the guest would be to the users of the PF's other VFs.
        """
        wanted = tuple(wanted)
        for item in wanted:
            found = self._left(item) or self._damaged(item) or self._claimed(item) or self._in_use(item)
            found = found or self._beside(item, tenancy)
            if found:
                return found
        for claim in self.others():
            if same_mac(wanted, mac, claim):
                holder = holder_text(claim, self.pid_of)
                message = (
                    f"MAC {mac} is already used on {claim.resource} by {holder}; give each guest its own"
                )
                return Obstacle(claim.resource, holder, message, claim)
        return None

    def is_free(self, vf: Vf) -> bool:
        """Whether nothing speaks against giving this VF away."""
        return self.obstacle([Wanted(vf.resource, Mode.EXCLUSIVE, vf.pf)]) is None

    def _left(self, item: Wanted) -> Obstacle | None:
        if not self.left_to_host:
            return None
        for resource, _ in self._touched(item):
            if resource in self.left_to_host:
                message = (
                    f"{name_of(resource)} is left to the host by its configuration ([host.vfs], see "
                    "vnet-lock.toml(5)); choose another device"
                )
                return Obstacle(resource, "the host", message)
        return None

    def _damaged(self, item: Wanted) -> Obstacle | None:
        if not self.claims.damaged:
            return None
        # It may say anything: a PF's that its VFs are taken with it, a VF's that its PF can't be had whole.
        touched = {resource for resource, _ in self._touched(item)}
        for record in self.claims.damaged:
            if record.resource in touched or (record.resource is None and item.mode is Mode.EXCLUSIVE):
                message = (
                    f"{name_of(item.resource)}: the claim record {record.path} cannot be trusted "
                    f"({record.reason}), so it counts as held; look at it, and remove it if its guest is gone"
                )
                return Obstacle(item.resource, f"damaged record {record.path}", message)
        return None

    def _claimed(self, item: Wanted) -> Obstacle | None:
        for claim in self.others():
            if not conflict(item, claim):
                continue
            holder = holder_text(claim, self.pid_of)
            what = name_of(item.resource)
            if claim.resource == item.resource:
                message = f"{what} is held by {holder}"
            else:
                message = f"{what} is not free: {name_of(claim.resource)} is held by {holder}"
            return Obstacle(claim.resource, holder, f"{message}; see: vnet-lock show {claim.resource}", claim)
        return None

    def _beside(self, item: Wanted, tenancy: Tenancy | None) -> Obstacle | None:
        claimed = {claim.resource for claim in self.claims.records}
        found = find_discord(item, tenancy, self.inventory, self.others(), claimed)
        if found is None:
            return None
        what, neighbour = name_of(item.resource), name_of(found.resource)
        if found.claim:
            holder = holder_text(found.claim, self.pid_of)
            said = f"{neighbour} is held by {holder}"
        else:
            holder = found.user.text if found.user else ""
            said = f"{neighbour} is in use without a claim {found.user.by_whom if found.user else ''}"
        message = f"{what} {found.reason}: {said}; see: vnet-lock show {found.resource}"
        return Obstacle(found.resource, holder, message, found.claim)

    def _in_use(self, item: Wanted) -> Obstacle | None:
        own = self.claims.of(self.owner) if self.owner else ()
        for resource, mode in self._touched(item):
            strangers = foreign_users(
                resource,
                (user for user in self.inventory.users_of(resource) if user.kind not in self.ignored),
                tuple(claim for claim in own if claim.resource == resource),
                self.is_own,
                mode=mode,
                claimant=self.owner,
            )
            if strangers:
                holder = strangers[0].text
                message = f"{name_of(resource)} is in use without a claim {strangers[0].by_whom}; "
                message += f"see: vnet-lock show {resource}"
                return Obstacle(resource, holder, message)
        return None

    def _touched(self, item: Wanted) -> Iterator[tuple[Resource, Mode]]:
        """The resource itself, the PF of a VF, and the VFs of a PF that is wanted whole."""
        yield item.resource, item.mode
        if item.pf is not None:
            yield Resource.pf(item.pf), Mode.SHARED
        pci = item.resource.pci
        if item.resource.kind is ResourceKind.PF and item.mode is Mode.EXCLUSIVE and pci:
            pf = self.inventory.pf_at(pci)
            for vf in pf.vfs if pf else ():
                yield vf.resource, Mode.EXCLUSIVE


Source = Callable[[Intent, Backend, Situation], Iterator[Candidate]]


def plan(requests: Iterable[Request], situation: Situation) -> Plan | Refusal:
    """Find something for each request, or say why one of them gets nothing.

    Devices that are named outright are taken first, so that no other interface of the guest gets them.
    A plain hostdev that is no network device gets no assignment.
    """
    requests = tuple(requests)
    taken: dict[Request, Assignment] = {}
    for request in sorted(requests, key=lambda one: isinstance(one, Intent)):
        own = {
            item.resource for done in taken.values() for item in done.wanted if item.mode is Mode.EXCLUSIVE
        }
        situation = replace(situation, planned=tuple(taken.values()))
        if isinstance(request, Fixed):
            found = _plan_fixed(request, situation, own)
        else:
            found = _plan_intent(request, situation, own)
        if isinstance(found, Refusal):
            return found
        if found is not None:
            taken[request] = found
    return Plan(tuple(taken[request] for request in requests if request in taken))


def error_of(refusal: Refusal) -> VnetLockError:
    """A refusal as the error to raise, with a note for each candidate that was passed over."""
    error = _error_of(refusal)
    for rejection in refusal.rejected:
        error.add_note(rejection.text)
    return error


def _error_of(refusal: Refusal) -> VnetLockError:
    match refusal.kind:
        case RefusalKind.HELD:
            resource = refusal.resource.text if refusal.resource else ""
            return Refused(refusal.message, resource=resource, holder=refusal.holder)
        case RefusalKind.INVALID:
            return BadInput(refusal.message)
        case RefusalKind.IMPOSSIBLE:
            return Unsupported(refusal.message)
        case _ as never:
            assert_never(never)


# --- a device that the guest names --------------------------------------------------------------


def _plan_fixed(request: Fixed, situation: Situation, own: set[Resource]) -> Assignment | Refusal | None:
    inventory = situation.inventory
    if isinstance(request.device, PciAddress):
        vf, pf = inventory.vf_at(request.device), inventory.pf_at(request.device)
        if vf is None and pf is None:
            if not request.is_interface:
                return None
            message = (
                f"{request.interface}: there is no network device at {request.device}; see: vnet-lock status"
            )
            return Refusal(request, RefusalKind.INVALID, message)
        wanted = function_wanted(inventory, request.device)
    else:
        nic = inventory.nic_named(request.device)
        if nic is None:
            message = f"{request.interface}: there is no network device {request.device!r}; see: ip link"
            return Refusal(request, RefusalKind.INVALID, message)
        whole = request.form is Form.PASSTHRU
        wanted = nic_wanted(inventory, nic, Mode.EXCLUSIVE if whole else Mode.SHARED)
    twice = next((item.resource for item in wanted if item.resource in own), None)
    if twice:
        message = f"{request.interface}: {name_of(twice)} is named twice in this guest"
        return Refusal(request, RefusalKind.INVALID, message, twice)
    policy = request.policy if wanted[0].resource.kind is ResourceKind.VF else None
    tenancy = None if request.vlan is None and policy is None else Tenancy(policy, request.vlan)
    obstacle = situation.obstacle(wanted, request.mac, tenancy)
    if obstacle:
        return Refusal(request, RefusalKind.HELD, obstacle.message, obstacle.resource, obstacle.holder)
    return Assignment(request, _fixed_combination(request, inventory, wanted[0]), wanted)


def _fixed_combination(request: Fixed, inventory: Inventory, device: Wanted) -> Combination | None:
    """What libvirt's own use of a device is among ours, None where it is nothing of ours."""
    policies = {Form.VEPA: Policy.VEPA, Form.PRIVATE: Policy.PRIVATE, Form.BRIDGE: Policy.VEB}
    if device.resource.kind is ResourceKind.VF:
        pf = inventory.pf_at(device.pf) if device.pf else None
        policy = request.policy or (Policy.VEPA if pf and pf.eswitch == "vepa" else Policy.VEB)
        backend = Backend.VFIO if request.form is Form.HOSTDEV else Backend.TAP
        return Combination(policy, Port.SRIOV, backend)
    if request.form is Form.HOSTDEV:
        return Combination(Policy.PRIVATE, Port.PHYSDEV, Backend.VFIO)
    if request.form in policies:
        return Combination(policies[request.form], Port.MACVLAN, Backend.TAP)
    return None


# --- a device of our choice ---------------------------------------------------------------------


def _plan_intent(intent: Intent, situation: Situation, own: set[Resource]) -> Assignment | Refusal:
    if refusal := _out_of_place(intent, situation):
        return refusal
    rejected: list[Rejection] = []
    obstacles: list[Obstacle] = []
    tried = False
    for backend in intent.backends or DEFAULT_BACKENDS:
        for port in intent.ports or ports_of(intent.policy):
            if backend not in backends_of(intent.policy, port):
                continue
            tried = True
            combination = Combination(intent.policy, port, backend)
            lack = situation.lacking.get(port) or situation.lacking.get(backend)
            if not lack and intent.queues > 1 and not backend.has_queues:
                lack = f"{backend} has one queue only"
            if lack or port not in situation.sources:
                rejected.append(Rejection(combination.text, lack or "not built in this version"))
                continue
            for candidate in situation.sources[port](intent, backend, situation):
                name = f"{combination.text} on {candidate.name}"
                found = None
                reason = candidate.reason
                if not reason and any(item.resource in own for item in candidate.wanted):
                    reason = "another interface of this guest has it"
                tenancy = Tenancy(intent.policy, intent.vlan) if port is Port.SRIOV else None
                if not reason and tenancy:
                    reason = sibling_in_the_way(
                        candidate.wanted, tenancy, situation.inventory, situation.planned
                    )
                if not reason:
                    found = situation.obstacle(candidate.wanted, intent.mac, tenancy)
                    reason = found.message if found else ""
                if not reason:
                    return Assignment(intent, combination, candidate.wanted, tuple(rejected))
                rejected.append(Rejection(name, reason))
                obstacles += [found] if found else []
    if not tried:
        known = ", ".join(
            f"{port}-{backend}"
            for port in ports_of(intent.policy)
            for backend in backends_of(intent.policy, port)
        )
        message = f"{intent.interface}: {intent.policy} has nothing like that; it goes with: {known}"
        return Refusal(intent, RefusalKind.INVALID, message)
    return _refusal(intent, rejected, obstacles)


def _out_of_place(intent: Intent, situation: Situation) -> Refusal | None:
    """A refusal where what is wanted can't be found here at all."""
    malformed = _malformed(intent, situation.inventory)
    taken = _taken(intent, situation) if malformed else None
    if taken:
        return Refusal(intent, RefusalKind.HELD, f"{intent.interface}: {taken.message}")
    return Refusal(intent, RefusalKind.INVALID, f"{intent.interface}: {malformed}") if malformed else None


def _malformed(intent: Intent, inventory: Inventory) -> str:
    """What is wrong with where an intent wants to be; empty where nothing is."""
    if not intent.devs and intent.pool is not None:
        return f"there is no pool {intent.pool!r}: this host has no configuration, see vnet-lock.toml(5)"
    if not intent.devs:
        missing = "dev= is missing; name a network device (dev=eth0), a PCI address, or a pool (pool=)"
        return "" if intent.policy is Policy.NAT else missing
    # A bridge that is asked for by name may have to be made.
    may_be_new = intent.ports == (Port.BRIDGE,)
    if may_be_new or any(_is_here(dev, inventory) for dev in intent.devs):
        return ""
    names = " or ".join(map(repr, intent.devs)) + (f" of pool {intent.pool}" if intent.pool else "")
    return f"there is no network device {names} here; see: vnet-lock status, ip link"


def _taken(intent: Intent, situation: Situation) -> Obstacle | None:
    """Who has a device that isn't here any more: another guest, to which it went from this host's sight."""
    for claim in situation.claims.records:
        names = {entry.name for entry in claim.journal if isinstance(entry, Link)}
        if not names.isdisjoint(intent.devs):
            return situation.obstacle((Wanted(claim.resource, Mode.EXCLUSIVE),), None, None)
    return None


def _is_here(dev: str, inventory: Inventory) -> bool:
    if inventory.nic_named(dev):
        return True
    try:
        pci = PciAddress.parse(dev)
    except ValueError:
        return False
    return bool(inventory.vf_at(pci) or inventory.pf_at(pci))


def _refusal(intent: Intent, rejected: list[Rejection], obstacles: list[Obstacle]) -> Refusal:
    # What is wrong with the devices says more than what the host lacks in general.
    of_devices = [rejection for rejection in rejected if " on " in rejection.candidate]
    reasons = list(dict.fromkeys(rejection.reason for rejection in of_devices or rejected))
    distinct = list(dict.fromkeys(obstacle.message for obstacle in obstacles))
    where = f"{intent.policy} {intent.place}".rstrip()
    if distinct:
        message = f"{intent.interface}: nothing free for {where}: " + "; ".join(distinct)
        if len(distinct) == 1:
            message = f"{intent.interface}: {distinct[0]}"
        first = obstacles[0]
        return Refusal(intent, RefusalKind.HELD, message, first.resource, first.holder, tuple(rejected))
    message = f"{intent.interface}: {where} is not possible here: " + "; ".join(reasons)
    return Refusal(intent, RefusalKind.IMPOSSIBLE, message, rejected=tuple(rejected))


# --- what a device takes ------------------------------------------------------------------------


def function_wanted(inventory: Inventory, pci: PciAddress) -> tuple[Wanted, ...]:
    """The claims that giving a whole PCI function away takes: itself, and all of its IOMMU group.

    The function must be a VF or PF of the inventory. Functions of the group that are no network
    devices are not ours to claim.
    """
    vf, pf = inventory.vf_at(pci), inventory.pf_at(pci)
    group = vf.iommu_group if vf else pf.iommu_group if pf else None
    siblings = inventory.iommu_groups.get(group, ()) if group is not None else ()
    wanted = [_exclusive(inventory, pci)]
    for sibling in siblings:
        if sibling != pci and (inventory.vf_at(sibling) or inventory.pf_at(sibling)):
            wanted.append(_exclusive(inventory, sibling))
    return tuple(wanted)


def nic_wanted(inventory: Inventory, nic: Nic, mode: Mode) -> tuple[Wanted, ...]:
    """The claims that using a network device takes: itself, and a share of every device below it.

    A VF is never shared, whatever is put on it.
    """
    resource = inventory.resource_of(nic)
    vf = inventory.vf_at(nic.pci) if nic.pci else None
    first = Wanted(resource, Mode.EXCLUSIVE if vf else mode, vf.pf if vf else None)
    below: dict[Resource, Wanted] = {}
    queue = list(nic.lowers)
    while queue:
        lower = inventory.nic_named(queue.pop(0))
        # Other guests' taps are ports of a bridge, not what it stands on.
        if lower is None or lower.kind in ("tun", "macvtap"):
            continue
        at = inventory.resource_of(lower)
        if at == resource or at in below:
            continue
        lower_vf = inventory.vf_at(lower.pci) if lower.pci else None
        below[at] = Wanted(at, Mode.EXCLUSIVE if lower_vf else Mode.SHARED, lower_vf.pf if lower_vf else None)
        queue += lower.lowers
    return (first, *below.values())


def name_of(resource: Resource) -> str:
    """A resource as a person calls it: ``VF 0000:af:06.2``, ``device bond0``, ``address 192.0.2.7``."""
    words = {ResourceKind.NIC: "device", ResourceKind.IP: "address"}
    return f"{words.get(resource.kind) or resource.kind.upper()} {resource.name}"


def _exclusive(inventory: Inventory, pci: PciAddress) -> Wanted:
    vf = inventory.vf_at(pci)
    return Wanted(Resource.vf(pci) if vf else Resource.pf(pci), Mode.EXCLUSIVE, vf.pf if vf else None)
