"""The guest's memory, mapped into this process for the kernel to use. We never look into it."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from collections.abc import Sequence

from vnet_lock.dataclass import dataclass
from vnet_lock.datapath.vhost_message import ProtocolError

_MOST = 1 << 64
# What a mapping's place in a huge page's file may be a multiple of.
_BIGGEST_PAGE = 1 << 34


@dataclass(slots=True)
class _Mapped:
    """A region: the guest's own address of it, QEMU's, and ours."""

    guest_address: int
    size: int
    front_address: int
    address: int
    mapping: mmap.mmap


class Memory:
    """A memory table; without regions to begin with."""

    def __init__(self) -> None:
        self._mapped: list[_Mapped] = []

    @classmethod
    def map(cls, regions: Sequence[tuple[int, int, int, int]], fds: Sequence[int]) -> Memory:
        """Map each region of its descriptor, which the caller may close then.

        A region is the guest's address, a size, the front-end's address and an offset in the descriptor.
        Raises ProtocolError for what can't be.
        """
        _check_apart([(row[0], row[1]) for row in regions], "in the guest")
        _check_apart([(row[2], row[1]) for row in regions], "in the front-end")
        memory = cls()
        try:
            for row, descriptor in zip(regions, fds, strict=True):
                memory._map(*row, descriptor)
        except BaseException:
            memory.close()
            raise
        return memory

    @property
    def table(self) -> list[tuple[int, int, int]]:
        """The guest's address, size and our address of each region."""
        return [(one.guest_address, one.size, one.address) for one in self._mapped]

    def translate(self, front_address: int, size: int) -> int:
        """Our address of ``size`` bytes that the front-end has at another; ProtocolError outside of all."""
        for one in self._mapped:
            offset = front_address - one.front_address
            if offset >= 0 and offset + size <= one.size:
                return one.address + offset
        raise ProtocolError(f"{size} bytes at {front_address:#x} are in no region of the guest's memory")

    def close(self) -> None:
        """Unmap everything; the kernel must have been told of other memory before."""
        while self._mapped:
            self._mapped.pop().mapping.close()

    def _map(self, guest_address: int, size: int, front_address: int, offset: int, descriptor: int) -> None:
        found = os.fstat(descriptor)
        # What else can be mapped would be a device's own memory.
        if not stat.S_ISREG(found.st_mode):
            raise ProtocolError("a region's descriptor is no memory, nor a file")
        # In huge pages a place is a multiple of their size, which is what a block is there.
        page = found.st_blksize
        if page & (page - 1) or not mmap.PAGESIZE <= page <= _BIGGEST_PAGE:
            page = mmap.PAGESIZE
        # Where nothing is behind it the kernel's accesses fail, and ours would end the process.
        if offset + size > found.st_size:
            raise ProtocolError(f"a region ends at {offset + size:#x} of {found.st_size:#x} bytes")
        start = offset - offset % page
        # A huge page is mapped whole.
        length = min(-(-(offset - start + size) // page) * page, found.st_size - start)
        try:
            mapping = mmap.mmap(descriptor, length, mmap.MAP_SHARED, offset=start)
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"a region of {size:#x} bytes can't be mapped: {error}") from error
        # Not the guest's secrets into a core of ours.
        mapping.madvise(mmap.MADV_DONTDUMP)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + offset - start
        self._mapped.append(_Mapped(guest_address, size, front_address, address, mapping))


def _check_apart(spans: Sequence[tuple[int, int]], where: str) -> None:
    """Raise ProtocolError where one is empty, goes beyond the last address, or overlaps another."""
    end = 0
    for start, size in sorted(spans):
        if not size or start + size > _MOST:
            raise ProtocolError(f"a region of {size:#x} bytes at {start:#x} {where} can't be")
        if start < end:
            raise ProtocolError(f"two regions overlap at {start:#x} {where}")
        end = start + size
