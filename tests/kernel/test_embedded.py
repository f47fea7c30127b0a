"""vnet-qemu GUEST.xml with a real QEMU, in namespaces with a /run and a /var/lib of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.host import VNET_LOCK, VNET_QEMU, Host, eventually, started
from vnet_lock.kernel import processes

GUEST = """\
<domain type='qemu'>
  <name>alone</name>
  <uuid>2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a98</uuid>
  <metadata>
    <vnet:guest xmlns:vnet="urn:vnet-lock:guest:1">
      <vnet:interface alias="ua-net0" policy="veb" port="bridge" dev="br0"/>
      <vnet:interface alias="ua-net1" policy="route" port="none" dev="up0" ip="192.0.2.7"/>
      <vnet:interface alias="ua-net2" policy="vepa" port="macvlan" dev="up0"/>
    </vnet:guest>
  </metadata>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
ROOT = Path("/var/lib/vnet-lock/embed/alone")
PID_FILE = ROOT / "run/qemu/alone.pid"


@pytest.fixture
def guest(host: Host, tmp_path: Path) -> Iterator[Path]:
    """A guest's file; what libvirt keeps of it is in the test's own mount namespace."""
    subprocess.run(["mount", "-t", "tmpfs", "none", "/var/lib"], check=True)
    conf = tmp_path / "qemu.conf"
    conf.write_text('user = "root"\ngroup = "root"\ncgroup_controllers = []\nsecurity_driver = "none"\n')
    subprocess.run(["mount", "--bind", conf, "/etc/libvirt/qemu.conf"], check=True)
    path = tmp_path / "alone.xml"
    path.write_text(GUEST)
    yield path
    if pid := holder():
        os.kill(pid, signal.SIGKILL)


def holder(pid_file: Path = PID_FILE) -> int | None:
    """The QEMU that has the lock on libvirt's pid file; not libvirt's child that is to become it."""
    pid = processes.read_lock_holder(str(pid_file))
    with contextlib.suppress(FileNotFoundError):  # it is about to be gone
        return pid if pid and "qemu-system" in os.readlink(f"/proc/{pid}/exe") else None
    return None


def is_free(pid_file: Path = PID_FILE) -> bool:
    """Whether nobody has that lock: a QEMU that was killed has it for a moment longer than its program."""
    return processes.read_lock_holder(str(pid_file)) is None


def runs(host: Host) -> bool:
    """Whether the guest has all that it wants, and its QEMU."""
    return {"alone-net1", "alone-net2"} <= {*host.links()} and holder() is not None


def test_a_guest_gets_what_it_wants_and_gives_it_back_at_a_signal(host: Host, guest: Path) -> None:
    before = host.links()
    with started([VNET_QEMU, str(guest)]) as process:
        eventually(lambda: runs(host) or process.poll() is not None, 90)
        assert process.poll() is None, process.communicate()
        assert "ip:192.0.2.7" in {claim["resource"] for claim in host.claims()}
        masters = {os.path.basename(os.readlink(path)) for path in Path("/sys/class/net").glob("*/master")}
        assert masters == {"br0"}
        (macvtap,) = host.macvtaps()
        assert macvtap["ifname"] == "alone-net2"
        # It hands a guest what is sent to its own MAC alone.
        qemu = Path(f"/proc/{holder()}/cmdline").read_text()
        assert f'"mac":"{macvtap["address"]}"' in qemu
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.communicate()
    assert host.claims() == []
    assert host.links() == before


def test_a_guest_outlives_its_wrapper_and_is_never_started_twice(host: Host, guest: Path) -> None:
    before = host.links()
    with started([VNET_QEMU, str(guest)]) as process:
        eventually(lambda: runs(host) or process.poll() is not None, 90)
        second = subprocess.run([VNET_QEMU, str(guest)], capture_output=True, text=True, check=False)
        assert (second.returncode, second.stderr.count("run by another vnet-qemu")) == (1, 1), second.stderr
        process.kill()
        process.wait()
    pid = holder()
    assert pid
    second = subprocess.run([VNET_QEMU, str(guest)], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"is running already, without vnet-qemu (pid {pid})" in second.stderr
    assert subprocess.check_output([VNET_LOCK, "gc"], text=True) == "nothing is stale\n"
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{pid}/exe").exists())
    assert "healed" in subprocess.check_output([VNET_LOCK, "gc"], text=True)
    assert host.claims() == []
    assert "alone-net1" not in host.links()
    assert {*before} <= {*host.links()}
    # The next start is as the first.
    with started([VNET_QEMU, str(guest)]) as process:
        eventually(lambda: runs(host) or process.poll() is not None, 90)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.communicate()
    assert host.claims() == []


@pytest.mark.parametrize("name", ["alone#2", "%61lone", " alone", "a b:é", "x" * 90])
def test_a_guest_of_any_name_has_a_driver_of_its_own(host: Host, guest: Path, name: str) -> None:
    """Read as part of a URI, a name may be another guest's, whom the driver would end."""
    guest.write_text(GUEST.replace("<name>alone<", f"<name>{name}<"))
    with started([VNET_QEMU, str(guest)]) as process:
        eventually(lambda: process.poll() is not None or (host.claims() and holder(lock_of(host))), 90)
        assert process.poll() is None, process.communicate()
        lock = lock_of(host)
        assert not ROOT.exists()
        process.kill()
        process.wait()
    assert subprocess.check_output([VNET_LOCK, "gc"], text=True) == "nothing is stale\n"
    pid = holder(lock)
    assert pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: is_free(lock))
    assert "healed" in subprocess.check_output([VNET_LOCK, "gc"], text=True)


def lock_of(host: Host) -> Path:
    """The file by whose lock the guest's claims live."""
    return Path(host.claims()[0]["owner"]["pid_file"])


def test_a_wrapper_that_is_killed_while_libvirt_starts_its_guest_takes_nothing_from_it(
    host: Host, guest: Path
) -> None:
    with started([VNET_QEMU, str(guest)]) as process:
        eventually(lambda: holder() is not None, 90)
        process.kill()
        process.wait()
    pid = holder()
    # libvirt waits for QEMU's first word long after it has the lock.
    assert pid, "libvirt was quicker than the test"
    assert {claim["owner"]["process"]["pid"] for claim in host.claims()} == {process.pid}
    assert subprocess.check_output([VNET_LOCK, "gc"], text=True) == "nothing is stale\n"
    assert f"(pid {pid})" in subprocess.check_output([VNET_LOCK, "show", "ip:192.0.2.7"], text=True)
    assert "alone-net2" in host.links()
    os.kill(pid, signal.SIGKILL)
    eventually(is_free)
    assert "healed" in subprocess.check_output([VNET_LOCK, "gc"], text=True)
    assert host.claims() == []


def test_what_libvirt_refuses_leaves_nothing(host: Host, guest: Path) -> None:
    before = host.links()
    disk = "<disk type='file'><source file='/nowhere'/><target dev='vda' bus='virtio'/></disk>"
    guest.write_text(GUEST.replace("<devices>", f"<devices>{disk}"))
    done = subprocess.run([VNET_QEMU, str(guest)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "/nowhere" in done.stderr
    assert done.stderr.count("\n") == 1
    assert host.claims() == []
    assert host.links() == before


def test_a_macvtap_that_libvirt_would_make_is_refused(host: Host, guest: Path) -> None:
    before = host.links()
    direct = "<interface type='direct'><source dev='up0' mode='vepa'/></interface>"
    guest.write_text(GUEST.replace("</devices>", f"{direct}</devices>"))
    done = subprocess.run([VNET_QEMU, str(guest)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1), done.stderr
    assert "its macvtap on up0; let vnet-lock make that" in done.stderr
    assert not ROOT.exists()
    assert (host.claims(), host.links()) == ([], before)


def test_a_guest_is_shown_without_being_touched(host: Host, guest: Path) -> None:
    before = host.links()
    shown = subprocess.check_output([VNET_QEMU, "--print", str(guest)], text=True)
    assert "<source bridge='br0'/>" in shown
    for ours in ("alone-net1", "alone-net2"):
        assert f"<target dev='{ours}' managed='no'/>" in shown
    # The guest's NICs stand in the order in which they are asked for.
    assert shown.index("<source bridge='br0'/>") < shown.index("alone-net1'") < shown.index("alone-net2'")
    assert (host.claims(), host.links()) == ([], before)
