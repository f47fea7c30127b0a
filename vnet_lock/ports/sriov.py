"""A VF for one guest: whole through VFIO, its network device alone, or a macvtap in passthru mode on it."""

from __future__ import annotations

from collections.abc import Iterator

from vnet_lock.combination import Backend, Policy
from vnet_lock.errors import Unsupported, Vanished, VnetLockError
from vnet_lock.model import Inventory, Mode, Nic, PciAddress, Pf, Vf, Wanted, name_of
from vnet_lock.ports import Job, Opened
from vnet_lock.ports.eswitch import hold_mode
from vnet_lock.ports.function import bind_to_vfio, find_function, require_group, why_not
from vnet_lock.ports.hardware import open_hardware
from vnet_lock.ports.macvtap import open_macvtap, random_mac
from vnet_lock.request import Intent
from vnet_lock.situation import Candidate, Situation, function_wanted


def candidates(intent: Intent, backend: Backend, situation: Situation) -> Iterator[Candidate]:
    """The VFs of the PFs that the intent names, those of the PF with the most free VFs first.

    A VF that is named itself is the only one; of a pool's PFs only the pool's VFs count.
    """
    inventory = situation.inventory
    pfs: list[Pf] = []
    for dev in intent.devs:
        found = _find(dev, inventory)
        if isinstance(found, Vf) and intent.pool is not None:
            yield Candidate(dev, reason=f"{dev} is a VF, and pool {intent.pool} is to name PFs")
        elif isinstance(found, Vf):
            yield _candidate(found, intent, backend, situation)
        elif found is None:
            yield Candidate(
                dev, reason=f"there is no SR-IOV network device {dev!r} here; see: vnet-lock status"
            )
        else:
            pfs.append(found)
    eligible = {pf.pci: [vf for vf in pf.vfs if intent.vfs is None or vf.index in intent.vfs] for pf in pfs}
    free = {pci: sum(map(situation.is_free, vfs)) for pci, vfs in eligible.items()} if len(pfs) > 1 else {}
    for pf in sorted(pfs, key=lambda one: -free.get(one.pci, 0)):
        name = pf.netdev or pf.pci.text
        if not pf.totalvfs:
            yield Candidate(name, reason=f"{name} is no SR-IOV device")
        elif not pf.vfs:
            yield Candidate(name, reason=f"{name} has no VFs yet; run: vnet-lock vfs {name} {pf.totalvfs}")
        elif not eligible[pf.pci]:
            yield Candidate(name, reason=f"{name} has {len(pf.vfs)} VFs, none of them in pool {intent.pool}")
        for vf in eligible[pf.pci]:
            yield _candidate(vf, intent, backend, situation)


def open_port(job: Job) -> Opened:
    """Set the VF up through its PF, and bind it to VFIO, put a macvtap on it, or move its device away."""
    from vnet_lock.kernel.before import read_before

    vf = _vf(job.inventory, job.device.pci)
    pf = job.inventory.pf_at(vf.pf)
    if pf is None or pf.netdev is None:
        raise Unsupported(
            f"{name_of(vf.resource)}: its PF {vf.pf} has no network device here to set it up by"
        )
    is_vfio = job.assignment.combination and job.assignment.combination.backend is Backend.VFIO
    if is_vfio:
        require_group(job, vf.pci)
    hold_mode(job, pf)
    job.journal(read_before(job.settings, vf.pci))
    if is_vfio:
        return _open_vfio(job, vf, pf.netdev)
    return _open_netdev(job, vf, pf.netdev)


def _open_vfio(job: Job, vf: Vf, pf_netdev: str) -> Opened:
    mac = job.intent.mac or random_mac()
    if not job.intent.hotplug:
        from vnet_lock.kernel.vfs import set_vf

        set_vf(pf_netdev, vf.index, mac=mac, vlan=job.intent.vlan)
        bind_to_vfio(job)
    return Opened(mac=mac, pci=vf.pci)


def _open_netdev(job: Job, vf: Vf, pf_netdev: str) -> Opened:
    from vnet_lock.kernel import netlink
    from vnet_lock.kernel.vfs import set_vf

    nic = job.inventory.nic_named(vf.netdev) if vf.netdev else None
    if nic is None:
        raise Vanished(
            f"{name_of(vf.resource)} has lost its network device; see: vnet-lock show {vf.resource}"
        )
    if job.intent.vlan is not None:
        set_vf(pf_netdev, vf.index, vlan=job.intent.vlan)
    mac = job.intent.mac or nic.mac
    if job.left is not None:
        return _open_awaited(job, vf, nic, pf_netdev, mac)
    netdev = nic.netdev if mac == nic.mac else _set_mac(job, vf, nic.netdev, pf_netdev, mac)
    if job.assignment.combination and job.assignment.combination.backend.has_socket:
        return open_hardware(job, netdev, mac)
    netlink.set_link(netdev, addrgenmode="none", up=True)
    return open_macvtap(job, netdev, "passthru", mac)


def _open_awaited(job: Job, vf: Vf, nic: Nic, pf_netdev: str, mac: str) -> Opened:
    """A macvtap on a VF that has the guest's MAC only once the guest runs: the embedded switch goes by it.

    A VF that may not change its MAC takes the PF's when its driver is bound anew, but the macvtap would go
    with that: so it is trusted for a moment.
    """
    from vnet_lock.kernel import netlink, rtnetlink
    from vnet_lock.kernel.vfs import set_vf

    def take_mac() -> None:
        try:
            netlink.set_link(nic.netdev, mac=mac)
        except VnetLockError:
            trust = rtnetlink.read_vf_admin(pf_netdev)[vf.index].trust
            set_vf(pf_netdev, vf.index, trust=True)
            netlink.set_link(nic.netdev, mac=mac)
            set_vf(pf_netdev, vf.index, trust=trust)
        netlink.set_link(nic.netdev, addrgenmode="none", up=True)

    job.once_it_runs(take_mac)
    opened = open_macvtap(job, nic.netdev, "passthru", nic.mac)
    opened.mac = mac
    return opened


def _set_mac(job: Job, vf: Vf, netdev: str, pf_netdev: str, mac: str) -> str:
    """Give the VF a MAC, and return the name of its network device afterwards.

    Once an administrative MAC was set, an untrusted VF may not change its own: then the PF sets it, and
    the VF's driver learns it when it is bound anew.
    """
    from vnet_lock.kernel import netlink, pci
    from vnet_lock.kernel.before import wait_for_netdev
    from vnet_lock.kernel.vfs import set_vf

    try:
        netlink.set_link(netdev, mac=mac)
    except VnetLockError:
        set_vf(pf_netdev, vf.index, mac=mac)
        pci.bind_driver(job.settings, vf.pci, None)
        pci.bind_driver(job.settings, vf.pci, vf.driver)
        netdev = wait_for_netdev(job.settings, vf.pci, vf.netdev)
    return netdev


def _candidate(vf: Vf, intent: Intent, backend: Backend, situation: Situation) -> Candidate:
    pf = situation.inventory.pf_at(vf.pf)
    wanted: tuple[Wanted, ...] = (Wanted(vf.resource, Mode.EXCLUSIVE, vf.pf),)
    reason = ""
    name = name_of(vf.resource)
    if backend is Backend.VFIO:
        wanted = function_wanted(situation.inventory, vf.pci)
        reason = why_not(situation.inventory, vf.pci)
    elif vf.netdev is None and not situation.inventory.users_of(vf.resource):
        reason = f"{name} has no network device here (driver: {vf.driver or 'none'})"
    if not reason and pf and intent.policy is Policy.VEPA and pf.eswitch is None:
        driver = pf.driver or "its driver"
        reason = f"the embedded switch of {pf.netdev or pf.pci} has no VEPA mode that {driver} could set"
    return Candidate(name, wanted, reason)


def _find(dev: str, inventory: Inventory) -> Pf | Vf | None:
    """A PF or VF by its network device's name or its PCI address."""
    pci = find_function(dev, inventory)
    return (inventory.vf_at(pci) or inventory.pf_at(pci)) if pci else None


def _vf(inventory: Inventory, pci: PciAddress | None) -> Vf:
    vf = inventory.vf_at(pci) if pci else None
    if vf is None:
        raise Vanished(f"VF {pci} is gone; see: vnet-lock status")
    return vf
