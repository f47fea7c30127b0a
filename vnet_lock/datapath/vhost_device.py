"""One front-end's device: what its messages do to rings, memory and features of the kernel's vhost-net.

A ring's state is kept here and given to the kernel as a whole each time that the ring starts, so that
nothing is ever started on what was checked for another state.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from vnet_lock.dataclass import dataclass
from vnet_lock.datapath.vhost_memory import Memory
from vnet_lock.datapath.vhost_message import Message, ProtocolError, Request

# Bits of VHOST_USER_GET_PROTOCOL_FEATURES: several queues, and an answer to every message.
_MQ, _REPLY_ACK = 1 << 0, 1 << 3
_PROTOCOL_FEATURES = 1 << 30  # VHOST_USER_F_PROTOCOL_FEATURES
# To the kernel, the header is its own to make (VHOST_NET_F_VIRTIO_NET_HDR); to a guest it is ANY_LAYOUT.
_KERNEL_HEADER = 1 << 27
_MRG_RXBUF, _VERSION_1 = 1 << 15, 1 << 32
# With them NOTIFY_ON_EMPTY, RING_INDIRECT_DESC, RING_EVENT_IDX. Not LOG_ALL (26), which migration would take,
# nor IOMMU_PLATFORM (33), nor RING_PACKED (34).
_OF_KERNEL = _MRG_RXBUF | 1 << 24 | 1 << 28 | 1 << 29 | _VERSION_1
# CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6: the packet socket's, by its header.
_OFFLOADS = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12
# VIRTIO_NET_F_MQ: QEMU itself answers a guest that uses it, but offers it only where its back-end does.
_QUEUES = 1 << 22
_NO_DESCRIPTOR = 1 << 8  # VHOST_USER_VRING_NOFD_MASK
_MAX_RING = 1 << 15  # what a split ring can have
_U64 = struct.Struct("=Q")


class Kernel(Protocol):
    """What vhost_net.VhostNet has; it raises OSError where the kernel refuses."""

    def own(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102
    def set_features(self, features: int) -> None: ...  # noqa: D102
    def set_memory(self, regions: Sequence[tuple[int, int, int]]) -> None: ...  # noqa: D102
    def set_kick(self, ring: int, descriptor: int) -> None: ...  # noqa: D102
    def set_call(self, ring: int, descriptor: int) -> None: ...  # noqa: D102
    def set_error(self, ring: int, descriptor: int) -> None: ...  # noqa: D102
    def start(  # noqa: D102
        self, ring: int, size: int, base: int, addresses: tuple[int, int, int], socket: int
    ) -> None: ...
    def stop(self, ring: int) -> int: ...  # noqa: D102


class Packets(Protocol):
    """The packet sockets, one for each pair of rings."""

    @property
    def has_header(self) -> bool:
        """Whether they can have a virtio header before each packet, and so offloads."""

    def fileno(self, pair: int) -> int: ...  # noqa: D102
    def set_header(self, size: int) -> None: ...  # noqa: D102
    def spread(self, pairs: int) -> None:
        """Let the first so many of them share what comes."""


@dataclass(slots=True)
class _Ring:
    """What the front-end said of a ring; addresses are its own, of descriptors, used and available ring."""

    size: int = 0
    base: int = 0
    addresses: tuple[int, int, int] | None = None
    has_kick: bool = False
    is_enabled: bool = False
    is_running: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether it is to run."""
        return self.has_kick and self.is_enabled and self.addresses is not None and self.size > 0


def offered_features(kernel_features: int, has_header: bool) -> int:
    """What a guest can have on such packet sockets."""
    return (kernel_features & _OF_KERNEL) | _PROTOCOL_FEATURES | (_OFFLOADS if has_header else 0)


class Device:
    """What one connection makes of vhost-net; ``take`` gives it the kernel's devices, once it sets the owner.

    ``take`` raises ProtocolError where another connection has them. ``pairs`` is how many there are.
    """

    def __init__(
        self, offered: int, pairs: int, packets: Packets, take: Callable[[], Sequence[Kernel]]
    ) -> None:
        self._offered = offered | (_QUEUES if pairs > 1 else 0)
        self._packets = packets
        self._take = take
        self._kernels: Sequence[Kernel] = ()
        self._features: int | None = None
        self._protocol = 0
        self._memory = Memory()
        self._rings = [_Ring() for _ in range(2 * pairs)]

    @property
    def is_owner(self) -> bool:
        """Whether this connection is the one that is served."""
        return bool(self._kernels)

    def close(self) -> None:
        """Stop everything: the kernel lets go of the memory before we do."""
        for kernel in self._kernels:
            kernel.close()
        self._kernels = ()
        self._memory.close()

    def handle(self, message: Message) -> bytes | None:
        """Do what a message says; what the answer has, None without one.

        Raises ProtocolError where that can't be, or the kernel refuses it.
        """
        try:
            answer = self._handle(message)
        except OSError as error:
            name = message.request.name
            raise ProtocolError(f"the kernel refuses {name}: {error.strerror or error}") from error
        if answer is None and message.wants_reply and self._protocol & _REPLY_ACK:
            return _U64.pack(0)
        return answer

    def _handle(self, message: Message) -> bytes | None:
        known = {
            Request.GET_FEATURES: self._offered,
            Request.GET_PROTOCOL_FEATURES: _MQ | _REPLY_ACK,
            Request.GET_QUEUE_NUM: len(self._rings) // 2,
        }
        match message.request:
            case request if request in known:
                return _U64.pack(known[request])
            case Request.SET_PROTOCOL_FEATURES:
                self._protocol = self._only(message.u64(), _MQ | _REPLY_ACK, "protocol features")
            case Request.SET_OWNER:
                if self._kernels:
                    raise ProtocolError("SET_OWNER twice")
                self._kernels = self._take()
                for kernel in self._kernels:
                    kernel.own()
            case _ if not self._kernels:
                raise ProtocolError(f"{message.request.name} before SET_OWNER")
            case Request.SET_FEATURES:
                self._set_features(self._only(message.u64(), self._offered, "features"))
            case Request.SET_MEM_TABLE:
                self._set_memory(message)
            case Request.RESET_OWNER:
                for index in range(len(self._rings)):
                    self._halt(index)
            case _:
                return self._handle_ring(message)
        return None

    def _handle_ring(self, message: Message) -> bytes | None:
        match message.request:
            case Request.SET_VRING_NUM:
                index, size = message.state()
                if not 0 < size <= _MAX_RING or size & (size - 1):
                    raise ProtocolError(f"ring {index} with {size} entries")
                self._stopped(index).size = size
            case Request.SET_VRING_BASE:
                index, base = message.state()
                if base > 0xFFFF:
                    raise ProtocolError(f"ring {index} begins at {base}")
                self._stopped(index).base = base
            case Request.SET_VRING_ADDR:
                index, _, *addresses, _ = struct.unpack("=IIQQQQ", message.data)
                descriptors, used, available = addresses
                self._stopped(index).addresses = (descriptors, used, available)
            case Request.SET_VRING_ENABLE:
                index, state = message.state()
                self._ring(index).is_enabled = bool(state)
            case Request.GET_VRING_BASE:
                index, _ = message.state()
                self._halt(index)
                return struct.pack("=II", index, self._ring(index).base)
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                self._set_eventfd(message)
            case _:
                # The others were handled before; a new one is a defect of ours.
                raise AssertionError(message.request)
        self._update()
        return None

    def _set_eventfd(self, message: Message) -> None:
        word = message.u64()
        index = word & 0xFF
        ring = self._ring(index)
        if bool(message.fds) is bool(word & _NO_DESCRIPTOR):
            raise ProtocolError(f"{message.request.name} of ring {index} is and is not without a descriptor")
        descriptor = message.fds[0] if message.fds else -1
        kernel = self._kernels[index // 2]
        if message.request is Request.SET_VRING_CALL:
            kernel.set_call(index % 2, descriptor)
            if descriptor >= 0:
                # QEMU has a ring run before it gives the guest's own interrupt, and forgets what came until
                # then; the kernel says nothing again before the guest has looked.
                os.eventfd_write(descriptor, 1)
        elif message.request is Request.SET_VRING_ERR:
            kernel.set_error(index % 2, descriptor)
        elif descriptor < 0:
            raise ProtocolError(f"ring {index} is to be polled, which vhost-net can't")
        else:
            kernel.set_kick(index % 2, descriptor)
            ring.has_kick = True

    def _set_features(self, features: int) -> None:
        if not features & _PROTOCOL_FEATURES:
            # Such a front-end knows no SET_VRING_ENABLE.
            for ring in self._rings:
                ring.is_enabled = True
        # QEMU says them once for each pair, while other pairs run.
        if features != self._features:
            for index in range(len(self._rings)):
                self._stopped(index)
            kernels = features & _OF_KERNEL
            # Also for a guest that takes no offloads: a checksum that a local peer left to be made is known
            # by the header alone, and Linux heeds one that it didn't ask for.
            if self._packets.has_header:
                self._packets.set_header(12 if features & (_MRG_RXBUF | _VERSION_1) else 10)
            else:
                kernels |= _KERNEL_HEADER
            for kernel in self._kernels:
                kernel.set_features(kernels)
            self._features = features
        self._update()

    def _set_memory(self, message: Message) -> None:
        memory = Memory.map(message.regions(), message.fds)
        old = self._memory
        try:
            for index in range(len(self._rings)):
                self._stopped(index)
            for kernel in self._kernels:
                kernel.set_memory(memory.table)
        except BaseException:
            memory.close()
            raise
        self._memory = memory
        old.close()
        self._update()

    def _update(self) -> None:
        """Let those rings run that are to, and no others."""
        for index, ring in enumerate(self._rings):
            if ring.is_running and not ring.is_wanted:
                self._stopped(index)
        # Before a pair's first packet, and after its last.
        self._packets.spread(max(1, sum(ring.is_wanted for ring in self._rings[::2])))
        for index, ring in enumerate(self._rings):
            if ring.is_wanted and not ring.is_running:
                self._start(index, ring)

    def _start(self, index: int, ring: _Ring) -> None:
        if ring.addresses is None or self._features is None:
            raise ProtocolError(f"ring {index} is to run before SET_FEATURES")
        descriptors, used, available = ring.addresses
        # Sizes as virtio has them, with the two bytes of RING_EVENT_IDX.
        addresses = (
            self._memory.translate(descriptors, 16 * ring.size),
            self._memory.translate(used, 6 + 8 * ring.size),
            self._memory.translate(available, 6 + 2 * ring.size),
        )
        socket = self._packets.fileno(index // 2)
        self._kernels[index // 2].start(index % 2, ring.size, ring.base, addresses, socket)
        ring.is_running = True

    def _stopped(self, index: int) -> _Ring:
        """A ring that doesn't run, so that it may be changed; ``_update`` starts it again."""
        ring = self._ring(index)
        if ring.is_running:
            ring.base = self._kernels[index // 2].stop(index % 2)
            ring.is_running = False
        return ring

    def _halt(self, index: int) -> None:
        """A ring that doesn't run until it gets a new kick; it stays enabled (a guest's reboot)."""
        ring = self._stopped(index)
        if ring.has_kick:
            ring.has_kick = False
            self._kernels[index // 2].set_kick(index % 2, -1)

    def _ring(self, index: int) -> _Ring:
        if index >= len(self._rings):
            raise ProtocolError(f"there is no ring {index}")
        return self._rings[index]

    def _only(self, asked: int, offered: int, what: str) -> int:
        if asked & ~offered:
            raise ProtocolError(f"{what} {asked & ~offered:#x} that were not offered")
        return asked
