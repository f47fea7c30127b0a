"""The way back: releasing, wait until the device is free, undo the journal, drop the claim.

Whoever is at it marks the claims as his first; who finds the mark of a dead process goes on in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from vnet_lock.claims import ClaimTable
from vnet_lock.dataclass import replace
from vnet_lock.errors import Refused, VnetLockError
from vnet_lock.journal import Keeper, MadeLink, share_key
from vnet_lock.kernel import processes, sysfs
from vnet_lock.kernel.liveness import Liveness
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.locks import host_lock, pf_lock
from vnet_lock.model import Claim, Mode, Process, State, UseKind, name_of
from vnet_lock.settings import Settings
from vnet_lock.undo import end_keeper, remove_files, undo

# What must hold of one interface's claims, asked under the guard.
Still = Callable[[tuple[Claim, ...]], bool]

_RETRY_S = 0.05
_HEAL_WAIT_S = 0.2
# How a command is run in init's network namespace.
_THERE = "nsenter -t 1 -n vnet-lock gc"


class GivingBack:
    """Gives claims back, each interface's by its token, as the process ``me``."""

    def __init__(self, settings: Settings, table: ClaimTable, me: Process) -> None:
        self._settings = settings
        self._table = table
        self._me = me

    def give_all(self, tokens: Iterable[str], still: Still | None = None) -> None:
        """As ``give``, of several; one VnetLockError for all that could not be done."""
        failures = [failure for token in tokens for failure in self.give(token, still=still)]
        if failures:
            raise VnetLockError("; ".join(failures) + "; what is left to undo is kept: vnet-lock gc")

    def give(
        self, token: str, drop: bool = True, wait_s: float | None = None, still: Still | None = None
    ) -> list[str]:
        """Undo one interface's claims and drop them; return what could not be done, and keep them then.

        Nothing is done where ``still`` doesn't hold of them (any more).
        """
        try:
            claims = self._mark_releasing(token, still)
            if not claims:
                return []
            failures = self._undo_marked(claims, self._settings.free_wait_s if wait_s is None else wait_s)
            with self._table.guarded() as writer:
                for claim in writer.read().with_token(token):
                    if failures:
                        writer.replace(replace(claim, worker=None))
                    elif drop:
                        writer.drop(claim)
                    else:
                        writer.replace(replace(claim, journal=()))
        except VnetLockError as error:
            return [str(error)]
        return failures

    def heal(self, token: str) -> list[str]:
        """Give back what is stale, if it is so still; return what could not be done."""
        # A process that is dead holds nothing any more: what is held still is held by another.
        return self.give(token, wait_s=_HEAL_WAIT_S, still=Liveness(self._settings).is_stale)

    def wait_until_free(self, claims: tuple[Claim, ...], wait_s: float) -> list[str]:
        """Wait until no process holds the devices; what is still held after ``wait_s`` seconds is said."""
        deadline = time.monotonic() + wait_s
        while True:
            held = [*self._held_functions(claims), *self._held_links(claims)]
            if not held or time.monotonic() > deadline:
                return list(dict.fromkeys(held))
            time.sleep(_RETRY_S)

    def _held_functions(self, claims: tuple[Claim, ...]) -> Iterator[str]:
        inventory = read_inventory(self._settings, [claim.resource.name for claim in claims])
        for claim in claims:
            for user in inventory.users_of(claim.resource):
                if claim.mode is Mode.EXCLUSIVE and user.kind in (UseKind.VFIO, UseKind.NAMESPACE):
                    yield f"{name_of(claim.resource)} is still in use {user.by_whom}"

    def _held_links(self, claims: tuple[Claim, ...]) -> Iterator[str]:
        """Macvtaps that were made for the claims, and that a process has open."""
        links = {
            name
            for claim in claims
            for entry in claim.journal
            if isinstance(entry, MadeLink)
            for name in (entry.name, entry.final)
        }
        found = ((sysfs.read_macvtap_rdev(self._settings, name), name) for name in sorted(links))
        rdevs = {rdev: name for rdev, name in found if rdev is not None}
        for rdev, users in processes.read_holders(self._settings, rdevs.keys()).items():
            for user in users:
                yield f'macvtap "{rdevs[rdev]}" is still in use {user.by_whom}'

    def _undo_marked(self, claims: tuple[Claim, ...], wait_s: float) -> list[str]:
        """Wait until the devices are free and undo what the journals say; return what could not be done."""
        try:
            boot_id = processes.read_boot_id(self._settings)
            if all(claim.owner.boot_id != boot_id for claim in claims):
                for claim in claims:
                    remove_files(self._settings, claim)
                return []
            is_here = processes.sees_host_network(self._settings)
            if not is_here and (far := next((one for one in claims if one.has_host_network), None)):
                what = name_of(far.resource)
                return [f"{what} can only be given back in the host's own network namespace: {_THERE}"]
            # It would hold the device for ever.
            for entry in (one for claim in claims for one in claim.journal if isinstance(one, Keeper)):
                end_keeper(self._settings, entry)
            failures = self.wait_until_free(claims, wait_s)
            if failures:
                return failures
            with ExitStack() as stack:
                for pf in sorted({claim.pf for claim in claims if claim.pf}):
                    stack.enter_context(pf_lock(self._settings, pf))
                shared: set[str] = set()
                if any(share_key(entry) for claim in claims for entry in claim.journal):
                    stack.enter_context(host_lock(self._settings))
                    shared = self._needed_by_others(claims[0].token)
                return [failure for claim in claims for failure in undo(self._settings, claim, shared)]
        except VnetLockError as error:
            return [str(error)]

    def _needed_by_others(self, token: str) -> set[str]:
        """What other claims have in their journals, too; of a dead one as well: its own undo comes later."""
        with self._table.guarded() as writer:
            claims = writer.read().records
        entries = (entry for claim in claims if claim.token != token for entry in claim.journal)
        return {key for entry in entries if (key := share_key(entry))}

    def _mark_releasing(self, token: str, still: Still | None) -> tuple[Claim, ...]:
        """Make an interface's claims ours to undo; empty where they are gone, or somebody else saw to it.

        Waits a while for another who is at it, and raises Refused where he doesn't come to an end.
        """
        deadline = time.monotonic() + self._settings.busy_wait_s
        while True:
            with self._table.guarded() as writer:
                claims = writer.read().with_token(token)
                worker = next((claim.worker for claim in claims if claim.worker), None)
                if worker is None or worker == self._me or not processes.is_alive(self._settings, worker):
                    if still is not None and not still(claims):
                        return ()
                    claims = tuple(replace(one, state=State.RELEASING, worker=self._me) for one in claims)
                    for claim in claims:
                        writer.replace(claim)
                    return claims
            if time.monotonic() > deadline:
                raise Refused(f"{claims[0].resource} is being worked on by pid {worker.pid}")
            time.sleep(_RETRY_S)
