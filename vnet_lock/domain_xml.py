"""libvirt's domain XML, read into requests. Never writes XML, never touches the host, trusts no document.

Two sources of requests: interfaces and host devices that libvirt itself opens become ``Fixed``; what the
guest's metadata asks for (``urn:vnet-lock:guest:1``, schema in xml/vnet-guest.rng) becomes ``Intent``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vnet_lock.combination import Backend, Policy, Port, backends_of, ports_of
from vnet_lock.dataclass import dataclass, replace
from vnet_lock.errors import BadInput, Unsupported
from vnet_lock.model import Fixed, Form, Intent, PciAddress, Request, is_ifname, parse_guest_address

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element, TreeBuilder

NAMESPACE = "urn:vnet-lock:guest:1"
SIZE_LIMIT_BYTES = 8 * 1024 * 1024

_FAMILY = "{urn:vnet-lock:guest"
_GUEST = f"{{{NAMESPACE}}}guest"
_INTERFACE = f"{{{NAMESPACE}}}interface"
_KNOWN = (
    "alias", "policy", "dev", "port", "backends", "teaming", "mac", "vlan", "queues", "ip", "dhcp", "pool",
)  # fmt: skip

# libvirt keeps a user's alias only where it is like this (virDomainDeviceAliasIsUserAlias).
_ALIAS = re.compile("ua-[A-Za-z0-9_-]+")
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
# libvirt takes names with these prefixes for its own and drops them from a definition.
_RESERVED_NAMES = ("vnet", "macvtap", "macvlan")
# MAX_TAP_QUEUES, include/linux/if_tap.h and drivers/net/tun.c.
_QUEUES_LIMIT = 256

_DIRECT_FORMS = {
    "vepa": Form.VEPA,
    "bridge": Form.BRIDGE,
    "private": Form.PRIVATE,
    "passthrough": Form.PASSTHRU,
}
# passthrough is any policy: the PF's embedded switch decides.
_DIRECT_POLICIES = {"vepa": Policy.VEPA, "bridge": Policy.VEB, "private": Policy.PRIVATE}


@dataclass(frozen=True, slots=True)
class Guest:
    """A libvirt guest, and what its interfaces need."""

    name: str
    uuid: str
    requests: tuple[Request, ...]


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


def read_guest(xml: bytes) -> Guest:
    """Read a domain's XML, as a user writes it or as libvirt gives it to a hook.

    The uuid is lower case, "" where the document has none (a guest that isn't defined yet). BadInput
    where the document or an intent cannot be understood, Unsupported where a libvirt guest cannot get
    what an intent asks for.
    """
    root = parse(xml)
    targets = _targets(root)
    wishes = _read_wishes(root, targets)
    for wish in wishes:
        _check_wish(wish, targets.get(wish.intent.interface))
    _check_memory(root, wishes)
    fixed = _read_fixed(root, _Keys(), wishes)
    return Guest(_read_name(root), _read_uuid(root), (*fixed, *_late_intents(wishes)))


def read_wishes(xml: bytes) -> tuple[Guest, tuple[Wish, ...]]:
    """The guest without what its metadata asks for, and that, for who writes the interfaces anew.

    These may be missing, or of any form. BadInput where the document or an intent cannot be understood.
    """
    root = parse(xml)
    wishes = _read_wishes(root, _targets(root))
    asked = {wish.intent.interface for wish in wishes}
    fixed = tuple(one for one in _read_fixed(root, _Keys(), wishes) if one.interface not in asked)
    return Guest(_read_name(root), _read_uuid(root), fixed), wishes


@dataclass(frozen=True, slots=True)
class Plugged:
    """A network interface or host device of a guest: libvirt's alias, the MAC, and its key among claims."""

    alias: str
    mac: str
    key: str


def read_plugged(xml: bytes) -> tuple[Plugged, ...]:
    """What a guest has; of a running guest each has an alias."""
    root, keys = parse(xml), _Keys()
    found = (item for name in ("interface", "hostdev") for item in root.iterfind(f"devices/{name}"))
    return tuple(
        Plugged(
            _attribute(item, "alias", "name"), _attribute(item, "mac", "address").lower(), keys.name(item)
        )
        for item in found
    )


def read_fixed(root: Element) -> Guest:
    """What libvirt itself opens for the guest of a <domain>, whatever its metadata asks for."""
    return Guest(_read_name(root), _read_uuid(root), tuple(_read_fixed(root, _Keys(), ())))


def read_user_aliases(root: Element) -> frozenset[str]:
    """The aliases that the user gave to interfaces of a <domain>."""
    return frozenset(filter(None, map(_user_alias, root.iterfind("devices/interface"))))


def read_identity(xml: bytes) -> tuple[str, str]:
    """The name and uuid alone, so that a guest with a bad intent can still be released."""
    root = parse(xml)
    return _read_name(root), _read_uuid(root)


def parse(xml: bytes, tag: str = "domain") -> Element:
    """A document of libvirt's with this root; BadInput where it is something else, or can't be trusted."""
    # 4 ms, where lxml takes 30. Entities need a DOCTYPE, which is refused before it is read, and expat opens
    # nothing by itself.
    from xml.etree.ElementTree import ParseError, XMLParser

    if len(xml) > SIZE_LIMIT_BYTES:
        raise BadInput(
            f"guest XML: {len(xml)} bytes are more than the {SIZE_LIMIT_BYTES} that a guest may have"
        )
    parser = XMLParser(target=_make_builder())  # noqa: S314
    try:
        parser.feed(xml)
        root = parser.close()
    except ParseError as error:
        raise BadInput(f"guest XML: {error}") from error
    except (LookupError, ValueError) as error:  # an encoding that Python doesn't know, or expat can't take
        raise BadInput(f"guest XML: its encoding cannot be read: {error}") from error
    if root.tag != tag:
        raise BadInput(f"guest XML: the root is <{root.tag}>, not libvirt's <{tag}>")
    return root


def _make_builder() -> TreeBuilder:
    from xml.etree.ElementTree import TreeBuilder

    class Builder(TreeBuilder):
        """Builds the tree of a document without DOCTYPE."""

        def doctype(self, *_: str | None) -> None:
            raise BadInput("guest XML: it has a DOCTYPE, which a guest never needs; remove it")

    return Builder()


def _read_name(root: Element) -> str:
    name = root.findtext("name", "").strip()
    if not name or "/" in name or "\n" in name:
        raise BadInput(f"guest XML: {name!r} is no name of a guest")
    return name


def _read_uuid(root: Element) -> str:
    text = root.findtext("uuid", "").strip().lower()
    digits = text.replace("-", "")
    if text and not re.fullmatch("[0-9a-f]{32}", digits):
        raise BadInput(f"guest XML: {text!r} is no uuid")
    return re.sub("(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", digits)


# --- what libvirt opens -------------------------------------------------------------------------


class _Keys:
    """Names for interfaces that are the same at every hook operation.

    libvirt gives aliases of its own (net0, hostdev0) after `prepare`, so only the user's count; MAC
    addresses are not unique, because both halves of a teaming pair have the same.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def name(self, element: Element) -> str:
        """The user's alias, else the MAC address, else hostdev0, hostdev1 and so on."""
        alias = _user_alias(element)
        if alias:
            return alias
        mac = _attribute(element, "mac", "address")
        key = mac.lower() if mac else "hostdev"
        number = self._seen.get(key, 0)
        self._seen[key] = number + 1
        if not mac:
            return f"{key}{number}"
        return f"{key}#{number + 1}" if number else key


def _read_fixed(root: Element, keys: _Keys, wishes: tuple[Wish, ...]) -> list[Fixed]:
    policies = {wish.intent.interface: wish.intent.policy for wish in wishes}
    fixed: list[Fixed] = []
    for element in root.iterfind("devices/interface"):
        kind = element.get("type")
        if kind == "hostdev":
            key = keys.name(element)
            mac = _read_mac(element, f"interface {key}")
            vlan, policy = _read_vlan(element), policies.get(key)
            address = _read_host_address(element, key)
            fixed.append(Fixed(key, address, Form.HOSTDEV, mac, vlan=vlan, policy=policy))
        elif kind == "direct":
            key = keys.name(element)
            fixed.append(replace(_read_direct(element, key), policy=policies.get(key)))
    for element in root.iterfind("devices/hostdev"):
        if element.get("type") == "pci" and element.get("mode", "subsystem") == "subsystem":
            key = keys.name(element)
            fixed.append(Fixed(key, _read_host_address(element, key), Form.HOSTDEV, is_interface=False))
    return fixed


def _read_direct(element: Element, key: str) -> Fixed:
    dev = _attribute(element, "source", "dev")
    if not is_ifname(dev):
        raise BadInput(f"interface {key}: <source dev={dev!r}> names no network device")
    mode = _mode_of(element)
    if mode not in _DIRECT_FORMS:
        raise BadInput(f"interface {key}: mode {mode!r} is none of {', '.join(_DIRECT_FORMS)}")
    form, mac = _DIRECT_FORMS[mode], _read_mac(element, f"interface {key}")
    # Only a VF of its own gets a VLAN from libvirt.
    vlan = _read_vlan(element) if form is Form.PASSTHRU else None
    name = _attribute(element, "target", "dev")
    # What libvirt named itself stands in the XML of a running guest, and has another name at the next start.
    ifname = None if name.startswith(_RESERVED_NAMES) else name or None
    return Fixed(key, dev, form, mac, vlan=vlan, ifname=ifname)


def _read_vlan(element: Element) -> int | None:
    """The VLAN that libvirt will set; what it doesn't take is its own to refuse."""
    text = _attribute(element, "vlan/tag", "id")
    return int(text) if text.isdecimal() and 0 < int(text) < 4095 else None


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


# --- what the guest's metadata asks for ---------------------------------------------------------


def _targets(root: Element) -> dict[str, Element]:
    """What the guest has under an alias of the user's."""
    devices = (item for name in ("interface", "hostdev") for item in root.iterfind(f"devices/{name}"))
    return {_user_alias(item): item for item in devices if _user_alias(item)}


def _read_wishes(root: Element, targets: dict[str, Element]) -> tuple[Wish, ...]:
    guests = [element for element in root.iterfind("metadata/*") if str(element.tag).startswith(_FAMILY)]
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
    if element.tag != _INTERFACE:
        raise BadInput(f"metadata: <{_plain(element)}> is unknown; <guest> has <interface> only")
    alias = element.get("alias", "")
    what = f"interface {alias}"
    if not _ALIAS.fullmatch(alias):
        raise BadInput(f"metadata: <interface> with alias {alias!r}: libvirt's user aliases are like ua-net0")
    if unknown := [str(name) for name in element.attrib if name not in _KNOWN]:
        raise BadInput(f"{what}: {unknown[0]} is unknown; there are {', '.join(_KNOWN)}")
    if len(element):
        raise BadInput(f"{what}: <{_plain(element[0])}> is unknown; an intent has attributes only")
    policy, ports, backends = _read_combinations(element, what)
    target = targets.get(alias)
    queues = element.get("queues") or _attribute_of(target, "driver", "queues") or "1"
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
        ifname=_attribute_of(target, "target", "dev") or None,
        addresses=_read_addresses(element, policy, what),
        dhcp=_read_dhcp(element, policy, what),
        pool=element.get("pool"),
        socket=_attribute_of(target, "source", "path") or None,
        teaming=element.get("teaming", ""),
    )
    if intent.teaming and intent.backends != (Backend.VFIO,):
        raise BadInput(f'{what}: teaming= is for a VF that the guest has itself: add backends="vfio"')
    return Wish(
        intent, "" if target is None else "pci" if target.tag == "hostdev" else target.get("type", "")
    )


def _check_wish(wish: Wish, target: Element | None) -> None:
    """See that the form in which the interface stands there goes with what is asked for."""
    policy, what = wish.intent.policy, f"interface {wish.intent.interface}"
    kind = "hostdev" if wish.kind == "pci" else wish.kind
    if target is None:
        if wish.intent.backends != (Backend.VFIO,):
            raise BadInput(f'{what}: no <interface> of the guest has <alias name="{wish.intent.interface}"/>')
    elif wish.kind == "ethernet" and Backend.VFIO not in wish.intent.backends:
        _check_target(target, what)
    elif wish.kind == "vhostuser":
        _check_vhost_user(target, what)
    elif wish.is_resolved and policy not in _RESOLVED_TYPES.get(kind, ()):
        raise BadInput(
            f"{what}: it is of type {wish.kind!r}, which is no {policy}; write <interface type='ethernet'>"
            " with <target dev='NAME' managed='no'/>, or have it written: vnet-lock resolve"
        )
    elif wish.kind == "direct" and _DIRECT_POLICIES.get(_mode_of(target), policy) is not policy:
        raise BadInput(
            f"{what}: its mode {_mode_of(target)!r} is no {policy}; have it written: vnet-lock resolve"
        )


def _late_intents(wishes: tuple[Wish, ...]) -> list[Intent]:
    """What is made, or plugged in, when the guest starts: all that isn't resolved."""
    intents = [_late(wish) for wish in wishes if not wish.is_resolved]
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
    mac = _check_mac(element.get("mac", ""), what)
    teaming = element.get("teaming", "")
    if teaming:
        standby = targets.get(teaming)
        if standby is None or _attribute(standby, "teaming", "type") != "persistent":
            raise BadInput(
                f'{what}: no <interface> with <alias name="{teaming}"/> has <teaming type="persistent"/>'
            )
        own, mac = mac, _read_mac(standby, f"interface {teaming}")
        if own and own != mac:
            raise BadInput(f"{what}: teamed with {teaming} it has the same MAC address; leave mac= out")
    elif target is not None:
        mac = _read_mac(target, what) or mac
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
    usual = _attribute(root, "memoryBacking/access", "mode")
    cells = [cell.get("memAccess", usual) for cell in root.iterfind("cpu/numa/cell")] or [usual]
    one = next((wish for wish in wishes if wish.kind == "vhostuser"), None)
    if one and any(mode != "shared" for mode in cells):
        raise BadInput(
            f"interface {one.intent.interface}: of type vhostuser it needs the guest's memory shared: add"
            " <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
        )


def _check_target(target: Element, what: str) -> None:
    """Only an ethernet interface with managed='no' takes a device that was made for it."""
    name = _attribute(target, "target", "dev")
    if not name or _attribute(target, "target", "managed") != "no":
        raise BadInput(
            f"{what}: it needs <target dev='NAME' managed='no'/>, so that libvirt takes what is made"
        )
    if not is_ifname(name):
        raise BadInput(f"{what}: {name!r} is no name of a network device (at most 15 characters)")
    if name.startswith(_RESERVED_NAMES):
        raise BadInput(f"{what}: libvirt keeps names like {name!r} for itself; choose another <target dev=>")


def _read_mac(target: Element, what: str) -> str | None:
    return _check_mac(_attribute(target, "mac", "address"), what)


def _check_mac(text: str, what: str) -> str | None:
    mac = text.lower()
    if mac and not re.fullmatch("[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac):
        raise BadInput(f"{what}: {mac!r} is no MAC address")
    return mac or None


# --- words --------------------------------------------------------------------------------------


def _user_alias(element: Element) -> str:
    """The alias that the user gave: libvirt keeps those with this prefix, and changes all others."""
    alias = _attribute(element, "alias", "name")
    return alias if _ALIAS.fullmatch(alias) else ""


def _attribute(element: Element, child: str, name: str) -> str:
    found = element.find(child)
    return "" if found is None else found.get(name, "")


def _attribute_of(element: Element | None, child: str, name: str) -> str:
    return "" if element is None else _attribute(element, child, name)


def _mode_of(target: Element) -> str:
    """The mode of a direct interface, as libvirt reads it."""
    return _attribute(target, "source", "mode") or "vepa"


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
