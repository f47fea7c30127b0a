"""Which claims go together: the table of ``conflict``, and what else two guests can't share. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from vnet_lock.combination import Policy, Port
from vnet_lock.dataclass import dataclass
from vnet_lock.model import Claim, Mode, Owner, PciAddress, ResourceKind, State, Wanted

PidOf = Callable[[Owner], int | None]


@dataclass(frozen=True, slots=True)
class Tenancy:
    """What the user of a VF is to the users of the PF's other VFs.

    ``policy`` is None where it isn't known; ``vlan`` is None or 0 where there is none.
    """

    policy: Policy | None = None
    vlan: int | None = None

    @classmethod
    def of(cls, claim: Claim, admin_vlan: int | None = None) -> Tenancy:
        """A claim's; the VF's administrative VLAN counts where the claim says nothing."""
        policy, port, _ = (claim.combination or "--").split("-", 2)
        vlan = admin_vlan if claim.vlan is None else claim.vlan
        return cls(Policy(policy) if port == Port.SRIOV else None, vlan)

    @property
    def is_private(self) -> bool:
        """Whether nobody else on the PF may reach it."""
        return self.policy is Policy.PRIVATE

    def eswitch_mode(self, now: str | None) -> str | None:
        """The mode that the PF's embedded switch has to have for it, None for any.

        Whoever didn't say what he wants relies on what there is ``now``.
        """
        if self.is_private:
            return None
        modes: dict[Policy | None, str] = {Policy.VEB: "veb", Policy.VEPA: "vepa"}
        return modes.get(self.policy, now)


def conflict(wanted: Wanted, claim: Claim) -> bool:
    """Whether another guest's claim forbids what is wanted.

    ===================  ===============  ==============  ================  ==================
    wanted               same VF claimed  another VF      shared on the PF  exclusive on the PF
    ===================  ===============  ==============  ================  ==================
    VF                   yes              no              no                yes
    PF or nic shared     .                no              no                yes
    PF or nic exclusive  .                yes             yes               yes
    ===================  ===============  ==============  ================  ==================
    """
    if wanted.resource == claim.resource:
        return Mode.EXCLUSIVE in (wanted.mode, claim.mode)
    if wanted.resource.kind is ResourceKind.VF:
        return claim.mode is Mode.EXCLUSIVE and _is_pf(claim, wanted.pf)
    return (
        wanted.mode is Mode.EXCLUSIVE
        and wanted.resource.kind is ResourceKind.PF
        and claim.pf is not None
        and claim.pf == wanted.resource.pci
    )


def breaks_privacy(one: Tenancy, other: Tenancy) -> bool:
    """Whether two VFs of a PF, of two guests, can't stand side by side because one of them is private.

    A private one has a VLAN that no other has, or, without a VLAN, no neighbour at all.
    """
    private = [tenancy for tenancy in (one, other) if tenancy.is_private]
    return any(not tenancy.vlan for tenancy in private) or bool(private and one.vlan == other.vlan)


def breaks_eswitch(one: Tenancy, other: Tenancy, now: str | None) -> bool:
    """Whether two VFs of a PF need different modes of its embedded switch, which is in mode ``now``."""
    modes = {one.eswitch_mode(now), other.eswitch_mode(now)} - {None}
    return len(modes) > 1


def are_neighbours(wanted: Wanted, claim: Claim) -> bool:
    """Whether a claim is about another VF of the same PF."""
    return (
        wanted.pf is not None
        and claim.pf == wanted.pf
        and claim.resource != wanted.resource
        and claim.resource.kind is ResourceKind.VF
    )


def same_mac(wanted: Iterable[Wanted], mac: str | None, claim: Claim) -> bool:
    """Whether another guest has this MAC on the same lower device or PF."""
    if mac is None or claim.mac != mac:
        return False
    places = {place for item in wanted for place in (item.resource.name, item.pf and item.pf.text)}
    return claim.resource.name in places or (claim.pf is not None and claim.pf.text in places)


def uncovered(wanted: Iterable[Wanted], held: Iterable[Claim]) -> tuple[Wanted, ...]:
    """What of it no claim covers: an exclusive one covers a share, too."""
    covered = {(claim.resource, mode) for claim in held for mode in (claim.mode, Mode.SHARED)}
    return tuple(item for item in wanted if (item.resource, item.mode) not in covered)


def holder_text(claim: Claim, pid_of: PidOf) -> str:
    """Who holds a claim, in words: ``guest "web1" (pid 4711) since 10:02``."""
    pid = pid_of(claim.owner)
    who = claim.owner.text
    if pid and "(pid" not in who:
        who += f" (pid {pid})"
    doing = " (being released)" if claim.state is State.RELEASING else ""
    return f"{who} since {since_text(claim.since)}{doing}"


def since_text(since: float, now: float | None = None) -> str:
    """A moment for a person: the time, with the date where it isn't today's."""
    then, today = time.localtime(since), time.localtime(now)
    same_day = then[:3] == today[:3]
    return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", then)


def _is_pf(claim: Claim, pf: PciAddress | None) -> bool:
    return claim.resource.kind is ResourceKind.PF and pf is not None and claim.resource.pci == pf
