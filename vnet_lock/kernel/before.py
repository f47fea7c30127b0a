"""Reads what a PCI network function is like before a guest gets it, as a journal keeps it."""

from __future__ import annotations

import os
import time

from vnet_lock.errors import Vanished, VnetLockError
from vnet_lock.journal import Driver, Entry, Link, VfAdmin
from vnet_lock.kernel import pci as pci_kernel
from vnet_lock.kernel import rtnetlink
from vnet_lock.model import PciAddress
from vnet_lock.settings import Settings

_NETDEV_WAIT_S = 5.0
# Bits of /sys/class/net/X/flags, include/uapi/linux/if.h.
_IFF_UP, _IFF_ALLMULTI = 0x1, 0x200


def read_before(settings: Settings, pci: PciAddress) -> tuple[Entry, ...]:
    """The function's link, driver and, of a VF, administrative settings.

    In the order in which they are journalled: undone backwards, a VF has its administrative MAC back
    before its driver is bound and asks for it, and its link is put right last of all.
    """
    entries: list[Entry] = []
    netdev = read_netdev(settings, pci)
    if netdev is not None:
        link = read_link(settings, pci.text, netdev)
        entries += [link] if link else []
    entries.append(
        Driver(
            pci.text, pci_kernel.read_driver(settings, pci), pci_kernel.read_driver_override(settings, pci)
        )
    )
    admin = read_vf_admin(settings, pci)
    entries += [admin] if admin else []
    return tuple(entries)


def read_netdev(settings: Settings, pci: PciAddress) -> str | None:
    """The function's network device in this namespace."""
    try:
        names = os.listdir(f"{settings.sys}/bus/pci/devices/{pci.text}/net")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return names[0] if names else None


def wait_for_netdev(settings: Settings, pci: PciAddress, name: str | None) -> str:
    """The function's network device once it is there (again), called ``name`` once more.

    A driver that was just bound calls it eth0; udev renames it within seconds, unless it was set up before.
    Where nobody does, in a container say, the name is ours to give. Vanished where there is no device.
    """
    deadline = time.monotonic() + _NETDEV_WAIT_S
    while (netdev := read_netdev(settings, pci)) is None or (name and netdev != name):
        if netdev is None and not os.path.isdir(f"{settings.sys}/bus/pci/devices/{pci.text}"):
            raise Vanished(f"{pci} is gone; see: vnet-lock status")
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    if netdev is None:
        raise Vanished(f"{pci} got no network device within {_NETDEV_WAIT_S:g} s; see: dmesg")
    if name is None or netdev == name:
        return netdev
    from vnet_lock.kernel import netlink

    try:
        netlink.rename_link(netdev, name)
    except VnetLockError:
        # Another has the name by now, or udev was quicker.
        return read_netdev(settings, pci) or netdev
    return name


def read_link(settings: Settings, device: str, netdev: str) -> Link | None:
    """A network device's own settings under the key ``device``; None where it went away."""
    base = f"{settings.sys}/class/net/{netdev}"
    try:
        flags = int(_read(base + "/flags"), 16)
        return Link(
            device=device,
            mac=_read(base + "/address"),
            mtu=int(_read(base + "/mtu")),
            up=bool(flags & _IFF_UP),
            allmulticast=bool(flags & _IFF_ALLMULTI),
            addr_gen_mode=_read_addr_gen_mode(settings, netdev),
            name=netdev,
        )
    except OSError:
        return None


def _read_addr_gen_mode(settings: Settings, netdev: str) -> int | None:
    """How the kernel makes the link's IPv6 address (ip-sysctl: 0 EUI-64, 1 none); None without IPv6."""
    try:
        return int(_read(f"{settings.proc}/sys/net/ipv6/conf/{netdev}/addr_gen_mode"))
    except OSError:
        return None


def read_vf_admin(settings: Settings, pci: PciAddress) -> VfAdmin | None:
    """A VF's settings as its PF has them; None for what is no VF, or where the PF doesn't tell."""
    device = f"{settings.sys}/bus/pci/devices/{pci.text}"
    try:
        pf = os.path.basename(os.readlink(device + "/physfn"))
    except FileNotFoundError:
        return None
    netdev = read_netdev(settings, PciAddress.parse(pf))
    index = _vf_index(settings, pf, pci)
    info = rtnetlink.read_vf_admin(netdev).get(index) if netdev and index is not None else None
    if info is None or index is None:
        return None
    return VfAdmin(
        pf=pf,
        index=index,
        mac=info.mac,
        vlan=info.vlan,
        qos=info.qos,
        spoofchk=info.spoofchk,
        trust=info.trust,
        link_state=info.link_state,
        min_tx_rate_mbps=info.min_tx_rate_mbps,
        max_tx_rate_mbps=info.max_tx_rate_mbps,
    )


def _vf_index(settings: Settings, pf: str, pci: PciAddress) -> int | None:
    device = f"{settings.sys}/bus/pci/devices/{pf}"
    try:
        for name in os.listdir(device):
            if name.startswith("virtfn") and os.path.basename(os.readlink(f"{device}/{name}")) == pci.text:
                return int(name[len("virtfn") :])
    except FileNotFoundError:
        pass  # the VFs are on their way out
    return None


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()
