"""The command line that QEMU gets: every ``host`` network in it as what QEMU knows.

Never looks at the host, opens or runs anything; the words come from how each network was connected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol, assert_never

from vnet_lock.combination import Backend, Combination
from vnet_lock.dataclass import dataclass
from vnet_lock.model import PciAddress
from vnet_lock.qemu_argv import Host, Nic, QemuArgv
from vnet_lock.qemu_memory import share_memory
from vnet_lock.qemu_words import NETWORKS, Option, Properties
from vnet_lock.request import Intent

# Properties that every PCI device of QEMU has: they stay when a NIC becomes vfio-pci.
_PCI_KEYS = (
    *("id", "bus", "addr", "busnr", "bootindex", "multifunction", "acpi-index", "rombar", "failover_pair_id"),
)
# Those of them, and of a NIC's, that JSON has as numbers.
_NUMBERS = ("bootindex", "vectors", "acpi-index", "rombar")
_IOMMUFD = "vnet-iommufd"
# Networks that -net doesn't know: they are -netdev always, and the NIC of -net is put on them by their id.
_NETDEV_ONLY = (Backend.SOCKET, Backend.SOCKET_VHOST, Backend.PASST)
# How a QEMU that has the newer word (since 9.2) comes back to a back-end that ended, and how an older one.
RECONNECT_MS, RECONNECT_S = ("reconnect-ms", 500), ("reconnect", 1)


class Connected(Protocol):
    """How a guest's interface is connected; descriptors are numbers, or words that stand for them."""

    @property
    def combination(self) -> Combination: ...  # noqa: D102
    @property
    def mac(self) -> str | None: ...  # noqa: D102
    @property
    def fds(self) -> Sequence[int | str]: ...  # noqa: D102
    @property
    def vhost_fds(self) -> Sequence[int | str]: ...  # noqa: D102
    @property
    def pci(self) -> PciAddress | None: ...  # noqa: D102
    @property
    def path(self) -> str | None: ...  # noqa: D102
    @property
    def iommufd(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the QEMU at hand knows: how it connects to a socket again, and whether VFIO through iommufd."""

    reconnect: tuple[str, int] = RECONNECT_MS
    iommufd: bool = False


_USUAL = Dialect()


def rewrite(argv: QemuArgv, connections: Mapping[str, Connected], dialect: Dialect = _USUAL) -> list[str]:
    """QEMU's arguments, without the program, with every ``host`` network as what QEMU knows.

    ``connections`` has one for each intent's interface. What is not ours stays as it is, word by word; only
    the guest's memory becomes shared where a network takes that. BadInput where it can't be.
    """
    made: dict[int, list[str]] = {}
    before: tuple[str, ...] = ()
    if any(connection.path is not None for connection in connections.values()):
        memory = share_memory(argv.options)
        before = memory.more
        made = {at: list(words) for at, words in memory.changed.items()}
    modern = dialect.iommufd and any(connection.iommufd for connection in connections.values())
    if modern:
        # One for all of the guest's functions: each has its memory pinned once.
        before = (*before, "-object", f"iommufd,id={_IOMMUFD}")
    for host in argv.hosts:
        connection = connections[host.intent.interface]
        made.setdefault(host.at, [])
        if connection.combination.backend is Backend.VFIO:
            at = host.nic.at if host.nic else host.at
            device = _vfio_device(host, connection, modern)
            made.setdefault(at, []).extend(["-device", _after_buses(argv, device).text])
            continue
        word = argv.options[host.at].words[0]
        nic = host.nic
        if argv.options[host.at].name == "net" and connection.combination.backend in _NETDEV_ONLY:
            word = "-netdev"
            nic = _on_netdev(host)
        elif argv.options[host.at].name == "nic":
            word = "-netdev"
        made[host.at].extend(_chardev(host, connection, dialect.reconnect))
        made[host.at].extend([word, network(host.intent, connection).text])
        if nic:
            name = "-device" if nic.at == host.at else argv.options[nic.at].words[0]
            device = _device(nic, host.intent, connection)
            device = _after_buses(argv, device) if name == "-device" else device
            made.setdefault(nic.at, []).extend([name, device.text])
    left = {option.name for at, option in enumerate(argv.options) if at not in made}
    left |= {Option((word,)).name for words in made.values() for word in words[::2]}
    if argv.hosts and not left & {*NETWORKS, "nodefaults"}:
        # Without a network on its command line QEMU makes one of its own, with a NIC.
        made[argv.hosts[0].at][:0] = ["-nic", "none"]
    rest = [word for at, option in enumerate(argv.options) for word in made.get(at, option.words)]
    return [*before, *rest]


def network(intent: Intent, connection: Connected) -> Properties:
    """What stands behind -netdev for one network; ValueError where its connection has not what that takes."""
    fds, vhost_fds = connection.fds, connection.vhost_fds
    name, backend = ("id", intent.interface), connection.combination.backend
    if len(fds) < {Backend.USER: 0, Backend.SOCKET_VHOST: 0}.get(backend, 1):
        raise ValueError(f"{connection.combination.text} is no connection that QEMU can be given")
    many = "s" if len(fds) > 1 else ""
    match backend:
        case Backend.TAP | Backend.TAP_VHOST:
            made = Properties((("type", "tap"), name, (f"fd{many}", ":".join(map(str, fds)))))
            if vhost_fds:
                made = made.having("vhost", True).having(f"vhostfd{many}", ":".join(map(str, vhost_fds)))
            return made
        case Backend.SOCKET if intent.datagrams:
            return Properties((("type", "dgram"), name, ("local.type", "fd"), ("local.str", fds[0])))
        case Backend.SOCKET_VHOST:
            made = Properties((("type", "vhost-user"), name, ("chardev", _chardev_id(intent))))
            return made.having("queues", intent.queues if intent.queues > 1 else None)
        case Backend.SOCKET | Backend.PASST:
            return Properties((("type", "stream"), name, ("addr.type", "fd"), ("addr.str", fds[0])))
        case Backend.USER:
            return Properties((("type", "user"), name))
        case Backend.VFIO:
            raise ValueError("a device of VFIO is no network")
        case _ as never:
            assert_never(never)


def _chardev(host: Host, connection: Connected, reconnect: tuple[str, int]) -> list[str]:
    """What a network needs before it on the command line: for vhost-user, the way to its back-end."""
    if connection.path is None:
        return []
    items = (("backend", "socket"), ("id", _chardev_id(host.intent)), ("path", connection.path), reconnect)
    return ["-chardev", Properties(items).text]


def _chardev_id(intent: Intent) -> str:
    return f"{intent.interface}-vhost"


def _on_netdev(host: Host) -> Nic | None:
    """The NIC of a -net, taken from QEMU's hub to the network itself."""
    if host.nic is None:
        return None
    nic = host.nic
    return Nic(nic.at, nic.driver, nic.properties.having("netdev", host.intent.interface), nic.mac_key)


def _after_buses(argv: QemuArgv, device: Properties) -> Properties:
    """A device as JSON where others are: QEMU makes those last, and with them the bus that this one may name.

    (qemu_create_cli_devices, system/vl.c)
    """
    if device.is_json or not any(one.name == "device" and one.value.startswith("{") for one in argv.options):
        return device
    items = ((key, _number(value) if key in _NUMBERS else value) for key, value in device.items)
    return Properties(tuple(items), is_json=True)


def _number(value: object) -> object:
    """As JSON has it; what is no number is QEMU's to refuse."""
    return int(value) if isinstance(value, str) and re.fullmatch("-?[0-9]{1,10}", value) else value


def _device(nic: Nic, intent: Intent, connection: Connected) -> Properties:
    device = nic.properties.having(nic.mac_key, intent.mac or connection.mac)
    if intent.queues > 1 and nic.is_virtio:
        device = device.having("mq", True)
        if nic.driver.startswith("virtio-net-pci"):
            # One each way for each queue, one for control, one for the configuration.
            device = device.having("vectors", 2 * intent.queues + 2)
    return device


def _vfio_device(host: Host, connection: Connected, modern: bool) -> Properties:
    if connection.pci is None:
        raise ValueError(f"{connection.combination.text} without a PCI address")
    kept = host.nic.properties.only(_PCI_KEYS) if host.nic else Properties(())
    made = Properties((("driver", "vfio-pci"), ("host", connection.pci.text), *kept.items), kept.is_json)
    return made.having("iommufd", _IOMMUFD) if modern and connection.iommufd else made
