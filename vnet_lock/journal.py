"""What a claim remembers so that it can be undone: what was there before, and what was made.

Values and their JSON form only; carrying an undo out is undo.py's.
"""

from __future__ import annotations

from typing import Any

from vnet_lock.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class VfAdmin:
    """A VF's administrative settings before, as its PF had them; None where the driver has no such thing.

    ``pf`` is the PF's PCI address, rates are in Mbit/s (0: no limit).
    """

    pf: str
    index: int
    mac: str
    vlan: int
    qos: int
    spoofchk: bool | None = None
    trust: bool | None = None
    link_state: int | None = None
    min_tx_rate_mbps: int = 0
    max_tx_rate_mbps: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """A network device's own settings before; ``device`` is its PCI address, or its name if it has none.

    ``addr_gen_mode`` is as in ip-sysctl (0 EUI-64, 1 none), None without IPv6; ``name`` its name.
    """

    device: str
    mac: str
    mtu: int
    up: bool
    allmulticast: bool = False
    addr_gen_mode: int | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver a PCI function had, and its driver_override; None for none."""

    pci: str
    driver: str | None
    override: str | None = None


@dataclass(frozen=True, slots=True)
class MadeLink:
    """A link that is made for the guest, under a name that no other has; ``final`` is what it is renamed to.

    The link carries ``alias`` (its ifalias): only a link with that alias, or with the first name, is ours.
    """

    name: str
    final: str
    alias: str


@dataclass(frozen=True, slots=True)
class SharedLink:
    """A bridge or VLAN device made as a MadeLink is, for guests who share it."""

    name: str
    final: str
    alias: str


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A setting of the kernel before, which guests share; ``name`` is its path, net/ipv4/ip_forward say."""

    name: str
    before: str


@dataclass(frozen=True, slots=True)
class NatTable:
    """The nftables table that masquerades what comes from a bridge of ours, made with the bridge."""

    bridge: str


@dataclass(frozen=True, slots=True)
class DhcpServer:
    """A dnsmasq on a bridge of ours, by its pid and when it started, in clock ticks since boot."""

    bridge: str
    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class Sysctls:
    """Settings below one directory before, that change together, and that guests share.

    ``before`` has a word NAME=VALUE for each, in the order in which they are restored:
    ``all/forwarding=0 eth0/accept_ra=1`` below net/ipv6/conf.
    """

    directory: str
    before: str


@dataclass(frozen=True, slots=True)
class ProxyNeighbour:
    """An address that the host answers for on one of its devices (``ip neighbour show proxy``)."""

    netdev: str
    address: str


@dataclass(frozen=True, slots=True)
class EswitchMode:
    """The mode of a PF's embedded switch (``veb`` or ``vepa``) before, and what it was set to.

    ``pf`` is the PF's PCI address; the guests on its VFs share it.
    """

    pf: str
    before: str
    mode: str


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A unix socket in the file system, where the guest's QEMU finds its network."""

    path: str


@dataclass(frozen=True, slots=True)
class Companion:
    """The process that is to finish an interface once the guest runs, by pid and start ticks since boot.

    The entry goes when that is done. ``failure`` is why it could not be, empty as long as nothing failed.
    ``link`` is what it is to raise, None where it plugs a device in.
    """

    pid: int
    start_ticks: int
    failure: str = ""
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Keeper:
    """The process that keeps up what serves a libvirt guest, whose QEMU inherits nothing of ours.

    By pid and start ticks since boot. What serves the guest ends with it.
    """

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class Datapath:
    """The process that carries an interface's packets, by pid and start ticks since boot.

    It ends by itself when the guest does; where it ended before, the guest has no network.
    """

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class LibvirtMacvtap:
    """A macvtap that libvirt makes itself on a device, and leaves there if it is killed before QEMU runs.

    ``device`` is as of a Link, ``mac`` the guest's; ``name`` is the macvtap's, None where libvirt chose it.
    """

    device: str
    mac: str
    name: str | None = None


Entry = (
    VfAdmin
    | Link
    | Driver
    | MadeLink
    | SharedLink
    | Sysctl
    | Sysctls
    | ProxyNeighbour
    | NatTable
    | DhcpServer
    | EswitchMode
    | SocketFile
    | Companion
    | Keeper
    | Datapath
    | LibvirtMacvtap
)
_KINDS: dict[str, type[Entry]] = {
    "vf-admin": VfAdmin,
    "link": Link,
    "driver": Driver,
    "made-link": MadeLink,
    "shared-link": SharedLink,
    "sysctl": Sysctl,
    "nat-table": NatTable,
    "dhcp-server": DhcpServer,
    "sysctls": Sysctls,
    "proxy-neighbour": ProxyNeighbour,
    "eswitch-mode": EswitchMode,
    "socket-file": SocketFile,
    "companion": Companion,
    "keeper": Keeper,
    "datapath": Datapath,
    "libvirt-macvtap": LibvirtMacvtap,
}
_NAMES = {cls: name for name, cls in _KINDS.items()}


def share_key(entry: Entry) -> str | None:
    """What guests who share it know it by; None for what is one guest's alone.

    What is shared is undone with the last claim whose journal has it.
    """
    match entry:
        case SharedLink():
            return f"link {entry.final}"
        case Sysctl():
            return f"sysctl {entry.name}"
        case NatTable():
            return f"nat {entry.bridge}"
        case DhcpServer():
            return f"dhcp {entry.bridge} {entry.pid} {entry.start_ticks}"
        case Sysctls():
            return f"sysctls {entry.directory}"
        case EswitchMode():
            return f"eswitch {entry.pf}"
        case _:
            return None


def to_json(entry: Entry) -> dict[str, Any]:
    """The entry as a JSON object, its kind under ``kind``."""
    # Not asdict(): it copies each value deeply, at five times the cost, while the guard is held.
    return {
        "kind": _NAMES[type(entry)],
        **{name: getattr(entry, name) for name in entry.__dataclass_fields__},
    }


def from_json(value: dict[str, Any]) -> Entry:
    """The entry back; ValueError, KeyError or TypeError where it is none."""
    cls = _KINDS[value["kind"]]
    known = cls.__dataclass_fields__
    return cls(**{name: item for name, item in value.items() if name in known})
