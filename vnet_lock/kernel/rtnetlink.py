"""What only rtnetlink tells: VFs as their PF has them, addresses, routes, links elsewhere. Changes nothing.

For hooks, so on our own wire (netlink_wire.py); netlink.py makes and changes.
Numbers and layouts are from the kernel's include/uapi/linux/{netlink,rtnetlink,if_link,if_addr,neighbour}.h.
"""

from __future__ import annotations

import errno
import struct
import sys
from typing import TYPE_CHECKING

from vnet_lock.dataclass import dataclass
from vnet_lock.errors import Vanished
from vnet_lock.kernel.netlink_wire import (
    RTM_GETLINK,
    U32,
    ask,
    cannot_read,
    dump,
    open_route_socket,
    pack,
    pack_ext_mask,
    pack_link,
    parse_attributes,
    parse_number,
    parse_text,
    parse_words,
    require,
    split_link,
)

if TYPE_CHECKING:
    from socket import socket

_RTM_GETADDR, _RTM_GETROUTE, _RTM_GETNEIGH, _RTM_GETNSID = 22, 26, 30, 90

_IFLA_IFNAME, _IFLA_LINK, _IFLA_LINKINFO, _IFLA_VFINFO_LIST = 3, 5, 18, 22
_IFLA_IFALIAS, _IFLA_LINK_NETNSID, _IFLA_PARENT_DEV_NAME = 20, 37, 56
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_VLAN_ID, _IFLA_VLAN_PROTOCOL = 1, 5
_ETH_P_8021Q = b"\x81\x00"
_IFLA_VF_INFO = 1
_IFLA_VF_MAC, _IFLA_VF_VLAN, _IFLA_VF_TX_RATE, _IFLA_VF_SPOOFCHK = 1, 2, 3, 4
_IFLA_VF_LINK_STATE, _IFLA_VF_RATE, _IFLA_VF_TRUST = 5, 6, 9
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST = 1
_NDA_DST, _NTF_PROXY = 1, 0x08
_NETNSA_NSID, _NETNSA_FD = 1, 3
_RTEXT_FILTER_VF = 1
_RT_SCOPE_LINK = 253

_IFADDR = struct.Struct("=BBBBI")  # struct ifaddrmsg
_RTMSG = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_NDMSG = struct.Struct("=BxxxiHBB")  # struct ndmsg
_UNTOLD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class VfAdminInfo:
    """A VF as its PF has it; None where the driver doesn't tell. Rates are in Mbit/s, 0 is no limit."""

    mac: str
    vlan: int = 0
    qos: int = 0
    spoofchk: bool | None = None
    trust: bool | None = None
    link_state: int | None = None
    min_tx_rate_mbps: int = 0
    max_tx_rate_mbps: int = 0


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """A network device of the namespace that was asked.

    ``parent`` is the name of the device that it is the interface of (a PCI address; kernel 5.14 and newer),
    ``link`` the ifindex of its lower device, which is in namespace ``link_nsid`` where that is told.
    ``vlan`` is the ID of an 802.1Q VLAN device.
    """

    ifindex: int
    name: str
    kind: str = ""
    alias: str = ""
    parent: str | None = None
    link: int | None = None
    link_nsid: int | None = None
    vlan: int | None = None


def read_vf_admin(pf_netdev: str) -> dict[int, VfAdminInfo]:
    """A PF's VFs by index; empty where it has none. Vanished where there is no such device."""
    body = pack_link() + pack(_IFLA_IFNAME, pf_netdev.encode() + b"\0") + pack_ext_mask(_RTEXT_FILTER_VF)
    try:
        with open_route_socket() as route:
            messages = list(ask(route, RTM_GETLINK, 0, body))
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise Vanished(f"network device {pf_netdev} is gone") from error
        raise cannot_read(f"the VFs of {pf_netdev}", error) from error
    found: dict[int, VfAdminInfo] = {}
    for message in messages:
        found |= parse_vf_admin(message)
    return found


def read_addresses() -> dict[int, tuple[str, ...]]:
    """Addresses by ifindex, but for link-local IPv6: every interface that is up gets one of those."""
    import socket  # loaded by then

    found: dict[int, tuple[str, ...]] = {}
    for message in dump("addresses", _RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)):
        require(message, _IFADDR.size)
        family, _, _, scope, ifindex = _IFADDR.unpack_from(message)
        attributes = dict(parse_attributes(message[_IFADDR.size :]))
        # With a peer, IFA_ADDRESS is the peer's and IFA_LOCAL ours (linux/if_addr.h).
        address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
        if address is None or (family == socket.AF_INET6 and scope == _RT_SCOPE_LINK):
            continue
        if (family, len(address)) not in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            continue
        found[ifindex] = (*found.get(ifindex, ()), socket.inet_ntop(family, address))
    return found


def read_ipv4_networks() -> frozenset[tuple[str, int]]:
    """The IPv4 networks that this host is in or has a route to, in any table: (address, prefix length).

    An address may be any of its network.
    """
    import socket  # loaded by then

    found: set[tuple[str, int]] = set()
    for message in dump("addresses", _RTM_GETADDR, _IFADDR.pack(socket.AF_INET, 0, 0, 0, 0)):
        require(message, _IFADDR.size)
        family, length, *_ = _IFADDR.unpack_from(message)
        address = dict(parse_attributes(message[_IFADDR.size :])).get(_IFA_ADDRESS, b"")
        if family == socket.AF_INET and len(address) == 4:
            found.add((socket.inet_ntop(family, address), length))
    for message in dump("routes", _RTM_GETROUTE, _RTMSG.pack(socket.AF_INET, *[0] * 8)):
        require(message, _RTMSG.size)
        family, length, *_ = _RTMSG.unpack_from(message)
        address = dict(parse_attributes(message[_RTMSG.size :])).get(_RTA_DST, b"")
        if family == socket.AF_INET and len(address) == 4:
            found.add((socket.inet_ntop(family, address), length))
    return frozenset(found)


def read_proxies() -> frozenset[tuple[int, str]]:
    """The addresses that the host answers for on its devices, each with the device's ifindex."""
    import socket  # loaded by then

    found: set[tuple[int, str]] = set()
    for message in dump("proxy neighbours", _RTM_GETNEIGH, _NDMSG.pack(0, 0, 0, _NTF_PROXY, 0)):
        require(message, _NDMSG.size)
        family, ifindex, *_ = _NDMSG.unpack_from(message)
        address = dict(parse_attributes(message[_NDMSG.size :])).get(_NDA_DST, b"")
        if (family, len(address)) in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            found.add((ifindex, socket.inet_ntop(family, address)))
    return frozenset(found)


def read_links(route: socket | None = None) -> tuple[LinkInfo, ...]:
    """All network devices of a namespace: of this one, or of the one where ``route`` was opened."""
    body = pack_link() + pack_ext_mask()
    return tuple(parse_link(message) for message in dump("network devices", RTM_GETLINK, body, route))


def read_nsid(route: socket, namespace: int) -> int | None:
    """The number under which the namespace of ``route`` knows another (an open descriptor), if it does."""
    body = b"\0\0\0\0" + pack(_NETNSA_FD, U32.pack(namespace))
    try:
        for message in ask(route, _RTM_GETNSID, 0, body):
            value = dict(parse_attributes(message[4:])).get(_NETNSA_NSID, b"")
            if len(value) == 4:
                nsid = int.from_bytes(value, sys.byteorder, signed=True)
                return nsid if nsid >= 0 else None
    except OSError as error:
        raise cannot_read("a namespace's number", error) from error
    return None


def parse_link(message: bytes) -> LinkInfo:
    """One RTM_NEWLINK message without its header; VnetLockError where it is malformed."""
    ifindex, attributes = split_link(message)
    info = dict(parse_attributes(attributes.get(_IFLA_LINKINFO, b"")))
    kind = parse_text(info.get(_IFLA_INFO_KIND, b""))
    return LinkInfo(
        ifindex=ifindex,
        name=parse_text(attributes.get(_IFLA_IFNAME, b"")),
        kind=kind,
        alias=parse_text(attributes.get(_IFLA_IFALIAS, b"")),
        parent=parse_text(attributes.get(_IFLA_PARENT_DEV_NAME, b"")) or None,
        link=parse_number(attributes.get(_IFLA_LINK)),
        link_nsid=parse_number(attributes.get(_IFLA_LINK_NETNSID)),
        vlan=_parse_vlan(info.get(_IFLA_INFO_DATA, b"")) if kind == "vlan" else None,
    )


def _parse_vlan(data: bytes) -> int | None:
    """The ID of a VLAN device; None where its tags are not 802.1Q's."""
    attributes = dict(parse_attributes(data))
    protocol, number = attributes.get(_IFLA_VLAN_PROTOCOL), attributes.get(_IFLA_VLAN_ID, b"")
    if len(number) != 2 or protocol not in (None, _ETH_P_8021Q):
        return None
    return int.from_bytes(number, sys.byteorder)


def parse_vf_admin(message: bytes) -> dict[int, VfAdminInfo]:
    """The VFs in one RTM_NEWLINK message without its header; VnetLockError where it is malformed."""
    found: dict[int, VfAdminInfo] = {}
    for kind, value in parse_attributes(split_link(message)[1].get(_IFLA_VFINFO_LIST, b"")):
        if kind == _IFLA_VF_INFO:
            index, info = _parse_vf(value)
            found[index] = info
    return found


def _parse_vf(nested: bytes) -> tuple[int, VfAdminInfo]:
    """One IFLA_VF_INFO: each attribute in it starts with the VF's index (struct ifla_vf_*)."""
    attributes = dict(parse_attributes(nested))
    mac = attributes.get(_IFLA_VF_MAC, b"")
    require(mac, 4 + 32)
    index = int(U32.unpack_from(mac)[0])
    _, vlan, qos = parse_words(attributes.get(_IFLA_VF_VLAN), 3) or (index, 0, 0)
    _, spoofchk = parse_words(attributes.get(_IFLA_VF_SPOOFCHK), 2) or (index, _UNTOLD)
    _, trust = parse_words(attributes.get(_IFLA_VF_TRUST), 2) or (index, _UNTOLD)
    _, link_state = parse_words(attributes.get(_IFLA_VF_LINK_STATE), 2) or (index, _UNTOLD)
    _, old_rate = parse_words(attributes.get(_IFLA_VF_TX_RATE), 2) or (index, 0)
    _, min_rate, max_rate = parse_words(attributes.get(_IFLA_VF_RATE), 3) or (index, 0, old_rate)
    return index, VfAdminInfo(
        mac=mac[4:10].hex(":"),
        vlan=vlan,
        qos=qos,
        # rtnl_fill_vfinfo (net/core/rtnetlink.c) says -1 where the driver said nothing.
        spoofchk=None if spoofchk == _UNTOLD else bool(spoofchk),
        trust=None if trust == _UNTOLD else bool(trust),
        link_state=None if link_state == _UNTOLD else link_state,
        min_tx_rate_mbps=min_rate,
        max_tx_rate_mbps=max_rate,
    )
