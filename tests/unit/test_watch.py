"""What watch does when guests get devices, and lose them, without any hook being asked."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fake_host import FakeHost
from tests.unit.test_hook import UUIDS, VF0, VF1, guest
from tests.unit.test_network_hook import PF, host, plug_of, told_of
from vnet_lock.administration import Administration
from vnet_lock.claims import ClaimTable
from vnet_lock.errors import BadInput, Refused
from vnet_lock.front.libvirt_client.events import Event, Happened
from vnet_lock.front.libvirt_guest import address_words, read_owner
from vnet_lock.front.network_hook import perform
from vnet_lock.front.pool_ports import PoolPorts
from vnet_lock.front.watch import Watch, follow
from vnet_lock.model import Mode, PciAddress, Resource
from vnet_lock.network_xml import RESERVING, read_port
from vnet_lock.request import Fixed, Form
from vnet_lock.session import Session

__all__ = ["host"]  # a fixture

LATE = (
    "<metadata><vnet:guest xmlns:vnet='urn:vnet-lock:guest:1'>"
    "<vnet:interface alias='ua-net0' policy='veb' dev='eth0'/></vnet:guest></metadata>"
)


def direct(mac: str, alias: str = "") -> str:
    named = f"<alias name='{alias}'/>" if alias else ""
    return (
        f"<interface type='direct'><mac address='{mac}'/><source dev='eth0' mode='vepa'/>{named}</interface>"
    )


@dataclass
class Guest:
    """A guest as libvirt tells of it."""

    name: str
    xml: bytes
    is_active: bool = True

    @property
    def uuid(self) -> str:
        return UUIDS[self.name]

    def read_xml(self) -> str:
        return self.xml.decode()

    def gets(self, *vfs: str, more: str = "") -> None:
        self.xml = guest(self.name, *vfs, metadata=LATE).replace(b"</devices>", more.encode() + b"</devices>")


@dataclass
class Network:
    """A network of VFs."""

    vfs: tuple[str, ...]
    ports: dict[str, str] = field(default_factory=dict)
    name: str = "net"

    def read_xml(self) -> str:
        addresses = "".join(f"<address {address_words(PciAddress.parse(vf))}/>" for vf in self.vfs)
        return f"<network><name>net</name><forward mode='hostdev'>{addresses}</forward></network>"

    def read_ports(self) -> list[tuple[str, str]]:
        return list(self.ports.items())

    def add_port(self, xml: str) -> None:
        self.ports[xml.partition("<uuid>")[2].partition("</uuid>")[0]] = xml

    def remove_port(self, uuid: str) -> None:
        self.ports.pop(uuid, None)

    @property
    def taken(self) -> list[str]:
        """The VFs that libvirt won't give to a new guest."""
        found = [read_port(f"<hookData>{xml}</hookData>".encode()) for xml in self.ports.values()]
        return sorted(str(one.request.device) for one in found if one)


@dataclass
class Libvirt:
    """A daemon, with what is to happen one after the other; the watch is told to end after that."""

    guests: list[Guest]
    happens: list[tuple[Guest, Happened]] = field(default_factory=list)
    uri: str = "qemu:///system"
    watch: Watch | None = None
    networks: list[Network] = field(default_factory=list)

    def listen(self) -> None:
        pass

    def read_networks(self) -> list[Network]:
        return self.networks

    def read_active(self) -> list[Guest]:
        return [one for one in self.guests if one.is_active]

    def find_or_none(self, uuid: str) -> Guest | None:
        return next((one for one in self.guests if one.uuid == uuid), None)

    def events(self, timeout_s: float) -> Iterator[Event]:
        del timeout_s
        assert self.watch
        for one, what in self.happens:
            yield Event(one.name, one.uuid, what)
        self.watch.is_over = True


def claims(host: FakeHost) -> list[tuple[str, str]]:
    return [(one.resource.text, one.owner.name) for one in ClaimTable(host.settings).read().records]


@pytest.fixture
def watch(host: FakeHost) -> Watch:
    return Watch(host.settings, Session(host.settings))


def look(watch: Watch, one: Guest) -> None:
    watch.look(one)  # type: ignore[arg-type]


def test_what_guests_have_is_claimed_at_the_start_and_when_it_comes(host: FakeHost, watch: Watch) -> None:
    one, two = Guest("a", guest("a", VF0)), Guest("b", guest("b", VF1))
    libvirt = Libvirt([one], watch=watch)
    libvirt.happens = [(two, Happened.DEVICE_ADDED)]
    libvirt.guests.append(two)
    two.is_active = False
    watch.run(libvirt)  # type: ignore[arg-type]
    assert claims(host) == [(f"vf:{VF0}", "a")]
    two.is_active, watch.is_over = True, False
    watch.run(libvirt)  # type: ignore[arg-type]
    assert claims(host) == [(f"vf:{VF0}", "a"), (f"vf:{VF1}", "b")]


def test_what_goes_is_given_back_and_nothing_else(host: FakeHost, watch: Watch) -> None:
    one = Guest("a", guest("a"))
    one.gets(VF0, VF1, more=direct("52:54:00:00:0c:01") + direct("52:54:00:00:0c:02"))
    look(watch, one)
    assert len(claims(host)) == 4
    one.gets(VF1, more=direct("52:54:00:00:0c:02"))
    look(watch, one)
    assert claims(host) == [("nic:eth0", "a"), (f"vf:{VF1}", "a")]
    one.gets()
    look(watch, one)
    assert claims(host) == []


def test_a_claim_for_what_is_still_to_be_plugged_in_stays(host: FakeHost, watch: Watch) -> None:
    """It was never seen in the guest: so it isn't what has gone."""
    one = Guest("a", guest("a"))
    owner = read_owner(host.settings, "a", UUIDS["a"])
    wanted = Fixed("ua-vf0", PciAddress.parse(VF0), Form.HOSTDEV, "52:54:00:00:00:09")
    Session(host.settings).adopt(owner, [wanted])
    one.gets(VF1)
    look(watch, one)
    one.gets()
    look(watch, one)
    assert claims(host) == [(f"vf:{VF0}", "a")]


def test_a_late_interface_that_is_unplugged_gives_its_claims_back(host: FakeHost, watch: Watch) -> None:
    one = Guest("a", guest("a"))
    one.gets(more="<interface type='ethernet'><alias name='ua-net0'/></interface>")
    owner = read_owner(host.settings, "a", UUIDS["a"])
    Session(host.settings).adopt(owner, [Fixed("ua-net0", PciAddress.parse(VF0), Form.HOSTDEV)])
    look(watch, one)
    assert claims(host) == [(f"vf:{VF0}", "a")]
    one.gets()
    look(watch, one)
    assert claims(host) == []


def test_a_conflict_is_said_once_and_claimed_when_it_ends(
    host: FakeHost, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Administration(host.settings)
    other = read_owner(host.settings, "b", UUIDS["b"])
    claim = session.claim(other, Resource.parse(f"vf:{VF0}"), Mode.EXCLUSIVE)
    one = Guest("a", guest("a", VF0))
    libvirt = Libvirt([one], [(one, Happened.DEVICE_ADDED), (one, Happened.RESUMED)], watch=watch)
    watch.run(libvirt)  # type: ignore[arg-type]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f'conflict: guest "a" has {VF0}, but VF {VF0} is held by guest "b"' in said[0]
    session.release_tokens(other, [claim.token])
    libvirt.happens, watch.is_over = [], False
    watch.run(libvirt)  # type: ignore[arg-type]
    assert claims(host) == [(f"vf:{VF0}", "a")]
    assert capsys.readouterr().err == ""


def test_a_guest_that_nobody_can_read_disturbs_no_other(
    host: FakeHost, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Guest("a", guest("a", VF0).replace(b"0x01", b"x"))
    watch.run(Libvirt([odd, Guest("b", guest("b", VF1))], watch=watch))  # type: ignore[arg-type]
    assert claims(host) == [(f"vf:{VF1}", "b")]
    assert 'guest "a": ' in capsys.readouterr().err


@pytest.mark.parametrize(
    "uri",
    [
        "qemu+ssh://elsewhere/system",
        "qemu://[x/system",
        "qemu+ssh:///system",
        "qemu:///session",
        "test:///default",
    ],
)
def test_only_this_hosts_own_guests_are_watched(host: FakeHost, uri: str) -> None:
    with pytest.raises(BadInput, match="watch qemu:///system"):
        follow(host.settings, Session(host.settings), uri)


def test_the_environment_names_the_daemon_as_for_all_verbs(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///session")
    with pytest.raises(
        BadInput, match=r"^qemu:///session of LIBVIRT_DEFAULT_URI .*; watch -c qemu:///system$"
    ):
        follow(host.settings, Session(host.settings), None)


HOLD = """
import sys
from vnet_lock.front import resident
from vnet_lock.settings import Settings
settings = Settings.under(sys.argv[1])
with resident.alone(settings, settings.watch_lock_path, "vnet-lock watch"):
    print("alone", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("uri", [None, "qemu:///system"])
def test_there_is_one_for_a_host(host: FakeHost, uri: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    command = [sys.executable, "-c", HOLD, str(host.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout
        first.stdout.readline()
        with pytest.raises(Refused, match="vnet-lock watch runs already: "):
            follow(host.settings, Session(host.settings), uri)


def test_a_guest_that_ends_while_it_is_looked_at_keeps_nothing(host: FakeHost, watch: Watch) -> None:
    one = Guest("a", guest("a", VF0), is_active=False)
    look(watch, one)
    assert claims(host) == []


@pytest.mark.parametrize("what", [Happened.UNDEFINED, Happened.CRASHED])
def test_a_guest_that_runs_on_without_its_definition_gives_back_what_goes(
    host: FakeHost, watch: Watch, what: Happened
) -> None:
    one = Guest("a", guest("a", VF0))
    libvirt = Libvirt([one], watch=watch)

    def events(_timeout_s: float) -> Iterator[Event]:
        yield Event(one.name, one.uuid, what)
        assert claims(host) == [(f"vf:{VF0}", "a")]
        one.gets()
        yield Event(one.name, one.uuid, Happened.DEVICE_REMOVED)
        watch.is_over = True

    libvirt.events = events  # type: ignore[method-assign]
    watch.run(libvirt)  # type: ignore[arg-type]
    assert claims(host) == []


def test_the_end_of_a_guest_is_left_to_its_hook(host: FakeHost, watch: Watch) -> None:
    one = Guest("a", guest("a", VF0))
    look(watch, one)
    one.is_active = False
    watch.run(Libvirt([one], [(one, Happened.STOPPED)], watch=watch))  # type: ignore[arg-type]
    assert claims(host) == [(f"vf:{VF0}", "a")]
    assert not Path(host.settings.libvirt_run, "qemu/a.pid").exists()


def test_what_others_hold_is_kept_out_of_libvirts_choice_as_long_as_they_do(
    host: FakeHost, watch: Watch
) -> None:
    session = Administration(host.settings)
    other = read_owner(host.settings, "b", UUIDS["b"])
    network = Network((VF0, VF1))
    libvirt = Libvirt([], watch=watch, networks=[network])
    ports = PoolPorts(host.settings, session)

    def update() -> list[str]:
        ports.update(libvirt)  # type: ignore[arg-type]
        return network.taken

    assert update() == []
    claim = session.claim(other, Resource.parse(f"vf:{VF0}"), Mode.EXCLUSIVE)
    assert update() == [VF0]
    # A guest of the network's own has its port itself.
    port = told_of(plug_of(VF1)).decode().partition("</network>")[2].removesuffix("</hookData>")
    network.add_port(port)
    session.claim(read_owner(host.settings, "a", UUIDS["a"]), Resource.parse(f"vf:{VF1}"), Mode.EXCLUSIVE)
    assert update() == [VF0, VF1]
    assert len(network.ports) == 2
    session.release_tokens(other, [claim.token])
    assert update() == [VF1]
    session.claim(other, Resource.parse(f"vf:{VF0}"), Mode.EXCLUSIVE)
    assert update() == [VF0, VF1]
    ports.remove(libvirt)  # type: ignore[arg-type]
    assert network.taken == [VF1]


def test_what_the_configuration_leaves_to_the_host_from_now_on_is_kept_out_of_libvirts_choice(
    host: FakeHost,
) -> None:
    path = Path(host.settings.config_path)
    path.parent.mkdir(parents=True)
    path.write_text("no TOML")
    session = Session(host.settings)
    with pytest.raises(BadInput):
        session.held_vfs([PciAddress.parse(VF0)])
    for text, held in ((f'[host.vfs]\n"{PF}" = "0"\n', [VF0]), ("", [])):
        path.write_text(text)
        assert [pci.text for pci in session.held_vfs([PciAddress.parse(VF0)])] == held
    path.unlink()
    assert session.held_vfs([PciAddress.parse(VF0)]) == set()


def test_a_port_that_only_keeps_a_vf_claims_nothing(host: FakeHost) -> None:
    xml = told_of(plug_of(VF0)).replace(UUIDS["a"].encode(), RESERVING.encode())
    perform(host.settings, "port-created", xml, Session)
    perform(host.settings, "port-deleted", xml, Session)
    assert claims(host) == []
