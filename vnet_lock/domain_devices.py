"""The devices in a libvirt guest's XML: what libvirt itself opens, and what a guest has plugged in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vnet_lock.dataclass import dataclass, replace
from vnet_lock.domain_document import attribute, mode_of, own_name, parse, read_mac, user_alias
from vnet_lock.errors import BadInput
from vnet_lock.model import PciAddress, is_ifname
from vnet_lock.request import Fixed, Form

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from vnet_lock.combination import Policy

# The modes of a direct interface.
_DIRECT_FORMS = {
    "vepa": Form.VEPA,
    "bridge": Form.BRIDGE,
    "private": Form.PRIVATE,
    "passthrough": Form.PASSTHRU,
}


@dataclass(frozen=True, slots=True)
class Plugged:
    """A network interface or host device of a guest: libvirt's alias, the MAC, and what it is called without.

    ``opened`` is the device that libvirt opens for it, as it is claimed at the guest's start; None where it
    names none.
    """

    alias: str
    mac: str
    key: str
    opened: Fixed | None = None


def read_plugged(xml: bytes) -> tuple[Plugged, ...]:
    """What a guest has; of a running guest each has an alias. BadInput as of ``read_opened``."""
    root, keys = parse(xml), _Keys()
    opened = dict(_read_each(root, {}))
    return tuple(
        Plugged(
            alias=attribute(item, "alias", "name"),
            mac=attribute(item, "mac", "address").lower(),
            key=keys.name(item),
            opened=opened.get(item),
        )
        for name in ("interface", "hostdev")
        for item in root.iterfind(f"devices/{name}")
    )


def read_user_aliases(root: Element) -> frozenset[str]:
    """The aliases that the user gave to interfaces of a <domain>."""
    return frozenset(filter(None, map(user_alias, root.iterfind("devices/interface"))))


def read_networks(xml: bytes) -> dict[str, str]:
    """The libvirt networks of which a guest's interfaces get what libvirt picks then, by the interface."""
    keys = _Keys()
    found = parse(xml).iterfind("devices/interface[@type='network']")
    return {keys.name(element): attribute(element, "source", "network") for element in found}


def read_opened(root: Element, policies: Mapping[str, Policy]) -> tuple[Fixed, ...]:
    """What libvirt itself opens for the guest of a <domain>; ``policies`` are those asked for, by alias.

    BadInput where it names no device.
    """
    return tuple(fixed for _, fixed in _read_each(root, policies))


def _read_each(root: Element, policies: Mapping[str, Policy]) -> Iterator[tuple[Element, Fixed]]:
    keys = _Keys()
    for element in root.iterfind("devices/interface"):
        kind = element.get("type")
        if kind == "hostdev":
            key = keys.name(element)
            mac = read_mac(element, f"interface {key}")
            vlan, policy = _read_vlan(element), policies.get(key)
            address = _read_host_address(element, key)
            yield element, Fixed(key, address, Form.HOSTDEV, mac, vlan=vlan, policy=policy)
        elif kind == "direct":
            key = keys.name(element)
            yield element, replace(_read_direct(element, key), policy=policies.get(key))
    for element in root.iterfind("devices/hostdev"):
        if element.get("type") == "pci" and element.get("mode", "subsystem") == "subsystem":
            key = keys.name(element)
            yield (
                element,
                Fixed(key, _read_host_address(element, key), Form.HOSTDEV, is_interface=False),
            )


def _read_direct(element: Element, key: str) -> Fixed:
    dev = attribute(element, "source", "dev")
    if not is_ifname(dev):
        raise BadInput(f"interface {key}: <source dev={dev!r}> names no network device")
    mode = mode_of(element)
    if mode not in _DIRECT_FORMS:
        raise BadInput(f"interface {key}: mode {mode!r} is none of {', '.join(_DIRECT_FORMS)}")
    form, mac = _DIRECT_FORMS[mode], read_mac(element, f"interface {key}")
    # Only a VF of its own gets a VLAN from libvirt.
    vlan = _read_vlan(element) if form is Form.PASSTHRU else None
    return Fixed(key, dev, form, mac, vlan=vlan, ifname=own_name(element))


def _read_vlan(element: Element) -> int | None:
    """The VLAN that libvirt will set; what it doesn't take is its own to refuse."""
    text = attribute(element, "vlan/tag", "id")
    return int(text) if re.fullmatch("[0-9]{1,10}", text) and 0 < int(text) < 4095 else None


def _read_host_address(element: Element, key: str) -> PciAddress:
    """The function on the host; the <address> that is no child of <source> is the one in the guest."""
    address = element.find("source/address")
    if address is None:
        raise BadInput(f"{key}: its <source> has no PCI <address>")
    return read_address(address, key)


def read_address(address: Element, key: str) -> PciAddress:
    """The function that an <address> names; BadInput, with whose it is, where it names none."""
    try:
        parts = [_number(address.get(name, default)) for name, default in _ADDRESS]
        if any(part > limit for part, limit in zip(parts, (0xFFFFFFFF, 0xFF, 0x1F, 7), strict=True)):
            raise ValueError("a part of it is too large")
    except ValueError as error:
        raise BadInput(f"{key}: its <source> has a PCI <address> that cannot be read: {error}") from error
    return PciAddress(*parts)


_ADDRESS = (("domain", "0"), ("bus", ""), ("slot", ""), ("function", "0"))


def _number(text: str) -> int:
    """As libvirt reads numbers in an address: C's notation, a leading 0 is octal."""
    if re.fullmatch("0[0-7]+", text):
        return int(text, 8)
    if re.fullmatch("0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}", text):
        return int(text, 0)
    raise ValueError(f"{text!r} is no number")


class _Keys:
    """Names for interfaces that are the same at every hook operation.

    libvirt gives aliases of its own (net0, hostdev0) after `prepare`, so only the user's count; MAC
    addresses are not unique, because both halves of a teaming pair have the same.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def name(self, element: Element) -> str:
        """The user's alias, else the MAC address, else hostdev0, hostdev1 and so on."""
        alias = user_alias(element)
        if alias:
            return alias
        mac = attribute(element, "mac", "address")
        key = mac.lower() if mac else "hostdev"
        number = self._seen.get(key, 0)
        self._seen[key] = number + 1
        if not mac:
            return f"{key}{number}"
        return f"{key}#{number + 1}" if number else key
