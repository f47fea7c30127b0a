"""TCP through the relay beside QEMU's own user network: one guest with both, in turn, in one run.

Needs root, QEMU, and the guest's image. The peer is a process in a network namespace at a wire's other end;
for the user network, on this namespace's loopback device.
"""

from __future__ import annotations

import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.row import Row
from tests.kernel.conftest import own_namespaces
from tests.lab import guest
from tests.lab.machines import Console
from vnet_lock.kernel.netns import call_in, make_namespace
from vnet_lock.settings import DEFAULT

# What a guest under emulation takes some seconds for.
TO_GUEST_MB, FROM_GUEST_MB = 96, 24
ROUNDS = 5
MACHINE = (
    "qemu-system-x86_64 -accel tcg,thread=multi -cpu max -M q35 -m 192 -nodefaults -display none -no-reboot"
)
PEER, LOOPBACK = "10.9.9.1", "127.0.0.1"
# What the guest calls them.
AT = {"socket": PEER, "user": "10.0.2.2"}
NICS = "-netdev host,id=net0,mode=veb,dev=up0,protocols=socket -device virtio-net-pci,netdev=net0,mac={mac}"
USER = "-netdev user,id=net1 -device virtio-net-pci,netdev=net1"


def rows() -> tuple[Row, ...]:
    """The time that the same bytes take each way, as the middle of some rounds."""
    with own_namespaces(), tempfile.TemporaryDirectory() as folder:
        far = make_namespace(DEFAULT)
        run("ip link add up0 type veth peer name peer0")
        run(f"ip link set peer0 netns /proc/{os.getpid()}/fd/{far}")
        for words in ("lo up", "up0 up"):
            run(f"ip link set {words}")
        for words in ("link set peer0 up", f"address add {PEER}/24 dev peer0"):
            call_in(far, lambda words=words: run(f"ip {words}"))
        listeners = {
            "socket": call_in(far, lambda: socket.create_server((PEER, 5001))),
            "user": socket.create_server((LOOPBACK, 5001)),
        }
        with running_guest(Path(folder)) as console:
            all_s: dict[tuple[str, str], list[float]] = {}
            for _ in range(ROUNDS):
                for name, listener in listeners.items():
                    for way, measure in (("to the guest", to_guest), ("from the guest", from_guest)):
                        took = measure(console, listener, AT[name])
                        print(f"{name:8} {way:15} {took:.2f} s", file=sys.stderr)
                        all_s.setdefault((name, way), []).append(took)
    middle = {of: statistics.median(times) for of, times in all_s.items()}
    return tuple(
        Row(f"{size} MB by TCP {way}: socket, beside user", middle["socket", way], middle["user", way], 1)
        for way, size in (("to the guest", TO_GUEST_MB), ("from the guest", FROM_GUEST_MB))
    )


def to_guest(console: Console, listener: socket.socket, address: str) -> float:
    """How long the guest takes to have it all."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(bytes(TO_GUEST_MB << 20))

    return timed(console, listener, f"nc {address} 5001 </dev/null >/dev/null", serve)


def from_guest(console: Console, listener: socket.socket, address: str) -> float:
    """How long until the peer has it all."""

    def serve(connection: socket.socket) -> None:
        left = FROM_GUEST_MB << 20
        while left:
            chunk = connection.recv(1 << 20)
            assert chunk, "the guest's end came early"
            left -= len(chunk)

    command = f"dd if=/dev/zero bs=64k count={FROM_GUEST_MB * 16} 2>/dev/null | nc {address} 5001 >/dev/null"
    return timed(console, listener, command, serve)


def timed(
    console: Console, listener: socket.socket, command: str, serve: Callable[[socket.socket], None]
) -> float:
    """Seconds from the guest's connection to the end of its command, or of what is served."""
    ends: list[float] = []

    def accept() -> None:
        connection, _ = listener.accept()
        with connection:
            ends.append(time.monotonic())
            serve(connection)
            ends.append(time.monotonic())

    thread = threading.Thread(target=accept)
    thread.start()
    console.ask(f"run {command}", 300)
    end = time.monotonic()
    thread.join()
    return (ends[1] if "dd" in command else end) - ends[0]


@contextmanager
def running_guest(folder: Path) -> Iterator[Console]:
    """One with both networks."""
    image, console = guest.build(), Console(folder / "guest.log")
    words = guest.kernel_words(ip="10.9.9.2/24,10.0.2.15/24", nics=2)
    serial = f"-chardev socket,id=c,path={folder}/guest.sock,server=on,wait=off,logfile={folder}/guest.log"
    boot = f"-kernel {image.kernel} -initrd {image.initrd} -append '{words}' -serial chardev:c"
    nics = f"{NICS.format(mac='52:54:00:00:00:07')} {USER}"
    program = str(Path(sys.executable).with_name("vnet-qemu"))
    with subprocess.Popen([program, *shlex.split(f"{MACHINE} {serial} {boot} {nics}")]) as process:
        try:
            console.is_alive = lambda: process.poll() is None
            console.ready()
            yield console
        finally:
            process.terminate()
            process.wait(timeout=30)


def run(line: str) -> None:
    """A command that has to succeed."""
    subprocess.run(line.split(), check=True)


if __name__ == "__main__":
    for row in rows():
        print(f"{row.what:50} {row.measured:6.2f} s {row.floor:6.2f} s {row.ratio:6.2f} {row.is_met}")
    sys.exit(os.EX_OK)
