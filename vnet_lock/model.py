"""The words of the domain: addresses, devices, owners and claims. Values only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import StrEnum

from vnet_lock.dataclass import dataclass, field
from vnet_lock.journal import Entry

_PCI = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")


@dataclass(frozen=True, slots=True, order=True)
class PciAddress:
    """A PCI function: ``PciAddress.parse("af:06.0").text == "0000:af:06.0"``."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """Take ``[DDDD:]BB:DD.F`` in hexadecimal; ValueError otherwise."""
        match = _PCI.fullmatch(text)
        if not match or int(match[3], 16) > 0x1F:
            raise ValueError(f"{text!r} is not a PCI address (like 0000:af:06.0)")
        return cls(int(match[1] or "0", 16), int(match[2], 16), int(match[3], 16), int(match[4]))

    @property
    def text(self) -> str:
        """As the kernel and libvirt write it."""
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"

    def __str__(self) -> str:
        return self.text


# --- what is claimed, and by whom ---------------------------------------------------------------


class ResourceKind(StrEnum):
    """What a claim can be about."""

    VF = "vf"
    PF = "pf"  # any physical network function, with SR-IOV or without
    NIC = "nic"  # a network device with no PCI function of its own: bond, bridge, VLAN, veth
    IP = "ip"  # an IP address of a routed guest


@dataclass(frozen=True, slots=True, order=True)
class Resource:
    """``vf:0000:01:10.0``, ``pf:0000:01:00.0``, ``nic:bond0`` or ``ip:192.0.2.7``."""

    kind: ResourceKind
    name: str

    @classmethod
    def vf(cls, pci: PciAddress) -> Resource:
        """The VF at this address."""
        return cls(ResourceKind.VF, pci.text)

    @classmethod
    def pf(cls, pci: PciAddress) -> Resource:
        """The PF (or other network function) at this address."""
        return cls(ResourceKind.PF, pci.text)

    @classmethod
    def nic(cls, netdev: str) -> Resource:
        """A device that only has a name."""
        return cls(ResourceKind.NIC, netdev)

    @classmethod
    def ip(cls, address: str) -> Resource:
        """An IP address, as ``parse_address`` returns it."""
        return cls(ResourceKind.IP, address)

    @classmethod
    def parse(cls, text: str) -> Resource:
        """ValueError where the text is no resource."""
        kind, colon, name = text.partition(":")
        if not colon or kind not in tuple(ResourceKind):
            raise ValueError(
                f"{text!r} is no resource (like vf:0000:af:06.0, pf:0000:af:00.0, nic:bond0, ip:192.0.2.7)"
            )
        if kind == ResourceKind.NIC:
            if not is_ifname(name):
                raise ValueError(f"{name!r} is not the name of a network device")
        elif kind == ResourceKind.IP:
            name = parse_address(name)
        else:
            name = PciAddress.parse(name).text
        return cls(ResourceKind(kind), name)

    @property
    def pci(self) -> PciAddress | None:
        """The PCI address; None for what is no PCI function."""
        return PciAddress.parse(self.name) if self.kind in (ResourceKind.VF, ResourceKind.PF) else None

    @property
    def text(self) -> str:
        """As users and claim records write it."""
        return f"{self.kind}:{self.name}"

    def __str__(self) -> str:
        return self.text


def name_of(resource: Resource) -> str:
    """A resource as a person calls it: ``VF 0000:af:06.2``, ``device bond0``, ``address 192.0.2.7``."""
    words = {ResourceKind.NIC: "device", ResourceKind.IP: "address"}
    return f"{words.get(resource.kind) or resource.kind.upper()} {resource.name}"


def is_ifname(text: str) -> bool:
    """Whether a device can have this name (dev_valid_name, net/core/dev.c; a % is a pattern's)."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8
        return False
    return 0 < length < 16 and text not in (".", "..") and not re.search(r"[/:%\s\0]", text)


def parse_address(text: str) -> str:
    """An IP address as the kernel writes it; ValueError where the text is none."""
    import socket  # 5 ms, and only routed guests have addresses

    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            return socket.inet_ntop(family, socket.inet_pton(family, text))
    raise ValueError(f"{text!r} is no IP address (like 192.0.2.7 or 2001:db8::7)")


def parse_guest_address(text: str) -> str:
    """As ``parse_address``; ValueError also for what no guest can have for itself on a network."""
    from ipaddress import ip_address  # 8 ms

    address = ip_address(parse_address(text))
    for what in ("unspecified", "loopback", "multicast", "link_local", "reserved"):
        if getattr(address, f"is_{what}"):
            raise ValueError(
                f"{address} is {what.replace('_', '-')}: no address that can be routed to a guest"
            )
    return parse_address(text)


class Mode(StrEnum):
    """How a resource is claimed."""

    EXCLUSIVE = "exclusive"
    SHARED = "shared"


class State(StrEnum):
    """What a claim record says of itself; what an audit finds on top is never stored."""

    RESERVED = "reserved"
    ACTIVE = "active"
    RELEASING = "releasing"


@dataclass(frozen=True, slots=True)
class Process:
    """A process that cannot be mistaken for a later one with its pid.

    ``start_ticks`` is field 22 of /proc/PID/stat (proc(5)): clock ticks after boot.
    """

    pid: int
    start_ticks: int


class OwnerKind(StrEnum):
    """What lives as long as the guest."""

    LIBVIRT = "libvirt"
    QEMU = "qemu"
    PROCESS = "process"


@dataclass(frozen=True, slots=True)
class Owner:
    """The thing that lives as long as the guest, never the hook or the helper.

    ``process`` is the guest's process; for libvirt it is the daemon that is starting the guest, None once the
    guest has ended and libvirt's status file tells the rest, and where there is no daemon it is vnet-qemu.
    ``pid_file`` is libvirt's own, whose lock the QEMU that it runs for the guest holds for its life.
    """

    kind: OwnerKind
    name: str
    boot_id: str
    uuid: str | None = None
    process: Process | None = None
    pid_file: str | None = None

    def is_same_guest(self, other: Owner) -> bool:
        """Whether a claim of one is no conflict for the other."""
        if self.boot_id != other.boot_id or self.kind is not other.kind:
            return False
        if self.kind is OwnerKind.LIBVIRT:
            return self.uuid == other.uuid
        return self.process == other.process

    @property
    def text(self) -> str:
        """In words: ``guest "web1"``, ``qemu "vm2" (pid 77)``; without a pid that is in its pid file."""
        noun = "guest" if self.kind is OwnerKind.LIBVIRT else str(self.kind)
        process = None if self.kind is OwnerKind.LIBVIRT or self.pid_file else self.process
        pid = f" (pid {process.pid})" if process else ""
        return f'{noun} "{self.name}"{pid}'


@dataclass(frozen=True, slots=True)
class Wanted:
    """One resource that a request needs, and how; ``pf`` is the PF of a VF."""

    resource: Resource
    mode: Mode
    pf: PciAddress | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a guest that is still to start here has: a claim with nobody at work on it.

    ``operation`` is libvirt's (``migrate`` or ``restore``), ``until_s`` when it is over, on the clock of
    ``processes.read_uptime_s``: no `release` follows where libvirt doesn't get as far as `prepare`.
    """

    operation: str
    until_s: float


# What stands in the place of an interface in a claim that a person made.
BY_HAND = "claim"


@dataclass(frozen=True, slots=True)
class Claim:
    """One record of the claim table.

    All claims that one interface needed share ``token``; the journal stands in the one whose resource
    sorts first.
    ``interface`` is the alias or netdev id for which it was made, ``since`` is seconds of the epoch.
    ``vlan`` is what the guest asked for, None where it didn't, or the record is of an older version.
    ``worker`` is the process that is changing things while the state is reserved or releasing; what is
    reserved without one has a ``reservation``. ``has_host_pids`` says that its processes are known by their
    pids in the host's first pid namespace, ``has_host_network`` that its devices are in init's network
    namespace.
    """

    resource: Resource
    mode: Mode
    state: State
    owner: Owner
    token: str
    interface: str
    since: float
    combination: str | None = None
    mac: str | None = None
    pf: PciAddress | None = None
    worker: Process | None = None
    journal: tuple[Entry, ...] = ()
    vlan: int | None = None
    reservation: Reservation | None = None
    has_host_pids: bool = False
    has_host_network: bool = False

    @property
    def is_by_hand(self) -> bool:
        """Whether a person made it; what a helper's command has was made for it, as a guest's is."""
        is_process = self.owner.kind is OwnerKind.PROCESS
        return is_process and self.interface == BY_HAND and self.combination is None


@dataclass(frozen=True, slots=True)
class Damaged:
    """A claim record that cannot be trusted or read: what it is about counts as held."""

    path: str
    reason: str
    resource: Resource | None


@dataclass(frozen=True, slots=True)
class Claims:
    """The claim table at one moment."""

    records: tuple[Claim, ...] = ()
    damaged: tuple[Damaged, ...] = ()

    def on(self, resource: Resource) -> tuple[Claim, ...]:
        """The claims on one resource."""
        return tuple(claim for claim in self.records if claim.resource == resource)

    def of(self, owner: Owner) -> tuple[Claim, ...]:
        """The claims of one guest."""
        return tuple(claim for claim in self.records if claim.owner.is_same_guest(owner))

    def with_token(self, token: str) -> tuple[Claim, ...]:
        """The claims made for one interface."""
        return tuple(claim for claim in self.records if claim.token == token)


# --- what there is ------------------------------------------------------------------------------


class UseKind(StrEnum):
    """What kind of evidence says that a device is in use."""

    VFIO = "vfio"  # somebody has its VFIO device open
    UPPER = "upper"  # another network device stands on it
    NAMESPACE = "namespace"  # its netdev was moved to another network namespace
    ADDRESS = "address"  # the host itself has an address on it
    SOCKET = "socket"  # a packet socket or a tap's descriptor
    DRIVER = "driver"  # a driver that is neither its own nor VFIO's
    UNSEEN = "unseen"  # its own driver has it, but its netdev is nowhere that we can see
    LIBVIRT = "libvirt"  # libvirt's status file of a running guest names it


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who uses a device, claimed or not: ``how`` names the evidence in a few words.

    ``link`` is the name of the other device of an UPPER. ``mark`` says whose use it is, where the evidence
    tells: the token in an upper's ifalias, or the UUID of libvirt's guest.
    """

    pid: int | None
    command: str
    how: str
    kind: UseKind = UseKind.VFIO
    link: str | None = None
    mark: str | None = None

    @property
    def text(self) -> str:
        """In words, for a message."""
        who = f"{self.command} (pid {self.pid})" if self.pid else self.command
        return f"{who}: {self.how}" if who else self.how

    @property
    def by_whom(self) -> str:
        """After "in use": ``by qemu (pid 7): has …``, or the bare evidence, ``(bound to igb_uio)``."""
        return f"by {self.text}" if self.command else f"({self.how})"


@dataclass(frozen=True, slots=True)
class Vf:
    """A virtual function; ``netdev`` is None while it has none in this network namespace.

    ``vlan`` is its administrative VLAN, 0 for none; None where that wasn't asked or isn't told.
    """

    pci: PciAddress
    pf: PciAddress
    index: int
    netdev: str | None
    driver: str | None
    iommu_group: int | None
    vlan: int | None = None

    @property
    def resource(self) -> Resource:
        """What a claim on it is about."""
        return Resource.vf(self.pci)


@dataclass(frozen=True, slots=True)
class Pf:
    """A physical network function; ``totalvfs`` is 0 where it has no SR-IOV.

    ``eswitch`` is ``veb`` or ``vepa``, None where the driver doesn't tell.
    """

    pci: PciAddress
    netdev: str | None
    driver: str | None
    iommu_group: int | None
    numvfs: int
    totalvfs: int
    eswitch: str | None = None
    vfs: tuple[Vf, ...] = ()

    @property
    def resource(self) -> Resource:
        """What a claim on it is about."""
        return Resource.pf(self.pci)


@dataclass(frozen=True, slots=True)
class Nic:
    """A network device of this network namespace, with a PCI function or without.

    ``kind`` is what sysfs tells: ``physical``, ``bridge``, ``bond``, ``vlan``, ``macvtap``, ``macvlan``,
    ``tun`` or ``other``. ``lowers`` and ``uppers`` are names of devices directly below and above.
    ``addresses`` are the host's own on it; ``vlan_filtering`` says that a bridge has VLANs of its own.
    ``vlan`` is the ID of an 802.1Q VLAN device, None for all others.
    """

    netdev: str
    ifindex: int
    kind: str
    mac: str
    mtu: int
    up: bool
    pci: PciAddress | None = None
    master: str | None = None
    lowers: tuple[str, ...] = ()
    uppers: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    vlan_filtering: bool = False
    vlan: int | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The network devices of this host at one moment, and who uses them.

    ``users`` has an entry for each resource in use as far as the kernel tells, whoever uses it;
    ``iommu_groups`` has all PCI functions of each group that a network function is in.
    """

    pfs: tuple[Pf, ...] = ()
    nics: tuple[Nic, ...] = ()
    users: Mapping[Resource, tuple[User, ...]] = field(default_factory=dict)
    iommu_groups: Mapping[int, tuple[PciAddress, ...]] = field(default_factory=dict)

    def vfs(self) -> Iterator[Vf]:
        """All VFs of all PFs."""
        for pf in self.pfs:
            yield from pf.vfs

    def pf_at(self, pci: PciAddress) -> Pf | None:
        """The PF at an address."""
        return next((pf for pf in self.pfs if pf.pci == pci), None)

    def pf_named(self, name: str) -> Pf | None:
        """The PF with this name of its network device, or at this PCI address, long or short."""
        found = next((pf for pf in self.pfs if name in (pf.netdev, pf.pci.text)), None)
        if found is None:
            with suppress(ValueError):
                return self.pf_at(PciAddress.parse(name))
        return found

    def vf_at(self, pci: PciAddress) -> Vf | None:
        """The VF at an address."""
        return next((vf for vf in self.vfs() if vf.pci == pci), None)

    def nic_named(self, netdev: str) -> Nic | None:
        """The network device with a name."""
        return next((nic for nic in self.nics if nic.netdev == netdev), None)

    def resource_of(self, nic: Nic) -> Resource:
        """What a claim on a network device is about."""
        if nic.pci is None:
            return Resource.nic(nic.netdev)
        return Resource.vf(nic.pci) if self.vf_at(nic.pci) else Resource.pf(nic.pci)

    def users_of(self, resource: Resource) -> tuple[User, ...]:
        """Who uses a resource."""
        return self.users.get(resource, ())
