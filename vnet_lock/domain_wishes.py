"""What a libvirt guest's metadata asks for (``urn:vnet-lock:guest:1``, schema in xml/vnet-guest.rng)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vnet_lock.combination import Backend, Policy, Port, backends_of, ports_of
from vnet_lock.dataclass import dataclass, replace
from vnet_lock.domain_document import (
    ALIAS,
    NAMESPACE,
    RESERVED_NAMES,
    attribute,
    attribute_of,
    check_mac,
    find_metadata,
    mode_of,
    own_name,
    read_mac,
    user_alias,
)
from vnet_lock.errors import BadInput, Unsupported
from vnet_lock.model import PciAddress, is_ifname, parse_guest_address
from vnet_lock.request import Intent

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_GUEST = f"{{{NAMESPACE}}}guest"
_INTERFACE = f"{{{NAMESPACE}}}interface"
_KNOWN = (
    "alias", "policy", "dev", "port", "backends", "teaming", "mac", "vlan", "queues", "ip", "dhcp", "pool",
)  # fmt: skip
# libvirt opens a tap or macvtap that is there when it starts the guest, and nothing else.
LATE_BACKENDS = (Backend.TAP_VHOST, Backend.TAP)
# The types of an <interface> that take what was made for them, and how.
_LATE_BACKENDS = {"ethernet": LATE_BACKENDS, "vhostuser": (Backend.SOCKET_VHOST,)}
# What libvirt's own types of an interface that was resolved can be of a policy.
_RESOLVED_TYPES = {
    "bridge": (Policy.VEB, Policy.NAT),
    "direct": (Policy.VEB, Policy.VEPA, Policy.PRIVATE),
    "hostdev": (Policy.VEB, Policy.VEPA, Policy.PRIVATE),
    "user": (Policy.NAT,),
}
# MAX_TAP_QUEUES, include/linux/if_tap.h and drivers/net/tun.c.
_QUEUES_LIMIT = 256
# passthrough is any policy: the PF's embedded switch decides.
_DIRECT_POLICIES = {"vepa": Policy.VEPA, "bridge": Policy.VEB, "private": Policy.PRIVATE}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the metadata asks for one interface, in whichever form the interface stands there.

    ``kind`` is the form: libvirt's type of the <interface>, ``pci`` for a <hostdev>, "" where there is none.
    The backends of ``intent`` are as written, empty where nothing is; its MAC is the interface's, that of the
    standby where it is teamed with one, or its own.
    """

    intent: Intent
    kind: str

    @property
    def is_resolved(self) -> bool:
        """Whether libvirt itself opens what stands there."""
        return self.kind not in ("", *_LATE_BACKENDS)

    @property
    def is_vhost_user(self) -> bool:
        """Whether QEMU has it from a socket that a process of ours serves: a form that libvirt takes late."""
        return self.kind == "vhostuser"


def read(root: Element) -> tuple[Wish, ...]:
    """What the metadata of a <domain> asks for; BadInput where it can't be understood."""
    targets = _targets(root)
    guests = find_metadata(root)
    for guest in guests:
        if guest.tag != _GUEST:
            raise BadInput(
                f"metadata: <{_plain(guest)}> is unknown; this version reads <guest> of {NAMESPACE}"
            )
    if len(guests) > 1:
        raise BadInput(f"metadata: <guest> of {NAMESPACE} stands there {len(guests)} times")
    if not guests:
        return ()
    if guests[0].attrib:
        raise BadInput(f"metadata: <guest> has an unknown attribute {next(iter(guests[0].attrib))!s}")
    wishes: dict[str, Wish] = {}
    for element in guests[0]:
        wish = _read_wish(element, targets)
        if wish.intent.interface in wishes:
            raise BadInput(f"interface {wish.intent.interface}: its intent stands there twice")
        wishes[wish.intent.interface] = wish
    return tuple(wishes.values())


def _read_wish(element: Element, targets: dict[str, Element]) -> Wish:
    if element.tag == "interface":
        raise BadInput(
            f"interface {element.get('alias', '')}: in the metadata it is of no namespace; write it as one of"
            f" {NAMESPACE}, as <guest> is"
        )
    if element.tag != _INTERFACE:
        raise BadInput(f"metadata: <{_plain(element)}> is unknown; <guest> has <interface> only")
    alias = element.get("alias", "")
    what = f"interface {alias}"
    if not ALIAS.fullmatch(alias):
        raise BadInput(f"metadata: <interface> with alias {alias!r}: libvirt's user aliases are like ua-net0")
    if unknown := [str(name) for name in element.attrib if name not in _KNOWN]:
        raise BadInput(f"{what}: {unknown[0]} is unknown; there are {', '.join(_KNOWN)}")
    if len(element):
        raise BadInput(f"{what}: <{_plain(element[0])}> is unknown; an intent has attributes only")
    policy, ports, backends = _read_combinations(element, what)
    target = targets.get(alias)
    queues = element.get("queues") or attribute_of(target, "driver", "queues") or "1"
    vlan = element.get("vlan")
    intent = Intent(
        interface=alias,
        policy=policy,
        devs=_read_devs(element, what),
        ports=ports,
        backends=backends,
        mac=_read_own_mac(element, target, targets, what),
        vlan=None if vlan is None else _within(vlan, 1, 4094, f"{what}: vlan"),
        queues=_within(queues, 1, _QUEUES_LIMIT, f"{what}: queues"),
        ifname=None if target is None else own_name(target),
        addresses=_read_addresses(element, policy, what),
        dhcp=_read_dhcp(element, policy, what),
        pool=element.get("pool"),
        socket=attribute_of(target, "source", "path") or None,
        teaming=element.get("teaming", ""),
    )
    if intent.teaming and intent.backends != (Backend.VFIO,):
        raise BadInput(f'{what}: teaming= is for a VF that the guest has itself: add backends="vfio"')
    return Wish(
        intent, "" if target is None else "pci" if target.tag == "hostdev" else target.get("type", "")
    )


def check(root: Element, wishes: tuple[Wish, ...]) -> None:
    """See that each interface stands there in a form that goes with what is asked for; BadInput."""
    targets = _targets(root)
    for wish in wishes:
        _check_wish(wish, targets.get(wish.intent.interface))
    _check_memory(root, wishes)


def _check_wish(wish: Wish, target: Element | None) -> None:
    policy, what = wish.intent.policy, f"interface {wish.intent.interface}"
    kind = "hostdev" if wish.kind == "pci" else wish.kind
    if target is None:
        if wish.intent.backends != (Backend.VFIO,):
            raise BadInput(f'{what}: no <interface> of the guest has <alias name="{wish.intent.interface}"/>')
    elif not wish.kind:
        raise BadInput(f"{what}: its <interface> has no type; write <interface type='ethernet'>")
    elif wish.kind == "ethernet" and Backend.VFIO not in wish.intent.backends:
        _check_target(target, what)
    elif wish.is_vhost_user:
        _check_vhost_user(target, what)
    elif wish.is_resolved and policy not in _RESOLVED_TYPES.get(kind, ()):
        raise BadInput(
            f"{what}: it is of type {wish.kind!r}, which is no {policy}; write <interface type='ethernet'>"
            " with <target dev='NAME' managed='no'/>, or have it written: vnet-lock resolve"
        )
    elif wish.kind == "direct" and _DIRECT_POLICIES.get(mode_of(target), policy) is not policy:
        raise BadInput(
            f"{what}: its mode {mode_of(target)!r} is no {policy}; have it written: vnet-lock resolve"
        )


def late_intents(wishes: tuple[Wish, ...]) -> tuple[Intent, ...]:
    """What is made, or plugged in, when the guest starts: all that isn't resolved.

    BadInput, Unsupported where a libvirt guest can't get it.
    """
    intents = tuple(_late(wish) for wish in wishes if not wish.is_resolved)
    seen: set[str] = set()
    for intent in intents:
        if intent.ifname in seen:
            raise BadInput(
                f"interface {intent.interface}: <target dev='{intent.ifname}'> is another's already"
            )
        seen |= {intent.ifname} if intent.ifname else set()
    return intents


def _late(wish: Wish) -> Intent:
    intent, what = wish.intent, f"interface {wish.intent.interface}"
    if Backend.VFIO in intent.backends:
        return _hotplug(wish, what)
    known = _LATE_BACKENDS[wish.kind]
    backends = intent.backends or known
    if wrong := [backend for backend in backends if backend not in known]:
        raise Unsupported(
            f'{what}: libvirt takes no backend {wrong[0]} late; use backends="{" ".join(known)}"'
        )
    policy, ports = intent.policy, intent.ports
    if not any(set(backends) & set(backends_of(policy, port)) for port in ports or ports_of(policy)):
        raise Unsupported(
            f"{what}: no combination of policy {policy}, port {' or '.join(ports) or 'any'} and backend"
            f" {' or '.join(backends)} exists; name another port"
        )
    return replace(intent, backends=backends)


def _hotplug(wish: Wish, what: str) -> Intent:
    """A VF that libvirt is to plug in once the guest runs: an interface that the definition doesn't have."""
    intent = wish.intent
    if intent.backends != (Backend.VFIO,):
        raise Unsupported(
            f"{what}: a VF that is plugged in is another interface than a tap: vfio can't be one of several"
            " backends; write an intent for each, with teaming= where one stands by for the other, or have"
            " the best of them written: vnet-lock start"
        )
    if wish.kind:
        raise BadInput(
            f"{what}: it is plugged in later, so no <interface> of the definition has its alias; where one is"
            f' to stand by for it, give that an alias of its own, <teaming type="persistent"/>, and write'
            f' teaming="ALIAS" here; or have the VF written: vnet-lock start'
        )
    if intent.ports and intent.ports != (Port.SRIOV,):
        raise Unsupported(f'{what}: only VFs are plugged in; leave port= out, or write port="sriov"')
    for name, is_there in (("queues", intent.queues > 1), ("ip", intent.addresses), ("dhcp", intent.dhcp)):
        if is_there:
            raise BadInput(f"{what}: a VF that is plugged in takes no {name}=")
    return replace(intent, ports=(Port.SRIOV,), hotplug=True)


def _read_own_mac(
    element: Element, target: Element | None, targets: dict[str, Element], what: str
) -> str | None:
    """The MAC address, of which a VF and what stands by for it have one: the failover driver goes by that."""
    mac = check_mac(element.get("mac", ""), what)
    teaming = element.get("teaming", "")
    if teaming:
        standby = targets.get(teaming)
        if standby is None or attribute(standby, "teaming", "type") != "persistent":
            raise BadInput(
                f'{what}: no <interface> with <alias name="{teaming}"/> has <teaming type="persistent"/>'
            )
        own, mac = mac, read_mac(standby, f"interface {teaming}")
        if own and own != mac:
            raise BadInput(f"{what}: teamed with {teaming} it has the same MAC address; leave mac= out")
    elif target is not None:
        mac = read_mac(target, what) or mac
    return mac


def _read_devs(element: Element, what: str) -> tuple[str, ...]:
    """The devices that are named; without any, and without a pool, the host may have a default."""
    devs = tuple(element.get("dev", "").split())
    if devs and element.get("pool") is not None:
        raise BadInput(f"{what}: dev= and pool= exclude each other; leave one")
    for dev in devs:
        if not is_ifname(dev) and not _is_pci(dev):
            raise BadInput(f"{what}: dev {dev!r} is neither a network device's name nor a PCI address")
    return devs


def _read_addresses(element: Element, policy: Policy, what: str) -> tuple[str, ...]:
    """The guest's own addresses, which only a route needs to know."""
    texts = element.get("ip", "").split()
    if bool(texts) != (policy is Policy.ROUTE):
        need = "takes no ip=" if texts else 'needs the guest\'s own address: add ip="192.0.2.7"'
        raise BadInput(f"{what}: policy {policy} {need}")
    try:
        return tuple(dict.fromkeys(map(parse_guest_address, texts)))
    except ValueError as error:
        raise BadInput(f"{what}: ip: {error}") from error


def _read_dhcp(element: Element, policy: Policy, what: str) -> bool:
    dhcp = element.get("dhcp", "off")
    if dhcp not in ("on", "off"):
        raise BadInput(f"{what}: dhcp {dhcp!r} is neither on nor off")
    if dhcp == "on" and policy is not Policy.NAT:
        raise BadInput(f"{what}: policy {policy} has no DHCP server of ours; leave dhcp= out")
    return dhcp == "on"


def _read_combinations(element: Element, what: str) -> tuple[Policy, tuple[Port, ...], tuple[Backend, ...]]:
    """The policy, ports and backends as written."""
    try:
        policy = Policy.parse(element.get("policy", ""))
    except ValueError as error:
        known = ", ".join(Policy)
        raise BadInput(f"{what}: policy {element.get('policy', '')!r} is none of {known}") from error
    try:
        ports = tuple(Port(word) for word in element.get("port", "").split())
    except ValueError as error:
        raise BadInput(f"{what}: port: {error}; there are {', '.join(Port)}") from error
    try:
        backends = tuple(Backend(word) for word in element.get("backends", "").split())
    except ValueError as error:
        raise BadInput(f"{what}: backends: {error}; there are {', '.join(Backend)}") from error
    for port in ports:
        if port not in ports_of(policy):
            raise BadInput(
                f"{what}: policy {policy} has no port {port}; it has {', '.join(ports_of(policy))}"
            )
    return policy, ports, backends


def _check_vhost_user(target: Element, what: str) -> None:
    """Only where QEMU connects can we be the other end."""
    source = target.find("source")
    if source is None or (source.get("type"), source.get("mode")) != ("unix", "client"):
        raise BadInput(f"{what}: of type vhostuser it needs <source type='unix' path='…' mode='client'/>")


def _check_memory(root: Element, wishes: tuple[Wish, ...]) -> None:
    """What serves a vhostuser interface reads and writes the guest's memory, so that has to be shared."""
    usual = attribute(root, "memoryBacking/access", "mode")
    cells = [cell.get("memAccess", usual) for cell in root.iterfind("cpu/numa/cell")] or [usual]
    one = next((wish for wish in wishes if wish.is_vhost_user), None)
    if one and any(mode != "shared" for mode in cells):
        raise BadInput(
            f"interface {one.intent.interface}: of type vhostuser it needs the guest's memory shared: add"
            " <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
        )


def _check_target(target: Element, what: str) -> None:
    """Only an ethernet interface with managed='no' takes a device that was made for it."""
    name = attribute(target, "target", "dev")
    if not name or attribute(target, "target", "managed") != "no":
        raise BadInput(
            f"{what}: it needs <target dev='NAME' managed='no'/>, so that libvirt takes what is made"
        )
    if not is_ifname(name):
        raise BadInput(f"{what}: {name!r} is no name of a network device (at most 15 characters)")
    if name.startswith(RESERVED_NAMES):
        raise BadInput(f"{what}: libvirt keeps names like {name!r} for itself; choose another <target dev=>")


def _targets(root: Element) -> dict[str, Element]:
    """What the guest has under an alias of the user's."""
    devices = (item for name in ("interface", "hostdev") for item in root.iterfind(f"devices/{name}"))
    return {user_alias(item): item for item in devices if user_alias(item)}


def _plain(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _is_pci(text: str) -> bool:
    try:
        PciAddress.parse(text)
    except ValueError:
        return False
    return True


def _within(text: str, low: int, high: int, what: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not low <= int(text) <= high:
        raise BadInput(f"{what} {text!r} is not a number from {low} to {high}")
    return int(text)
