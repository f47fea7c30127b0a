"""Several packet sockets on one device: each flow is one socket's, and those that serve no queue get none."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from vnet_lock.datapath.packet_queues import PacketQueues, share
from vnet_lock.kernel import packet

FLOWS = range(1, 65)


@pytest.fixture
def sockets(veth: tuple[str, str], ip: Callable[[str], str]) -> Iterator[list[socket.socket]]:
    """Three sockets on one end of a wire, with nothing in them that the kernel says by itself."""
    for link in veth:
        ip(f"link set {link} addrgenmode none")
        ip(f"addr flush dev {link}")
    opened = packet.open_queues(veth[1], 3)
    share(opened)
    yield opened
    for one in opened:
        one.close()


@pytest.fixture
def sender(veth: tuple[str, str]) -> Iterator[socket.socket]:
    """The wire's other end."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as made:
        made.bind((veth[0], 0))
        yield made


def frame(version: int, number: int, *, back: bool = False, fragment: bool = False) -> bytes:
    """A UDP packet of the flow with that number, or one of its answers."""
    ports = (1000 + number, 53)
    places = ("10.0.0.1", "10.0.0.2") if version == 4 else ("fd00::1", "fd00::2")
    ends = [ipaddress.ip_address(place).packed for place in places]
    if back:
        ports, ends = ports[::-1], ends[::-1]
    payload = struct.pack("!HHHH", *ports, 12, 0) + struct.pack("!I", number)
    if version == 4:
        where = 0x2000 if fragment else 0
        head = struct.pack("!BBHHHBBH", 0x45, 0, 32, number, where, 64, 17, 0)
    else:
        head = struct.pack("!IHBB", 6 << 28, 12, 17, 64)
    kind = struct.pack("!H", 0x0800 if version == 4 else 0x86DD)
    return b"\xff" * 6 + b"\x02\0\0\0\0\x01" + kind + head + b"".join(ends) + payload


def received(sockets: list[socket.socket]) -> list[list[int]]:
    """The flows of the packets that each socket has."""
    found: list[list[int]] = []
    for one in sockets:
        one.setblocking(False)
        found.append([])
        while True:
            try:
                data = one.recv(2048)
            except BlockingIOError:
                break
            # With a header before it, where the kernel can.
            if b"\x02\0\0\0\0\x01" in data[:24]:
                found[-1].append(struct.unpack("!I", data[-4:])[0])
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_each_flow_is_one_sockets_in_both_directions(sockets, sender, version):
    PacketQueues(sockets).spread(3)
    received(sockets)
    for number in FLOWS:
        sender.send(frame(version, number))
    there = received(sockets)
    for number in FLOWS:
        sender.send(frame(version, number, back=True))
    assert received(sockets) == there
    assert sorted(number for each in there for number in each) == list(FLOWS)
    assert all(len(each) > len(FLOWS) // 10 for each in there)


def test_a_packet_in_pieces_is_one_sockets(sockets, sender):
    PacketQueues(sockets).spread(3)
    received(sockets)
    for number in FLOWS:
        sender.send(frame(4, number, fragment=True))
    assert sorted(len(each) for each in received(sockets)) == [0, 0, len(FLOWS)]


def test_a_socket_without_a_running_queue_gets_nothing(sockets, sender):
    queues = PacketQueues(sockets)
    for pairs in (1, 3, 2, 1):
        queues.spread(pairs)
        received(sockets)
        for number in FLOWS:
            sender.send(frame(4, number))
        counts = [len(each) for each in received(sockets)]
        assert sum(counts) == len(FLOWS)
        assert [count > 0 for count in counts] == [True] * pairs + [False] * (3 - pairs)


def test_before_anything_was_said_the_first_socket_gets_all(sockets, sender):
    sender.send(frame(4, 1))
    sender.send(b"\xff" * 6 + b"\x02\0\0\0\0\x01" + b"\x08\x06" + struct.pack("!I", 2))
    assert received(sockets) == [[1, 2], [], []]


def test_what_we_send_ourselves_does_not_come_back(sockets, sender):
    sockets[0].send(frame(4, 1))
    assert received(sockets) == [[], [], []]


def test_a_header_goes_before_each_packet_where_the_kernel_can(sockets, sender):
    queues = PacketQueues(sockets)
    received(sockets)
    for size in (10, 12) if queues.has_header else ():
        queues.set_header(size)
        sender.send(frame(4, 7))
        sockets[0].setblocking(True)
        assert sockets[0].recv(2048)[size:] == frame(4, 7)
