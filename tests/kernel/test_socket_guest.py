"""vnet-qemu with protocols=socket: real guests, and a peer in a namespace at the wire's other end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.host import MAC, QEMU, Host, children_of, eventually, is_running
from tests.kernel.test_relay import inhabitants
from tests.kernel.test_wrapper import MACHINE, active
from tests.lab import guest
from tests.lab.machines import Console
from vnet_lock.kernel.netns import call_in, make_namespace
from vnet_lock.settings import DEFAULT

VNET_LOCK = str(Path(sys.executable).with_name("vnet-lock"))
PEER, GUEST = "10.9.9.1", "10.9.9.2"
NET = f"-netdev host,id=net0,mode=veb,dev=up0,protocols=socket,mac={MAC}"
IDLE = f"{QEMU} -name sock {NET} -device e1000,netdev=net0"
SIZE = 1_000_003


@pytest.fixture
def far(host: Host, ip: Callable[[str], str]) -> Iterator[int]:
    """The namespace of the peer, with its address."""
    del host
    namespace = make_namespace(DEFAULT)
    ip(f"link set peer0 netns /proc/{os.getpid()}/fd/{namespace}")
    for words in ("link set peer0 up", f"address add {PEER}/24 dev peer0"):
        call_in(namespace, lambda words=words: ip(words))
    yield namespace
    os.close(namespace)


def relays() -> list[int]:
    """The relays of this test: they have its mount namespace."""
    own = os.stat("/proc/self/ns/mnt").st_ino
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"vnet_lock.datapath.relay" in (path / "cmdline").read_bytes():
                found += [int(path.name)] if os.stat(path / "ns/mnt").st_ino == own else []
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("model", ["virtio-net-pci", "e1000"])
def test_a_guest_exchanges_what_it_likes_with_a_peer(host: Host, far: int, tmp_path: Path, model: str):
    image, console = guest.build(), Console(tmp_path / "guest.log")
    words = guest.kernel_words(ip=f"{GUEST}/24")
    serial = (
        f"-chardev socket,id=c,path={tmp_path}/guest.sock,server=on,wait=off,logfile={tmp_path}/guest.log"
    )
    boot = f"-kernel {image.kernel} -initrd {image.initrd} -append '{words}' -serial chardev:c"
    dump = f"-object filter-dump,id=dump,netdev=net0,file={tmp_path}/pcap"
    with host.running(f"{MACHINE} {serial} {boot} {NET} -device {model},netdev=net0 {dump}") as process:
        console.is_alive = lambda: process.poll() is None
        ready = console.ready()
        assert (ready["link"], ready["mac"]) == ("up", MAC)
        assert console.ask(f"ping {PEER}")["ping"] == "3/3"
        with call_in(far, lambda: socket.create_server((PEER, 5001))) as listener:
            # The peer's stack hands over packets of up to 64 KiB without checksums: it is on the same host.
            sent = random.Random(1).randbytes(SIZE)
            got = exchange(console, listener, sent, f"nc {PEER} 5001 </dev/null | md5sum")
            assert hashlib.md5(sent).hexdigest() in console.text
            assert got == b""
            made = "dd if=/dev/urandom of=/tmp/x bs=1000 count=1001 2>/dev/null; md5sum /tmp/x"
            got = exchange(console, listener, b"", f"{made}; nc {PEER} 5001 </tmp/x")
            assert len(got) == 1_001_000
            assert hashlib.md5(got).hexdigest() in console.text
        tagged = bytes.fromhex(MAC.replace(":", "") + "020000000001" + "8100202a" + "88b5") + b"tagged" * 10
        with call_in(far, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) as peer:
            peer.bind(("peer0", 0))
            peer.send(tagged)
        console.ask(f"ping {PEER}")
        process.terminate()
        process.wait(timeout=30)
    assert tagged in (tmp_path / "pcap").read_bytes()


def exchange(console: Console, listener: socket.socket, sent: bytes, command: str) -> bytes:
    """Send the guest's command that, and return what it sent."""
    got: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            if sent:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)  # the guest's nc ends by that
            while chunk := connection.recv(1 << 16):
                got.append(chunk)

    thread = threading.Thread(target=serve)
    thread.start()
    console.ask(f"run {command}", 120)
    thread.join()
    return b"".join(got)


def test_the_guests_device_is_seen_by_nobody_and_goes_with_it(host: Host):
    before = host.links()
    with host.running(IDLE) as process:
        claim = eventually(lambda: active(host))
        assert claim["combination"] == "veb-macvlan-socket"
        assert host.links() == before
        (relay,) = relays()
        namespace = os.open(f"/proc/{relay}/ns/net", os.O_RDONLY)
        assert inhabitants(namespace) == [relay]
        os.close(namespace)
        # A use of up0 that its claim accounts for.
        status = subprocess.run([VNET_LOCK, "status"], capture_output=True, text=True, check=False)
        assert status.returncode == 0, status.stdout + status.stderr
        process.terminate()
        process.wait(timeout=20)
        eventually(lambda: not is_running(relay))
    assert not host.claims()
    assert host.links() == before


def test_the_hosts_stack_never_answers_for_the_guest(host: Host, far: int, ip: Callable[[str], str]):
    """The guest's CPU stands still, so whatever came from its MAC would be the host's."""
    with host.running(IDLE) as process:
        eventually(lambda: active(host))
        with call_in(far, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))) as peer:
            peer.bind(("peer0", 3))
            call_in(far, lambda: ip(f"neighbour add {GUEST} lladdr {MAC} dev peer0"))
            call_in(far, lambda: ip("neighbour add 10.9.9.3 lladdr ff:ff:ff:ff:ff:ff dev peer0"))
            for words in (GUEST, "10.9.9.3", "-b 10.9.9.255", "10.9.9.77", "ff02::1%peer0"):
                line = ["ping", "-c2", "-W1", "-i0.2", *words.split()]
                call_in(far, lambda line=line: subprocess.run(line, capture_output=True, check=False))
            peer.settimeout(0.5)
            seen = set()
            with contextlib.suppress(TimeoutError):
                while True:
                    seen.add(peer.recv(2000)[6:12].hex(":"))
        assert MAC not in seen
        assert seen, "not even the peer's own"
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.parametrize("victim", ["qemu", "relay", "wrapper", "all"])
def test_whatever_is_killed_nothing_is_left(host: Host, victim: str):
    before = host.links()
    with host.running(IDLE) as process:
        eventually(lambda: active(host))
        (qemu,) = children_of(process.pid)
        pids = {"qemu": qemu, "relay": relays()[0], "wrapper": process.pid}
        relay = pids["relay"]
        killed = list(pids.values()) if victim == "all" else [pids[victim]]
        for pid in killed:
            os.kill(pid, signal.SIGSTOP)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        if victim == "relay":
            # The guest lives, and ends as it would have.
            eventually(lambda: not is_running(relay))
            assert is_running(qemu)
            status = subprocess.run([VNET_LOCK, "status"], capture_output=True, text=True, check=False)
            assert (
                f"has no network at its interface net0: the process that carried its packets (pid {relay})"
                in (" ".join(status.stdout.split()))
            ), status.stdout
            os.kill(qemu, signal.SIGTERM)
        elif victim == "wrapper":
            process.wait(timeout=20)
            assert is_running(qemu)
            assert is_running(relay)
            os.kill(qemu, signal.SIGKILL)
        process.wait(timeout=20)
        eventually(lambda: not is_running(relay) and not is_running(qemu))
    again = host.qemu(f"{IDLE} -monitor stdio", input="quit\n")
    assert (again.returncode, again.stderr) == (0, "")
    assert not host.claims()
    assert host.links() == before


def test_qemu_that_cannot_start_leaves_no_relay(host: Host):
    before = host.links()
    assert host.qemu(f"{IDLE} -device no-such-device").returncode == 1
    assert host.links() == before
    assert not host.claims()
    eventually(lambda: not relays())
