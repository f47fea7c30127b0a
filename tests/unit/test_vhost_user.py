"""The vhost-user back-end against a front-end of the test's own; what the kernel is told is written down."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from vnet_lock.datapath import vhost_user
from vnet_lock.datapath.vhost_device import offered_features

KERNEL_FEATURES = 1 << 15 | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 32 | 1 << 33 | 1 << 34
MODERN = 1 << 32 | 1 << 15 | 1 << 30
PAGE = 4096
# Where QEMU has the guest's memory, which begins at 1 MiB in the guest.
FRONT, GUEST = 0x7F0000000000, 0x100000
SIZE = 16 * PAGE


@dataclass
class FakeKernel:
    """vhost-net, as far as we are told what to tell it."""

    said: list[tuple] = field(default_factory=list)
    base: int = 0
    is_open: bool = True
    refuses: str = ""

    def _say(self, *words: object) -> None:
        if words[0] == self.refuses:
            raise OSError(22, "Invalid argument")
        self.said.append(words)

    def own(self) -> None:
        self._say("own")

    def close(self) -> None:
        self.is_open = False

    def set_features(self, features: int) -> None:
        self._say("features", features)

    def set_memory(self, regions: Sequence[tuple[int, int, int]]) -> None:
        self._say("memory", *((guest, size) for guest, size, _ in regions))

    def set_kick(self, ring: int, descriptor: int) -> None:
        self._say("kick", ring, descriptor >= 0)

    def set_call(self, ring: int, descriptor: int) -> None:
        self._say("call", ring, descriptor >= 0)

    def set_error(self, ring: int, descriptor: int) -> None:
        self._say("error", ring, descriptor >= 0)

    def start(self, ring: int, size: int, base: int, addresses: tuple[int, int, int], socket: int) -> None:
        self._say("start", ring, size, base, addresses[1] - addresses[0], socket)

    def stop(self, ring: int) -> int:
        self._say("stop", ring)
        return self.base


@dataclass
class FakePackets:
    """Packet sockets 100, 101, … with or without a header."""

    has_header: bool = True
    headers: list[int] = field(default_factory=list)
    spreads: list[int] = field(default_factory=list)

    def fileno(self, pair: int) -> int:
        return 100 + pair

    def set_header(self, size: int) -> None:
        self.headers.append(size)

    def spread(self, pairs: int) -> None:
        self.spreads.append(pairs)


class FrontEnd:
    """A QEMU: says what it is told to, and takes answers."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(path)

    def say(self, request: int, data: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> None:
        message = struct.pack("=III", request, flags, len(data)) + data
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dropped already
            self.socket.sendmsg([message], rights)

    def ask(self, request: int, data: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> bytes:
        self.say(request, data, fds, flags)
        answered, reply_flags, size = struct.unpack("=III", self.socket.recv(12, socket.MSG_WAITALL))
        assert (answered, reply_flags) == (request, 0x5)
        return self.socket.recv(size, socket.MSG_WAITALL) if size else b""

    def get(self, request: int) -> int:
        return struct.unpack("=Q", self.ask(request))[0]

    def settle(self) -> None:
        """All that was said has been done."""
        self.get(1)

    def is_dropped(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def own(self, features: int = MODERN) -> None:
        self.say(16, u64(1 << 0 | 1 << 3))
        self.say(3)
        self.say(2, u64(features))

    def table(self, *rows: tuple[int, int, int, int], fds: Sequence[int], flags: int = 1) -> None:
        self.say(5, table(*rows), fds, flags)

    def ring(self, index: int, kick: int, size: int = 64, base: int = 0, at: int = FRONT) -> None:
        """All that starts a ring, as QEMU says it."""
        self.say(8, state(index, size))
        self.say(10, state(index, base))
        self.say(9, struct.pack("=IIQQQQ", index, 0, at, at + 2 * PAGE, at + PAGE, 0))
        self.say(12, u64(index), [kick])


def u64(number: int) -> bytes:
    return struct.pack("=Q", number)


def state(index: int, number: int) -> bytes:
    return struct.pack("=II", index, number)


def table(*rows: tuple[int, int, int, int]) -> bytes:
    return struct.pack("=II", len(rows), 0) + b"".join(struct.pack("=QQQQ", *row) for row in rows)


@dataclass
class Served:
    """A worker in a thread of this process."""

    path: str
    kernels: list[FakeKernel]
    packets: FakePackets
    life: int
    thread: threading.Thread
    complaints: list[str]
    statuses: list[int]

    def connect(self) -> FrontEnd:
        return FrontEnd(self.path)

    def end_life(self) -> None:
        if self.life >= 0:
            os.close(self.life)
            self.life = -1

    def is_over(self) -> bool:
        self.thread.join(10)
        return not self.thread.is_alive()


@pytest.fixture
def pairs() -> int:
    return 1


@pytest.fixture
def has_header() -> bool:
    return True


@pytest.fixture
def served(tmp_path, pairs, has_header) -> Iterator[Served]:
    complaints: list[str] = []
    listener = socket.socket(socket.AF_UNIX)
    path = str(tmp_path / "s")
    listener.bind(path)
    listener.listen()
    life, kept = os.pipe()
    kernels = [FakeKernel() for _ in range(pairs)]
    packets = FakePackets(has_header)
    worker = vhost_user.Worker(
        listener, life, packets, kernels, kernel_features=KERNEL_FEATURES, complain=complaints.append
    )
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(worker.run()))
    thread.start()
    made = Served(path, kernels, packets, kept, thread, complaints, statuses)
    yield made
    made.end_life()
    assert made.is_over()
    listener.close()
    os.close(life)


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("guest")
    os.ftruncate(descriptor, SIZE)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def kick() -> Iterator[int]:
    descriptor = os.eventfd(0)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def call() -> Iterator[int]:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def front(served: Served) -> Iterator[FrontEnd]:
    made = served.connect()
    yield made
    made.socket.close()


def running(front: FrontEnd, memory: int, kick: int) -> None:
    """Both rings run."""
    front.own()
    front.say(18, state(0, 1))
    front.say(18, state(1, 1))
    front.table((GUEST, SIZE, FRONT, 0), fds=[memory])
    for index in (0, 1):
        front.ring(index, kick, base=5 + index)
    front.settle()


ROW = (GUEST, SIZE, FRONT, 0)


# --- what is offered ------------------------------------------------------------------------------


def test_a_guest_is_offered_what_kernel_and_packet_socket_have_and_never_bit_27():
    assert offered_features(KERNEL_FEATURES, has_header=False) == (
        1 << 15 | 1 << 24 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32
    )
    offloads = sum(1 << bit for bit in (0, 1, 7, 8, 11, 12))
    assert (
        offered_features(KERNEL_FEATURES, has_header=True)
        & ~offered_features(KERNEL_FEATURES, has_header=False)
        == offloads
    )
    assert offered_features(1 << 32, has_header=False) == 1 << 32 | 1 << 30


def test_a_front_end_learns_of_queues_and_answers(front):
    assert front.get(1) == offered_features(KERNEL_FEATURES, has_header=True)
    assert front.get(15) == 1 << 0 | 1 << 3
    assert front.get(17) == 1


@pytest.mark.parametrize(
    ("features", "header"), [(MODERN, 12), (1 << 30 | 1 << 15, 12), (1 << 30, 10), (1 << 30 | 1 << 32, 12)]
)
def test_the_header_is_as_long_as_the_guest_has_it(served, front, features, header):
    front.own(features)
    front.settle()
    assert served.packets.headers == [header]
    assert ("features", features & ~(1 << 30)) in served.kernels[0].said


@pytest.mark.parametrize("has_header", [False])
def test_without_a_header_the_kernel_makes_it(served, front):
    front.own()
    front.settle()
    assert served.kernels[0].said == [("own",), ("features", 1 << 32 | 1 << 15 | 1 << 27)]
    assert served.packets.headers == []


# --- rings ----------------------------------------------------------------------------------------


def test_rings_run_once_they_are_kicked_and_enabled(served, front, memory, kick):
    front.own()
    front.table(ROW, fds=[memory])
    front.ring(0, kick, base=7)
    front.settle()
    kernel = served.kernels[0]
    assert kernel.said[2:] == [("memory", (GUEST, SIZE)), ("kick", 0, True)]
    front.say(18, state(0, 1))
    front.settle()
    assert kernel.said[-1] == ("start", 0, 64, 7, 2 * PAGE, 100)
    front.say(18, state(0, 0))
    front.settle()
    assert kernel.said[-1] == ("stop", 0)


def test_a_front_end_without_protocol_features_enables_nothing(served, front, memory, kick):
    front.say(3)
    front.say(2, u64(1 << 32))
    front.table(ROW, fds=[memory])
    front.ring(1, kick)
    front.settle()
    assert served.kernels[0].said[-1] == ("start", 1, 64, 0, 2 * PAGE, 100)


def test_a_guest_reboots_and_its_rings_start_where_they_are_told(served, front, memory, kick):
    running(front, memory, kick)
    kernel = served.kernels[0]
    kernel.base = 41
    assert front.ask(11, state(0, 0)) == state(0, 41)
    assert front.ask(11, state(1, 0)) == state(1, 41)
    assert kernel.said[-4:] == [("stop", 0), ("kick", 0, False), ("stop", 1), ("kick", 1, False)]
    # Enabled they are still: nothing says it again.
    front.ring(0, kick, size=256, base=0)
    front.settle()
    assert kernel.said[-1] == ("start", 0, 256, 0, 2 * PAGE, 100)


def test_other_memory_takes_the_place_of_the_old_while_no_ring_runs(served, front, memory, kick):
    running(front, memory, kick)
    kernel = served.kernels[0]
    kernel.base = 9
    more = os.memfd_create("dimm")
    os.ftruncate(more, SIZE)
    before = len(kernel.said)
    front.table(ROW, (1 << 32, SIZE, FRONT + (1 << 32), 0), fds=[memory, more])
    front.settle()
    os.close(more)
    assert kernel.said[before:] == [
        ("stop", 0),
        ("stop", 1),
        ("memory", (GUEST, SIZE), (1 << 32, SIZE)),
        ("start", 0, 64, 9, 2 * PAGE, 100),
        ("start", 1, 64, 9, 2 * PAGE, 100),
    ]


def test_interrupts_change_while_a_ring_runs(served, front, memory, kick):
    running(front, memory, kick)
    front.say(13, u64(1), [kick])
    front.say(13, u64(1 | 1 << 8))
    front.say(14, u64(0), [kick])
    front.settle()
    assert served.kernels[0].said[-3:] == [("call", 1, True), ("call", 1, False), ("error", 0, True)]


def test_a_guest_looks_at_a_ring_once_it_can_be_interrupted(front, memory, kick, call):
    running(front, memory, kick)
    front.say(13, u64(0), [call])
    front.settle()
    assert os.eventfd_read(call) == 1


def test_the_same_features_again_stop_nothing(served, front, memory, kick):
    running(front, memory, kick)
    before = list(served.kernels[0].said)
    front.say(2, u64(MODERN))
    front.settle()
    assert served.kernels[0].said == before
    front.say(2, u64(1 << 30))
    front.settle()
    words = [words[0] for words in served.kernels[0].said[len(before) :]]
    assert words == ["stop", "stop", "features", "start", "start"]


@pytest.mark.parametrize("pairs", [2])
def test_several_queues_are_offered_to_the_guest_where_there_are_some(front, pairs):
    assert front.get(1) & 1 << 22


@pytest.mark.parametrize("pairs", [2])
def test_each_pair_of_rings_has_its_own_device_and_socket(served, front, memory, kick):
    running(front, memory, kick)
    assert served.packets.spreads[-1] == 1
    for index in (2, 3):
        front.say(18, state(index, 1))
        front.ring(index, kick)
    front.settle()
    assert served.packets.spreads[-1] == 2
    starts = [[words[-1] for words in one.said if words[0] == "start"] for one in served.kernels]
    assert starts == [[100, 100], [101, 101]]
    front.say(18, state(2, 0))
    front.settle()
    assert served.packets.spreads[-1] == 1


def test_who_asks_for_an_answer_gets_one(front, memory):
    front.own()
    assert front.ask(5, table(ROW), [memory], flags=9) == u64(0)
    assert front.ask(18, state(0, 1), flags=9) == u64(0)
    # What is answered anyway is answered once.
    assert front.ask(11, state(0, 0), flags=9) == state(0, 0)
    front.settle()


def test_without_reply_ack_nothing_is_answered_that_is_no_question(front):
    front.say(16, u64(0))
    front.say(3, flags=9)
    front.settle()


def test_a_message_may_come_in_pieces(served, front):
    data = struct.pack("=III", 3, 1, 0) + struct.pack("=IIIQ", 2, 1, 8, MODERN)
    for at in range(len(data)):
        front.socket.send(data[at : at + 1])
    front.settle()
    assert [words[0] for words in served.kernels[0].said] == ["own", "features"]


# --- connections ----------------------------------------------------------------------------------


def test_who_only_connects_is_in_nobodys_way(served):
    idle = [served.connect() for _ in range(3)]
    front = served.connect()
    front.own()
    front.settle()
    assert served.kernels[0].said[0] == ("own",)
    second = idle[0]
    second.say(3)
    assert second.is_dropped()
    front.settle()
    assert "another connection has set the owner already" in served.complaints[0]
    for one in (*idle, front):
        one.socket.close()


def test_too_many_connections_are_closed(served):
    held = [served.connect() for _ in range(8)]
    for one in held:
        one.settle()
    held.append(served.connect())
    assert held[-1].is_dropped()
    for one in held:
        one.socket.close()


def test_a_worker_ends_with_the_front_end_that_it_served(served, front, memory, kick):
    running(front, memory, kick)
    front.socket.close()
    assert served.is_over()
    assert served.statuses == [0]
    assert not served.kernels[0].is_open
    assert served.complaints == []


def test_a_worker_ends_with_the_guest(served, front):
    front.own()
    front.settle()
    served.end_life()
    assert served.is_over()


# --- what can't be --------------------------------------------------------------------------------

RING = struct.pack("=IIQQQQ", 0, 0, FRONT, FRONT + 2 * PAGE, FRONT + PAGE, 0)

# A request, what follows it, how many descriptors of memory are beside it, and what is said of it.
ODD = [
    (99, b"", 0, "a request 99"),
    (6, u64(0), 0, "a request 6"),
    (2, b"1234", 0, "SET_FEATURES with 4 bytes"),
    (2, u64(1 << 26), 0, "features 0x4000000 that were not offered"),
    (2, u64(1 << 27), 0, "features 0x8000000 that were not offered"),
    (2, u64(1 << 33), 0, "that were not offered"),
    (16, u64(1 << 1), 0, "protocol features 0x2 that were not offered"),
    (3, b"", 0, "SET_OWNER twice"),
    (5, b"1234", 0, "SET_MEM_TABLE with 4 bytes"),
    (5, bytes(8 + 9 * 32), 0, "SET_MEM_TABLE with 296 bytes"),
    (5, struct.pack("=II", 9, 0), 0, "a memory table of 9 regions"),
    (5, table(ROW), 0, "has 40 bytes and 0 descriptors"),
    (5, table(ROW), 2, "has 40 bytes and 2 descriptors"),
    (5, table(ROW), 9, "more than 8 descriptors"),
    (5, struct.pack("=II", 0xFFFFFFFF, 0), 0, "a memory table of 4294967295 regions"),
    (5, table((GUEST, SIZE + 1, FRONT, 0)), 1, "a region ends at"),
    (5, table((GUEST, SIZE, FRONT, 1)), 1, "a region ends at"),
    (5, table((GUEST, SIZE, FRONT, (1 << 64) - 1)), 1, "a region ends at"),
    (5, table((GUEST, 1 << 63, FRONT, 0)), 1, "a region ends at"),
    (5, table((GUEST, 0, FRONT, 0)), 1, "can't be"),
    (5, table(((1 << 64) - PAGE, 2 * PAGE, FRONT, 0)), 1, "in the guest can't be"),
    (5, table((GUEST, 2 * PAGE, (1 << 64) - PAGE, 0)), 1, "in the front-end can't be"),
    (5, table(ROW, (GUEST + SIZE - PAGE, PAGE, FRONT + SIZE, 0)), 2, "overlap at 0x10f000 in the guest"),
    (5, table(ROW, (GUEST + SIZE, PAGE, FRONT + SIZE - PAGE, 0)), 2, "in the front-end"),
    (5, table(ROW, ROW), 2, "overlap"),
    (8, state(0, 0), 0, "ring 0 with 0 entries"),
    (8, state(0, 3), 0, "ring 0 with 3 entries"),
    (8, state(0, 1 << 16), 0, "ring 0 with 65536 entries"),
    (8, state(2, 64), 0, "there is no ring 2"),
    (8, state(0xFFFFFFFF, 64), 0, "there is no ring 4294967295"),
    (10, state(0, 1 << 16), 0, "ring 0 begins at 65536"),
    (11, state(7, 0), 0, "there is no ring 7"),
    (18, state(2, 1), 0, "there is no ring 2"),
    (12, u64(0), 0, "is and is not without a descriptor"),
    (12, u64(0), 2, "SET_VRING_KICK with 2 descriptors"),
    (12, u64(0 | 1 << 8), 0, "is to be polled"),
    (13, u64(1 << 8), 1, "is and is not without a descriptor"),
    (13, u64(0xFF), 1, "there is no ring 255"),
    (2, u64(MODERN), 1, "SET_FEATURES with 1 descriptors"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "data", "fds", "wanted"), ODD)
def test_what_cannot_be_ends_the_connection_and_is_said(served, front, memory, request_, data, fds, wanted):
    front.own()
    front.settle()
    before = list(served.kernels[0].said)
    front.say(request_, data, [memory] * fds)
    assert front.is_dropped()
    assert served.is_over()
    (complaint,) = served.complaints
    assert wanted in complaint
    assert served.kernels[0].said == before
    assert served.statuses == [0]


@pytest.mark.parametrize("flags", [0, 2, 3, 5])
def test_other_versions_and_answers_are_no_requests(served, front, flags):
    front.say(1, flags=flags)
    assert front.is_dropped()
    assert "GET_FEATURES with flags" in served.complaints[0]


@pytest.mark.parametrize("request_", [2, 4, 8, 9, 10, 11, 12, 13, 14, 18])
def test_nothing_is_changed_for_who_is_no_owner(served, front, request_):
    front.say(request_, bytes(40 if request_ == 9 else 0 if request_ == 4 else 8))
    assert front.is_dropped()
    assert "before SET_OWNER" in served.complaints[0]
    assert served.kernels[0].said == []


@pytest.mark.parametrize(
    ("size", "at"),
    [
        (64, FRONT - 16),
        (64, FRONT + SIZE),
        (64, FRONT + SIZE - PAGE),  # the used ring is beyond
        (1 << 15, FRONT),  # fits with fewer entries only
        (64, (1 << 64) - 3 * PAGE),
        (64, 0),
    ],
)
def test_a_ring_outside_of_the_memory_never_starts(served, front, memory, kick, size, at):
    front.own()
    front.table(ROW, fds=[memory])
    front.say(18, state(0, 1))
    front.ring(0, kick, size=size, at=at)
    assert front.is_dropped()
    assert served.is_over()
    assert "in no region" in served.complaints[0]
    assert "start" not in [words[0] for words in served.kernels[0].said]


def test_a_ring_that_grows_beyond_its_memory_stops(served, front, memory, kick):
    running(front, memory, kick)
    front.say(8, state(0, 1 << 15))
    assert front.is_dropped()
    assert served.is_over()
    assert served.kernels[0].said[-1] == ("stop", 0)


def test_a_ring_whose_memory_goes_stops(served, front, memory, kick):
    running(front, memory, kick)
    front.table((GUEST, PAGE, FRONT, 0), fds=[memory])
    assert front.is_dropped()
    assert served.is_over()
    assert [words[0] for words in served.kernels[0].said][-3:] == ["stop", "stop", "memory"]


def test_what_is_no_memory_is_not_mapped(served, front, tmp_path):
    front.own()
    with open("/dev/zero", "r+b", buffering=0) as zero:
        front.table(ROW, fds=[zero.fileno()])
        assert front.is_dropped()
    assert "no memory" in served.complaints[0]


def test_memory_that_may_not_be_written_is_not_mapped(served, front, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(bytes(SIZE))
    front.own()
    with path.open("rb") as file:
        front.table(ROW, fds=[file.fileno()])
        assert front.is_dropped()
    assert "can't be mapped" in served.complaints[0]


@pytest.mark.parametrize("word", ["own", "features", "memory", "kick", "start"])
def test_what_the_kernel_refuses_is_said(served, front, memory, kick, word):
    served.kernels[0].refuses = word
    front.own()
    front.table(ROW, fds=[memory])
    front.say(18, state(0, 1))
    front.ring(0, kick)
    assert front.is_dropped()
    assert served.is_over()
    assert "the kernel refuses SET_" in served.complaints[0]


def test_a_half_message_keeps_nobody_waiting_and_leaves_no_descriptor(served, memory):
    slow = served.connect()
    slow.own()
    slow.settle()
    before = len(os.listdir("/proc/self/fd"))
    slow.socket.sendmsg(
        [struct.pack("=III", 5, 1, 40)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))]
    )
    other = served.connect()
    other.settle()
    other.socket.close()
    slow.socket.close()
    assert served.is_over()
    assert len(os.listdir("/proc/self/fd")) < before


def test_no_descriptor_stays_of_what_was_handled(served, front, memory, kick):
    running(front, memory, kick)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        front.say(13, u64(0), [kick])
        front.table(ROW, fds=[memory])
    front.settle()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_waiting_worker_sleeps(served, front):
    front.own()
    front.settle()
    # Nothing is to be read, so nothing was left half-handled.
    assert not select.select([front.socket], [], [], 0.1)[0]
