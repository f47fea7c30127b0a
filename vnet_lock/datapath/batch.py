"""Receives and sends many packets with one call: recvmmsg(2), sendmmsg(2), which Python hasn't.

Each of a batch's slots is received into again and again, so what was received is good until the next receive.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterable
from typing import Any, ClassVar

Buffer = bytes | bytearray | memoryview

# A frame of 64 KiB with all that may be before it; QEMU's own buffers have 4 KiB more (net/net.h).
_SLOT = 65536 + 4096
_CONTROL = 64
_MSG_DONTWAIT, _MSG_TRUNC = 0x40, 0x20


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """struct msghdr."""

    _fields_: ClassVar[Any] = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(_Header):
    """struct mmsghdr: a header, and how long what was received is."""

    _fields_: ClassVar[Any] = (("length", ctypes.c_uint),)


_LIBC = ctypes.CDLL(None, use_errno=True)
for _call in (_LIBC.recvmmsg, _LIBC.sendmmsg):
    _call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)


class Batch:
    """Packets received together, each to be sent on from its slot.

    They are received at ``receive_at`` in their slots and sent from ``send_at``, where zeros are before what
    was received, or where what was received first is left out. With ``has_control`` each comes with its
    ancillary data.
    """

    def __init__(
        self, slots: int, *, receive_at: int = 0, send_at: int = 0, has_control: bool = False
    ) -> None:
        self._receive_at, self._send_at = receive_at, send_at
        self._control_length = _CONTROL if has_control else 0
        self._data = memoryview(bytearray(slots * _SLOT))
        self._controls = memoryview(bytearray(slots * _CONTROL))
        self._count = 0
        # Addresses stay good: nothing changes a bytearray's size while there is a view of it.
        data, controls = _address(self._data), _address(self._controls)
        self._in, self._in_vectors = _messages(slots, data + receive_at, _SLOT - receive_at)
        self._out, self._out_vectors = _messages(slots, data + send_at, 0)
        for at in range(slots) if has_control else ():
            self._in[at].control = controls + at * _CONTROL
            self._in[at].control_length = _CONTROL

    def receive(self, descriptor: int) -> int:
        """Receive what is there; how many packets. OSError where none is, or as recvmmsg(2) says."""
        for at in range(self._count if self._control_length else 0):
            self._in[at].control_length = self._control_length
        self._count = 0
        self._count = _checked(_LIBC.recvmmsg(descriptor, self._in, len(self._in), _MSG_DONTWAIT, None))
        return self._count

    def fill(self, frames: Iterable[Buffer]) -> int:
        """Put frames of our own into the slots, as many as there are, as if they had been received."""
        self._count = 0
        for frame in itertools.islice(frames, len(self._in)):
            start = self._count * _SLOT + self._receive_at
            self._data[start : start + len(frame)] = frame
            self._in[self._count].length = len(frame)
            self._count += 1
        return self._count

    def send(self, descriptor: int, first: int, end: int) -> int:
        """Send some of what was received, and return how many; OSError where not even the first could be."""
        more = self._receive_at - self._send_at
        for at in range(first, end):
            self._out_vectors[at].length = self._in[at].length + more
        start = ctypes.byref(self._out, first * ctypes.sizeof(_Message))
        return _checked(_LIBC.sendmmsg(descriptor, start, end - first, _MSG_DONTWAIT, None))

    def packet(self, at: int) -> memoryview:
        """What was received in a slot."""
        start = at * _SLOT + self._receive_at
        return self._data[start : start + self._in[at].length]

    def control(self, at: int) -> memoryview:
        """The ancillary data that came with it."""
        return self._controls[at * _CONTROL : at * _CONTROL + self._in[at].control_length]

    def is_whole(self, at: int) -> bool:
        """Whether it had room, and was anything."""
        return self._in[at].length > 0 and not self._in[at].flags & _MSG_TRUNC


def _messages(slots: int, start: int, length: int) -> tuple[ctypes.Array[_Message], ctypes.Array[_Iovec]]:
    """A message of one part for each slot."""
    messages, vectors = (_Message * slots)(), (_Iovec * slots)()
    for at in range(slots):
        vectors[at].base, vectors[at].length = start + at * _SLOT, length
        messages[at].iov = ctypes.pointer(vectors[at])
        messages[at].iov_length = 1
    return messages, vectors


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
