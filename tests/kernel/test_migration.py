"""Guests move between two hosts, are saved and come back, by libvirt itself, with taps of the hook's."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.two_hosts import Host, Pings, two_hosts, wait_until
from tests.lab import guest

pytestmark = pytest.mark.timeout(600)

AT, LINK = "10.7.0.2", "mover-tap"
INTERFACE = (
    "<interface type='ethernet'><mac address='52:54:00:00:0a:01'/>"
    f"<target dev='{LINK}' managed='no'/><model type='virtio'/><alias name='ua-net0'/></interface>"
)
METADATA = (
    "<vnet:guest xmlns:vnet='urn:vnet-lock:guest:1'>"
    "<vnet:interface alias='ua-net0' policy='veb' port='bridge' dev='br0'/></vnet:guest>"
)
Ip = Callable[[str], str]


@pytest.fixture
def hosts(ip: Ip, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts; a guest runs on the first, and the test is a third machine on the wire."""
    console = tmp_path / "mover.log"
    words = guest.kernel_words(ip=f"{AT}/24")
    xml = guest.domain_xml("mover", INTERFACE, words=words, console=console, metadata=METADATA)
    # Nothing here needs KVM, and a migration needs a CPU that both know by name.
    xml = xml.replace("type='kvm'", "type='qemu'").replace(
        "<cpu mode='host-passthrough' migratable='on'/>",
        "<cpu mode='custom' match='exact'><model>qemu64</model></cpu>",
    )
    (tmp_path / "mover.xml").write_text(xml)
    with two_hosts(tmp_path) as both:
        ip("address add 10.7.0.200/24 dev wire0")
        both[0].virsh("define", str(tmp_path / "mover.xml"))
        both[0].virsh("start", "mover")
        try:
            wait_until(lambda: console.exists() and "VNET-GUEST ready" in console.read_text(), "it is ready")
            yield both
        finally:
            for host in both:
                host.virsh("destroy", "mover", check=False)


def migrate(hosts: tuple[Host, Host], tmp_path: Path, *words: str) -> subprocess.Popen[bytes]:
    """Begin to move the guest; its console there is another file. What libvirt says is in migrate.log."""
    xml = hosts[0].virsh("dumpxml", "--migratable", "mover").stdout
    path = tmp_path / "there.xml"
    path.write_text(xml.replace(f"{tmp_path}/mover.", f"{tmp_path}/there."))
    argv = ["virsh", "-q", "-c", hosts[0].uri, "migrate", "--live", "--xml", str(path), *words, "mover"]
    argv += [hosts[1].uri, "--migrateuri", "tcp://10.98.0.2"]
    with (tmp_path / "migrate.log").open("wb") as sink:
        return subprocess.Popen(argv, stdout=sink, stderr=sink)


def is_on_its_way(hosts: tuple[Host, Host]) -> Callable[[], bool]:
    return lambda: hosts[1].state("mover") == "paused" and hosts[1].is_up(LINK) is not None


def test_a_link_is_up_on_the_other_host_only_once_the_guest_runs_there(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    first, second = hosts
    pings = Pings(AT, tmp_path / "pings")
    pings.wait_for_more(5)
    moving = migrate(hosts, tmp_path, "--bandwidth", "3")
    wait_until(is_on_its_way(hosts), "its QEMU is there")
    assert second.claims
    assert second.is_up(LINK) is False
    pings.wait_for_more(5)
    assert second.is_up(LINK) is False
    first.virsh("migrate-setspeed", "mover", "1000")
    assert moving.wait(120) == 0, (tmp_path / "migrate.log").read_text()
    wait_until(lambda: second.is_up(LINK), "its link is up there")
    pings.wait_for_more(5)
    print(f"a live migration: {pings.end()}")
    assert first.claims == []
    assert first.is_up(LINK) is None
    second.virsh("destroy", "mover")
    assert second.claims == []
    assert second.is_up(LINK) is None


def test_a_migration_that_is_refused_or_cancelled_leaves_all_as_it_was(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    first, second = hosts
    before = first.claims
    second.run("vnet-lock", "claim", "nic:br0", "--pid", str(second.pid))
    assert migrate(hosts, tmp_path).wait(120) != 0
    assert "vnet-lock: ua-net0: device br0 is held by" in (tmp_path / "migrate.log").read_text()
    second.run("vnet-lock", "release", "nic:br0")
    assert second.claims == []
    cancelled = migrate(hosts, tmp_path, "--bandwidth", "3")
    wait_until(is_on_its_way(hosts), "its QEMU is there")
    first.virsh("domjobabort", "mover")
    assert cancelled.wait(120) != 0
    wait_until(lambda: second.claims == [], "nothing is claimed there")
    assert second.is_up(LINK) is None
    assert first.state("mover") == "running"
    assert first.claims == before
    # Another has a link of that name there: the guest's has another.
    second.run("ip", "link", "add", "name", LINK, "type", "bridge")
    moved = migrate(hosts, tmp_path)
    assert moved.wait(120) == 0, (tmp_path / "migrate.log").read_text()
    wait_until(lambda: second.is_up("mover-net0"), "its link is up there")
    pings = Pings(AT, tmp_path / "pings")
    pings.wait_for_more(3)
    pings.end()


def test_a_saved_guest_gives_back_what_it_had_and_has_it_again_when_it_is_restored(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    first, state = hosts[0], str(tmp_path / "mover.state")
    for save, restore in (
        (("save", "mover", state), ("restore", state)),
        (("managedsave", "mover"), ("start", "mover")),
    ):
        first.virsh(*save)
        assert first.claims == []
        assert first.is_up(LINK) is None
        first.virsh(*restore)
        assert first.claims
        assert first.is_up(LINK)
        pings = Pings(AT, tmp_path / save[0])
        pings.wait_for_more(3)
        pings.end()
