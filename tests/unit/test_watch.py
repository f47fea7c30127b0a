"""What watch does when guests get devices, and lose them, without any hook being asked."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fake_host import FakeHost
from tests.unit.test_hook import UUIDS, VF0, VF1, guest
from tests.unit.test_network_hook import host
from vnet_lock.claims import ClaimTable
from vnet_lock.front.libvirt_client import Event, Happened
from vnet_lock.front.libvirt_guest import read_owner
from vnet_lock.front.watch import Watch
from vnet_lock.model import Fixed, Form, Mode, PciAddress, Resource
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
class Libvirt:
    """A daemon, with what is to happen one after the other; the watch is told to end after that."""

    guests: list[Guest]
    happens: list[tuple[Guest, Happened]] = field(default_factory=list)
    uri: str = "qemu:///system"
    watch: Watch | None = None

    def listen(self) -> None:
        pass

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
    session = Session(host.settings)
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


def test_the_end_of_a_guest_is_left_to_its_hook(host: FakeHost, watch: Watch) -> None:
    one = Guest("a", guest("a", VF0))
    look(watch, one)
    one.is_active = False
    watch.run(Libvirt([one], [(one, Happened.STOPPED)], watch=watch))  # type: ignore[arg-type]
    assert claims(host) == [(f"vf:{VF0}", "a")]
    assert not Path(host.settings.libvirt_run, "qemu/a.pid").exists()
