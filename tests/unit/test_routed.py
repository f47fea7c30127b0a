"""Routed guests: which uplinks can serve, who has an address already, and what a host's forwarding needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.test_planning import DB, claim, decide, host, nic, planned, refused
from vnet_lock.combination import Backend, Policy, Port
from vnet_lock.errors import Unsupported
from vnet_lock.journal import Entry, Sysctls
from vnet_lock.model import Mode, Resource, UseKind, User, Wanted, parse_guest_address
from vnet_lock.ports import forwarding
from vnet_lock.request import Intent, RefusalKind
from vnet_lock.settings import Settings

GUEST = Intent(
    "net0", Policy.ROUTE, ("eth0",), backends=(Backend.TAP,), addresses=("192.0.2.7", "2001:db8::7")
)
HOST = host(nics=(nic("eth0"), nic("down0", up=False), nic("port0", master="br0"), nic("br0", kind="bridge")))


# --- who gets an address --------------------------------------------------------------------------


def test_a_routed_guest_claims_its_addresses_beside_its_uplink() -> None:
    result = decide(HOST, GUEST)
    assert planned(result) == [("route-none-tap", "nic:eth0")]
    assert result.assignments[0].wanted == (  # type: ignore[union-attr]
        Wanted(Resource.nic("eth0"), Mode.SHARED),
        Wanted(Resource.ip("192.0.2.7"), Mode.EXCLUSIVE),
        Wanted(Resource.ip("2001:db8::7"), Mode.EXCLUSIVE),
    )


def test_an_address_that_another_guest_has_is_refused_on_every_uplink_and_port() -> None:
    other = claim(DB, Resource.ip("2001:db8::7"))
    two = replace(GUEST, devs=("eth0", "br0"))
    assert refused(decide(HOST, two, claims=(other,))).startswith(
        'net0: address 2001:db8::7 is held by guest "db" (pid 4711)'
    )


def test_an_address_of_the_host_itself_is_refused() -> None:
    user = User(None, "host", "an address of its own", UseKind.ADDRESS)
    result = decide(replace(HOST, users={Resource.ip("192.0.2.7"): (user,)}), GUEST)
    assert "address 192.0.2.7 is in use without a claim by host: an address of its own" in refused(result)


def test_two_interfaces_of_one_guest_cannot_have_one_address() -> None:
    second = replace(GUEST, interface="net1", addresses=("192.0.2.7",))
    said = refused(decide(HOST, GUEST, second), RefusalKind.IMPOSSIBLE)
    assert "another interface of this guest has it" in said


@pytest.mark.parametrize(
    ("dev", "more", "said"),
    [
        ("down0", {}, "down0 is down; run: ip link set down0 up"),
        ("port0", {}, "port0 is a port of br0, which has its addresses; name br0"),
        ("eth0", {"vlan": 7}, "a routed guest has no VLAN"),
        ("eth0", {"addresses": ()}, "a route needs the guest's own address"),
    ],
)
@pytest.mark.parametrize("port", [Port.NONE, Port.VETH_MACVLAN])
def test_an_uplink_that_cannot_serve_says_why(
    port: Port, dev: str, more: dict[str, object], said: str
) -> None:
    wanted = replace(GUEST, devs=(dev,), ports=(port,), **more)  # type: ignore[arg-type]
    assert said in refused(decide(HOST, wanted), RefusalKind.IMPOSSIBLE)


def test_a_bridge_is_an_uplink() -> None:
    assert planned(decide(HOST, replace(GUEST, devs=("br0",)))) == [("route-none-tap", "nic:br0")]


@pytest.mark.parametrize("text", ["2001:db8::7", "192.0.2.7"])
def test_the_resource_of_an_address_is_read_as_it_is_written(text: str) -> None:
    assert Resource.parse(f"ip:{text}") == Resource.ip(text)
    assert Resource.ip(text).pci is None


@pytest.mark.parametrize(
    "text", ["", "192.0.2", "0.0.0.0", "127.0.0.1", "224.0.0.1", "::", "::1", "ff02::1", "fe80::1%eth0"]
)
def test_what_no_guest_can_have_is_no_guests_address(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        parse_guest_address(text)


# --- forwarding -----------------------------------------------------------------------------------


def conf(tmp_path: Path, **devices: tuple[str, str]) -> Settings:
    """A host whose devices have these IPv6 settings: forwarding and accept_ra."""
    for name, (forward, accept_ra) in {"all": ("0", "1"), "default": ("0", "1"), **devices}.items():
        folder = tmp_path / "proc/sys/net/ipv6/conf" / name
        folder.mkdir(parents=True)
        (folder / "forwarding").write_text(forward + "\n")
        (folder / "accept_ra").write_text(accept_ra + "\n")
    return Settings.under(tmp_path)


def settings_of(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "proc/sys/net/ipv6/conf"
    return {str(path.relative_to(folder)): path.read_text().strip() for path in folder.rglob("*/*")}


def test_devices_that_listen_to_routers_do_so_still_before_the_host_forwards(tmp_path: Path) -> None:
    settings = conf(tmp_path, eth0=("0", "1"), eth1=("0", "0"), eth2=("1", "1"), eth3=("0", "2"))
    shared: list[tuple[Entry, dict[str, str]]] = []

    def share(entry: Entry) -> Entry:
        shared.append((entry, settings_of(tmp_path)))
        return entry

    before = settings_of(tmp_path)
    forwarding.forward_ipv6(settings, share, "eth1")
    entry = Sysctls("net/ipv6/conf", "all/forwarding=0 eth2/forwarding=1 eth0/accept_ra=1")
    assert shared == [(entry, before)]
    after = settings_of(tmp_path)
    changed = {name: value for name, value in after.items() if value != before[name]}
    # On a real host "all" sets the rest.
    assert changed == {"all/forwarding": "1", "eth0/accept_ra": "2"}


def test_a_host_that_forwards_already_is_left_as_it_is(tmp_path: Path) -> None:
    settings = conf(tmp_path, all=("1", "1"), eth0=("1", "1"))
    before = settings_of(tmp_path)
    shared: list[Entry] = []
    forwarding.forward_ipv6(settings, lambda entry: shared.append(entry) or entry, "eth0")
    assert shared == [Sysctls("net/ipv6/conf", "all/forwarding=1")]
    assert settings_of(tmp_path) == before


def test_a_device_that_was_taken_out_of_forwarding_is_said(tmp_path: Path) -> None:
    settings = conf(tmp_path, all=("1", "1"), eth0=("0", "1"))
    with pytest.raises(Unsupported, match="run: sysctl net/ipv6/conf/eth0/forwarding=1"):
        forwarding.forward_ipv6(settings, lambda entry: entry, "eth0")


def test_a_kernel_without_ipv6_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no IPv6"):
        forwarding.forward_ipv6(Settings.under(tmp_path), lambda entry: entry, "eth0")
