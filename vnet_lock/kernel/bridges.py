"""Addresses of bridges, and VLANs of their ports; both by their name in this network namespace."""

from __future__ import annotations

import errno

from vnet_lock.kernel import netlink

# include/uapi/linux/if_bridge.h
_PVID, _UNTAGGED = 0x2, 0x4
# What each new port has (br_vlan_init), unless the bridge was told otherwise.
_DEFAULT_PVID = 1


def add_address(bridge: str, address: str, length: int) -> None:
    """Give a bridge an IPv4 address in a network of ``length`` bits."""
    netlink.change(
        bridge,
        f"giving {bridge} the address {address}/{length}",
        {errno.EEXIST: "it has that already; see: ip address"},
        lambda route, index: route.addr("add", index=index, address=address, prefixlen=length),
    )


def set_vlan(port: str, vlan: int, default_pvid: int = _DEFAULT_PVID) -> None:
    """Put a bridge's port into one VLAN, untagged on its side, and into no other."""
    what = f"putting {port} into VLAN {vlan}"
    meanings = {errno.EOPNOTSUPP: "its bridge has no VLANs; see: ip -d link show type bridge"}
    info = {"vid": vlan, "flags": _PVID | _UNTAGGED}
    netlink.change(
        port, what, meanings, lambda route, index: route.vlan_filter("add", index=index, vlan_info=info)
    )
    if default_pvid not in (0, vlan):
        old = {"vid": default_pvid}
        netlink.change(
            port, what, meanings, lambda route, index: route.vlan_filter("del", index=index, vlan_info=old)
        )
