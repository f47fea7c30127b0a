"""What guests get while they run: of networks, whose hook may refuse, and raw, which can only be seen."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.contenders import CONTENDERS, appearance, direct_xml, hostdev_xml, owner_of, vnet_lock
from tests.lab.machines import Guests, LibvirtGuest, virsh
from tests.lab.nic import Nic, run, wait_until

pytestmark = pytest.mark.usefixtures("hook")

OF_THE_LINK = ("ifindex", "operstate", "flags")
# Where devices are plugged in: a q35 guest has no port of its own that is free.
PORTS = "<controller type='pci' model='pcie-root'/>" + "<controller type='pci' model='pcie-root-port'/>" * 4
DAEMON = Path("/run/libvirtd.pid")
CLAIMS = "/run/vnet-lock/claims"


def looks(nic: Nic, index: int) -> dict[str, object]:
    return {key: value for key, value in appearance(nic, index).items() if key not in OF_THE_LINK}


def network_xml(name: str, mac: str) -> str:
    # Without a model it would be one that no port of PCI Express takes.
    return (
        f"<interface type='network'><mac address='{mac}'/><source network='{name}'/><model type='virtio'/>"
        "</interface>"
    )


def shares(nic: Nic) -> int:
    """How many shares of the PF are claimed."""
    return sum(name.startswith(f"pf:{nic.pci}~") for name in os.listdir(CLAIMS))


@pytest.fixture
def networks(lab: Nic, tmp_path: Path) -> Iterator[None]:
    """A network of the NIC's two VFs, and one of macvtaps on the PF."""
    lab.set_numvfs(2)
    forwards = {
        "lab-pool": f"<forward mode='hostdev' managed='yes'><pf dev='{lab.pf}'/></forward>",
        "lab-vepa": f"<forward mode='vepa'><interface dev='{lab.pf}'/></forward>",
    }
    for name, forward in forwards.items():
        (tmp_path / f"{name}.xml").write_text(f"<network><name>{name}</name>{forward}</network>")
        virsh("net-define", str(tmp_path / f"{name}.xml"))
        virsh("net-start", name)
    yield
    for name in forwards:
        virsh("net-destroy", name, check=False)
        virsh("net-undefine", name, check=False)


@pytest.fixture
def watch(logs: Path) -> Iterator[Callable[[], str]]:
    """vnet-lock watch, as its service runs it; what it has said so far."""
    log = logs / "watch.log"
    with log.open("wb") as sink:
        watching = subprocess.Popen(["vnet-lock", "watch"], stdout=sink, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "watching" in log.read_text(), "it watches", 120)
        yield log.read_text
    finally:
        watching.terminate()
        assert watching.wait(60) == 0


def plug(made: LibvirtGuest, xml: str, verb: str = "attach-device") -> subprocess.CompletedProcess[str]:
    path = made.console.log.with_suffix(".device.xml")
    path.write_text(xml)
    return virsh(verb, made.uuid, str(path), "--live", check=False)


def unplug(made: LibvirtGuest, xml: str) -> None:
    done = plug(made, xml, "detach-device")
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("networks")
def test_a_network_gives_out_no_device_of_anothers(lab: Nic, guests: Guests) -> None:
    """At a start and at a hot-plug: whoever holds the VF that libvirt picks keeps it, untouched."""
    first = lab.vfs[0]
    assert first.netdev
    before = looks(lab, 0)
    holder = CONTENDERS["tap"](guests, first, first.netdev, "holder")
    assert holder.runs, holder.message
    held = appearance(lab, 0)
    pool, vepa = network_xml("lab-pool", "52:54:00:00:09:02"), network_xml("lab-vepa", "52:54:00:00:09:03")
    running = guests.libvirt("running", PORTS)
    pooled = guests.libvirt("pooled", network_xml("lab-pool", "52:54:00:00:09:01"), start=False)
    for refused in (pooled.start(check=False), plug(running, pool)):
        assert refused.returncode != 0
        assert f'VF {first.pci} is held by qemu "holder"' in refused.stderr
        assert appearance(lab, 0) == held
    holder.end()
    for xml in (pool, vepa):
        done = plug(running, xml)
        assert done.returncode == 0, done.stderr
    assert (owner_of(first), shares(lab)) == ("running", 1)
    # A daemon that starts tells the hook of all ports again.
    pid = int(DAEMON.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "libvirtd is gone", 120)
    run("libvirtd", "-d", deadline_s=120)
    wait_until(lambda: virsh("list", check=False).returncode == 0, "libvirtd answers", 180)
    assert (running.state, owner_of(first), shares(lab)) == ("running", "running", 1)
    running.console.ready()
    unplug(running, pool)
    unplug(running, vepa)
    wait_until(lambda: not os.listdir(CLAIMS), "both are given back", 120)
    assert running.state == "running"
    wait_until(lambda: first.netdev, "the VF has its driver again", 120)
    assert looks(lab, 0) == before


@pytest.mark.usefixtures("networks")
def test_watch_claims_what_is_plugged_in_raw_and_keeps_it_out_of_networks(
    lab: Nic, guests: Guests, watch: Callable[[], str]
) -> None:
    first, second = lab.vfs
    done = vnet_lock("claim", f"vf:{first.pci}", "--pid", str(os.getpid()), "--name", "somebody")
    assert done.returncode == 0, done.stderr
    wait_until(
        lambda: re.search("[0-9a-f]{8}-", virsh("net-port-list", "lab-pool").stdout), "libvirt is told"
    )
    made = guests.libvirt("watched", PORTS + network_xml("lab-pool", "52:54:00:00:0a:01"))
    assert owner_of(second) == "watched"
    made.console.ready()
    taken, direct = hostdev_xml(first, "52:54:00:00:0a:02"), direct_xml(lab.pf, "52:54:00:00:0a:03", "vepa")
    assert plug(made, direct).returncode == 0
    wait_until(lambda: shares(lab) == 1, "its share of the PF is claimed", 120)
    assert plug(made, taken).returncode == 0
    began = time.monotonic()
    wait_until(lambda: "conflict" in watch(), "the conflict is told", 120)
    print(f"the conflict was told {time.monotonic() - began:.1f} s after virsh had plugged the VF in")
    assert f'conflict: guest "watched" has {first.pci}, but VF {first.pci} is held by process' in watch()
    found = json.loads(vnet_lock("status", "--json").stdout)["findings"]
    assert [(one["kind"], one["resource"]) for one in found] == [("conflict", f"vf:{first.pci}")]
    unplug(made, taken)
    wait_until(lambda: first.netdev, "the VF has its driver again", 120)
    assert vnet_lock("release", f"vf:{first.pci}").returncode == 0
    assert plug(made, taken).returncode == 0
    wait_until(lambda: owner_of(first) == "watched", "it is claimed", 120)
    unplug(made, taken)
    unplug(made, direct)
    wait_until(lambda: (owner_of(first), shares(lab)) == (None, 0), "both are given back", 120)
    assert owner_of(second) == "watched"
