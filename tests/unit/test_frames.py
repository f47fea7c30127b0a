"""frames.py against packets whose checksums are summed here word by word, as RFC 1071 says it."""

from __future__ import annotations

import random
import struct

import pytest

from vnet_lock.datapath import frames
from vnet_lock.datapath.frames import (
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NEEDS_CSUM,
    BadFrame,
    VnetHeader,
    ones_sum,
    tagged,
)

MACS = bytes.fromhex("525400000001525400000002")
SOURCE4, TARGET4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
SOURCE6, TARGET6 = bytes.fromhex("fd" + "00" * 14 + "01"), bytes.fromhex("fd" + "00" * 14 + "02")
TCP, UDP, SCTP = 6, 17, 132
# MSS 1460, SACK permitted, timestamps, no operation, window scale: what Linux opens a connection with.
OPTIONS = bytes.fromhex("020405b40402080a0000000100000002" + "01030307")


def finish(header: VnetHeader, frame: bytes) -> list[frames.Buffer]:
    return list(frames.finish(header, frame))


PLAIN = VnetHeader(0, GSO_NONE, 0, 0, 0, 0)

# An IPv4 header with its checksum (b861), as Wikipedia's "Internet checksum" has it.
KNOWN_IP = bytes.fromhex("45000073000040004011b861c0a80001c0a800c7")


def slow_sum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(version: int, protocol: int, length: int) -> bytes:
    if version == 4:
        return SOURCE4 + TARGET4 + struct.pack(">BBH", 0, protocol, length)
    return SOURCE6 + TARGET6 + struct.pack(">IxxxB", length, protocol)


def packet(
    version: int,
    protocol: int,
    payload: bytes,
    *,
    flags: int = 0x18,
    sequence: int = 1000,
    options: bytes = b"",
    extensions: bytes = b"",
    tags: bytes = b"",
    ident: int = 7,
    partial: bool = False,
) -> bytes:
    """A whole frame with right checksums; ``partial``: with the sum of the pseudo header only."""
    if protocol == TCP:
        l4 = struct.pack(">HHIIBBHHH", 4000, 80, sequence, 5, (20 + len(options)) // 4 << 4, flags, 500, 0, 0)
        l4, at = l4 + options, 16
    else:
        l4, at = struct.pack(">HHHH", 4000, 53, 8 + len(payload), 0), 6
    length = len(l4) + len(payload)
    begun = slow_sum(pseudo(version, protocol, length))
    checksum = (
        begun if partial else 0xFFFF - slow_sum(pseudo(version, protocol, length) + l4 + payload) or 0xFFFF
    )
    l4 = l4[:at] + struct.pack(">H", checksum) + l4[at + 2 :]
    if version == 4:
        ip = (
            struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, ident, 0x4000, 64, protocol, 0) + SOURCE4 + TARGET4
        )
        ip = ip[:10] + struct.pack(">H", 0xFFFF - slow_sum(ip)) + ip[12:]
        kind = b"\x08\x00"
    else:
        first = 0 if extensions else protocol
        ip = (
            struct.pack(">IHBB", 6 << 28, len(extensions) + length, first, 64)
            + SOURCE6
            + TARGET6
            + extensions
        )
        kind = b"\x86\xdd"
    return MACS + tags + kind + ip + l4 + payload


def hop_by_hop(next_header: int) -> bytes:
    """Hop-by-hop options of 8 bytes (padding), then destination options of 16."""
    return bytes([60, 0, 1, 4, 0, 0, 0, 0]) + bytes([next_header, 1, 1, 12]) + bytes(12)


def l4_of(frame: bytes, version: int, extra: int = 0) -> int:
    del frame
    return 14 + (20 if version == 4 else 40) + extra


def test_the_sum_is_that_of_the_words():
    assert ones_sum(KNOWN_IP) == 0
    assert 0xFFFF - ones_sum(KNOWN_IP[:10] + bytes(2) + KNOWN_IP[12:]) == 0xB861
    chance = random.Random(1)
    for size in (*range(9), 1447, 1448, 65535):
        data = chance.randbytes(size)
        assert ones_sum(data) == slow_sum(data) % 0xFFFF


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1447, 1448])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("version", [4, 6])
def test_a_partial_checksum_is_finished(version: int, protocol: int, size: int):
    payload = random.Random(size).randbytes(size)
    l4 = l4_of(b"", version)
    header = VnetHeader(NEEDS_CSUM, GSO_NONE, 0, 0, l4, 16 if protocol == TCP else 6)
    (made,) = finish(header, packet(version, protocol, payload, partial=True))
    assert bytes(made) == packet(version, protocol, payload)


def test_a_udp_checksum_that_comes_out_as_0_is_sent_as_ffff():
    l4 = l4_of(b"", 4)
    bare = packet(4, UDP, b"\0\0", partial=True)
    rest = slow_sum(bare[l4:])
    payload = struct.pack(">H", 0xFFFF - rest)
    (made,) = finish(VnetHeader(NEEDS_CSUM, GSO_NONE, 0, 0, l4, 6), packet(4, UDP, payload, partial=True))
    assert made[l4 + 6 : l4 + 8] == b"\xff\xff"


def test_a_whole_frame_is_left_alone():
    frame = packet(4, UDP, b"x")
    assert finish(PLAIN, frame) == [frame]
    # What a NIC has found right (VIRTIO_NET_HDR_F_DATA_VALID) is whole.
    assert finish(PLAIN._replace(flags=2), frame) == [frame]


def test_sctp_gets_its_crc():
    # Its common header and an INIT chunk without anything; the CRC is of RFC 3720's kind.
    chunk = bytes.fromhex("01000014 00000001 00010000 0001 0001 00000001".replace(" ", ""))
    l4 = struct.pack(">HHII", 5000, 5001, 0, 0) + chunk
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(l4), 7, 0, 64, SCTP, 0) + SOURCE4 + TARGET4
    (made,) = finish(VnetHeader(NEEDS_CSUM, GSO_NONE, 0, 0, 34, 8), MACS + b"\x08\x00" + ip + l4)
    assert int.from_bytes(made[42:46], "little") == table_crc32c(l4)
    assert table_crc32c(b"123456789") == 0xE3069283  # the catalogue's check value


def table_crc32c(data: bytes) -> int:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


SEGMENTS = [
    (4, 1448, 4 * 1448, b"", b""),
    (4, 1448, 2 * 1448 + 1, OPTIONS, b""),
    (4, 1460, 1460, b"", b""),
    (4, 99, 99 * 7 + 50, OPTIONS, b"\x81\x00\x00\x2a"),
    (6, 1428, 3 * 1428 + 5, OPTIONS, b""),
    (6, 1440, 65000, b"", b""),
    (6, 100, 250, b"", b"\x88\xa8\x00\x05\x81\x00\x00\x2a"),
]


@pytest.mark.parametrize(("version", "size", "length", "options", "tags"), SEGMENTS)
def test_a_tcp_packet_is_sent_in_segments(version: int, size: int, length: int, options: bytes, tags: bytes):
    payload = random.Random(length).randbytes(length)
    flags = 0x80 | 0x18 | 0x01  # CWR, ACK, PSH, FIN
    start = 0xFFFFFFFF - 2000  # wraps round
    frame = packet(
        version,
        TCP,
        payload,
        flags=flags,
        options=options,
        sequence=start,
        tags=tags,
        ident=0xFFFE,
        partial=True,
    )
    kind = GSO_TCPV4 if version == 4 else GSO_TCPV6
    l4 = l4_of(frame, version, len(tags))
    made = finish(VnetHeader(NEEDS_CSUM, kind | GSO_ECN, 0, size, l4, 16), frame)
    pieces = [payload[at : at + size] for at in range(0, length, size)]
    assert len(made) == len(pieces)
    for number, piece in enumerate(pieces):
        wanted = 0x10 | (0x80 if number == 0 else 0) | (0x09 if number == len(pieces) - 1 else 0)
        assert bytes(made[number]) == packet(
            version, TCP, piece, flags=wanted, options=options, tags=tags,
            sequence=(start + number * size) & 0xFFFFFFFF, ident=(0xFFFE + number) & 0xFFFF,
        ), number  # fmt: skip


def test_extension_headers_are_part_of_each_segment():
    extensions, payload = hop_by_hop(TCP), bytes(range(256)) * 10
    frame = packet(6, TCP, payload, extensions=extensions, partial=True)
    made = finish(VnetHeader(NEEDS_CSUM, GSO_TCPV6, 0, 1000, 54 + len(extensions), 16), frame)
    assert bytes(made[2]) == packet(6, TCP, payload[2000:], extensions=extensions, sequence=3000)
    assert len(made) == 3


@pytest.mark.parametrize("version", [4, 6])
def test_udp_is_sent_as_datagrams(version: int):
    payload = random.Random(9).randbytes(3001)
    frame = packet(version, UDP, payload, partial=True)
    made = finish(VnetHeader(NEEDS_CSUM, GSO_UDP_L4, 0, 1000, l4_of(frame, version), 6), frame)
    for number in range(4):
        wanted = packet(version, UDP, payload[number * 1000 : number * 1000 + 1000], ident=7 + number)
        assert bytes(made[number]) == wanted
    assert len(made) == 4


def test_udp_without_a_checksum_stays_without():
    whole = packet(4, UDP, bytes(3000))
    frame = whole[:40] + bytes(2) + whole[42:]
    made = finish(VnetHeader(0, GSO_UDP_L4, 0, 1400, 0, 0), frame)
    assert [piece[40:42] for piece in made] == [bytes(2)] * 3


def test_what_a_nic_put_together_without_a_partial_sum_is_summed_from_its_addresses():
    payload = bytes(range(200)) * 20
    made = finish(VnetHeader(0, GSO_TCPV4, 0, 1000, 0, 0), packet(4, TCP, payload))
    assert bytes(made[0]) == packet(4, TCP, payload[:1000], flags=0x10)
    assert bytes(made[3]) == packet(4, TCP, payload[3000:], sequence=4000, ident=10)


def test_a_tag_comes_before_the_others():
    frame = packet(4, UDP, b"x", tags=b"\x81\x00\x00\x2a")
    assert tagged(frame, 0x88A8, 0x2005) == MACS + b"\x88\xa8\x20\x05" + frame[12:]
    with pytest.raises(BadFrame):
        tagged(b"short", 0x8100, 1)


GOOD = packet(4, TCP, bytes(5000), partial=True)
GSO4 = VnetHeader(NEEDS_CSUM, GSO_TCPV4, 0, 1000, 34, 16)


@pytest.mark.parametrize(
    ("header", "frame", "why"),
    [
        (PLAIN._replace(flags=NEEDS_CSUM, csum_start=len(GOOD) - 1), GOOD, "beyond its end"),
        (PLAIN._replace(flags=NEEDS_CSUM, csum_start=65535, csum_offset=65535), GOOD, "beyond its end"),
        (GSO4._replace(gso_size=0), GOOD, "too many"),
        (GSO4._replace(gso_size=1), GOOD, "too many"),
        (GSO4._replace(gso_type=GSO_TCPV6), GOOD, "another protocol"),
        (GSO4._replace(gso_type=GSO_UDP_L4), GOOD, "another protocol"),
        (GSO4._replace(gso_type=3), GOOD, "another protocol"),
        (GSO4._replace(gso_type=77), GOOD, "another protocol"),
        (GSO4._replace(csum_start=54), GOOD, "packet in a packet"),
        (GSO4, b"", "cut short"),
        (GSO4, GOOD[:13], "cut short"),
        (GSO4, GOOD[:30], "no IPv4 header"),
        (GSO4, GOOD[:40], "cut short"),
        (GSO4, GOOD[:14] + b"\x44" + GOOD[15:], "no IPv4 header"),
        (GSO4, GOOD[:14] + b"\x55" + GOOD[15:], "no IPv4 header"),
        (GSO4, GOOD[:20] + b"\x20\x00" + GOOD[22:], "fragment"),
        (GSO4, GOOD[:46] + b"\x40" + GOOD[47:], "no transport header"),
        (GSO4, GOOD[:46] + b"\xf0" + GOOD[47:60], "no transport header"),
        (GSO4._replace(gso_size=65535), packet(4, TCP, bytes(65495), partial=True) + b"x" * 100, "too long"),
        (GSO4, MACS + b"\x81\x00" * 4000, "cut short"),
    ],
)
def test_a_frame_that_is_not_what_it_says_is_refused(header: VnetHeader, frame: bytes, why: str):
    with pytest.raises(BadFrame, match=why):
        finish(header, frame)


def test_endless_extension_headers_end():
    frame = packet(6, TCP, b"", extensions=bytes(8) * 20)  # hop-by-hop after hop-by-hop
    with pytest.raises(BadFrame):
        finish(VnetHeader(NEEDS_CSUM, GSO_TCPV6, 0, 1000, 54, 16), frame)


def test_whatever_comes_is_a_frame_or_a_bad_one():
    """Frames and headers with bytes changed by chance, and of any length."""
    chance = random.Random(4)
    whole = [
        packet(4, TCP, bytes(3000), options=OPTIONS, partial=True),
        packet(6, UDP, bytes(3000), partial=True),
        packet(6, TCP, bytes(3000), extensions=hop_by_hop(TCP), tags=b"\x81\x00\x00\x01"),
    ]
    outcomes = set()
    for _ in range(4000):
        frame = bytearray(chance.choice(whole)[: chance.choice([3000, chance.randrange(120)])])
        for _ in range(chance.randrange(4)):
            if frame:
                frame[chance.randrange(min(len(frame), 100))] = chance.randrange(256)
        chosen = [(0, 1, 255), (0, 1, 4, 5, 0x81, 255), (0,), (0, 1, 500, 65535)]
        chosen += [(0, 34, 54, 58, 65535), (6, 16, 8, 65535)]
        header = VnetHeader(*map(chance.choice, chosen))
        try:
            made = finish(header, frame)
        except BadFrame:
            outcomes.add("bad")
        else:
            outcomes.add("many" if len(made) > 1 else "one")
            assert sum(map(len, made)) <= 65536 * 3
    assert outcomes == {"bad", "many", "one"}
