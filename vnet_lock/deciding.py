"""Decides what requests get, by what there is now: claims, devices, configuration.

Where something is written for it, under the guard. What is stale is healed before, in the way or not: a dead
guest's links would pile up on a device that many share. What is just being given back is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

from vnet_lock.claims import ClaimTable, Writer
from vnet_lock.dataclass import replace
from vnet_lock.kernel.liveness import Liveness
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import Claims, Inventory, Owner, PciAddress, State, UseKind
from vnet_lock.neighbours import needs_vlans
from vnet_lock.outlook import Outlook
from vnet_lock.planning import plan
from vnet_lock.request import Intent, Plan, Refusal, Request, error_of
from vnet_lock.rules import Tenancy
from vnet_lock.situation import Situation

T = TypeVar("T")

_RETRY_S = 0.05


class Deciding:
    """Decides about requests whose devices ``outlook`` has resolved; ``heal`` takes an interface's token."""

    def __init__(self, outlook: Outlook, table: ClaimTable, heal: Callable[[str], object]) -> None:
        self._outlook = outlook
        self._settings = outlook.settings
        self._table = table
        self._heal = heal

    def plan(self, requests: tuple[Request, ...], owner: Owner | None, beside: bool) -> Plan | Refusal:
        """What would be done now, in the place of what the owner has or ``beside`` it; changes nothing."""
        claims = self._table.read()
        inventory = self._outlook.observe(requests, _needs_vlans(requests, claims))
        situation = self._outlook.situation(inventory, owner, requests)
        return plan(requests, self._looked_at(replace(situation, claims=claims, beside=beside)))

    def held_vfs(self, pcis: Collection[PciAddress]) -> set[PciAddress]:
        """Those VFs that can't be given to anybody now: claimed, or in use."""
        claims = self._table.read()
        inventory = read_inventory(self._settings, [pci.text for pci in pcis])
        situation = self._looked_at(replace(self._outlook.situation(inventory), claims=claims))
        return {vf.pci for vf in inventory.vfs() if vf.pci in pcis and not situation.is_free(vf)}

    def decide(
        self,
        owner: Owner,
        requests: tuple[Request, ...],
        write: Callable[[Writer, Claims, Plan], T],
        *,
        beside: bool = False,
        ignored: frozenset[UseKind] = frozenset(),
        running: bool = False,
    ) -> tuple[Inventory, T]:
        """Plan, and ``write`` what comes of it, under one guard; raises what speaks against it.

        ``ignored`` evidence of use doesn't count. A guest that is ``running`` already may have what is left
        to the host.
        """
        deadline = time.monotonic() + self._settings.busy_wait_s
        heals = 2  # before, and once more for what died meanwhile, or is the guest's own
        while True:
            seen = self._table.read()
            if heals and self._heal_stale(seen, but=owner):
                heals -= 1
                continue
            inventory = self._outlook.observe(requests, _needs_vlans(requests, seen))
            situation = self._outlook.situation(inventory, owner, requests)
            situation = replace(situation, beside=beside, ignored=ignored)
            if not running:
                situation = replace(situation, left_to_host=self._outlook.left_to_host(inventory))
            with self._table.guarded() as writer:
                claims = writer.read()
                result = plan(requests, replace(situation, claims=claims))
                is_old = _is_old(requests, seen, claims)
                is_late = time.monotonic() > deadline
                if isinstance(result, Plan) and (is_late or not is_old):
                    return inventory, write(writer, claims, result)
            if is_old and not is_late:
                continue
            assert isinstance(result, Refusal)  # noqa: S101 - a plan was returned, or is too old
            if heals and self._heal_stale(claims):
                heals -= 1
            elif is_late or not _is_being_released(result, claims):
                raise error_of(result)
            else:
                time.sleep(_RETRY_S)

    def _heal_stale(self, claims: Claims, but: Owner | None = None) -> bool:
        """Heal what is stale, ``but`` for what a guest itself may have still; whether there was any."""
        stale = Liveness(self._settings).stale(claims)
        tokens = [
            token
            for token, each in stale.items()
            if but is None or not any(claim.owner.is_same_guest(but) for claim in each)
        ]
        for token in tokens:
            self._heal(token)
        return bool(tokens)

    def _looked_at(self, situation: Situation) -> Situation:
        """As it is for who decides nothing: without what is stale, which would be healed."""
        stale = frozenset(Liveness(self._settings).stale(situation.claims))
        left = self._outlook.left_to_host(situation.inventory)
        return replace(situation, stale=stale, left_to_host=left)


def _is_old(requests: Iterable[Request], seen: Claims, now: Claims) -> bool:
    """Whether what the host showed beside claims as they were ``seen`` may mean another thing with these.

    What was given back since would seem to be a stranger's use, and its settings those that the device has by
    itself. Who came meanwhile may be private, and then VLANs matter.
    """
    gone = {claim.token for claim in seen.records} - {claim.token for claim in now.records}
    return bool(gone) or (_needs_vlans(requests, now) and not _needs_vlans(requests, seen))


def _is_being_released(refusal: Refusal, claims: Claims) -> bool:
    return any(
        claim.state is State.RELEASING for claim in claims.records if claim.resource == refusal.resource
    )


def _needs_vlans(requests: Iterable[Request], claims: Claims) -> bool:
    wanted = (Tenancy(request.policy) for request in requests if isinstance(request, Intent))
    return needs_vlans(wanted, claims.records)
