"""A macvtap in bridge, vepa or private mode on a network device that others may share."""

from __future__ import annotations

from collections.abc import Iterator

from vnet_lock.combination import Backend, Policy
from vnet_lock.model import Mode, Nic, PciAddress
from vnet_lock.ports import Job, Opened
from vnet_lock.ports.macvtap import open_macvlan, open_macvtap, random_mac
from vnet_lock.ports.vlan import open_vlan, vlan_wanted, why_no_vlan
from vnet_lock.request import Intent
from vnet_lock.situation import Candidate, Situation, nic_wanted

# What the kernel calls the mode of a macvlan of each policy.
MODES = {Policy.VEB: "bridge", Policy.VEPA: "vepa", Policy.PRIVATE: "private"}


def candidates(intent: Intent, backend: Backend, situation: Situation) -> Iterator[Candidate]:
    """Each device that the intent names."""
    del backend
    for dev in intent.devs:
        nic = find_nic(dev, situation)
        if nic is None:
            yield Candidate(dev, reason=f"there is no network device {dev!r} here; see: ip link")
            continue
        reason = ""
        master = situation.inventory.nic_named(nic.master) if nic.master else None
        if nic.kind == "bridge":
            reason = f"{nic.netdev} is a bridge: use port=bridge"
        elif master and master.kind == "bridge":
            reason = f"{nic.netdev} is a port of bridge {master.netdev}; name {master.netdev} with mode=veb"
        elif nic.netdev == "lo":
            reason = "lo is no Ethernet device"
        elif not nic.up:
            reason = f"{nic.netdev} is down; run: ip link set {nic.netdev} up"
        wanted = nic_wanted(situation.inventory, nic, Mode.SHARED)
        if intent.vlan is not None:
            wanted = vlan_wanted(situation.inventory, nic, intent.vlan)
            reason = reason or why_no_vlan(situation, nic, intent.vlan)
        yield Candidate(nic.netdev, wanted, reason)


def open_port(job: Job) -> Opened:
    """Make the macvtap, or for a packet socket the macvlan."""
    combination = job.assignment.combination
    make = open_macvlan if combination and combination.backend.has_socket else open_macvtap
    return make(job, open_lower(job), MODES[job.intent.policy], job.intent.mac or random_mac())


def open_lower(job: Job) -> str:
    """The name of the device that the macvlan stands on: the granted one, or the VLAN device on it."""
    if job.intent.vlan is not None:
        return open_vlan(job, job.intent.vlan)
    return next(nic.netdev for nic in job.inventory.nics if job.inventory.resource_of(nic) == job.device)


def find_nic(dev: str, situation: Situation) -> Nic | None:
    """A network device by its name or PCI address."""
    nic = situation.inventory.nic_named(dev)
    if nic is not None:
        return nic
    try:
        pci = PciAddress.parse(dev)
    except ValueError:
        return None
    return next((nic for nic in situation.inventory.nics if nic.pci == pci), None)
