"""What a process's descriptor stands for: a tap, a macvtap, vhost-net, a file. Reads only."""

from __future__ import annotations

import os
import stat
from enum import StrEnum

from vnet_lock.dataclass import dataclass
from vnet_lock.errors import Unsupported, Vanished
from vnet_lock.kernel.sysfs import list_netdevs, read_macvtap_rdev
from vnet_lock.settings import Settings


class DescriptorKind(StrEnum):
    """What is behind a descriptor, as far as a guest's network and files go."""

    TAP = "tap"
    MACVTAP = "macvtap"
    FILE = "file"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """``name`` is the network device's name, the file's path, or what /proc shows of anything else."""

    kind: DescriptorKind
    name: str


def read_descriptor(settings: Settings, pid: int, number: int) -> Descriptor:
    """What is behind a process's descriptor; Vanished where it has none of that number.

    A macvtap is known by its device number, never by a node's name: minors are global, and names like
    /dev/tap7 are not. Unsupported where we may not look.
    """
    path = f"{settings.proc}/{pid}/fd/{number}"
    try:
        target = os.readlink(path)
        found = os.stat(path)
    except FileNotFoundError as error:
        raise Vanished(f"pid {pid} has no descriptor {number} (any more)") from error
    except PermissionError as error:
        raise Unsupported(
            f"the descriptors of pid {pid} may not be read by this user; run as root"
        ) from error
    if stat.S_ISREG(found.st_mode):
        return Descriptor(DescriptorKind.FILE, target.removesuffix(" (deleted)"))
    if stat.S_ISCHR(found.st_mode):
        tap = _read_tap(settings, pid, number)
        if tap:
            return Descriptor(DescriptorKind.TAP, tap)
        for netdev in list_netdevs(settings):
            if read_macvtap_rdev(settings, netdev) == found.st_rdev:
                return Descriptor(DescriptorKind.MACVTAP, netdev)
    return Descriptor(DescriptorKind.OTHER, target)


def _read_tap(settings: Settings, pid: int, number: int) -> str:
    """The name of the tap that a descriptor of /dev/net/tun is of; empty where it is of none."""
    try:
        with open(f"{settings.proc}/{pid}/fdinfo/{number}", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    # tun_chr_show_fdinfo, drivers/net/tun.c; a macvtap has no such line.
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("iff:")), "")
