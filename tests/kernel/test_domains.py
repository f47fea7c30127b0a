"""resolve, define, start and attach against a real libvirtd, all of whose directories are the test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import test_libvirtd
from tests.kernel.host import VNET_LOCK, Host, eventually, started
from tests.lab.daemons import LIBVIRTD
from tests.lab.machines import virsh

UUID = "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a97"
GUEST = """\
<domain type='qemu'>
  <name>web1</name>
  <uuid>{uuid}</uuid>
  <metadata>
    <vnet:guest xmlns:vnet="urn:vnet-lock:guest:1">
      <vnet:interface alias="ua-net0" policy="veb" port="bridge" dev="br0"/>
      <vnet:interface alias="ua-net1" policy="route" port="none" dev="up0" ip="192.0.2.7"/>
    </vnet:guest>
  </metadata>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <controller type='pci' model='pcie-root'/>
    {ports}
    <memballoon model='none'/>{more}
  </devices>
</domain>
"""
PORTS = "<controller type='pci' model='pcie-root-port'/>" * 7
BROKEN = "<disk type='file'><source file='/nowhere'/><target dev='vda' bus='virtio'/></disk>"


def vnet_lock(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VNET_LOCK, *words], capture_output=True, text=True, check=False, timeout=100)


def dump(*words: str) -> str:
    return virsh("dumpxml", "web1", *words).stdout


# Our libvirt-python is built for the libvirt that is installed, and for no older one.
libvirtd = test_libvirtd.libvirtd
pytestmark = pytest.mark.parametrize("libvirtd", ["installed"], indirect=True)


@pytest.fixture(autouse=True)
def _ended(libvirtd: Host) -> Iterator[None]:
    """The guest doesn't outlive its test."""
    yield
    virsh("destroy", "web1", check=False)


@pytest.fixture
def write(tmp_path: Path):
    def write(uuid: str = UUID, more: str = "") -> str:
        path = tmp_path / "web1.xml"
        path.write_text(GUEST.format(uuid=uuid, ports=PORTS, more=more))
        return str(path)

    return write


def resources(host: Host) -> list[str]:
    return sorted(claim["resource"] for claim in host.claims())


def is_as_before(host: Host) -> bool:
    return host.claims() == [] and not [name for name in host.links() if name.startswith(("web1", "vnet"))]


def test_a_defined_guest_is_started_resolved_and_comes_back_to_its_definition(libvirtd: Host, write) -> None:
    done = vnet_lock("define", "--form", "late", write())
    assert done.stdout == 'guest "web1" is defined: ua-net0 ethernet web1-net0, ua-net1 ethernet web1-net1\n'
    defined = dump("--inactive")
    done = vnet_lock("start", "web1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'guest "web1" is started: ua-net0 bridge br0, ua-net1 ethernet web1-net1\n'
    assert done.stderr.startswith("vnet-lock: interface ua-net1 is left to the hook: ")
    assert resources(libvirtd) == ["ip:192.0.2.7", "nic:up0"]
    # The hook has taken them over: they live by the daemon and QEMU, not by the command.
    assert {claim["owner"]["uuid"] for claim in libvirtd.claims()} == {UUID}
    assert (vnet_lock("gc").stdout, vnet_lock("start", "web1").returncode) == ("nothing is stale\n", 1)
    # Into it comes what is free, and what isn't leaves nothing.
    words = ("attach", "web1", "--mode", "route", "--port", "none", "--dev", "up0", "--ip")
    done = vnet_lock(*words, "192.0.2.8")
    assert done.returncode == 0, done.stderr
    assert "ip:192.0.2.8" in resources(libvirtd)
    done = vnet_lock(*words, "192.0.2.7", "--alias", "ua-again")
    assert done.returncode == 4, done.stderr
    assert "ua-again" in done.stderr
    done = vnet_lock("attach", "web1", "--mode", "veb", "--port", "bridge", "--dev", "br0")
    assert done.returncode == 0, done.stderr
    assert "<source bridge='br0'/>" in dump()
    device = Path("/run/device.xml")
    device.write_text(
        "<interface type='direct'><source dev='up0' mode='vepa'/><model type='virtio'/>"
        "<alias name='ua-file'/></interface>"
    )
    for words in (("--mode", "private", "--dev", "up0", "--alias", "ua-macvtap"), (str(device),)):
        done = vnet_lock("attach", "web1", *words)
        assert done.returncode == 0, done.stderr
    modes = {link["linkinfo"]["info_data"]["mode"] for link in libvirtd.macvtaps()}
    assert modes == {"private", "vepa"}
    claimed = {claim["interface"]: claim["combination"] for claim in libvirtd.claims()}
    assert claimed["ua-macvtap"] == "private-macvlan-tap"
    assert claimed["ua-file"] == "vepa-macvlan-tap"
    virsh("destroy", "web1")
    assert dump("--inactive") == defined
    assert is_as_before(libvirtd)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_attach_that_is_interrupted_gives_back_what_libvirt_refuses(
    libvirtd: Host, write, number: int
) -> None:
    virsh("define", write())
    assert vnet_lock("start", "web1").returncode == 0
    before = resources(libvirtd)
    device = Path("/run/device.xml")
    device.write_text(
        "<interface type='direct'><source dev='peer0' mode='passthrough'/>"
        "<model type='nonesuch'/></interface>"
    )
    daemon = LIBVIRTD.pid
    with started([VNET_LOCK, "attach", "web1", str(device)]) as process:
        eventually(lambda: "nic:peer0" in resources(libvirtd))
        os.kill(daemon, signal.SIGSTOP)
        try:
            time.sleep(0.5)
            process.send_signal(number)
            time.sleep(0.5)
        finally:
            os.kill(daemon, signal.SIGCONT)
        _, said = process.communicate(timeout=60)
    assert process.returncode in (1, 2, 5, 130, -number)
    assert "Traceback" not in said
    assert resources(libvirtd) == before
    virsh("destroy", "web1")


def test_what_libvirt_refuses_leaves_no_claim_and_no_device(libvirtd: Host, write) -> None:
    done = vnet_lock("start", write(more=BROKEN))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "/nowhere" in done.stderr
    assert virsh("domstate", "web1", check=False).returncode != 0
    assert is_as_before(libvirtd)
    # A saved guest goes on with the devices that it had.
    vnet_lock("define", write())
    virsh("start", "web1", "--paused")
    virsh("managedsave", "web1")
    done = vnet_lock("start", "web1")
    assert (done.returncode, "managedsave-remove" in done.stderr) == (1, True), done.stderr
    assert is_as_before(libvirtd)


@pytest.mark.timeout(300)
def test_a_start_that_is_killed_at_any_moment_leaves_nothing_without_a_guest(libvirtd: Host, write) -> None:
    vnet_lock("define", "--form", "late", write())
    for after_s in (0.2, 0.4, 0.6, 0.8, 1.2):
        starting = subprocess.Popen([VNET_LOCK, "start", "web1"], stdout=subprocess.DEVNULL)
        time.sleep(after_s)
        starting.send_signal(signal.SIGKILL)
        starting.wait(30)
        # libvirt does what it was asked to, if it was, and then ends it.
        virsh("destroy", "web1", check=False)
        assert virsh("domstate", "web1").stdout.strip() == "shut off"
        assert vnet_lock("gc").returncode == 0
        assert is_as_before(libvirtd), after_s
