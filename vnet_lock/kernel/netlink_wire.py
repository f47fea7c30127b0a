"""rtnetlink's wire: sockets, questions and answers, messages and their attributes. What they mean is others'.

A small one of our own, for hooks: pyroute2 costs 250 ms to import.
Numbers and layouts are from the kernel's include/uapi/linux/{netlink,rtnetlink,if_link}.h.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vnet_lock.errors import Vanished, VnetLockError

if TYPE_CHECKING:
    from socket import socket

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, NLM_F_ACK, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x4, 0x300, 0x10
_MSG_TRUNC = 0x20
RTM_GETLINK = 18
_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS = 29, 8

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
U32 = struct.Struct("=I")
# Bits 15 and 14 of an attribute's type are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
_TYPE_MASK = 0x3FFF
# A PF with many VFs fills one message: IFLA_VFINFO_LIST itself ends at 64 KiB.
_RECEIVE_BYTES = 1 << 17
_TIMEOUT_S = 5


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


def dump(what: str, request: int, body: bytes, route: socket | None = None) -> list[bytes]:
    """All parts of a dump; asked again where it was torn by a change (NLM_F_DUMP_INTR)."""
    try:
        if route is None:
            with open_route_socket() as own:
                return dump(what, request, body, own)
        for _ in range(10):
            try:
                return list(ask(route, request, _NLM_F_DUMP, body))
            except InterruptedError:
                continue
    except OSError as error:
        raise cannot_read(what, error) from error
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
        for kind, its_flags, its_sequence, payload in _parse_messages(data):
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
                require(payload, 4)
                if (code := -_signed(payload)) > 0:
                    raise OSError(code, os.strerror(code))
                return
            yield payload
            if not flags & _NLM_F_DUMP:
                return


def cannot_read(what: str, error: OSError) -> VnetLockError:
    """The kernel's errno as an error of ours."""
    return VnetLockError(f"cannot read {what} from the kernel: {error.strerror or error}")


def read_ifindex(ifname: str) -> int:
    """The number by which netlink means a device; Vanished where this namespace has none of that name."""
    import socket  # 5 ms

    try:
        return socket.if_nametoindex(ifname)
    except OSError as error:
        raise Vanished(f"there is no network device {ifname} here (any more); see: ip link") from error


# --- messages -----------------------------------------------------------------------------------


def pack(kind: int, value: bytes) -> bytes:
    """An attribute (struct nlattr), padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + b"\0" * (-len(value) % 4)


def pack_link(family: int = 0, ifindex: int = 0) -> bytes:
    """What a message about links begins with."""
    return _IFINFO.pack(family, 0, ifindex, 0, 0)


def pack_ext_mask(mask: int = 0) -> bytes:
    """The attribute that asks for more (RTEXT_FILTER_*); it never asks for statistics, which take long."""
    return pack(_IFLA_EXT_MASK, U32.pack(mask | _RTEXT_FILTER_SKIP_STATS))


def _parse_messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
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


def parse_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
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


def split_link(message: bytes) -> tuple[int, dict[int, bytes]]:
    """The ifindex and the attributes of an RTM_NEWLINK message without its header."""
    require(message, _IFINFO.size)
    return _IFINFO.unpack_from(message)[2], dict(parse_attributes(message[_IFINFO.size :]))


def parse_words(value: bytes | None, count: int) -> tuple[int, ...] | None:
    """``count`` numbers of 32 bits; None of none."""
    if value is None:
        return None
    require(value, 4 * count)
    return struct.unpack_from(f"={count}I", value)


def parse_number(value: bytes | None) -> int | None:
    """A signed number of 32 bits; None where it isn't one."""
    return _signed(value) if value is not None and len(value) == 4 else None


def parse_text(value: bytes) -> str:
    """A text that ends with NUL."""
    return value.rstrip(b"\0").decode("utf-8", "replace")


def require(value: bytes, size: int) -> None:
    """VnetLockError where a message or an attribute is too short."""
    if len(value) < size:
        raise VnetLockError(f"netlink: {len(value)} bytes where at least {size} were expected")


def _signed(value: bytes) -> int:
    return int.from_bytes(value[:4], sys.byteorder, signed=True)
