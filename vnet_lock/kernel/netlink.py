"""Makes, changes and removes network devices. The only user of pyroute2.

Importing this module costs nothing; its functions load pyroute2 (250 ms) when they are called. Reading is
rtnetlink.py's, a PF's VFs vfs.py's. Devices are meant by their name in this network namespace.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vnet_lock.errors import BadInput, Unsupported, Vanished, VnetLockError
from vnet_lock.kernel import netlink_errors
from vnet_lock.kernel.netlink_errors import explained
from vnet_lock.kernel.netlink_wire import read_ifindex
from vnet_lock.kernel.netns import call_in
from vnet_lock.kernel.rtnetlink import read_links
from vnet_lock.settings import DEFAULT, Settings

_MODES = ("bridge", "passthru", "private", "vepa")
# include/uapi/linux/if.h
_IFF_UP, _IFF_NOARP, _IFF_ALLMULTI = 0x1, 0x80, 0x200
# include/uapi/linux/if_tun.h
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI = 0x0002, 0x0100, 0x1000
_IFF_VNET_HDR, _IFF_TUN_EXCL = 0x4000, 0x8000
_IFREQ = struct.Struct("=16sH22x")  # struct ifreq
# enum in6_addr_gen_mode, include/uapi/linux/if_link.h
_ADDRGENMODES = {"eui64": 0, "none": 1, "stable_secret": 2, "random": 3}


def add_macvtap(name: str, lower: str, mode: str, mac: str, alias: str) -> None:
    """Make a macvtap with a MAC and an ifalias: down, allmulticast on, without IPv6 addresses of its own.

    ``mode`` is ``bridge``, ``vepa``, ``private`` or ``passthru``, which gives its MAC to ``lower``, too,
    unless that has it already. Where a step fails nothing stays behind.
    """
    add_macvlan(name, lower, mode, mac, alias, kind="macvtap")


def add_macvlan(
    name: str,
    lower: str,
    mode: str,
    mac: str,
    alias: str,
    *,
    namespace: int | None = None,
    kind: str = "macvlan",
) -> None:
    """Make a macvlan as add_macvtap makes a macvtap, in the namespace that a descriptor is of, if any."""
    if mode not in _MODES:
        raise BadInput(f"{kind} mode {mode!r} is none of: {', '.join(_MODES)}")
    index = read_ifindex(lower)
    words: dict[str, Any] = {f"{kind}_mode": mode}
    if namespace is not None:
        words["net_ns_fd"] = namespace
    meanings = {errno.EOPNOTSUPP: f"this kernel has no {kind}; run: modprobe {kind}"}
    meanings |= netlink_errors.NEW_MACVLAN
    with _route() as route:
        with _explained(f"making {kind} {name} (mode {mode}, MAC {mac}) on {lower}", lower, meanings):
            route.link("add", ifname=name, kind=kind, link=index, address=mac, **words)
        # In passthru mode the kernel takes the lower device's MAC, whatever was asked for
        # (macvlan_common_newlink). A VF may refuse even the MAC that it has, so that isn't written.
        is_other = mode == "passthru" and _read_mac(route, lower, index) != mac.lower()

    def finish() -> None:
        # vepa and passthru drop multicast, IPv6 neighbour discovery with it, until allmulticast is on.
        _finish(name, alias, mac=mac if is_other else None, allmulticast=True, addrgenmode="none")

    if namespace is None:
        finish()
    else:
        call_in(namespace, finish)


def add_tap(name: str, alias: str, *, queues: int = 1, settings: Settings = DEFAULT) -> None:
    """Make a tap that stays until it is removed, with an ifalias: down, without IPv6 addresses of its own.

    One that has several queues can only be opened as one that has.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    path = f"{settings.dev}/net/tun"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = (
            "run: modprobe tun" if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO) else "run as root"
        )
        raise Unsupported(f"cannot make tap {name}: {path}: {error.strerror}; {hint}") from error
    try:
        with explained(f"making tap {name}", name, netlink_errors.NEW_TAP):
            fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
            fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
    finally:
        os.close(descriptor)
    _finish(name, alias, addrgenmode="none")


def add_bridge(name: str, mac: str, alias: str) -> None:
    """Make a bridge with a MAC that its ports don't change, and an ifalias: down, without IPv6 addresses.

    It keeps VLANs apart where the kernel can. Where a step fails nothing stays behind.
    """
    what = f"making bridge {name}"
    with _route() as route:
        try:
            with _explained(what, name, netlink_errors.NEW_BRIDGE):
                route.link("add", ifname=name, kind="bridge", address=mac, br_vlan_filtering=1)
        except Unsupported:
            with _explained(what, name, netlink_errors.NEW_BRIDGE):
                route.link("add", ifname=name, kind="bridge", address=mac)
    _finish(name, alias, addrgenmode="none")


def add_veth(name: str, peer: str, alias: str) -> None:
    """Make a pair of joined devices, both down; ``peer`` goes with ``name``, wherever it is then.

    ``name`` carries the ifalias, and gets no IPv6 addresses of its own. Where a step fails nothing stays.
    """
    with _route() as route, _explained(f"making veth {name} with peer {peer}", name, netlink_errors.NEW_VETH):
        route.link("add", ifname=name, kind="veth", peer={"ifname": peer})
    _finish(name, alias, addrgenmode="none")


def add_vlan(name: str, lower: str, vlan: int, alias: str) -> None:
    """Make an 802.1Q VLAN device with an ifalias: down, without IPv6 addresses of its own."""
    index = read_ifindex(lower)
    with (
        _route() as route,
        _explained(f"making VLAN device {name} (VLAN {vlan}) on {lower}", lower, netlink_errors.NEW_VLAN),
    ):
        route.link("add", ifname=name, kind="vlan", link=index, vlan_id=vlan)
    _finish(name, alias, addrgenmode="none")


def rename_link(old: str, new: str) -> None:
    """Give a device another name; VnetLockError where another has it."""
    if "%" in new:
        # The kernel puts a number in the place of %d (dev_alloc_name).
        raise BadInput(f"{new!r} cannot be a device's name")
    _set(old, f"renaming {old} to {new}", netlink_errors.RENAME, ifname=new)


def set_link(
    ifname: str,
    *,
    up: bool | None = None,
    mac: str | None = None,
    mtu: int | None = None,
    allmulticast: bool | None = None,
    arp: bool | None = None,
    addrgenmode: str | None = None,
) -> None:
    """Change what is not None. ``addrgenmode`` is ``none``, ``eui64``, ``random`` or ``stable_secret``.

    What may fail comes before the device is set up; set down, it is so before all else.
    """
    if addrgenmode is not None and addrgenmode not in _ADDRGENMODES:
        raise BadInput(f"addrgenmode {addrgenmode!r} is none of: {', '.join(_ADDRGENMODES)}")
    if up is False:
        _set(ifname, f"setting {ifname} down", {}, flags=0, change=_IFF_UP)
    if mtu is not None:
        _set(ifname, f"setting the MTU of {ifname} to {mtu}", netlink_errors.MTU, mtu=mtu)
    if mac is not None:
        _set(ifname, f"setting the MAC of {ifname} to {mac}", netlink_errors.MAC, address=mac)
    if addrgenmode is not None:
        inet6 = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDRGENMODES[addrgenmode])]}
        what = f"setting addrgenmode of {ifname} to {addrgenmode}"
        try:
            _set(ifname, what, {}, af_spec={"attrs": [("AF_INET6", inet6)]})
        except Unsupported:
            # EAFNOSUPPORT: a kernel without IPv6 gives no address by itself either.
            if addrgenmode != "none":
                raise
    if allmulticast is not None:
        flags = _IFF_ALLMULTI if allmulticast else 0
        _set(ifname, f"setting allmulticast of {ifname}", {}, flags=flags, change=_IFF_ALLMULTI)
    if arp is not None:
        _set(ifname, f"setting ARP of {ifname}", {}, flags=0 if arp else _IFF_NOARP, change=_IFF_NOARP)
    if up:
        _set(ifname, f"setting {ifname} up", netlink_errors.UP, flags=_IFF_UP, change=_IFF_UP)


def move_link(ifname: str, namespace: int) -> None:
    """Move a device, which goes down by that, to the network namespace that a descriptor is of."""
    _set(ifname, f"moving {ifname} to a namespace of its own", netlink_errors.MOVE, net_ns_fd=namespace)


def set_master(ifname: str, bridge: str | None) -> None:
    """Make a device a port of a bridge (or slave of a bond); None: of none."""
    if bridge is None:
        _set(ifname, f"taking {ifname} out of its bridge", {}, master=0)
    else:
        what = f"making {ifname} a port of {bridge}"
        _set(ifname, what, netlink_errors.MASTER, master=read_ifindex(bridge))


def change(
    ifname: str, what: str, meanings: dict[int, str], request: Callable[[Any, int], object], /
) -> None:
    """Ask the kernel for one change about a device: ``request`` gets pyroute2's IPRoute and its ifindex.

    ``what`` is said where it fails, with what its errno means. For what is about more than the link itself.
    """
    index = read_ifindex(ifname)
    with _route() as route, _explained(what, ifname, meanings):
        request(route, index)


def read_macvtap_mode(name: str) -> str:
    """The mode of a macvtap: ``bridge``, ``vepa``, ``private`` or ``passthru``; Vanished where it is none."""
    index = read_ifindex(name)
    with _route() as route, _explained(f"reading {name}", name, {}):
        link = route.link("get", index=index)[0]
    mode = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_MACVTAP_MODE")
    if mode not in _MODES:
        raise Vanished(f"{name} is no macvtap (any more); see: ip -d link show {name}")
    return str(mode)


def remove_link(name: str, alias: str) -> bool:
    """Remove the device that has this name or, renamed since, this ifalias; False where there is none."""
    removed = False
    for link in read_links():
        if link.name != name and not (alias and link.alias == alias):
            continue
        try:
            with _route() as route, _explained(f"removing {link.name}", link.name, {}):
                route.link("del", index=link.ifindex)
        except Vanished:
            continue
        removed = True
    return removed


@contextmanager
def _explained(what: str, device: str, meanings: dict[int, str]) -> Iterator[None]:
    """As ``explained``, which knows nothing of pyroute2's own error."""
    from pyroute2.netlink.exceptions import NetlinkError

    with explained(what, device, meanings):
        try:
            yield
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from error


@contextmanager
def _route() -> Iterator[Any]:
    from pyroute2 import IPRoute  # 250 ms

    with IPRoute() as route:
        yield route


def _set(ifname: str, what: str, meanings: dict[int, str], /, **attributes: Any) -> None:
    change(ifname, what, meanings, lambda route, index: route.link("set", index=index, **attributes))


def _finish(name: str, alias: str, **attributes: Any) -> None:
    """The second half of making a device: the kernel takes an ifalias only for one that is there."""
    try:
        _set(name, f"setting the ifalias of {name}", {}, ifalias=alias)
        set_link(name, **attributes)
    except VnetLockError:
        remove_link(name, alias)
        raise


def _read_mac(route: Any, ifname: str, index: int) -> str:
    with _explained(f"reading the MAC of {ifname}", ifname, {}):
        return str(route.link("get", index=index)[0].get_attr("IFLA_ADDRESS"))
