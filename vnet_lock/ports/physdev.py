"""The whole PCI function of a NIC, a PF or a plain one, for one guest."""

from __future__ import annotations

from collections.abc import Iterator

from vnet_lock.combination import Backend
from vnet_lock.errors import Vanished
from vnet_lock.model import Mode, Nic, Pf, Wanted, name_of
from vnet_lock.ports import Job, Opened
from vnet_lock.ports.function import bind_to_vfio, find_function, require_group, why_not
from vnet_lock.ports.hardware import open_hardware
from vnet_lock.request import Intent
from vnet_lock.situation import Candidate, Situation, function_wanted


def candidates(intent: Intent, backend: Backend, situation: Situation) -> Iterator[Candidate]:
    """Each NIC that the intent names; what the host itself uses is never given away."""
    inventory = situation.inventory
    for dev in intent.devs:
        pci = find_function(dev, inventory)
        pf = inventory.pf_at(pci) if pci else None
        if pf is None:
            is_vf = pci is not None and inventory.vf_at(pci) is not None
            is_here = pci is not None or inventory.nic_named(dev) is not None
            reason = f"{dev} has no PCI function of its own" if is_here else f"there is no NIC {dev!r} here"
            yield Candidate(
                dev, reason=f"{dev} is a VF: use port=sriov" if is_vf else f"{reason}; see: vnet-lock status"
            )
            continue
        name = pf.netdev or pf.pci.text
        wanted = function_wanted(inventory, pf.pci)
        if backend.has_socket:
            wanted = (Wanted(pf.resource, Mode.EXCLUSIVE),)
        yield Candidate(name, wanted, _why_not(pf, intent, backend, situation))


def open_port(job: Job) -> Opened:
    """Give the function to VFIO, or its network device to a packet socket."""
    from vnet_lock.kernel.before import read_before

    pf = job.inventory.pf_at(job.device.pci) if job.device.pci else None
    if pf is None:
        raise Vanished(f"{name_of(job.device)} is gone; see: vnet-lock status")
    nic = job.inventory.nic_named(pf.netdev) if pf.netdev else None
    if job.assignment.combination and job.assignment.combination.backend.has_socket:
        if nic is None:
            raise Vanished(f"{name_of(pf.resource)} has lost its network device; see: vnet-lock status")
        job.journal(read_before(job.settings, pf.pci))
        return _open_socket(job, nic)
    require_group(job, pf.pci)
    job.journal(read_before(job.settings, pf.pci))
    bind_to_vfio(job)
    return Opened(mac=nic.mac if nic else None, pci=pf.pci)


def _open_socket(job: Job, nic: Nic) -> Opened:
    from vnet_lock.kernel import netlink

    mac = job.intent.mac or nic.mac
    if mac != nic.mac:
        netlink.set_link(nic.netdev, mac=mac)
    return open_hardware(job, nic.netdev, mac)


def _why_not(pf: Pf, intent: Intent, backend: Backend, situation: Situation) -> str:
    name = pf.netdev or pf.pci.text
    if intent.vlan is not None:
        return f"a whole NIC has no VLAN that the host could set; leave vlan={intent.vlan} to the guest"
    if backend.has_socket:
        has_users = bool(situation.inventory.users_of(pf.resource))
        return "" if pf.netdev or has_users else f"{name} has no network device here (driver: {pf.driver})"
    nic = situation.inventory.nic_named(pf.netdev) if pf.netdev else None
    if pf.vfs:
        return f"{name} has {len(pf.vfs)} VFs, which would go with it; run: vnet-lock vfs {name} 0"
    if intent.mac is not None and nic is not None and intent.mac != nic.mac:
        return f"{name} keeps its own MAC ({nic.mac}) in the guest; leave mac= away"
    return why_not(situation.inventory, pf.pci)
