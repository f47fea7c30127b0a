"""The host that tests of whole commands run on: their namespaces, with our programs in them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

VNET_LOCK, VNET_QEMU, HELPER = (
    str(Path(sys.executable).with_name(name)) for name in ("vnet-lock", "vnet-qemu", "qemu-net-helper")
)
RUN = Path("/run/vnet-lock")
# What stays in it: locks, the directory of the claims, and room for one more.
STAYING = (".spare", "claims", "guard", "hooks.lock", "host.lock", "reap.lock", "watch.lock")
LINKS = ["br0", "lo", "peer0", "up0", "v0", "v1"]
# A machine that does nothing: its CPU is stopped, so it costs no time of the host's.
QEMU = "qemu-system-x86_64 -accel tcg -M q35 -m 32 -display none -S"
NET = "-netdev host,id=net0,mode=vepa,dev=up0"
NIC = "-device virtio-net-pci,netdev=net0"
MAC = "52:54:00:00:00:01"

T = TypeVar("T")
Running = contextlib.AbstractContextManager[subprocess.Popen[str]]


class Host:
    """The test's namespaces, with a veth pair up0-peer0, a bridge br0 and a /run of its own."""

    def qemu(self, line: str, **more) -> subprocess.CompletedProcess[str]:
        """A vnet-qemu that ends by itself."""
        words = [VNET_QEMU, *shlex.split(line)]
        more = {"capture_output": True, "timeout": 60, **more}
        return subprocess.run(words, text=True, check=False, **more)

    def running(self, line: str) -> Running:
        """A vnet-qemu in the background, killed with its QEMU at the end."""
        return started([VNET_QEMU, *shlex.split(line)])

    def claims(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in RUN.glob("claims/*.json")]

    def links(self) -> list[str]:
        return sorted(os.listdir("/sys/class/net"))

    def macvtaps(self) -> list[dict]:
        return json.loads(subprocess.check_output(["ip", "-j", "-d", "link", "show", "type", "macvtap"]))

    def is_clean(self) -> bool:
        """Nothing claimed, nothing made, nothing left in /run but what stays."""
        left = {path.name for path in RUN.glob("*")}
        return not self.claims() and self.links() == LINKS and left <= {*STAYING}

    def helper(self, line: str, end: socket.socket | None = None, **more) -> subprocess.CompletedProcess[str]:
        """The helper; FD in the line is the number of ``end``."""
        with self.helping(line, end, **more) as process:
            out, err = process.communicate(timeout=60)
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def helping(self, line: str, end: socket.socket | None = None, **more) -> Running:
        words = [HELPER, *(line.replace("FD", str(end.fileno())) if end else line).split()]
        return started(words, pass_fds=[end.fileno()] if end else [], **more)

    def gc(self) -> None:
        subprocess.run([VNET_LOCK, "gc"], check=True, capture_output=True)

    def plain_qemu(self, *nets: str, monitor: str) -> Running:
        """A QEMU that knows nothing of us but the helper's command line."""
        words = [*QEMU.split(), "-monitor", f"unix:{monitor},server=on,wait=off"]
        for number, net in enumerate(nets):
            words += ["-netdev", net, "-device", f"virtio-net-pci,netdev=n{number}"]
        return started(words)


@contextlib.contextmanager
def started(words: list[str], **more) -> Iterator[subprocess.Popen[str]]:
    """A program in the background, killed with its children at the end."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes, **more) as process:
        try:
            yield process
        finally:
            for pid in children_of(process.pid) if process.poll() is None else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()


def children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def has_open(pid: int, target: Path) -> bool:
    """Whether a process has a file open."""
    try:
        return any(os.readlink(path) == str(target) for path in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return False


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(find: Callable[[], T], timeout_s: float = 20.0) -> T:
    """What ``find`` finds, once it finds something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := find():
            return found
        time.sleep(0.02)
    raise AssertionError("it never happened")
