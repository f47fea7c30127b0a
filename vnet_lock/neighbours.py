"""Whether the users of one PF's VFs go together: their privacy, and the mode of the embedded switch. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from vnet_lock.combination import Port
from vnet_lock.dataclass import dataclass
from vnet_lock.model import Claim, Inventory, PciAddress, Resource, ResourceKind, User, Wanted
from vnet_lock.request import Assignment
from vnet_lock.rules import Tenancy, are_neighbours, breaks_eswitch, breaks_privacy


@dataclass(frozen=True, slots=True)
class Discord:
    """The user of another VF that a VF's user can't stand beside: by a claim, or seen without one."""

    reason: str
    resource: Resource
    claim: Claim | None = None
    user: User | None = None


def find_discord(
    item: Wanted,
    tenancy: Tenancy | None,
    inventory: Inventory,
    others: Iterable[Claim],
    claimed: Collection[Resource],
    *,
    own: Iterable[Claim] = (),
) -> Discord | None:
    """The first neighbour that what a VF is wanted for doesn't go with.

    ``tenancy`` is None where nothing but the VF is asked for; ``others`` are claims of other guests, ``own``
    of the same guest, ``claimed`` what has a claim of anybody's.
    """
    if item.pf is None:
        return None
    pf = inventory.pf_at(item.pf)
    now = pf.eswitch if pf else None
    mine = tenancy or Tenancy(vlan=_admin_vlan(inventory, item.resource))
    for claim in others:
        if are_neighbours(item, claim):
            reason = _reason(mine, Tenancy.of(claim, _admin_vlan(inventory, claim.resource)), item.pf, now)
            if reason:
                return Discord(reason, claim.resource, claim)
    for claim in own:
        if are_neighbours(item, claim) and (reason := _eswitch_reason(mine, Tenancy.of(claim), item.pf, now)):
            return Discord(reason, claim.resource, claim)
    if mine.policy is None:
        return None  # it asks nothing of anybody
    for vf in pf.vfs if pf else ():
        users = inventory.users_of(vf.resource)
        if users and vf.resource not in claimed and vf.resource != item.resource:
            reason = _reason(mine, Tenancy(vlan=vf.vlan), item.pf, now)
            if reason:
                return Discord(reason, vf.resource, user=users[0])
    return None


def sibling_in_the_way(
    wanted: Iterable[Wanted], tenancy: Tenancy, inventory: Inventory, planned: Iterable[Assignment]
) -> str:
    """Why what another interface of the same guest gets doesn't go with it; empty where all do.

    One guest's interfaces hide nothing from each other, but need one mode of the embedded switch.
    """
    places = {item.pf: inventory.pf_at(item.pf) for item in wanted if item.pf}
    for done in planned:
        if done.combination and done.combination.port is Port.SRIOV and done.wanted[0].pf in places:
            pf = places[done.wanted[0].pf]
            if breaks_eswitch(tenancy, Tenancy(done.combination.policy), pf.eswitch if pf else None):
                return f"{done.request.interface} of this guest needs another mode of PF {done.wanted[0].pf}"
    return ""


def needs_vlans(tenancies: Iterable[Tenancy], claims: Iterable[Claim]) -> bool:
    """Whether somebody is private, so that the VLANs of all VFs matter."""
    return any(one.is_private for one in (*tenancies, *map(Tenancy.of, claims)))


def _reason(one: Tenancy, other: Tenancy, pf: PciAddress, now: str | None) -> str:
    """Why two users of a PF's VFs don't go together, behind the name of the first; empty where they do."""
    if breaks_privacy(one, other):
        if one.vlan and one.vlan == other.vlan:
            return f"would share VLAN {one.vlan} of PF {pf}"
        return f"would not be alone on PF {pf}"
    return _eswitch_reason(one, other, pf, now)


def _eswitch_reason(one: Tenancy, other: Tenancy, pf: PciAddress, now: str | None) -> str:
    """The same, of one guest's own, which hide nothing from each other."""
    # Whoever says nothing takes the switch as it is.
    if one.policy is not None and breaks_eswitch(one, other, now):
        return f"would need the embedded switch of PF {pf} in {one.eswitch_mode(now)} mode"
    return ""


def _admin_vlan(inventory: Inventory, resource: Resource) -> int | None:
    vf = inventory.vf_at(resource.pci) if resource.kind is ResourceKind.VF and resource.pci else None
    return vf.vlan if vf else None
