"""Carries frames between a guest's device and its QEMU, which takes no packet socket.

    vnet_lock.datapath.relay --packet=FD --guest=FD --netns=FD --ready=FD

``packet`` is a packet socket with virtio headers and auxiliary data on a device in the namespace ``netns``;
``guest`` is one end of a pair of unix sockets, SOCK_STREAM where the other end is QEMU's ``-netdev stream``,
SOCK_SEQPACKET where it is ``-netdev dgram`` or another program. A guest that doesn't take its frames loses
them at the packet socket, as at a NIC. The relay ends with its guest, and when its device goes for good.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import struct
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress

from vnet_lock.datapath.batch import Batch
from vnet_lock.datapath.frames import NEEDS_CSUM, BadFrame, Buffer, VnetHeader, finish, tagged
from vnet_lock.datapath.launch import report_ready
from vnet_lock.datapath.stream import Unpacker, packed
from vnet_lock.kernel.netns import enter

_SLOTS = 64
_CHUNK = 16
_HEADER = 10  # struct virtio_net_hdr
# What is taken from a stream at once: as much as a batch of whole frames of an Ethernet.
_STREAM = _SLOTS * 1518
# struct cmsghdr and struct tpacket_auxdata, include/uapi/linux/if_packet.h: of the first its type, of the
# second status, vlan_tci and vlan_tpid.
_AUXDATA = struct.Struct("@N4xiI12xHH")
_PACKET_AUXDATA, _VLAN_VALID, _VLAN_TPID_VALID = 8, 1 << 4, 1 << 6
_DEFAULT_TPID = 0x8100
_GUEST_IS_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED)
_NOBODY = 65534  # the kernel's overflowuid
_PR_SET_NO_NEW_PRIVS = 38


# What is to be sent: frames of our own making, a run of slots, first and end, or bytes of a stream.
Item = list[Buffer] | tuple[int, int] | memoryview


class GuestGone(Exception):
    """QEMU has closed its end."""


class Way:
    """One direction. What the sink doesn't take at once waits here, and nothing more is received then."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, batch: Batch, outbox: Batch | None = None
    ) -> None:
        self._source, self._sink, self._batch = source, sink, batch
        self.waiting: deque[Item] = deque()
        # Where frames of our own making are sent from.
        self._outbox = outbox or Batch(_CHUNK)

    def carry(self) -> None:
        """Receive a batch and send it. GuestGone where it shows."""
        try:
            count = self._batch.receive(self._source.fileno())
        except OSError as error:
            if error.errno in _GUEST_IS_GONE:
                raise GuestGone from error
            # Nothing there after all, the device went down, or a packet that virtio has no word for.
            return
        self._pass_on(self._prepared(count))

    def send(self) -> None:
        """Send what waits, as far as the sink takes it; what it can't take at all is dropped."""
        while self.waiting:
            try:
                left = self._send(self.waiting[0])
            except BlockingIOError:
                return
            if left:
                self.waiting[0] = left
            else:
                self.waiting.popleft()

    def _pass_on(self, items: Iterable[Item]) -> None:
        for item in items:
            is_blocked = bool(self.waiting)
            self.waiting.append(item)
            if not is_blocked:
                self.send()

    def _send(self, item: Item) -> Item | None:
        """Send an item as far as it goes and return what is left of it; BlockingIOError where none goes."""
        try:
            if isinstance(item, tuple):
                sent = self._batch.send(self._sink.fileno(), *item)
            else:
                assert isinstance(item, list)  # noqa: S101 - bytes are a stream's alone
                sent = self._outbox.send(self._sink.fileno(), 0, self._outbox.fill(item))
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in _GUEST_IS_GONE:
                raise GuestGone from error
            # Longer than the device's MTU, no room in its queue, device down: as on a wire.
            sent = 1
        if isinstance(item, tuple):
            first, end = item[0] + sent, item[1]
            return (first, end) if first < end else None
        return item[sent:]

    def _prepared(self, count: int) -> Iterator[Item]:
        """What is to be sent of a batch that was received, in order."""
        first = 0
        frames: list[Buffer] = []
        for at in range(count):
            made = self._made(at)
            if made is None:
                if frames:
                    yield frames
                    frames = []
                continue
            if first < at:
                yield first, at
            first = at + 1
            try:
                for frame in made:
                    frames.append(frame)
                    # The guest has the first segments while the next are made.
                    if len(frames) == _CHUNK:
                        yield frames
                        frames = []
            except BadFrame:
                continue
        if frames:
            yield frames
        if first < count:
            yield first, count

    def _made(self, at: int) -> Iterable[Buffer] | None:
        """What is sent in the place of a slot's packet; None: that itself. Reading it may raise BadFrame."""
        return None if self._batch.is_whole(at) else []


class ToGuest(Way):
    """From the packet socket: what the kernel left to its device is done here."""

    def _made(self, at: int) -> Iterable[Buffer] | None:
        batch = self._batch
        packet = batch.packet(at)
        if not batch.is_whole(at) or len(packet) <= _HEADER:
            return []
        tag = _read_tag(batch.control(at))
        if tag is None and not packet[0] & NEEDS_CSUM and not packet[1]:
            return None
        made = finish(VnetHeader.parse(packet), packet[_HEADER:])
        return made if tag is None else (tagged(frame, *tag) for frame in made)


class ToStream(ToGuest):
    """From the packet socket to a stream."""

    def _send(self, item: Item) -> Item | None:
        if isinstance(item, tuple):
            item = packed(self._batch.packet(at)[_HEADER:] for at in range(*item))
        elif isinstance(item, list):
            item = packed(item)
        # A part of a frame that was sent has to be followed by its rest, so it isn't made a second time.
        self.waiting[0] = item
        try:
            return item[self._sink.send(item, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            raise
        except OSError as error:
            raise GuestGone from error


class FromStream(Way):
    """From a stream to the packet socket."""

    def __init__(self, source: socket.socket, sink: socket.socket, outbox: Batch) -> None:
        super().__init__(source, sink, outbox, outbox)
        self._unpacker = Unpacker()

    def carry(self) -> None:
        """Receive what is there and send its frames. GuestGone where it shows."""
        try:
            data = self._source.recv(_STREAM, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise GuestGone from error
        if not data:
            raise GuestGone
        try:
            self._pass_on(self._chunks(self._unpacker.feed(data)))
        except BadFrame as error:
            raise GuestGone from error

    @staticmethod
    def _chunks(frames: Iterator[Buffer]) -> Iterator[Item]:
        while chunk := list(itertools.islice(frames, _SLOTS)):
            yield chunk


def _read_tag(control: Buffer) -> tuple[int, int] | None:
    """The VLAN tag, TPID and TCI, that the kernel or the NIC took from a frame."""
    if len(control) < _AUXDATA.size:
        return None
    _, kind, status, tci, tpid = _AUXDATA.unpack_from(control)
    if kind != _PACKET_AUXDATA or not status & _VLAN_VALID:
        return None
    return (tpid if status & _VLAN_TPID_VALID else _DEFAULT_TPID), tci


class Relay:
    """Both directions, and when they end."""

    def __init__(self, packet: socket.socket, guest: socket.socket) -> None:
        self._packet, self._guest = packet, guest
        is_stream = guest.type == socket.SOCK_STREAM
        to_guest, from_guest = (ToStream, FromStream) if is_stream else (ToGuest, Way)
        self._to_guest = to_guest(packet, guest, Batch(_SLOTS, send_at=_HEADER, has_control=True))
        self._from_guest = from_guest(guest, packet, Batch(_SLOTS, receive_at=_HEADER))

    def run(self) -> None:
        """Carry frames until the guest or the device is gone."""
        poll = select.poll()
        packet, guest = self._packet.fileno(), self._guest.fileno()
        with suppress(GuestGone):
            while True:
                # Whichever can't send receives nothing, so a guest that is stopped costs nothing.
                poll.register(packet, _mask(receives=self._to_guest, sends=self._from_guest))
                poll.register(guest, _mask(receives=self._from_guest, sends=self._to_guest))
                events = dict(poll.poll())
                from_packet, from_guest = events.get(packet, 0), events.get(guest, 0)
                if from_packet & select.POLLERR and self._is_device_gone():
                    return
                if from_packet & select.POLLOUT:
                    self._from_guest.send()
                if from_guest & select.POLLOUT:
                    self._to_guest.send()
                if from_packet & select.POLLIN and not self._to_guest.waiting:
                    self._to_guest.carry()
                if from_guest & select.POLLIN and not self._from_guest.waiting:
                    self._from_guest.carry()
                if from_guest & select.POLLHUP:
                    return

    def _is_device_gone(self) -> bool:
        """After an error of the packet socket, which is no more then: a device that is down comes back."""
        self._packet.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        # The socket has no device any more once that was unregistered (packet_notifier), and so no name.
        return not self._packet.getsockname()[0]


def _mask(*, receives: Way, sends: Way) -> int:
    return (0 if receives.waiting else select.POLLIN) | (select.POLLOUT if sends.waiting else 0)


def main() -> None:
    """Serve one guest."""
    given = {name: int(value) for name, _, value in (word[2:].partition("=") for word in sys.argv[1:])}
    try:
        enter(given["netns"])
        os.close(given["netns"])
        relay = Relay(socket.socket(fileno=given["packet"]), socket.socket(fileno=given["guest"]))
        _drop_rights()
    except OSError as error:
        report_ready(given["ready"], error.strerror or str(error))
        return
    report_ready(given["ready"])
    try:
        relay.run()
    except Exception:
        _log_defect()
        raise


def _log_defect() -> None:
    """Nobody sees our standard error, and the guest's network is gone."""
    import syslog
    import traceback

    syslog.openlog("vnet-lock", syslog.LOG_PID, syslog.LOG_DAEMON)
    for line in traceback.format_exc().splitlines():
        syslog.syslog(syslog.LOG_ERR, line)


def _drop_rights() -> None:
    """All is open, so nothing takes rights any more."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.chdir("/")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


if __name__ == "__main__":
    main()
