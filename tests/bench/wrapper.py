"""What vnet-qemu takes of the host while its guest runs. Needs root, QEMU and macvtap; has own namespaces."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.row import Row
from tests.kernel.conftest import own_namespaces

RESIDENT_MB = 25.0
WATCHED_S = 5.0
# No CPU: not even the time of one wake-up in a second.
IDLE_SHARE = 1e-5
QEMU = "qemu-system-x86_64 -accel tcg -M q35 -m 32 -display none -S"
NET = "-netdev host,id=net0,mode=vepa,dev=up0 -device virtio-net-pci,netdev=net0"


def rows() -> tuple[Row, ...]:
    """Memory in MB and CPU time in seconds, each against what it may be."""
    with own_namespaces():
        for words in ("link add up0 type veth peer name peer0", "link set up0 up", "link set peer0 up"):
            subprocess.run(["ip", *words.split()], check=True)
        resident_mb, cpu_s = measure()
    return (
        Row("vnet-qemu while its guest runs: resident", resident_mb, RESIDENT_MB, 1, "MB"),
        Row(f"vnet-qemu while its guest runs: CPU in {WATCHED_S:.0f} s", cpu_s, WATCHED_S, IDLE_SHARE),
    )


def measure() -> tuple[float, float]:
    """Resident memory, and CPU time during WATCHED_S, of a vnet-qemu whose QEMU has started."""
    program = str(Path(sys.executable).with_name("vnet-qemu"))
    with subprocess.Popen([program, *QEMU.split(), *NET.split()], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_qemu(process.pid)
            before = read_cpu_s(process.pid)
            time.sleep(WATCHED_S)
            cpu_s = read_cpu_s(process.pid) - before
            status = Path(f"/proc/{process.pid}/status").read_text()
            return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024, cpu_s
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def wait_for_qemu(pid: int, timeout_s: float = 30.0) -> None:
    """Until the child has become QEMU, and that catches SIGTERM itself: its start is over then."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        status = Path(f"/proc/{children[0]}/status").read_text() if children else ""
        caught = re.search(r"SigCgt:\s+(\w+)", status)
        is_qemu = status.startswith("Name:\tqemu-system")
        if is_qemu and caught and int(caught[1], 16) & 1 << (signal.SIGTERM - 1):
            return
        time.sleep(0.05)
    raise TimeoutError("QEMU did not start")


def read_cpu_s(pid: int) -> float:
    """Time on a CPU so far, to the nanosecond (Documentation/scheduler/sched-stats.rst)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


if __name__ == "__main__":
    for row in rows():
        print(f"{row.what:60} {row.measured_s:10.6f} of {row.floor_s * row.limit_ratio:g}", row.is_met)
    sys.exit(os.EX_OK)
