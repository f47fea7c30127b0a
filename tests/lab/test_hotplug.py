"""What guests get while they run: by networks, whose hook may refuse, and raw, which nothing can but report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.contenders import CONTENDERS, appearance, direct_xml, hostdev_xml, owner_of, status, vnet_lock
from tests.lab.machines import Guests, LibvirtGuest, virsh
from tests.lab.nic import Nic, run, wait_until

pytestmark = pytest.mark.usefixtures("hook")

OF_THE_LINK = ("ifindex", "operstate", "flags")
PORTS = "<controller type='pci' model='pcie-root'/>" + "<controller type='pci' model='pcie-root-port'/>" * 4
DAEMON = Path("/run/libvirtd.pid")


def looks(nic: Nic, index: int) -> dict[str, object]:
    return {key: value for key, value in appearance(nic, index).items() if key not in OF_THE_LINK}


def network_xml(name: str, mac: str) -> str:
    return f"<interface type='network'><mac address='{mac}'/><source network='{name}'/></interface>"


@pytest.fixture
def networks(lab: Nic, tmp_path: Path) -> Iterator[None]:
    """A network of the NIC's VFs, and one of macvtaps on the PF."""
    lab.set_numvfs(2)
    forwards = {
        "lab-pool": f"<forward mode='hostdev' managed='yes'><pf dev='{lab.pf}'/></forward>",
        "lab-vepa": f"<forward mode='vepa'><interface dev='{lab.pf}'/></forward>",
    }
    for name, forward in forwards.items():
        (tmp_path / f"{name}.xml").write_text(f"<network><name>{name}</name>{forward}</network>")
        virsh("net-define", str(tmp_path / f"{name}.xml"))
        virsh("net-start", name)
    tee = Path("/etc/libvirt/hooks/network.d/10-tee")
    tee.write_text('#!/bin/sh\n{ echo "== $* ppid $PPID"; cat; } >>/tmp/hook.log\nexit 0\n')
    tee.chmod(0o755)
    yield
    tee.unlink()
    for name in forwards:
        virsh("net-destroy", name, check=False)
        virsh("net-undefine", name, check=False)


def plug(made: LibvirtGuest, xml: str, verb: str = "attach-device") -> subprocess.CompletedProcess[str]:
    path = made.console.log.with_suffix(".device.xml")
    path.write_text(xml)
    return virsh(verb, made.uuid, str(path), "--live", check=False)


@pytest.mark.usefixtures("networks")
def test_a_network_gives_out_no_device_of_anothers(lab: Nic, guests: Guests) -> None:
    """At start and at hot-plug: whoever holds the VF that libvirt picks keeps it, untouched."""
    first, second = lab.vfs
    assert first.netdev
    holder = CONTENDERS["tap"](guests, first, first.netdev, "holder")
    assert holder.runs, holder.message
    held = appearance(lab, 0)
    pooled = guests.libvirt("pooled", network_xml("lab-pool", "52:54:00:00:09:01"), start=False)
    refused = pooled.start(check=False)
    print(refused)
    assert refused.returncode != 0
    assert appearance(lab, 0) == held
    running = guests.libvirt("running", PORTS)
    refused = plug(running, network_xml("lab-pool", "52:54:00:00:09:02"))
    print(refused)
    assert refused.returncode != 0
    assert appearance(lab, 0) == held
    holder.end()
    before = looks(lab, 0)
    done = plug(running, network_xml("lab-pool", "52:54:00:00:09:02"))
    print(done)
    print(vnet_lock("status").stdout)
    assert owner_of(first) == "running"
    done = plug(running, network_xml("lab-vepa", "52:54:00:00:09:03"))
    print(done)
    print(vnet_lock("status").stdout)
    pid = int(DAEMON.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "libvirtd is gone")
    run("libvirtd", "-d", deadline_s=120)
    wait_until(lambda: virsh("list", check=False).returncode == 0, "libvirtd answers", 180)
    print(running.state, vnet_lock("status").stdout)
    assert (running.state, owner_of(first)) == ("running", "running")
    assert not CONTENDERS["vfio"](guests, first, "", "other").runs
    print(plug(running, network_xml("lab-pool", "52:54:00:00:09:02"), "detach-device"))
    print(plug(running, network_xml("lab-vepa", "52:54:00:00:09:03"), "detach-device"))
    running.console.ready()
    wait_until(lambda: owner_of(first) is None, "the port is deleted", 60)
    print(vnet_lock("status").stdout)
    print(Path("/tmp/hook.log").read_text())
    wait_until(lambda: first.netdev, "the VF has its driver again")
    assert looks(lab, 0) == before
    running.destroy()
    assert not os.listdir("/run/vnet-lock/claims")


def test_watch_claims_what_is_plugged_in_raw_and_says_conflicts(lab: Nic, guests: Guests, logs: Path) -> None:
    first, second = lab.set_numvfs(2)
    log = logs / "watch.log"
    with log.open("wb") as sink:
        watching = subprocess.Popen(["vnet-lock", "watch"], stdout=sink, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "watching" in log.read_text(), "it watches", 60)
        made = guests.libvirt("watched", PORTS)
        run("vnet-lock", "claim", f"vf:{second.pci}", "--pid", str(os.getpid()), "--name", "somebody")
        made.console.ready()
        print(plug(made, hostdev_xml(first, "52:54:00:00:0a:01")))
        wait_until(lambda: owner_of(first) == "watched", "the VF is claimed")
        print(plug(made, hostdev_xml(second, "52:54:00:00:0a:02")))
        wait_until(lambda: "conflict" in log.read_text(), "the conflict is told")
        print(log.read_text(), vnet_lock("status").stdout)
        print(plug(made, direct_xml(lab.pf, "52:54:00:00:0a:03", "vepa")))
        wait_until(lambda: "pf:" in log.read_text(), "the share of the PF is claimed")
        print(vnet_lock("status").stdout)
        print(plug(made, hostdev_xml(first, "52:54:00:00:0a:01"), "detach-device"))
        wait_until(lambda: owner_of(first) is None, "the VF is given back")
        print(plug(made, direct_xml(lab.pf, "52:54:00:00:0a:03", "vepa"), "detach-device"))
        wait_until(
            lambda: json.loads(vnet_lock("status", "--json").stdout)["pfs"][0]["claims"] == [], "given back"
        )
        run("vnet-lock", "release", f"vf:{second.pci}")
        wait_until(lambda: owner_of(second) == "watched", "the VF is claimed")
        print(log.read_text(), vnet_lock("status").stdout)
    finally:
        watching.terminate()
        print(log.read_text())
    assert watching.wait(30) == 0
    made.destroy()
    print(status())
    assert not os.listdir("/run/vnet-lock/claims")
