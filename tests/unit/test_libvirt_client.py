"""libvirt as a client sees it, against the driver that libvirt itself has for tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vnet_lock.errors import BadInput, Unsupported, VnetLockError
from vnet_lock.front.libvirt_client.connection import Libvirt
from vnet_lock.front.libvirt_client.domain import DomainState
from vnet_lock.front.libvirt_client.errors import Disconnected, translated
from vnet_lock.front.libvirt_client.events import Happened

GUEST = (
    "<domain type='test'><name>web1</name><memory unit='MiB'>64</memory><os><type>hvm</type></os></domain>"
)


@pytest.fixture
def libvirt(tmp_path) -> Iterator[Libvirt]:
    host = tmp_path / "host.xml"  # test:///default is one for the whole process
    host.write_text(f"<node>{GUEST.replace('web1', 'test')}</node>")
    with Libvirt(f"test://{host}") as connection:
        yield connection


def test_a_guest_is_found_by_its_name_and_by_its_uuid(libvirt):
    found = libvirt.find("test")
    assert libvirt.find(found.uuid).name == "test"
    assert [one.uuid for one in libvirt.read_active()] == [found.uuid]


def test_a_guest_that_is_unknown_is_bad_input_that_names_it(libvirt):
    with pytest.raises(BadInput, match='guest "nope": Domain not found'):
        libvirt.find("nope")
    assert libvirt.find_or_none("nope") is None


def test_what_libvirt_cannot_read_is_bad_input(libvirt):
    with pytest.raises(BadInput, match="define: "):
        libvirt.define("<domain")


def test_a_failure_of_libvirts_names_the_guest_in_one_line(libvirt):
    with pytest.raises(VnetLockError, match=r'^guest "test": .*already running$'):
        libvirt.find("test").start()


def test_what_this_driver_does_not_have_is_unsupported(libvirt):
    with pytest.raises(Unsupported):
        libvirt.find("test").attach("<interface type='user'/>")


def test_ending_a_guest_that_has_no_qemu_is_no_error(libvirt):
    guest = libvirt.define(GUEST)
    guest.destroy()
    assert guest.state is DomainState.SHUT_OFF


def test_a_transient_guest_that_has_ended_is_not_active(libvirt):
    guest = libvirt.find("test")
    assert guest.is_active
    guest.handle.undefine()
    guest.destroy()
    with pytest.raises(BadInput, match="Domain not found"):
        _ = guest.state
    assert not guest.is_active
    guest.destroy()


def test_what_happens_is_told_in_order(libvirt):
    libvirt.listen()
    guest = libvirt.define(GUEST)
    guest.start()
    guest.destroy()
    guest.handle.undefine()
    happened = [event.what for event in libvirt.events(0.5) if event.uuid == guest.uuid]
    assert happened == [Happened.DEFINED, Happened.STARTED, Happened.STOPPED, Happened.UNDEFINED]


def test_a_daemon_that_is_not_there_is_told(tmp_path):
    with pytest.raises(Disconnected, match="is libvirt's daemon running"):
        Libvirt(f"qemu+unix:///system?socket={tmp_path}/none")


def test_a_connection_that_was_hung_up_is_told(libvirt):
    libvirt.close()
    libvirt.close()
    with pytest.raises(Disconnected):
        libvirt.find("test")


@pytest.mark.parametrize("name", ["\udcff", "a\0b"])
def test_what_is_no_text_is_no_guest(libvirt, name):
    with pytest.raises(BadInput, match="guest"):
        libvirt.find(name)
    with pytest.raises(BadInput, match="libvirt at"):
        Libvirt(name)


def test_an_interrupt_within_libvirt_is_one_here():
    """As Python says it where a callback of ours runs while libvirt tells of an error."""
    told = SystemError("returned a result with an exception set")
    told.__cause__ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), translated("guest"):
        raise told
    with pytest.raises(SystemError), translated("guest"):
        raise SystemError("a bug")
