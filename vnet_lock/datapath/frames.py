"""Makes Ethernet frames whole that the kernel left to its device: checksums, segments, VLAN tags. Pure.

What comes in is another guest's or the network's, so nothing in it is believed: a frame that isn't what its
header says raises BadFrame, and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from vnet_lock.dataclass import dataclass

Buffer = bytes | bytearray | memoryview

# include/uapi/linux/virtio_net.h
NEEDS_CSUM = 0x1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 4, 5, 0x80

# The most segments of one packet. Linux sends none smaller than 48 bytes (net.ipv4.tcp_min_snd_mss); another
# guest may ask for one byte each.
_MOST_SEGMENTS = 65536 // 48
_IPV4, _IPV6, _TAGS = 0x0800, 0x86DD, (0x8100, 0x88A8, 0x9100)
_TCP, _UDP, _SCTP = 6, 17, 132
# Hop-by-hop, routing and destination options (RFC 8200): a next header, and a length in 8 bytes less one.
_EXTENSIONS = (0, 43, 60)
_FIN_PSH, _CWR = 0x09, 0x80
_CRC32C = 0x82F63B78


class BadFrame(Exception):
    """A frame that is not what its header says."""


class VnetHeader(NamedTuple):
    """A struct virtio_net_hdr in the host's byte order, as packet(7) gives it: what is left to be done."""

    flags: int
    gso_type: int
    hdr_len: int
    gso_size: int
    csum_start: int
    csum_offset: int

    @classmethod
    def parse(cls, data: Buffer) -> VnetHeader:
        """Of its 10 bytes."""
        return cls(*_VNET.unpack_from(data))


_VNET = struct.Struct("=BBHHHH")


def finish(header: VnetHeader, frame: Buffer) -> Iterator[Buffer]:
    """The frame as a NIC without offloads would have sent it: one frame, or one for each segment."""
    if header.gso_type & ~GSO_ECN != GSO_NONE:
        yield from _segments(header, frame)
    elif header.flags & NEEDS_CSUM:
        yield _with_checksum(header, frame)
    else:
        yield frame


def tagged(frame: Buffer, tpid: int, tci: int) -> bytes:
    """The frame with a VLAN tag, before any that it has."""
    if len(frame) < 12:
        raise BadFrame("no room for two MACs")
    return b"".join((frame[:12], struct.pack(">HH", tpid, tci), frame[12:]))


# --- checksums ------------------------------------------------------------------------------------


def ones_sum(data: Buffer) -> int:
    """The ones' complement sum of big-endian 16-bit words (RFC 1071), modulo 65535: 0 stands for -0, too.

    2**16 is 1 modulo 65535, so that a number's remainder is the sum of its words: at the speed of C.
    """
    total = int.from_bytes(data, "big") % 0xFFFF
    return total * 0x100 % 0xFFFF if len(data) % 2 else total


def _checksum(total: int) -> int:
    """What makes the sum -0. Never 0, which in UDP means that there is none; both say the same."""
    return 0xFFFF - total % 0xFFFF


def _with_checksum(header: VnetHeader, frame: Buffer) -> bytearray:
    """The field has the sum of the pseudo header already (skb_checksum_help)."""
    start, at = header.csum_start, header.csum_start + header.csum_offset
    if at + 2 > len(frame):
        raise BadFrame("its checksum would be beyond its end")
    made = bytearray(frame)
    if header.csum_offset == 8 and _is_sctp(made, start):
        made[at : at + 4] = bytes(4)
        made[at : at + 4] = _crc32c(memoryview(made)[start:]).to_bytes(4, "little")
    else:
        struct.pack_into(">H", made, at, _checksum(ones_sum(memoryview(made)[start:])))
    return made


def _is_sctp(frame: Buffer, start: int) -> bool:
    """Whether the checksum is SCTP's CRC, which the header of virtio has no word for."""
    try:
        headers = Headers.parse(frame)
    except BadFrame:
        return False
    return headers.protocol == _SCTP and headers.l4 == start and len(frame) >= start + 12


def _crc32c(data: Buffer) -> int:
    """Slow, for what is rare: SCTP between the host's own devices."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_CRC32C if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# --- segments -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Headers:
    """Where the headers of a frame begin, and what its transport protocol is."""

    l3: int
    l4: int
    version: int
    protocol: int

    @classmethod
    def parse(cls, frame: Buffer) -> Headers:
        """Of an IP packet that is no fragment, with or without VLAN tags and extension headers."""
        l3 = 14
        kind = _half(frame, 12)
        while kind in _TAGS:
            kind = _half(frame, l3 + 2)
            l3 += 4
        if kind == _IPV4:
            length = (_byte(frame, l3) & 0xF) * 4
            if _byte(frame, l3) >> 4 != 4 or length < 20 or len(frame) < l3 + length:
                raise BadFrame("no IPv4 header")
            if _half(frame, l3 + 6) & 0x3FFF:
                raise BadFrame("a fragment")
            return cls(l3, l3 + length, 4, _byte(frame, l3 + 9))
        if kind != _IPV6 or _byte(frame, l3) >> 4 != 6 or len(frame) < l3 + 40:
            raise BadFrame("no IP packet")
        at, protocol = l3 + 40, _byte(frame, l3 + 6)
        while protocol in _EXTENSIONS:
            protocol, at = _byte(frame, at), at + 8 * (_byte(frame, at + 1) + 1)
        return cls(l3, at, 6, protocol)

    def pseudo_sum(self, frame: Buffer) -> int:
        """The sum of the pseudo header without the length."""
        first, last = (self.l3 + 12, self.l3 + 20) if self.version == 4 else (self.l3 + 8, self.l3 + 40)
        return ones_sum(frame[first:last]) + self.protocol


def _segments(header: VnetHeader, frame: Buffer) -> Iterator[bytes]:
    """The packet in pieces of gso_size bytes, as tcp_gso_segment and __udp_gso_segment cut it."""
    headers = Headers.parse(frame)
    kind = header.gso_type & ~GSO_ECN
    wanted = {GSO_TCPV4: (4, _TCP), GSO_TCPV6: (6, _TCP), GSO_UDP_L4: (headers.version, _UDP)}.get(kind)
    if wanted != (headers.version, headers.protocol):
        raise BadFrame("another protocol than its header says")
    if header.flags & NEEDS_CSUM and header.csum_start != headers.l4:
        raise BadFrame("a packet in a packet")
    fixed = 20 if headers.protocol == _TCP else 8
    size = (_byte(frame, headers.l4 + 12) >> 4) * 4 if headers.protocol == _TCP else fixed
    head, payload = bytearray(frame[: headers.l4 + size]), memoryview(frame)[headers.l4 + size :]
    if size < fixed or len(head) < headers.l4 + size:
        raise BadFrame("no transport header")
    if not header.gso_size or len(payload) > header.gso_size * _MOST_SEGMENTS:
        raise BadFrame("too many segments")
    if len(head) - headers.l3 + min(header.gso_size, len(payload)) > 0xFFFF:
        raise BadFrame("segments too long")
    yield from _cut(headers, head, payload, header)


def _cut(headers: Headers, head: bytearray, payload: memoryview, header: VnetHeader) -> Iterator[bytes]:
    l4, size, is_tcp = headers.l4, header.gso_size, headers.protocol == _TCP
    at = l4 + (16 if is_tcp else 6)
    given = _half(head, at)
    # The kernel's own sum of the pseudo header knows where a routing header leads; it has the whole length.
    total = given - (len(head) - l4 + len(payload))
    if not header.flags & NEEDS_CSUM:
        total = headers.pseudo_sum(head)
    has_checksum = bool(header.flags & NEEDS_CSUM or is_tcp or headers.version == 6 or given)
    (sequence,), flags = struct.unpack_from(">I", head, l4 + 4), head[l4 + 13 : l4 + 14]
    count = max(1, -(-len(payload) // size))
    for number in range(count):
        piece = payload[number * size : (number + 1) * size]
        length = len(head) - l4 + len(piece)
        _set_ip(headers, head, length, is_first=number == 0)
        if is_tcp:
            struct.pack_into(">I", head, l4 + 4, (sequence + number * size) & 0xFFFFFFFF)
            # Only the last segment ends the stream, only the first says that the window was reduced.
            head[l4 + 13] = flags[0] & ~((_FIN_PSH if number < count - 1 else 0) | (_CWR if number else 0))
        else:
            struct.pack_into(">H", head, l4 + 4, length)
        if has_checksum:
            head[at : at + 2] = bytes(2)
            struct.pack_into(
                ">H", head, at, _checksum(total + length + ones_sum(head[l4:]) + ones_sum(piece))
            )
        yield b"".join((head, piece))


def _set_ip(headers: Headers, head: bytearray, length: int, *, is_first: bool) -> None:
    """The IP header of the next segment; each has an ID of its own."""
    l3, l4 = headers.l3, headers.l4
    if headers.version == 6:
        struct.pack_into(">H", head, l3 + 4, l4 - l3 - 40 + length)
        return
    number = _half(head, l3 + 4) + (0 if is_first else 1)
    struct.pack_into(">HH", head, l3 + 2, l4 - l3 + length, number & 0xFFFF)
    head[l3 + 10 : l3 + 12] = bytes(2)
    struct.pack_into(">H", head, l3 + 10, _checksum(ones_sum(head[l3:l4])) % 0xFFFF)


def _byte(frame: Buffer, at: int) -> int:
    if at >= len(frame):
        raise BadFrame("cut short")
    return frame[at]


def _half(frame: Buffer, at: int) -> int:
    if at + 2 > len(frame):
        raise BadFrame("cut short")
    return frame[at] << 8 | frame[at + 1]
