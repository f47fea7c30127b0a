"""Policies on VFs: what the embedded switch can't do is refused, and a private guest is on its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.lab.contenders import HOST, appearance, owner_of, vnet_lock
from tests.lab.machines import Guests, PlainGuest
from tests.lab.nic import Nic, wait_until
from vnet_lock.errors import Unsupported
from vnet_lock.kernel import netlink, rtnetlink

CLAIMS = "/run/vnet-lock/claims"


def start(guests: Guests, name: str, words: str, **more: str) -> PlainGuest:
    return guests.qemu(name, ["-netdev", f"host,id=net0,{words}"], program=["vnet-qemu"], **more)


@pytest.mark.parametrize("protocols", ["vfio", "tap"])
def test_a_vepa_that_the_nics_driver_cannot_do_is_refused_and_nothing_is_left(
    lab: Nic, guests: Guests, protocols: str
) -> None:
    vf = lab.set_numvfs(1)[0]
    before = appearance(lab, 0)
    assert rtnetlink.read_eswitch_mode(lab.pf) is None
    with pytest.raises(Unsupported, match=f"embedded switch of {lab.pf} to vepa failed: its driver has no"):
        netlink.set_eswitch_mode(lab.pf, "vepa")
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


def test_a_private_guest_has_a_vlan_that_no_other_guest_on_the_pf_gets(lab: Nic, guests: Guests) -> None:
    vfs = lab.set_numvfs(3)
    lab.set_address(f"{HOST}/24")
    before = [appearance(lab, index) for index in range(3)]
    private = start(
        guests,
        "private",
        f"mode=private,port=sriov,dev={vfs[0].pci},vlan=42,protocols=vfio",
        ip="10.7.0.2/24",
    )
    private.console.ready()
    assert lab.admin(0)["vlan"] == 42
    other = start(
        guests, "other", f"mode=veb,port=sriov,dev={vfs[1].pci},protocols=vfio", ip="10.7.0.3/24", ping=HOST
    )
    assert other.console.ready()["ping"] == "3/3"
    assert other.console.ask("ping 10.7.0.2")["ping"] == "0/3"
    for mode in ("veb", "private"):
        same = start(
            guests, f"same-{mode}", f"mode={mode},port=sriov,dev={vfs[2].pci},vlan=42,protocols=vfio"
        )
        assert same.wait(120) == 4
        assert f"VF {vfs[2].pci} would share VLAN 42 of PF {lab.pci}: VF {vfs[0].pci} is held" in same.said
    alone = start(guests, "alone", f"mode=private,port=sriov,dev={vfs[2].pci},protocols=vfio")
    assert alone.wait(120) == 4
    assert "would not be alone on PF" in alone.said
    # By hand, as libvirt or a person has it.
    netlink.set_vf(lab.pf, 2, vlan=42)
    hand = vnet_lock("claim", f"vf:{vfs[2].pci}", "--pid", str(os.getpid()))
    assert (hand.returncode, "would share VLAN 42" in hand.stderr) == (4, True), hand.stderr
    netlink.set_vf(lab.pf, 2, vlan=0)
    for made in (private, other):
        made.kill(signal.SIGTERM)
        made.wait(120)
    wait_until(lambda: not os.listdir(CLAIMS), "all is given back")
    wait_until(lambda: all(vf.netdev for vf in lab.vfs), "the VFs have their driver")
    after = [appearance(lab, index) for index in range(3)]
    for key in ("driver", "admin vlan", "admin mac", "admin spoofchk", "admin trust"):
        assert [one[key] for one in after] == [one[key] for one in before]


def test_a_whole_nic_goes_to_a_guest_and_comes_back(lab: Nic, guests: Guests) -> None:
    words = f"mode=private,port=physdev,dev={lab.pf},protocols=vfio"
    lab.set_numvfs(1)
    refused = start(guests, "with-vfs", words)
    assert refused.wait(120) == 5
    assert f"{lab.pf} has 1 VFs, which would go with it; run: vnet-lock vfs {lab.pf} 0" in refused.said
    lab.set_numvfs(0)
    lab.set_address(f"{HOST}/24")
    refused = start(guests, "with-address", words)
    assert refused.wait(120) == 4
    assert f"address {HOST} on {lab.pf}" in refused.said
    assert lab.function.netdev == lab.pf
    lab.reset()
    mac, driver = lab.function.mac, lab.function.driver
    # The VM's own NIC is on QEMU's user network, whose gateway answers.
    whole = start(guests, "whole", words, ip="10.0.2.15/24", ping="10.0.2.2")
    said = whole.console.ready()
    assert (said["driver"], said["mac"], said["ping"]) == ("igb", mac, "3/3")
    assert lab.function.driver == "vfio-pci"
    assert '"private-physdev-vfio"' in vnet_lock("show", f"pf:{lab.pci}", "--json").stdout
    second = start(guests, "second", words.replace(lab.pf, lab.pci))
    assert second.wait(120) == 4
    assert f"PF {lab.pci} is held by qemu" in second.said
    whole.kill(signal.SIGTERM)
    whole.wait(120)
    wait_until(lambda: lab.function.netdev == lab.pf, "the NIC is the host's again")
    assert (lab.function.mac, lab.function.driver) == (mac, driver)
    assert Path(f"/sys/bus/pci/devices/{lab.pci}/driver_override").read_text().strip() in ("", "(null)")
    assert not os.listdir(CLAIMS)


def test_a_whole_nic_comes_back_from_a_guest_that_was_killed_with_its_wrapper(
    lab: Nic, guests: Guests
) -> None:
    whole = start(guests, "whole", f"mode=private,port=physdev,dev={lab.pf},protocols=vfio")
    whole.console.ready()
    qemu = int(Path(f"/proc/{whole.pid}/task/{whole.pid}/children").read_text().split()[0])
    whole.kill(signal.SIGKILL)
    os.kill(qemu, signal.SIGKILL)
    whole.wait(60)
    wait_until(lambda: not Path(f"/proc/{qemu}/exe").exists(), "QEMU is gone")
    assert vnet_lock("gc").returncode == 0
    wait_until(lambda: lab.function.netdev == lab.pf, "the NIC is the host's again")
    assert not os.listdir(CLAIMS)
