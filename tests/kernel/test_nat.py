"""NAT: bridges that are made, masqueraded and removed, their DHCP, and user networks; with packets."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import need
from tests.kernel.test_crash import dice, gc, kill_all, killed_at, put_back, start, take
from tests.kernel.test_wrapper import (
    MACHINE,
    NIC,
    QEMU,
    VNET_QEMU,
    Host,
    eventually,
    is_running,
    wait_for_line,
)
from tests.lab import guest
from vnet_lock.combination import Policy, Port
from vnet_lock.errors import Unsupported
from vnet_lock.journal import DhcpServer
from vnet_lock.kernel.netns import call_in
from vnet_lock.kernel.processes import read_boot_id, this_process
from vnet_lock.model import Owner, OwnerKind
from vnet_lock.request import Intent
from vnet_lock.session import Session
from vnet_lock.settings import DEFAULT
from vnet_lock.undo import undo

__all__ = ["dice"]  # a fixture

OURS, OUTSIDE, FAR = "198.51.100.2", "198.51.100.1", "203.0.113.1"
FORWARDING = Path("/proc/sys/net/ipv4/conf/up0/forwarding")
ETH_P_IP = 0x0800


class Wire(Host):
    """A host whose up0 leads to another namespace, ``out``, with a second address that is not on the wire."""

    def __init__(self, ip: Callable[[str], str]) -> None:
        self.ip = ip
        self.out = os.open("/run/netns/out", os.O_RDONLY | os.O_CLOEXEC)

    def state(self) -> dict[str, Any]:
        """All that a NAT network changes; dnsmasqs are those of this network namespace."""
        return {
            "links": self.links(),
            "tables": subprocess.check_output(["nft", "list", "ruleset"], text=True),
            "forwarding": FORWARDING.read_text(),
            "servers": servers(),
            "run": sorted(path.name for path in Path("/run/vnet-lock").glob("*")),
            "claims": self.claims(),
        }

    @contextlib.contextmanager
    def booted(self, console: Path, net: str, **words: str) -> Iterator[subprocess.Popen[str]]:
        """A guest with a system in it, which is ready."""
        image = guest.build()
        port = f"-chardev socket,id=c,path={console},server=on,wait=off,logfile={console}.log"
        boot = f"-kernel {image.kernel} -initrd {image.initrd} -append '{guest.kernel_words(**words)}'"
        line = f"{MACHINE} {port} -serial chardev:c {boot} -netdev host,id=net0,{net} {NIC}"
        with self.running(line) as process:
            wait_for_line(Path(f"{console}.log"), r"VNET-GUEST ready nics=1 .*link=up")
            yield process


def servers() -> list[int]:
    """The dnsmasqs in this network namespace."""
    own = os.stat("/proc/self/ns/net").st_ino
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_one = (path / "cmdline").read_bytes().split(b"\0")[0].endswith(b"dnsmasq")
            if is_one and os.stat(path / "ns/net").st_ino == own and is_running(int(path.name)):
                found.append(int(path.name))
    return found


def order(console: Path, number: int, words: str) -> str:
    """What a guest answers to an order."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(console))
        channel.sendall(f"{number} {words}\n".encode())
        return wait_for_line(Path(f"{console}.log"), rf"VNET-GUEST answer id={number} (\S+)\s")[1]


@pytest.fixture
def wire(ip: Callable[[str], str]) -> Iterator[Wire]:
    for program in ("nft", "dnsmasq", "passt", "qemu-system-x86_64"):
        need(shutil.which(program), program)
    for words in (
        "link set lo up",
        "netns add out",
        "link add up0 type veth peer name out0 netns out",
        f"address add {OURS}/24 dev up0",
        "link set up0 up",
        f"-n out address add {OUTSIDE}/24 dev out0",
        f"-n out address add {FAR}/32 dev lo",
        "-n out link set lo up",
        "-n out link set out0 up",
        f"route add default via {OUTSIDE}",
    ):
        ip(words)
    made = Wire(ip)
    yield made
    os.close(made.out)
    # A server would outlive a test that failed, and its namespaces with it.
    Session(DEFAULT).heal()


@pytest.fixture
def session(wire: Wire) -> Iterator[Session]:
    del wire
    yield Session(DEFAULT)
    assert os.listdir(DEFAULT.claims_dir) == []


def me(name: str = "me") -> Owner:
    return Owner(OwnerKind.LIBVIRT, name, read_boot_id(DEFAULT), uuid=name, process=this_process(DEFAULT))


def want(policy: Policy, *devs: str, **more: object) -> Intent:
    return Intent("net0", policy, devs, (Port.BRIDGE,), **more)  # type: ignore[arg-type]


# --- packets --------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_nat_guests_reach_the_outside_which_sees_the_host_alone(wire: Wire, tmp_path: Path) -> None:
    """Two guests: each has its address by DHCP, and the last one takes all with it that was made."""
    before = wire.state() | {"run": [".spare", "claims", "guard", "host.lock"]}
    net = "mode=nat,port=bridge,dhcp=on"
    seen = call_in(
        wire.out, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
    )
    with seen, wire.booted(tmp_path / "1", net, ip="dhcp") as first:
        address = wait_for_line(tmp_path / "1.log", r"address=(10\.177\.0\.\d+)/24")[1]
        with wire.booted(tmp_path / "2", net, ip="dhcp") as second:
            other = wait_for_line(tmp_path / "2.log", r"address=(10\.177\.0\.\d+)/24")[1]
            assert other != address
            assert order(tmp_path / "1", 1, f"ping {FAR}") == "ping=3/3"
            assert order(tmp_path / "2", 1, f"ping {OUTSIDE}") == "ping=3/3"
            assert order(tmp_path / "2", 2, f"ping {address}") == "ping=3/3"
            assert len(servers()) == 1
            second.terminate()
            second.wait(timeout=30)
        assert order(tmp_path / "1", 2, f"ping {FAR}") == "ping=3/3"
        assert sources(seen) == {OURS}
        # Nobody outside begins, even one who knows the way.
        wire.ip(f"-n out route add 10.177.0.0/24 via {OURS}")
        ping = ["ip", "netns", "exec", "out", "ping", "-c", "2", "-W", "1", address]
        assert subprocess.run(ping, stdout=subprocess.DEVNULL, check=False).returncode == 1
        first.terminate()
        first.wait(timeout=30)
    assert wire.state() == before


def sources(packets: socket.socket) -> set[str]:
    found = set()
    packets.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while packet := packets.recv(2048):
            found.add(socket.inet_ntoa(packet[12:16]))
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("uid", [0, 65534], ids=["root", "nobody"])
@pytest.mark.parametrize("backend", ["passt", "user"])
def test_a_user_network_leads_out_and_claims_nothing(wire: Wire, uid: int, backend: str) -> None:
    if backend == "user":
        # passt takes a default route, so it is QEMU's own network.
        wire.ip("route del default")
    server = call_in(wire.out, lambda: socket.create_server((OUTSIDE if backend == "user" else FAR, 8000)))
    with answering(server), own_folder(uid) as folder:
        image = guest.build()
        console = folder / "c"
        line = [
            *MACHINE.split(),
            *("-chardev", f"socket,id=c,path={console},server=on,wait=off,logfile={console}.log"),
            *("-serial", "chardev:c", "-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", guest.kernel_words(ip="dhcp"), "-netdev", "host,id=net0,mode=nat", *NIC.split()),
        ]
        # The interpreter and the image may be where only root looks: nobody may read them, and no more.
        reading = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
        become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *reading] if uid else []
        with subprocess.Popen([*become, VNET_QEMU, *line], stdin=subprocess.DEVNULL) as process:
            try:
                wait_for_line(Path(f"{console}.log"), r"VNET-GUEST ready nics=1 .*link=up")
                (qemu,) = children(process.pid)
                words = Path(f"/proc/{qemu}/cmdline").read_bytes()
                assert (b"stream,id=net0" if backend == "passt" else b"user,id=net0") in words
                to = OUTSIDE if backend == "user" else FAR
                # Its input stays open: half closed at once, a connection hung at times (passt of March 2023).
                get = f"mkfifo /tmp/f; exec 3<>/tmp/f; nc {to} 8000 <&3 | grep -q hello"
                assert order(console, 1, f"run {get}") == "exit=0"
                assert not Path("/run/vnet-lock").exists()
            finally:
                process.terminate()
                process.wait(timeout=30)
    eventually(lambda: not passts())


@contextlib.contextmanager
def own_folder(uid: int) -> Iterator[Path]:
    """A folder of a user's, in the test's own /run."""
    folder = Path(f"/run/of-{uid}")
    folder.mkdir()
    os.chown(folder, uid, uid)
    yield folder


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def passts() -> list[int]:
    own = os.stat("/proc/self/ns/net").st_ino
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "comm").read_text().startswith("passt") and os.stat(path / "ns/net").st_ino == own:
                found.append(int(path.name))
    return found


@contextlib.contextmanager
def answering(server: socket.socket) -> Iterator[None]:
    """Says hello to whoever comes; its thread is gone at the end, as leaving a namespace takes."""

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = server.accept()
                with peer:
                    peer.sendall(b"hello\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        server.close()


# --- what is made, and what is left ---------------------------------------------------------------


def test_a_guest_killed_with_its_wrapper_leaves_nothing_after_gc(wire: Wire) -> None:
    before = wire.state() | {"run": [".spare", "claims", "guard", "host.lock"]}
    process = start(f"{QEMU} -netdev host,id=net0,mode=nat,dev=up0,dhcp=on {NIC}")
    try:
        eventually(lambda: {claim["state"] for claim in wire.claims()} == {"active"})
        made = wire.state()
    finally:
        kill_all(process)
    assert len(made["servers"]) == 1
    index = Path("/sys/class/net/up0/ifindex").read_text().strip()
    assert f"vlnat{index}" in made["links"]
    assert made["forwarding"] == "1\n"
    # What was made outlives them.
    assert wire.state()["servers"] == made["servers"]
    done = gc()
    assert done.returncode == 0, done.stdout + done.stderr
    assert wire.state() == before


def test_a_bridge_of_ours_goes_with_its_last_guest(wire: Wire, session: Session) -> None:
    session.acquire(me("a"), [want(Policy.VEB, "lab0")])
    session.acquire(me("b"), [want(Policy.VEB, "lab0")])
    taps = [path.name.removeprefix("lower_") for path in Path("/sys/class/net/lab0").glob("lower_*")]
    assert len(taps) == 2
    session.release(me("a"))
    assert "lab0" in wire.links()
    session.release(me("b"))
    assert "lab0" not in wire.links()


def test_anothers_bridge_of_that_name_stays(wire: Wire, session: Session) -> None:
    wire.ip("link add lab0 type bridge")
    session.acquire(me(), [want(Policy.VEB, "lab0")])
    session.release(me())
    assert "lab0" in wire.links()


def test_without_port_bridge_a_name_that_is_nowhere_makes_no_bridge(session: Session) -> None:
    with pytest.raises(Exception, match="no network device 'lab0'"):
        session.acquire(me(), [Intent("net0", Policy.VEB, ("lab0",))])


def test_every_undo_of_a_nat_network_may_run_twice(wire: Wire, session: Session) -> None:
    before = wire.state()
    session.acquire(me(), [want(Policy.NAT, dhcp=True)])
    claim = session.table.read().records[0]
    assert [type(entry).__name__ for entry in claim.journal] == [
        "SharedLink", "Sysctl", "Sysctl", "NatTable", "DhcpServer", "MadeLink",
    ]  # fmt: skip
    assert undo(DEFAULT, claim) == []
    assert undo(DEFAULT, claim) == []
    session.release(me())
    session.release(me())
    assert wire.state() == before | {"run": [".spare", "claims", "guard", "host.lock"]}


def test_guests_share_a_server_and_the_next_replaces_a_dead_one(wire: Wire, session: Session) -> None:
    for name in ("a", "b"):
        session.acquire(me(name), [want(Policy.NAT, dhcp=True)])
    (server,) = servers()
    assert {
        entry.pid for claim in session.table.read().records for entry in claim.journal
        if isinstance(entry, DhcpServer)
    } == {server}  # fmt: skip
    os.kill(server, signal.SIGKILL)
    eventually(lambda: not servers())
    session.acquire(me("c"), [want(Policy.NAT, dhcp=True)])
    (other,) = servers()
    assert other != server
    for name in ("a", "b"):
        session.release(me(name))
    assert servers() == [other]
    session.release(me("c"))
    assert servers() == []
    assert [path.name for path in Path("/run/vnet-lock").glob("dnsmasq*")] == []


def test_a_subnet_that_the_host_has_is_left_alone(wire: Wire, session: Session) -> None:
    wire.ip(f"route add 10.177.0.0/23 via {OUTSIDE}")
    session.acquire(me(), [want(Policy.NAT)])
    assert "10.177.2.1/24" in wire.ip("-4 address show dev vlnat0")
    session.release(me())


def test_with_an_uplink_nothing_leaves_by_another_device(wire: Wire, session: Session) -> None:
    session.acquire(me(), [want(Policy.NAT, "up0")])
    rules = subprocess.check_output(["nft", "list", "ruleset"], text=True)
    assert re.search(r'ip saddr 10\.177\.0\.0/24 oifname "up0" masquerade', rules)
    assert re.search(r'iifname "(vlnat\d+)" oifname != "\1" oifname != "up0" drop', rules)
    session.release(me())


def test_forwarding_that_was_on_before_stays_on(wire: Wire, session: Session) -> None:
    FORWARDING.write_text("1")
    session.acquire(me(), [want(Policy.NAT, "up0")])
    session.release(me())
    assert FORWARDING.read_text() == "1\n"


def test_a_nat_bridge_that_exists_is_used_as_it_is(wire: Wire, session: Session) -> None:
    wire.ip("link add virbr0 type bridge")
    wire.ip("link set virbr0 up")
    with pytest.raises(Unsupported, match="virbr0 is no way out: the host has no IPv4 address on it"):
        session.acquire(me(), [want(Policy.NAT, "virbr0")])
    wire.ip("address add 192.168.122.1/24 dev virbr0")
    before = wire.state()
    (grant,) = session.acquire(me(), [want(Policy.NAT, "virbr0")])
    assert grant.opened is not None
    assert os.readlink(f"/sys/class/net/{grant.opened.netdev}/master").endswith("/virbr0")
    assert wire.state()["tables"] == before["tables"]
    with pytest.raises(Unsupported, match="leave dhcp= out"):
        session.acquire(me("b"), [want(Policy.NAT, "virbr0", dhcp=True)])
    session.release(me())
    assert wire.state()["links"] == before["links"]


def test_a_dnsmasq_that_cannot_serve_says_why_and_leaves_nothing(wire: Wire, session: Session) -> None:
    before = wire.state()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 67))
        with pytest.raises(Exception, match=r"dnsmasq can't serve DHCP on vlnat0: .*in use"):
            session.acquire(me(), [want(Policy.NAT, dhcp=True)])
    assert wire.state() == before | {"run": [".spare", "claims", "guard", "host.lock"]}


NETS = {
    "nat": "-netdev host,id=net0,mode=nat,port=bridge,dhcp=on",
    "veb": "-netdev host,id=net0,mode=veb,port=bridge,dev=lab0",
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_start_killed_before_any_of_its_lines_is_healed(wire: Wire, dice, net: str) -> None:
    lines = killed_at(0, lambda: take(net))
    put_back()
    before = wire.state()
    every = range(1, lines + 1)
    some = every if os.environ.get("VNET_LOCK_LINES") == "all" else sorted(dice.sample(every, 40))
    wrong = {}
    for line in some:
        killed_at(line, lambda: take(net))
        put_back()
        # A process that waits for its word sees that we are gone at once, and ends by itself.
        with contextlib.suppress(AssertionError):
            eventually(lambda: wire.state() == before, timeout_s=5)
        if (now := wire.state()) != before:
            wrong[line] = {key: value for key, value in now.items() if value != before[key]}
            break
    assert wrong == {}, f"of {lines} lines"
