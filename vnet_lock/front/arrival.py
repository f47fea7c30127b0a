"""A guest that comes to this host, from another one or from a file: what it is to have here, kept for it.

libvirt lets the hook change such a guest's XML, and no other's: a device that libvirt itself opens is named
there by its place on the host where the guest was. What is chosen instead is reserved, and only for a while:
no `release` follows where libvirt doesn't get as far as `prepare`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Protocol

from vnet_lock.combination import Backend, Port
from vnet_lock.dataclass import replace
from vnet_lock.domain_rewrite import InterfaceForm, made, rewrite
from vnet_lock.domain_wishes import LATE_BACKENDS, Wish
from vnet_lock.domain_xml import read_guest, read_wishes
from vnet_lock.errors import Unsupported
from vnet_lock.front.resolver import form_of
from vnet_lock.model import Owner
from vnet_lock.request import Assignment, Fixed, Intent, Request
from vnet_lock.resolving import full_intent, name_link
from vnet_lock.settings import Settings


class Reserver(Protocol):
    """What an arrival takes of a session."""

    settings: Settings

    def reserve(  # noqa: D102
        self, owner: Owner, requests: Iterable[Request], operation: str
    ) -> tuple[Assignment, ...]: ...


def receive(session: Reserver, xml: bytes, owner: Owner, operation: str) -> bytes:
    """Reserve what the guest needs here, and return its XML with what of it is another's here named anew.

    Empty where it can stay as it is. Raises BadInput, Refused or Unsupported where the guest can't be here.
    """
    guest, wishes = read_wishes(xml)
    resolved = {wish.intent.interface: wish for wish in wishes if wish.is_resolved}
    # As prepare will read it, but for what is named by its place on the other host.
    others = [one for one in read_guest(xml).requests if one.interface not in resolved]
    requests = (*others, *map(_like, resolved.values()))
    if not requests:
        return b""
    found = session.reserve(owner, requests, operation)
    forms = dict(_renamed(session.settings, guest.name, others))
    for assignment in found:
        wish = resolved.get(assignment.request.interface)
        if wish is not None:
            forms[wish.intent.interface] = _form_here(session.settings, wish, assignment)
    written = rewrite(xml, forms) if forms else xml
    return written if written != xml else b""


def _like(wish: Wish) -> Intent:
    """What is to be planned so that the guest sees the device that it has."""
    intent = full_intent(wish)
    match wish.kind:
        case "hostdev" | "pci":
            return replace(intent, backends=(Backend.VFIO,))
        case "bridge":
            return replace(intent, ports=(Port.BRIDGE,), backends=LATE_BACKENDS)
        case "direct":
            ports = tuple(
                port for port in intent.ports or (Port.MACVLAN, Port.SRIOV) if port is not Port.BRIDGE
            )
            return replace(intent, ports=ports, backends=LATE_BACKENDS)
        case _:
            return intent


def _form_here(settings: Settings, wish: Wish, assignment: Assignment) -> InterfaceForm:
    form = form_of(settings, assignment)
    if not isinstance(form, InterfaceForm) or form.kind != wish.kind:
        why = form if isinstance(form, str) else f"it would be of type {form.kind!r} here"
        raise Unsupported(
            f"interface {wish.intent.interface}: it is of type {wish.kind!r}, which this host can't give:"
            f" {why}"
        )
    return form


def _renamed(
    settings: Settings, guest: str, requests: Iterable[Request]
) -> Iterator[tuple[str, InterfaceForm]]:
    """Those whose link's name another link has here."""
    for request in requests:
        if isinstance(request, Fixed) or not request.ifname or not _is_taken(settings, request.ifname):
            continue
        name = name_link(guest, request.interface)
        while _is_taken(settings, name):
            name = f"g{os.urandom(6).hex()}"
        yield request.interface, made(name, request.queues)


def _is_taken(settings: Settings, name: str) -> bool:
    return os.path.exists(f"{settings.sys}/class/net/{name}")
