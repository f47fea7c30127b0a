"""The relay's ways between sockets of a pair each: what waits, what is dropped, what is a tag."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vnet_lock.backends import socket as backend
from vnet_lock.datapath.batch import Batch
from vnet_lock.datapath.relay import _HEADER, FromStream, GuestGone, ToGuest, ToStream, Way, _read_tag
from vnet_lock.datapath.stream import packed
from vnet_lock.settings import Settings

Ends = tuple[socket.socket, socket.socket]
SOL_PACKET, AUXDATA = 263, 8
VLAN_VALID, TPID_VALID = 0x10, 0x40


@pytest.fixture
def pairs() -> Iterator[tuple[Ends, Ends]]:
    """Two pairs: a source with its far end, a sink with its far end."""
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for end in ends:
                stack.enter_context(end).settimeout(5)
            made.append(ends)
        yield made[0], made[1]


def way(pairs: tuple[Ends, Ends]) -> Way:
    return Way(pairs[0][0], pairs[1][0], Batch(4, receive_at=_HEADER))


def to_guest(pairs: tuple[Ends, Ends]) -> ToGuest:
    return ToGuest(pairs[0][0], pairs[1][0], Batch(4, send_at=_HEADER, has_control=True))


def test_what_a_guest_sends_gets_an_empty_header(pairs: tuple[Ends, Ends]) -> None:
    carried = way(pairs)
    for frame in (b"one" * 20, b"two" * 30):
        pairs[0][1].send(frame)
    carried.carry()
    assert [pairs[1][1].recv(1000) for _ in range(2)] == [bytes(10) + b"one" * 20, bytes(10) + b"two" * 30]


def test_the_header_stays_empty_after_longer_frames(pairs: tuple[Ends, Ends]) -> None:
    carried = way(pairs)
    for size in (60000, 60, 1500):
        pairs[0][1].send(b"\xff" * size)
        carried.carry()
        assert pairs[1][1].recv(70000) == bytes(10) + b"\xff" * size


def test_a_sink_that_is_full_keeps_the_rest_waiting_in_order(pairs: tuple[Ends, Ends]) -> None:
    pairs[1][0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    carried = to_guest(pairs)
    sent = 0
    while not carried.waiting:
        for _ in range(4):
            pairs[0][1].send(bytes(_HEADER) + struct.pack(">I", sent) + bytes(1000))
            sent += 1
        carried.carry()
    got = []
    while carried.waiting or len(got) < sent:
        got.append(struct.unpack(">I", pairs[1][1].recv(2000)[:4])[0])
        carried.send()
    assert got == list(range(sent))


def test_bad_frames_are_left_out_between_good_ones(pairs: tuple[Ends, Ends]) -> None:
    carried = to_guest(pairs)
    bad = struct.pack("=BBHHHH", 1, 1, 0, 0, 65535, 65535) + b"bad" * 30
    for packet in (bytes(_HEADER) + b"good1" * 12, bad, b"short", bytes(_HEADER) + b"good2" * 12):
        pairs[0][1].send(packet)
    carried.carry()
    assert [pairs[1][1].recv(1000)[:5] for _ in range(2)] == [b"good1", b"good2"]
    assert not carried.waiting


def test_a_packet_too_long_for_any_slot_is_dropped(pairs: tuple[Ends, Ends]) -> None:
    carried = to_guest(pairs)
    pairs[0][1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
    pairs[0][1].send(bytes(80_000))
    pairs[0][1].send(bytes(_HEADER) + b"after" * 12)
    carried.carry()
    assert pairs[1][1].recv(1000) == b"after" * 12


def test_the_end_of_a_guest_is_no_dropped_frame(pairs: tuple[Ends, Ends]) -> None:
    carried = to_guest(pairs)
    pairs[1][1].close()
    pairs[0][1].send(bytes(_HEADER) + b"lost" * 20)
    with pytest.raises(GuestGone):
        carried.carry()


# --- QEMU's -netdev stream ------------------------------------------------------------------------


@pytest.fixture
def stream() -> Iterator[Ends]:
    """The relay's end, and QEMU's."""
    with ExitStack() as stack:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in ends:
            stack.enter_context(end)
        ends[1].settimeout(5)
        yield ends


def read_frames(end: socket.socket, count: int) -> list[bytes]:
    file = end.makefile("rb")
    return [file.read(int.from_bytes(file.read(4))) for _ in range(count)]


def test_a_stream_has_each_frame_after_its_length(pairs: tuple[Ends, Ends], stream: Ends) -> None:
    carried = ToStream(pairs[0][0], stream[0], Batch(4, send_at=_HEADER, has_control=True))
    # One whose checksum is missing is made whole, so it doesn't go from its slot.
    partial = struct.pack("=BBHHHH", 1, 0, 0, 0, 14, 2)
    for packet in (bytes(_HEADER) + b"a" * 60, partial + b"b" * 60, bytes(_HEADER) + b"c" * 9000):
        pairs[0][1].send(packet)
    carried.carry()
    first, second, third = read_frames(stream[1], 3)
    assert (first, third) == (b"a" * 60, b"c" * 9000)
    assert second[:16] == b"b" * 16
    assert second[16:18] != b"bb"
    assert not carried.waiting


def test_a_frame_that_a_stream_took_in_part_is_followed_by_its_rest(
    pairs: tuple[Ends, Ends], stream: Ends
) -> None:
    stream[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    carried = ToStream(pairs[0][0], stream[0], Batch(4, send_at=_HEADER, has_control=True))
    sent = []
    while not carried.waiting:
        sent.append(bytes([len(sent)]) * 5000)
        pairs[0][1].send(bytes(_HEADER) + sent[-1])
        carried.carry()
    got = b""
    while len(got) < sum(4 + len(frame) for frame in sent):
        got += stream[1].recv(777)
        carried.send()
    assert got == bytes(packed(sent))


@pytest.mark.parametrize("step", [1, 3, 64, 5000])
def test_frames_of_a_stream_are_found_wherever_it_is_cut(
    pairs: tuple[Ends, Ends], stream: Ends, step: int
) -> None:
    carried = FromStream(stream[0], pairs[1][0], Batch(4, receive_at=_HEADER))
    frames = [bytes([number]) * size for number, size in enumerate((60, 1514, 61, 62, 60, 60, 1514))]
    data = bytes(packed(frames))
    got = []
    pairs[1][1].setblocking(False)
    for at in range(0, len(data), step):
        stream[1].send(data[at : at + step])
        carried.carry()
        while len(got) < len(frames):
            try:
                got.append(pairs[1][1].recv(70000))
            except BlockingIOError:
                break
    assert got == [bytes(_HEADER) + frame for frame in frames]


def test_more_frames_than_slots_are_sent_in_order(pairs: tuple[Ends, Ends], stream: Ends) -> None:
    carried = FromStream(stream[0], pairs[1][0], Batch(4, receive_at=_HEADER))
    frames = [struct.pack(">I", number) * 15 for number in range(50)]
    stream[1].send(packed(frames))
    carried.carry()
    got = []
    while len(got) < len(frames):
        got.append(pairs[1][1].recv(1000)[_HEADER:])
        carried.send()
    assert got == frames


@pytest.mark.parametrize("end", [b"", struct.pack(">I", 1 << 20) + b"x"], ids=["closed", "no frame"])
def test_a_stream_that_ends_or_makes_no_sense_is_a_guest_that_is_gone(
    pairs: tuple[Ends, Ends], stream: Ends, end: bytes
) -> None:
    carried = FromStream(stream[0], pairs[1][0], Batch(4, receive_at=_HEADER))
    stream[1].send(end)
    stream[1].close()
    with pytest.raises(GuestGone):
        carried.carry()


# --- tags -----------------------------------------------------------------------------------------


def auxdata(status: int, tci: int, tpid: int, *, kind: int = AUXDATA) -> bytes:
    data = struct.pack("=IIIHHHH", status, 100, 100, 0, 14, tci, tpid)
    return struct.pack("@Nii", 16 + len(data), SOL_PACKET, kind) + data


@pytest.mark.parametrize(
    ("control", "tag"),
    [
        (auxdata(VLAN_VALID | TPID_VALID, 0x202A, 0x88A8), (0x88A8, 0x202A)),
        # Before Linux 3.14 there was no TPID, and VLAN 0 is a tag, too.
        (auxdata(VLAN_VALID, 0, 0), (0x8100, 0)),
        (auxdata(1, 0x202A, 0x8100), None),
        (auxdata(VLAN_VALID, 42, 0, kind=1), None),
        (b"", None),
        (auxdata(VLAN_VALID, 42, 0)[:20], None),
    ],
)
def test_the_tag_is_what_the_auxiliary_data_says(control: bytes, tag: tuple[int, int] | None) -> None:
    assert _read_tag(control) == tag


def test_a_kernel_without_packet_sockets_is_told_what_to_load(tmp_path: Path) -> None:
    settings = Settings.under(tmp_path)
    assert backend.missing(settings) == "this kernel has no packet sockets; run: modprobe af_packet"
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/packet").touch()
    assert backend.missing(settings) == ""
