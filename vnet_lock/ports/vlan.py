"""An 802.1Q VLAN device below a guest's macvlan: one that is there, or one of ours that guests share."""

from __future__ import annotations

import os

from vnet_lock.errors import Vanished
from vnet_lock.journal import SharedLink
from vnet_lock.kernel.marks import SHARED_PREFIX
from vnet_lock.model import Inventory, Mode, Nic, Resource, Wanted
from vnet_lock.ports import Job
from vnet_lock.ports.macvtap import is_link_name, link_name
from vnet_lock.situation import Situation, nic_wanted


def vlan_name(lower: Nic, vlan: int) -> str:
    """What our own VLAN device on a lower device is called."""
    return f"vl{lower.ifindex}.{vlan}"


def vlan_wanted(inventory: Inventory, lower: Nic, vlan: int) -> tuple[Wanted, ...]:
    """The claims that a VLAN of a device takes: a share of the VLAN device, and of all below it.

    The VLAN device may not be there yet; then it is ours to make.
    """
    there = _find(inventory, lower, vlan)
    if there is not None:
        return nic_wanted(inventory, there, Mode.SHARED)
    own = Wanted(Resource.nic(vlan_name(lower, vlan)), Mode.SHARED)
    return (own, *nic_wanted(inventory, lower, Mode.SHARED))


def why_no_vlan(situation: Situation, lower: Nic, vlan: int) -> str:
    """Why a VLAN of a device can't be had; empty where it can."""
    there = _find(situation.inventory, lower, vlan)
    if there is None:
        return f"{situation.no_vlans}; a VF has a VLAN without: port=sriov" if situation.no_vlans else ""
    master = situation.inventory.nic_named(there.master) if there.master else None
    if master and master.kind == "bridge":
        return f"{there.netdev} is a port of bridge {master.netdev}; name {master.netdev} with mode=veb"
    if not there.up and there.netdev != vlan_name(lower, vlan):
        return f"{there.netdev} is down; run: ip link set {there.netdev} up"
    return ""


def open_vlan(job: Job, vlan: int) -> str:
    """Make the VLAN device that was granted where it isn't there, and return its name.

    Vanished where it was the host's own and is gone.
    """
    name = job.device.name
    lower = next((nic for nic in job.inventory.nics if vlan_name(nic, vlan) == name), None)
    if lower is None:
        if not _is_there(job, name):
            raise Vanished(f"{name} is gone; see: ip link")
        return name  # the host's own, which is left as it is
    from vnet_lock.kernel import netlink

    with job.sharing() as share:
        entry = share(SharedLink(link_name(job.token), name, SHARED_PREFIX + name))
        assert isinstance(entry, SharedLink)  # noqa: S101 - it has the key of one
        if not _is_there(job, name):
            # Who was killed while he made it left it under its first name.
            netlink.remove_link(entry.name, "")
            netlink.add_vlan(entry.name, lower.netdev, vlan, entry.alias)
            netlink.rename_link(entry.name, name)
        netlink.set_link(name, up=True)
    return name


def _find(inventory: Inventory, lower: Nic, vlan: int) -> Nic | None:
    """The device's VLAN device of this ID, of which the kernel has one at most.

    One that is being made by another guest isn't there yet: it gets its own name before its maker lets go.
    """
    found = (nic for nic in inventory.nics if nic.vlan == vlan and lower.netdev in nic.lowers)
    return next((nic for nic in found if not is_link_name(nic.netdev)), None)


def _is_there(job: Job, name: str) -> bool:
    return os.path.exists(f"{job.settings.sys}/class/net/{name}")
