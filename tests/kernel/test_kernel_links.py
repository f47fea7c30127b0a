"""netlink.py changes real links; what it did is seen through `ip`, not through our own reader."""

import json
import os
from collections.abc import Callable

import pytest

from tests.kernel.host import eventually
from vnet_lock.errors import BadInput, Unsupported, Vanished, VnetLockError
from vnet_lock.kernel import netlink
from vnet_lock.kernel.netns import call_in, make_namespace
from vnet_lock.kernel.vfs import set_vf
from vnet_lock.settings import DEFAULT

Ip = Callable[[str], str]
MAC = "52:54:00:00:00:07"
ALIAS = "vnet-lock:0123456789abcdef"


def show(ip: Ip, name: str) -> dict:
    return json.loads(ip(f"-j -d link show {name}"))[0]


def names(ip: Ip) -> set[str]:
    return {link["ifname"] for link in json.loads(ip("-j link"))}


@pytest.fixture
def lower(veth: tuple[str, str], macvtap_works: None) -> str:
    return veth[0]


@pytest.mark.parametrize("mode", ["vepa", "private", "bridge", "passthru"])
def test_a_macvtap_is_made_as_asked_and_down(lower: str, ip: Ip, mode: str):
    netlink.add_macvtap("vl0", lower, mode, MAC, ALIAS)
    link = show(ip, "vl0")
    assert link["address"] == MAC
    assert link["ifalias"] == ALIAS
    assert link["link"] == lower
    assert link["linkinfo"]["info_kind"] == "macvtap"
    assert link["linkinfo"]["info_data"]["mode"] == mode
    assert link["inet6_addr_gen_mode"] == "none"
    assert "ALLMULTI" in link["flags"]
    assert "UP" not in link["flags"]


def test_a_passthru_macvtap_and_its_lower_device_have_one_mac(lower: str, ip: Ip):
    netlink.add_macvtap("vl0", lower, "passthru", MAC, ALIAS)
    assert show(ip, lower)["address"] == MAC
    ip("link del vl0")
    own = "52:54:00:00:00:0A"
    netlink.set_link(lower, mac=own)
    netlink.add_macvtap("vl1", lower, "passthru", own, ALIAS)
    assert show(ip, "vl1")["address"] == show(ip, lower)["address"] == own.lower()


@pytest.mark.parametrize("mode", ["vepa", "private", "bridge", "passthru"])
def test_a_macvlan_is_made_in_another_namespace_and_goes_with_it(lower: str, ip: Ip, mode: str):
    namespace = make_namespace(DEFAULT)
    try:
        netlink.add_macvlan("vl0", lower, mode, MAC, ALIAS, namespace=namespace)
        link = call_in(namespace, lambda: show(ip, "vl0"))
        assert (link["address"], link["ifalias"]) == (MAC, ALIAS)
        assert link["linkinfo"]["info_kind"] == "macvlan"
        assert link["linkinfo"]["info_data"]["mode"] == mode
        assert link["inet6_addr_gen_mode"] == "none"
        assert "ALLMULTI" in link["flags"]
        assert names(ip) == {"lo", "v0", "v1"}
    finally:
        os.close(namespace)
    # Nothing else is on it any more.
    eventually(lambda: works(lambda: netlink.add_macvtap("vl1", lower, "passthru", MAC, ALIAS)))


def test_a_macvlan_that_cannot_be_made_says_so_by_its_own_name(lower: str, ip: Ip):
    netlink.add_macvtap("vl0", lower, "passthru", MAC, ALIAS)
    namespace = make_namespace(DEFAULT)
    try:
        with pytest.raises(VnetLockError, match=r"making macvlan vl1 .* failed: passthru"):
            netlink.add_macvlan("vl1", lower, "passthru", MAC, ALIAS, namespace=namespace)
        assert call_in(namespace, lambda: names(ip)) == {"lo"}
    finally:
        os.close(namespace)


def works(change: Callable[[], None]) -> bool:
    try:
        change()
    except VnetLockError:
        return False
    return True


def test_a_macvtap_is_removed_by_its_alias_once_it_was_renamed(lower: str, ip: Ip):
    netlink.add_macvtap("vl0", lower, "vepa", MAC, ALIAS)
    netlink.rename_link("vl0", "web0")
    assert "web0" in names(ip)
    assert netlink.remove_link("vl0", ALIAS)
    assert not netlink.remove_link("vl0", ALIAS)
    assert names(ip) == {"lo", "v0", "v1"}


def test_a_macvtap_is_removed_by_its_first_name_where_it_never_got_its_alias(lower: str, ip: Ip):
    ip(f"link add link {lower} name vl0 type macvtap")
    assert netlink.remove_link("vl0", ALIAS)
    assert not netlink.remove_link("vl0", ALIAS)
    assert "vl0" not in names(ip)


def test_a_link_that_only_has_the_final_name_is_not_ours(lower: str, ip: Ip):
    ip(f"link add link {lower} name web0 type macvtap")
    assert not netlink.remove_link("vl0", ALIAS)
    assert not netlink.remove_link("vl0", "")
    assert "web0" in names(ip)


def test_a_refused_macvtap_says_why_and_leaves_nothing(lower: str, ip: Ip):
    netlink.add_macvtap("vl0", lower, "vepa", MAC, ALIAS)
    before = names(ip)
    with pytest.raises(VnetLockError, match=r"passthru takes a device with no other macvtap"):
        netlink.add_macvtap("vl1", lower, "passthru", "52:54:00:00:00:08", "other")
    with pytest.raises(VnetLockError, match=r"there is a device of that name"):
        netlink.add_macvtap("vl0", lower, "vepa", "52:54:00:00:00:08", "other")
    with pytest.raises(BadInput, match="bridge, passthru, private, vepa"):
        netlink.add_macvtap("vl1", lower, "passthrough", MAC, "other")
    with pytest.raises(Vanished, match="nix0"):
        netlink.add_macvtap("vl1", "nix0", "vepa", MAC, "other")
    with pytest.raises(VnetLockError, match="ifalias"):
        netlink.add_macvtap("vl1", lower, "vepa", "52:54:00:00:00:08", "x" * 300)
    assert names(ip) == before


def test_the_port_of_a_bridge_takes_no_macvtap_and_the_other_way_round(
    lower: str, veth: tuple[str, str], ip: Ip
):
    ip("link add br0 type bridge")
    netlink.set_master(veth[1], "br0")
    with pytest.raises(VnetLockError, match="port of a bridge"):
        netlink.add_macvtap("vl0", veth[1], "vepa", MAC, ALIAS)
    netlink.add_macvtap("vl0", lower, "vepa", MAC, ALIAS)
    with pytest.raises(VnetLockError, match="a macvtap stands on it"):
        netlink.set_master(lower, "br0")
    with pytest.raises(Unsupported, match="neither a bridge nor a bond"):
        netlink.set_master("vl0", lower)
    netlink.set_master(veth[1], None)
    netlink.set_master(veth[1], None)
    assert "master" not in show(ip, veth[1])


def test_two_macvtaps_with_one_mac_are_refused_when_the_second_is_raised(lower: str):
    netlink.add_macvtap("vl0", lower, "vepa", MAC, ALIAS)
    netlink.set_link("vl0", up=True)
    netlink.add_macvtap("vl1", lower, "vepa", MAC, "other")
    with pytest.raises(VnetLockError, match=r"setting vl1 up failed: another device .* has its MAC"):
        netlink.set_link("vl1", up=True)


def test_a_link_is_changed_in_what_is_said_and_nothing_else(lower: str, ip: Ip):
    netlink.add_macvtap("vl0", lower, "vepa", MAC, ALIAS)
    netlink.set_link("vl0")
    assert show(ip, "vl0")["mtu"] == 1500
    netlink.set_link(
        "vl0", up=True, mtu=1400, mac="52:54:00:00:00:09", allmulticast=False, addrgenmode="eui64"
    )
    link = show(ip, "vl0")
    assert (link["mtu"], link["address"], link["inet6_addr_gen_mode"]) == (1400, "52:54:00:00:00:09", "eui64")
    assert "UP" in link["flags"]
    assert "ALLMULTI" not in link["flags"]
    netlink.set_link("vl0", up=False)
    netlink.set_link("vl0", up=False)
    assert "UP" not in show(ip, "vl0")["flags"]


def test_errors_of_a_link_name_it_and_the_cause(lower: str, ip: Ip):
    with pytest.raises(VnetLockError, match=f"MTU of {lower} to 10 failed: the device takes no such MTU"):
        netlink.set_link(lower, mtu=10)
    with pytest.raises(VnetLockError, match=f"MAC of {lower} .* takes no such MAC"):
        netlink.set_link(lower, mac="01:00:00:00:00:00")
    with pytest.raises(Vanished, match="nix0"):
        netlink.set_link("nix0", up=True)
    with pytest.raises(BadInput, match="addrgenmode"):
        netlink.set_link(lower, addrgenmode="off")
    with pytest.raises(VnetLockError, match="another device has that name"):
        netlink.rename_link(lower, "v1")
    with pytest.raises(BadInput):
        netlink.rename_link(lower, "a%d")
    with pytest.raises(Unsupported, match=f"VF 0 of {lower} .* has no such setting"):
        set_vf(lower, 0, mac=MAC)
    assert names(ip) == {"lo", "v0", "v1"}


@pytest.mark.parametrize("queues", [1, 4])
def test_a_tap_stays_until_it_is_removed(ip: Ip, queues: int):
    netlink.add_tap("vl0", ALIAS, queues=queues)
    link = show(ip, "vl0")
    assert link["ifalias"] == ALIAS
    assert link["linkinfo"]["info_data"]["persist"] is True
    assert link["linkinfo"]["info_data"]["multi_queue"] is (queues > 1)
    assert link["inet6_addr_gen_mode"] == "none"
    with pytest.raises(VnetLockError, match="there is a device of that name"):
        netlink.add_tap("vl0", "other")
    assert show(ip, "vl0")["ifalias"] == ALIAS
    assert netlink.remove_link("vl0", ALIAS)
    assert not netlink.remove_link("vl0", ALIAS)
    assert names(ip) == {"lo"}


def test_a_tap_becomes_the_port_of_a_bridge(ip: Ip):
    ip("link add br0 type bridge")
    netlink.add_tap("vl0", ALIAS)
    netlink.set_master("vl0", "br0")
    assert show(ip, "vl0")["master"] == "br0"
