"""Makes, changes and removes network devices, and sets VFs through their PF. The only user of pyroute2.

Importing this module costs nothing; its functions load pyroute2 (250 ms) when they are called. Reading is
rtnetlink.py's. Devices are meant by their name in this network namespace.
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
from vnet_lock.kernel import rtnetlink
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
# include/uapi/linux/{netlink,rtnetlink,if_link,if_bridge}.h
_RTM_SETLINK, _NLM_F_ACK, _NLA_F_NESTED = 19, 0x4, 0x8000
_IFLA_PROTINFO, _IFLA_BRIDGE_FLAGS, _BRIDGE_FLAGS_SELF = 12, 0, 2
_ESWITCH_MODES = {"veb": 0, "vepa": 1}
# IFLA_VF_LINK_STATE_*, include/uapi/linux/if_link.h
LINK_STATES = {"auto": 0, "enable": 1, "disable": 2}


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
    index = _index(lower)
    words: dict[str, Any] = {f"{kind}_mode": mode}
    if namespace is not None:
        words["net_ns_fd"] = namespace
    meanings = _NEW_MACVLAN | {errno.EOPNOTSUPP: f"this kernel has no {kind}; run: modprobe {kind}"}
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
        with _explained(f"making tap {name}", name, _NEW_TAP):
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
            with _explained(what, name, _NEW_BRIDGE):
                route.link("add", ifname=name, kind="bridge", address=mac, br_vlan_filtering=1)
        except Unsupported:
            with _explained(what, name, _NEW_BRIDGE):
                route.link("add", ifname=name, kind="bridge", address=mac)
    _finish(name, alias, addrgenmode="none")


def add_veth(name: str, peer: str, alias: str) -> None:
    """Make a pair of joined devices, both down; ``peer`` goes with ``name``, wherever it is then.

    ``name`` carries the ifalias, and gets no IPv6 addresses of its own. Where a step fails nothing stays.
    """
    with _route() as route, _explained(f"making veth {name} with peer {peer}", name, _NEW_VETH):
        route.link("add", ifname=name, kind="veth", peer={"ifname": peer})
    _finish(name, alias, addrgenmode="none")


def add_vlan(name: str, lower: str, vlan: int, alias: str) -> None:
    """Make an 802.1Q VLAN device with an ifalias: down, without IPv6 addresses of its own."""
    index = _index(lower)
    with (
        _route() as route,
        _explained(f"making VLAN device {name} (VLAN {vlan}) on {lower}", lower, _NEW_VLAN),
    ):
        route.link("add", ifname=name, kind="vlan", link=index, vlan_id=vlan)
    _finish(name, alias, addrgenmode="none")


def rename_link(old: str, new: str) -> None:
    """Give a device another name; VnetLockError where another has it."""
    if "%" in new:
        # The kernel puts a number in the place of %d (dev_alloc_name).
        raise BadInput(f"{new!r} cannot be a device's name")
    _set(old, f"renaming {old} to {new}", _RENAME, ifname=new)


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
        _set(ifname, f"setting the MTU of {ifname} to {mtu}", _MTU, mtu=mtu)
    if mac is not None:
        _set(ifname, f"setting the MAC of {ifname} to {mac}", _MAC, address=mac)
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
        _set(ifname, f"setting {ifname} up", _UP, flags=_IFF_UP, change=_IFF_UP)


def move_link(ifname: str, namespace: int) -> None:
    """Move a device, which goes down by that, to the network namespace that a descriptor is of."""
    _set(ifname, f"moving {ifname} to a namespace of its own", _MOVE, net_ns_fd=namespace)


def set_master(ifname: str, bridge: str | None) -> None:
    """Make a device a port of a bridge (or slave of a bond); None: of none."""
    if bridge is None:
        _set(ifname, f"taking {ifname} out of its bridge", {}, master=0)
    else:
        _set(ifname, f"making {ifname} a port of {bridge}", _MASTER, master=_index(bridge))


def set_vf(
    pf_netdev: str,
    index: int,
    *,
    mac: str | None = None,
    vlan: int | None = None,
    qos: int | None = None,
    spoofchk: bool | None = None,
    trust: bool | None = None,
    link_state: int | None = None,
    min_tx_rate_mbps: int | None = None,
    max_tx_rate_mbps: int | None = None,
) -> None:
    """Change of a VF, through its PF, what is not None.

    VLAN 0 is none; ``qos`` goes with a VLAN. ``link_state`` is one of LINK_STATES' values. Rates are in
    Mbit/s, 0 is no limit. Each setting is a request of its own, so the error says which one was refused;
    trust comes first, because some drivers refuse a MAC while it is off.
    """
    if qos is not None and vlan is None:
        raise BadInput(f"VF {index} of {pf_netdev}: qos {qos} needs a VLAN beside it")
    settings: list[tuple[str, dict[str, Any]]] = []
    if trust is not None:
        settings.append((f"trust {_onoff(trust)}", {"trust": int(trust)}))
    if mac is not None:
        settings.append((f"MAC {mac}", {"mac": mac}))
    if vlan is not None:
        settings.append((f"VLAN {vlan}", {"vlan": {"vlan": vlan, "qos": qos or 0}}))
    if spoofchk is not None:
        settings.append((f"spoofchk {_onoff(spoofchk)}", {"spoofchk": int(spoofchk)}))
    if link_state is not None:
        settings.append((f"link-state {link_state}", {"link_state": link_state}))
    if min_tx_rate_mbps is not None or max_tx_rate_mbps is not None:
        rate = {"min_tx_rate": min_tx_rate_mbps or 0, "max_tx_rate": max_tx_rate_mbps or 0}
        settings.append((f"rates {rate['min_tx_rate']} to {rate['max_tx_rate']} Mbit/s", {"rate": rate}))
    for words, setting in settings:
        _set(pf_netdev, f"setting VF {index} of {pf_netdev} to {words}", _VF, vf={"vf": index, **setting})


def change(
    ifname: str, what: str, meanings: dict[int, str], request: Callable[[Any, int], object], /
) -> None:
    """Ask the kernel for one change about a device: ``request`` gets pyroute2's IPRoute and its ifindex.

    ``what`` is said where it fails, with what its errno means. For what is about more than the link itself.
    """
    index = _index(ifname)
    with _route() as route, _explained(what, ifname, meanings):
        request(route, index)


def set_eswitch_mode(pf_netdev: str, mode: str) -> None:
    """Set a PF's embedded switch, for all of its VFs, to ``veb`` or ``vepa``.

    Unsupported where the driver has no such modes. The request is the one that iproute2 sends for
    ``bridge link set dev PF hwmode MODE``; pyroute2 has no call for it that all its versions know.
    """
    if mode not in _ESWITCH_MODES:
        raise BadInput(f"embedded switch mode {mode!r} is none of: {', '.join(_ESWITCH_MODES)}")
    attributes = struct.pack("=H", _BRIDGE_FLAGS_SELF), struct.pack("=H", _ESWITCH_MODES[mode])
    spec = rtnetlink.pack(_IFLA_BRIDGE_FLAGS, attributes[0])
    spec += rtnetlink.pack(rtnetlink.IFLA_BRIDGE_MODE, attributes[1])
    body = rtnetlink.IFINFO.pack(rtnetlink.AF_BRIDGE, 0, _index(pf_netdev), 0, 0)
    body += rtnetlink.pack(_IFLA_PROTINFO | _NLA_F_NESTED, b"")
    body += rtnetlink.pack(rtnetlink.IFLA_AF_SPEC, spec)
    what = f"setting the embedded switch of {pf_netdev} to {mode}"
    with _explained(what, pf_netdev, _ESWITCH), rtnetlink.open_route_socket() as route:
        list(rtnetlink.ask(route, _RTM_SETLINK, _NLM_F_ACK, body))


def read_macvtap_mode(name: str) -> str:
    """The mode of a macvtap: ``bridge``, ``vepa``, ``private`` or ``passthru``; Vanished where it is none."""
    index = _index(name)
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


# --- what an errno means ------------------------------------------------------------------------

_NEW_MACVLAN = {
    errno.EADDRINUSE: "a device on it has that MAC already; see: ip -d link show type macvtap",
    errno.EBUSY: "it is a port of a bridge or bond, or a passthru macvtap has it; see: vnet-lock show",
    errno.EINVAL: "passthru takes a device with no other macvtap or macvlan on it; see: vnet-lock show",
    errno.EEXIST: "there is a device of that name; see: ip link",
}
_NEW_TAP = {
    errno.EBUSY: "there is a device of that name; see: ip link",
    errno.EINVAL: "there is a device of that name that is no tap; see: ip link",
}
_NEW_BRIDGE = {
    errno.EEXIST: "there is a device of that name; see: ip link",
    errno.EOPNOTSUPP: "this kernel has no bridge; run: modprobe bridge",
}
_NEW_VETH = {
    errno.EEXIST: "there is a device of that name; see: ip link",
    errno.EOPNOTSUPP: "this kernel has no veth; run: modprobe veth",
}
_NEW_VLAN = {
    errno.EEXIST: "another VLAN device on it has that VLAN, or that name; see: ip -d link show type vlan",
    errno.EOPNOTSUPP: "this kernel has no VLAN devices; run: modprobe 8021q",
}
_ESWITCH = {
    errno.EOPNOTSUPP: "its driver has no such mode; see: bridge link set dev … hwmode",
    errno.EINVAL: "its driver takes no such mode now; see: dmesg",
}
_RENAME = {
    errno.EEXIST: "another device has that name; see: ip link",
    errno.EINVAL: "the kernel takes no such name",
    errno.ERANGE: "a device's name has 15 bytes at most",
    errno.EBUSY: "it is up; set it down first",
}
_MTU = {errno.EINVAL: "the device takes no such MTU; see: ip -d link"}
_MAC = {
    errno.EADDRINUSE: "another device on the same lower device has that MAC",
    errno.EADDRNOTAVAIL: "the device takes no such MAC; a VF whose MAC was set through its PF needs trust",
    errno.EBUSY: "the device must be down for that",
    errno.EPERM: "not permitted; a VF whose MAC was set through its PF needs trust",
}
_UP = {
    errno.EADDRINUSE: "another device on the same lower device has its MAC; see: ip -d link",
    errno.ENETDOWN: "its lower device is down; set that up first",
    errno.EBUSY: "its MAC is the lower device's own; give it another",
}
_MOVE = {
    errno.EEXIST: "there is a device of that name already",
    errno.EINVAL: "its driver keeps it where it is",
}
_MASTER = {
    errno.EBUSY: "it is a port of another bridge, or a macvtap stands on it; see: ip -d link",
    errno.EINVAL: "that device takes no such port",
    errno.ELOOP: "that would be a loop",
    errno.EOPNOTSUPP: "that is neither a bridge nor a bond",
}
_VF = {
    errno.EINVAL: "there is no such VF, or the driver doesn't take that value; see: ip link show",
    errno.EOPNOTSUPP: "the driver of the PF has no such setting",
    errno.EBUSY: "the VF is not ready yet; set the PF up and try again",
    errno.EAGAIN: "the VF is not ready yet; set the PF up and try again",
}
_GONE = (errno.ENODEV, errno.ENOENT, errno.ENXIO)
_CANNOT = (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES)


@contextmanager
def _explained(what: str, device: str, meanings: dict[int, str]) -> Iterator[None]:
    """Turn the kernel's errno into an error of ours, which says what was tried and what to do."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        cause = meanings.get(code or 0) or f"{os.strerror(code) if code else error}"
        message = f"{what} failed: {cause}"
        if code in _GONE:
            raise Vanished(f"{what} failed: {device} is not there (any more); see: ip link") from error
        if code in (errno.EPERM, errno.EACCES) and code not in meanings:
            raise Unsupported(f"{message}; run as root") from error
        if code in _CANNOT:
            raise Unsupported(message) from error
        raise VnetLockError(message) from error


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


def _index(ifname: str) -> int:
    import socket  # 5 ms

    try:
        return socket.if_nametoindex(ifname)
    except OSError as error:
        raise Vanished(f"there is no network device {ifname} here (any more); see: ip link") from error


def _onoff(value: bool) -> str:
    return "on" if value else "off"
