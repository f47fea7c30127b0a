"""libvirt's own daemon in namespaces of its own: what its networks, scripts and events make of claims.

Guests are QEMUs that boot nothing; a device that is to be unplugged would need their help.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.conftest import need
from vnet_lock.administration import Administration
from vnet_lock.errors import VnetLockError
from vnet_lock.front import companion
from vnet_lock.front.libvirt_guest import address_words, read_owner
from vnet_lock.kernel.processes import is_alive
from vnet_lock.model import Mode, PciAddress, Process, Resource
from vnet_lock.settings import DEFAULT

if TYPE_CHECKING:
    from vnet_lock.front.libvirt_client.domain import Domain

pytestmark = pytest.mark.timeout(400)

PF, VFS = "0000:01:00.0", ("0000:01:10.0", "0000:01:10.2")
CLAIMS = Path("/run/vnet-lock/claims")
PIDS = Path("/run/libvirt/qemu")
# libvirtd 11.3 sometimes waits for its node device driver's udev thread, which waits for ever (gdb says),
# and gives itself up after 30 s.
ENDS_IN_S = 60


def until(is_so: Callable[[], object], what: str, deadline_s: float = 60) -> None:
    end = time.monotonic() + deadline_s
    while not is_so():
        assert time.monotonic() < end, f"not so after {deadline_s:.0f} s: {what}"
        time.sleep(0.05)


def virsh(*words: str) -> subprocess.CompletedProcess[str]:
    argv = ["virsh", "-q", "-c", "qemu:///system", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)


def must(*words: str) -> str:
    done = virsh(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def vnet_lock(*words: str) -> str:
    argv = [sys.executable, "-m", "vnet_lock.front.cli", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Daemon:
    """libvirtd and what it needs, in the test's namespaces."""

    directory: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, program: str) -> None:
        with (self.directory / f"{program}.out").open("ab") as out:
            self.processes[program] = subprocess.Popen([program], stdout=out, stderr=out)

    def start_libvirtd(self) -> None:
        self.start("libvirtd")
        until(lambda: virsh("version").returncode == 0, "libvirtd answers", 100)

    def restart(self) -> None:
        self.processes["libvirtd"].terminate()
        status = self.processes["libvirtd"].wait(ENDS_IN_S)
        said = (self.directory / "libvirtd.out").read_text()
        assert status == 0 or "Make forcefull daemon shutdown" in said, said
        self.start_libvirtd()

    def write(self, name: str, xml: str) -> str:
        path = self.directory / f"{name}.xml"
        path.write_text(xml)
        return str(path)

    def guest(self, name: str, devices: str = "") -> None:
        """Start a guest that boots nothing, with ports for devices to come."""
        ports = "<controller type='pci' model='pcie-root'/>" + (
            "<controller type='pci' model='pcie-root-port'/>" * 4
        )
        xml = f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>
          <os><type arch='x86_64' machine='q35'>hvm</type></os>
          <devices><controller type='usb' model='none'/><memballoon model='none'/>
          <video><model type='none'/></video>{ports}{devices}</devices></domain>"""
        must("define", self.write(name, xml))
        must("start", name)

    def plug(self, guest: str, xml: str) -> subprocess.CompletedProcess[str]:
        return virsh("attach-device", guest, self.write("device", xml), "--live")

    def end(self) -> None:
        for name in virsh("list", "--name").stdout.split():
            virsh("destroy", name)
        # Whom the daemon couldn't end any more.
        for path in PIDS.glob("*.pid"):
            if path.name != "driver.pid":
                with suppress(ProcessLookupError, ValueError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(ENDS_IN_S)


@pytest.fixture
def daemon(ip: Callable[[str], str], macvtap_works: None, tmp_path: Path) -> Iterator[Daemon]:
    """libvirtd with our hooks, and a veth pair v0-v1 for its networks."""
    del ip, macvtap_works
    need(shutil.which("libvirtd") and shutil.which("qemu-system-x86_64"), "libvirtd, qemu-system-x86_64")
    for name in ("etc", "var/lib", "var/cache", "var/log"):
        folder = Path(f"/{name}/libvirt")
        need(folder.is_dir(), str(folder))
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "test", str(folder)], check=True)
    for place in ("/etc/libvirt/qemu", "/var/lib/libvirt/qemu", "/var/log/libvirt/qemu", "/run/libvirt"):
        os.makedirs(place, exist_ok=True)
    settings = {
        "qemu": 'security_driver = "none"\nuser = "root"\ngroup = "root"\ncgroup_controllers = []\n',
        "libvirtd": 'auth_unix_ro = "none"\nauth_unix_rw = "none"\n',
        "virtlogd": "",
    }
    for name, text in settings.items():
        Path(f"/etc/libvirt/{name}.conf").write_text(text)
    vnet_lock("hooks", "install")
    made = Daemon(tmp_path)
    try:
        made.start("virtlogd")
        made.start_libvirtd()
        yield made
    finally:
        made.end()


@pytest.fixture
def watch(daemon: Daemon) -> Iterator[Callable[[], str]]:
    """vnet-lock watch; what it has said so far."""
    log = daemon.directory / "watch.log"
    with log.open("wb") as sink:
        argv = [sys.executable, "-m", "vnet_lock.front.cli", "watch"]
        watching = subprocess.Popen(argv, stdout=sink, stderr=subprocess.STDOUT)
    try:
        until(lambda: "watching" in log.read_text(), "it watches")
        yield log.read_text
    finally:
        watching.terminate()
        assert watching.wait(30) == 0


def interface(kind: str, number: int, source: str) -> str:
    return (
        f"<interface type='{kind}'><mac address='52:54:00:00:0d:0{number}'/>{source}<model type='virtio'/>"
        "</interface>"
    )


def shares() -> int:
    return sum(name.startswith("nic:v0~") for name in os.listdir(CLAIMS)) if CLAIMS.is_dir() else 0


def test_each_interface_of_a_network_or_plugged_in_raw_has_its_claim(
    daemon: Daemon, watch: Callable[[], str]
) -> None:
    network = "<network><name>net</name><forward mode='vepa'><interface dev='v0'/></forward></network>"
    must("net-create", daemon.write("net", network))
    of_network = "<source network='net'/>"
    daemon.guest("g", interface("network", 1, of_network))
    assert shares() == 1
    # libvirt ends the port then, and not the interface.
    for state in ("down", "up"):
        must("domif-setlink", "g", "52:54:00:00:0d:01", state)
    assert shares() == 1
    assert daemon.plug("g", interface("network", 2, of_network)).returncode == 0
    assert shares() == 2
    assert daemon.plug("g", interface("direct", 3, "<source dev='v0' mode='vepa'/>")).returncode == 0
    until(lambda: shares() == 3, "what was plugged in raw is claimed")
    assert 'nic:v0 is claimed for guest "g", which has it' in watch()
    # A network daemon that starts tells its hook of all ports again.
    daemon.restart()
    until(lambda: watch().count("watching") == 2, "the watch is there again")
    assert (shares(), must("domstate", "g").strip()) == (3, "running")
    must("destroy", "g")
    assert shares() == 0


def test_a_network_is_refused_what_another_holds_and_the_guest_runs_on(daemon: Daemon) -> None:
    vnet_lock("claim", "nic:v0", "--pid", str(os.getpid()), "--name", "somebody")
    network = "<network><name>net</name><forward mode='vepa'><interface dev='v0'/></forward></network>"
    must("net-create", daemon.write("net", network))
    daemon.guest("g")
    refused = daemon.plug("g", interface("network", 1, "<source network='net'/>"))
    assert refused.returncode != 0
    assert 'device v0 is held by process "somebody"' in refused.stderr
    assert must("domstate", "g").strip() == "running"
    # And the daemon's own count of the port is right again.
    vnet_lock("release", "nic:v0")
    assert daemon.plug("g", interface("network", 1, "<source network='net'/>")).returncode == 0


def fake_vfs() -> None:
    """A PF with two VFs in /sys, as far as libvirt and we look at them to choose one."""
    devices = Path("/sys/bus/pci/devices")
    subprocess.run(["mount", "-t", "tmpfs", "test", str(devices)], check=True)
    for pci in (PF, *VFS):
        device = devices / pci
        device.mkdir()
        files = {"class": "0x020000", "vendor": "0x8086", "device": "0x10ca", "driver_override": "(null)"}
        for name, text in files.items():
            (device / name).write_text(text + "\n")
        (device / "config").write_bytes(bytes(256))
    (devices / PF / "net/v0").mkdir(parents=True)
    (devices / PF / "sriov_numvfs").write_text("2\n")
    (devices / PF / "sriov_totalvfs").write_text("7\n")
    for number, pci in enumerate(VFS):
        (devices / PF / f"virtfn{number}").symlink_to(f"../{pci}")
        (devices / pci / "physfn").symlink_to(f"../{PF}")


# What a guest's start asks libvirt's network for: a port with any VF.
ALLOCATE = """
import libvirt
port = libvirt.open("qemu:///system").networkLookupByName("pool").portCreateXML(
    "<networkport><uuid>11111111-1111-4111-8111-111111111111</uuid><owner><name>g</name>"
    "<uuid>d3e257c3-3319-43fa-9a76-eea94b0e5d77</uuid></owner><mac address='52:54:00:00:0d:01'/>"
    "</networkport>", 0)
print(port.XMLDesc(0))
"""


def test_libvirt_chooses_no_vf_that_the_watch_has_told_it_of(
    daemon: Daemon, watch: Callable[[], str]
) -> None:
    fake_vfs()
    addresses = "".join(f"<address type='pci' {address_words(PciAddress.parse(vf))}/>" for vf in VFS)
    network = f"<network><name>pool</name><forward mode='hostdev'>{addresses}</forward></network>"
    must("net-create", daemon.write("pool", network))

    def ports() -> int:
        return len(re.findall("[0-9a-f]{8}-", must("net-port-list", "pool")))

    vnet_lock("claim", f"vf:{VFS[0]}", "--pid", str(os.getpid()), "--name", "somebody")
    until(lambda: ports() == 1, "libvirt is told")
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True)
    assert "bus='0x01' slot='0x10' function='0x2'" in done.stdout
    # The hook has claimed it for the guest that is to have it.
    assert any(name.startswith(f"vf:{VFS[1]}~d3e257c3") for name in os.listdir(CLAIMS))
    assert ports() == 2
    vnet_lock("release", f"vf:{VFS[0]}")
    until(lambda: ports() == 1, "libvirt may choose it again")
    assert "error" not in watch()


def test_a_script_refuses_a_device_that_another_guest_has(daemon: Daemon, ip: Callable[[str], str]) -> None:
    script = daemon.directory / "ifup"
    script.write_text(f'#!/bin/sh\ncd {os.getcwd()}\nexec {sys.executable} -m vnet_lock.front.ifup "$@"\n')
    script.chmod(0o755)
    ip("link add link v0 name mine0 type macvtap mode vepa")
    ip("link set mine0 up")
    for name in ("g", "h"):
        daemon.guest(name)
    late = interface("ethernet", 1, f"<target dev='mine0' managed='no'/><script path='{script}'/>")
    assert daemon.plug("g", late).returncode == 0
    refused = daemon.plug("h", late)
    assert refused.returncode != 0
    assert "vnet-lock-ifup: device mine0 is in use by qemu-system-x86" in refused.stderr


def entries() -> list[dict[str, object]]:
    """The companions that stand in the claims' journals."""
    records = [json.loads(path.read_text()) for path in CLAIMS.glob("*.json")]
    found = (entry for record in records for entry in record["journal"])
    return [entry for entry in found if entry["kind"] == "companion"]


def test_a_companion_waits_until_the_guest_runs_whatever_the_daemon_does(daemon: Daemon) -> None:
    """And is known until what it had to do is done, or with its reason ever after."""
    daemon.guest("g")
    uuid = must("domuuid", "g").strip()
    must("destroy", "g")
    owner = read_owner(DEFAULT, "g", uuid)
    session = Administration(DEFAULT)
    told = daemon.directory / "told"

    def finish(domain: Domain) -> None:
        told.write_text(domain.state)

    def fail(domain: Domain) -> None:
        raise VnetLockError(f'guest "{domain.name}": no more ports')

    tokens = [session.claim(owner, Resource.ip(f"192.0.2.{host}"), Mode.EXCLUSIVE).token for host in (1, 2)]
    for token, what in zip(tokens, (finish, fail), strict=True):
        companion.start(DEFAULT, owner, token, what)
    must("start", "g", "--paused")
    daemon.restart()
    assert [entry["failure"] for entry in entries()] == ["", ""]
    assert not told.exists()
    must("resume", "g")
    until(told.exists, "it is done")
    assert told.read_text() == "running"
    said = ["no more ports"]
    until(lambda: [entry["failure"] for entry in entries()] == said, "one is done, the other says why not")
    must("destroy", "g")
    session.release(owner)
    assert not os.listdir(CLAIMS)


def test_a_companion_ends_with_the_claim_that_it_is_for(daemon: Daemon) -> None:
    daemon.guest("g")
    owner = read_owner(DEFAULT, "g", must("domuuid", "g").strip())
    must("destroy", "g")
    session = Administration(DEFAULT)
    token = session.claim(owner, Resource.ip("192.0.2.1"), Mode.EXCLUSIVE).token
    companion.start(DEFAULT, owner, token, lambda _: None)
    (entry,) = entries()
    process = Process(int(str(entry["pid"])), int(str(entry["start_ticks"])))
    assert is_alive(DEFAULT, process)
    session.release(owner)
    assert not is_alive(DEFAULT, process)
