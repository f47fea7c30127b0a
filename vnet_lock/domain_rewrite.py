"""Writes interfaces of a libvirt guest anew, and leaves every other byte of its XML as it is.

Comments, unknown elements, order, quotes and namespaces are the user's: only what the new form of an
interface decides about is replaced, by its place in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vnet_lock.dataclass import dataclass, field
from vnet_lock.errors import BadInput
from vnet_lock.model import PciAddress

_TAG = re.compile(rb"""<[^>"']*(?:"[^"]*"[^>"']*|'[^']*'[^>"']*)*>""")
_ATTRIBUTE = re.compile(rb"""\s+([^\s=/>]+)\s*=\s*("[^"]*"|'[^']*')""")
_ENCODINGS = ("", "utf-8", "us-ascii", "ascii")

# Children of an interface that are for some types only: elsewhere libvirt refuses them, or means another
# thing by them. What stands in none of these is the user's own, and stays.
_OF_A_TYPE = (
    *("source", "virtualport", "vlan", "script", "downscript", "backend", "portForward"),
    *("ip", "route", "port"),
)
_OF_A_TAP = ("bandwidth", "tune", "coalesce", "filterref", "mtu", "link", "guest")
_OF_AN_INTERFACE = ("mac", "model", "target", "driver", "teaming")
# What a driver of VFIO's is called; all other drivers are of taps.
_VFIO_DRIVERS = ("vfio", "kvm", "xen")


@dataclass(frozen=True, slots=True)
class Tag:
    """An element as it is to be: just so, or, where it is ``loose``, with these attributes among others."""

    name: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    children: tuple[Tag, ...] = ()
    text: str = ""
    loose: bool = False


@dataclass(frozen=True, slots=True)
class InterfaceForm:
    """How an interface is to stand in a guest's XML.

    ``kind`` is libvirt's type of it, or ``pci`` for a <hostdev>, which is no <interface> at all; ``tags`` are
    what this type needs. ``device`` is what libvirt opens, as its messages name it; ``mac`` is written where
    the interface has none.
    """

    kind: str
    tags: tuple[Tag, ...] = ()
    device: str = ""
    mac: str | None = None


def made(ifname: str, queues: int = 1) -> InterfaceForm:
    """The late form: libvirt takes a tap or macvtap of this name, which is made for each start."""
    target = Tag("target", {"dev": ifname, "managed": "no"}, loose=True)
    return InterfaceForm("ethernet", (target, *_queues(queues)), ifname)


def direct(dev: str, mode: str, vlan: int | None = None, queues: int = 1) -> InterfaceForm:
    """Libvirt's own macvtap; a VLAN only with a VF in mode ``passthrough``, through whose PF it is set."""
    source = Tag("source", {"dev": dev, "mode": mode})
    return InterfaceForm("direct", (source, *_vlan(vlan), *_queues(queues)), dev)


def bridge(name: str, queues: int = 1) -> InterfaceForm:
    """A port of a bridge."""
    return InterfaceForm("bridge", (Tag("source", {"bridge": name}), *_queues(queues)), name)


def user(passt: bool) -> InterfaceForm:
    """QEMU's user network, or passt's."""
    return InterfaceForm("user", (Tag("backend", {"type": "passt"}),) if passt else ())


def vf(pci: PciAddress, vlan: int | None = None, teaming: str = "", mac: str | None = None) -> InterfaceForm:
    """A VF by VFIO; ``teaming`` is the alias of the interface that stands by for it."""
    team = Tag("teaming", {"type": "transient", "persistent": teaming})
    tags = (_source(pci, type="pci"), *_vlan(vlan), *((team,) if teaming else ()))
    return InterfaceForm("hostdev", tags, pci.text, mac)


def function(pci: PciAddress) -> InterfaceForm:
    """A whole PCI function by VFIO: libvirt takes VFs only as interfaces."""
    return InterfaceForm("pci", (_source(pci),), pci.text)


def _source(pci: PciAddress, **more: str) -> Tag:
    where = {
        "domain": f"0x{pci.domain:04x}",
        "bus": f"0x{pci.bus:02x}",
        "slot": f"0x{pci.device:02x}",
        "function": f"0x{pci.function:x}",
    }
    return Tag("source", children=(Tag("address", {**more, **where}),))


def _vlan(vlan: int | None) -> tuple[Tag, ...]:
    return () if vlan is None else (Tag("vlan", children=(Tag("tag", {"id": str(vlan)}),)),)


def _queues(queues: int) -> tuple[Tag, ...]:
    return (Tag("driver", {"name": "vhost", "queues": str(queues)}, loose=True),) if queues > 1 else ()


# --- rewriting ------------------------------------------------------------------------------------


def rewrite(xml: bytes, forms: Mapping[str, InterfaceForm | None]) -> bytes:
    """The guest's XML with the interfaces of these user aliases in these forms.

    What isn't there is added, and what is to have no form is taken away.
    BadInput where the document can't be read, isn't UTF-8, or has no <devices>.
    """
    root = _read(xml)
    # libvirt takes several, and reads them as one.
    devices = [child for child in root.children if child.tag == "devices" and not child.is_short]
    if root.tag != "domain" or not devices:
        raise BadInput("guest XML: there are no <devices> in it")
    edits = _Edits(xml)
    there = {alias: node for one in devices for node in one.children if (alias := _alias_of(node))}
    missing = []
    for alias, form in forms.items():
        if alias not in there:
            missing += [_new_interface(alias, form)] if form else []
        elif form:
            edits.reform(there[alias], form)
        else:
            edits.remove(there[alias])
    edits.append(devices[0], missing, after=("interface",))
    return edits.apply()


def with_uuid(xml: bytes, uuid: str) -> bytes:
    """The guest's XML with this UUID where it has none."""
    root = _read(xml)
    names = {child.tag: child for child in root.children}
    if "uuid" in names or "name" not in names:
        return xml
    edits = _Edits(xml)
    edits.append(root, (Tag("uuid", text=uuid),), after=("name",))
    return edits.apply()


def with_mac(xml: bytes, mac: str) -> bytes:
    """An <interface> with this MAC address where it has none, as libvirt would make one up."""
    root = _read(xml)
    if root.tag != "interface" or any(child.tag == "mac" for child in root.children):
        return xml
    edits = _Edits(xml)
    edits.append(root, (Tag("mac", {"address": mac}),), after=())
    return edits.apply()


def write_interface(alias: str, form: InterfaceForm) -> str:
    """An interface alone, as libvirt plugs it in."""
    return _write(_new_interface(alias, form), "\n")


def _new_interface(alias: str, form: InterfaceForm) -> Tag:
    tag, attributes = _name_of(form)
    tags = [*form.tags, Tag("alias", {"name": alias})]
    if form.kind != "pci":
        tags = [*([Tag("mac", {"address": form.mac})] if form.mac else []), *tags]
        if form.kind != "hostdev":
            tags.append(Tag("model", {"type": "virtio"}))
    return Tag(tag, {name: value for name, value in attributes.items() if value}, tuple(tags))


def _name_of(form: InterfaceForm) -> tuple[str, dict[str, str | None]]:
    """The element, and its attributes: None for those that it mustn't have."""
    if form.kind == "pci":
        return "hostdev", {"mode": "subsystem", "type": "pci", "managed": "yes"}
    attributes: dict[str, str | None] = {"type": form.kind, "managed": None, "mode": None}
    if form.kind == "hostdev":
        attributes |= {"managed": "yes", "trustGuestRxFilters": None}
    return "interface", attributes


@dataclass(slots=True)
class _Node:
    """An element by its places in the text: its tag begins at ``start``, its content at ``inside``."""

    tag: str
    attributes: dict[str, str]
    start: int
    inside: int
    outside: int = 0  # where its end tag begins
    end: int = 0
    children: list[_Node] = field(default_factory=list)

    @property
    def is_short(self) -> bool:
        """Whether it is written <like-this/>."""
        return self.end == self.inside

    def is_like(self, tag: Tag) -> bool:
        """Whether it says what is to be said already."""
        if tag.loose:
            return tag.attributes.items() <= self.attributes.items()
        return (
            self.attributes == dict(tag.attributes)
            and len(self.children) == len(tag.children)
            and all(
                child.tag == wanted.name and child.is_like(wanted)
                for child, wanted in zip(self.children, tag.children, strict=True)
            )
        )


def _read(xml: bytes) -> _Node:
    from xml.parsers import expat

    parser = expat.ParserCreate(namespace_separator=" ")
    open_nodes = [_Node("", {}, 0, 0)]

    def begin(name: str, attributes: dict[str, str]) -> None:
        start = parser.CurrentByteIndex
        match = _TAG.match(xml, start)
        if match is None or b"\0" in match[0]:
            raise BadInput("guest XML: its encoding isn't UTF-8; convert it first: iconv -t UTF-8")
        node = _Node(name, attributes, start, match.end())
        open_nodes[-1].children.append(node)
        open_nodes.append(node)

    def finish(_: str) -> None:
        node = open_nodes.pop()
        node.outside = node.end = node.inside
        if not xml.endswith(b"/>", 0, node.inside):
            node.outside = parser.CurrentByteIndex
            node.end = xml.index(b">", node.outside) + 1

    def declare(_version: str, encoding: str | None, _standalone: int) -> None:
        if (encoding or "").lower() not in _ENCODINGS:
            raise BadInput(f"guest XML: its encoding is {encoding}; convert it first: iconv -t UTF-8")

    def refuse(*_: object) -> None:
        raise BadInput("guest XML: it has a DOCTYPE, which a guest never needs; remove it")

    parser.StartElementHandler, parser.EndElementHandler = begin, finish
    parser.XmlDeclHandler, parser.StartDoctypeDeclHandler = declare, refuse
    try:
        parser.Parse(xml, True)
    except expat.ExpatError as error:
        raise BadInput(f"guest XML: {error}") from error
    return open_nodes[0].children[0]


def _alias_of(node: _Node) -> str:
    if node.tag not in ("interface", "hostdev"):
        return ""
    return next((child.attributes.get("name", "") for child in node.children if child.tag == "alias"), "")


class _Edits:
    """Replacements in the text, none of which touches another."""

    def __init__(self, xml: bytes) -> None:
        self._xml = xml
        self._edits: list[tuple[int, int, bytes]] = []

    def apply(self) -> bytes:
        """The text with all of them."""
        parts: list[bytes] = []
        done = 0
        for start, end, new in sorted(self._edits, key=lambda edit: edit[:2]):
            parts += (self._xml[done:start], new)
            done = end
        return b"".join((*parts, self._xml[done:]))

    def reform(self, node: _Node, form: InterfaceForm) -> None:
        """Give an interface another form."""
        name, attributes = _name_of(form)
        if node.tag != name:
            self._rename(node, name)
        self._set(node, attributes)
        wanted = {tag.name: tag for tag in form.tags}
        if form.mac and form.kind != "pci" and not any(child.tag == "mac" for child in node.children):
            wanted = {"mac": Tag("mac", {"address": form.mac}), **wanted}
        was = "pci" if node.tag == "hostdev" else node.attributes.get("type", "")
        if was == "pci" != form.kind:
            wanted["model"] = Tag("model", {"type": "virtio"})
        for child in node.children:
            tag = wanted.pop(child.tag, None)
            if tag is not None:
                self._make_like(child, tag)
            elif _is_alien(child, form.kind, was):
                self.remove(child)
            elif child.tag == "target":
                self._set(child, {"managed": None})
        self.append(node, wanted.values(), after=("mac",))

    def append(self, parent: _Node, tags: Iterable[Tag], after: tuple[str, ...]) -> None:
        """Add children behind the last of these names, or as the first."""
        tags = list(tags)
        if not tags:
            return
        anchor = next((child for child in reversed(parent.children) if child.tag in after), None)
        first = anchor or (parent.children[0] if parent.children else None)
        indent = (
            self._indent(first) if first else self._indent(parent) + ("  " if self._indent(parent) else "")
        )
        new = b"".join(_encode(indent + _write(tag, indent)) for tag in tags)
        if parent.is_short:
            close = b">" + new + self._indent(parent).encode() + b"</" + parent.tag.encode() + b">"
            self._edits.append((parent.end - 2, parent.end, close))
        else:
            at = anchor.end if anchor else parent.inside
            self._edits.append((at, at, new))

    def _make_like(self, node: _Node, tag: Tag) -> None:
        if node.is_like(tag):
            return
        if tag.loose:
            self._set(node, tag.attributes)
        else:
            self._edits.append((node.start, node.end, _encode(_write(tag, self._indent(node)))))

    def remove(self, node: _Node) -> None:
        """Take an element away, with the blanks before it."""
        before = self._xml[: node.start]
        self._edits.append((len(before.rstrip()), node.end, b""))

    def _rename(self, node: _Node, name: str) -> None:
        old = len(node.tag)
        self._edits.append((node.start + 1, node.start + 1 + old, name.encode()))
        if not node.is_short:
            self._edits.append((node.outside + 2, node.outside + 2 + old, name.encode()))

    def _set(self, node: _Node, attributes: Mapping[str, str | None]) -> None:
        """Give a tag these attributes, and take from it those that are None."""
        tag = self._xml[node.start : node.inside]
        places = {match[1].decode(): match for match in _ATTRIBUTE.finditer(tag)}
        added = b""
        for name, value in attributes.items():
            place = places.get(name)
            if value is None and place:
                self._edits.append((node.start + place.start(), node.start + place.end(), b""))
            elif value is not None and place and node.attributes.get(name) != value:
                at = node.start + place.start(2)
                self._edits.append((at, node.start + place.end(2), _encode(_quote(value))))
            elif value is not None and not place:
                added += _encode(f" {name}={_quote(value)}")
        if added:
            at = node.start + (max(match.end() for match in places.values()) if places else 1 + len(node.tag))
            self._edits.append((at, at, added))

    def _indent(self, node: _Node) -> str:
        """The line's end and the blanks before an element; empty where it doesn't begin a line."""
        before = self._xml[: node.start]
        blank = before[len(before.rstrip(b" \t")) :]
        line = before[: len(before) - len(blank)]
        return "\n" + blank.decode() if line.endswith(b"\n") else ""


def _is_alien(child: _Node, kind: str, was: str) -> bool:
    """Whether a child belongs to the form that an interface had, and not to its new one."""
    if child.tag == "driver":
        is_vfio = child.attributes.get("name") in _VFIO_DRIVERS
        return is_vfio != (kind in ("hostdev", "pci"))
    if child.tag == "teaming":
        return kind not in ("hostdev", "pci") and child.attributes.get("type") == "transient"
    if child.tag == "address":  # of another kind of device in the guest
        return "pci" in (kind, was) and kind != was
    names: tuple[str, ...] = ("vlan",) if kind == was else _OF_A_TYPE
    if kind == was == "user":
        names = ("backend",)
    if kind in ("hostdev", "pci"):
        names = (*names, *_OF_A_TAP)
    if kind == "pci":
        names = (*names, *_OF_AN_INTERFACE)
    return child.tag in names


def _write(tag: Tag, indent: str) -> str:
    """The element as text; ``indent`` is what stands before it on its line, with the line's end."""
    words = "".join(f" {name}={_quote(value)}" for name, value in tag.attributes.items())
    if tag.text:
        return f"<{tag.name}{words}>{tag.text}</{tag.name}>"
    if not tag.children:
        return f"<{tag.name}{words}/>"
    inner = indent + "  " if indent else ""
    content = "".join(inner + _write(child, inner) for child in tag.children)
    return f"<{tag.name}{words}>{content}{indent}</{tag.name}>"


def _encode(text: str) -> bytes:
    return text.encode("ascii", "xmlcharrefreplace")


def _quote(value: str) -> str:
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), ("'", "&apos;")):
        value = value.replace(letter, entity)
    return f"'{value}'"
