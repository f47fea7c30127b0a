"""A second host in the lab VM: its own libvirtd, directories, network namespace and SR-IOV NIC.

It shares the kernel with the first. What that leaves out: the PCI devices of both share one /sys/bus/pci (the
other's have no network device here and are taken for in use), pids are common, and a VF whose driver is bound
anew comes up in the first host's namespace, from where it is carried over. What is real: two daemons that
know nothing of each other, two tables of claims, two NICs with embedded switches of their own on one cable,
and a third machine on it.

Nodes of macvtaps are named after numbers of devices, and both hosts have one /dev: the second has so few
devices that its numbers stay below those of the first.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.lab.nic import PCI, Function, run, settle, wait_until

# The line between the two hosts that migrations take.
LINE, FIRST_AT, SECOND_AT = "line0", "10.98.0.1", "10.98.0.2"
# The third machine on the NICs' cable.
THIRD, THIRD_AT = "third", "10.7.0.200"
_PFS = ("0000:01:00.0", "0000:03:00.0")
_MAKE = r"""
set -e
root=$1
mkdir -p $root/run/udev $root/run/libvirt $root/run/home $root/cgroup $root/capabilities
cp -a /etc/libvirt $root/etc
rm -rf $root/etc/hooks $root/etc/qemu
cp -a /var/cache/libvirt/qemu/capabilities/. $root/capabilities || :
for directory in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
    mount -t tmpfs -o mode=755 second $directory
    mkdir -p $directory/qemu
done
cp -a $root/etc/. /etc/libvirt
mkdir /etc/libvirt/hooks
cp -a $root/capabilities /var/cache/libvirt/qemu/capabilities
echo 'host_uuid = "5ec05ec0-0000-4000-8000-000000000002"' >>/etc/libvirt/libvirtd.conf
mount --rbind /sys/fs/cgroup $root/cgroup
mount -t sysfs second /sys
mount --rbind $root/cgroup /sys/fs/cgroup
mount --bind /run/udev $root/run/udev
mount --rbind $root/run /run
hostname second
ip link set lo up
echo made
exec sleep infinity
"""


@dataclass(frozen=True, slots=True)
class Host:
    """One of two hosts: how a command runs on it, how its daemon is reached, its /run, and its PF."""

    enter: tuple[str, ...]
    uri: str
    run_dir: str
    pf: str
    pci: str

    def run(
        self, *argv: str, check: bool = True, deadline_s: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """A command on this host; with ``check`` it has to succeed."""
        return _run((*self.enter, *argv), check, deadline_s)

    def virsh(
        self, *words: str, check: bool = True, deadline_s: float = 180
    ) -> subprocess.CompletedProcess[str]:
        """A virsh command on this host's daemon; with ``check`` it has to succeed."""
        return _run(("virsh", "-q", "-c", self.uri, *words), check, deadline_s)

    def vnet_lock(self, *words: str) -> subprocess.CompletedProcess[str]:
        """vnet-lock on this host, whatever its exit status."""
        return self.run("vnet-lock", *words, check=False)

    def state(self, guest: str) -> str:
        """As ``virsh domstate`` names it; empty when it isn't known."""
        return self.virsh("domstate", guest, check=False).stdout.strip()

    def states(self) -> list[str]:
        """The states of this host's VFs, as vnet-lock names them."""
        found = json.loads(self.vnet_lock("status", "--json", self.pf).stdout)
        return [vf["state"] for pf in found["pfs"] for vf in pf["vfs"]]

    @property
    def vfs(self) -> list[Function]:
        """The VFs in the order of their indexes."""
        device = PCI / "devices" / self.pci
        count = int((device / "sriov_numvfs").read_text())
        return [Function((device / f"virtfn{index}").readlink().name) for index in range(count)]

    @property
    def claims(self) -> list[str]:
        """The names of the claims' records."""
        with suppress(FileNotFoundError):
            return sorted(os.listdir(f"{self.run_dir}/vnet-lock/claims"))
        return []

    def link(self, name: str) -> dict[str, object]:
        """What ip says of a network device; nothing where there is none."""
        done = self.run("ip", "-j", "link", "show", "dev", name, check=False)
        return dict(json.loads(done.stdout)[0]) if done.returncode == 0 else {}

    def looks(self) -> list[dict[str, object]]:
        """Everything of the VFs that a guest changes, and libvirt or vnet-lock has to put back."""
        admin = json.loads(self.run("ip", "-j", "link", "show", "dev", self.pf).stdout)[0]["vfinfo_list"]
        names = [self._netdev(vf) for vf in self.vfs]
        found = [{key: self.link(name).get(key) for key in ("ifname", "address", "flags")} for name in names]
        return [{**own, **pf} for own, pf in zip(found, admin, strict=True)]

    def _netdev(self, vf: Function) -> str:
        """A VF's network device, where it is on this host."""
        path = f"/sys/bus/pci/devices/{vf.pci}/net"
        return self.run("ls", path, check=False).stdout.strip()

    def has_netdevs(self) -> bool:
        """Whether all VFs have their network devices on this host, under their names."""
        return all(self._netdev(vf).startswith(self.pf) for vf in self.vfs)


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """The VM's own host and the second one."""

    first: Host
    second: Host

    def set_numvfs(self, count: int) -> None:
        """Give each host fresh VFs."""
        for host in (self.first, self.second):
            path = PCI / "devices" / host.pci / "sriov_numvfs"
            path.write_text("0")
            path.write_text(str(count))
            wait_until(host.has_netdevs, f"{host.pf} has its VFs")
        settle()


class Pings:
    """A ping, five times a second, while something else happens: from a host, or from the third machine."""

    def __init__(self, address: str, log: Path, host: Host | None = None) -> None:
        self._log = log
        enter = host.enter if host else ("ip", "netns", "exec", THIRD)
        argv = [*enter, "ping", "-D", "-i", "0.2", address]
        with log.open("wb") as sink:
            self._process = subprocess.Popen(argv, stdout=sink, stderr=subprocess.STDOUT)

    @property
    def answered(self) -> list[int]:
        """The numbers of those that were answered so far."""
        lines = self._log.read_text(errors="replace").split("\n")[:-1]
        found = [line for line in lines if "bytes from" in line and "DUP" not in line]
        return sorted({int(line.partition("icmp_seq=")[2].split()[0]) for line in found})

    def wait_for_more(self, count: int) -> None:
        """Until this many more were answered."""
        wanted = len(self.answered) + count
        wait_until(lambda: len(self.answered) >= wanted, f"{count} more pings are answered", 120)

    def end(self) -> str:
        """End it, and tell what was lost."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(20)
        seen = self.answered
        lost = seen[-1] - seen[0] + 1 - len(seen) if seen else 0
        most = max((after - before - 1 for before, after in pairwise(seen)), default=0)
        return f"{lost} of {len(seen) + lost} pings lost, {most * 0.2:.1f} s in a row at most"


@contextmanager
def two_hosts(root: Path, results: Path) -> Iterator[TwoHosts]:
    """Make the second host below ``root``, which both see, and take it away again."""
    pfs = [os.listdir(PCI / "devices" / pci / "net")[0] for pci in _PFS]
    with ExitStack() as undo:
        holder = _hold(root, results)
        undo.callback(_end, holder)
        undo.callback(settle)
        _add_third(undo)
        second = Host(
            ("nsenter", "-t", str(holder.pid), "-m", "-n", "-u", "--"),
            f"qemu+unix:///system?socket={root}/run/libvirt/libvirt-sock", f"{root}/run", pfs[1], _PFS[1],
        )  # fmt: skip
        hosts = TwoHosts(Host((), "qemu:///system", "/run", pfs[0], _PFS[0]), second)
        _add_line(hosts, holder.pid)
        undo.callback(run, "ip", "link", "delete", LINE)
        run("ip", "link", "set", second.pf, "netns", str(holder.pid))
        undo.callback(second.run, "ip", "link", "set", second.pf, "netns", "1")
        second.run("ip", "link", "set", second.pf, "up")
        carrier = ("cat", f"/sys/class/net/{second.pf}/carrier")
        wait_until(lambda: second.run(*carrier, check=False).stdout == "1\n", f"{second.pf} has a link")
        undo.callback((PCI / "devices" / second.pci / "sriov_numvfs").write_text, "0")
        undo.enter_context(_carrying(second, holder.pid))
        undo.callback(_keep_log, second, results)
        for name in ("virtlogd", "libvirtd"):
            second.run(name, "-d")
            undo.callback(_end_daemon, Path(f"{root}/run/{name}.pid"))
        wait_until(lambda: second.virsh("version", check=False).returncode == 0, "its libvirtd answers", 180)
        for host in (hosts.first, second):
            host.run("vnet-lock", "hooks", "install")
            undo.callback(host.run, "vnet-lock", "hooks", "remove")
            os.kill(int(Path(f"{host.run_dir}/libvirtd.pid").read_text()), signal.SIGHUP)
        yield hosts


def _run(argv: tuple[str, ...], check: bool, deadline_s: float) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=deadline_s, check=False)
    said = done.stderr.strip() or done.stdout.strip()
    assert not check or done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}: {said}"
    return done


def _hold(root: Path, results: Path) -> subprocess.Popen[bytes]:
    """The process whose namespaces the second host is."""
    words = ["unshare", "--mount", "--net", "--uts", "--propagation", "private"]
    argv = [*words, "sh", "-c", _MAKE, "sh", str(root)]
    with (results / "second.err").open("wb") as complaints:
        holder = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=complaints)
    assert holder.stdout
    made = holder.stdout.readline() == b"made\n"
    assert made, f"no second host: {(results / 'second.err').read_text()}"
    return holder


def _add_third(undo: ExitStack) -> None:
    drivers = {
        path.parts[-3]: path.readlink().name for path in Path("/sys/class/net").glob("*/device/driver")
    }
    netdev = next(name for name, driver in drivers.items() if driver == "virtio_net")
    run("ip", "netns", "add", THIRD)
    undo.callback(run, "ip", "netns", "delete", THIRD)
    run("ip", "link", "set", netdev, "netns", THIRD)
    run("ip", "-n", THIRD, "address", "add", f"{THIRD_AT}/24", "dev", netdev)
    run("ip", "-n", THIRD, "link", "set", netdev, "up")


def _add_line(hosts: TwoHosts, pid: int) -> None:
    run("ip", "link", "add", LINE, "type", "veth", "peer", "name", LINE, "netns", str(pid))
    for host, address in ((hosts.first, FIRST_AT), (hosts.second, SECOND_AT)):
        host.run("ip", "address", "add", f"{address}/24", "dev", LINE)
        host.run("ip", "link", "set", LINE, "up")


@contextmanager
def _carrying(host: Host, pid: int) -> Iterator[None]:
    """Carry over the network devices of the host's VFs that come up elsewhere, once udev has named them."""
    ended = threading.Event()

    def carry() -> None:
        while not ended.wait(0.05):
            for netdev in os.listdir("/sys/class/net"):
                try:
                    home = os.readlink(f"/sys/class/net/{netdev}/device/physfn")
                except OSError:
                    continue  # no VF's, or gone meanwhile
                if home.endswith(host.pci) and netdev.startswith(host.pf):
                    argv = ["ip", "link", "set", netdev, "netns", str(pid)]
                    subprocess.run(argv, capture_output=True, check=False)

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _keep_log(host: Host, results: Path) -> None:
    log = host.run("cat", "/var/log/libvirt/libvirtd.log", check=False).stdout
    (results / "second-libvirtd.log").write_text(log)


def _end_daemon(pid_file: Path) -> None:
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"{pid_file.stem} is gone")


def _end(holder: subprocess.Popen[bytes]) -> None:
    with holder:  # which closes what is read of it, and waits for its end
        holder.kill()
