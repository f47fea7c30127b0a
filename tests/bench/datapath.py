"""Throughput and latency of every combination in one run, several of them in each guest.

    python -m tests.bench.datapath --json FILE         what runs in namespaces of this machine
    python -m tests.bench.datapath --lab --json FILE   what takes vhost-net or an SR-IOV NIC, in the lab VM
    python -m tests.bench.datapath --report FILE...    docs/datapath.md and its chart from such files

With --only WORD it is the combinations alone whose names have that word; of several files that have a row,
the last counts.

The guest opens every connection, so that one way of measuring serves all policies. An emulated CPU is slow,
and a machine may have other things to do: what counts is how the rows of one run compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.chart import write_chart
from tests.kernel.host import VNET_LOCK
from tests.lab.machines import Console, Guests
from tests.policies import IN_LAB, IN_NAMESPACES, VNET_QEMU, Case, Neighbour
from tests.wires import Outside, Wire, ip
from vnet_lock.combination import Combination

TOP = Path(__file__).resolve().parents[2]
HOST = 2  # the last part of the guest's addresses
SIZE_MB = 8
ROUND_TRIPS = 60
ROUNDS = 3
PORT = 7100
DEADLINE_S = 120
_MOST_IN_LAB = 4
_NO_CASE = "a guest with what is left"


@dataclass(frozen=True, slots=True)
class Measured:
    """One network: megabits a second (the best round), microseconds there and back (the median of all)."""

    name: str
    from_guest_mbps: float
    to_guest_mbps: float
    round_trip_us: float


def measure(name: str, console: Console, outside: Outside, wire: Wire) -> Measured:
    """One network of a guest, which has its address there already."""
    listener = outside.inside(lambda: socket.create_server(("0.0.0.0", PORT)))
    listener.settimeout(DEADLINE_S)
    with listener:
        peer = f"{wire.peer} {PORT}"
        bits = SIZE_MB * 8 * 1024 * 1024 / 1e6
        send = f"dd if=/dev/zero bs=64k count={SIZE_MB * 16} 2>/dev/null | nc {peer}"
        receive = f"nc {peer} </dev/null >/dev/null"
        up = [_timed(console, listener, send, _drain) for _ in range(ROUNDS)]
        down = [_timed(console, listener, receive, _fill) for _ in range(ROUNDS)]
        trips: list[float] = []
        _timed(console, listener, f"nc {peer} -e cat", lambda one: trips.extend(_echo(one)))
    made = Measured(name, bits / min(up), bits / min(down), statistics.median(trips) * 1e6)
    print(
        f"{name:34} {made.from_guest_mbps:8.0f} {made.to_guest_mbps:8.0f} Mbit/s"
        f" {made.round_trip_us:8.0f} us",
        flush=True,
    )
    return made


def _timed(
    console: Console, listener: socket.socket, command: str, serve: Callable[[socket.socket], object]
) -> float:
    """How long it takes from the guest's connection until the last byte has come."""
    # In the background there: the guest takes the next order at once, and the connection is ours to time.
    console.ask(f"run ({command}) >/dev/null 2>&1 &")
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(DEADLINE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        start = time.perf_counter()
        serve(connection)
        return time.perf_counter() - start


def _drain(connection: socket.socket) -> None:
    left = SIZE_MB << 20
    while left > 0:
        left -= len(chunk := connection.recv(1 << 20))
        assert chunk, f"{left} bytes are missing"


def _fill(connection: socket.socket) -> None:
    connection.sendall(bytes(SIZE_MB << 20))
    connection.shutdown(socket.SHUT_WR)
    # The guest ends when it has it all.
    while connection.recv(4096):
        pass


def _echo(connection: socket.socket) -> list[float]:
    found = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        found.append(time.perf_counter() - start)
    return found


@contextmanager
def running(cases: Sequence[Case], folder: Path, accel: str) -> Iterator[Neighbour]:
    """One guest with a network of each case."""
    guests = Guests(folder, accel=accel)
    with ExitStack() as stack:
        stack.callback(subprocess.run, [VNET_LOCK, "gc"], check=False, capture_output=True)
        for case in cases:
            case.open()
            stack.callback(case.close)
        stack.callback(guests.end)
        words = [word for case in cases for word in case.devices(HOST)]
        made = guests.qemu("guest", words, program=[VNET_QEMU], nics=len(cases))
        made.console.ready(600)
        neighbour = Neighbour(HOST, made)
        for case in cases:
            neighbour.configure(case)
        yield neighbour
        made.kill(signal.SIGTERM)
        made.wait(120)


def measure_all(cases: Sequence[Case], outside: Outside, accel: str) -> list[Measured]:
    """Each of these, one after the other.

    Nested guests now and then die: then another takes what is left. What fails twice is said and left out.
    """
    found: list[Measured] = []
    left, tried = [*cases], set[str]()
    while left:
        now = _NO_CASE
        try:
            with tempfile.TemporaryDirectory() as folder, running(left, Path(folder), accel) as guest:
                for case in tuple(left):
                    now = case.text
                    case.face(HOST)
                    found.append(measure(now, guest.console, outside, case.wire))
                    left.remove(case)
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            once_more = now not in tried
            print(f"{now}: {'once more' if once_more else 'not measured'}: {error}", file=sys.stderr)
            if not once_more:
                left = [case for case in left if case.text != now] if now != _NO_CASE else []
            tried.add(now)
    return found


def _named(combinations: Sequence[Combination], only: str) -> tuple[Combination, ...]:
    return tuple(one for one in combinations if only in one.text)


def in_namespaces(only: str) -> list[Measured]:
    """What this machine itself can do."""
    from tests.kernel.conftest import own_namespaces

    with own_namespaces():
        outside = Outside()
        outside.open()
        try:
            cases = [Case(one, Wire(number)) for number, one in enumerate(_named(IN_NAMESPACES, only))]
            return measure_all(cases, outside, "tcg")
        finally:
            outside.close()


def in_lab(only: str) -> list[Measured]:
    """What takes the lab VM, and libvirt's own interfaces beside all of it."""
    from tests.lab.nic import Nic
    from tests.lab.test_combinations import ON_WIRES
    from tests.lab.test_combinations_vf import GROUPS, far_end, vf_cases

    nic = Nic(os.environ["VNET_LAB_PF"])
    outside = Outside()
    outside.open()
    found: list[Measured] = []
    try:
        wired = [Case(one, Wire(number)) for number, one in enumerate(_named(ON_WIRES, only))]
        # A nested guest with a dozen vhosts stands still too often.
        for first in range(0, len(wired), _MOST_IN_LAB):
            found += measure_all(wired[first : first + _MOST_IN_LAB], outside, "kvm")
        if not only:
            found += libvirts_own(outside)
        with far_end(nic):
            for group in GROUPS:
                cases = vf_cases(nic, _named(group, only))
                found += measure_all([*cases.values()], outside, "kvm")
    finally:
        outside.close()
        nic.reset()
    return found


def libvirts_own(outside: Outside) -> list[Measured]:
    """A bridge and a macvtap as libvirt makes them, with vhost as it chooses."""
    bridge, wire = Wire(90), Wire(91)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for one in (bridge, wire):
            one.open()
            stack.callback(one.close)
        ip("link add br90 type bridge forward_delay 0")
        stack.callback(ip, "link delete br90")
        ip("link set br90 up")
        ip(f"link set {bridge.dev} master br90")
        interfaces = "".join(
            f"<interface type='{kind}'><mac address='52:54:00:09:{one.number:02x}:02'/>{source}"
            "<model type='virtio'/></interface>"
            for kind, source, one in (
                ("bridge", "<source bridge='br90'/>", bridge),
                ("direct", f"<source dev='{wire.dev}' mode='bridge'/>", wire),
            )
        )
        guests = Guests(Path(folder))
        stack.callback(guests.end)
        made = guests.libvirt("libvirts", interfaces, nics=2)
        made.console.ready(600)
        found = []
        for name, one in (("libvirt's bridge", bridge), ("libvirt's direct, bridge mode", wire)):
            mac = f"52:54:00:09:{one.number:02x}:02"
            nic = f"$(grep -l {mac} /sys/class/net/*/address | cut -d/ -f5)"
            made.console.ask(f"run ip address add {one.address(HOST)}/24 dev {nic}")
            found.append(measure(name, made.console, outside, one))
        return found


# --- what a person reads --------------------------------------------------------------------------


def machine() -> str:
    """What it ran on, in words."""
    model = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    qemu = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return f"{os.cpu_count()} CPUs ({model}), Linux {platform.release()}, {qemu.splitlines()[0]}"


_TEXT = """\
# Throughput and latency of every combination

Measured by `make bench-datapath`: guests with several networks each, TCP by busybox's nc, {size_mb} MB
each way (the best of {rounds} rounds), and the median of {trips} round trips of one byte.
Everything runs under emulation (TCG), so the figures say nothing of real hardware: what counts is how the
rows of one place compare. *lab* is a guest inside the lab VM, twice emulated. `vepa-sriov` can't be there
(the lab's NIC has no VEPA mode), nor `private-physdev` (its cable leads to no server).
{missing}
{hosts}

![chart](datapath.svg)

| combination | place | from the guest, Mbit/s | to the guest, Mbit/s | round trip, us |
|---|---|---:|---:|---:|
"""


def report(files: Sequence[Path], folder: Path) -> None:
    """A table and a chart from what runs left."""
    runs = [json.loads(path.read_text()) for path in files]
    places = {row["name"]: run["where"] for run in runs for row in run["rows"]}
    found = {row["name"]: Measured(**row) for run in runs for row in run["rows"]}
    order = {one.text: number for number, one in enumerate((*IN_NAMESPACES, *IN_LAB))}
    rows = sorted(found.values(), key=lambda row: order.get(row.name, len(order)))
    hosts = [f"- *{run['where']}*: {run['machine']}, load {run['load']:.1f}, {run['date']}" for run in runs]
    table = [
        f"| {row.name} | {places[row.name]} | {row.from_guest_mbps:.0f} | {row.to_guest_mbps:.0f} |"
        f" {row.round_trip_us:.0f} |"
        for row in rows
    ]
    names = {row.name for row in rows}
    cannot = tuple(one for one in IN_LAB if one.text.startswith(("vepa-sriov", "private-physdev")))
    missing = ", ".join(
        f"`{one.text}`" for one in (*IN_NAMESPACES, *IN_LAB) if one.text not in names and one not in cannot
    )
    text = _TEXT.format(
        missing=f"Not measured in these runs: {missing}.\n" if missing else "",
        size_mb=SIZE_MB,
        rounds=ROUNDS,
        trips=ROUND_TRIPS,
        hosts="\n".join(hosts),
    )
    folder.mkdir(exist_ok=True)
    (folder / "datapath.md").write_text(text + "\n".join(table) + "\n")
    write_chart(
        folder / "datapath.svg",
        "Mbit/s by TCP",
        [(f"{row.name} ({places[row.name]})", row.from_guest_mbps, row.to_guest_mbps) for row in rows],
    )


def main() -> int:
    """Measure, or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lab", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args()
    if options.report:
        report(options.report, TOP / "docs")
        return 0
    rows = (in_lab if options.lab else in_namespaces)(options.only)
    if options.json:
        told = {
            "where": " ".join(("lab" if options.lab else "namespaces", options.only)).strip(),
            "machine": machine(),
            "load": os.getloadavg()[0],
            "date": time.strftime("%Y-%m-%d"),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(told))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
