"""VFs and whole NICs for guests on a packet socket: the device goes away, and comes back as it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.lab.contenders import HOST, appearance, owner_of, vnet_lock
from tests.lab.machines import Guests, PlainGuest
from tests.lab.nic import Nic, run, wait_until

BUSY_S = 600
MAC = "52:54:00:00:55:01"


def start(
    guests: Guests, name: str, words: str, *more: str, model: str = "virtio-net-pci", **kernel: str
) -> PlainGuest:
    devices = [
        "-netdev",
        f"host,id=net0,protocols=socket,{words}",
        "-device",
        f"{model},netdev=net0,romfile=",
    ]
    return guests.qemu(name, [*devices, *more], program=["vnet-qemu"], **kernel)


def start_still(guests: Guests, name: str, words: str) -> PlainGuest:
    """A QEMU whose guest stands still, once it and its relay are there."""
    made = start(guests, name, words, "-S")
    wait_until(lambda: made.process.poll() is not None or is_qemu(made), f"{name} is QEMU", BUSY_S)
    assert made.process.poll() is None, made.said
    return made


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_qemu(made: PlainGuest) -> bool:
    return any(
        Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system") for pid in children_of(made.pid)
    )


def relay() -> int:
    """The pid of the only relay."""
    (found,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"vnet_lock.datapath.relay" in path.read_bytes()
    ]
    return found


def kill_all(made: PlainGuest) -> None:
    """The wrapper, QEMU and the relay, none of which can see to anything before its end."""
    pids = [made.pid, *children_of(made.pid), relay()]
    for sign in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, sign)
    made.wait(60)


@pytest.mark.parametrize("model", ["e1000e", "virtio-net-pci"])
def test_a_guest_has_a_vfs_device_alone_and_gives_it_back_as_it_was(
    lab: Nic, guests: Guests, model: str
) -> None:
    lab.set_address(f"{HOST}/24")
    vf = lab.set_numvfs(2)[0]
    before = appearance(lab, 0)
    words = f"mode=veb,port=sriov,dev={vf.netdev},mac={MAC}"
    made = start(guests, "sock", words, model=model, ip="10.7.0.2/24", ping=HOST)
    assert made.console.ready(BUSY_S)["ping"] == "3/3"
    assert vf.netdev is None
    assert owner_of(vf) == "sock"
    assert vnet_lock("status").returncode == 0
    made.kill(signal.SIGTERM)
    made.wait(120)
    assert {**before, "ifindex": 0} == {**appearance(lab, 0), "ifindex": 0}
    assert owner_of(vf) is None


def test_a_vf_comes_back_after_everything_was_killed(lab: Nic, guests: Guests) -> None:
    vf = lab.set_numvfs(1)[0]
    before = appearance(lab, 0)
    made = start_still(guests, "killed", f"mode=veb,port=sriov,dev={vf.netdev},mac={MAC},vlan=42")
    assert lab.admin(0)["vlan"] == 42
    kill_all(made)
    wait_until(lambda: vf.netdev, "the VF's device is back")
    assert vnet_lock("gc").returncode == 0
    assert {**before, "ifindex": 0} == {**appearance(lab, 0), "ifindex": 0}
    assert owner_of(vf) is None


def test_a_guest_has_the_whole_nic_and_the_host_gets_it_back(lab: Nic, guests: Guests) -> None:
    looks = describe(lab.pf)
    made = start_still(guests, "whole", f"mode=private,port=physdev,dev={lab.pf},mac={MAC}")
    assert not Path(f"/sys/class/net/{lab.pf}").exists()
    assert vnet_lock("vfs", lab.pci, "2").returncode == 4
    kill_all(made)
    wait_until(lambda: lab.function.netdev, "the NIC's device is back")
    assert vnet_lock("gc").returncode == 0
    # A link takes its time after the device is up.
    wait_until(lambda: describe(lab.pf) == looks, f"{lab.pf} is as it was")
    again = start_still(guests, "again", f"mode=private,port=physdev,dev={lab.pf}")
    again.kill(signal.SIGTERM)
    again.wait(120)
    # A link takes its time after the device is up.
    wait_until(lambda: describe(lab.pf) == looks, f"{lab.pf} is as it was")


def test_a_whole_nic_is_refused_while_the_host_or_a_guest_uses_it(lab: Nic, guests: Guests) -> None:
    lab.set_address(f"{HOST}/24")
    made = start(guests, "host", f"mode=private,port=physdev,dev={lab.pf}")
    assert made.wait(120) == 4
    assert f"address {HOST}" in made.said
    run("ip", "address", "flush", "dev", lab.pf)
    vf = lab.set_numvfs(1)[0]
    first = start_still(guests, "first", f"mode=veb,port=sriov,dev={vf.netdev}")
    second = start(guests, "second", f"mode=private,port=physdev,dev={lab.pf}")
    assert second.wait(120) == 4
    assert '"first"' in second.said
    assert first.process.poll() is None


def describe(netdev: str) -> dict[str, str]:
    """What a guest could have changed of a NIC."""
    base = Path(f"/sys/class/net/{netdev}")
    return {name: (base / name).read_text().strip() for name in ("address", "mtu", "flags", "operstate")}
