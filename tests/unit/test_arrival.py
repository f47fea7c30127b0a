"""A guest that comes to this host: what it gets is reserved, and its XML names what this host has."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_host import FakeHost, build
from vnet_lock.claims import ClaimTable
from vnet_lock.domain_xml import read_guest
from vnet_lock.errors import BadInput, Refused
from vnet_lock.front.arrival import receive
from vnet_lock.front.hook import Call, perform
from vnet_lock.front.libvirt_guest import read_owner
from vnet_lock.model import Owner, State
from vnet_lock.request import Fixed
from vnet_lock.session import Session

DAEMON = 4711
PF, VF0, VF1 = "0000:01:00.0", "0000:01:10.0", "0000:01:10.2"
UUIDS = {"a": "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a0a", "b": "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a0b"}
MAC = "52:54:00:00:00:01"
# As it was on another host.
HOSTDEV = (
    f"<interface type='hostdev' managed='yes'><mac address='{MAC}'/><source><address type='pci'"
    " domain='0x0000' bus='0xaf' slot='0x06' function='0x2'/></source><alias name='ua-net0'/></interface>"
)
DIRECT = (
    f"<interface type='direct'><mac address='{MAC}'/><source dev='ens9f0v3' mode='passthrough'/>"
    "<model type='virtio'/><alias name='ua-net0'/></interface>"
)
LATE = (
    f"<interface type='ethernet'><mac address='{MAC}'/><target dev='web-net0' managed='no'/>"
    "<model type='virtio'/><alias name='ua-net0'/></interface>"
)


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """Two free VFs with network devices, libvirt's daemon, and the process of this test."""
    host = FakeHost(tmp_path)
    host.pf(PF, vfs=(VF0, VF1), driver="igb", netdev="enp1s0")
    for number, vf in enumerate((VF0, VF1)):
        host.vf(vf, PF, driver="igbvf", netdev=f"enp1s0v{number}", group=number)
    host.process(DAEMON, "libvirtd")
    host.process(os.getpid(), "python")
    return host


def guest(name: str, interface: str, words: str = "policy='veb' port='sriov' dev='enp1s0'") -> bytes:
    return (
        f"<domain><name>{name}</name><uuid>{UUIDS[name]}</uuid><!-- mine --><metadata>"
        f"<v:guest xmlns:v='urn:vnet-lock:guest:1'><v:interface alias='ua-net0' {words}/></v:guest>"
        f"</metadata><devices>{interface}</devices></domain>"
    ).encode()


def owner(host: FakeHost, name: str) -> Owner:
    return read_owner(host.settings, name, UUIDS[name], DAEMON)


def arrive(host: FakeHost, name: str, xml: bytes) -> bytes:
    return receive(Session(host.settings), xml, owner(host, name), "migrate")


def held(host: FakeHost) -> dict[str, tuple[str, State]]:
    claims = ClaimTable(host.settings).read().records
    return {claim.resource.name: (claim.owner.name, claim.state) for claim in claims}


def test_a_vf_that_libvirt_opens_is_another_here(host: FakeHost) -> None:
    words = "policy='veb' port='sriov' dev='enp1s0' backends='vfio'"
    written = arrive(host, "a", guest("a", HOSTDEV, words))
    assert b"bus='0x01' slot='0x10' function='0x0'" in written
    assert b"<!-- mine -->" in written
    assert held(host)[VF0] == ("a", State.RESERVED)
    # What prepare will claim is what was reserved.
    (request,) = read_guest(written).requests
    assert isinstance(request, Fixed)
    assert str(request.device) == VF0
    other = arrive(host, "b", guest("b", HOSTDEV.replace("00:01'/>", "00:02'/>"), words))
    assert b"bus='0x01' slot='0x10' function='0x2'" in other
    assert held(host)[VF1] == ("b", State.RESERVED)


def test_a_macvtap_that_libvirt_makes_stands_on_another_device_here(host: FakeHost) -> None:
    written = arrive(host, "a", guest("a", DIRECT))
    assert b"<source dev='enp1s0v0' mode='passthrough'/>" in written
    assert held(host) == {VF0: ("a", State.RESERVED)}


def test_what_the_hook_makes_needs_no_other_name(host: FakeHost) -> None:
    assert arrive(host, "a", guest("a", LATE)) == b""
    assert held(host) == {VF0: ("a", State.RESERVED)}


def test_a_link_whose_name_is_anothers_here_has_another(host: FakeHost) -> None:
    host.nic("web-net0")
    written = arrive(host, "a", guest("a", LATE))
    assert b"dev='a-net0'" in written
    assert b"managed='no'" in written
    host.nic("a-net0")
    assert b"<target dev='g" in arrive(host, "a", guest("a", LATE))


@pytest.mark.parametrize("words", ["policy='veb' pool='blue'", "policy='veb'"])
@pytest.mark.parametrize("interface", [LATE, DIRECT])
def test_a_pool_and_a_default_are_this_hosts(host: FakeHost, words: str, interface: str) -> None:
    config = Path(host.settings.config_path)
    config.parent.mkdir(parents=True)
    config.write_text('[pools.blue]\npf = ["enp1s0"]\nvfs = "1"\n[defaults.veb]\npool = "blue"\n')
    config.chmod(0o644)
    arrive(host, "a", guest("a", interface, words))
    assert held(host) == {VF1: ("a", State.RESERVED)}


def test_a_guest_that_has_nothing_but_a_bridge_gets_that_of_this_host(host: FakeHost) -> None:
    host.nic("br-here", uevent="DEVTYPE=bridge\nINTERFACE=br-here\n")
    build(host.root, {"sys/class/net/br-here/bridge/": ""})
    bridge = LATE.replace("ethernet", "bridge").replace("managed='no'", "")
    xml = guest(
        "a", bridge.replace("<target", "<source bridge='br-there'/><target"), "policy='veb' dev='br-here'"
    )
    assert b"<source bridge='br-here'/>" in perform(Call(host.settings, DAEMON, "a", "migrate", xml), Session)


def test_what_this_host_cannot_give_in_the_same_form_is_refused_and_leaves_nothing(host: FakeHost) -> None:
    for vf in (VF0, VF1):
        arrive(host, "b", guest("b", LATE, f"policy='veb' port='sriov' dev='{vf}'"))
        with pytest.raises(Refused, match="held by guest"):
            arrive(host, "a", guest("a", DIRECT, f"policy='veb' port='sriov' dev='{vf}'"))
        assert held(host) == {vf: ("b", State.RESERVED)}
    with pytest.raises(BadInput, match="enp9s0"):
        arrive(host, "a", guest("a", DIRECT, "policy='veb' port='sriov' dev='enp9s0'"))


def test_a_guest_that_asks_for_nothing_reserves_what_its_xml_names(host: FakeHost) -> None:
    xml = guest("a", DIRECT.replace("ens9f0v3", "enp1s0v1"))
    xml = xml.replace(b"urn:vnet-lock:guest:1", b"urn:other")
    assert arrive(host, "a", xml) == b""
    assert held(host) == {VF1: ("a", State.RESERVED)}


def test_a_reservation_can_be_made_again_and_is_one(host: FakeHost) -> None:
    arrive(host, "a", guest("a", DIRECT))
    before = ClaimTable(host.settings).read().records
    arrive(host, "a", guest("a", DIRECT))
    after = ClaimTable(host.settings).read().records
    assert [replace(claim, token="", since=0, reservation=None) for claim in before] == [
        replace(claim, token="", since=0, reservation=None) for claim in after
    ]
