"""The lab itself: what the other tests of this ring build on is really there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab.machines import Guests, virsh
from tests.lab.nic import Nic, run, wait_until

HOST = "10.7.0.1"


def hostdev(nic: Nic, index: int, mac: str) -> str:
    """A fixed, managed VF as a libvirt interface."""
    return (
        f"<interface type='hostdev' managed='yes'><mac address='{mac}'/>"
        f"<source>{nic.vfs[index].xml_address}</source></interface>"
    )


def test_the_nic_has_a_pf_and_vfs_with_their_drivers(lab: Nic) -> None:
    first, second = lab.set_numvfs(2)
    assert lab.function.driver == "igb"
    assert [first.driver, second.driver] == ["igbvf", "igbvf"]
    assert first.mac == lab.admin(0)["mac"] != lab.admin(1)["mac"]
    assert lab.admin(0) | {"mac": ""} == {
        "mac": "", "vlan": 0, "qos": 0, "spoofchk": True, "trust": False, "link_state": "auto",
    }  # fmt: skip


def test_each_vf_is_alone_in_its_iommu_group(lab: Nic) -> None:
    vfs = lab.set_numvfs(2)
    assert [vf.group_members for vf in vfs] == [[vf.pci] for vf in vfs]


def test_a_vf_goes_to_vfio_pci_and_back(lab: Nic) -> None:
    vf = lab.set_numvfs(1)[0]
    vf.bind("vfio-pci")
    assert Path(f"/dev/vfio/{vf.iommu_group}").is_char_device()
    assert vf.netdev is None
    vf.bind("igbvf")
    wait_until(lambda: vf.netdev, "the VF has a network device again")


def test_what_the_pf_sets_on_a_vf_is_seen(lab: Nic) -> None:
    lab.set_numvfs(1)
    for words in ("mac 52:54:00:0a:0b:0c", "vlan 7 qos 3", "trust on", "spoofchk off"):
        run("ip", "link", "set", lab.pf, "vf", "0", *words.split())
    seen = lab.admin(0)
    assert (seen["mac"], seen["vlan"], seen["qos"]) == ("52:54:00:0a:0b:0c", 7, 3)
    assert (seen["spoofchk"], seen["trust"]) == (False, True)


def test_a_macvtap_gets_its_device_node_from_udev(lab: Nic) -> None:
    run("ip", "link", "add", "link", lab.pf, "name", "tap-lab", "type", "macvtap", "mode", "vepa")
    try:
        number = Path("/sys/class/net/tap-lab/ifindex").read_text().strip()
        wait_until(Path(f"/dev/tap{number}").is_char_device, f"/dev/tap{number} is there", 10)
    finally:
        run("ip", "link", "delete", "tap-lab")


def test_processes_that_lost_their_parent_are_reaped() -> None:
    pid = int(subprocess.check_output(["sh", "-c", "sleep 1 >/dev/null & echo $!"]))
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"process {pid} is reaped", 30)


def test_libvirt_and_the_machines_configuration_are_the_labs_own(tmp_path: Path) -> None:
    hook = Path("/etc/libvirt/hooks/lab-test")
    hook.write_text("x")
    hook.unlink()
    assert not Path("/etc/libvirt/qemu/networks").exists()
    assert virsh("list", "--all").stdout.strip() == ""


def test_a_libvirt_guest_pings_the_pf_through_its_vf(lab: Nic, guests: Guests) -> None:
    lab.set_numvfs(2)
    lab.set_address(f"{HOST}/24")
    before = lab.admin(1)
    made = guests.libvirt("hostdev", hostdev(lab, 1, "52:54:00:aa:00:01"), ip="10.7.0.2/24", ping=HOST)
    assert lab.admin(1)["mac"] == "52:54:00:aa:00:01"
    seen = made.console.ready()
    assert seen["mac"] == "52:54:00:aa:00:01"
    assert seen["driver"] == "igbvf"
    assert seen["link"] == "up"
    assert seen["ping"] == "3/3"
    made.destroy()
    assert lab.admin(1) == before
    wait_until(lambda: lab.vfs[1].driver == "igbvf", "libvirt gives the VF back")


def test_a_plain_guest_pings_the_pf_through_its_vf(lab: Nic, guests: Guests) -> None:
    vf = lab.set_numvfs(1)[0]
    lab.set_address(f"{HOST}/24")
    run("ip", "link", "set", lab.pf, "vf", "0", "mac", "52:54:00:aa:00:02")
    vf.bind("vfio-pci")
    made = guests.qemu("plain", ["-device", f"vfio-pci,host={vf.pci}"], ip="10.7.0.2/24", ping=HOST)
    seen = made.console.ready()
    assert (seen["mac"], seen["driver"], seen["ping"]) == ("52:54:00:aa:00:02", "igbvf", "3/3")
    made.console.ask("poweroff")
    assert made.wait() == 0


def test_a_guest_exchanges_packets_through_macvtap_and_vhost(lab: Nic, guests: Guests) -> None:
    """The peer is a macvlan on the same lower device: a macvtap never reaches its own lower device."""
    add = ["ip", "link", "add", "link", lab.pf]
    run(*add, "name", "peer0", "type", "macvlan", "mode", "bridge")
    run("ip", "address", "add", f"{HOST}/24", "dev", "peer0")
    run("ip", "link", "set", "peer0", "up")
    run(*add, "name", "guest0", "address", "52:54:00:aa:00:03", "type", "macvtap", "mode", "bridge")
    run("ip", "link", "set", "guest0", "up")
    number = Path("/sys/class/net/guest0/ifindex").read_text().strip()
    node = Path(f"/dev/tap{number}")
    wait_until(node.is_char_device, f"{node} is there", 10)
    tap, vhost = os.open(node, os.O_RDWR), os.open("/dev/vhost-net", os.O_RDWR)
    try:
        made = guests.qemu(
            "macvtap",
            [
                "-netdev", f"tap,id=n0,fd={tap},vhost=on,vhostfd={vhost}",
                "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:aa:00:03,romfile=",
            ],
            pass_fds=[tap, vhost], ip="10.7.0.3/24", ping=HOST,
        )  # fmt: skip
    finally:
        os.close(tap)
        os.close(vhost)
    seen = made.console.ready()
    assert (seen["driver"], seen["ping"]) == ("virtio_net", "3/3")
    assert made.console.ask(f"ping {HOST}")["ping"] == "3/3"
    assert made.console.ask("run ip route | grep -q 10.7.0.0/24")["exit"] == "0"


def test_a_guest_that_ends_is_told_apart_from_one_that_says_nothing(lab: Nic, guests: Guests) -> None:
    made = guests.qemu("broken", ["-device", "no-such-device"])
    with pytest.raises(AssertionError, match="broken ended before it said"):
        made.console.ready()
    assert "no-such-device" in made.said


def test_starting_python_is_not_slow() -> None:
    """A hook that takes seconds to load would make every other test slow: the cached mount is in place."""
    argv = [sys.executable, "-I", "-c", "import json, argparse"]
    subprocess.run(argv, check=True)
    start = time.monotonic()
    subprocess.run(argv, check=True)
    assert time.monotonic() - start < 15
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    assert any(where == os.getcwd() and "cache=" in options for _, where, _, options, *_ in mounts)
