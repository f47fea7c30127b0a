"""libvirt's daemon is killed in the middle of something: what it left is healed, and nothing sooner.

A libvirtd of the test's own, in its namespaces. Its guests never run: what libvirt does for them is all that
counts, and it does that on macvtaps as on VFs.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.host import LINKS, VNET_LOCK, Host, eventually
from tests.lab.daemons import LIBVIRTD, killed_at
from tests.lab.machines import virsh

MAC = "52:54:00:00:00:07"


@pytest.fixture
def libvirtd(daemon: Host) -> Iterator[Host]:
    """A host with libvirt's daemon and our hook, and a guest ``g`` that has up0 to itself."""
    define("g", f"<mac address='{MAC}'/><source dev='up0' mode='passthrough'/>")
    yield daemon
    if not LIBVIRTD.is_alive:
        LIBVIRTD.begin()
    virsh("destroy", "g", check=False)


def define(name: str, direct: str) -> None:
    path = Path(f"/run/{name}.xml")
    path.write_text(
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><os>"
        "<type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>"
        f"<interface type='direct'>{direct}<model type='virtio'/></interface><memballoon model='none'/>"
        "<controller type='usb' model='none'/></devices></domain>"
    )
    virsh("define", str(path))


def command(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def gc() -> str:
    return command(VNET_LOCK, "gc")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_clean(host: Host) -> bool:
    return not host.claims() and host.links() == LINKS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("operation", ["prepare", "start", "started"])
def test_what_a_daemon_leaves_that_is_killed_while_it_starts_a_guest_is_healed(
    libvirtd: Host, operation: str
) -> None:
    with killed_at("g", operation):
        assert virsh("start", "--paused", "g", check=False).returncode != 0
    eventually(lambda: not LIBVIRTD.is_alive)
    if operation != "started":
        # libvirt will know nothing of this start.
        assert gc() == 'healed nic:up0: left by guest "g"\n'
        assert is_clean(libvirtd)
    LIBVIRTD.begin()
    if operation == "started":
        state = virsh("domstate", "g").stdout.strip()
        assert (state == "shut off") == is_clean(libvirtd), state
        virsh("destroy", "g", check=False)
    # The MAC and the device are to be had again.
    virsh("start", "--paused", "g")
    assert [claim["owner"]["name"] for claim in libvirtd.claims()] == ["g"]
    virsh("destroy", "g")
    assert is_clean(libvirtd)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("window", ["qemu", "stopped", "release"])
def test_what_libvirt_has_not_given_back_when_it_is_killed_is_nobodys_before_it_has(
    libvirtd: Host, window: str
) -> None:
    virsh("start", "--paused", "g")
    pid = int(Path("/run/libvirt/qemu/g.pid").read_text())
    if window == "qemu":
        LIBVIRTD.end(signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not is_running(pid))
    else:
        with killed_at("g", window, before_ours=window == "release"):
            virsh("destroy", "g", check=False)
            eventually(lambda: not LIBVIRTD.is_alive)
    if window == "release":
        assert gc() == 'healed nic:up0: left by guest "g"\n'
        assert is_clean(libvirtd)
    else:
        assert gc() == "nothing is stale\n"
        refused = libvirtd.qemu("qemu-system-x86_64 -M q35 -netdev host,id=n,mode=vepa,dev=up0")
        assert refused.returncode == 4
        assert 'guest "g"' in refused.stderr
    LIBVIRTD.begin()
    eventually(lambda: is_clean(libvirtd))
    assert virsh("domstate", "g").stdout.strip() == "shut off"
    virsh("start", "--paused", "g")
    virsh("destroy", "g")
    assert is_clean(libvirtd)


def test_a_macvtap_on_a_guests_device_that_is_not_libvirts_stays(libvirtd: Host) -> None:
    """One with another MAC or name on a shared device, and one that a process has open."""
    virsh("undefine", "g")
    define("g", f"<mac address='{MAC}'/><source dev='up0' mode='bridge'/>")
    for name, mac in (("macvtap7", "52:54:00:00:00:08"), ("mine0", MAC)):
        with killed_at("g", "prepare"):
            virsh("start", "--paused", "g", check=False)
        eventually(lambda: not LIBVIRTD.is_alive)
        command("ip", "link", "add", "link", "up0", "name", name, "address", mac, "type", "macvtap")
        try:
            assert gc() == 'healed nic:up0: left by guest "g"\n'
            assert name in libvirtd.links()
        finally:
            command("ip", "link", "del", name)
        LIBVIRTD.begin()
    assert is_clean(libvirtd)
