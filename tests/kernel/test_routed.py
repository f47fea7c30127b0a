"""The links of routed guests: what leads to their addresses, and that all is as before afterwards."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.host import MAC, Host, eventually
from tests.kernel.test_crash import VNET_LOCK, dice, killed_at, put_back, some_of
from vnet_lock.combination import Backend, Combination, Policy, Port
from vnet_lock.errors import Refused, VnetLockError
from vnet_lock.journal import Entry
from vnet_lock.kernel import packet
from vnet_lock.kernel.netns import call_in
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.kernel.processes import read_boot_id, this_process
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, Resource, State, Wanted
from vnet_lock.ports import Job, veth_macvlan
from vnet_lock.request import Assignment, Intent
from vnet_lock.session import Session
from vnet_lock.settings import DEFAULT
from vnet_lock.undo import undo

__all__ = ["dice"]  # a fixture

PORTS = [Port.NONE, Port.VETH_MACVLAN]
ADDRESSES = ("192.0.2.7", "2001:db8::7")
IPV6_CONF = Path("/proc/sys/net/ipv6/conf")
Ip = Callable[[str], str]


@pytest.fixture
def uplink(host: Host, ip: Ip) -> Callable[[], dict[str, str]]:
    """up0 with addresses, its peer in a namespace called wire; returns what shows the host's whole state."""
    del host
    ip("netns add wire")
    ip("link set peer0 netns wire")
    for words in ("lo", "peer0"):
        ip(f"-n wire link set {words} up")
    for family, at_home, away in (
        ("-4", "192.0.2.1/24", "192.0.2.9/24"),
        ("-6", "2001:db8::1/64", "2001:db8::9/64"),
    ):
        nodad = "nodad" if family == "-6" else ""
        ip(f"{family} address add {at_home} dev up0 {nodad}")
        ip(f"{family} -n wire address add {away} dev peer0 {nodad}")
    eventually(lambda: "tentative" not in ip("address"))
    return read_state


def read_state() -> dict[str, str]:
    """Links, addresses, routes and proxies as iproute2 shows them, and each setting of IPv4 and IPv6."""
    state = {
        words: subprocess.check_output(["ip", "-j", "-d", *words.split()], text=True)
        for words in (
            *("link show", "address show", "rule show", "-6 rule show"),
            *("route show table all", "-6 route show table all", "neigh show proxy", "-6 neigh show proxy"),
        )
    }
    for family in ("ipv4", "ipv6"):
        for path in sorted(Path(f"/proc/sys/net/{family}").rglob("*")):
            with contextlib.suppress(OSError):  # one may only be written
                state[str(path)] = path.read_text() if path.is_file() else ""
    return state


def assert_as(before: dict[str, str]) -> None:
    """The host's state is what it was, byte for byte."""
    found = "\n".join(differences(before, read_state()))
    assert found == ""


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What of a state is another now, one object of iproute2's to a line, but a bridge's timers."""
    found = []
    for key in before | after:
        pair = [
            re.sub(r'_timer":[\d.]+', "", state.get(key, "")).replace('},{"ifindex"', '},\n{"ifindex"')
            for state in (before, after)
        ]
        lines = difflib.unified_diff(*(text.splitlines() for text in pair), lineterm="", n=0)
        found += [f"{key}: {line}" for line in lines if line[:3] not in ("---", "+++")]
    return found


def owner(name: str = "me") -> Owner:
    return Owner(OwnerKind.LIBVIRT, name, read_boot_id(DEFAULT), uuid=name, process=this_process(DEFAULT))


def want(port: Port, *addresses: str, **more: object) -> Intent:
    return Intent("net0", Policy.ROUTE, ("up0",), (port,), addresses=addresses or ADDRESSES, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("port", PORTS)
def test_a_route_leads_to_each_address_and_all_is_as_before_afterwards(uplink, ip: Ip, port: Port) -> None:
    before = uplink()
    session = Session()
    (grant,) = session.acquire(owner(), [want(port, ifname="web1-net0")])
    (claim,) = [one for one in session.table.read().records if one.journal]
    made = claim.journal[0].final
    assert f"192.0.2.7 dev {made}" in ip("route")
    assert f"2001:db8::7 dev {made}" in ip("-6 route")
    assert "169.254.1.1/32" in ip(f"address show dev {made}")
    assert "fe80::1/64" in ip(f"address show dev {made}")
    assert "tentative" not in ip(f"address show dev {made}")
    assert ip("neigh show proxy").split()[:3] == ["192.0.2.7", "dev", "up0"]
    assert ip("-6 neigh show proxy").split()[:3] == ["2001:db8::7", "dev", "up0"]
    for descriptor in session.connect(grant).descriptors:
        os.close(descriptor)
    assert undo(DEFAULT, claim) == []
    assert_as(before)
    assert undo(DEFAULT, claim) == []
    session.release(owner())
    session.release(owner())
    assert_as(before)


@pytest.mark.parametrize("port", PORTS)
def test_nothing_leads_to_a_guest_on_its_way_until_it_runs_here(uplink, ip: Ip, port: Port) -> None:
    """Else the host would answer for addresses that are at home elsewhere still."""
    before = uplink()
    session = Session()
    session.reserve(owner(), [want(port, ifname="web1-net0")], "migrate")
    assert_as(before)
    (grant,) = session.acquire(owner(), [want(port, ifname="web1-net0")])
    assert grant.opened is not None
    assert grant.opened.left is not None
    for words in ("route", "-6 route", "neigh show proxy", "-6 neigh show proxy"):
        assert "192.0.2.7" not in ip(words)
        assert "2001:db8::7" not in ip(words)
    grant.opened.left()
    assert "192.0.2.7 dev" in ip("route")
    assert "2001:db8::7 dev" in ip("-6 route")
    assert "192.0.2.7" in ip("neigh show proxy")
    assert "2001:db8::7" in ip("-6 neigh show proxy")
    session.release(owner())
    assert_as(before)


def test_the_last_guest_restores_what_was_before_the_first(uplink, ip: Ip) -> None:
    """One device forwards already, another listens to no router: both do so again."""
    (IPV6_CONF / "v0/forwarding").write_text("1")
    (IPV6_CONF / "v1/accept_ra").write_text("0")
    before = uplink()
    session = Session()
    session.acquire(owner("a"), [want(Port.NONE, "2001:db8::7", "192.0.2.7")])
    ip("link add late0 type veth peer name late1")
    session.acquire(owner("b"), [want(Port.VETH_MACVLAN, "2001:db8::8", "192.0.2.8")])
    session.release(owner("a"))
    assert (IPV6_CONF / "all/forwarding").read_text() == "1\n"
    assert (IPV6_CONF / "up0/accept_ra").read_text() == "2\n"
    assert Path("/proc/sys/net/ipv4/conf/up0/forwarding").read_text() == "1\n"
    assert "2001:db8::8" in ip("-6 neigh show proxy")
    assert "2001:db8::7" not in ip("-6 neigh show proxy")
    ip("link delete late0")
    session.release(owner("b"))
    assert_as(before)


def test_a_route_that_a_router_advertised_stays(uplink, ip: Ip) -> None:
    """The kernel drops it where a host begins to forward and accept_ra is 1."""
    advertise(ip)
    eventually(lambda: "default via" in ip("-6 route"), timeout_s=10)
    session = Session()
    session.acquire(owner(), [want(Port.NONE, "2001:db8::7")])
    assert "default via" in ip("-6 route")
    ip(f"-6 route delete {ip('-6 route show default').strip().split(' metric')[0]}")
    advertise(ip)
    eventually(lambda: "default via" in ip("-6 route"), timeout_s=10)
    session.release(owner())
    assert "default via" in ip("-6 route")


def advertise(ip: Ip) -> None:
    """A router advertisement on the wire (RFC 4861, 4.2), with a lifetime of 30 minutes."""
    ip("-n wire -6 address replace fe80::9/64 dev peer0 nodad")
    message = bytes((134, 0, 0, 0, 64, 0, 0x07, 0x08)) + bytes(8)
    wire = os.open("/run/netns/wire", os.O_RDONLY)

    def send() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            raw.bind(("fe80::9", 0, 0, socket.if_nametoindex("peer0")))
            raw.sendto(message, ("ff02::1", 0, 0, socket.if_nametoindex("peer0")))

    call_in(wire, send)
    os.close(wire)


@pytest.mark.parametrize("port", PORTS)
def test_a_guest_without_ipv6_is_heard_by_no_ipv6_of_the_hosts(uplink, port: Port) -> None:
    before = uplink()
    session = Session()
    session.acquire(owner(), [want(port, "192.0.2.7")])
    links = [path.parent.name for path in IPV6_CONF.glob("vl*/disable_ipv6") if path.read_text() == "1\n"]
    assert len(links) == (1 if port is Port.NONE else 2)
    assert (IPV6_CONF / "all/forwarding").read_text() == "0\n"
    session.release(owner())
    assert_as(before)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("192.0.2.1", "address 192.0.2.1 is in use without a claim by host"),
        ("2001:db8::1", "address 2001:db8::1 is in use without a claim by host"),
        ("192.0.2.7", 'address 192.0.2.7 is held by guest "other"'),
        ("192.0.2.66", "this host answers for it on up0 already"),
    ],
)
def test_an_address_that_another_has_is_refused(uplink, ip: Ip, address: str, words: str) -> None:
    ip("neigh add proxy 192.0.2.66 dev up0")
    session = Session()
    session.acquire(owner("other"), [want(Port.NONE, "192.0.2.7")])
    eventually(lambda: "NO-CARRIER" in ip("link"))
    before = uplink()
    with pytest.raises(Refused, match=re.escape(words)):
        session.acquire(owner(), [want(Port.VETH_MACVLAN, address)])
    assert_as(before)
    session.release(owner("other"))
    assert "192.0.2.66" in ip("neigh show proxy")


def test_an_address_that_is_routed_elsewhere_is_left_there(uplink, ip: Ip) -> None:
    ip("route add 192.0.2.7/32 dev v0 scope link")
    before = uplink()
    with pytest.raises(VnetLockError, match="there is a route for it already"):
        Session().acquire(owner(), [want(Port.NONE)])
    assert_as(before)


def test_a_dead_guests_address_is_healed_for_the_next(uplink) -> None:
    before = uplink()
    dead = replace(this_process(DEFAULT), start_ticks=1)
    session = Session()
    session.acquire(replace(owner("dead"), kind=OwnerKind.QEMU, uuid=None, process=dead), [want(Port.NONE)])
    session.acquire(owner(), [want(Port.NONE)])
    session.release(owner())
    assert_as(before)


def test_a_packet_socket_has_its_end_of_the_pair_in_a_namespace(uplink, ip: Ip) -> None:
    before = uplink()
    journal: list[Entry] = []
    opened = veth_macvlan.open_port(job(Backend.SOCKET, journal))
    assert opened.netns is not None
    assert len(ip("-o link show type veth").splitlines()) == 4  # v0, v1, up0 and the host's end
    (raw,) = call_in(opened.netns, lambda: packet.open_queues(str(opened.netdev)))
    opened.close()
    with raw:
        raw.settimeout(20)
        guest_mac, guest_ip = bytes.fromhex(MAC.replace(":", "")), socket.inet_aton("192.0.2.7")
        head = bytes.fromhex("0001080006040001") + guest_mac + guest_ip + bytes(6)
        # Who has 192.0.2.9, a host of the wire? The host answers for it.
        raw.send(b"\xff" * 6 + guest_mac + b"\x08\x06" + head + socket.inet_aton("192.0.2.9"))
        assert find_arp(raw, 2) == ("192.0.2.9", "192.0.2.7")
        with subprocess.Popen(PING.split(), stdout=subprocess.DEVNULL) as ping:
            assert find_arp(raw, 1) == ("169.254.1.1", "192.0.2.7")
            ping.kill()
    # The namespace went with the socket, and the pair with it; the rest is in the journal.
    eventually(lambda: len(ip("-o link show type veth").splitlines()) == 3)
    claim = Claim(
        Resource.nic("up0"), Mode.SHARED, State.ACTIVE, owner(), "0" * 16, "net0", 0.0, journal=tuple(journal)
    )
    assert undo(DEFAULT, claim) == []
    assert undo(DEFAULT, claim) == []
    assert_as(before)


PING = "ip netns exec wire ping -c 3 192.0.2.7"


def job(backend: Backend, journal: list[Entry]) -> Job:
    """A granted claim of a guest of its own, and its journal."""

    @contextlib.contextmanager
    def sharing() -> Iterator[Callable[[Entry], Entry]]:
        yield lambda entry: journal.append(entry) or entry

    intent = want(Port.VETH_MACVLAN, mac=MAC)
    combination = Combination(Policy.ROUTE, Port.VETH_MACVLAN, backend)
    assignment = Assignment(intent, combination, (Wanted(Resource.nic("up0"), Mode.SHARED),))
    inventory = read_inventory(DEFAULT, ["up0"])
    return Job(DEFAULT, inventory, assignment, intent, "0123456789abcdef", journal.extend, sharing)


def find_arp(raw: socket.socket, operation: int) -> tuple[str, str]:
    """The sender and the target of the next ARP packet of a kind (1 request, 2 reply)."""
    while True:
        frame = raw.recv(2048)
        if frame[12:14] == b"\x08\x06" and frame[21] == operation:
            return socket.inet_ntoa(frame[28:32]), socket.inet_ntoa(frame[38:42])


def test_a_routed_guest_is_nothing_to_complain_about(uplink) -> None:
    del uplink
    me = Owner(OwnerKind.QEMU, "vm1", read_boot_id(DEFAULT), process=this_process(DEFAULT))
    session = Session()
    session.acquire(me, [want(Port.NONE)])
    status = json.loads(vnet_lock("status", "--json"))
    assert status["findings"] == []
    for address in ADDRESSES:
        assert f"address {address}: active" in vnet_lock("show", f"ip:{address}")
    assert "192.0.2.99 is claimed" in vnet_lock("claim", "ip:192.0.2.99", "--pid", str(os.getpid()))
    with pytest.raises(Refused, match=r"address 192\.0\.2\.99 is held by"):
        session.acquire(owner(), [want(Port.NONE, "192.0.2.99")])
    vnet_lock("release", "ip:192.0.2.99")
    session.release(me)


def vnet_lock(*words: str) -> str:
    return subprocess.run([VNET_LOCK, *words], capture_output=True, text=True, check=True).stdout


def take(port: Port) -> None:
    """What vnet-qemu does before it becomes QEMU."""
    session = Session()
    me = Owner(OwnerKind.QEMU, "test", read_boot_id(DEFAULT), process=this_process(DEFAULT))
    for grant in session.acquire(me, [want(port, backends=(Backend.TAP,))]):
        session.connect(grant)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("port", PORTS)
def test_a_start_killed_before_any_of_its_lines_is_healed(uplink, dice, port: Port) -> None:
    before = uplink()
    lines = killed_at(0, lambda: take(port))
    put_back()
    assert_as(before)
    wrong = {}
    for line in some_of(lines, dice)[::3]:
        killed_at(line, lambda: take(port))
        put_back()
        if found := differences(before, uplink()):
            wrong[line] = found
    assert wrong == {}, f"of {lines} lines"


@pytest.mark.timeout(600)
def test_a_gc_killed_before_any_of_its_lines_is_finished_by_the_next(uplink, dice) -> None:
    before = uplink()
    killed_at(0, lambda: take(Port.NONE))
    lines = killed_at(0, put_back)
    wrong = {}
    for line in some_of(lines, dice)[::3]:
        killed_at(0, lambda: take(Port.NONE))
        killed_at(line, put_back)
        put_back()
        if found := differences(before, uplink()):
            wrong[line] = found
    assert wrong == {}, f"of {lines} lines"
