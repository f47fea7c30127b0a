"""One look at the host: which network functions and devices there are, and who uses them. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from vnet_lock.dataclass import dataclass, replace
from vnet_lock.errors import Vanished
from vnet_lock.kernel import eswitch, rtnetlink, sysfs
from vnet_lock.kernel.users import read_users
from vnet_lock.model import Inventory, Nic, PciAddress, Pf, Resource, UseKind, User, is_ifname, parse_address
from vnet_lock.settings import Settings

T = TypeVar("T")

# A network device may be renamed (udev does, behind a driver's binding) while it is read.
_TRIES = 3


def read_inventory(
    settings: Settings, devices: Collection[str] | None = None, *, vlans: bool = False
) -> Inventory:
    """The network functions and devices of this host, and their users.

    ``devices`` (names or PCI addresses) restricts it to what these concern: a VF's or PF's whole PF, a
    network device with all below it and what stands directly on it. What isn't there is absent. An IP
    address among them has the host as its user where it is the host's own. ``vlans`` asks for the
    administrative VLANs of VFs, too.
    """
    seen = _read_all(settings) if devices is None else _read_concerned(settings, devices)
    for _ in range(_TRIES - 1):
        if seen.is_whole():
            break
        seen = _read_all(settings) if devices is None else _read_concerned(settings, devices)
    pfs, nics = seen.pfs, seen.nics
    told = _ask_netlink(pfs, nics.values())
    pfs = tuple(_with_eswitch(pf, nics, told) for pf in pfs)
    if vlans:
        pfs = tuple(map(_with_vlans, pfs))
    nics = {name: _as_told(nic, told) for name, nic in nics.items()}
    users = read_users(settings, pfs, nics.values(), told.addresses, thorough=devices is None)
    return Inventory(
        pfs=pfs,
        nics=tuple(nics.values()),
        users=users | _read_address_users(devices or ()),
        iommu_groups=seen.iommu_groups,
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What sysfs showed."""

    pfs: tuple[Pf, ...]
    nics: dict[str, Nic]
    iommu_groups: Mapping[int, tuple[PciAddress, ...]]

    def is_whole(self) -> bool:
        """False where a function's network device was renamed or moved meanwhile: its uses weren't seen."""
        return all(
            netdev is None or netdev in self.nics
            for pf in self.pfs
            for netdev in (pf.netdev, *(vf.netdev for vf in pf.vfs))
        )


def _read_all(settings: Settings) -> _Seen:
    nics = _read_nics(settings, sysfs.list_netdevs(settings))
    # Of several network devices of one function, the first.
    netdevs = {nic.pci: nic.netdev for nic in reversed(nics.values()) if nic.pci is not None}
    pfs, groups = sysfs.read_functions(settings, netdevs)
    return _Seen(pfs, nics, groups)


def _read_concerned(settings: Settings, devices: Iterable[str]) -> _Seen:
    """The PFs, and the network devices, that some names and PCI addresses are about."""
    pfs: dict[str, Pf] = {}
    nics: dict[str, Nic] = {}
    waiting = list(devices)
    asked: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in asked:
            continue
        asked.add(name)
        pci = _parse_pci(name)
        if pci is None:
            nic = sysfs.read_nic(settings, name) if is_ifname(name) else None
            if nic is not None:
                nics[name] = nic
                waiting += [*nic.lowers, *([nic.pci.text] if nic.pci else [])]
            continue
        home = sysfs.find_pf(settings, pci.text)
        pf = sysfs.read_pf(settings, home) if home not in pfs else None
        if pf is not None:
            pfs[home] = pf
            waiting += [netdev for netdev in (pf.netdev, *(vf.netdev for vf in pf.vfs)) if netdev]
    uppers = {name for nic in nics.values() for name in nic.uppers} - nics.keys()
    nics |= _read_nics(settings, sorted(uppers))
    found = tuple(pfs[name] for name in sorted(pfs))
    return _Seen(found, nics, _read_groups(settings, found))


def _read_nics(settings: Settings, names: Iterable[str]) -> dict[str, Nic]:
    return {name: nic for name in names if (nic := sysfs.read_nic(settings, name)) is not None}


def _parse_pci(name: str) -> PciAddress | None:
    try:
        return PciAddress.parse(name)
    except ValueError:
        return None


def _read_groups(settings: Settings, pfs: Iterable[Pf]) -> dict[int, tuple[PciAddress, ...]]:
    groups = {group for pf in pfs for group in (pf.iommu_group, *(vf.iommu_group for vf in pf.vfs))}
    return {group: sysfs.read_iommu_group(settings, group) for group in groups if group is not None}


def _read_address_users(devices: Iterable[str]) -> dict[Resource, tuple[User, ...]]:
    asked = {name for name in devices if _is_address(name)}
    if not asked:
        return {}
    user = User(None, "host", "an address of its own", UseKind.ADDRESS)
    found = {address for addresses in rtnetlink.read_addresses().values() for address in addresses}
    return {Resource.ip(address): (user,) for address in asked & found}


def _is_address(name: str) -> bool:
    try:
        return _parse_pci(name) is None and parse_address(name) == name
    except ValueError:
        return False


# --- what sysfs doesn't tell --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Told:
    """What netlink says, by ifindex."""

    addresses: Mapping[int, tuple[str, ...]]
    eswitches: Mapping[int, str]
    kinds: Mapping[int, tuple[str, int | None]]


def _ask_netlink(pfs: Iterable[Pf], nics: Collection[Nic]) -> _Told:
    """Addresses, embedded switches and kinds, each asked for only where there may be some."""
    has_up = any(nic.up for nic in nics)
    has_sriov = any(pf.totalvfs and pf.netdev for pf in pfs)
    has_unknown = any(nic.kind in ("other", "vlan") and nic.lowers for nic in nics)
    return _Told(
        addresses=_confirm(rtnetlink.read_addresses(), nics) if has_up else {},
        eswitches=_confirm(eswitch.read_modes(), nics) if has_sriov else {},
        kinds=_confirm({link.ifindex: (link.kind, link.vlan) for link in rtnetlink.read_links()}, nics)
        if has_unknown
        else {},
    )


def _confirm(told: Mapping[int, T], nics: Iterable[Nic]) -> dict[int, T]:
    """What is about our devices: sysfs may show another network namespace than netlink asks."""
    if not told:
        return {}
    import socket  # loaded by then

    confirmed: dict[int, T] = {}
    for nic in nics:
        if nic.ifindex in told:
            try:
                name = socket.if_indextoname(nic.ifindex)
            except OSError:
                continue  # gone, or of another namespace
            if name == nic.netdev:
                confirmed[nic.ifindex] = told[nic.ifindex]
    return confirmed


def _with_eswitch(pf: Pf, nics: Mapping[str, Nic], told: _Told) -> Pf:
    nic = nics.get(pf.netdev) if pf.netdev else None
    mode = told.eswitches.get(nic.ifindex) if nic else None
    return replace(pf, eswitch=mode) if mode else pf


def _with_vlans(pf: Pf) -> Pf:
    if not pf.vfs or pf.netdev is None:
        return pf
    try:
        told = rtnetlink.read_vf_admin(pf.netdev)
    except Vanished:
        return pf
    vfs = (replace(vf, vlan=told[vf.index].vlan) if vf.index in told else vf for vf in pf.vfs)
    return replace(pf, vfs=tuple(vfs))


def _as_told(nic: Nic, told: _Told) -> Nic:
    kind, vlan = told.kinds.get(nic.ifindex, ("", None))
    if nic.kind in ("other", "vlan") and kind in ("macvlan", "vlan"):
        nic = replace(nic, kind=kind, vlan=vlan)
    addresses = told.addresses.get(nic.ifindex, ())
    return replace(nic, addresses=addresses) if addresses else nic
