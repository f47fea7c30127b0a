"""Finds network devices in other network namespaces. Looks only; moves nothing, and stays in its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from vnet_lock.dataclass import dataclass
from vnet_lock.errors import VnetLockError
from vnet_lock.kernel.netlink_wire import open_route_socket
from vnet_lock.kernel.netns import call_in
from vnet_lock.kernel.processes import iterate_pids
from vnet_lock.kernel.rtnetlink import LinkInfo, read_links, read_nsid
from vnet_lock.settings import Settings

if TYPE_CHECKING:
    from socket import socket

# Kinds of devices that stand on another one. IFLA_LINK of a veth is its peer.
_UPPER_KINDS = ("macvlan", "macvtap", "vlan", "ipvlan", "ipvtap")
# What looking into a namespace gives that is gone by now, or that isn't ours to enter.
_SHUT = (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTDIR)


@dataclass(frozen=True, slots=True)
class Namespace:
    """Another network namespace: ``path`` opens it; it has a process in it, a name, or both."""

    path: str
    pid: int | None
    name: str = ""

    @property
    def text(self) -> str:
        """In words."""
        return f'network namespace "{self.name}"' if self.name else f"the network namespace of pid {self.pid}"


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What was found in other namespaces: network devices by their parent's name, uppers by lower ifindex."""

    netdevs: dict[str, tuple[Namespace, LinkInfo]]
    uppers: dict[int, list[tuple[Namespace, LinkInfo]]]


def search(settings: Settings, parents: Collection[str], lowers: Collection[int]) -> Elsewhere:
    """Look through all other network namespaces.

    ``parents`` are names of devices (PCI addresses) that have no network device in this namespace; this
    needs kernel 5.14 (IFLA_PARENT_DEV_NAME). ``lowers`` are ifindexes of this namespace: a macvlan that was
    moved away is in no upper_* link of sysfs. What can't be entered is passed over: be root.
    """
    found = Elsewhere({}, {})
    if not parents and not lowers:
        return found
    for namespace in iterate_namespaces(settings):
        route = _open_in(namespace)
        if route is None:
            continue
        with route:
            links = read_links(route)
            for link in links:
                if link.parent is not None and link.parent in parents:
                    found.netdevs[link.parent] = (namespace, link)
            uppers = [link for link in links if link.kind in _UPPER_KINDS and link.link in lowers]
            if uppers:
                nsid = _read_own_nsid(settings, route)
                for link in uppers:
                    if link.link is not None and nsid is not None and link.link_nsid == nsid:
                        found.uppers.setdefault(link.link, []).append((namespace, link))
    return found


def iterate_namespaces(settings: Settings) -> Iterator[Namespace]:
    """All other network namespaces that a process is in or that are mounted somewhere (ip netns, Docker)."""
    own = _identify(f"{settings.proc}/self/ns/net")
    mounted = _read_mounted(settings)
    seen = {own}
    for pid in sorted(iterate_pids(settings)):
        path = f"{settings.proc}/{pid}/ns/net"
        inode = _identify(path)
        if inode is not None and inode not in seen:
            seen.add(inode)
            yield Namespace(path, pid, os.path.basename(mounted.get(inode, "")))
    for inode, path in mounted.items():
        if inode not in seen:
            seen.add(inode)
            yield Namespace(path, None, os.path.basename(path))


def _identify(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError as error:
        if error.errno in _SHUT:
            return None
        raise VnetLockError(f"cannot look at {path}: {error.strerror}") from error


def _read_mounted(settings: Settings) -> dict[int, str]:
    """Where namespaces are mounted, by inode: field 4 of mountinfo is net:[INODE] there (proc(5))."""
    found: dict[int, str] = {}
    try:
        with open(f"{settings.proc}/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                fields = line.split(" ", 5)
                if len(fields) == 6 and fields[3].startswith("net:[") and fields[3].endswith("]"):
                    found.setdefault(int(fields[3][5:-1]), fields[4])
    except (FileNotFoundError, PermissionError):
        return {}
    return found


def _read_own_nsid(settings: Settings, route: socket) -> int | None:
    """The number under which another namespace knows this one."""
    own = os.open(f"{settings.proc}/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_nsid(route, own)
    finally:
        os.close(own)


def _open_in(namespace: Namespace) -> socket | None:
    """A netlink socket of a namespace; None where it is gone or not ours to enter."""
    try:
        return _open_socket_in(namespace.path)
    except OSError as error:
        if error.errno in _SHUT:
            return None
        raise VnetLockError(f"cannot enter network namespace {namespace.path}: {error.strerror}") from error


def _open_socket_in(path: str) -> socket:
    """A netlink socket of another namespace; it stays where it was opened."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return call_in(descriptor, open_route_socket)
    finally:
        os.close(descriptor)
