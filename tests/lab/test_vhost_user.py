"""socket+vhost: an unmodified QEMU's vhost-user between a guest and a wire, packets through the kernel."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel.host import STAYING
from tests.lab.machines import READY_S, Guests, PlainGuest
from tests.lab.nic import Nic, run, wait_until
from tests.lab.wire import ADDRESS, Wire

GUEST = "10.9.0.2"
NET = "-netdev host,id=net0,mode=veb,port=macvlan,dev=up0,protocols=socket:vhost"
NIC = "-device virtio-net-pci,netdev=net0,romfile="
# All that a packet socket's header is for.
NO_OFFLOADS = ",".join(
    f"{word}=off"
    for word in (
        *("csum", "guest_csum", "gso", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo"),
        *("host_tso4", "host_tso6", "host_ecn", "host_ufo"),
    )
)
TRANSFER = 2_000_000


pytestmark = pytest.mark.timeout(900)


@dataclass(slots=True)
class Machine:
    """A guest on the wire, and what a test does with it."""

    guest: PlainGuest
    wire: Wire
    qmp_path: Path

    def pings(self) -> str:
        """How many of three it gets answered."""
        return self.guest.console.ask(f"ping {ADDRESS}")["ping"]

    def run(self, command: str) -> str:
        """The exit status of a command in the guest."""
        return self.guest.console.ask(f"run {command}", deadline_s=400)["exit"]

    def check_transfers(self) -> None:
        """Bulk TCP each way arrives as it was sent."""
        received = self.wire.receive()
        sender = f"head -c {TRANSFER} /dev/urandom >/tmp/sent; nc {ADDRESS} 5000 </tmp/sent"
        assert self.run(sender) == "0"
        assert self.run(f"md5sum </tmp/sent | grep -q {received.sum}") == "0"
        assert received.size == TRANSFER
        sent = self.wire.send(os.urandom(TRANSFER))
        receiver = f"nc {ADDRESS} 5001 </dev/null >/tmp/got; md5sum </tmp/got | grep -q {sent.sum}"
        assert self.run(receiver) == "0"
        sent.wait()

    def qmp(self, command: str, **arguments: object) -> None:
        """One QMP command that has to succeed."""
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(60)
            end.connect(str(self.qmp_path))
            lines = end.makefile("rw")
            lines.readline()
            for execute, words in (("qmp_capabilities", {}), (command, arguments)):
                lines.write(json.dumps({"execute": execute, "arguments": words}) + "\n")
                lines.flush()
                while "return" not in (answer := json.loads(lines.readline())):
                    assert "error" not in answer, answer


def back_ends() -> list[int]:
    """Our processes: monitors and workers, in the order of their pids."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"vnet_lock.datapath.vhost_user" in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


@contextmanager
def machine(directory: Path, *words: str, net: str = NET, nic: str = NIC) -> Iterator[Machine]:
    """A guest on a wire of its own, ready; nothing of it is left afterwards."""
    wire, guests = Wire(), Guests(directory)
    try:
        made = guests.qemu(
            "guest",
            [*words, *net.split(), *nic.split(), "-qmp", f"unix:{directory}/qmp,server=on,wait=off"],
            program=["vnet-qemu", "qemu-system-x86_64"],
            ip=f"{GUEST}/24", ping=ADDRESS, more="memhp_default_state=online",
        )  # fmt: skip
        assert made.console.ready(READY_S * 3)["ping"] == "3/3", made.said
        yield Machine(made, wire, directory / "qmp")
    finally:
        print(made.said)
        guests.end()
        wire.close()
        for path in directory.glob("*.log"):
            kept = Path(os.environ["VNET_LAB_RESULTS"], "tests", "vhost-user")
            kept.mkdir(parents=True, exist_ok=True)
            (kept / f"{directory.name}-{path.name}").write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The guest of the first tests, which has room for more memory; the last of them ends it."""
    directory = tmp_path_factory.mktemp("one")
    with machine(directory, "-m", "size=128,slots=2,maxmem=1G") as made:
        yield made


def test_bulk_data_arrives_as_it_was_sent_both_ways(one: Machine) -> None:
    one.check_transfers()


def test_what_others_send_is_read_by_nobody(one: Machine) -> None:
    monitor, worker = back_ends()
    for pid, uid in ((monitor, 0), (worker, 65534)):
        status = Path(f"/proc/{pid}/status").read_text()
        assert f"\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in status
    assert "\nCapEff:\t0000000000000000\n" in Path(f"/proc/{worker}/status").read_text()


def test_memory_that_is_plugged_in_is_the_networks_too(one: Machine) -> None:
    backend = {"qom-type": "memory-backend-memfd", "id": "dimm0", "size": 256 << 20, "share": True}
    one.qmp("object-add", **backend)
    one.qmp("device_add", driver="pc-dimm", id="d0", memdev="dimm0")
    has_more = "grep MemTotal /proc/meminfo | (read -r _ size _; [ $size -gt 262144 ])"
    assert one.run(f"for try in 1 2 3 4 5 6 7 8 9; do {has_more} && break; sleep 1; done; {has_more}") == "0"
    # More than the memory that it had, so that what is sent and received now lies in the new.
    assert (
        one.run("mkdir /big; mount -t tmpfs -o size=200m big /big; head -c 100000000 /dev/zero >/big/filler")
        == "0"
    )
    assert one.pings() == "3/3"
    one.check_transfers()
    assert one.run("umount /big") == "0"


def test_a_worker_that_is_killed_is_replaced_and_the_guest_goes_on(one: Machine) -> None:
    monitor, worker = back_ends()
    with one.wire.chatter():
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: len(back_ends()) == 2 and worker not in back_ends(), "there is a new worker")
    assert back_ends()[0] == monitor
    # The guest may not have seen yet that its link went down.
    wait_until(lambda: one.pings() == "3/3", "QEMU came back")
    one.check_transfers()


def test_a_guest_that_is_reset_finds_its_network_again(one: Machine) -> None:
    before = back_ends()
    one.qmp("set-action", reboot="reset")
    one.qmp("system_reset")
    console = one.guest.console
    wait_until(
        lambda: console.text.count("VNET-GUEST ready") == 2 and console.text.endswith("\n"),
        "it booted again",
        READY_S * 3,
    )
    assert console.text.splitlines()[-1].endswith("ping=3/3")
    assert back_ends() == before
    one.check_transfers()


def test_nothing_is_left_of_a_qemu_that_is_killed(one: Machine) -> None:
    claim = next(Path("/run/vnet-lock/claims").iterdir())
    qemu = json.loads(claim.read_text())["owner"]["process"]["pid"]
    os.kill(qemu, signal.SIGKILL)
    assert one.guest.wait() == -signal.SIGKILL
    wait_until(lambda: not back_ends(), "the back-end is gone")
    names = {path.name for path in Path("/run/vnet-lock").rglob("*")}
    left = {name for name in names if not name.endswith((".lock", ".hooks"))}
    assert left <= {*STAYING}, left
    assert "@up0" not in run("ip", "link").stdout


def test_a_vf_in_a_namespace_of_its_own_carries_packets(lab: Nic, guests: Guests, tmp_path: Path) -> None:
    from vnet_lock.backends import socket_vhost
    from vnet_lock.combination import Combination
    from vnet_lock.ports import Opened
    from vnet_lock.request import Intent
    from vnet_lock.settings import DEFAULT

    (vf,) = lab.set_numvfs(1)
    lab.set_address("10.9.0.1/24")
    combination = Combination.parse("veb-sriov-socket+vhost")
    netdev, mac, path = str(vf.netdev), str(vf.mac), f"{tmp_path}/vhost.sock"
    run("ip", "netns", "add", "vf")
    try:
        run("ip", "link", "set", netdev, "netns", "vf")
        run("ip", "-n", "vf", "link", "set", netdev, "addrgenmode", "none", "allmulticast", "on", "up")
        with Path("/run/netns/vf").open() as namespace:
            opened = Opened(netdev, mac, netns=os.dup(namespace.fileno()), path=path)
        connection = socket_vhost.connect(DEFAULT, Intent("net0", combination.policy), opened, combination)
        opened.close()
        made = guests.qemu(
            "vf",
            [
                "-object", "memory-backend-memfd,id=m0,size=128M,share=on", "-machine", "memory-backend=m0",
                "-chardev", f"socket,id=c0,path={path}", "-netdev", "vhost-user,id=n0,chardev=c0",
                "-device", f"virtio-net-pci,netdev=n0,mac={mac},romfile=",
            ],
            pass_fds=connection.kept, ip=f"{GUEST}/24", ping=ADDRESS,
        )  # fmt: skip
        for descriptor in connection.kept:
            os.close(descriptor)
        assert made.console.ready(READY_S * 3)["ping"] == "3/3"
        made.kill()
        made.wait()
        wait_until(lambda: not back_ends(), "the back-end is gone")
    finally:
        run("ip", "netns", "delete", "vf")
    wait_until(lambda: vf.netdev, "the VF is back in the first namespace")
