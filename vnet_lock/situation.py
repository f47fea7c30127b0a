"""What a decision is made on, and what in it stands in the way of a claim. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from vnet_lock.combination import Backend, Port
from vnet_lock.dataclass import dataclass, field
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
    name_of,
)
from vnet_lock.neighbours import find_discord
from vnet_lock.request import Assignment, Intent
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
        """Living claims that are not to be replaced by what is being planned."""
        yield from self.strangers()
        yield from self.kept()

    def strangers(self) -> Iterator[Claim]:
        """Living claims of other guests."""
        for claim in self.claims.records:
            if claim.token not in self.stale and not self._is_own(claim):
                yield claim

    def kept(self) -> Iterator[Claim]:
        """Those of the guest's own that what is being planned comes to."""
        for claim in self.claims.records if self.beside else ():
            if claim.token not in self.stale and self._is_own(claim) and claim.reservation is None:
                yield claim

    def _is_own(self, claim: Claim) -> bool:
        return self.owner is not None and claim.owner.is_same_guest(self.owner)

    def held_beside(self) -> set[Resource]:
        """What of the devices is the guest's alone already, and stays so."""
        return {claim.resource for claim in self.kept() if claim.mode is Mode.EXCLUSIVE}

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
        # Both halves of a team have one MAC, and each a device of its own.
        places = {item.resource for item in wanted}
        own = (claim for claim in self.kept() if claim.resource in places)
        for claim in (*self.strangers(), *own):
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
        found = find_discord(item, tenancy, self.inventory, self.strangers(), claimed, own=self.kept())
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


# --- what a device takes ------------------------------------------------------------------------


def device_of(word: Resource | PciAddress) -> str:
    """The name or address of the device to look at for what a person names."""
    return word.text if isinstance(word, PciAddress) else word.name


def find_resource(
    word: Resource | PciAddress, inventory: Inventory, claims_on: Callable[[Resource], Iterable[Claim]]
) -> Resource:
    """The resource that a person means: behind the name of a network device its PCI function, if it has one.

    An address is that of a VF, else of a PF. What is claimed is meant as it is named: it may be gone.
    """
    named = (Resource.vf(word), Resource.pf(word)) if isinstance(word, PciAddress) else (word,)
    held = next((one for one in named if [*claims_on(one)]), None)
    if held is not None:
        return held
    if isinstance(word, PciAddress):
        return named[0] if inventory.vf_at(word) else named[-1]
    nic = inventory.nic_named(word.name) if word.kind is ResourceKind.NIC else None
    return inventory.resource_of(nic) if nic else word


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


def _exclusive(inventory: Inventory, pci: PciAddress) -> Wanted:
    vf = inventory.vf_at(pci)
    return Wanted(Resource.vf(pci) if vf else Resource.pf(pci), Mode.EXCLUSIVE, vf.pf if vf else None)
