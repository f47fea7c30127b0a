"""What each combination has to show with two real guests: packets, and who may talk to whom.

Two guests have a network of each combination that is to be shown, so that two boots show them all. What a
policy means is asked of the guests and of the far end of the wire, never read from a flag.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.kernel.host import STAYING
from tests.lab.machines import Console, Guests, PlainGuest
from tests.wires import PORT, Outside, Wire, ip
from vnet_lock.combination import COMBINATIONS, Backend, Combination, Policy, Port

VHOST = (Backend.TAP_VHOST, Backend.SOCKET_VHOST)
HARDWARE = (Port.SRIOV, Port.PHYSDEV)
# Those that need vhost-net or an SR-IOV NIC are the lab VM's; the others run in namespaces of the machine.
IN_LAB = tuple(one for one in COMBINATIONS if one.backend in VHOST or one.port in HARDWARE)
IN_NAMESPACES = tuple(one for one in COMBINATIONS if one not in IN_LAB)

# The words of -netdev host that allow one backend and no other.
PROTOCOLS = {
    Backend.TAP: "tap",
    Backend.TAP_VHOST: "tap:vhost",
    Backend.SOCKET: "socket",
    Backend.SOCKET_VHOST: "socket:vhost",
    Backend.USER: "user",
    Backend.PASST: "user",
    Backend.VFIO: "vfio",
}
VNET_QEMU = str(Path(sys.executable).with_name("vnet-qemu"))
GATEWAY = "169.254.1.1"
_NONE, _ALL = "0/3", "3/3"


@dataclass(frozen=True, slots=True)
class Case:
    """One combination on a wire of its own."""

    combination: Combination
    wire: Wire

    @property
    def text(self) -> str:
        """For a test's name."""
        return self.combination.text

    def face(self, host: int) -> None:
        """Before anything between a guest and the far end: on a wire all see each other."""

    def more(self, host: int) -> list[str]:
        """Further keys for one of the guests."""
        del host
        return []

    def mac(self, host: int) -> str:
        """The MAC of a guest's device; ``host`` is 2 or 3, the last part of its addresses."""
        return f"52:54:00:09:{self.wire.number:02x}:{host:02x}"

    def devices(self, host: int) -> list[str]:
        """The words for vnet-qemu."""
        one = self.combination
        words = [f"host,id=n{self.wire.number},mode={one.policy},port={one.port}"]
        words += [f"protocols={PROTOCOLS[one.backend]}", *self.more(host)]
        words += {
            Policy.NAT: [] if one.port is Port.SOCKET else [f"dev={self.wire.dev}"],
            Policy.ROUTE: [f"dev={self.wire.dev}", f"ip={self.wire.address(host)}"],
        }.get(one.policy, [f"dev={self.bridge if one.port is Port.BRIDGE else self.wire.dev}"])
        device = f"virtio-net-pci,netdev=n{self.wire.number},mac={self.mac(host)},romfile="
        return ["-netdev", ",".join(words), "-device", device]

    @property
    def bridge(self) -> str:
        """The bridge of a veb-bridge, with the wire as one of its ports."""
        return f"br{self.wire.number}"

    def open(self) -> None:
        """What is there before a guest comes."""
        self.wire.open()
        if self.combination.policy in (Policy.NAT, Policy.ROUTE):
            self.wire.add_host_address()
        if (self.combination.policy, self.combination.port) == (Policy.VEB, Port.BRIDGE):
            ip(f"link add {self.bridge} type bridge forward_delay 0")
            ip(f"link set {self.bridge} addrgenmode none")
            ip(f"link set {self.bridge} up")
            ip(f"link set {self.wire.dev} master {self.bridge}")

    def close(self) -> None:
        """The wire and what was put on it."""
        self.wire.close()
        if (self.combination.policy, self.combination.port) == (Policy.VEB, Port.BRIDGE):
            ip(f"link delete {self.bridge}")


@dataclass(slots=True)
class Neighbour:
    """A guest that is up."""

    host: int
    guest: PlainGuest

    @property
    def console(self) -> Console:
        return self.guest.console

    def configure(self, case: Case) -> None:
        """Give its device of a combination the address, and the route, that the policy takes."""
        one, wire = case.combination, case.wire
        # Several of its networks may be one Ethernet: each answers for its own address alone.
        self.run("cd /proc/sys/net/ipv4/conf/all; echo 1 >arp_ignore; echo 2 >arp_announce")
        nic = f"$(grep -l {case.mac(self.host)} /sys/class/net/*/address | cut -d/ -f5)"
        # A VF's driver may have come after the guest had raised what was there.
        self.run(f"ip link set {nic} up")
        if one.policy is Policy.ROUTE:
            self.run(
                f"ip address add {wire.address(self.host)}/32 dev {nic};"
                # Each of its networks has the same gateway.
                f" ip route add {wire.peer} via {GATEWAY} dev {nic} onlink"
            )
        elif one.policy is Policy.NAT:
            address, gateway = _nat_network(case, self.host)
            self.run(f"ip address add {address} dev {nic}; ip route add {wire.peer} via {gateway} dev {nic}")
        else:
            self.run(f"ip address add {wire.address(self.host)}/24 dev {nic}")

    def ping(self, address: str) -> str:
        """``3/3`` where all answers come."""
        return self.console.ask(f"ping {address}")["ping"]

    def seen_as(self, wire: Wire) -> str:
        """Its address as a server at the far end sees it; empty where it can't be reached."""
        before = len(self.console.text)
        self.run(f"echo seen=$(nc -w 5 {wire.peer} {PORT} </dev/null)", must=False)
        lines = self.console.text[before:].splitlines()
        return next((line.removeprefix("seen=") for line in lines if line.startswith("seen=")), "")

    def run(self, command: str, must: bool = True) -> None:
        """A command in the guest, which has to succeed."""
        answer = self.console.ask(f"run {command}")
        assert not must or answer["exit"] == "0", (
            f"{command}: exit {answer['exit']}\n{self.console.text[-500:]}"
        )


def _nat_network(case: Case, host: int) -> tuple[str, str]:
    """A free address behind the NAT, with its prefix, and the gateway there."""
    if case.combination.port is Port.SOCKET:
        return f"10.0.2.{13 + host}/24", "10.0.2.2"
    index = Path(f"/sys/class/net/{case.wire.dev}/ifindex").read_text().strip()
    (told,) = json.loads(ip(f"-json address show dev vlnat{index}"))
    (own,) = (one for one in told["addr_info"] if one["family"] == "inet")
    front = own["local"].rpartition(".")[0]
    return f"{front}.{200 + host}/{own['prefixlen']}", own["local"]


@dataclass(slots=True)
class Pair:
    """Two guests side by side, with a network of each combination."""

    cases: dict[Combination, Case]
    outside: Outside
    first: Neighbour
    second: Neighbour

    def show(self, combination: Combination) -> None:
        """That packets flow, and that the policy holds; AssertionError says what doesn't."""
        case = self.cases[combination]
        for neighbour in (self.first, self.second):
            neighbour.configure(case)
        _SHOWN[combination.policy](self, case)

    def both(self) -> Sequence[Neighbour]:
        return (self.first, self.second)


def lay_wires(combinations: Sequence[Combination]) -> dict[Combination, Case]:
    """A wire for each."""
    cases = {one: Case(one, Wire(number)) for number, one in enumerate(combinations)}
    for case in cases.values():
        case.open()
    return cases


def start_pair(guests: Guests, outside: Outside, cases: dict[Combination, Case]) -> Pair:
    """Boot two guests that are on all the wires."""
    started = [
        guests.qemu(
            f"guest{host}",
            [word for case in cases.values() for word in case.devices(host)],
            program=[VNET_QEMU],
            nics=len(cases),
        )
        for host in (2, 3)
    ]
    for guest in started:
        ready = guest.console.ready()
        assert ready["nics"] == str(len(cases)), guest.said
    return Pair(
        cases, outside, *(Neighbour(host, guest) for host, guest in zip((2, 3), started, strict=True))
    )


# --- what a policy means --------------------------------------------------------------------------


def _show_peer(pair: Pair, case: Case) -> None:
    """Each guest reaches the far end under its own address, and the far end reaches each guest."""
    for neighbour in pair.both():
        case.face(neighbour.host)
        assert neighbour.ping(case.wire.peer) == _ALL, f"guest {neighbour.host} doesn't reach the far end"
        own = case.wire.address(neighbour.host)
        assert neighbour.seen_as(case.wire) == own
        assert pair.outside.ping(own) == 3, f"the far end doesn't reach guest {neighbour.host}"


def _ping_each_other(pair: Pair, case: Case) -> set[str]:
    """What comes back of pings from each guest to the other."""
    first, second = pair.both()
    return {
        first.ping(case.wire.address(second.host)),
        second.ping(case.wire.address(first.host)),
    }


def _show_veb(pair: Pair, case: Case) -> None:
    """Neighbours reach each other directly: the switch reflects nothing."""
    case.wire.reflect(False)
    _show_peer(pair, case)
    assert _ping_each_other(pair, case) == {_ALL}


def _show_vepa(pair: Pair, case: Case) -> None:
    """Neighbours reach each other through a switch that reflects, and not without it."""
    case.wire.reflect(False)
    _show_peer(pair, case)
    assert _ping_each_other(pair, case) == {_NONE}
    case.wire.reflect(True)
    assert _ping_each_other(pair, case) == {_ALL}


def _show_private(pair: Pair, case: Case) -> None:
    """Neighbours don't reach each other, whatever the switch does."""
    _show_peer(pair, case)
    for on in case.wire.REFLECTIONS:
        case.wire.reflect(on)
        assert _ping_each_other(pair, case) == {_NONE}


def _show_nat(pair: Pair, case: Case) -> None:
    """The far end sees the host's address, and no guest's."""
    for neighbour in pair.both():
        assert neighbour.seen_as(case.wire) == case.wire.address(9)


def _show_route(pair: Pair, case: Case) -> None:
    """The far end sees each guest's own address, through the host's routes: the host is a hop."""
    _show_peer(pair, case)


_SHOWN: dict[Policy, Callable[[Pair, Case], None]] = {
    Policy.NAT: _show_nat,
    Policy.ROUTE: _show_route,
    Policy.VEB: _show_veb,
    Policy.VEPA: _show_vepa,
    Policy.PRIVATE: _show_private,
}


# --- what is left -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Footprint:
    """All of a host that a guest's network could change; equal before and after."""

    parts: dict[str, object] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Footprint:
        """As it is now."""
        parts: dict[str, object] = {}
        for words in (
            "link",
            "address",
            "route",
            "-6 route",
            "rule",
            "neigh show proxy",
            "-6 neigh show proxy",
        ):
            details = "-details " if words in ("link", "address") else ""
            told = json.loads(ip(f"-json {details}{words}") or "[]")
            parts[words] = sorted((_lasting(one) for one in told), key=str)
        parts["nft"] = _nft()
        parts["settings"] = dict(_settings())
        parts["run"] = sorted(
            path.name
            for path in Path("/run/vnet-lock").rglob("*")
            if path.name not in STAYING and path.suffix not in (".lock", ".hooks")
        )
        parts["processes"] = _processes()
        return cls(parts)

    def wait_until_again(self, deadline_s: float = 30) -> None:
        """Wait until all is as it was; AssertionError says what isn't."""
        end = time.monotonic() + deadline_s
        while difference := self.difference(Footprint.read()):
            assert time.monotonic() < end, f"not as before: {difference}"
            time.sleep(0.1)

    def difference(self, other: Footprint) -> dict[str, tuple[object, object]]:
        """What is not the same: of lists, what is in one of them alone."""
        found: dict[str, tuple[object, object]] = {}
        for key, mine in self.parts.items():
            theirs = other.parts[key]
            if mine != theirs:
                found[key] = (mine, theirs)
                if isinstance(mine, list) and isinstance(theirs, list):
                    found[key] = [x for x in mine if x not in theirs], [x for x in theirs if x not in mine]
        return found


_ANEW = ("ifindex", "address", "permaddr")
_SETTINGS = ("forwarding", "accept_ra", "proxy_arp", "proxy_ndp", "rp_filter", "arp_ignore")
# What changes by itself: counters, times, whether a neighbour was just heard.
_PASSING = frozenset(
    (
        *("stats", "stats64", "valid_life_time", "preferred_life_time", "expires", "pref", "linkinfo"),
        *("operstate", "tentative"),
        *("hello_timer", "gc_timer", "tcn_timer", "topology_change", "topology_change_timer"),
    )
)


def _settings() -> Iterator[tuple[str, str]]:
    for family in ("ipv4", "ipv6"):
        for path in sorted(Path(f"/proc/sys/net/{family}/conf").glob("*/*")):
            if path.name in _SETTINGS:
                with suppress(FileNotFoundError):  # a link that goes at this moment
                    yield str(path), path.read_text()


def _lasting(value: object) -> object:
    if isinstance(value, dict):
        # What a driver makes anew when it is bound again has another number, and a MAC of its own making.
        anew = _ANEW if value.get("parentbus") == "pci" else ()
        return {key: _lasting(one) for key, one in value.items() if key not in (*_PASSING, *anew)}
    return [_lasting(one) for one in value] if isinstance(value, list) else value


def _nft() -> str:
    from shutil import which
    from subprocess import run

    if which("nft", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        return ""
    return run(["/usr/sbin/nft", "list", "ruleset"], capture_output=True, text=True, check=False).stdout


def _processes() -> list[str]:
    """Processes that a guest's network may have, in our mount namespace: others test on this machine, too."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            is_near = (path / "ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if is_near and any(word in text for word in ("vnet_lock.datapath", "dnsmasq", "passt")):
            found.append(text)
    return sorted(found)
