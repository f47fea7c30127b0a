"""Two hosts in namespaces, each with a libvirtd of its own, on one wire: guests move between them.

They share the kernel and /dev, so their guests have taps, whose names are a namespace's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_MAKE = r"""
set -e
mkdir -p $1/run/libvirt
for directory in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
    mount -t tmpfs -o mode=755 host $directory
    mkdir $directory/qemu
done
mkdir /etc/libvirt/hooks
cat >/etc/libvirt/qemu.conf <<EOF
security_driver = "none"
user = "root"
group = "root"
cgroup_controllers = []
namespaces = []
EOF
cat >/etc/libvirt/libvirtd.conf <<EOF
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "$3"
EOF
: >/etc/libvirt/virtlogd.conf
mount -t sysfs host /sys
mount --bind $1/run /run
hostname $2
ip link set lo up
echo made
exec sleep infinity
"""


@dataclass(frozen=True, slots=True)
class Host:
    """One of the two: a process whose namespaces it is, and the directory that has its /run."""

    pid: int
    root: Path

    @property
    def uri(self) -> str:
        """libvirt's URI of its daemon, from wherever its directory is seen."""
        return f"qemu+unix:///system?socket={self.root}/run/libvirt/libvirt-sock"

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command on this host; with ``check`` it has to succeed."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-n", "-u", "--"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            [*enter, *argv], capture_output=True, text=True, timeout=120, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, "PATH": path},
        )  # fmt: skip
        said = done.stderr.strip() or done.stdout.strip()
        assert not check or done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}: {said}"
        return done

    def virsh(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A virsh command on this host's daemon."""
        return self.run("virsh", "-q", "-c", "qemu:///system", *words, check=check)

    def state(self, guest: str) -> str:
        """As ``virsh domstate`` names it; empty when it isn't known."""
        return self.virsh("domstate", guest, check=False).stdout.strip()

    def is_up(self, link: str) -> bool | None:
        """Whether a link is up; None where there is none."""
        done = self.run("ip", "-o", "link", "show", "dev", link, check=False)
        return "UP" in done.stdout.partition("<")[2].partition(">")[0].split(",") if done.stdout else None

    @property
    def claims(self) -> list[str]:
        """The names of the claims' records."""
        with suppress(FileNotFoundError):
            return sorted(os.listdir(self.root / "run/vnet-lock/claims"))
        return []


class Pings:
    """A ping, five times a second, from where the test is."""

    def __init__(self, address: str, log: Path) -> None:
        self._log = log
        with log.open("wb") as sink:
            self._process = subprocess.Popen(["ping", "-i", "0.2", address], stdout=sink, stderr=sink)

    @property
    def answered(self) -> list[int]:
        """The numbers of those that were answered so far."""
        lines = self._log.read_text(errors="replace").split("\n")[:-1]
        return sorted(
            {int(line.partition("icmp_seq=")[2].split()[0]) for line in lines if "bytes from" in line}
        )

    def wait_for_more(self, count: int) -> None:
        """Until this many more were answered."""
        wanted = len(self.answered) + count
        wait_until(lambda: len(self.answered) >= wanted, f"{count} more pings are answered")

    def end(self) -> str:
        """End it, and tell what was lost."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(20)
        seen = self.answered
        lost = seen[-1] - seen[0] + 1 - len(seen)
        most = max(after - before - 1 for before, after in pairwise(seen))
        return f"{lost} of {len(seen) + lost} pings lost, {most * 0.2:.1f} s in a row at most"


@contextmanager
def two_hosts(root: Path) -> Iterator[tuple[Host, Host]]:
    """The hosts, each with a bridge ``br0`` that is on the wire, a line between them, and the hook."""
    with ExitStack() as undo:
        hosts = tuple(_make(root / name, name, number, undo) for number, name in enumerate(("one", "two")))
        first, second = hosts
        _run("ip link add name wire0 type bridge")
        _run("ip link set wire0 up")
        for number, host in enumerate(hosts):
            _run(f"ip link add name port{number} type veth peer name up0 netns {host.pid}")
            _run(f"ip link set port{number} master wire0 up")
            for words in ("add name br0 type bridge", "set up0 master br0 up", "set br0 up"):
                host.run("ip", "link", *words.split())
        first.run(
            "ip", "link", "add", "line0", "type", "veth", "peer", "name", "line0", "netns", str(second.pid)
        )
        for number, host in enumerate(hosts):
            host.run("ip", "address", "add", f"10.98.0.{number + 1}/24", "dev", "line0")
            host.run("ip", "link", "set", "line0", "up")
            host.run("vnet-lock", "hooks", "install")
            for daemon in ("virtlogd", "libvirtd"):
                host.run(daemon, "-d")
                undo.callback(_end_daemon, host.root / f"run/{daemon}.pid")
            wait_until(
                lambda host=host: host.virsh("version", check=False).returncode == 0, "libvirtd answers"
            )
        yield first, second


def wait_until(is_so: Callable[[], object], what: str, deadline_s: float = 120) -> None:
    """Wait for a state; AssertionError says which one didn't come."""
    end = time.monotonic() + deadline_s
    while not is_so():
        assert time.monotonic() < end, f"not so after {deadline_s:.0f} s: {what}"
        time.sleep(0.1)


def _make(root: Path, name: str, number: int, undo: ExitStack) -> Host:
    for directory in ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"):
        assert Path(directory).is_dir(), f"there is no {directory}: make setup installs libvirt"
    words = ["unshare", "--mount", "--net", "--uts", "--propagation", "private"]
    uuid = f"5ec05ec0-0000-4000-8000-00000000000{number + 1}"
    holder = subprocess.Popen(
        [*words, "sh", "-c", _MAKE, "sh", str(root), name, uuid], stdout=subprocess.PIPE
    )
    undo.callback(holder.wait)
    undo.callback(holder.kill)
    assert holder.stdout
    with holder.stdout as said:
        assert said.readline() == b"made\n"
    return Host(holder.pid, root)


def _run(words: str) -> None:
    subprocess.run(words.split(), check=True, timeout=60)


def _end_daemon(pid_file: Path) -> None:
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"{pid_file.stem} is gone")
