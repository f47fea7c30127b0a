"""Decides who gets what: requests, inventory and claims in, a plan or a refusal out. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from vnet_lock.combination import DEFAULT_BACKENDS, Backend, Combination, Policy, Port, backends_of, ports_of
from vnet_lock.dataclass import replace
from vnet_lock.journal import Link
from vnet_lock.model import Inventory, Mode, PciAddress, Resource, ResourceKind, Wanted, name_of
from vnet_lock.neighbours import sibling_in_the_way
from vnet_lock.request import Assignment, Fixed, Form, Intent, Plan, Refusal, RefusalKind, Rejection, Request
from vnet_lock.rules import Tenancy
from vnet_lock.situation import Obstacle, Situation, function_wanted, nic_wanted


def plan(requests: Iterable[Request], situation: Situation) -> Plan | Refusal:
    """Find something for each request, or say why one of them gets nothing.

    Devices that are named outright are taken first, so that no other interface of the guest gets them.
    A plain hostdev that is no network device gets no assignment.
    """
    requests = tuple(requests)
    named = {request.device for request in requests if isinstance(request, Fixed)}
    taken: dict[Request, Assignment] = {}
    for request in sorted(requests, key=lambda one: isinstance(one, Intent)):
        own = {
            item.resource for done in taken.values() for item in done.wanted if item.mode is Mode.EXCLUSIVE
        }
        situation = replace(situation, planned=tuple(taken.values()))
        if isinstance(request, Fixed):
            found = _plan_fixed(request, situation, own, named)
        else:
            found = _plan_intent(request, situation, own)
        if isinstance(found, Refusal):
            return found
        if found is not None:
            taken[request] = found
    return Plan(tuple(taken[request] for request in requests if request in taken))


# --- a device that the guest names --------------------------------------------------------------


def _plan_fixed(
    request: Fixed, situation: Situation, own: set[Resource], named: Collection[object]
) -> Assignment | Refusal | None:
    """What a device takes that the guest names, as it does all of ``named``."""
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
        first, *siblings = function_wanted(inventory, request.device)
        # A guest may have several functions of an IOMMU group. Each is claimed by itself, and what else is in
        # the group with one of them.
        had = {item.resource for done in situation.planned if _is_function(done) for item in done.wanted}
        had |= situation.held_beside()
        wanted = (
            first,
            *(one for one in siblings if one.resource.pci not in named and one.resource not in had),
        )
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


def _is_function(assignment: Assignment) -> bool:
    return isinstance(assignment.request, Fixed) and isinstance(assignment.request.device, PciAddress)


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
        missing = "no device is named; name a network device (eth0) or a PCI address as dev, or a pool"
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
