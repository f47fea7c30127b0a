"""What libvirt's network hook is told of a port: who gets which device of it. Never touches the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnet_lock.dataclass import dataclass
from vnet_lock.domain_devices import read_address
from vnet_lock.domain_document import parse
from vnet_lock.domain_xml import read_fixed
from vnet_lock.errors import BadInput
from vnet_lock.model import PciAddress
from vnet_lock.request import Fixed

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

# The owner of a port that only keeps libvirt from choosing its VF: no guest has this UUID.
RESERVING = "766e6574-2d6c-4f63-8b00-000000000000"
# The kinds of plugs that have a device of ours, as the types of a guest's interface.
_TYPES = {"hostdev-pci": "hostdev", "direct": "direct"}


@dataclass(frozen=True, slots=True)
class Port:
    """A guest's connection to a network, and the device that goes with it."""

    guest: str
    uuid: str
    request: Fixed


def read_port(xml: bytes) -> Port | None:
    """The port in a hook's <hookData>; None where it has no device of ours.

    BadInput where it can't be understood. virNetworkPortDefFormatBuf (libvirt's virnetworkportdef.c) has
    the form.
    """
    port = parse(xml, "hookData").find("networkport")
    plug = None if port is None else port.find("plug")
    if port is None or plug is None or plug.get("type") not in _TYPES:
        return None
    found = read_fixed(_as_guest(port, plug))
    (request,) = found.requests
    assert isinstance(request, Fixed)  # noqa: S101 - of these there are no others
    if not found.uuid:
        raise BadInput(f"network port of guest {found.name!r}: its owner has no uuid")
    return Port(found.name, found.uuid, request)


def read_pool(xml: bytes) -> frozenset[PciAddress]:
    """The VFs that a <network> gives out, as an active one tells; none where it has no such pool."""
    forward = parse(xml, "network").find("forward")
    if forward is None or forward.get("mode") != "hostdev":
        return frozenset()
    return frozenset(read_address(one, "network") for one in forward.findall("address"))


def _as_guest(port: Element, plug: Element) -> Element:
    """The port as its guest's own XML would have it."""
    from xml.etree.ElementTree import Element, SubElement

    root = Element("domain")
    for name in ("name", "uuid"):
        SubElement(root, name).text = port.findtext(f"owner/{name}")
    interface = SubElement(SubElement(root, "devices"), "interface", type=_TYPES[plug.get("type", "")])
    source = SubElement(interface, "source", {key: plug.get(key, "") for key in ("dev", "mode")})
    source.extend(plug.findall("address"))
    interface.extend(child for name in ("mac", "vlan") for child in port.findall(name))
    return root
