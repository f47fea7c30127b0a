"""libvirt's XML as a tree, and the words of it that everybody needs. Trusts no document, and writes none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vnet_lock.errors import BadInput

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element, TreeBuilder

NAMESPACE = "urn:vnet-lock:guest:1"
_FAMILY = "{urn:vnet-lock:guest"
SIZE_LIMIT_BYTES = 8 * 1024 * 1024
# libvirt keeps a user's alias only where it is like this (virDomainDeviceAliasIsUserAlias).
ALIAS = re.compile("ua-[A-Za-z0-9_-]+")
# libvirt takes names with these prefixes for its own and drops them from a definition.
RESERVED_NAMES = ("vnet", "macvtap", "macvlan")


def parse(xml: bytes, tag: str = "domain") -> Element:
    """A document of libvirt's with this root; BadInput where it is something else, or can't be trusted."""
    # 4 ms, where lxml takes 30. Entities need a DOCTYPE, which is refused before it is read, and expat opens
    # nothing by itself.
    from xml.etree.ElementTree import ParseError, XMLParser

    what = f"{'guest' if tag == 'domain' else tag} XML"
    if len(xml) > SIZE_LIMIT_BYTES:
        raise BadInput(f"{what}: {len(xml)} bytes are more than the {SIZE_LIMIT_BYTES} that a guest may have")
    parser = XMLParser(target=_make_builder())  # noqa: S314
    try:
        parser.feed(xml)
        root = parser.close()
    except ParseError as error:
        raise BadInput(f"{what}: {error}") from error
    except (LookupError, ValueError) as error:  # an encoding that Python doesn't know, or expat can't take
        raise BadInput(f"{what}: its encoding cannot be read: {error}") from error
    if root.tag != tag:
        raise BadInput(f"{what}: the root is <{root.tag}>, not libvirt's <{tag}>")
    return root


def read_text(xml: bytes) -> str:
    """A document as libvirt's calls take it; BadInput where it has another encoding than theirs."""
    try:
        return xml.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput("the XML isn't UTF-8; convert it first: iconv -t UTF-8") from error


def _make_builder() -> TreeBuilder:
    from xml.etree.ElementTree import TreeBuilder

    class Builder(TreeBuilder):
        """Builds the tree of a document without DOCTYPE."""

        def doctype(self, *_: str | None) -> None:
            raise BadInput("guest XML: it has a DOCTYPE, which a guest never needs; remove it")

    return Builder()


def read_name(root: Element) -> str:
    """The guest's name, with all its blanks, as libvirt has it; BadInput where it is none."""
    name = root.findtext("name", "")
    if not name.strip() or "/" in name or "\n" in name:
        raise BadInput(f"guest XML: {name!r} is no name of a guest")
    return name


def read_uuid(root: Element) -> str:
    """The guest's UUID, lower case with dashes, "" where there is none; BadInput for more."""
    text = root.findtext("uuid", "").strip().lower()
    digits = text.replace("-", "")
    if text and not re.fullmatch("[0-9a-f]{32}", digits):
        raise BadInput(f"guest XML: {text!r} is no uuid")
    return re.sub("(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", digits)


def read_identity(xml: bytes) -> tuple[str, str]:
    """A guest's name and uuid alone, so that a guest with a bad intent can still be released."""
    root = parse(xml)
    return read_name(root), read_uuid(root)


def find_metadata(root: Element) -> list[Element]:
    """What stands in the metadata under a namespace of ours, of this version or another."""
    return [one for one in root.iterfind("metadata/*") if str(one.tag).startswith(_FAMILY)]


def user_alias(element: Element) -> str:
    """The alias that the user gave: libvirt keeps those with this prefix, and changes all others."""
    alias = attribute(element, "alias", "name")
    return alias if ALIAS.fullmatch(alias) else ""


def read_mac(target: Element, what: str) -> str | None:
    """The MAC address of an interface, None without one; BadInput, with whose it is, where it is no such."""
    return check_mac(attribute(target, "mac", "address"), what)


def check_mac(text: str, what: str) -> str | None:
    """A MAC address in lower case, None for no word at all."""
    mac = text.lower()
    if mac and not re.fullmatch("[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac):
        raise BadInput(f"{what}: {mac!r} is no MAC address")
    return mac or None


def own_name(element: Element) -> str | None:
    """The name that the user chose for an interface's device on the host.

    What libvirt made up stands in the XML of a running guest, and is another at the next start.
    """
    name = attribute(element, "target", "dev")
    return None if name.startswith(RESERVED_NAMES) else name or None


def mode_of(target: Element) -> str:
    """The mode of a direct interface, as libvirt reads it."""
    return attribute(target, "source", "mode") or "vepa"


def attribute(element: Element, child: str, name: str) -> str:
    """An attribute of an element's child, "" where one of them is missing."""
    found = element.find(child)
    return "" if found is None else found.get(name, "")


def attribute_of(element: Element | None, child: str, name: str) -> str:
    """The same, of an element that may be missing, too."""
    return "" if element is None else attribute(element, child, name)
