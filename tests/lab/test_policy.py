"""Policies on VFs: what the embedded switch can't do is refused, and a private guest is on its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.contenders import HOST, appearance, owner_of, vnet_lock
from tests.lab.machines import Guests, PlainGuest
from tests.lab.nic import Nic, run, wait_until
from vnet_lock.errors import Unsupported
from vnet_lock.kernel import eswitch
from vnet_lock.kernel.vfs import set_vf

# A guest's boot on a machine that has other things to do, too.
BUSY_S = 600
CLAIMS = "/run/vnet-lock/claims"


def start(guests: Guests, name: str, words: str, **more: str) -> PlainGuest:
    return guests.qemu(name, ["-netdev", f"host,id=net0,{words}"], program=["vnet-qemu"], **more)


@pytest.mark.parametrize("protocols", ["vfio", "tap"])
def test_a_vepa_that_the_nics_driver_cannot_do_is_refused_and_nothing_is_left(
    lab: Nic, guests: Guests, protocols: str
) -> None:
    vf = lab.set_numvfs(1)[0]
    before = appearance(lab, 0)
    assert eswitch.read_mode(lab.pf) is None
    with pytest.raises(Unsupported, match=f"embedded switch of {lab.pf} to vepa failed: its driver has no"):
        eswitch.set_mode(lab.pf, "vepa")
    made = guests.qemu(
        "vepa",
        ["-netdev", f"host,id=net0,mode=vepa,port=sriov,dev={lab.pf},protocols={protocols}",
         "-device", "virtio-net-pci,netdev=net0,romfile="],
        program=["vnet-qemu"],
    )  # fmt: skip
    assert made.wait(120) == 5
    assert f"the embedded switch of {lab.pf} has no VEPA mode that igb could set" in made.said
    assert made.said.count("\n") == 1
    assert appearance(lab, 0) == before
    assert owner_of(vf) is None


@pytest.fixture
def elsewhere(lab: Nic) -> Iterator[Callable[[str], bool]]:
    """The second of three VFs in a namespace of its own, 10.7.0.3, and whether it reaches an address."""
    vf = lab.set_numvfs(3)[1]
    netdev = vf.netdev
    assert netdev
    run("ip", "netns", "add", "lab-else")
    run("ip", "link", "set", netdev, "netns", "lab-else")
    inside = ("ip", "netns", "exec", "lab-else")
    run(*inside, "ip", "address", "add", "10.7.0.3/24", "dev", netdev)
    run(*inside, "ip", "link", "set", netdev, "up")

    def reaches(address: str) -> bool:
        argv = [*inside, "ping", "-c", "1", "-w", "10", address]
        return subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode == 0

    yield reaches
    run("ip", "netns", "delete", "lab-else")


@pytest.mark.timeout(1200)
def test_a_private_guest_has_a_vlan_that_no_other_guest_on_the_pf_gets(
    lab: Nic, guests: Guests, elsewhere: Callable[[str], bool]
) -> None:
    vfs = lab.vfs
    lab.set_address(f"{HOST}/24")
    before = lab.admin(0)
    words = f"mode=private,port=sriov,dev={vfs[0].pci},vlan=42,protocols=vfio"
    private = start(guests, "private", words, ip="10.7.0.2/24", ping=HOST)
    assert private.console.ready(BUSY_S)["ping"] == "0/3"
    assert lab.admin(0)["vlan"] == 42
    assert elsewhere(HOST)
    assert not elsewhere("10.7.0.2")
    for mode in ("veb", "private"):
        same = start(
            guests, f"same-{mode}", f"mode={mode},port=sriov,dev={vfs[2].pci},vlan=42,protocols=vfio"
        )
        assert same.wait(120) == 4
        assert f"VF {vfs[2].pci} would share VLAN 42 of PF {lab.pci}: VF {vfs[0].pci} is held" in same.said
    alone = start(guests, "alone", f"mode=private,port=sriov,dev={vfs[2].pci},protocols=vfio")
    assert alone.wait(120) == 4
    assert "would not be alone on PF" in alone.said
    # By hand, as a person or libvirt may have set it.
    set_vf(lab.pf, 2, vlan=42)
    hand = vnet_lock("claim", f"vf:{vfs[2].pci}", "--pid", str(os.getpid()))
    assert (hand.returncode, "would share VLAN 42" in hand.stderr) == (4, True), hand.stderr
    # The guest can be reached, by whoever is in its VLAN.
    set_vf(lab.pf, 1, vlan=42)
    assert elsewhere("10.7.0.2")
    private.kill(signal.SIGTERM)
    private.wait(120)
    wait_until(lambda: not os.listdir(CLAIMS), "all is given back")
    assert lab.admin(0) == before


@pytest.fixture
def given_back(lab: Nic) -> Iterator[None]:
    """Whatever becomes of the guest, the NIC is there for the next test."""
    yield
    vnet_lock("gc")
    wait_until(lambda: lab.function.netdev == lab.pf, "the NIC is the host's again")


def start_whole(guests: Guests, name: str, dev: str) -> PlainGuest:
    """A QEMU that has a whole NIC open, and whose guest stands still.

    A guest that drives the emulated PF makes the lab's own QEMU end (10.0.2, TCG: the assertion in
    iotlb_to_section); that it drives a NIC is VFIO's part, not ours.
    """
    network = f"host,id=net0,mode=private,port=physdev,dev={dev},protocols=vfio"
    return guests.qemu(name, ["-netdev", network, "-S"], program=["vnet-qemu"])


def wait_for_qemu(made: PlainGuest) -> int:
    """Until QEMU has opened all its devices and listens; its pid."""
    wait_until(made.console.log.with_suffix(".sock").exists, "QEMU runs", 120)
    return int(Path(f"/proc/{made.pid}/task/{made.pid}/children").read_text().split()[0])


def test_a_whole_nic_goes_to_a_guest_and_comes_back(lab: Nic, given_back: None, guests: Guests) -> None:
    del given_back
    lab.set_numvfs(1)
    refused = start_whole(guests, "with-vfs", lab.pf)
    assert refused.wait(120) == 5
    assert f"{lab.pf} has 1 VFs, which would go with it; run: vnet-lock vfs {lab.pf} 0" in refused.said
    lab.set_numvfs(0)
    lab.set_address(f"{HOST}/24")
    refused = start_whole(guests, "with-address", lab.pf)
    assert refused.wait(120) == 4
    assert f"address {HOST} on {lab.pf}" in refused.said
    assert lab.function.netdev == lab.pf
    lab.reset()
    mac, driver = lab.function.mac, lab.function.driver
    whole = start_whole(guests, "whole", lab.pf)
    qemu = wait_for_qemu(whole)
    assert lab.function.driver == "vfio-pci"
    group = f"/dev/vfio/{lab.function.iommu_group}"
    wait_until(lambda: group in links_of(qemu), "QEMU has the NIC open")
    shown = vnet_lock("show", f"pf:{lab.pci}", "--json").stdout
    assert "private-physdev-vfio" in shown
    second = start_whole(guests, "second", lab.pci)
    assert second.wait(120) == 4
    assert f"PF {lab.pci} is held by qemu" in second.said
    whole.kill(signal.SIGTERM)
    whole.wait(120)
    wait_until(lambda: lab.function.netdev == lab.pf, "the NIC is the host's again")
    assert (lab.function.mac, lab.function.driver) == (mac, driver)
    assert Path(f"/sys/bus/pci/devices/{lab.pci}/driver_override").read_text().strip() in ("", "(null)")
    assert not os.listdir(CLAIMS)


def links_of(pid: int) -> set[str]:
    return {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}


def test_a_whole_nic_comes_back_from_a_guest_that_was_killed_with_its_wrapper(
    lab: Nic, given_back: None, guests: Guests
) -> None:
    del given_back
    whole = start_whole(guests, "whole", lab.pf)
    qemu = wait_for_qemu(whole)
    assert lab.function.driver == "vfio-pci"
    whole.kill(signal.SIGKILL)
    os.kill(qemu, signal.SIGKILL)
    whole.wait(60)
    wait_until(lambda: not Path(f"/proc/{qemu}/exe").exists(), "QEMU is gone")
    healed = vnet_lock("gc")
    assert healed.returncode == 0, healed.stderr
    wait_until(lambda: lab.function.netdev == lab.pf, "the NIC is the host's again")
    assert not os.listdir(CLAIMS)
