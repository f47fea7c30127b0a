"""qemu-net-helper with an unmodified QEMU and with receivers of our own, on real macvtaps and bridges."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.kernel.host import HELPER, LINKS, MAC, QEMU, RUN, eventually

TUNGETIFF = 0x800454D2  # include/uapi/linux/if_tun.h
KEYS = {"version", "combination", "ifname", "ifindex", "mac", "features", "fds", "qemu"}


@dataclass
class Receiver:
    """Our end of a socket pair, and what came through it."""

    ours: socket.socket
    text: str = ""
    fds: list[int] = field(default_factory=list)

    def read(self) -> dict:
        data, self.fds, _, _ = socket.recv_fds(self.ours, 65536, 253)
        self.text = data.decode()
        assert self.text.count("\n") == 1
        assert self.text.endswith("\n")
        return json.loads(self.text)

    def close_fds(self) -> None:
        for descriptor in self.fds:
            os.close(descriptor)
        self.fds = []


@contextlib.contextmanager
def pair(kind: int = socket.SOCK_STREAM) -> Iterator[tuple[Receiver, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    receiver = Receiver(ours)
    with ours, theirs:
        try:
            yield receiver, theirs
        finally:
            receiver.close_fds()


def ask(monitor: Path, line: str) -> str:
    """The answer of QEMU's monitor."""
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(monitor))
        end.settimeout(20)
        end.sendall(f"{line}\n".encode())
        said = b""
        while said.count(b"(qemu)") < 2:
            said += end.recv(4096)
    return said.decode(errors="replace")


def tap(*words: str, number: int = 0) -> str:
    return f"tap,id=n{number},helper=" + " ".join([HELPER, *words])


def test_an_unmodified_qemu_gets_its_macvtap_and_its_end_is_healed(host, tmp_path):
    net = tap("--mode=vepa", "--dev=up0", f"--mac={MAC}")
    with host.plain_qemu(net, monitor=str(tmp_path / "m")) as qemu:
        eventually((tmp_path / "m").exists)
        assert "type=tap" in ask(tmp_path / "m", "info network")
        (claim,) = host.claims()
        assert claim["owner"]["process"]["pid"] == qemu.pid
        assert (claim["state"], claim["worker"], claim["resource"]) == ("active", None, "nic:up0")
        (link,) = host.macvtaps()
        assert (link["address"], link["linkinfo"]["info_data"]["mode"]) == (MAC, "vepa")
        host.gc()
        assert host.claims() == [claim]
        qemu.kill()
        _, err = qemu.communicate(timeout=20)
        assert err == ""
    assert len(host.claims()) == 1
    host.gc()
    assert host.is_clean()


def test_an_unmodified_qemu_finds_its_bridge_as_by_its_own_helper(host, tmp_path):
    net = f"bridge,id=n0,br=br0,helper={HELPER}"
    with host.plain_qemu(net, monitor=str(tmp_path / "m")) as qemu:
        eventually((tmp_path / "m").exists)
        assert "br=br0" in ask(tmp_path / "m", "info network")
        (claim,) = host.claims()
        assert (claim["combination"], claim["owner"]["process"]["pid"]) == ("veb-bridge-tap", qemu.pid)
        (tap_link,) = json.loads(subprocess.check_output(["ip", "-j", "link", "show", "master", "br0"]))
        assert f"iff:\t{tap_link['ifname']}" in fdinfo_of(qemu.pid)
        qemu.kill()
        _, err = qemu.communicate(timeout=20)
        assert err == ""
        # As with QEMU's own helper, the tap needs nobody to remove it.
        eventually(lambda: host.links() == LINKS)
    host.gc()
    assert host.is_clean()


def test_a_bridge_that_is_not_there_stops_qemu_as_its_own_helper_does(host, tmp_path):
    with host.plain_qemu(f"bridge,id=n0,br=nosuch0,helper={HELPER}", monitor=str(tmp_path / "m")) as qemu:
        _, err = qemu.communicate(timeout=60)
    assert qemu.returncode == 1
    assert "qemu-net-helper: there is no bridge 'nosuch0' here" in err
    assert host.is_clean()


def test_a_second_interface_of_the_same_qemu_comes_to_the_first(host, tmp_path):
    first = tap("--mode=vepa", "--dev=up0", f"--mac={MAC}")
    second = tap("--mode=veb", "--port=bridge", "--dev=br0", number=1)
    third = tap("--mode=vepa", "--dev=up0", "--mac=52:54:00:00:00:03", number=2)
    with host.plain_qemu(first, second, third, monitor=str(tmp_path / "m")) as qemu:
        eventually((tmp_path / "m").exists)
        assert ask(tmp_path / "m", "info network").count("type=tap") == 3
        claims = host.claims()
        assert sorted(claim["resource"] for claim in claims) == ["nic:br0", "nic:up0", "nic:up0"]
        assert {claim["owner"]["process"]["pid"] for claim in claims} == {qemu.pid}
        assert len(host.links()) == len(LINKS) + 3
        qemu.kill()
        qemu.wait(timeout=20)
    host.gc()
    assert host.is_clean()


def test_a_qemu_that_cannot_have_its_network_does_not_start(host, tmp_path):
    with host.plain_qemu(tap("--mode=vepa", f"--mac={MAC}", "--dev=up0"), monitor=str(tmp_path / "1")):
        again = tap("--mode=vepa", f"--mac={MAC}", "--dev=up0")
        eventually(lambda: [claim for claim in host.claims() if claim["state"] == "active"])
        with host.plain_qemu(again, monitor=str(tmp_path / "2")) as second:
            _, err = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"qemu-net-helper: net0: MAC {MAC} is already used" in err
        assert len(host.claims()) == len(host.macvtaps()) == 1


def test_a_mac_that_the_guest_is_not_told_is_said(host, tmp_path):
    with host.plain_qemu(tap("--mode=vepa", "--dev=up0"), monitor=str(tmp_path / "m")) as qemu:
        eventually((tmp_path / "m").exists)
        assert "type=tap" in ask(tmp_path / "m", "info network")
        (link,) = host.macvtaps()
        qemu.kill()
        _, err = qemu.communicate(timeout=20)
        assert f"the guest's device needs mac={link['address']}" in err


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
@pytest.mark.parametrize(
    ("line", "combination", "queues"),
    [
        ("--mode=vepa --dev=up0 --protocols=tap", "vepa-macvlan-tap", 1),
        ("--mode bridge --dev up0 --port macvlan --protocols tap --queues 2", "veb-macvlan-tap", 2),
        ("--mode=veb --dev=br0 --port=bridge --protocols=tap --queues=2", "veb-bridge-tap", 2),
        ("--mode=private --dev=nosuch0 --dev=up0 --protocols=vfio,tap", "private-macvlan-tap", 1),
    ],
)
def test_the_message_has_what_was_promised_and_the_descriptors_work(host, kind, line, combination, queues):
    with pair(kind) as (receiver, theirs):
        result = host.helper(f"{line} --mac={MAC} --socketpair=FD", theirs)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        message = receiver.read()
        assert message.keys() == KEYS
        assert (message["version"], message["combination"], message["mac"]) == (1, combination, MAC)
        assert message["ifindex"] == socket.if_nametoindex(message["ifname"])
        assert message["features"] == {"vnet_hdr": True, "vhost": False, "queues": queues}
        assert message["fds"] == ["tap"] * queues
        assert len(receiver.fds) == queues
        for descriptor in receiver.fds:
            told = fcntl.ioctl(descriptor, TUNGETIFF, struct.pack("=16sH22x", b"", 0))
            assert struct.unpack("=16sH22x", told)[0].rstrip(b"\0").decode() == message["ifname"]
        (claim,) = host.claims()
        assert (claim["owner"]["process"]["pid"], claim["state"]) == (os.getpid(), "active")


def test_qemu_takes_the_words_of_the_message_once_the_numbers_are_in(host, tmp_path):
    with pair() as (receiver, theirs):
        assert (
            host.helper(f"--mode=vepa --dev=up0 --mac={MAC} --queues=2 --socketpair=FD", theirs).returncode
            == 0
        )
        message = receiver.read()
        words = [word.format(*receiver.fds) for word in message["qemu"]]
        device = f"virtio-net-pci,netdev=net0,mac={message['mac']},mq=on"
        line = [*QEMU.split(), "-monitor", "stdio", *words, "-device", device]
        done = subprocess.run(
            line,
            input="info network\nquit\n",
            pass_fds=receiver.fds,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert MAC in done.stdout


def test_a_packet_sockets_relay_is_handed_over_and_qemu_takes_its_words(host):
    pytest.importorskip("vnet_lock.backends.socket")
    with pair() as (receiver, theirs):
        line = f"--mode=vepa --dev=up0 --mac={MAC} --protocols=socket --socketpair=FD"
        assert host.helper(line, theirs).returncode == 0
        message = receiver.read()
        assert (message["fds"], message["ifindex"], len(receiver.fds)) == (["socket"], None, 1)
        assert message["features"] == {"vnet_hdr": False, "vhost": False, "queues": 1}
        words = [word.format(*receiver.fds) for word in message["qemu"]]
        line = [*QEMU.split(), "-monitor", "stdio", *words, "-device", f"e1000,netdev=net0,mac={MAC}"]
        done = subprocess.run(
            line,
            input="info network\nquit\n",
            pass_fds=receiver.fds,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "type=dgram" in done.stdout


REFUSALS = [
    ("--mode=vepa --dev=nosuch0", 2, "input", "nosuch0"),
    ("--mode=vepa", 2, "input", "no device is named"),
    ("--dev=up0", 2, "input", "mode= is missing"),
    ("--mode=vepa --dev=up0 --shiny", 2, "input", "'--shiny'"),
    ("--mode=vepa --dev=up0 up1", 2, "input", "'up1'"),
    ("--mode=vepa --dev=", 2, "input", "--dev has no value"),
    ("--mode=vepa --dev=up0 --mac=1", 2, "input", "MAC"),
    ("--mode=vepa --dev=up0 --queues=200", 2, "input", "126 queues"),
    ("--mode=vepa --dev=up0 --help", 2, "input", "'--help'"),
    ("--mode=vepa --dev=up0 --protocols=vfio", 5, "unsupported", "add tap"),
    ("--mode=vepa --dev=up0 --port=sriov --vlan=7", 5, "unsupported", "no SR-IOV"),
    ("--mode=veb --port=bridge --dev=up0", 5, "unsupported", "no bridge"),
]


@pytest.mark.parametrize(("line", "code", "kind", "words"), REFUSALS)
def test_a_refusal_goes_over_the_socket_and_out_in_one_line(host, line, code, kind, words):
    with pair() as (receiver, theirs):
        result = host.helper(f"--socketpair=FD {line}", theirs)
        message = receiver.read()
    assert receiver.fds == []
    assert message.keys() == {"version", "error"}
    assert (result.returncode, message["error"]["kind"]) == (code, kind)
    assert words in message["error"]["message"]
    assert result.stderr == f"qemu-net-helper: {message['error']['message']}\n"
    assert host.is_clean()


def test_what_another_has_is_refused_with_its_holder(host):
    with pair() as (first, theirs), pair() as (second, others):
        assert host.helper(f"--mode=vepa --dev=up0 --mac={MAC} --socketpair=FD", theirs).returncode == 0
        first.read()
        result = host.helper(f"--mode=vepa --dev=up0 --mac={MAC} --socketpair=FD", others)
        message = second.read()
        assert (result.returncode, message["error"]["kind"]) == (4, "held")
        assert f"(pid {os.getpid()})" in message["error"]["message"]
        assert len(host.claims()) == len(host.macvtaps()) == 1


def test_what_cannot_be_sent_is_given_back(host):
    """The owner lives, but closed its end: nobody would ever give it back."""
    with pair() as (receiver, theirs):
        receiver.ours.close()
        for target in ("fd", "socketpair"):
            result = host.helper(f"--mode=vepa --dev=up0 --{target}=FD", theirs)
            assert result.returncode == 1
            assert result.stderr == "qemu-net-helper: the descriptors could not be sent: Broken pipe\n"
            assert host.is_clean()


def test_a_socket_with_nobody_at_the_other_end_is_refused_before_anything_is_made(host):
    with socket.socket(socket.AF_UNIX) as alone:
        result = host.helper("--mode=vepa --dev=up0 --fd=FD", alone)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "not connected" in result.stderr
    assert host.is_clean()


def test_a_claim_is_never_made_for_a_process_that_is_gone(host):
    """The pair's maker ended, but its sockets were handed on."""
    with pair() as (receiver, theirs):
        child = os.fork()
        if child == 0:
            try:
                ends = socket.socketpair()
                socket.send_fds(theirs, [b"x"], [end.fileno() for end in ends])
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        _, receiver.fds, _, _ = socket.recv_fds(receiver.ours, 1, 2)
        with socket.socket(fileno=receiver.fds.pop()) as orphan:
            result = host.helper("--mode=vepa --dev=up0 --fd=FD", orphan)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "is gone" in result.stderr
    assert host.is_clean()


def test_a_helper_is_never_its_own_guest(host):
    """Whoever makes the pair and then becomes the helper: the claim would end with it."""
    code = (
        "import os, socket, sys\n"
        "a, b = socket.socketpair()\n"
        "b.set_inheritable(True)\n"
        "os.execv(sys.argv[1], [*sys.argv[1:], f'--fd={b.fileno()}'])"
    )
    words = [sys.executable, "-c", code, HELPER, "--mode=vepa", "--dev=up0"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert host.is_clean()


# Drops what root may do once all is loaded: the interpreter may lie where others can't read.
AS_NOBODY = """
import json, os, struct, sys
from vnet_lock.front.helper import main
from vnet_lock.qemu_argv import read_argv
from vnet_lock.session import Session
Session().plan(read_argv(["-netdev", "host,id=net0,mode=vepa,dev=up0"]).intents)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("target", ["fd", "socketpair"])
@pytest.mark.parametrize("has_claims", [False, True])
def test_a_user_who_is_not_root_is_told_so_and_nothing_is_made(host, target, has_claims):
    if has_claims:
        with pair() as (receiver, theirs):
            receiver.ours.close()
            assert host.helper("--mode=vepa --dev=up0 --fd=FD", theirs).returncode == 1
        assert (RUN / "claims").exists()
    with pair() as (receiver, theirs):
        line = ["--mode=vepa", "--dev=up0", f"--{target}={theirs.fileno()}"]
        result = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *line],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
        if target == "socketpair":
            assert "root" in receiver.read()["error"]["message"]
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "root" in result.stderr
    assert host.is_clean()


def test_a_helper_killed_before_it_could_send_leaves_nothing_that_stays(host):
    """Its owner lives on: what was not sent must not wait for the owner's end."""
    with pair() as (receiver, theirs):
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(bytes(4096))
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(b"x")
        del receiver
        with host.helping("--mode=vepa --dev=up0 --protocols=tap --socketpair=FD", theirs) as process:
            eventually(lambda: has_tap_open(process.pid))
            time.sleep(0.2)
            assert process.poll() is None
            (claim,) = host.claims()
            host.gc()
            assert host.claims() == [claim]
            process.kill()
            process.wait(timeout=20)
        host.gc()
        assert host.is_clean()


def fdinfo_of(pid: int) -> str:
    """What the kernel tells of a process's descriptors: of a tap's its name (iff)."""
    return "".join(path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir())


def has_tap_open(pid: int) -> bool:
    rdevs = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed just now
            rdevs.add(path.stat().st_rdev)
    nodes = [path.read_text() for path in Path("/sys/class/net").glob("vl*/tap*/dev")]
    return any(os.makedev(*map(int, node.split(":"))) in rdevs for node in nodes)


@pytest.mark.timeout(300)
def test_a_helper_killed_at_any_moment_leaves_nothing_that_stays(host):
    """Its owner lives on: what was not sent must not wait for the owner's end."""
    seed = random.randrange(1 << 32)
    print(f"random.seed({seed})")
    dice = random.Random(seed)
    with pair() as (receiver, theirs):
        started = time.monotonic()
        assert host.helper("--mode=vepa --dev=up0 --socketpair=FD", theirs).returncode == 0
        span_s = (time.monotonic() - started) * 1.1
        receiver.read()
        kept = host.claims()
        for number in range(8):
            with pair() as (other, end):
                wait_s = span_s * (0.3 + 0.7 * dice.random())
                with host.helping("--mode=vepa --dev=up0 --socketpair=FD", end) as process:
                    time.sleep(wait_s)
                    process.kill()
                    process.communicate(timeout=20)
                end.close()
                data, other.fds, _, _ = socket.recv_fds(other.ours, 65536, 253)
            where = f"round {number}, killed after {wait_s:.3f} s, sent {data!r}"
            host.gc()
            claims = host.claims()
            assert all(claim["state"] == "active" for claim in claims), where
            assert len(host.macvtaps()) == len(claims), where
            if data:
                # Whether the claim was the owner's by then, or was still ours and is healed.
                assert len(claims) - len(kept) in (0, 1), where
                kept = claims
            assert claims == kept, where
