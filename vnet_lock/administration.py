"""What a person does to claims and devices by hand, beside what guests get and give back."""

from __future__ import annotations

from vnet_lock.dataclass import replace
from vnet_lock.errors import BadInput, Refused, VnetLockError
from vnet_lock.kernel import pci, processes
from vnet_lock.kernel.liveness import Liveness
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.locks import pf_lock
from vnet_lock.model import (
    BY_HAND,
    Claim,
    Inventory,
    Mode,
    Owner,
    OwnerKind,
    PciAddress,
    Resource,
    ResourceKind,
    State,
    Wanted,
    name_of,
)
from vnet_lock.request import Assignment, Fixed, Form
from vnet_lock.rules import uncovered
from vnet_lock.session import Session
from vnet_lock.situation import device_of, find_resource, function_wanted, nic_wanted


class Administration(Session):
    """A session in which a resource is claimed, given back or made by its name."""

    def claim(self, owner: Owner, word: Resource | PciAddress, mode: Mode) -> Claim:
        """Claim a resource for a process that uses it in its own way; nothing is changed or journalled.

        BadInput where there is no such device, or a VF is to be shared; Refused where it isn't free.
        """
        self.heal()
        inventory = read_inventory(self.settings, [device_of(word)], vlans=True)
        resource = find_resource(word, inventory, self.table.read().on)
        wanted = _wanted_for(inventory, resource, mode)
        request = Fixed(BY_HAND, resource.pci or resource.name, Form.HOSTDEV)
        situation = self._outlook.situation(inventory, owner)
        with self.table.guarded() as writer:
            claims = writer.read()
            obstacle = replace(situation, claims=claims).obstacle(wanted)
            if obstacle:
                raise Refused(obstacle.message, resource=obstacle.resource.text, holder=obstacle.holder)
            held = claims.of(owner)
            missing = uncovered(wanted, held)
            added = self._holding.claims_for(owner, Assignment(request, None, missing), State.ACTIVE)
            writer.add(added)
        return next(
            claim
            for claim in (*added, *held)
            if claim.resource == wanted[0].resource and wanted[0].mode in (claim.mode, Mode.SHARED)
        )

    def release_resource(self, word: Resource | PciAddress, force: bool = False) -> bool:
        """Give back what is claimed on a resource; False where nothing is.

        The claim of a guest that may still live takes ``force``; while the kernel shows that somebody
        uses the device, not even that is enough.
        """
        claims = self.table.read()
        inventory = read_inventory(self.settings, [device_of(word)])
        resource = find_resource(word, inventory, claims.on)
        situation = replace(self._outlook.situation(inventory), claims=claims)
        for record in claims.damaged:
            if record.resource == resource:
                obstacle = situation.obstacle(_wanted_for(inventory, resource, Mode.EXCLUSIVE))
                raise Refused(obstacle.message if obstacle else record.reason, resource=resource.text)
        failures: list[str] = []
        stale = Liveness(self.settings).stale(claims)
        for claim in claims.on(resource):
            is_stale = claim.token in stale
            if not force and not claim.is_by_hand and not is_stale:
                obstacle = situation.obstacle([Wanted(claim.resource, Mode.EXCLUSIVE, claim.pf)])
                message = (
                    obstacle.message if obstacle else f"{name_of(resource)} is held by {claim.owner.text}"
                )
                raise Refused(f"{message}; stop the guest first, or add --force", resource=resource.text)
            in_use = self._back.wait_until_free((claim,), 0)
            if in_use:
                raise Refused("; ".join(in_use), resource=resource.text)
            failures += self._back.heal(claim.token) if is_stale else self._back.give(claim.token)
        if failures:
            raise VnetLockError("; ".join(failures))
        return bool(claims.on(resource))

    def set_numvfs(self, pf: PciAddress, count: int) -> None:
        """Change the number of a PF's VFs; Refused while one of them, or the PF as a whole, is in use.

        The VFs that there are stay claimed while it happens, so that none is given out under it.
        """
        self.heal()
        inventory = read_inventory(self.settings, [pf.text])
        found = inventory.pf_at(pf)
        if found is None:
            raise BadInput(f"there is no PF at {pf}; see: vnet-lock status")
        if count and not found.totalvfs:
            raise BadInput(f"PF {pf} has no SR-IOV, so it can have no VFs; see: vnet-lock status")
        if not 0 <= count <= found.totalvfs:
            raise BadInput(f"PF {pf} can have 0 to {found.totalvfs} VFs, not {count}")
        if count == found.numvfs:
            return
        owner = Owner(
            OwnerKind.PROCESS, "vnet-lock vfs", processes.read_boot_id(self.settings), process=self._me
        )
        wanted = [Wanted(vf.resource, Mode.EXCLUSIVE, pf) for vf in found.vfs]
        situation = self._outlook.situation(inventory, owner)
        with self.table.guarded() as writer:
            situation = replace(situation, claims=writer.read())
            obstacle = situation.obstacle(wanted or [Wanted(found.resource, Mode.SHARED)])
            if obstacle:
                raise Refused(obstacle.message, resource=obstacle.resource.text, holder=obstacle.holder)
            request = Fixed("vfs", pf, Form.HOSTDEV)
            added = self._holding.claims_for(owner, Assignment(request, None, tuple(wanted)), State.ACTIVE)
            writer.add(added)
        try:
            with pf_lock(self.settings, pf):
                # Where there were no VFs, no claim kept another from making some, and from giving them away.
                if pci.read_numvfs(self.settings, pf) != len(found.vfs):
                    raise Refused(f"the VFs of PF {pf} are being changed by another; see: vnet-lock status")
                pci.set_numvfs(self.settings, pf, count)
        finally:
            with self.table.guarded() as writer:
                for claim in added:
                    writer.drop(claim)


def _wanted_for(inventory: Inventory, resource: Resource, mode: Mode) -> tuple[Wanted, ...]:
    """The claims that using a resource takes; BadInput where there is no such device."""
    address = resource.pci
    if resource.kind is ResourceKind.IP:
        return (Wanted(resource, mode),)
    if mode is Mode.SHARED and resource.kind is ResourceKind.VF:
        raise BadInput(f"{name_of(resource)}: a VF is one guest's alone; leave out --shared")
    if address is None:
        nic = inventory.nic_named(resource.name)
        if nic is None:
            raise BadInput(f"there is no network device {resource.name!r}; see: ip link")
        return nic_wanted(inventory, nic, mode)
    is_vf = resource.kind is ResourceKind.VF
    if (inventory.vf_at(address) if is_vf else inventory.pf_at(address)) is None:
        raise BadInput(f"there is no {resource.kind.upper()} at {address}; see: vnet-lock status")
    if mode is Mode.SHARED:
        return (Wanted(resource, mode),)
    return function_wanted(inventory, address)
