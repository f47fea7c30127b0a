"""Who uses network functions and devices, as far as the kernel tells. Evidence only: use.py judges it.

The expensive questions (all descriptors, other namespaces) are asked only where a device gives reason to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vnet_lock.dataclass import replace
from vnet_lock.kernel.marks import read_mark
from vnet_lock.kernel.pci import is_vfio_driver
from vnet_lock.kernel.processes import find_holders, read_command, read_lock_holder
from vnet_lock.kernel.sysfs import list_names, read_macvtap_rdev, read_parent_names, read_vfio_rdevs
from vnet_lock.model import Nic, PciAddress, Pf, Resource, ResourceKind, UseKind, User, Vf
from vnet_lock.settings import Settings

# Drivers that keep a function from the kernel's own network stack, for a user space driver or for Xen.
_USERSPACE_DRIVERS = ("uio_pci_generic", "igb_uio", "pci-stub", "pciback", "xen-pciback")

# The PCI address in the source of a hostdev, an interface or a network's actual device. Guest addresses
# (<address type='pci' …/>) stand outside of <source>.
# Compiled (and kept, by re) at their first use: that takes 0.6 ms, and most hosts have nothing to search.
_SOURCE = rb"<source\b[^<>]*>\s*<address\b([^<>]*?)/>"
_ATTRIBUTE = rb"""\b(domain|bus|slot|function)\s*=\s*['"]0x([0-9a-fA-F]+)['"]"""
_METADATA = rb"(?s)<metadata>.*</metadata>"
_UUID = rb"<uuid>\s*([0-9a-fA-F-]{36})\s*</uuid>"


def read_users(
    settings: Settings,
    pfs: Iterable[Pf],
    nics: Iterable[Nic],
    addresses: Mapping[int, tuple[str, ...]],
    *,
    thorough: bool,
) -> dict[Resource, tuple[User, ...]]:
    """The users of each resource in use.

    ``nics`` has the uppers of those that are asked about, too; ``addresses`` are by ifindex. Not
    ``thorough`` leaves out who exactly has a PF's macvtaps and packet sockets open: hosts share PFs.
    """
    evidence = _Evidence(settings, tuple(pfs), tuple(nics), thorough)
    evidence.collect_functions()
    evidence.collect_elsewhere()
    evidence.collect_uppers()
    evidence.collect_addresses(addresses)
    evidence.collect_routes(addresses)
    evidence.collect_sockets()
    evidence.resolve_holders()
    return {resource: tuple(users) for resource, users in evidence.users.items()}


class _Evidence:
    """What was found so far, and what is still to be looked up in one pass over all descriptors."""

    def __init__(
        self, settings: Settings, pfs: tuple[Pf, ...], nics: tuple[Nic, ...], thorough: bool
    ) -> None:
        self._settings = settings
        self._functions: tuple[Pf | Vf, ...] = (*pfs, *(vf for pf in pfs for vf in pf.vfs))
        self._nics = {nic.netdev: nic for nic in nics}
        self._vfs = {vf.pci for pf in pfs for vf in pf.vfs}
        self._thorough = thorough
        # Evidence that holders may be found for: by device number and by socket inode.
        self._devices: dict[int, list[tuple[Resource, User]]] = {}
        self._sockets: dict[int, list[tuple[Resource, User]]] = {}
        # Functions with a network driver but without a network device here.
        self._gone: list[Pf | Vf] = []
        self.users: dict[Resource, list[User]] = {}

    def collect_functions(self) -> None:
        """What the drivers tell: VFIO, user space drivers, and network devices that went elsewhere."""
        held = False
        for function in self._functions:
            if function.driver is None or function.netdev is not None:
                continue
            if is_vfio_driver(function.driver):
                held = True
                for rdev in read_vfio_rdevs(self._settings, function.pci):
                    self._ask_device(rdev, function.resource, User(None, "", "", UseKind.VFIO))
            elif function.driver in _USERSPACE_DRIVERS:
                user = User(None, "", f"bound to {function.driver}", UseKind.DRIVER)
                self._add(function.resource, user)
                for rdev in read_vfio_rdevs(self._settings, function.pci):
                    self._ask_device(rdev, function.resource, replace(user, how=""))
            else:
                self._gone.append(function)
        if held:
            self._collect_libvirt()

    def collect_uppers(self) -> None:
        """Devices that stand on others: macvtaps, VLANs, bridges, bonds."""
        for nic in self._nics.values():
            resource = self._resource(nic)
            for name in nic.uppers:
                upper = self._nics.get(name)
                kind = upper.kind if upper and upper.kind != "other" else "device"
                how = f'port of {kind} "{name}"' if kind in ("bridge", "bond") else f'{kind} "{name}" on it'
                mark = read_mark(self._settings, name)
                user = User(None, "", how, UseKind.UPPER, link=name, mark=mark)
                rdev = read_macvtap_rdev(self._settings, name) if kind == "macvtap" else None
                self._add(resource, user)
                if rdev is not None and self._is_worth_a_pid(resource):
                    self._ask_device(rdev, resource, user)

    def collect_elsewhere(self) -> None:
        """Network devices that were moved to other namespaces, and uppers that were.

        An upper only works while its lower device is up. On a VF it is looked for always, on others only
        where the whole host is asked about.
        """
        lowers = {
            nic.ifindex: resource
            for nic in self._nics.values()
            if nic.up and self._is_worth_a_pid(resource := self._resource(nic))
        }
        parents = {function.pci: read_parent_names(self._settings, function.pci) for function in self._gone}
        if not parents and not lowers:
            return
        from vnet_lock.kernel.namespaces import search  # only where there is something to look for

        found = search(self._settings, {name for names in parents.values() for name in names}, lowers)
        for function in self._gone:
            where = next(
                (found.netdevs[name] for name in parents[function.pci] if name in found.netdevs), None
            )
            how = f"bound to {function.driver}, with no network device that could be found"
            user = User(None, "", how, UseKind.UNSEEN)
            if where is not None:
                namespace, link = where
                user = self._name(namespace.pid, f"{link.name} is in {namespace.text}", UseKind.NAMESPACE)
            self._add(function.resource, user)
        for ifindex, uppers in found.uppers.items():
            for namespace, link in uppers:
                how = f'{link.kind} "{link.name}" on it, in {namespace.text}'
                self._add(
                    lowers[ifindex], replace(self._name(namespace.pid, how, UseKind.UPPER), link=link.name)
                )

    def collect_addresses(self, addresses: Mapping[int, tuple[str, ...]]) -> None:
        """Devices that the host itself talks through; one that is merely up is not in use."""
        for nic in self._nics.values():
            found = addresses.get(nic.ifindex, ())
            if nic.up and found:
                how = f"address {', '.join(found)} on {nic.netdev}"
                self._add(self._resource(nic), User(None, "host", how, UseKind.ADDRESS))

    def collect_routes(self, addresses: Mapping[int, tuple[str, ...]]) -> None:
        """Devices without an address that the host's IPv4 way out leads through.

        An IPv6 one has an address, or nothing but link-local neighbours.
        """
        try:
            with open(f"{self._settings.proc}/net/route", encoding="ascii") as file:
                for line in file:
                    # Iface Destination Gateway Flags RefCnt Use Metric Mask; the table is in the order of
                    # destinations (fib_route_seq_start), and may be huge behind the default routes.
                    words = line.split()
                    if words[1] not in ("Destination", "00000000"):
                        return
                    nic = self._nics.get(words[0])
                    if nic and not addresses.get(nic.ifindex):
                        how = f"default route through {nic.netdev}"
                        self._add(self._resource(nic), User(None, "host", how, UseKind.ADDRESS))
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            return  # a kernel without IPv4, or a host that hides it

    def collect_sockets(self) -> None:
        """Packet sockets that are bound to a device (packet(7), proc(5))."""
        by_ifindex = {nic.ifindex: nic for nic in self._nics.values()}
        try:
            with open(f"{self._settings.proc}/net/packet", encoding="ascii") as file:
                rows = [line.split() for line in file][1:]
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            return  # a kernel without packet sockets, or a host that hides them
        for row in rows:
            # sk RefCnt Type Proto Iface R Rmem User Inode
            if len(row) < 9 or not row[4].isdecimal() or int(row[4]) not in by_ifindex:
                continue
            nic = by_ifindex[int(row[4])]
            resource = self._resource(nic)
            user = User(None, "", f"packet socket on {nic.netdev}", UseKind.SOCKET)
            self._add(resource, user)
            if self._is_worth_a_pid(resource):
                self._sockets.setdefault(int(row[8]), []).append((resource, user))

    def resolve_holders(self) -> None:
        """Find the processes behind the evidence: one pass over all descriptors, if there is any."""
        devices, sockets = find_holders(self._settings, self._devices.keys(), self._sockets.keys())
        for asked, holders in ((self._devices, devices), (self._sockets, sockets)):
            for key, found in holders.items():
                for resource, user in asked[key]:
                    self._discard(resource, user)
                    for holder in found:
                        self._add(
                            resource,
                            replace(user, pid=holder.pid, command=holder.command, how=user.how or holder.how),
                        )

    def _collect_libvirt(self) -> None:
        """Functions that a running guest's status file names: its QEMU holds the lock on its pid file."""
        resources = {function.pci: function.resource for function in self._functions}
        folder = f"{self._settings.libvirt_run}/qemu"
        for file_name in sorted(list_names(folder)):
            name, dot, suffix = file_name.rpartition(".")
            if not dot or suffix != "xml":
                continue
            try:
                with open(f"{folder}/{file_name}", "rb") as file:
                    status = file.read()
                addresses = read_status(status)
                mentioned = [resources[pci] for pci in addresses if pci in resources]
                holder = read_lock_holder(f"{folder}/{name}.pid") if mentioned else None
            except (FileNotFoundError, PermissionError):
                continue  # ended just now, or not ours to see
            if holder is None:
                continue
            pid = holder if holder > 0 else None
            uuid = re.search(_UUID, status)
            mark = uuid[1].decode("ascii").lower() if uuid else None
            user = self._name(pid, f'libvirt\'s guest "{name}" has it', UseKind.LIBVIRT)
            for resource in mentioned:
                self._add(resource, replace(user, mark=mark))

    def _name(self, pid: int | None, how: str, kind: UseKind) -> User:
        return User(pid, read_command(self._settings, pid) if pid else "", how, kind)

    def _is_worth_a_pid(self, resource: Resource) -> bool:
        return self._thorough or resource.kind is ResourceKind.VF

    def _resource(self, nic: Nic) -> Resource:
        if nic.pci is None:
            return Resource.nic(nic.netdev)
        return Resource.vf(nic.pci) if nic.pci in self._vfs else Resource.pf(nic.pci)

    def _ask_device(self, rdev: int, resource: Resource, user: User) -> None:
        self._devices.setdefault(rdev, []).append((resource, user))

    def _add(self, resource: Resource, user: User) -> None:
        users = self.users.setdefault(resource, [])
        if user not in users:
            users.append(user)

    def _discard(self, resource: Resource, user: User) -> None:
        if user in self.users.get(resource, ()):
            self.users[resource].remove(user)


def read_status(status: bytes) -> tuple[PciAddress, ...]:
    """PCI addresses that a libvirt status file names as sources of devices.

    No XML parser: lxml is too dear for a hook, and of a file that is being written what is there counts.
    """
    found: list[PciAddress] = []
    for match in re.finditer(_SOURCE, re.sub(_METADATA, b"", status)):
        parts = {key: int(value, 16) for key, value in re.findall(_ATTRIBUTE, match[1])}
        if {b"bus", b"slot", b"function"} <= parts.keys():
            pci = PciAddress(parts.get(b"domain", 0), parts[b"bus"], parts[b"slot"], parts[b"function"])
            if pci not in found:
                found.append(pci)
    return tuple(found)
