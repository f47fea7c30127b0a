"""What is observed on real links, held against iproute2 and against what the test itself did."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.kernel.conftest import need, own_namespaces
from vnet_lock.errors import Vanished
from vnet_lock.kernel import eswitch, namespaces, netlink, nodes, rtnetlink
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import Resource, UseKind, User
from vnet_lock.settings import DEFAULT

Ip = Callable[[str], str]


def users(name: str, *devices: str) -> tuple[User, ...]:
    return read_inventory(DEFAULT, devices or None).users_of(Resource.nic(name))


def test_links_are_what_ip_says(veth: tuple[str, str], macvtap_works: None, ip: Ip):
    ip("link add br0 type bridge")
    ip(f"link set {veth[1]} master br0")
    ip(f"link add link {veth[0]} name mt0 type macvtap mode vepa")
    ip(f"link add link {veth[0]} name mv0 address 52:54:00:00:00:01 type macvlan mode private")
    ip("link set mv0 mtu 1300")
    ip("link set mt0 alias some.words")
    told = {link["ifname"]: link for link in json.loads(ip("-j -d link"))}
    links = {link.name: link for link in rtnetlink.read_links()}
    nics = {nic.netdev: nic for nic in read_inventory(DEFAULT).nics}
    assert links.keys() == nics.keys() == told.keys()
    for name, expected in told.items():
        kind = expected.get("linkinfo", {}).get("info_kind", "")
        assert links[name].ifindex == nics[name].ifindex == expected["ifindex"]
        assert links[name].kind == kind
        assert nics[name].kind == (kind if kind not in ("", "veth") else "other")
        assert nics[name].mac == expected["address"]
        assert nics[name].mtu == expected["mtu"]
        assert nics[name].up == ("UP" in expected["flags"])
        assert nics[name].master == expected.get("master")
        assert links[name].alias == expected.get("ifalias", "")
    assert nics["v0"].uppers == ("mt0", "mv0")
    assert nics["mt0"].lowers == ("v0",)
    assert nics["br0"].lowers == ("v1",)


def test_many_links_come_in_several_parts_and_all_of_them_come(netns: None, ip: Ip):
    for number in range(60):
        ip(f"link add p{number} type veth peer name q{number}")
    assert len(rtnetlink.read_links()) == 121


def test_addresses_are_what_ip_says_but_for_link_local_ones(veth: tuple[str, str], ip: Ip):
    ip("addr add 10.9.0.1/24 dev v0")
    ip("addr add 10.9.0.2 peer 10.9.0.77 dev v0")
    ip("addr add fd00:9::1/64 dev v1 nodad")
    ip("addr add 169.254.1.1/16 dev lo")
    expected = {}
    for link in json.loads(ip("-j addr")):
        found = [
            item["local"]
            for item in link["addr_info"]
            if (item["family"], item["scope"]) != ("inet6", "link")
        ]
        if found:
            expected[link["ifindex"]] = tuple(found)
    told = rtnetlink.read_addresses()
    assert {index: sorted(found) for index, found in told.items()} == {
        index: sorted(found) for index, found in expected.items()
    }


def test_a_device_without_vfs_or_embedded_switch_has_none(veth: tuple[str, str]):
    assert rtnetlink.read_vf_admin("v0") == {}
    assert eswitch.read_modes() == {}
    with pytest.raises(Vanished, match="nix0"):
        rtnetlink.read_vf_admin("nix0")


def test_a_device_with_an_address_is_in_use_and_one_that_is_up_is_not(veth: tuple[str, str], ip: Ip):
    assert users("v0") == ()
    ip("addr add 10.9.0.1/24 dev v0")
    assert users("v0") == (User(None, "host", "address 10.9.0.1 on v0", UseKind.ADDRESS),)
    assert users("v0", "v0") == users("v0")
    ip("link set v0 down")
    assert users("v0") == ()


def test_a_macvtap_is_a_use_and_names_the_process_behind_it(veth: tuple[str, str], macvtap_works: None):
    netlink.add_macvtap("web0", "v0", "vepa", "52:54:00:00:00:07", "vnet-lock:0123456789abcdef")
    how = 'macvtap "web0" on it'
    assert users("v0") == (User(None, "", how, UseKind.UPPER, "web0", "0123456789abcdef"),)
    descriptors = nodes.open_macvtap(DEFAULT, "web0")
    try:
        (user,) = users("v0")
    finally:
        os.close(descriptors[0])
    assert (user.pid, user.how, user.mark) == (os.getpid(), how, "0123456789abcdef")


def test_a_bridge_above_is_a_use(veth: tuple[str, str], ip: Ip):
    ip("link add br0 type bridge")
    ip("link set v1 master br0")
    assert users("v1") == (User(None, "", 'port of bridge "br0"', UseKind.UPPER, "br0"),)


def test_a_packet_socket_is_a_use_and_names_its_process(veth: tuple[str, str]):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3) as wire:
        wire.bind(("v0", 3))
        (user,) = users("v0")
    assert (user.pid, user.how, user.kind) == (os.getpid(), "packet socket on v0", UseKind.SOCKET)
    assert users("v0") == ()


def test_another_namespaces_links_are_read_without_leaving_our_own(veth: tuple[str, str], ip: Ip):
    before = os.stat("/proc/thread-self/ns/net").st_ino
    ip("netns add blue")
    ip("link set v1 netns blue")
    (blue,) = [item for item in namespaces.iterate_namespaces(DEFAULT) if item.name == "blue"]
    assert blue.pid is None
    route = namespaces._open_in(blue)
    assert route is not None
    with route:
        assert {link.name for link in rtnetlink.read_links(route)} == {"lo", "v1"}
    assert {link.name for link in rtnetlink.read_links()} == {"lo", "v0"}
    assert os.stat("/proc/thread-self/ns/net").st_ino == before


def test_a_namespace_with_a_process_is_known_by_its_pid(netns: None):
    command = ["unshare", "-n", "sh", "-c", "echo; read line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in [item.pid for item in namespaces.iterate_namespaces(DEFAULT)]
        child.kill()


def test_a_namespace_that_went_away_is_passed_over(netns: None):
    assert namespaces._open_in(namespaces.Namespace("/run/netns/nix", None)) is None
    assert namespaces._open_in(namespaces.Namespace("/dev/null", None)) is None


def test_a_macvlan_that_was_moved_to_another_namespace_is_still_a_use(
    veth: tuple[str, str], macvtap_works: None, ip: Ip
):
    ip("netns add blue")
    ip("netns add red")
    ip("link add link v0 name mv0 type macvlan mode bridge")
    ip("link set mv0 netns blue")
    # A veth's other end has our ifindex in its IFLA_LINK, too; it stands on nothing.
    ip("link set v1 netns red")
    how = 'macvlan "mv0" on it, in network namespace "blue"'
    assert users("v0") == (User(None, "", how, UseKind.UPPER, "mv0"),)
    ip("netns del blue")
    deadline = time.monotonic() + 5
    while users("v0") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert users("v0") == ()


def test_a_function_whose_network_device_is_in_another_namespace_is_in_use_there():
    need(os.geteuid() == 0, "root")
    outside = [pf for pf in read_inventory(DEFAULT).pfs if pf.netdev]
    need(outside, "a PCI network device on this machine")
    with own_namespaces():
        for pf in outside:
            found = read_inventory(DEFAULT, [pf.pci.text]).users_of(pf.resource)
            assert [user.kind for user in found] == [UseKind.NAMESPACE]
            assert found[0].how.startswith(f"{pf.netdev} is in the network namespace of pid")
            assert found[0].pid is not None


def test_a_device_that_comes_and_goes_while_it_is_read_is_there_or_not(veth: tuple[str, str]):
    script = "while ip link add c0 type veth peer name c1 && ip link del c0; do :; done"
    with subprocess.Popen(["sh", "-c", script]) as child:
        try:
            deadline = time.monotonic() + 2
            seen = set()
            while time.monotonic() < deadline:
                inventory = read_inventory(DEFAULT)
                assert inventory.nic_named("v0") is not None
                seen.add(inventory.nic_named("c0") is not None)
        finally:
            child.kill()
    assert seen == {True, False}
