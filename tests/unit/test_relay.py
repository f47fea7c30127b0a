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
from vnet_lock.datapath.relay import _HEADER, GuestGone, ToGuest, Way, _read_tag
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
