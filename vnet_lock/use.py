"""Whose an observed use is: a claim's, the claimant's, or a stranger's. Values only; asks no kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import assert_never

from vnet_lock.dataclass import dataclass
from vnet_lock.journal import MadeLink
from vnet_lock.model import Claim, Mode, Owner, Resource, ResourceKind, UseKind, User

# Whether a pid is an owner's: its process, a descendant, the QEMU that libvirt runs for it, or the daemon.
IsOwn = Callable[[Owner, int], bool]


def counts(resource: Resource, mode: Mode, kind: UseKind) -> bool:
    """Whether a use of this kind needs a claim, or stands in the way of one.

    Nobody but its guest has business on a VF. A PF or another NIC that is shared is the host's own:
    addresses, bridges and other macvtaps on it are normal; only a driver that takes it from the host counts.
    """
    if resource.kind is ResourceKind.VF or mode is Mode.EXCLUSIVE:
        return True
    return kind in (UseKind.VFIO, UseKind.DRIVER, UseKind.UNSEEN)


def foreign_users(
    resource: Resource,
    users: Iterable[User],
    claims: Iterable[Claim],
    is_own: IsOwn,
    *,
    mode: Mode = Mode.EXCLUSIVE,
    claimant: Owner | None = None,
) -> tuple[User, ...]:
    """The users of a resource that neither a claim nor the claimant accounts for.

    ``claims`` are those that make use of the resource lawful: for a planner the claimant's own, for an audit
    all that there are. A use that names nobody is presumed to be the claim's; without a claim it is foreign.
    """
    seen = [user for user in users if counts(resource, mode, user.kind)]
    if not seen:
        return ()
    lawful = _Lawful.of(claims, claimant)
    whose = [(user, lawful.accounts_for(user, is_own)) for user in seen]
    presumed = lawful.has_claim or any(verdict is True for _, verdict in whose)
    return tuple(user for user, verdict in whose if verdict is False or (verdict is None and not presumed))


@dataclass(frozen=True, slots=True)
class _Lawful:
    """Who may use the resource."""

    has_claim: bool
    owners: tuple[Owner, ...]
    workers: frozenset[int]
    tokens: frozenset[str]
    links: frozenset[str]

    @classmethod
    def of(cls, claims: Iterable[Claim], claimant: Owner | None) -> _Lawful:
        claims = tuple(claims)
        links: set[str] = set()
        for claim in claims:
            for entry in claim.journal:
                if isinstance(entry, MadeLink):
                    links |= {entry.name, entry.final}
        return cls(
            has_claim=bool(claims),
            owners=(*(claim.owner for claim in claims), *((claimant,) if claimant else ())),
            workers=frozenset(claim.worker.pid for claim in claims if claim.worker),
            tokens=frozenset(claim.token for claim in claims),
            links=frozenset(links),
        )

    def accounts_for(self, user: User, is_own: IsOwn) -> bool | None:
        """True: theirs for certain; False: somebody else's for certain; None: the evidence names nobody."""
        if user.pid is not None and (
            user.pid in self.workers or any(is_own(owner, user.pid) for owner in self.owners)
        ):
            return True
        match user.kind:
            case UseKind.UPPER:
                if user.mark is not None:
                    return user.mark in self.tokens
                if user.link in self.links:
                    return True
                return None if user.pid is None else False
            case UseKind.LIBVIRT:
                if user.mark is not None:
                    return any(owner.uuid == user.mark for owner in self.owners)
                return None if user.pid is None else False
            case UseKind.VFIO | UseKind.DRIVER | UseKind.UNSEEN:
                return None if user.pid is None else False
            case UseKind.NAMESPACE | UseKind.ADDRESS | UseKind.SOCKET:
                # Any process may look at a claimed device's traffic or live in its namespace.
                return None
            case _ as never:
                assert_never(never)
