"""PCI network functions and network devices as sysfs shows them. Reads only; asks neither netlink nor /proc.

A device may vanish between two reads: what is gone is absent from the result, and nothing raises for it.
Plain strings and few system calls: hooks wait for this, and there may be thousands of VFs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from functools import cache

from vnet_lock.errors import VnetLockError
from vnet_lock.model import Nic, PciAddress, Pf, Vf
from vnet_lock.settings import Settings

# What reading a file of a device gives that is gone or on its way out.
_ABSENT = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.EINVAL, errno.EIO, errno.ELOOP)
)
# Base class 02 of the PCI code and ID assignment: network controllers. 0604 is a PCI-to-PCI bridge.
_NETWORK_CLASS, _BRIDGE_CLASS = "0x02", "0x0604"
_IFF_UP = 0x1
# DEVTYPE in a network device's uevent, where it says what we call a kind.
_DEVTYPES = ("vlan", "macvlan", "macvtap", "bridge", "bond")


def read_functions(
    settings: Settings, netdevs: Mapping[PciAddress, str]
) -> tuple[tuple[Pf, ...], dict[int, tuple[PciAddress, ...]]]:
    """All physical network functions with their VFs, and the IOMMU groups that a network function is in.

    ``netdevs`` are names of network devices by function as ``read_nic`` told them, which saves a look.
    ``eswitch`` is not told by sysfs. Bridges are in no group here: nobody is given one.
    """
    pfs: list[Pf] = []
    vfs: set[str] = set()
    groups: dict[int, list[PciAddress]] = {}
    wanted: set[int] = set()
    for name in sorted(list_names(f"{settings.sys}/bus/pci/devices")):
        # A VF comes behind its PF (its routing ID is higher), and is not looked at again.
        if name in vfs:
            continue
        base = f"{settings.sys}/bus/pci/devices/{name}"
        kind = read_text(base + "/class") or ""
        pf = read_pf(settings, name, netdevs) if kind.startswith(_NETWORK_CLASS) else None
        if pf is not None:
            pfs.append(pf)
            vfs.update(vf.pci.text for vf in pf.vfs)
            for pci, group in ((pf.pci, pf.iommu_group), *((vf.pci, vf.iommu_group) for vf in pf.vfs)):
                if group is not None:
                    groups.setdefault(group, []).append(pci)
                    wanted.add(group)
        elif not kind.startswith(_BRIDGE_CLASS) and (group := _read_group(base)) is not None:
            groups.setdefault(group, []).append(_parse(name))
    return tuple(pfs), {group: tuple(sorted(groups[group])) for group in wanted}


def read_pf(settings: Settings, name: str, netdevs: Mapping[PciAddress, str] | None = None) -> Pf | None:
    """The physical network function at a PCI address with its VFs; None where it is none, or a VF.

    ``netdevs`` as for ``read_functions``.
    """
    base = f"{settings.sys}/bus/pci/devices/{name}"
    if not (read_text(base + "/class") or "").startswith(_NETWORK_CLASS):
        return None
    names = list_names(base)
    if not names or "physfn" in names:
        return None
    pci = _parse(name)
    vfs: list[Vf] = []
    for link in names:
        if link.startswith("virtfn") and link[6:].isdecimal():
            vf = _read_vf(settings, pci, int(link[6:]), read_link_name(f"{base}/{link}"), netdevs or {})
            if vf is not None:
                vfs.append(vf)
    vfs.sort(key=lambda vf: vf.index)
    return Pf(
        pci=pci,
        netdev=(netdevs or {}).get(pci) or _read_netdev(base) or _read_virtio_netdev(base, names),
        driver=read_link_name(base + "/driver"),
        iommu_group=_read_group(base),
        numvfs=_to_int(read_text(base + "/sriov_numvfs")) if "sriov_numvfs" in names else 0,
        totalvfs=_to_int(read_text(base + "/sriov_totalvfs")) if "sriov_totalvfs" in names else 0,
        vfs=tuple(vfs),
    )


def find_pf(settings: Settings, name: str) -> str:
    """The PCI address of a VF's PF; for any other function its own."""
    return read_link_name(f"{settings.sys}/bus/pci/devices/{name}/physfn") or name


def read_parent_names(settings: Settings, pci: PciAddress) -> tuple[str, ...]:
    """Names of what may be the parent of a function's network device: itself, or its virtio device."""
    names = list_names(f"{settings.sys}/bus/pci/devices/{pci.text}")
    return (pci.text, *(name for name in names if name.startswith("virtio")))


def read_iommu_group(settings: Settings, group: int) -> tuple[PciAddress, ...]:
    """The PCI functions in an IOMMU group; bridges don't count, nobody is given one."""
    folder = f"{settings.sys}/kernel/iommu_groups/{group}/devices"
    members: list[PciAddress] = []
    names = list_names(folder)
    for name in sorted(names):
        try:
            pci = _parse(name)
        except ValueError:
            continue  # not a PCI device (a platform device, on Arm)
        # Whatever is alone in its group is no bridge: it has a group for a network function's sake.
        if len(names) > 1:
            kind = read_text(f"{settings.sys}/bus/pci/devices/{name}/class") or ""
            if kind.startswith(_BRIDGE_CLASS):
                continue
        members.append(pci)
    return tuple(members)


def list_netdevs(settings: Settings) -> list[str]:
    """Names of all network devices of the namespace whose sysfs this is."""
    # bonding_masters is a plain file among the links.
    return sorted(name for name in list_names(f"{settings.sys}/class/net") if name != "bonding_masters")


def real_name(settings: Settings, name: str) -> str:
    """The name by which sysfs knows a device; its others (altnames, see ip-link(8)) are not there."""
    if ":" in name or os.path.lexists(f"{settings.sys}/class/net/{name}"):
        return name
    import socket  # 5 ms, and rarely asked for

    try:
        return socket.if_indextoname(socket.if_nametoindex(name))
    except (OSError, ValueError):  # there is none, or it is no text
        return name


def read_nic(settings: Settings, name: str) -> Nic | None:
    """A network device; None where there is none. To sysfs alone, a macvlan is ``other``."""
    base = f"{settings.sys}/class/net/{name}"
    names = list_names(base)
    ifindex = _to_int(read_text(base + "/ifindex")) if names else 0
    flags = read_text(base + "/flags")
    if not ifindex or flags is None:
        return None
    entries = frozenset(names)
    lowers = tuple(sorted(entry[6:] for entry in names if entry.startswith("lower_")))
    uppers = {entry[6:] for entry in names if entry.startswith("upper_")}
    master = read_link_name(base + "/master") if "master" in entries else None
    if master:
        uppers.add(master)
    return Nic(
        netdev=name,
        ifindex=ifindex,
        kind=_kind(base, entries),
        mac=read_text(base + "/address") or "",
        mtu=_to_int(read_text(base + "/mtu")),
        up=bool(int(flags, 16) & _IFF_UP) if flags else False,
        pci=_read_device_pci(base) if "device" in entries else None,
        master=master,
        lowers=lowers,
        uppers=tuple(sorted(uppers)),
        vlan_filtering="bridge" in entries and read_text(base + "/bridge/vlan_filtering") == "1",
    )


def read_macvtap_rdev(settings: Settings, ifname: str) -> int | None:
    """The device number (st_rdev) of a macvtap's character device; None where there is no such macvtap."""
    base = f"{settings.sys}/class/net/{ifname}/macvtap"
    for name in list_names(base):
        rdev = read_rdev(f"{base}/{name}/dev")
        if rdev is not None:
            return rdev
    return None


def read_vfio_rdevs(settings: Settings, pci: PciAddress) -> frozenset[int]:
    """Device numbers through which user space may hold a function.

    Those of its VFIO group, of its own VFIO device (kernel 6.6 and newer) and of its UIO device.
    """
    device = f"{settings.sys}/bus/pci/devices/{pci.text}"
    paths = [
        f"{device}/{folder}/{name}/dev"
        for folder in ("vfio-dev", "uio")
        for name in list_names(f"{device}/{folder}")
    ]
    group = read_link_name(device + "/iommu_group")
    if group is not None:
        paths += [f"{settings.sys}/class/vfio/{prefix}{group}/dev" for prefix in ("", "noiommu-")]
    return frozenset(rdev for path in paths if (rdev := read_rdev(path)) is not None)


# --- files --------------------------------------------------------------------------------------


def read_text(path: str) -> str | None:
    """A small file without its newline; None where it is absent."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, 4096).decode("utf-8", "replace").rstrip("\n")
        finally:
            os.close(descriptor)
    except OSError as error:
        _require_absent(error)
        return None


def read_link_name(path: str) -> str | None:
    """The last part of what a link points at; None where it is absent."""
    try:
        return os.readlink(path).rpartition("/")[2]
    except OSError as error:
        _require_absent(error)
        return None


def list_names(path: str) -> list[str]:
    """The names in a folder; none where it is absent."""
    try:
        return os.listdir(path)
    except OSError as error:
        _require_absent(error)
        return []


def read_rdev(path: str) -> int | None:
    """The device number that a ``dev`` file tells as MAJOR:MINOR; None where it is absent."""
    major, _, minor = (read_text(path) or "").partition(":")
    return os.makedev(int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _require_absent(error: OSError) -> None:
    """What we may not or cannot read must not pass for a device that isn't there."""
    if error.errno not in _ABSENT:
        raise VnetLockError(f"cannot read {error.filename}: {error.strerror}") from error


# --- parts --------------------------------------------------------------------------------------


def _read_vf(
    settings: Settings, pf: PciAddress, index: int, name: str | None, netdevs: Mapping[PciAddress, str]
) -> Vf | None:
    if name is None:
        return None
    base = f"{settings.sys}/bus/pci/devices/{name}"
    pci = _parse(name)
    driver = read_link_name(base + "/driver")
    netdev = netdevs.get(pci) or (_read_netdev(base) if driver else None)
    return Vf(pci, pf, index, netdev, driver, _read_group(base))


@cache
def _parse(name: str) -> PciAddress:
    """A function is named by its folder, by its network device and by its IOMMU group."""
    return PciAddress.parse(name)


def _read_group(base: str) -> int | None:
    group = read_link_name(base + "/iommu_group")
    return int(group) if group is not None and group.isdecimal() else None


def _read_netdev(base: str) -> str | None:
    """The function's network device; of several, as on a two-port function, the first."""
    return min(list_names(base + "/net"), default=None)


def _read_virtio_netdev(base: str, names: list[str]) -> str | None:
    """A virtio NIC has a virtio device between the PCI function and the network device."""
    for name in names:
        if name.startswith("virtio"):
            return _read_netdev(f"{base}/{name}")
    return None


def _read_device_pci(base: str) -> PciAddress | None:
    """The PCI function of a network device; None where it has none of its own (USB, virtual)."""
    name = read_link_name(base + "/device")
    try:
        if name is not None and name.startswith("virtio"):
            name = os.path.realpath(base + "/device").split("/")[-2]
        return _parse(name) if name is not None else None
    except (FileNotFoundError, ValueError):  # it may go while its link is followed
        return None


def _kind(base: str, entries: frozenset[str]) -> str:
    for entry, kind in (
        ("bridge", "bridge"),
        ("bonding", "bond"),
        ("macvtap", "macvtap"),
        ("tun_flags", "tun"),
        ("device", "physical"),
    ):
        if entry in entries:
            return kind
    for line in (read_text(base + "/uevent") or "").splitlines():
        name, _, value = line.partition("=")
        if name == "DEVTYPE" and value in _DEVTYPES:
            return value
    return "other"


def _to_int(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
