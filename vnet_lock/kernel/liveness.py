"""Whether anybody will still give claims back: one judgement for who shows claims and for who heals them.

Says that nobody will only on proof; reads only.
"""

from __future__ import annotations

from vnet_lock.kernel.processes import (
    is_alive,
    is_owner_alive,
    read_uptime_s,
    sees_host_network,
    sees_host_pids,
)
from vnet_lock.model import Claim, Claims, Owner, State
from vnet_lock.settings import Settings


class Liveness:
    """Remembers what it read of owners, of whom there may be thousands: make one for each judgement."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._owners: dict[Owner, bool] = {}
        self._sees: tuple[bool, bool] | None = None

    def is_owner_alive(self, owner: Owner) -> bool:
        """Whether an owner may still use what it claimed."""
        if owner not in self._owners:
            self._owners[owner] = is_owner_alive(self._settings, owner)
        return self._owners[owner]

    def stale(self, claims: Claims) -> dict[str, tuple[Claim, ...]]:
        """The claims of each interface that nobody will give back any more, by their token."""
        found: dict[str, tuple[Claim, ...]] = {}
        for claim in claims.records:
            found[claim.token] = (*found.get(claim.token, ()), claim)
        return {token: each for token, each in found.items() if self.is_stale(each)}

    def is_stale(self, claims: tuple[Claim, ...]) -> bool:
        """Whether nobody will give one interface's claims back any more."""
        if not all(map(self._can_judge, claims)):
            return False
        workers = {claim.worker for claim in claims if claim.worker}
        if any(is_alive(self._settings, worker) for worker in workers):
            return False
        if all(claim.state is State.RESERVED and claim.reservation for claim in claims):
            return any(self._is_over(claim) for claim in claims)
        # Between reserved and active, and once it was told to end, a claim lives by its worker alone.
        if any(claim.state is not State.ACTIVE for claim in claims):
            return True
        # Who was killed while handing over left two owners.
        return not any(self.is_owner_alive(claim.owner) for claim in claims)

    def _can_judge(self, claim: Claim) -> bool:
        """Whether its processes are seen from here, and what it has can be undone from here."""
        if self._sees is None:
            self._sees = sees_host_pids(self._settings), sees_host_network(self._settings)
        sees_pids, sees_network = self._sees
        return (sees_pids or not claim.has_host_pids) and (sees_network or not claim.has_host_network)

    def _is_over(self, claim: Claim) -> bool:
        """Whether no start will take what was reserved: its time is over, or its daemon is dead."""
        assert claim.reservation is not None  # noqa: S101 - asked only then
        return claim.reservation.until_s < read_uptime_s() or not self.is_owner_alive(claim.owner)
