"""Frames on a stream, as QEMU's -netdev stream has them: each after its length, 4 bytes in network order.

(net_fill_rstate, net/net.c.) QEMU takes all that came at one turn of its main loop, where its -netdev dgram
takes one frame a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vnet_lock.datapath.frames import BadFrame, Buffer

_LENGTH = 4
# NET_BUFSIZE, include/net/net.h: QEMU sends and takes no longer ones.
_LONGEST = 65536 + 4096


def packed(frames: Iterable[Buffer]) -> memoryview:
    """What is to be sent for these frames."""
    return memoryview(b"".join(part for frame in frames for part in (len(frame).to_bytes(_LENGTH), frame)))


class Unpacker:
    """Finds the frames in what comes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """The frames that are whole now. BadFrame where a length can be none: all that follows is lost."""
        data = self._rest + data if self._rest else data
        view, at = memoryview(data), 0
        while at + _LENGTH <= len(view):
            length = int.from_bytes(view[at : at + _LENGTH])
            if length > _LONGEST:
                raise BadFrame(f"a frame of {length} bytes")
            end = at + _LENGTH + length
            if end > len(view):
                break
            yield view[at + _LENGTH : end]
            at = end
        self._rest = bytes(view[at:])
