"""The relay of the socket backend: a packet socket on a macvlan of a veth, and the test in QEMU's place."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel.host import eventually
from vnet_lock.backends import socket as backend
from vnet_lock.combination import Combination, Policy
from vnet_lock.kernel import netlink
from vnet_lock.kernel.netns import call_in, make_namespace
from vnet_lock.ports import Opened
from vnet_lock.request import Intent
from vnet_lock.settings import DEFAULT

Ip = Callable[[str], str]
OURS, PEERS = "52:54:00:00:00:07", "52:54:00:00:00:09"
TO_PEER = bytes.fromhex((PEERS + OURS).replace(":", ""))
TO_GUEST = bytes.fromhex((OURS + PEERS).replace(":", ""))
# An EtherType for experiments (IEEE 802), which no stack answers.
KIND = b"\x88\xb5"
TAG = bytes.fromhex("8100202a")
SOL_PACKET, VNET_HDR = 263, 15


class Stream(socket.socket):
    """A stream of frames, with which a test deals as with datagrams (QEMU's -netdev stream)."""

    def send(self, frame: bytes) -> int:  # type: ignore[override]
        self.sendall(struct.pack(">I", len(frame)) + frame)
        return len(frame)

    def recv(self, *_: int) -> bytes:  # type: ignore[override]
        if not (length := super().recv(4, socket.MSG_WAITALL)):
            return b""
        return super().recv(int.from_bytes(length), socket.MSG_WAITALL)


@dataclass
class Wire:
    """A relay: the guest's end of it, a packet socket at the wire's other end, and its device's namespace."""

    guest: socket.socket
    peer: socket.socket
    netns: int
    pid: int
    ip: Ip

    def in_guest(self, seconds: float = 10, tagged: bool = False) -> bytes:
        """The next frame of ours that the guest gets."""
        return receive(self.guest, seconds, TAG + KIND if tagged else KIND)

    def at_peer(self, seconds: float = 10, tagged: bool = False) -> bytes:
        """The next frame of ours that is sent."""
        return receive(self.peer, seconds, TAG + KIND if tagged else KIND)

    def inside(self, words: str) -> str:
        """iproute2 in the namespace of the guest's device."""
        return call_in(self.netns, lambda: self.ip(words))

    def has_ended(self) -> bool:
        """Whether the relay has."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    def cpu_ticks(self) -> int:
        """What it has used of a CPU."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def wakeups(self) -> int:
        """How often it has slept."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.M)[1])


def receive(one: socket.socket, seconds: float, kind: bytes) -> bytes:
    """The next frame of that kind; b"" where none comes."""
    deadline = time.monotonic() + seconds
    while select.select([one], [], [], max(0.0, deadline - time.monotonic()))[0]:
        frame = one.recv(70000)
        assert frame, "the relay has ended"
        if frame[12 : 12 + len(kind)] == kind:
            return frame
    return b""


def inhabitants(namespace: int) -> list[int]:
    """The pids of the processes in a network namespace."""
    found, inode = [], os.fstat(namespace).st_ino
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if os.stat(path).st_ino == inode:
                found.append(int(path.parts[2]))
    return found


@pytest.fixture(params=[Stream, socket.socket], ids=["stream", "datagrams"])
def wire(
    veth: tuple[str, str], macvtap_works: None, ip: Ip, request: pytest.FixtureRequest
) -> Iterator[Wire]:
    del macvtap_works
    namespace = make_namespace(DEFAULT)
    netlink.add_macvlan("vl0", veth[0], "bridge", OURS, "vnet-lock:x", namespace=namespace)
    call_in(namespace, lambda: netlink.set_link("vl0", up=True))
    connection = backend.connect(
        DEFAULT,
        Intent("net0", Policy.VEB, datagrams=request.param is socket.socket),
        Opened("vl0", OURS, netns=namespace),
        Combination.parse("veb-macvlan-socket"),
    )
    (pid,) = inhabitants(namespace)
    with (
        request.param(fileno=connection.fds[0]) as guest,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as peer,
    ):
        # Frames of the peer's with their tags where they were.
        peer.bind((veth[1], 3))
        yield Wire(guest, peer, namespace, pid, ip)
    eventually(lambda: not inhabitants(namespace))
    os.close(namespace)


def test_frames_go_both_ways_as_they_are(wire: Wire):
    for size in (46, 47, 1500):
        wire.guest.send(TO_PEER + KIND + os.urandom(size - 3) + b"end")
        assert wire.at_peer()[-3:] == b"end"
        frame = TO_GUEST + KIND + os.urandom(size)
        wire.peer.send(frame)
        assert wire.in_guest() == frame


def test_many_frames_keep_their_order(wire: Wire):
    for start in range(0, 2000, 100):
        numbers = [struct.pack(">I", number) for number in range(start, start + 100)]
        for number in numbers:
            wire.guest.send(TO_PEER + KIND + number + bytes(42))
            wire.peer.send(TO_GUEST + KIND + number + bytes(42))
        assert [wire.at_peer()[14:18] for _ in numbers] == numbers
        assert [wire.in_guest()[14:18] for _ in numbers] == numbers


def test_a_vlan_tag_that_the_kernel_took_off_is_put_back(wire: Wire):
    frame = TO_GUEST + TAG + KIND + os.urandom(100)
    wire.peer.send(frame)
    assert wire.in_guest(tagged=True) == frame
    wire.guest.send(TO_PEER + TAG + KIND + bytes(100))
    # The kernel takes it off again, for whoever receives it: packet(7), PACKET_AUXDATA.
    assert wire.at_peer() == TO_PEER + KIND + bytes(100)


def test_a_partial_checksum_is_finished_and_a_big_packet_is_cut(wire: Wire):
    """What a stack of this host sends to its own guests: it leaves both to the device."""
    wire.peer.setsockopt(SOL_PACKET, VNET_HDR, 1)
    payload = os.urandom(30_000)
    header = struct.pack("=BBHHHH", 1, 1, 54, 1448, 34, 16)
    wire.peer.send(header + TO_GUEST + tcp4(payload))
    pieces = []
    while len(b"".join(pieces)) < len(payload):
        frame = receive(wire.guest, 10, b"\x08\x00\x45")
        assert frame, "a segment is missing"
        assert len(frame) <= 1514
        ip, tcp = frame[14:34], frame[34:]
        assert words_sum(ip) == 0xFFFF
        assert words_sum(ip[12:20] + struct.pack(">HH", 6, len(tcp)) + tcp) == 0xFFFF
        assert struct.unpack(">I", tcp[4:8])[0] == 1000 + len(b"".join(pieces))
        pieces.append(tcp[20:])
    assert b"".join(pieces) == payload


def tcp4(payload: bytes) -> bytes:
    """EtherType, IPv4 and TCP; the checksum field has the pseudo header's sum, as a driver gets it."""
    addresses = bytes([10, 9, 9, 1, 10, 9, 9, 2])
    length = 20 + len(payload)
    begun = words_sum(addresses + struct.pack(">HH", 6, length))
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 6, 0) + addresses
    ip = ip[:10] + struct.pack(">H", 0xFFFF - words_sum(ip)) + ip[12:]
    return b"\x08\x00" + ip + struct.pack(">HHIIBBHHH", 1, 2, 1000, 0, 0x50, 0x18, 500, begun, 0) + payload


def words_sum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_what_no_device_takes_is_dropped_and_the_rest_goes_on(wire: Wire):
    for frame in (b"", b"x", TO_PEER + KIND + bytes(9000), TO_PEER + KIND + bytes(65000)):
        wire.guest.send(frame)
    wire.guest.send(TO_PEER + KIND + b"after".ljust(50))
    assert wire.at_peer()[14:19] == b"after"


def test_the_device_goes_down_and_comes_up(wire: Wire):
    wire.inside("link set vl0 down")
    wire.guest.send(TO_PEER + KIND + b"lost".ljust(50))
    time.sleep(0.2)
    calm = wire.wakeups()
    time.sleep(0.5)
    assert wire.wakeups() == calm
    assert not wire.has_ended()
    wire.inside("link set vl0 up")
    wire.guest.send(TO_PEER + KIND + b"after".ljust(50))
    assert wire.at_peer()[14:19] == b"after"
    wire.peer.send(TO_GUEST + KIND + b"back".ljust(50))
    assert wire.in_guest()[14:18] == b"back"


def test_the_relay_ends_when_its_device_goes_for_good(wire: Wire):
    wire.inside("link delete vl0")
    eventually(wire.has_ended)
    # QEMU sees the end of its network.
    assert has_network_ended(wire.guest)


def test_the_relay_ends_with_the_guest_and_leaves_the_namespace_to_its_last_descriptor(wire: Wire):
    os.close(wire.guest.detach())
    eventually(wire.has_ended)
    assert not inhabitants(wire.netns)


def has_network_ended(guest: socket.socket) -> bool:
    """Whether QEMU finds an end, behind what was on its way."""
    guest.settimeout(10)
    while guest.recv(70000):
        pass
    return True


def test_a_relay_that_is_killed_is_seen_by_the_guest(wire: Wire):
    os.kill(wire.pid, signal.SIGKILL)
    eventually(wire.has_ended)
    assert has_network_ended(wire.guest)
    with pytest.raises(BrokenPipeError):
        wire.guest.send(b"x" * 60)


def test_a_guest_that_takes_nothing_costs_nothing_and_goes_on_where_it_was(wire: Wire):
    for _ in range(20):
        for _ in range(500):
            wire.peer.send(TO_GUEST + KIND + bytes(1400))
        time.sleep(0.01)
    eventually(lambda: is_calm(wire))
    before = wire.cpu_ticks()
    for _ in range(2000):
        wire.peer.send(TO_GUEST + KIND + bytes(1400))
    # Down and up again while it waits for the guest alone.
    wire.inside("link set vl0 down")
    wire.inside("link set vl0 up")
    eventually(lambda: is_calm(wire))
    assert wire.cpu_ticks() - before <= 1
    # The other direction doesn't wait for this one.
    wire.guest.send(TO_PEER + KIND + b"still".ljust(50))
    assert wire.at_peer()[14:19] == b"still"
    while wire.in_guest(0.5):
        pass
    wire.peer.send(TO_GUEST + KIND + b"again".ljust(50))
    assert wire.in_guest()[14:19] == b"again"


def is_calm(wire: Wire) -> bool:
    before = wire.wakeups()
    time.sleep(0.2)
    return wire.wakeups() == before


def test_the_relay_has_no_rights_and_sits_in_the_namespace_of_its_device(wire: Wire):
    status = Path(f"/proc/{wire.pid}/status").read_text()
    assert re.search(r"^Uid:\t65534\t65534\t65534\t65534$", status, re.M)
    assert re.search(r"^CapEff:\t0+$", status, re.M)
    assert re.search(r"^Groups:\t *$", status, re.M)
    assert os.stat(f"/proc/{wire.pid}/ns/net").st_ino == os.fstat(wire.netns).st_ino


def test_a_macvlan_is_not_made_promiscuous_as_the_device_below_it_would_be(wire: Wire):
    assert "promiscuity 0 " in wire.inside("-details link show vl0")
