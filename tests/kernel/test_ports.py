"""Ports on real links: what is made, that each undo may run twice, and that nothing stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vnet_lock.administration import Administration
from vnet_lock.combination import Policy, Port
from vnet_lock.errors import Refused, Unsupported, VnetLockError
from vnet_lock.front.libvirt_guest import find_tokens
from vnet_lock.kernel.netns import call_in, make_namespace
from vnet_lock.kernel.processes import read_boot_id, this_process
from vnet_lock.model import Claim, Owner, OwnerKind, Process, Resource
from vnet_lock.ports import Job
from vnet_lock.ports.macvtap import open_macvlan
from vnet_lock.request import Fixed, Form, Intent
from vnet_lock.session import Session
from vnet_lock.settings import DEFAULT
from vnet_lock.undo import undo

MAC = "52:54:00:0c:0d:0e"


@pytest.fixture
def session(ip: Callable[[str], str], macvtap_works: None) -> Iterator[Session]:
    """A session on a host with up0, a device of a wire, and br0, a bridge."""
    del macvtap_works
    for words in ("up0 type veth peer name peer0", "br0 type bridge"):
        ip(f"link add {words}")
    for name in ("up0", "peer0", "br0"):
        ip(f"link set {name} up")
    before = set(os.listdir("/sys/class/net"))
    yield Session(DEFAULT)
    assert set(os.listdir("/sys/class/net")) == before
    assert os.listdir(DEFAULT.claims_dir) == []


def me() -> Owner:
    return Owner(OwnerKind.QEMU, "me", read_boot_id(DEFAULT), process=this_process(DEFAULT))


def want(policy: Policy, port: Port, dev: str, **more: object) -> Intent:
    return Intent("net0", policy, (dev,), (port,), **more)  # type: ignore[arg-type]


def link(ip: Callable[[str], str], name: str) -> dict[str, object]:
    return json.loads(ip(f"-json -details link show dev {name}"))[0]


def only_claim(session: Session) -> Claim:
    (claim,) = session.table.read().records
    return claim


@pytest.mark.parametrize(
    ("policy", "mode"), [(Policy.VEB, "bridge"), (Policy.VEPA, "vepa"), (Policy.PRIVATE, "private")]
)
def test_a_macvlan_port_is_a_macvtap_in_the_policys_mode(
    session: Session, ip: Callable[[str], str], policy: Policy, mode: str
) -> None:
    (grant,) = session.acquire(me(), [want(policy, Port.MACVLAN, "up0", mac=MAC, ifname="web1-net0")])
    assert grant.opened is not None
    assert (grant.opened.netdev, grant.opened.mac) == ("web1-net0", MAC)
    made = link(ip, "web1-net0")
    assert (made["link"], made["address"], made["ifalias"]) == ("up0", MAC, f"vnet-lock:{grant.token}")
    assert made["linkinfo"]["info_data"]["mode"] == mode  # type: ignore[index]
    assert {"UP", "ALLMULTI"} <= set(made["flags"])  # type: ignore[call-overload]
    assert made["inet6_addr_gen_mode"] == "none"
    assert Path(f"/dev/tap{made['ifindex']}").is_char_device()
    session.release(me())


def test_a_device_has_what_is_asked_for_by_another_of_its_names(
    session: Session, ip: Callable[[str], str]
) -> None:
    ip("link property add dev up0 altname other0")
    direct = Fixed("net0", "other0", Form.PASSTHRU)
    session.acquire(me(), [direct])
    assert only_claim(session).resource == Resource.nic("up0")
    assert find_tokens(DEFAULT, session.table, me(), direct) == [only_claim(session).token]
    stranger = Owner(OwnerKind.QEMU, "other", read_boot_id(DEFAULT), process=Process(1, 1))
    with pytest.raises(Refused, match="up0"):
        session.acquire(stranger, [want(Policy.VEPA, Port.MACVLAN, "other0")])
    session.release(me())


def test_a_macvtap_that_is_open_is_not_released_even_by_force(
    session: Session, ip: Callable[[str], str]
) -> None:
    (grant,) = session.acquire(me(), [want(Policy.VEPA, Port.MACVLAN, "up0", ifname="web1-net0")])
    connection = session.connect(grant)
    person, up0 = Administration(DEFAULT), Resource.nic("up0")
    with pytest.raises(Refused, match=f"still in use by .*pid {os.getpid()}"):
        person.release_resource(up0, force=True)
    assert link(ip, "web1-net0")["link"] == "up0"
    connection.close()
    with pytest.raises(Refused, match="--force"):
        person.release_resource(up0)
    assert person.release_resource(up0, force=True)


def test_what_a_guest_had_is_given_back_where_there_is_no_room_to_write_it_down(session: Session) -> None:
    """libvirt asks once; who asks for more where there is no room gets nothing, and leaves nothing."""
    with session.table.guarded():
        pass  # makes the directories
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k,mode=755", "none", DEFAULT.run], check=True)
    try:
        wanted = [want(Policy.VEPA, Port.MACVLAN, "up0", ifname=f"web1-net{n}") for n in range(2)]
        session.acquire(me(), [replace(one, interface=f"net{n}") for n, one in enumerate(wanted)])
        filler = Path(DEFAULT.run, "filler")
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(1 << 20))
        other = Owner(OwnerKind.QEMU, "other", read_boot_id(DEFAULT), process=Process(1, 1))
        with pytest.raises(VnetLockError, match=r"No space left.*df"):
            session.acquire(other, [replace(wanted[0], ifname="db1-net0")])
        assert len(session.table.read().records) == 2
        session.release(me())
        assert session.table.read().records == ()
        filler.unlink()
        session.acquire(me(), [wanted[0]])
        session.release(me())
    finally:
        subprocess.run(["umount", DEFAULT.run], check=True)


def test_a_macvlan_stands_beside_its_lower_device_in_another_namespace(
    ip: Callable[[str], str], macvtap_works: None
) -> None:
    del macvtap_works
    namespace, entries = make_namespace(DEFAULT), []
    call_in(namespace, lambda: ip("link add low0 type veth peer name peer0"))
    job = Job(DEFAULT, None, None, None, "0123456789abcdef", journal=entries.extend, sharing=None)  # type: ignore[arg-type]
    opened = open_macvlan(job, "low0", "passthru", MAC, namespace)
    assert (opened.netns, opened.mac, [entry.name for entry in entries]) == (namespace, MAC, [opened.netdev])
    made = call_in(namespace, lambda: link(ip, opened.netdev or ""))
    assert (made["link"], made["address"], made["linkinfo"]["info_kind"]) == ("low0", MAC, "macvlan")  # type: ignore[index]
    assert {"UP", "ALLMULTI"} <= set(made["flags"])  # type: ignore[call-overload]
    # What can't be made leaves the namespace to the caller.
    with pytest.raises(VnetLockError, match="there is a device of that name"):
        open_macvlan(job, "low0", "passthru", MAC, namespace)
    os.close(namespace)


def test_a_bridge_port_is_a_tap_in_the_bridge(session: Session, ip: Callable[[str], str]) -> None:
    session.acquire(me(), [want(Policy.VEB, Port.BRIDGE, "br0", mac=MAC, ifname="web1-net0")])
    made = link(ip, "web1-net0")
    assert (made["master"], made["linkinfo"]["info_kind"]) == ("br0", "tun")  # type: ignore[index]
    assert "UP" in made["flags"]  # type: ignore[operator]
    session.release(me())


@pytest.mark.parametrize(("port", "dev"), [(Port.MACVLAN, "up0"), (Port.BRIDGE, "br0")])
def test_every_undo_and_every_release_may_run_twice(session: Session, port: Port, dev: str) -> None:
    session.acquire(me(), [want(Policy.VEB, port, dev)])
    claim = only_claim(session)
    assert len(claim.journal) == 1
    assert undo(DEFAULT, claim) == []
    assert undo(DEFAULT, claim) == []
    session.release(me())
    session.release(me())
    assert undo(DEFAULT, claim) == []


@pytest.mark.parametrize(("port", "dev"), [(Port.MACVLAN, "up0"), (Port.BRIDGE, "br0")])
def test_the_link_of_a_guest_on_its_way_is_down_until_it_runs_here(
    session: Session, ip: Callable[[str], str], port: Port, dev: str
) -> None:
    intent = want(Policy.VEB, port, dev, mac=MAC, ifname="web1-net0")
    session.reserve(me(), [intent], "migrate")
    assert only_claim(session).reservation is not None
    (grant,) = session.acquire(me(), [intent])
    assert only_claim(session).reservation is None
    assert "UP" not in link(ip, "web1-net0")["flags"]  # type: ignore[operator]
    assert grant.opened is not None
    assert grant.opened.left is not None
    grant.opened.left()
    made = link(ip, "web1-net0")
    assert (made["address"] == MAC) == (port is Port.MACVLAN)
    assert "UP" in made["flags"]  # type: ignore[operator]
    session.release(me())


def test_a_guest_that_is_restored_has_its_link_at_once(session: Session, ip: Callable[[str], str]) -> None:
    intent = want(Policy.VEB, Port.MACVLAN, "up0", ifname="web1-net0")
    session.reserve(me(), [intent], "restore")
    (grant,) = session.acquire(me(), [intent])
    assert not grant.is_unfinished
    assert "UP" in link(ip, "web1-net0")["flags"]  # type: ignore[operator]
    session.release(me())


def test_an_undo_never_takes_anothers_link_of_the_same_name(
    session: Session, ip: Callable[[str], str]
) -> None:
    session.acquire(me(), [want(Policy.VEB, Port.MACVLAN, "up0", ifname="web1-net0")])
    ip("link delete web1-net0")
    ip("link add web1-net0 type bridge")
    session.release(me())
    assert link(ip, "web1-net0")["linkinfo"]["info_kind"] == "bridge"  # type: ignore[index]
    ip("link delete web1-net0")


def test_what_fails_half_way_leaves_nothing(session: Session, ip: Callable[[str], str]) -> None:
    """The second interface's name is taken: the first is undone, too."""
    first = want(Policy.VEB, Port.MACVLAN, "up0", ifname="web1-net0")
    second = Intent("net1", Policy.VEB, ("br0",), (Port.BRIDGE,), ifname="peer0")
    with pytest.raises(Exception, match="peer0"):
        session.acquire(me(), [first, second])
    assert "web1-net0" not in ip("link")


def test_two_guests_share_a_device_but_not_a_mac(session: Session) -> None:
    session.acquire(me(), [want(Policy.VEPA, Port.MACVLAN, "up0", mac=MAC)])
    stranger = Owner(OwnerKind.LIBVIRT, "web2", me().boot_id, uuid="u", process=me().process)
    with pytest.raises(Refused, match="give each guest its own"):
        session.acquire(stranger, [want(Policy.VEPA, Port.MACVLAN, "up0", mac=MAC)])
    session.acquire(stranger, [want(Policy.VEPA, Port.MACVLAN, "up0")])
    assert len(session.table.read().records) == 2
    session.release(stranger)
    session.release(me())


def test_a_port_of_a_bridge_can_be_no_lower_device(session: Session, ip: Callable[[str], str]) -> None:
    ip("link set up0 master br0")
    with pytest.raises(Unsupported, match="port of bridge br0"):
        session.acquire(me(), [want(Policy.VEB, Port.MACVLAN, "up0")])
    ip("link set up0 nomaster")
