"""Addresses, host routes and proxy neighbours: how packets for a guest's own address find its link.

Devices are meant by their name in this network namespace. What is on a guest's link goes with that link.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from vnet_lock.errors import Vanished
from vnet_lock.kernel import netlink
from vnet_lock.kernel.netlink_wire import read_ifindex
from vnet_lock.kernel.rtnetlink import read_proxies

# include/uapi/linux/{rtnetlink,if_addr,neighbour}.h
_SCOPE_LINK, _NODAD, _NTF_PROXY, _PERMANENT = 253, 0x02, 0x08, 0x80


def add_gateway(ifname: str, address: str, length: int) -> None:
    """Give a device an address that only its link sees, valid at once: no other host is on that link."""
    flags = _NODAD if ":" in address else 0
    netlink.change(
        ifname,
        f"giving {ifname} the address {address}",
        {},
        lambda route, index: route.addr(
            "add", index=index, address=address, prefixlen=length, scope=_SCOPE_LINK, flags=flags
        ),
    )


def add_host_route(ifname: str, address: str) -> None:
    """Lead one address to a device; VnetLockError where another route leads it elsewhere."""
    length = 128 if ":" in address else 32
    meanings = {errno.EEXIST: f"there is a route for it already; see: ip route show {address}"}
    netlink.change(
        ifname,
        f"routing {address} to {ifname}",
        meanings,
        lambda route, index: route.route("add", dst=f"{address}/{length}", oif=index, scope=_SCOPE_LINK),
    )


def has_proxy(ifname: str, address: str) -> bool:
    """Whether the host answers for an address on a device; Vanished where there is no such device."""
    return (read_ifindex(ifname), address) in read_proxies()


def add_proxy(ifname: str, address: str) -> None:
    """Let the host answer for an address that others on a device's wire look for.

    It needs forwarding there, IPv6 also proxy_ndp (arp_process, ndisc_recv_ns).
    """
    _change_proxy("add", ifname, address, f"answering for {address} on {ifname}")


def remove_proxy(ifname: str, address: str) -> None:
    """No longer; nothing where it doesn't, or the device is gone."""
    with suppress(Vanished):
        _change_proxy("del", ifname, address, f"answering for {address} on {ifname} no longer")


def _change_proxy(command: str, ifname: str, address: str, what: str) -> None:
    netlink.change(
        ifname,
        what,
        {},
        lambda route, index: route.neigh(
            command, dst=address, ifindex=index, flags=_NTF_PROXY, state=_PERMANENT
        ),
    )
