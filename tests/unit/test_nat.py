"""NAT where it is pure: which bridge, which subnet, which rules; and programs that aren't there or fail."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from vnet_lock.backends import passt
from vnet_lock.combination import Backend, Policy, Port
from vnet_lock.errors import Unsupported, VnetLockError
from vnet_lock.journal import DhcpServer, NatTable, share_key
from vnet_lock.kernel import nftables, programs
from vnet_lock.model import Claims, Inventory, Nic
from vnet_lock.planning import plan
from vnet_lock.ports import bridge, socket
from vnet_lock.ports.nat import choose_subnet
from vnet_lock.request import Intent, Plan, Refusal
from vnet_lock.settings import Settings
from vnet_lock.situation import Situation

UP0 = Nic("up0", 5, "other", "52:54:00:00:00:05", 1500, up=True, addresses=("198.51.100.2", "2001:db8::2"))
BR0 = Nic("br0", 6, "bridge", "52:54:00:00:00:06", 1500, up=True)
SITUATION = Situation(
    Inventory(nics=(UP0, BR0)),
    Claims(),
    None,
    pid_of=lambda owner: None,
    is_own=lambda owner, pid: False,
    sources={Port.BRIDGE: bridge.candidates, Port.SOCKET: socket.candidates},
    programs=frozenset(("nft", "dnsmasq")),
)


def found(situation: Situation = SITUATION, **more: object) -> str:
    """The combination and its device, or what speaks against it."""
    intent = Intent("net0", **{"policy": Policy.NAT, **more})  # type: ignore[arg-type]
    result = plan([intent], situation)
    if isinstance(result, Refusal):
        return result.message
    assert isinstance(result, Plan)
    (one,) = result.assignments
    assert one.combination is not None
    return " ".join([one.combination.text, *(item.resource.text for item in one.wanted)])


BRIDGE = (Port.BRIDGE,)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "nat-socket-passt"),
        ({"dhcp": True}, "nat-socket-passt"),
        ({"backends": (Backend.USER,)}, "nat-socket-user"),
        ({"ports": BRIDGE}, "nat-bridge-tap+vhost nic:vlnat0"),
        ({"queues": 2}, "nat-bridge-tap+vhost nic:vlnat0"),
        ({"backends": (Backend.TAP,)}, "nat-bridge-tap nic:vlnat0"),
        ({"devs": ("up0",)}, "nat-bridge-tap+vhost nic:vlnat5 nic:up0"),
        ({"devs": ("br0", "up0")}, "nat-bridge-tap+vhost nic:vlnat5 nic:up0"),
        ({"policy": Policy.VEB, "ports": BRIDGE, "devs": ("lab0",)}, "veb-bridge-tap+vhost nic:lab0"),
        ({"policy": Policy.VEB, "ports": BRIDGE, "devs": ("lab0", "br0")}, "veb-bridge-tap+vhost nic:br0"),
    ],
)
def test_what_is_asked_for_is_what_is_made(more: dict[str, object], expected: str) -> None:
    assert found(**more) == expected


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"devs": ("br0",)}, "no way out: the host has no IPv4 address on it"),
        ({"devs": ("up0",), "ports": (Port.SOCKET,)}, "leave dev= out, or take port=bridge"),
        ({"ports": (Port.SOCKET,), "vlan": 7}, "a user network has no VLANs"),
        ({"ports": BRIDGE, "vlan": 7}, "has no VLANs; leave vlan= out"),
        ({"devs": ("nosuch0",)}, "there is no network device 'nosuch0' here"),
        ({"policy": Policy.VEB, "ports": BRIDGE, "devs": ("up0",)}, "up0 is no bridge"),
        ({"policy": Policy.VEB, "ports": BRIDGE, "devs": ("br0",), "vlan": 7}, "vlan_filtering 1"),
    ],
)
def test_what_cannot_be_had_is_said_with_the_next_step(more: dict[str, object], reason: str) -> None:
    assert reason in found(**more)


@pytest.mark.parametrize(
    ("there", "lacking"), [(("dnsmasq",), "apt install nftables"), (("nft",), "apt install dnsmasq-base")]
)
def test_a_program_that_is_not_installed_is_said_before_anything_is_made(
    there: tuple[str, ...], lacking: str
) -> None:
    situation = replace(SITUATION, programs=frozenset(there))
    assert lacking in found(situation, ports=BRIDGE, dhcp=True)


@pytest.mark.parametrize(
    ("nic", "reason"),
    [
        (replace(UP0, addresses=("2001:db8::2",)), "up with no IPv4 address"),
        (replace(UP0, addresses=(), up=False), "up0 is down"),
        (replace(UP0, master="br0"), "up0 is a port of br0; name that"),
    ],
)
def test_an_uplink_that_leads_nowhere_is_refused(nic: Nic, reason: str) -> None:
    assert reason in found(replace(SITUATION, inventory=Inventory(nics=(nic,))), devs=("up0",))


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([], "10.177.0.0/24"),
        ([("10.177.0.9", 24)], "10.177.1.0/24"),
        ([("10.177.255.255", 32)], "10.177.0.0/24"),
        ([("10.177.0.0", 16)], "172.30.0.0/24"),
        ([("10.0.0.0", 8), ("172.16.0.0", 12)], "192.168.0.0/24"),
        ([("0.0.0.0", 0), ("0.0.0.0", 1)], "10.177.0.0/24"),
    ],
)
def test_the_subnet_overlaps_nothing(taken: list[tuple[str, int]], expected: str) -> None:
    assert str(choose_subnet(taken)) == expected


def test_a_host_with_routes_to_all_private_networks_can_have_no_subnet() -> None:
    with pytest.raises(Unsupported, match="ip route"):
        choose_subnet([("10.0.0.0", 8), ("172.16.0.0", 12), ("192.168.0.0", 16)])


def test_servers_of_one_bridge_are_shared_as_the_very_process() -> None:
    assert share_key(DhcpServer("vlnat0", 7, 9)) == share_key(DhcpServer("vlnat0", 7, 9))
    assert share_key(DhcpServer("vlnat0", 7, 9)) != share_key(DhcpServer("vlnat0", 7, 10))
    assert share_key(NatTable("vlnat0")) != share_key(NatTable("vlnat5"))


# --- programs -------------------------------------------------------------------------------------


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all there is in PATH; root's own folders count as empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    real = os.path.isfile
    monkeypatch.setattr(
        programs.os.path, "isfile", lambda path: str(path).startswith(str(tmp_path)) and real(path)
    )
    return tmp_path


def put(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_table_is_made_in_one_transaction_and_removed_in_one(only: Path) -> None:
    put(only, "nft", f'echo "$*" >>{only}/args; /bin/cat >>{only}/text')
    nftables.make_table("vlnat5", "10.177.0.0/24", "up0")
    text = (only / "text").read_text()
    assert text.startswith("table inet vnet_lock_vlnat5\ndelete table inet vnet_lock_vlnat5\ntable inet ")
    assert 'ip saddr 10.177.0.0/24 oifname "up0" masquerade' in text
    nftables.remove_table("vlnat5")
    assert (only / "args").read_text() == "-f -\n-f -\n"


@pytest.mark.parametrize("name", ['a"b', "eth*", "a;b", "a\\b", "a{b"])
def test_a_device_whose_name_would_be_more_than_a_name_to_nft_is_refused(only: Path, name: str) -> None:
    put(only, "nft", "exit 0")
    with pytest.raises(Unsupported, match="can't be named"):
        nftables.make_table("vlnat5", "10.177.0.0/24", name)


def test_a_program_that_fails_is_quoted_in_one_line(only: Path) -> None:
    put(only, "nft", 'echo "/dev/stdin:1:1-5: Error: syntax error" >&2; echo "table x" >&2; exit 1')
    with pytest.raises(VnetLockError, match=r"^nft failed: .*syntax error$"):
        nftables.remove_table("vlnat5")


def test_passt_is_passed_over_with_its_own_words(only: Path) -> None:
    assert passt.missing(Settings()) == "passt isn't installed; run: apt install passt"
    put(only, "passt", 'echo "Failed to send 9 bytes to syslog" >&2; echo "No route" >&2; exit 1')
    assert passt.missing(Settings()) == "passt failed: No route"
