"""The kernel's vhost-net: one pair of rings, as ioctls (include/uapi/linux/vhost.h). Knows no protocol."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence

_SET_OWNER = 0xAF01
_GET_FEATURES, _SET_FEATURES = 0x8008AF00, 0x4008AF00
_SET_MEM_TABLE = 0x4008AF03
_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE = 0x4008AF10, 0x4028AF11, 0x4008AF12
_GET_VRING_BASE = 0xC008AF12
_SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ERR = 0x4008AF20, 0x4008AF21, 0x4008AF22
_SET_BACKEND = 0x4008AF30

_STATE = struct.Struct("=II")  # struct vhost_vring_state
_FILE = struct.Struct("=Ii")  # struct vhost_vring_file; -1 is none
_ADDR = struct.Struct("=IIQQQQ")  # struct vhost_vring_addr: index, flags, desc, used, avail, log
_MEMORY = struct.Struct("=II")  # struct vhost_memory: how many, padding; then the regions
_REGION = struct.Struct("=QQQQ")  # struct vhost_memory_region: guest's address, size, ours, padding
_FEATURES = struct.Struct("=Q")


class VhostNet:
    """A descriptor of /dev/vhost-net. Ring 0 is what the guest receives by, ring 1 what it sends by.

    Everything raises OSError where the kernel refuses.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: str) -> VhostNet:
        """A new device, by vhost-net's node, which nobody owns yet."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def close(self) -> None:
        """Let go of it: its rings stop, and its thread ends."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def own(self) -> None:
        """The kernel reads and writes this process's memory from now on, in a thread that it makes."""
        fcntl.ioctl(self._descriptor, _SET_OWNER)

    def read_features(self) -> int:
        """The features that the kernel has, a bit each."""
        answer = fcntl.ioctl(self._descriptor, _GET_FEATURES, bytes(_FEATURES.size))
        return int(_FEATURES.unpack(answer)[0])

    def set_features(self, features: int) -> None:
        """Those that are used."""
        fcntl.ioctl(self._descriptor, _SET_FEATURES, _FEATURES.pack(features))

    def set_memory(self, regions: Sequence[tuple[int, int, int]]) -> None:
        """Where the guest's memory is: the guest's address, size and our own address of each region."""
        packed = b"".join(_REGION.pack(guest, size, address, 0) for guest, size, address in regions)
        fcntl.ioctl(self._descriptor, _SET_MEM_TABLE, _MEMORY.pack(len(regions), 0) + packed)

    def set_kick(self, ring: int, descriptor: int) -> None:
        """The eventfd by which the guest says that there is work; -1 for none."""
        fcntl.ioctl(self._descriptor, _SET_VRING_KICK, _FILE.pack(ring, descriptor))

    def set_call(self, ring: int, descriptor: int) -> None:
        """The eventfd by which the guest is interrupted; -1 for none."""
        fcntl.ioctl(self._descriptor, _SET_VRING_CALL, _FILE.pack(ring, descriptor))

    def set_error(self, ring: int, descriptor: int) -> None:
        """The eventfd by which the kernel says that a ring makes no sense; -1 for none."""
        fcntl.ioctl(self._descriptor, _SET_VRING_ERR, _FILE.pack(ring, descriptor))

    def start(self, ring: int, size: int, base: int, addresses: tuple[int, int, int], socket: int) -> None:
        """Let a stopped ring run on a packet socket.

        ``addresses`` are ours, of the descriptors, the used and the available ring; ``base`` is the index of
        the first entry that is new.
        """
        fcntl.ioctl(self._descriptor, _SET_VRING_NUM, _STATE.pack(ring, size))
        fcntl.ioctl(self._descriptor, _SET_VRING_BASE, _STATE.pack(ring, base))
        fcntl.ioctl(self._descriptor, _SET_VRING_ADDR, _ADDR.pack(ring, 0, *addresses, 0))
        fcntl.ioctl(self._descriptor, _SET_BACKEND, _FILE.pack(ring, socket))

    def stop(self, ring: int) -> int:
        """Let a ring run no more; the index of its first entry that is new."""
        fcntl.ioctl(self._descriptor, _SET_BACKEND, _FILE.pack(ring, -1))
        answer = fcntl.ioctl(self._descriptor, _GET_VRING_BASE, _STATE.pack(ring, 0))
        return int(_STATE.unpack(answer)[1])
