"""What only rtnetlink tells: VFs as their PF has them, embedded switches, addresses, links elsewhere.

A small reader of our own, for hooks: pyroute2 costs 250 ms to import. Changes nothing; netlink.py does.
Numbers and layouts are from the kernel's include/uapi/linux/{netlink,rtnetlink,if_link,if_addr,neighbour}.h.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vnet_lock.dataclass import dataclass
from vnet_lock.errors import Vanished, VnetLockError

if TYPE_CHECKING:
    from socket import socket

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
_RTM_GETLINK, _RTM_GETADDR, _RTM_GETROUTE, _RTM_GETNEIGH, _RTM_GETNSID = 18, 22, 26, 30, 90
AF_BRIDGE = 7
_MSG_TRUNC = 0x20

_IFLA_IFNAME, _IFLA_LINK, _IFLA_LINKINFO, _IFLA_VFINFO_LIST = 3, 5, 18, 22
_IFLA_IFALIAS, IFLA_AF_SPEC, _IFLA_EXT_MASK = 20, 26, 29
_IFLA_LINK_NETNSID, _IFLA_PARENT_DEV_NAME = 37, 56
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_VLAN_ID, _IFLA_VLAN_PROTOCOL = 1, 5
_ETH_P_8021Q = b"\x81\x00"
IFLA_BRIDGE_MODE = 1
_IFLA_VF_INFO = 1
_IFLA_VF_MAC, _IFLA_VF_VLAN, _IFLA_VF_TX_RATE, _IFLA_VF_SPOOFCHK = 1, 2, 3, 4
_IFLA_VF_LINK_STATE, _IFLA_VF_RATE, _IFLA_VF_TRUST = 5, 6, 9
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST = 1
_NDA_DST, _NTF_PROXY = 1, 0x08
_NETNSA_NSID, _NETNSA_FD = 1, 3
_RTEXT_FILTER_VF, _RTEXT_FILTER_SKIP_STATS = 1, 8
_RT_SCOPE_LINK = 253
_BRIDGE_MODES = {0: "veb", 1: "vepa"}

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg
_IFADDR = struct.Struct("=BBBBI")  # struct ifaddrmsg
_RTMSG = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_NDMSG = struct.Struct("=BxxxiHBB")  # struct ndmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_U32 = struct.Struct("=I")
# Bits 15 and 14 of an attribute's type are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
_TYPE_MASK = 0x3FFF
# A PF with many VFs fills one message: IFLA_VFINFO_LIST itself ends at 64 KiB.
_RECEIVE_BYTES = 1 << 17
_UNTOLD = 0xFFFFFFFF
_TIMEOUT_S = 5


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


def open_route_socket() -> socket:
    """A socket to ask with; it stays in the network namespace of the thread that opens it."""
    import socket  # 5 ms, and only needed where netlink is asked at all

    route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        route.settimeout(_TIMEOUT_S)
        route.bind((0, 0))
    except OSError:
        route.close()
        raise
    return route


def read_vf_admin(pf_netdev: str) -> dict[int, VfAdminInfo]:
    """A PF's VFs by index; empty where it has none. Vanished where there is no such device."""
    body = _ifinfo() + pack(_IFLA_IFNAME, pf_netdev.encode() + b"\0") + _ext_mask(_RTEXT_FILTER_VF)
    try:
        with open_route_socket() as route:
            messages = list(ask(route, _RTM_GETLINK, 0, body))
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise Vanished(f"network device {pf_netdev} is gone") from error
        raise _cannot_read(f"the VFs of {pf_netdev}", error) from error
    found: dict[int, VfAdminInfo] = {}
    for message in messages:
        found |= parse_vf_admin(message)
    return found


def read_eswitch_modes() -> dict[int, str]:
    """The mode of embedded switches by ifindex of the PF: ``veb`` or ``vepa``, where the driver tells."""
    modes: dict[int, str] = {}
    for message in _dump("embedded switches", _RTM_GETLINK, _ifinfo(AF_BRIDGE) + _ext_mask(0)):
        ifindex, attributes = _parse_link(message)
        spec = dict(_attributes(attributes.get(IFLA_AF_SPEC, b"")))
        if len(spec.get(IFLA_BRIDGE_MODE, b"")) == 2:
            mode = _BRIDGE_MODES.get(int.from_bytes(spec[IFLA_BRIDGE_MODE], sys.byteorder))
            if mode is not None:
                modes[ifindex] = mode
    return modes


def read_eswitch_mode(pf_netdev: str) -> str | None:
    """The mode of one PF's embedded switch, None where the driver doesn't tell or the PF is gone."""
    import socket  # loaded by then

    try:
        return read_eswitch_modes().get(socket.if_nametoindex(pf_netdev))
    except OSError:
        return None


def read_addresses() -> dict[int, tuple[str, ...]]:
    """Addresses by ifindex, but for link-local IPv6: every interface that is up gets one of those."""
    import socket  # loaded by then

    found: dict[int, tuple[str, ...]] = {}
    for message in _dump("addresses", _RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)):
        _require(message, _IFADDR.size)
        family, _, _, scope, ifindex = _IFADDR.unpack_from(message)
        attributes = dict(_attributes(message[_IFADDR.size :]))
        # With a peer, IFA_ADDRESS is the peer's and IFA_LOCAL ours (linux/if_addr.h).
        address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
        if address is None or (family == socket.AF_INET6 and scope == _RT_SCOPE_LINK):
            continue
        if (family, len(address)) not in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            continue
        found[ifindex] = (*found.get(ifindex, ()), socket.inet_ntop(family, address))
    return found


def read_addressed() -> frozenset[int]:
    """Ifindexes with an address other than a link-local IPv6 one."""
    return frozenset(read_addresses())


def read_ipv4_networks() -> frozenset[tuple[str, int]]:
    """The IPv4 networks that this host is in or has a route to, in any table: (address, prefix length).

    An address may be any of its network.
    """
    import socket  # loaded by then

    found: set[tuple[str, int]] = set()
    for message in _dump("addresses", _RTM_GETADDR, _IFADDR.pack(socket.AF_INET, 0, 0, 0, 0)):
        _require(message, _IFADDR.size)
        family, length, *_ = _IFADDR.unpack_from(message)
        address = dict(_attributes(message[_IFADDR.size :])).get(_IFA_ADDRESS, b"")
        if family == socket.AF_INET and len(address) == 4:
            found.add((socket.inet_ntop(family, address), length))
    for message in _dump("routes", _RTM_GETROUTE, _RTMSG.pack(socket.AF_INET, *[0] * 8)):
        _require(message, _RTMSG.size)
        family, length, *_ = _RTMSG.unpack_from(message)
        address = dict(_attributes(message[_RTMSG.size :])).get(_RTA_DST, b"")
        if family == socket.AF_INET and len(address) == 4:
            found.add((socket.inet_ntop(family, address), length))
    return frozenset(found)


def read_proxies() -> frozenset[tuple[int, str]]:
    """The addresses that the host answers for on its devices, each with the device's ifindex."""
    import socket  # loaded by then

    found: set[tuple[int, str]] = set()
    for message in _dump("proxy neighbours", _RTM_GETNEIGH, _NDMSG.pack(0, 0, 0, _NTF_PROXY, 0)):
        _require(message, _NDMSG.size)
        family, ifindex, *_ = _NDMSG.unpack_from(message)
        address = dict(_attributes(message[_NDMSG.size :])).get(_NDA_DST, b"")
        if (family, len(address)) in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            found.add((ifindex, socket.inet_ntop(family, address)))
    return frozenset(found)


def read_links(route: socket | None = None) -> tuple[LinkInfo, ...]:
    """All network devices of a namespace: of this one, or of the one where ``route`` was opened."""
    body = _ifinfo() + _ext_mask(_RTEXT_FILTER_SKIP_STATS)
    return tuple(parse_link(message) for message in _dump("network devices", _RTM_GETLINK, body, route))


def read_nsid(route: socket, namespace: int) -> int | None:
    """The number under which the namespace of ``route`` knows another (an open descriptor), if it does."""
    body = b"\0\0\0\0" + pack(_NETNSA_FD, _U32.pack(namespace))
    try:
        for message in ask(route, _RTM_GETNSID, 0, body):
            value = dict(_attributes(message[4:])).get(_NETNSA_NSID, b"")
            if len(value) == 4:
                nsid = int.from_bytes(value, sys.byteorder, signed=True)
                return nsid if nsid >= 0 else None
    except OSError as error:
        raise _cannot_read("a namespace's number", error) from error
    return None


def parse_link(message: bytes) -> LinkInfo:
    """One RTM_NEWLINK message without its header; VnetLockError where it is malformed."""
    ifindex, attributes = _parse_link(message)
    info = dict(_attributes(attributes.get(_IFLA_LINKINFO, b"")))
    kind = _text(info.get(_IFLA_INFO_KIND, b""))
    return LinkInfo(
        ifindex=ifindex,
        name=_text(attributes.get(_IFLA_IFNAME, b"")),
        kind=kind,
        alias=_text(attributes.get(_IFLA_IFALIAS, b"")),
        parent=_text(attributes.get(_IFLA_PARENT_DEV_NAME, b"")) or None,
        link=_number(attributes.get(_IFLA_LINK)),
        link_nsid=_number(attributes.get(_IFLA_LINK_NETNSID)),
        vlan=_parse_vlan(info.get(_IFLA_INFO_DATA, b"")) if kind == "vlan" else None,
    )


def _parse_vlan(data: bytes) -> int | None:
    """The ID of a VLAN device; None where its tags are not 802.1Q's."""
    attributes = dict(_attributes(data))
    protocol, number = attributes.get(_IFLA_VLAN_PROTOCOL), attributes.get(_IFLA_VLAN_ID, b"")
    if len(number) != 2 or protocol not in (None, _ETH_P_8021Q):
        return None
    return int.from_bytes(number, sys.byteorder)


def parse_vf_admin(message: bytes) -> dict[int, VfAdminInfo]:
    """The VFs in one RTM_NEWLINK message without its header; VnetLockError where it is malformed."""
    found: dict[int, VfAdminInfo] = {}
    for kind, value in _attributes(_parse_link(message)[1].get(_IFLA_VFINFO_LIST, b"")):
        if kind == _IFLA_VF_INFO:
            index, info = _parse_vf(value)
            found[index] = info
    return found


def _parse_vf(nested: bytes) -> tuple[int, VfAdminInfo]:
    """One IFLA_VF_INFO: each attribute in it starts with the VF's index (struct ifla_vf_*)."""
    attributes = dict(_attributes(nested))
    mac = attributes.get(_IFLA_VF_MAC, b"")
    _require(mac, 4 + 32)
    index = int(_U32.unpack_from(mac)[0])
    _, vlan, qos = _words(attributes.get(_IFLA_VF_VLAN), 3) or (index, 0, 0)
    _, spoofchk = _words(attributes.get(_IFLA_VF_SPOOFCHK), 2) or (index, _UNTOLD)
    _, trust = _words(attributes.get(_IFLA_VF_TRUST), 2) or (index, _UNTOLD)
    _, link_state = _words(attributes.get(_IFLA_VF_LINK_STATE), 2) or (index, _UNTOLD)
    _, old_rate = _words(attributes.get(_IFLA_VF_TX_RATE), 2) or (index, 0)
    _, min_rate, max_rate = _words(attributes.get(_IFLA_VF_RATE), 3) or (index, 0, old_rate)
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


# --- messages -----------------------------------------------------------------------------------


def _dump(what: str, request: int, body: bytes, route: socket | None = None) -> list[bytes]:
    """All parts of a dump; asked again where it was torn by a change (NLM_F_DUMP_INTR)."""
    try:
        if route is None:
            with open_route_socket() as own:
                return _dump(what, request, body, own)
        for _ in range(10):
            try:
                return list(ask(route, request, _NLM_F_DUMP, body))
            except InterruptedError:
                continue
    except OSError as error:
        raise _cannot_read(what, error) from error
    raise VnetLockError(f"cannot read {what}: they change faster than they can be read; try again")


def ask(route: socket, request: int, flags: int, body: bytes) -> Iterator[bytes]:
    """Send one request and yield the answers' bodies. OSError is the kernel's; InterruptedError: torn.

    With NLM_F_ACK among the flags a change is answered, too.
    """
    sequence = int.from_bytes(os.urandom(4), sys.byteorder)
    header = _HEADER.pack(_HEADER.size + len(body), request, _NLM_F_REQUEST | flags, sequence, 0)
    route.send(header + body)
    torn = False
    while True:
        data, _, message_flags, address = route.recvmsg(_RECEIVE_BYTES)
        if message_flags & _MSG_TRUNC:
            raise VnetLockError("the kernel sent a netlink message longer than 128 KiB")
        if address[0] != 0:
            continue  # not from the kernel (netlink(7): any process of ours may send to us)
        for kind, its_flags, its_sequence, payload in _messages(data):
            if its_sequence != sequence:
                continue
            torn = torn or bool(its_flags & _NLM_F_DUMP_INTR)
            if kind == _NLMSG_DONE:
                if len(payload) >= 4 and (code := -_signed(payload)) > 0:
                    raise OSError(code, os.strerror(code))
                if torn:
                    raise InterruptedError(errno.EINTR, "the dump was torn")
                return
            if kind == _NLMSG_ERROR:
                _require(payload, 4)
                if (code := -_signed(payload)) > 0:
                    raise OSError(code, os.strerror(code))
                return
            yield payload
            if not flags & _NLM_F_DUMP:
                return


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and body of each message of one datagram."""
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise VnetLockError("netlink: a message header is cut short")
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or length > len(data) - at:
            raise VnetLockError(f"netlink: a message says {length} bytes, {len(data) - at} are there")
        yield kind, flags, sequence, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and value of each attribute."""
    at = 0
    while len(data) - at >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or length > len(data) - at:
            raise VnetLockError(f"netlink: an attribute says {length} bytes, {len(data) - at} are there")
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    if at < len(data):
        raise VnetLockError(f"netlink: {len(data) - at} stray bytes behind the attributes")


def _parse_link(message: bytes) -> tuple[int, dict[int, bytes]]:
    _require(message, IFINFO.size)
    return IFINFO.unpack_from(message)[2], dict(_attributes(message[IFINFO.size :]))


def _ifinfo(family: int = 0) -> bytes:
    return IFINFO.pack(family, 0, 0, 0, 0)


def _ext_mask(mask: int) -> bytes:
    return pack(_IFLA_EXT_MASK, _U32.pack(mask | _RTEXT_FILTER_SKIP_STATS))


def pack(kind: int, value: bytes) -> bytes:
    """An attribute (struct nlattr), padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _words(value: bytes | None, count: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    _require(value, 4 * count)
    return struct.unpack_from(f"={count}I", value)


def _number(value: bytes | None) -> int | None:
    return (
        int.from_bytes(value, sys.byteorder, signed=True) if value is not None and len(value) == 4 else None
    )


def _signed(value: bytes) -> int:
    return int.from_bytes(value[:4], sys.byteorder, signed=True)


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "replace")


def _require(value: bytes, size: int) -> None:
    if len(value) < size:
        raise VnetLockError(f"netlink: {len(value)} bytes where at least {size} were expected")


def _cannot_read(what: str, error: OSError) -> VnetLockError:
    return VnetLockError(f"cannot read {what} from the kernel: {error.strerror or error}")
