"""A VLAN below macvlan ports: tagged on the wire, not in the guest, shared, and gone with the last guest.

The lower device is a veth of the VM: the machine that runs the kernel ring may have no 8021q.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.lab.contenders import HOST
from tests.lab.machines import Guests, PlainGuest
from tests.lab.nic import run, wait_until
from vnet_lock.combination import Backend, Policy, Port
from vnet_lock.errors import Unsupported, VnetLockError
from vnet_lock.kernel.processes import read_boot_id, this_process
from vnet_lock.model import Owner, OwnerKind
from vnet_lock.request import Intent
from vnet_lock.session import Session
from vnet_lock.settings import DEFAULT
from vnet_lock.undo import undo

# include/uapi/linux/if_packet.h
SOL_PACKET, PACKET_AUXDATA = 263, 8
_AUXDATA = struct.Struct("=IIIHHHH")
TP_STATUS_VLAN_VALID = 1 << 4


@pytest.fixture
def wire() -> Iterator[str]:
    """up0, the device of a wire whose other end is peer0; nothing but these is left of a test."""
    before = set(os.listdir("/sys/class/net"))
    run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "peer0")
    run("ip", "link", "set", "up0", "up")
    run("ip", "link", "set", "peer0", "up")
    ours = set(os.listdir("/sys/class/net"))
    yield "up0"
    left = set(os.listdir("/sys/class/net")) - ours
    run("ip", "link", "delete", "up0")
    assert not left
    assert set(os.listdir("/sys/class/net")) == before
    assert os.listdir(DEFAULT.claims_dir) == []


def own_name(lower: str, vlan: int) -> str:
    return f"vl{Path(f'/sys/class/net/{lower}/ifindex').read_text().strip()}.{vlan}"


def link(name: str) -> dict[str, object]:
    return json.loads(run("ip", "-json", "-details", "link", "show", "dev", name).stdout)[0]


def owner(name: str) -> Owner:
    """Guests that live as long as this test, each with a name of its own to libvirt."""
    return Owner(
        OwnerKind.LIBVIRT, name, read_boot_id(DEFAULT), uuid=f"uuid-{name}", process=this_process(DEFAULT)
    )


def want(vlan: int = 42, policy: Policy = Policy.VEB) -> Intent:
    return Intent("net0", policy, ("up0",), (Port.MACVLAN,), (Backend.TAP,), vlan=vlan)


def test_guests_of_one_vlan_share_a_device_that_goes_with_the_last(wire: str) -> None:
    session, name = Session(DEFAULT), own_name(wire, 42)
    for guest in ("a", "b"):
        session.acquire(owner(guest), [want()])
    session.acquire(owner("c"), [want(43)])
    made = link(name)
    assert (made["link"], made["ifalias"]) == (wire, f"vnet-lock:shared:{name}")
    assert made["linkinfo"]["info_data"]["id"] == 42  # type: ignore[index]
    assert made["inet6_addr_gen_mode"] == "none"
    assert "UP" in made["flags"]  # type: ignore[operator]
    assert len([upper for upper in os.listdir(f"/sys/class/net/{name}") if upper.startswith("upper_")]) == 2
    session.release(owner("a"))
    session.release(owner("a"))
    assert link(name)["ifindex"] == made["ifindex"]
    (claim,) = [one for one in session.table.read().of(owner("b")) if one.journal]
    session.release(owner("b"))
    assert not Path(f"/sys/class/net/{name}").exists()
    for _ in range(2):
        assert undo(DEFAULT, claim) == []
    session.release(owner("c"))


def test_a_vlan_device_that_is_there_is_used_and_never_removed(wire: str) -> None:
    run("ip", "link", "add", "link", wire, "name", "lan42", "type", "vlan", "id", "42")
    session = Session(DEFAULT)
    try:
        with pytest.raises(Unsupported, match="ip link set lan42 up"):
            session.acquire(owner("a"), [want()])
        run("ip", "link", "set", "lan42", "up")
        session.acquire(owner("a"), [want()])
        assert {claim.resource.text for claim in session.table.read().records} == {"nic:lan42", "nic:up0"}
        assert not Path(f"/sys/class/net/{own_name(wire, 42)}").exists()
        session.release(owner("a"))
        assert "UP" in link("lan42")["flags"]  # type: ignore[operator]
    finally:
        run("ip", "link", "delete", "lan42")


def test_who_died_while_he_made_the_device_is_no_obstacle(wire: str) -> None:
    """Killed behind its journal, or behind the first half of the making: the next guest goes on."""
    name = own_name(wire, 42)
    for stop in ("_finish", "rename_link"):
        script = (
            "import os\n"
            "from vnet_lock.kernel import netlink\n"
            f"netlink.{stop} = lambda *words, **more: os.kill(os.getpid(), 9)\n"
            "from tests.lab.test_vlan import owner, want\n"
            "from vnet_lock.session import Session\n"
            "Session().acquire(owner('dead'), [want()])\n"
        )
        done = subprocess.run(["python", "-c", script], check=False, timeout=300)
        assert done.returncode == -signal.SIGKILL
        session = Session(DEFAULT)
        session.acquire(owner("b"), [want()])
        assert link(name)["linkinfo"]["info_data"]["id"] == 42  # type: ignore[index]
        session.heal()
        assert "UP" in link(name)["flags"]  # type: ignore[operator]
        session.release(owner("b"))
        assert not Path(f"/sys/class/net/{name}").exists()


def test_what_fails_behind_the_vlan_device_takes_it_back(wire: str) -> None:
    session = Session(DEFAULT)
    with pytest.raises(VnetLockError):
        session.acquire(owner("a"), [Intent("net0", Policy.VEB, (wire,), (Port.MACVLAN,), (Backend.TAP,),
                                            vlan=42, ifname="peer0")])  # fmt: skip
    assert not Path(f"/sys/class/net/{own_name(wire, 42)}").exists()


@pytest.mark.parametrize("port", ["macvlan", "bridge"])
def test_two_guests_talk_in_their_vlan_tagged_on_the_wire(wire: str, guests: Guests, port: str) -> None:
    lower = wire
    if port == "bridge":
        lower = "br42"
        run("ip", "link", "add", lower, "type", "bridge", "vlan_filtering", "1", "forward_delay", "0")
        run("ip", "link", "set", wire, "master", lower)
        run("bridge", "vlan", "add", "dev", wire, "vid", "42")
        run("ip", "link", "set", lower, "up")
    run("ip", "link", "add", "link", "peer0", "name", "peer0.42", "type", "vlan", "id", "42")
    run("ip", "address", "add", f"{HOST}/24", "dev", "peer0.42")
    run("ip", "link", "set", "peer0.42", "up")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        tap.bind(("peer0", 3))
        tap.settimeout(0.5)
        first = start(guests, "first", "10.7.0.2", HOST, port, lower)
        assert first.console.ready()["ping"] == "3/3"
        tags = tags_of(tap, "52:54:00:00:42:02")
    assert tags == {42}
    second = start(guests, "second", "10.7.0.3", "10.7.0.2", port, lower)
    assert second.console.ready()["ping"] == "3/3"
    name = own_name(wire, 42)
    assert Path(f"/sys/class/net/{name}").exists() == (port == "macvlan")
    end(first)
    assert second.console.ask(f"ping {HOST}")["ping"] == "3/3"
    end(second)
    assert not Path(f"/sys/class/net/{name}").exists()
    run("ip", "link", "delete", "peer0.42")
    if port == "bridge":
        assert not list(Path(f"/sys/class/net/{lower}").glob("lower_tap*"))
        run("ip", "link", "delete", lower)


def start(guests: Guests, name: str, address: str, target: str, port: str, lower: str) -> PlainGuest:
    network = f"host,id=net0,mode=veb,port={port},dev={lower},vlan=42,protocols=tap"
    device = f"virtio-net-pci,netdev=net0,mac=52:54:00:00:42:0{address[-1]},romfile="
    return guests.qemu(
        name, ["-netdev", network, "-device", device], program=["vnet-qemu"], ip=f"{address}/24", ping=target
    )


def end(guest: PlainGuest) -> None:
    guest.kill(signal.SIGTERM)
    guest.wait(120)
    wait_until(lambda: guest.process.poll() is not None, f"{guest.name} is gone")


def tags_of(tap: socket.socket, mac: str) -> set[int | None]:
    """The VLANs of the frames from a MAC that a packet socket has received; None for one without a tag."""
    found: set[int | None] = set()
    with suppress(TimeoutError):
        while True:
            frame, ancillary, _, _ = tap.recvmsg(2048, socket.CMSG_SPACE(_AUXDATA.size))
            if frame[6:12].hex(":") != mac:
                continue
            fields = next(_AUXDATA.unpack(data[: _AUXDATA.size]) for level, kind, data in ancillary
                          if (level, kind) == (SOL_PACKET, PACKET_AUXDATA))  # fmt: skip
            found.add(fields[5] & 0xFFF if fields[0] & TP_STATUS_VLAN_VALID else None)
    return found
