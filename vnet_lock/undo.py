"""Carries a claim's journal out backwards. Each undo is idempotent: what is right already stays as it is."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from typing import assert_never

from vnet_lock.errors import Vanished, VnetLockError
from vnet_lock.journal import (
    Companion,
    Datapath,
    DhcpServer,
    Driver,
    Entry,
    EswitchMode,
    Keeper,
    LibvirtMacvtap,
    Link,
    MadeLink,
    NatTable,
    ProxyNeighbour,
    SharedLink,
    SocketFile,
    Sysctl,
    Sysctls,
    VfAdmin,
    share_key,
)
from vnet_lock.kernel import before, eswitch, pci, processes, rtnetlink, sysfs
from vnet_lock.model import Claim, PciAddress, Process
from vnet_lock.settings import Settings


def undo(settings: Settings, claim: Claim, shared: Collection[str] = ()) -> list[str]:
    """Undo what the claim's journal says, the last entry first, and return what could not be undone.

    ``shared`` has the keys of what other claims need still: that stays. A device that is gone has nothing
    left to undo.
    """
    failures: list[str] = []
    for entry in reversed(claim.journal):
        if share_key(entry) in shared:
            continue
        try:
            _undo_entry(settings, entry)
        except Vanished:
            continue
        except VnetLockError as error:
            failures.append(str(error))
    return failures


def remove_files(settings: Settings, claim: Claim) -> None:
    """Remove what another boot left of the claim: files, where the run directory outlived it.

    All else went with its kernel. What has the same name now is as this boot wants it.
    """
    for entry in claim.journal:
        if isinstance(entry, SocketFile):
            _undo_entry(settings, entry)
        elif isinstance(entry, DhcpServer):  # whose pid and start may be another process's by now
            from vnet_lock.kernel import dnsmasq

            dnsmasq.remove_file(settings, entry.bridge, entry.pid)


def end_keeper(settings: Settings, entry: Keeper) -> None:
    """End what serves a guest; VnetLockError where it doesn't end."""
    from vnet_lock.kernel import background

    process = Process(entry.pid, entry.start_ticks)
    background.end(settings, process, "the process that keeps up a guest's network")


def _undo_entry(settings: Settings, entry: Entry) -> None:  # noqa: PLR0912 - one for each kind
    match entry:
        case MadeLink():
            from vnet_lock.kernel import netlink, nodes

            netlink.remove_link(entry.name, entry.alias)
            nodes.remove_nodes(settings, entry.final)
        case SharedLink():
            from vnet_lock.kernel import netlink

            netlink.remove_link(entry.name, entry.alias)
        case Sysctl():
            from vnet_lock.kernel import sysctl

            sysctl.restore(settings, entry.name, entry.before)
        case NatTable():
            from vnet_lock.kernel import nftables

            nftables.remove_table(entry.bridge)
        case DhcpServer():
            from vnet_lock.kernel import dnsmasq

            dnsmasq.end(settings, entry.bridge, Process(entry.pid, entry.start_ticks))
        case Sysctls():
            _restore_sysctls(settings, entry)
        case ProxyNeighbour():
            from vnet_lock.kernel import routes

            routes.remove_proxy(entry.netdev, entry.address)
        case EswitchMode():
            _restore_eswitch_mode(settings, entry)
        case SocketFile():
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
        case Companion():
            from vnet_lock.kernel import background

            process = Process(entry.pid, entry.start_ticks)
            background.end(settings, process, "the process that was to plug a device into a guest")
        case Keeper():
            end_keeper(settings, entry)
        case Datapath():
            pass  # it ends by itself
        case LibvirtMacvtap():
            _remove_libvirts(settings, entry)
        case VfAdmin():
            _restore_vf_admin(settings, entry)
        case Driver():
            _restore_driver(settings, entry)
        case Link():
            _restore_link(settings, entry)
        case _ as never:
            assert_never(never)


def _remove_libvirts(settings: Settings, saved: LibvirtMacvtap) -> None:
    """Remove the macvtap that libvirt left, known by its place, its MAC and its name.

    What a process has open is somebody's.
    """
    netdev = saved.device
    if ":" in saved.device:
        netdev = before.read_netdev(settings, PciAddress.parse(saved.device)) or ""
    lower = sysfs.read_nic(settings, netdev) if netdev else None
    for name in lower.uppers if lower else ():
        upper = sysfs.read_nic(settings, name)
        is_its_name = name == saved.name if saved.name else name.startswith("macvtap")
        if upper is None or upper.mac != saved.mac or not is_its_name:
            continue
        rdev = sysfs.read_macvtap_rdev(settings, name)
        if rdev is None or processes.read_holders(settings, [rdev]):
            continue
        from vnet_lock.kernel import netlink

        netlink.remove_link(name, "")


def _restore_sysctls(settings: Settings, saved: Sysctls) -> None:
    from vnet_lock.kernel import sysctl

    for word in saved.before.split():
        name, _, value = word.partition("=")
        with suppress(Vanished):  # that device is gone, the others are not
            sysctl.restore(settings, f"{saved.directory}/{name}", value)


def _netdev_of_pf(settings: Settings, pf: str) -> str:
    """The network device by which a PF is told; Vanished where it isn't there.

    VnetLockError where it has VFs still, and so all that was set, but is in another network namespace, say.
    """
    netdev = before.read_netdev(settings, PciAddress.parse(pf))
    if netdev is not None:
        return netdev
    message = f"PF {pf} has no network device here"
    names = sysfs.list_names(f"{settings.sys}/bus/pci/devices/{pf}")
    if any(name.startswith("virtfn") for name in names):
        raise VnetLockError(f"{message}, so what was set by it stays; bring that back, then: vnet-lock gc")
    raise Vanished(message)


def _restore_vf_admin(settings: Settings, saved: VfAdmin) -> None:
    netdev = _netdev_of_pf(settings, saved.pf)
    info = rtnetlink.read_vf_admin(netdev).get(saved.index)
    if info is None:
        raise Vanished(f"PF {saved.pf} has no VF {saved.index}")
    names = ("mac", "vlan", "qos", "spoofchk", "trust", "link_state", "min_tx_rate_mbps", "max_tx_rate_mbps")
    changed = {
        name: value
        for name in names
        if (value := getattr(saved, name)) is not None and value != getattr(info, name)
    }
    if not changed:
        return
    # These are set in pairs.
    if {"vlan", "qos"} & changed.keys():
        changed |= {"vlan": saved.vlan, "qos": saved.qos}
    if {"min_tx_rate_mbps", "max_tx_rate_mbps"} & changed.keys():
        changed |= {"min_tx_rate_mbps": saved.min_tx_rate_mbps, "max_tx_rate_mbps": saved.max_tx_rate_mbps}
    from vnet_lock.kernel.vfs import set_vf

    set_vf(netdev, saved.index, **changed)


def _restore_eswitch_mode(settings: Settings, saved: EswitchMode) -> None:
    netdev = _netdev_of_pf(settings, saved.pf)
    # What is neither was set by somebody else since, and isn't ours to change.
    if saved.mode == saved.before or eswitch.read_mode(netdev) != saved.mode:
        return
    eswitch.set_mode(netdev, saved.before)


def _restore_driver(settings: Settings, saved: Driver) -> None:
    address = PciAddress.parse(saved.pci)
    is_right = pci.read_driver(settings, address) == saved.driver
    if not is_right:
        pci.bind_driver(settings, address, saved.driver)
    if pci.read_driver_override(settings, address) != saved.override:
        pci.set_driver_override(settings, address, saved.override)


def _restore_link(settings: Settings, saved: Link) -> None:
    netdev = saved.device
    if ":" in saved.device:
        netdev = before.wait_for_netdev(settings, PciAddress.parse(saved.device), saved.name)
    now = before.read_link(settings, saved.device, netdev)
    if now is None:
        raise Vanished(f"{netdev} is gone")
    if now == saved:
        return
    from vnet_lock.kernel import netlink

    if now.mac != saved.mac:
        netdev = _restore_mac(settings, saved, netdev)
        now = before.read_link(settings, saved.device, netdev) or now
    if now.up and not saved.up:
        netlink.set_link(netdev, up=False)
    netlink.set_link(
        netdev,
        mtu=saved.mtu if now.mtu != saved.mtu else None,
        allmulticast=saved.allmulticast if now.allmulticast != saved.allmulticast else None,
        addrgenmode={0: "eui64", 1: "none"}.get(-1 if saved.addr_gen_mode is None else saved.addr_gen_mode),
    )
    if saved.up and not now.up:
        netlink.set_link(netdev, up=True)


def _restore_mac(settings: Settings, saved: Link, netdev: str) -> str:
    """Give a device its own MAC back, and return its name afterwards.

    A VF whose PF has set its MAC may not change it while it isn't trusted (igb, for one): it takes the PF's
    when its driver is bound anew. That is its own again, unless the PF was told of another after the driver
    was bound; then it has that one now, as after any start of its driver.
    """
    from vnet_lock.kernel import netlink

    try:
        netlink.set_link(netdev, mac=saved.mac)
    except Vanished:
        raise
    except VnetLockError:
        address = PciAddress.parse(saved.device) if ":" in saved.device else None
        admin = before.read_vf_admin(settings, address) if address else None
        if address is None or admin is None:
            raise
        if not _has_mac(settings, netdev, saved.device, admin.mac):
            driver = pci.read_driver(settings, address)
            pci.bind_driver(settings, address, None)
            pci.bind_driver(settings, address, driver)
            netdev = before.wait_for_netdev(settings, address, saved.name)
            if not _has_mac(settings, netdev, saved.device, admin.mac):
                raise
    return netdev


def _has_mac(settings: Settings, netdev: str, device: str, mac: str) -> bool:
    now = before.read_link(settings, device, netdev)
    return now is not None and now.mac == mac
