"""Opens device nodes: macvtap and tap queues, vhost-net. Changes no links; netlink.py does.

The caller owns the descriptors. They are close-on-exec: giving them to a child is the caller's choice.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vnet_lock.errors import Unsupported, Vanished, VnetLockError
from vnet_lock.kernel.sysfs import list_names, read_macvtap_rdev
from vnet_lock.settings import Settings

# include/uapi/linux/if_tun.h
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
# struct ifreq: a name of 16 bytes and a union, of which TUNSETIFF reads the first 16 bits.
_IFREQ = struct.Struct("=16sH22x")
# What the name of a node of our own begins with; the macvtap's name follows.
_NODE = ".vnet-lock-"


def open_macvtap(settings: Settings, ifname: str, queues: int = 1, has_header: bool = True) -> list[int]:
    """One descriptor for each queue of a macvtap, set up as QEMU and libvirt expect them.

    /dev/tap<ifindex> is never trusted: minors are global and ifindexes are not, so with two network
    namespaces it may be another's. The device number stands in sysfs, and a node of our own is made for
    it, opened and unlinked. Every open is a queue, so nothing is opened just to look.

    Vanished where there is no such macvtap; Unsupported where device nodes can't be made or opened.
    """
    rdev = read_macvtap_rdev(settings, ifname)
    if rdev is None:
        raise Vanished(f"{ifname} is no macvtap of this network namespace; see: ip -d link show {ifname}")
    with _private_node(settings, ifname, rdev) as node:
        return _open_queues(node, ifname, queues, has_header)


def try_node(settings: Settings) -> None:
    """Make, open and remove a node of our own, for the null device (mem(4)); raises as open_macvtap does."""
    null = os.makedev(1, 3)
    try:
        with _private_node(settings, "null", null) as node:
            os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise _explain(error, "null", 1) from error


def remove_nodes(settings: Settings, ifname: str) -> None:
    """Remove the nodes of our own for a macvtap that is gone: who was killed while he opened it left one."""
    for name in list_names(settings.dev):
        if name.startswith(f"{_NODE}{ifname}-"):
            try:
                os.unlink(f"{settings.dev}/{name}")
            except FileNotFoundError:
                continue  # its maker was there still
            except OSError as error:
                raise VnetLockError(f"cannot remove {settings.dev}/{name}: {error.strerror}") from error


def open_tap(settings: Settings, ifname: str, queues: int = 1, has_header: bool = True) -> list[int]:
    """One descriptor for each queue of a tap that exists.

    Vanished where there is none; VnetLockError where it is busy or was made for another number of queues.
    """
    # TUNSETIFF would make a device that isn't there.
    if not os.path.exists(f"{settings.sys}/class/net/{ifname}/tun_flags"):
        raise Vanished(f"{ifname} is no tap of this network namespace; see: ip -d link show {ifname}")
    return _open_queues(f"{settings.dev}/net/tun", ifname, queues, has_header)


def end_with_descriptor(descriptor: int) -> None:
    """Make a tap go with the last descriptor that has it open, as one does that was never made to stay."""
    import fcntl

    fcntl.ioctl(descriptor, _TUNSETPERSIST, 0)


def open_vhost_net(settings: Settings, count: int = 1) -> list[int]:
    """That many descriptors of vhost-net; Unsupported where the kernel has none or we may not open it."""
    path = f"{settings.dev}/vhost-net"
    try:
        return _open_all(path, count)
    except OSError as error:
        # A node without its module says ENODEV or ENXIO.
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise Unsupported(f"{path}: this kernel offers no vhost-net; run: modprobe vhost_net") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Unsupported(
                f"{path} may not be opened by this user; run as root, or see: ls -l {path}"
            ) from error
        raise VnetLockError(f"cannot open {path}: {error.strerror}") from error


@contextmanager
def _private_node(settings: Settings, ifname: str, rdev: int) -> Iterator[str]:
    """A node for a character device, for us alone, gone afterwards.

    It is made in /dev: /run is usually mounted nodev, and there it could not be opened.
    """
    node = f"{settings.dev}/{_NODE}{ifname}-{os.urandom(4).hex()}"
    try:
        os.mknod(node, stat.S_IFCHR | 0o600, rdev)
    except OSError as error:
        raise Unsupported(
            f"cannot make a device node for {ifname} in {settings.dev}: {error.strerror};"
            " it takes root outside of user namespaces"
        ) from error
    try:
        yield node
    finally:
        with suppress(FileNotFoundError):  # the claim was given back by another meanwhile
            os.unlink(node)


def _open_queues(node: str, ifname: str, queues: int, has_header: bool) -> list[int]:
    """Open a tap's or macvtap's node once for each queue, with or without vnet headers.

    These are the flags that libvirt sets (virNetDevMacVLanTapSetup, virNetDevTapCreate). A macvtap's queue
    only lets itself be switched off, which a guest with fewer queues needs, where IFF_MULTI_QUEUE is set.
    """
    import fcntl  # only when something is opened

    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    flags |= _IFF_VNET_HDR if has_header else 0
    request = _IFREQ.pack(ifname.encode(), flags)
    try:
        descriptors = _open_all(node, queues)
    except OSError as error:
        raise _explain(error, ifname, queues) from error
    try:
        for descriptor in descriptors:
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except OSError as error:
        _close_all(descriptors)
        raise _explain(error, ifname, queues) from error
    return descriptors


def _open_all(path: str, count: int) -> list[int]:
    """Several descriptors of one node; all or none."""
    descriptors: list[int] = []
    try:
        for _ in range(count):
            descriptors.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        _close_all(descriptors)
        raise
    return descriptors


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _explain(error: OSError, ifname: str, queues: int) -> VnetLockError:
    """What a failed open or TUNSETIFF means."""
    if error.errno == errno.EBUSY:
        return VnetLockError(f"{ifname}: all its queues are open already; see: vnet-lock show nic:{ifname}")
    if error.errno == errno.EINVAL:
        return VnetLockError(
            f"{ifname} cannot be opened with {queues} queue(s): it was made for another number, or is no tap;"
            f" see: ip -d link show {ifname}"
        )
    if error.errno == errno.E2BIG:
        return Unsupported(f"{ifname}: {queues} queues are more than the kernel allows for one tap")
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return Vanished(f"{ifname} is gone, or the tun module is not loaded; run: modprobe tun")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Unsupported(
            f"{ifname}: its device may not be opened here: {error.strerror}; run as root, where device"
            " nodes work (not mounted nodev)"
        )
    return VnetLockError(f"cannot open {ifname}: {error.strerror}")
