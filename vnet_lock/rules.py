"""Which claims go together: the table of DESIGN's lock manager, as one pure function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from vnet_lock.combination import Port
from vnet_lock.model import Claim, Mode, Owner, PciAddress, ResourceKind, State, Wanted

PidOf = Callable[[Owner], int | None]


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


def breaks_privacy(wanted: Wanted, is_private: bool, claim: Claim) -> bool:
    """Whether a VF that must be alone on its PF would have a neighbour: either of the two may be it."""
    if wanted.pf is None or claim.pf != wanted.pf or claim.resource == wanted.resource:
        return False
    if claim.resource.kind is not ResourceKind.VF:
        return False
    return is_private or (claim.combination or "").startswith(f"private-{Port.SRIOV}-")


def same_mac(wanted: Iterable[Wanted], mac: str | None, claim: Claim) -> bool:
    """Whether another guest has this MAC on the same lower device or PF."""
    if mac is None or claim.mac != mac:
        return False
    places = {place for item in wanted for place in (item.resource.name, item.pf and item.pf.text)}
    return claim.resource.name in places or (claim.pf is not None and claim.pf.text in places)


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
