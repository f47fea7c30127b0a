"""socket+vhost beside tap+vhost, two guests on one device in one run: a table of what each unit takes.

    python -m tests.lab.vm --cpus 2 --deadline 2400 -- python -u -m tests.lab.bench_vhost_user

The guests take turns, several times, and the middle of their results counts: ratios are what it is for.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.row import Row
from tests.bench.run import quantity
from tests.lab.machines import Guests, PlainGuest
from tests.lab.nic import run
from tests.lab.wire import ADDRESS, PEER, Wire

ROUNDS = 5
BYTES = 4 << 20
PACKETS = 40_000
# 0.7 of the floor's speed at least: what one unit takes may be this much longer.
LIMIT = 1 / 0.7
BACKENDS = {"tap+vhost": "10.9.0.2", "socket+vhost": "10.9.0.3"}


@dataclass(slots=True)
class Side:
    """One of the two guests."""

    guest: PlainGuest
    wire: Wire
    address: str
    mac: str
    _lines: int = 0

    def tell(self, command: str) -> str:
        """What a command in the guest prints, as one line; not more than 200 bytes.

        Nobody reads the console's socket, and what doesn't fit into it stops the guest's output.
        """
        self._lines += 1
        mark = f"VNET-GUEST told={self._lines}"
        self.guest.console.ask(f'run echo "{mark} $({command} | tr "\\n" " ")"', deadline_s=300)
        return next(line for line in self.guest.console.text.splitlines() if line.startswith(f"{mark} "))

    def do(self, command: str) -> None:
        """A command in the guest that has to succeed."""
        assert self.guest.console.ask(f"run {command}", deadline_s=300)["exit"] == "0", command

    def send_bytes(self) -> float:
        """Seconds that a GB takes from the guest."""
        transfer = self.wire.receive()
        self.do(f"dd if=/dev/zero bs=64k count={BYTES >> 16} 2>/dev/null | nc {ADDRESS} 5000")
        assert transfer.sum
        assert transfer.size == BYTES
        return transfer.seconds * 1e9 / BYTES

    def receive_bytes(self) -> float:
        """Seconds that a GB takes to the guest."""
        transfer = self.wire.send(bytes(BYTES))
        self.do(f"nc {ADDRESS} 5001 </dev/null >/dev/null")
        transfer.wait()
        return transfer.seconds * 1e9 / BYTES

    def send_packets(self) -> float:
        """Seconds that a packet takes from the guest, of those that came to the peer."""
        before = self._count_at_peer()
        self.do(f"echo 'count {PACKETS}' >/proc/net/pktgen/eth0; echo start >/proc/net/pktgen/pgctrl")
        told = self.tell("grep -o 'OK: [0-9]*' /proc/net/pktgen/eth0")
        found = re.search(r"OK: (\d+)", told)
        assert found, told
        time.sleep(1)
        return int(found[1]) * 1e-6 / (self._count_at_peer() - before)

    def receive_packets(self) -> float:
        """Seconds that a packet takes to the guest, of those that its driver counts while more come."""
        folder = Path("/proc/thread-self/net/pktgen")

        def generate() -> None:
            for word in (f"dst_mac {self.mac}", "count 0"):
                folder.joinpath(PEER).write_text(f"{word}\n")
            folder.joinpath("pgctrl").write_text("start\n")

        generator = threading.Thread(target=lambda: self.wire.inside(generate))
        generator.start()
        try:
            counter = "/sys/class/net/eth0/statistics/rx_packets"
            told = self.tell(f"sleep 1; read -r a <{counter}; sleep 3; read -r b <{counter}; echo $((b - a))")
        finally:
            self.wire.inside(lambda: folder.joinpath("pgctrl").write_text("stop\n"))
            generator.join()
        return 3 / int(told.split()[2])

    def _count_at_peer(self) -> int:
        text = self.wire.inside(lambda: Path("/proc/thread-self/net/dev").read_text())
        return int(next(line.split()[2] for line in text.splitlines() if PEER in line))


def start(guests: Guests, wire: Wire, backend: str) -> Side:
    """A guest on the wire, with packet generators at both ends."""
    address = BACKENDS[backend]
    protocols = backend.replace("+", ":")
    made = guests.qemu(
        backend.partition("+")[0],
        [
            "-netdev", f"host,id=net0,mode=veb,port=macvlan,dev=up0,protocols={protocols}",
            "-device", "virtio-net-pci,netdev=net0,romfile=",
        ],
        program=["vnet-qemu", "qemu-system-x86_64"], ip=f"{address}/24", ping=ADDRESS,
    )  # fmt: skip
    seen = made.console.ready(600)
    assert seen["ping"] == "3/3", made.said
    assert run("vnet-lock", "status").stdout.count(f"veb-macvlan-{backend} "), made.said
    side = Side(made, wire, address, seen["mac"])
    side.do("insmod /modules/pktgen.ko; echo add_device eth0 >/proc/net/pktgen/kpktgend_0")
    for word in ("pkt_size 60", "clone_skb 0", "delay 0", f"dst {ADDRESS}", f"dst_mac {wire.mac}"):
        side.do(f"echo '{word}' >/proc/net/pktgen/eth0")
    return side


def prepare_peer(wire: Wire) -> None:
    """The packet generator at the peer's end."""
    run("modprobe", "pktgen")

    def configure() -> None:
        folder = Path("/proc/thread-self/net/pktgen")
        folder.joinpath("kpktgend_0").write_text(f"add_device {PEER}\n")
        for word in ("pkt_size 60", "clone_skb 0", "delay 0", "dst 10.9.0.9"):
            folder.joinpath(PEER).write_text(f"{word}\n")

    wire.inside(configure)


def user_seconds() -> float:
    """What our back-end's processes spent outside of the kernel so far."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"vnet_lock.datapath.vhost_user" in (path / "cmdline").read_bytes():
                ticks += int((path / "stat").read_text().rpartition(")")[2].split()[11])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


MEASURES: tuple[tuple[str, str, Callable[[Side], float]], ...] = (
    ("TCP from the guest", "s/GB", Side.send_bytes),
    ("TCP to the guest", "s/GB", Side.receive_bytes),
    ("small packets from the guest", "us/packet", Side.send_packets),
    ("small packets to the guest", "us/packet", Side.receive_packets),
)


def rows(sides: dict[str, Side]) -> list[Row]:
    """All that is measured."""
    made = []
    began, spent = time.monotonic(), user_seconds()
    for what, unit, measure in MEASURES:
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, side in sides.items():
                taken[name].append(measure(side))
        factor = 1e6 if unit.startswith("us") else 1
        tap, ours = (statistics.median(taken[name]) * factor for name in BACKENDS)
        print(f"{what}: {taken}", file=sys.stderr, flush=True)
        made.append(Row(f"socket+vhost beside tap+vhost: {what}", ours, tap, LIMIT, unit))
    wall = time.monotonic() - began
    made.append(
        Row("our process outside of the kernel, of the time measured", user_seconds() - spent, wall, 0.001)
    )
    return made


def main() -> int:
    """Measure and print."""
    wire = Wire()
    guests = Guests(Path(tempfile.mkdtemp()))
    try:
        prepare_peer(wire)
        table = rows({name: start(guests, wire, name) for name in BACKENDS})
    finally:
        guests.end()
        wire.close()
    for row in table:
        measured, floor = quantity(row.measured, row.unit), quantity(row.floor, row.unit)
        print(f"{row.what:66} {measured:>16} {floor:>16} {row.ratio:8.3f} {row.limit_ratio:8.3f}")
    return 0 if all(row.is_met for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
