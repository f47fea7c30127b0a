"""A guest's XML in its late or full form: planned as its start would be, and written anew. Claims nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Protocol, TypeVar

from vnet_lock.combination import Backend
from vnet_lock.dataclass import dataclass, replace
from vnet_lock.domain_rewrite import InterfaceForm, rewrite
from vnet_lock.domain_wishes import Wish, late_intents
from vnet_lock.domain_xml import read_guest, read_opened_for, read_wishes
from vnet_lock.errors import Refused, Unsupported
from vnet_lock.kernel import sysfs
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import Inventory, Owner
from vnet_lock.ports.macvtap import random_mac
from vnet_lock.request import Assignment, Intent, Plan, Refusal, Request, error_of
from vnet_lock.resolving import full_form, full_intent, late_form, made_late
from vnet_lock.settings import Settings

T = TypeVar("T")

_ATTEMPTS = 5
_SERVED = "a process of ours serves its socket"
# What the ifalias of a bridge of ours begins with.
_OURS = "vnet-lock:"


class ResolveSession(Protocol):
    """What resolving takes of a session."""

    settings: Settings

    def plan(self, requests: Iterable[Request], owner: Owner | None, beside: bool) -> Plan | Refusal: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Resolved:
    """A guest's XML as it is to be.

    ``forms`` has each interface that was written by its alias, None for one that isn't in the XML before the
    guest runs; ``late`` says of those that the hook makes why libvirt can't open them itself.
    """

    xml: bytes
    forms: Mapping[str, InterfaceForm | None]
    late: Mapping[str, str]


def resolve(session: ResolveSession, xml: bytes, owner: Owner | None, *, full: bool = True) -> Resolved:
    """The guest with its interfaces chosen now (``full``), or left to the hook at each start.

    Raises what speaks against it: BadInput, Refused, Unsupported.
    """
    guest, wishes = read_wishes(xml)
    if full:
        forms, late = _choose(session, guest.requests, wishes, owner)
    else:
        forms, late = {}, dict.fromkeys((wish.intent.interface for wish in wishes), "")
    forms |= {
        wish.intent.interface: late_form(wish, guest.name)
        for wish in wishes
        if wish.intent.interface in late and not wish.is_vhost_user
    }
    # In the user's order.
    forms = {alias: forms[alias] for wish in wishes if (alias := wish.intent.interface) in forms}
    written = rewrite(xml, forms) if forms else xml
    read_guest(written)  # the hook will: what it couldn't read is told now
    return Resolved(written, forms, late)


def resolve_alone(session: ResolveSession, xml: bytes, owner: Owner) -> tuple[bytes, tuple[Request, ...]]:
    """The guest as libvirt is to get it where no hook runs, and what is to be claimed and made for it before.

    Its macvtaps are ours, too. Raises as ``resolve``, and Unsupported for what only a hook serves.
    """
    guest, wishes = read_wishes(xml)
    if served := next((wish for wish in wishes if wish.is_vhost_user), None):
        raise Unsupported(
            f"interface {served.intent.interface}: only libvirt's hook serves one of type vhostuser; write"
            " <interface type='ethernet'> in its place, or have the system daemon start the guest"
        )
    chosen, _ = _choose(session, guest.requests, wishes, owner)
    forms: dict[str, InterfaceForm | None] = {}  # in the user's order
    intents: dict[str, Intent] = {}
    for alias, intent in ((wish.intent.interface, wish.intent) for wish in wishes):
        form = chosen.get(alias)
        if form is None or form.kind == "direct":
            intents[alias], form = made_late(replace(intent, mac=intent.mac or random_mac()), guest.name)
        forms[alias] = form
    written = rewrite(xml, forms) if forms else xml
    fixed = (one for one in read_opened_for(written, wishes) if one.interface not in intents)
    return written, (*fixed, *intents.values())


def planned_anew(take: Callable[[], T]) -> T:
    """What was free when it was planned may be another's when it is claimed: then plan anew."""
    for _ in range(_ATTEMPTS - 1):
        with suppress(Refused):
            return take()
    return take()


def choose_one(session: ResolveSession, intent: Intent, owner: Owner) -> InterfaceForm | str:
    """The form of one more interface of a guest, or why libvirt can't open it itself."""
    intent = full_intent(Wish(intent, ""))
    (assignment,) = _plan(session, (intent,), owner, beside=True)
    return form_of(session.settings, assignment)


def _choose(
    session: ResolveSession, others: tuple[Request, ...], wishes: tuple[Wish, ...], owner: Owner | None
) -> tuple[dict[str, InterfaceForm | None], dict[str, str]]:
    served = late_intents(tuple(wish for wish in wishes if wish.is_vhost_user))
    requests = (*others, *served, *(full_intent(wish) for wish in wishes if not wish.is_vhost_user))
    forms: dict[str, InterfaceForm | None] = {}
    late: dict[str, str] = {}
    for assignment in _plan(session, requests, owner, beside=False) if wishes else ():
        if not isinstance(assignment.request, Intent):
            continue
        alias = assignment.request.interface
        is_served = any(alias == intent.interface for intent in served)
        form = _SERVED if is_served else form_of(session.settings, assignment)
        if isinstance(form, InterfaceForm):
            forms[alias] = form
        else:
            late[alias] = form
    return forms, late


def _plan(
    session: ResolveSession, requests: tuple[Request, ...], owner: Owner | None, *, beside: bool
) -> tuple[Assignment, ...]:
    found = session.plan(requests, owner, beside)
    if isinstance(found, Refusal):
        raise error_of(found)
    return found.assignments


def form_of(settings: Settings, assignment: Assignment) -> InterfaceForm | str:
    """How libvirt opens what was planned for an intent, or why it can't."""

    def is_ours(bridge: str) -> bool:
        return (sysfs.read_text(f"{settings.sys}/class/net/{bridge}/ifalias") or "").startswith(_OURS)

    names = [item.resource.name for item in assignment.wanted]
    inventory = read_inventory(settings, names) if names else Inventory()
    form = full_form(assignment, inventory, is_ours)
    if isinstance(form, str) and assignment.combination and assignment.combination.backend is Backend.VFIO:
        raise Unsupported(f"interface {assignment.request.interface}: {form}")
    return form
