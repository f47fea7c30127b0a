"""A libvirt guest's domain XML, read into requests. Never writes XML, never touches the host.

Two sources of requests: interfaces and host devices that libvirt itself opens become ``Fixed``
(domain_devices.py); what the guest's metadata asks for becomes ``Intent`` (domain_wishes.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnet_lock.dataclass import dataclass
from vnet_lock.domain_devices import read_opened
from vnet_lock.domain_document import find_metadata, parse, read_name, read_uuid

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from vnet_lock.domain_wishes import Wish
    from vnet_lock.request import Fixed, Request


@dataclass(frozen=True, slots=True)
class Guest:
    """A libvirt guest, and what its interfaces need."""

    name: str
    uuid: str
    requests: tuple[Request, ...]


def read_guest(xml: bytes) -> Guest:
    """Read a domain's XML, as a user writes it or as libvirt gives it to a hook.

    The uuid is lower case, "" where the document has none (a guest that isn't defined yet). BadInput
    where the document or an intent cannot be understood, Unsupported where a libvirt guest cannot get
    what an intent asks for.
    """
    root = parse(xml)
    if not find_metadata(root):
        return read_fixed(root)
    from vnet_lock import domain_wishes  # 1 ms, for who has any

    wishes = domain_wishes.read(root)
    domain_wishes.check(root, wishes)
    return _guest(root, (*_opened(root, wishes), *domain_wishes.late_intents(wishes)))


def read_wishes(xml: bytes) -> tuple[Guest, tuple[Wish, ...]]:
    """The guest without what its metadata asks for, and that, for who writes the interfaces anew.

    These may be missing, or of any form. BadInput where the document or an intent cannot be understood.
    """
    from vnet_lock import domain_wishes

    root = parse(xml)
    wishes = domain_wishes.read(root)
    asked = {wish.intent.interface for wish in wishes}
    return _guest(root, tuple(one for one in _opened(root, wishes) if one.interface not in asked)), wishes


def read_opened_for(xml: bytes, wishes: tuple[Wish, ...]) -> tuple[Fixed, ...]:
    """What libvirt itself opens for a guest whose interfaces were written anew for these wishes."""
    return _opened(parse(xml), wishes)


def read_fixed(root: Element) -> Guest:
    """What libvirt itself opens for the guest of a <domain>, whatever its metadata asks for."""
    return _guest(root, read_opened(root, {}))


def _guest(root: Element, requests: tuple[Request, ...]) -> Guest:
    return Guest(read_name(root), read_uuid(root), requests)


def _opened(root: Element, wishes: tuple[Wish, ...]) -> tuple[Fixed, ...]:
    return read_opened(root, {wish.intent.interface: wish.intent.policy for wish in wishes})
