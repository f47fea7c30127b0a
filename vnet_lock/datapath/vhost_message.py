"""The messages of vhost-user: their form on the socket, and what can't be one.

As QEMU's docs/interop/vhost-user.rst has them. What they mean is vhost_device.py's.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from enum import IntEnum

from vnet_lock.dataclass import dataclass, field
from vnet_lock.errors import VnetLockError

_HEADER = struct.Struct("=III")  # request, flags, size of what follows
_VERSION, _VERSION_MASK, _REPLY, _NEED_REPLY = 1, 0x3, 0x4, 0x8
MAX_REGIONS = 8  # VHOST_USER_MAX_RAM_SLOTS of a back-end without CONFIGURE_MEM_SLOTS
REGION = struct.Struct("=QQQQ")  # guest's address, size, front-end's address, offset in the descriptor


class ProtocolError(VnetLockError):
    """What the front-end sent can't be; its connection ends."""


class Request(IntEnum):
    """What QEMU asks of a back-end that has only the features that we offer."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18


# How long what follows the header is; a memory table is longer with each region.
_SIZES = {
    Request.SET_FEATURES: 8,
    Request.SET_MEM_TABLE: 8,
    Request.SET_VRING_NUM: 8,
    Request.SET_VRING_ADDR: 40,
    Request.SET_VRING_BASE: 8,
    Request.GET_VRING_BASE: 8,
    Request.SET_VRING_KICK: 8,
    Request.SET_VRING_CALL: 8,
    Request.SET_VRING_ERR: 8,
    Request.SET_PROTOCOL_FEATURES: 8,
    Request.SET_VRING_ENABLE: 8,
}
_WITH_ONE = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)


@dataclass(slots=True)
class Message:
    """One request; its descriptors are ours, and closed with it."""

    request: Request
    data: bytes = b""
    fds: list[int] = field(default_factory=list)
    wants_reply: bool = False

    def close(self) -> None:
        """Let go of the descriptors."""
        while self.fds:
            os.close(self.fds.pop())

    def u64(self) -> int:
        """What follows, where that is one number."""
        return int(struct.unpack("=Q", self.data)[0])

    def state(self) -> tuple[int, int]:
        """A ring's index and a number for it."""
        index, number = struct.unpack("=II", self.data)
        return index, number

    def regions(self) -> list[tuple[int, int, int, int]]:
        """The rows of a memory table, each as REGION has it."""
        count = struct.unpack_from("=II", self.data)[0]
        size = _SIZES[Request.SET_MEM_TABLE] + count * REGION.size
        if count > MAX_REGIONS or len(self.data) != size or len(self.fds) != count:
            has = f"{len(self.data)} bytes and {len(self.fds)} descriptors"
            raise ProtocolError(f"a memory table of {count} regions has {has}")
        return [REGION.unpack_from(self.data, 8 + at * REGION.size) for at in range(count)]


def reply(request: Request, data: bytes) -> bytes:
    """An answer as it goes over the socket."""
    return _HEADER.pack(request, _VERSION | _REPLY, len(data)) + data


class Reader:
    """Takes messages from a socket as they come, in whatever pieces, and never waits for the rest.

    No more than the rest of one message is read at a time, so that descriptors are that message's.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = b""
        self._fds: list[int] = []

    def read(self) -> Message | None:
        """The next message; None while it isn't there as a whole.

        EOFError at the end, ProtocolError where it can't be a message, OSError where the socket fails.
        """
        while (missing := self._missing()) > 0:
            try:
                chunk, ancillary, flags, _ = self._connection.recvmsg(
                    missing, socket.CMSG_SPACE(MAX_REGIONS * 4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return None
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                    self._fds += numbers
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_REGIONS:
                raise ProtocolError(f"more than {MAX_REGIONS} descriptors beside one message")
            if not chunk:
                raise EOFError
            self._data += chunk
        return self._take()

    def close(self) -> None:
        """Let go of descriptors of a message that never came to its end."""
        while self._fds:
            os.close(self._fds.pop())

    def _missing(self) -> int:
        """How many bytes are to come still."""
        if len(self._data) < _HEADER.size:
            return _HEADER.size - len(self._data)
        number, flags, size = _HEADER.unpack_from(self._data)
        try:
            request = Request(number)
        except ValueError as error:
            raise ProtocolError(f"a request {number}, which is none that was offered") from error
        if flags & _VERSION_MASK != _VERSION or flags & _REPLY:
            raise ProtocolError(f"{request.name} with flags {flags:#x}")
        least = most = _SIZES.get(request, 0)
        if request is Request.SET_MEM_TABLE:
            most += MAX_REGIONS * REGION.size
        if not least <= size <= most:
            raise ProtocolError(f"{request.name} with {size} bytes")
        return _HEADER.size + int(size) - len(self._data)

    def _take(self) -> Message:
        number, flags, _ = _HEADER.unpack_from(self._data)
        message = Message(
            Request(number), self._data[_HEADER.size :], self._fds, wants_reply=bool(flags & _NEED_REPLY)
        )
        self._data, self._fds = b"", []
        most = 1 if message.request in _WITH_ONE else 0
        if message.request is not Request.SET_MEM_TABLE and len(message.fds) > most:
            problem = f"{message.request.name} with {len(message.fds)} descriptors"
            message.close()
            raise ProtocolError(problem)
        return message
