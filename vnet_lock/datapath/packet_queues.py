"""The packet sockets of a guest's queues: their header, and which of them gets what. Opens none."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence

# include/uapi/linux/if_packet.h
_SOL_PACKET = 263
_PACKET_FANOUT, _PACKET_FANOUT_DATA, _PACKET_VNET_HDR_SZ = 18, 22, 24
_FANOUT_CBPF, _FANOUT_UNIQUEID, _FANOUT_IGNORE_OUTGOING = 6, 0x2000, 0x4000


class PacketQueues:
    """One socket for each pair of rings, all on one device. The caller owns them."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = sockets
        # What an earlier worker told the kernel isn't known.
        self._spread: int | None = None
        self.has_header = self._try_header()

    @property
    def pairs(self) -> int:
        """How many there are."""
        return len(self._sockets)

    def fileno(self, pair: int) -> int:
        """The descriptor of a pair's socket."""
        return self._sockets[pair].fileno()

    def set_header(self, size: int) -> None:
        """The size of the virtio header before each packet: 12 bytes, or 10 for guests before virtio 1."""
        for one in self._sockets:
            one.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR_SZ, size)

    def spread(self, pairs: int) -> None:
        """Let the first so many sockets share what comes, each flow by one of them; others get nothing."""
        if pairs != self._spread and len(self._sockets) > 1:
            program = ctypes.create_string_buffer(_pack(spread_program(pairs)))
            # struct sock_fprog: how many instructions, and where they are.
            filter_ = struct.pack("@HP", len(program.raw) // 8, ctypes.addressof(program))
            self._sockets[0].setsockopt(_SOL_PACKET, _PACKET_FANOUT_DATA, filter_)
            self._spread = pairs

    def _try_header(self) -> bool:
        """Whether the kernel has the option (since 6.5, commit dfc39d4026fb)."""
        try:
            self.set_header(12)
        except OSError:
            return False
        return True


def share(sockets: Sequence[socket.socket]) -> None:
    """Make bound packet sockets of one device a group, in which each packet is one's alone (packet(7))."""
    if len(sockets) < 2:
        return
    # A group has a flag of its own for what the sockets were told before.
    kind = (_FANOUT_CBPF | _FANOUT_UNIQUEID | _FANOUT_IGNORE_OUTGOING) << 16
    for one in sockets:
        one.setsockopt(_SOL_PACKET, _PACKET_FANOUT, struct.pack("=I", kind))
        # The first got a number that no other group of its namespace has; the others take it, too.
        kind = one.getsockopt(_SOL_PACKET, _PACKET_FANOUT) & ~(_FANOUT_UNIQUEID << 16)


Instruction = tuple[int, int, int, int]

# include/uapi/linux/bpf_common.h, filter.h: loads of a word, a half and a byte; jumps and arithmetic.
_LD_W, _LD_H, _LD_B, _LD_MEM, _ST, _TAX = 0x20, 0x28, 0x30, 0x60, 0x02, 0x07
_JEQ, _JSET, _AND, _RSH, _XOR_X, _MOD, _RET_K, _RET_A = 0x15, 0x45, 0x54, 0x74, 0xAC, 0x94, 0x06, 0x16
_NET, _PROTOCOL = 0xFFF00000, 0xFFFFF000  # SKF_NET_OFF; SKF_AD_OFF + SKF_AD_PROTOCOL


def spread_program(pairs: int) -> list[Instruction]:
    """A classic BPF program that gives each flow of IP one of ``pairs`` numbers, in both directions the same.

    Not the kernel's own hash: that is 0 where no driver made one. Addresses and, of TCP and UDP that is in
    one piece and has no options, ports.
    """
    v4 = _fold([12, 16])
    v6 = _fold([8, 12, 16, 20, 24, 28, 32, 36])
    ports = [(_LD_W, 0, 0, _NET + 20), *_mixed()]
    # Of IPv4: whatever isn't 20 bytes of header, whole, and TCP or UDP, is told by its addresses.
    whole: list[Instruction] = [
        (_LD_B, 0, 0, _NET),
        (_JEQ, 0, 5 + len(ports), 0x45),
        (_LD_H, 0, 0, _NET + 6),
        (_JSET, 3 + len(ports), 0, 0x3FFF),
        (_LD_B, 0, 0, _NET + 9),
        (_JEQ, 1, 0, 6),
        (_JEQ, 0, len(ports), 17),
    ]
    ports6 = [(_LD_W, 0, 0, _NET + 40), *_mixed()]
    whole6: list[Instruction] = [(_LD_B, 0, 0, _NET + 6), (_JEQ, 1, 0, 6), (_JEQ, 0, len(ports6), 17)]
    end: list[Instruction] = [
        *[(_LD_MEM, 0, 0, 0), (_RSH, 0, 0, 16), (_TAX, 0, 0, 0), (_LD_MEM, 0, 0, 0), (_XOR_X, 0, 0, 0)],
        *[(_ST, 0, 0, 1), (_RSH, 0, 0, 8), (_TAX, 0, 0, 0), (_LD_MEM, 0, 0, 1), (_XOR_X, 0, 0, 0)],
        *[(_AND, 0, 0, 0xFFFF), (_MOD, 0, 0, pairs), (_RET_A, 0, 0, 0)],
    ]
    six = [*v6, *whole6, *ports6, *end]
    four = [*v4, *whole, *ports, *end]
    return [
        (_LD_H, 0, 0, _PROTOCOL),
        (_JEQ, 0, len(four), 0x0800),
        *four,
        (_JEQ, 0, len(six), 0x86DD),
        *six,
        (_RET_K, 0, 0, 0),
    ]


def _fold(offsets: Sequence[int]) -> list[Instruction]:
    """Word 0 of the scratch memory: the exclusive or of these words behind the start of the IP header."""
    made: list[Instruction] = [(_LD_W, 0, 0, _NET + offsets[0])]
    for offset in offsets[1:]:
        made += [(_TAX, 0, 0, 0), (_LD_W, 0, 0, _NET + offset), (_XOR_X, 0, 0, 0)]
    return [*made, (_ST, 0, 0, 0)]


def _mixed() -> list[Instruction]:
    """Into word 0 the two ports in the accumulator, whichever is first."""
    return [
        *[(_ST, 0, 0, 1), (_RSH, 0, 0, 16), (_TAX, 0, 0, 0), (_LD_MEM, 0, 0, 1), (_XOR_X, 0, 0, 0)],
        *[(_AND, 0, 0, 0xFFFF), (_TAX, 0, 0, 0), (_LD_MEM, 0, 0, 0), (_XOR_X, 0, 0, 0), (_ST, 0, 0, 0)],
    ]


def _pack(program: Sequence[Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
