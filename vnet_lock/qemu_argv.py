"""QEMU's command line: the ``host`` networks in it, and what they want.

Never looks at the host, opens or runs anything. The line that QEMU gets in their place is qemu_rewrite.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from vnet_lock.combination import DEFAULT_BACKENDS, Backend, Policy, Port, ports_of
from vnet_lock.dataclass import dataclass
from vnet_lock.errors import BadInput
from vnet_lock.model import PciAddress, is_ifname, parse_guest_address
from vnet_lock.qemu_words import NETWORKS, Option, Properties, split_options
from vnet_lock.request import Intent

_KEYS = ("id", "mode", "dev", "pool", "port", "protocols", "mac", "vlan", "queues", "ip", "dhcp")
# Those that may be there several times, or have a JSON list.
_LISTS = ("dev", "ip")
# What -nic host takes beside them: properties of the device that it makes.
_NIC_KEYS = ("model", "addr", "bus", "bootindex", "vectors")
_NOT_PCI = frozenset(("virtio-net-device", "virtio-net-ccw", "usb-net", "ne2k_isa", "spapr-vlan", "lan9118"))
_VHOST = (Backend.TAP_VHOST, Backend.SOCKET_VHOST)
_MAX_QUEUES = 256  # MAX_TAP_QUEUES, include/linux/if_tap.h
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")  # id_wellformed(), util/id.c
# A key in what an error says, as a word of its own.
_KEY = re.compile(rf"(?<!\S)(?:{'|'.join(_KEYS)})=")
_MAC = re.compile(r"[0-9a-f]{2}([:-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Nic:
    """The guest's device of a network: the ``at``-th option, its model and its MAC under ``mac_key``."""

    at: int
    driver: str
    properties: Properties
    mac_key: str = "mac"

    @property
    def is_virtio(self) -> bool:
        """Whether it can have queues and vhost."""
        return self.driver.startswith("virtio")


@dataclass(frozen=True, slots=True)
class Host:
    """One ``host`` network, the ``at``-th option, and what it wants."""

    at: int
    intent: Intent
    nic: Nic | None


@dataclass(frozen=True, slots=True)
class QemuArgv:
    """A QEMU command line as far as it concerns us; ``name`` is the guest's."""

    options: tuple[Option, ...]
    hosts: tuple[Host, ...]
    name: str | None
    daemonize: bool
    pidfile: str | None
    # The user that QEMU becomes once it has opened everything.
    run_as: str | None = None

    @property
    def intents(self) -> tuple[Intent, ...]:
        """What its ``host`` networks want; ``interface`` is the netdev id."""
        return tuple(host.intent for host in self.hosts)


def read_argv(args: Sequence[str]) -> QemuArgv:
    """Read a QEMU command line, without the program; BadInput names the word that is wrong."""
    options = split_options(args)
    parsed = {at: _parse(option) for at, option in enumerate(options) if option.name in (*NETWORKS, "device")}
    wanted = [at for at in parsed if options[at].name in NETWORKS and parsed[at].get("type") == "host"]
    ids = [p.get("id") for at, p in parsed.items() if options[at].name in NETWORKS]
    double = next((name for name in ids if name and ids.count(name) > 1), None)
    if wanted and double:
        raise BadInput(f'the network id "{double}" is there twice; give each network its own id')
    hosts: list[Host] = []
    for at in wanted:
        network = _name_network(options[at], parsed[at], [*ids, *(host.intent.interface for host in hosts)])
        nic = _find_nic(options, parsed, at, str(network.get("id")))
        hosts.append(Host(at, _read_intent(options[at], network, nic), nic))
    last = {option.name: option.value for option in options if option.value}
    return QemuArgv(
        options=options,
        hosts=tuple(hosts),
        name=Properties.parse_words(last["name"], "guest").get("guest") if "name" in last else None,
        daemonize=any(option.name == "daemonize" for option in options),
        pidfile=last.get("pidfile"),
        run_as=last.get("runas") or Properties.parse_words(last.get("run-with", ""), "").get("user"),
    )


def read_words(words: Iterable[tuple[str, str]]) -> Intent:
    """What a command's options want, each with the name of a key of ``-netdev host``: ``--mode=veb``.

    BadInput says what is wrong with them as options.
    """
    network = ",".join(["host", "id=net0", *(f"{key}={value.replace(',', ',,')}" for key, value in words)])
    try:
        return read_argv(["-netdev", network]).intents[0]
    except BadInput as error:
        said = str(error).removeprefix(f"-netdev {network}: ")
        raise BadInput(_KEY.sub(r"--\g<0>", said)) from error


def _parse(option: Option) -> Properties:
    try:
        return Properties.parse(option.value, "driver" if option.name == "device" else "type")
    except ValueError as error:
        raise BadInput(f"{option.text}: broken JSON: {error}") from error


def _name_network(option: Option, network: Properties, taken: Sequence[str | None]) -> Properties:
    """With an id: that of -net and -nic is ours to choose."""
    name = network.get("id")
    if name is None and option.name != "netdev":
        return network.having("id", next(i for n in range(len(taken) + 1) if (i := f"host{n}") not in taken))
    if name is None:
        raise BadInput(f"{option.text}: id= is missing; name the network, and the device refers to it")
    if not _ID.fullmatch(name):
        raise BadInput(f'{option.text}: "{name}" is no id: a letter, then letters, digits, "-", "." and "_"')
    return network


def _find_nic(options: Sequence[Option], parsed: Mapping[int, Properties], at: int, name: str) -> Nic | None:
    own = parsed[at]
    if options[at].name == "nic":
        model = own.get("model") or "virtio"
        driver = "virtio-net-pci" if model == "virtio" else model
        device = Properties((("driver", driver), ("netdev", name)))
        return Nic(at, driver, Properties(device.items + own.only(_NIC_KEYS[1:]).items))
    nics = []
    for other, properties in parsed.items():
        is_legacy = options[other].name == "net" and properties.get("type") == "nic"
        if options[other].name == "device" and properties.get("netdev") == name:
            nics.append(Nic(other, properties.get("driver") or "", properties))
        elif is_legacy and properties.get("netdev") == (None if options[at].name == "net" else name):
            nics.append(Nic(other, properties.get("model") or "unknown", properties, "macaddr"))
    if len(nics) > 1:
        raise BadInput(
            f"{options[at].text}: {len(nics)} devices are on it ({options[nics[0].at].text}; "
            f"{options[nics[1].at].text}); give each device a network of its own"
        )
    hub = [o for o in parsed if options[o].name == "net" and parsed[o].get("type") == "host"]
    if options[at].name == "net" and len(hub) > 1:
        raise BadInput(f"{options[at].text}: only one host network fits the hub of -net; use -netdev or -nic")
    return nics[0] if nics else None


def _read_intent(option: Option, network: Properties, nic: Nic | None) -> Intent:
    _check_keys(option, network)
    policy, ports = _read_mode(option, network.get("mode"), network.get("port"))
    queues = _read_number(option, "queues", network.get("queues"), _MAX_QUEUES) or 1
    if queues > 1 and (option.name == "net" or (nic and not nic.is_virtio)):
        raise BadInput(f"{option.text}: queues={queues} needs a virtio-net device on -netdev or -nic")
    protocols = network.get("protocols")
    backends = _fit(option, read_protocols(protocols, option.text) if protocols is not None else (), nic)
    return Intent(
        interface=str(network.get("id")),
        policy=policy,
        devs=_read_devs(option, network),
        ports=ports,
        backends=backends,
        mac=_read_mac(option, network, nic),
        vlan=_read_number(option, "vlan", network.get("vlan"), 4094),
        queues=queues,
        addresses=_read_addresses(option, network, policy),
        dhcp=_read_dhcp(option, network, policy),
        pool=network.get("pool"),
    )


def _check_keys(option: Option, network: Properties) -> None:
    known = (*_KEYS, *_NIC_KEYS) if option.name == "nic" else _KEYS
    seen = set()
    for key, value in network.items:
        if key not in (*known, "type"):
            raise BadInput(f'{option.text}: unknown key "{key}"; known: {", ".join(known)}')
        given = value if isinstance(value, list) and key in _LISTS else [value]
        if not given or any(one is None or one == "" for one in given):
            raise BadInput(f"{option.text}: {key} has no value; write {key}=…")
        if any(isinstance(one, list | dict) for one in given):
            kinds = "one value or a list of them" if key in _LISTS else "one value"
            raise BadInput(f"{option.text}: {key} takes {kinds}")
        if key in seen and key not in _LISTS:
            raise BadInput(f"{option.text}: {key}= is there twice; leave one")
        seen.add(key)
    if {"dev", "pool"} <= seen:
        raise BadInput(f"{option.text}: dev= and pool= exclude each other; leave one")


def _read_mode(option: Option, mode: str | None, port: str | None) -> tuple[Policy, tuple[Port, ...]]:
    modes = ", ".join(Policy)
    if mode is None:
        raise BadInput(f"{option.text}: mode= is missing; one of {modes}")
    try:
        policy = Policy.parse(mode)
    except ValueError as error:
        raise BadInput(f'{option.text}: unknown mode "{mode}"; one of {modes}') from error
    if port is None:
        return policy, ()
    ports = ports_of(policy)
    if port not in ports:
        raise BadInput(f'{option.text}: mode={mode} has no port "{port}"; one of {", ".join(ports)}')
    return policy, (Port(port),)


def _read_devs(option: Option, network: Properties) -> tuple[str, ...]:
    """The devices that are named; without any, and without a pool, the host may have a default."""
    return tuple(_read_dev(option, dev) for dev in network.values("dev"))


def _read_dev(option: Option, dev: str) -> str:
    if is_ifname(dev):
        return dev
    try:
        return PciAddress.parse(dev).text
    except ValueError as error:
        reason = "neither the name of a network device nor a PCI address (like 0000:af:06.0)"
        raise BadInput(f'{option.text}: "{dev}" is {reason}') from error


def _read_addresses(option: Option, network: Properties, policy: Policy) -> tuple[str, ...]:
    """The guest's own addresses, which only a route needs to know."""
    texts = network.values("ip")
    if bool(texts) != (policy is Policy.ROUTE):
        need = "needs the guest's own address: add ip=192.0.2.7" if not texts else "takes no ip="
        raise BadInput(f"{option.text}: mode={policy} {need}")
    try:
        return tuple(dict.fromkeys(map(parse_guest_address, texts)))
    except ValueError as error:
        raise BadInput(f"{option.text}: ip: {error}") from error


def _read_dhcp(option: Option, network: Properties, policy: Policy) -> bool:
    text = network.get("dhcp")
    if text not in (None, "on", "off", "True", "False"):  # JSON has true and false
        raise BadInput(f'{option.text}: dhcp="{text}" is neither on nor off')
    is_on = text in ("on", "True")
    if is_on and policy is not Policy.NAT:
        raise BadInput(f"{option.text}: mode={policy} has no DHCP server of ours; leave dhcp= out")
    return is_on


def read_protocols(text: str, where: str) -> tuple[Backend, ...]:
    """The backends that ``a:b:c`` allows, in its order; ``vhost`` puts the +vhost forms before the plain."""
    words = text.split(":")
    known = ("tap", "socket", "vhost", "vfio", "user")
    for word in words:
        if word not in known:
            raise BadInput(f'{where}: unknown protocol "{word}"; known: {", ".join(known)}')
    backends: list[Backend] = []
    for word in words:
        if word in ("tap", "socket") and "vhost" in words:
            backends.append(Backend(f"{word}+vhost"))
        if word == "user":
            backends.append(Backend.PASST)
        if word != "vhost":
            backends.append(Backend(word))
    if not backends:
        raise BadInput(f"{where}: protocols=vhost says only half: write tap:vhost or socket:vhost")
    return tuple(dict.fromkeys(backends))


def _fit(option: Option, backends: tuple[Backend, ...], nic: Nic | None) -> tuple[Backend, ...]:
    """Those that go with the guest's device; empty still means the usual ones."""
    unfit: tuple[Backend, ...] = ()
    if option.name == "net" or (nic and not nic.is_virtio):
        unfit += _VHOST  # vhost needs virtio, and a peer without a hub between (net/vhost_net.c)
    if nic and nic.driver in _NOT_PCI:
        unfit += (Backend.VFIO,)
    fit = tuple(backend for backend in backends or DEFAULT_BACKENDS if backend not in unfit)
    if not fit:
        device = nic.driver if nic and nic.driver != "unknown" else "the device of -net"
        raise BadInput(f"{option.text}: none of its protocols goes with {device}; add tap to protocols=")
    return fit if unfit and set(unfit) & set(backends or DEFAULT_BACKENDS) else backends


def _read_mac(option: Option, network: Properties, nic: Nic | None) -> str | None:
    own = network.get("mac")
    device = nic.properties.get(nic.mac_key) if nic else None
    macs = [_parse_mac(option, mac) for mac in (own, device) if mac is not None]
    if len(set(macs)) > 1:
        raise BadInput(f"{option.text}: mac={macs[0]}, but its device has {macs[1]}; leave one of them")
    return macs[0] if macs else None


def _parse_mac(option: Option, text: str) -> str:
    mac = text.lower().replace("-", ":") if _MAC.fullmatch(text.lower()) else ""
    if not mac or mac == "00:00:00:00:00:00" or int(mac[:2], 16) & 1:
        raise BadInput(
            f'{option.text}: "{text}" is not the MAC address of one device (like 52:54:00:12:34:56)'
        )
    return mac


def _read_number(option: Option, key: str, text: str | None, most: int) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= most:
        raise BadInput(f'{option.text}: {key}="{text}" is not a number from 1 to {most}')
    return int(text)
