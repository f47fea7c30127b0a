"""Guests move from one host to another with a VF for each, and nobody's traffic goes astray on the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import guest
from tests.lab.contenders import late_xml
from tests.lab.machines import Console
from tests.lab.nic import wait_until
from tests.lab.test_late_vf import PORTS
from tests.lab.two_hosts import SECOND_AT, THIRD_AT, Host, Pings, TwoHosts, two_hosts

pytestmark = pytest.mark.long

GUEST_AT, GUEST_MAC, LINK = "10.7.0.2", "52:54:00:00:0a:01", "mover-net0"
BRIDGE = "wire0"
STANDBY = (
    f"<interface type='ethernet'><mac address='{GUEST_MAC}'/><target dev='{LINK}' managed='no'/>"
    "<model type='virtio'/><teaming type='persistent'/><alias name='ua-net0'/></interface>"
)
UUID = "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1aff"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, results: Path) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("second"), results) as both:
        yield both


@pytest.fixture(scope="module")
def results() -> Path:
    """A directory for what is to be kept."""
    path = Path(os.environ["VNET_LAB_RESULTS"]) / "tests/two-hosts"
    path.mkdir(parents=True, exist_ok=True)
    return path


@dataclass(frozen=True, slots=True)
class Mover:
    """A guest that runs on the first host; its console is another file and socket where it goes."""

    hosts: TwoHosts
    here: Console
    there: Console

    def migrate(self, *words: str) -> subprocess.Popen[str]:
        """Begin to move it."""
        xml = self.hosts.first.virsh("dumpxml", "--migratable", "mover").stdout
        path = self.there.log.with_suffix(".xml")
        path.write_text(xml.replace(str(self.here.log.with_suffix("")), str(self.there.log.with_suffix(""))))
        argv = ["virsh", "-q", "-c", self.hosts.first.uri, "migrate", "--live", "--xml", str(path), *words]
        argv += ["mover", self.hosts.second.uri, "--migrateuri", f"tcp://{SECOND_AT}"]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def mover(hosts: TwoHosts, tmp_path: Path, results: Path) -> Iterator[Mover]:
    """A guest with a macvtap on a VF, of whichever PF its host has."""
    hosts.set_numvfs(2)
    wish = f"alias='ua-net0' policy='veb' port='sriov' dev='{hosts.first.pf} {hosts.second.pf}'"
    with running(hosts, tmp_path, results, late_xml(LINK, GUEST_MAC), wish) as mover:
        yield mover


@contextmanager
def running(hosts: TwoHosts, tmp_path: Path, results: Path, interfaces: str, *wishes: str) -> Iterator[Mover]:
    """A guest that runs on the first host, and on neither afterwards."""
    here, there = Console(tmp_path / "mover.log"), Console(tmp_path / "there.log")
    wanted = "".join(f"<vnet:interface {wish}/>" for wish in wishes)
    metadata = f"<vnet:guest xmlns:vnet='urn:vnet-lock:guest:1'>{wanted}</vnet:guest>"
    xml = guest.domain_xml(
        "mover", interfaces, words=guest.kernel_words(ip=f"{GUEST_AT}/24", ping=THIRD_AT),
        console=here.log, uuid=UUID, metadata=metadata,
    )  # fmt: skip
    (tmp_path / "mover.xml").write_text(xml)
    hosts.first.virsh("define", str(tmp_path / "mover.xml"))
    hosts.first.virsh("start", "mover")
    try:
        # A teamed VF may be there already, without an address of its own.
        assert here.ready()["ping"].split(",")[0] == "3/3"
        yield Mover(hosts, here, there)
    finally:
        for host in (hosts.first, hosts.second):
            # Who plugs a device in at this moment has libvirt's lock on the guest.
            wait_until(lambda host=host: _ends(host), f"the guest has ended on {host.pf}'s host", 120)
        hosts.first.virsh("undefine", "mover", check=False)
        for log in tmp_path.glob("*.log"):
            (results / log.name).write_bytes(log.read_bytes())


def _ends(host: Host) -> bool:
    host.virsh("destroy", "mover", check=False)
    return host.state("mover") in ("", "shut off")


@pytest.fixture
def bridged(hosts: TwoHosts) -> Iterator[str]:
    """A bridge on each host with the PF in it: a tap of it and a VF of the PF are on one wire."""
    for host in (hosts.first, hosts.second):
        mac = str(host.link(host.pf)["address"])
        host.run("ip", "link", "add", BRIDGE, "address", mac, "type", "bridge")
        host.run("ip", "link", "set", host.pf, "master", BRIDGE, "up")
        host.run("ip", "link", "set", BRIDGE, "up")
    yield BRIDGE
    for host in (hosts.first, hosts.second):
        host.run("ip", "link", "delete", BRIDGE)


def owners(host: Host) -> list[str | None]:
    """The names of those who own the host's VFs."""
    found = json.loads(host.vnet_lock("status", "--json", host.pf).stdout)
    claims = [vf["claim"] for pf in found["pfs"] for vf in pf["vfs"]]
    return [claim["owner"]["name"] if claim else None for claim in claims]


def is_there(mover: Mover) -> Callable[[], bool]:
    """Whether the guest's QEMU waits on the second host for its memory."""
    return lambda: mover.hosts.second.state("mover") == "paused"


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Tell whoever looks on."""

    def tell(text: str) -> None:
        with capfd.disabled():
            print(f"\n{text}", flush=True)

    return tell


def test_a_guest_moves_and_gets_a_vf_there_and_no_packet_goes_astray(
    hosts: TwoHosts, mover: Mover, tmp_path: Path, say: Callable[[str], None]
) -> None:
    first, second = hosts.first, hosts.second
    second.run("ip", "address", "add", "10.7.0.3/24", "dev", second.pf)
    unused = second.looks()
    third = Pings(GUEST_AT, tmp_path / "third.log")
    neighbour = Pings(GUEST_AT, tmp_path / "neighbour.log", second)
    third.wait_for_more(5)
    neighbour.wait_for_more(5)
    moving = mover.migrate("--bandwidth", "2")
    wait_until(is_there(mover), "its QEMU is there", 120)
    # What it is to have there is claimed and made, and draws nothing while it runs here.
    assert owners(second)[0] == "mover"
    assert "UP" not in second.link(LINK)["flags"]  # type: ignore[operator]
    assert second.looks() == unused
    neighbour.wait_for_more(10)
    assert moving.poll() is None
    first.virsh("migrate-setspeed", "mover", "1000")
    said = moving.communicate(timeout=240)[0]
    assert moving.returncode == 0, said
    wait_until(lambda: "UP" in second.link(LINK)["flags"], "its link is up there")  # type: ignore[operator]
    third.wait_for_more(10)
    neighbour.wait_for_more(10)
    say(f"live migration, from a third machine: {third.end()}")
    say(f"live migration, from the host that it goes to: {neighbour.end()}")
    assert first.claims == []
    assert owners(first) == [None, None]
    wait_until(first.has_netdevs, "the first host has its VFs")
    assert second.link(LINK)["address"] == GUEST_MAC
    assert second.vnet_lock("status", second.pf).returncode == 0
    assert mover.there.ask(f"ping {THIRD_AT}")["ping"] == "3/3"
    second.virsh("destroy", "mover")
    assert second.claims == []
    wait_until(second.has_netdevs, "the second host has its VFs")
    assert second.looks() == unused


def test_a_macvtap_that_were_raised_early_would_take_a_neighbours_packets(
    hosts: TwoHosts, mover: Mover, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """What the test before would see if it were so."""
    del mover
    second = hosts.second
    second.run("ip", "address", "replace", "10.7.0.3/24", "dev", second.pf)
    neighbour = Pings(GUEST_AT, tmp_path / "neighbour.log", second)
    neighbour.wait_for_more(5)
    vf = f"{second.pf}v0"
    second.run("ip", "link", "set", vf, "address", GUEST_MAC, "up")
    before = len(neighbour.answered)
    third = Pings(GUEST_AT, tmp_path / "third.log")
    third.wait_for_more(20)
    assert len(neighbour.answered) - before <= 5
    say(f"with a VF raised early, from its own host: {neighbour.end()}; from a third machine: {third.end()}")


def test_a_migration_that_fails_or_is_cancelled_leaves_all_as_it_was(
    hosts: TwoHosts, mover: Mover, tmp_path: Path, say: Callable[[str], None]
) -> None:
    first, second = hosts.first, hosts.second
    here, there = first.looks(), second.looks()
    third = Pings(GUEST_AT, tmp_path / "third.log")
    third.wait_for_more(5)
    # No VF is free there.
    for vf in second.vfs:
        second.run("vnet-lock", "claim", f"vf:{vf.pci}", "--pid", "1")
    refused = mover.migrate()
    said = refused.communicate(timeout=240)[0]
    assert refused.returncode != 0
    assert re.search("vnet-lock: .*held", said), said
    for vf in second.vfs:
        second.run("vnet-lock", "release", f"vf:{vf.pci}")
    assert second.claims == []
    # It is cancelled on its way.
    moving = mover.migrate("--bandwidth", "2")
    wait_until(is_there(mover), "its QEMU is there", 120)
    assert owners(second)[0] == "mover"
    first.virsh("domjobabort", "mover")
    moving.communicate(timeout=240)
    assert moving.returncode != 0
    # Its QEMU there dies on its way.
    wait_until(lambda: second.claims == [], "nothing is claimed there")
    moving = mover.migrate("--bandwidth", "2")
    wait_until(is_there(mover), "its QEMU is there", 120)
    # libvirt may find that it has ended by itself.
    second.virsh("destroy", "mover", check=False)
    moving.communicate(timeout=240)
    assert moving.returncode != 0
    wait_until(lambda: second.claims == [], "nothing is claimed there")
    wait_until(second.has_netdevs, "the second host has its VFs")
    assert second.looks() == there
    assert second.link(LINK) == {}
    assert first.state("mover") == "running"
    assert owners(first)[0] == "mover"
    assert first.looks() == here
    third.wait_for_more(10)
    say(f"a refused, a cancelled and a failed migration: {third.end()}")
    assert mover.here.ask(f"ping {THIRD_AT}")["ping"] == "3/3"


def test_a_teaming_pair_moves_by_its_standby_and_has_a_vf_again_there(
    hosts: TwoHosts, bridged: str, tmp_path: Path, results: Path, say: Callable[[str], None]
) -> None:
    """QEMU unplugs the VF before, and plugs the one that the hook has chosen in after."""
    first, second = hosts.first, hosts.second
    hosts.set_numvfs(1)
    here, there = first.looks(), second.looks()
    wishes = (
        f"alias='ua-net0' policy='veb' port='bridge' dev='{bridged}'",
        f"alias='ua-vf0' policy='veb' dev='{first.pf} {second.pf}' backends='vfio' teaming='ua-net0'",
    )
    both = "run test $(ls -d /sys/class/net/*/lower_* | wc -l) = 2"
    with running(hosts, tmp_path, results, PORTS + STANDBY, *wishes) as mover:
        wait_until(lambda: "hostdev" in first.virsh("dumpxml", "mover").stdout, "the VF is plugged in", 120)
        wait_until(lambda: mover.here.ask(both)["exit"] == "0", "the guest has teamed both", 120)
        third = Pings(GUEST_AT, tmp_path / "third.log")
        third.wait_for_more(5)
        moving = mover.migrate()
        said = moving.communicate(timeout=300)[0]
        assert moving.returncode == 0, said
        assert owners(second) == ["mover"]
        assert first.claims == []
        wait_until(lambda: mover.there.ask(both)["exit"] == "0", "the guest has teamed both again", 120)
        third.wait_for_more(10)
        say(f"live migration of a teaming pair, from a third machine: {third.end()}")
        wait_until(first.has_netdevs, "the first host has its VF")
        assert first.looks() == here
        second.virsh("destroy", "mover")
        assert second.claims == []
    wait_until(second.has_netdevs, "the second host has its VF")
    assert second.looks() == there
