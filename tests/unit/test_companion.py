"""The process that finishes an interface once its guest runs: known, alone, ended, missed when it is gone."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from tests.fake_host import FakeHost, locked
from tests.unit.test_hook import VF0, VF1, Told, guest
from vnet_lock.audit import audit
from vnet_lock.claims import ClaimTable
from vnet_lock.combination import Policy
from vnet_lock.domain_document import NAMESPACE, parse
from vnet_lock.domain_xml import read_fixed
from vnet_lock.errors import VnetLockError
from vnet_lock.front import companion
from vnet_lock.front.companion import hostdev_xml
from vnet_lock.front.hook import Call, answer
from vnet_lock.front.libvirt_client import connection
from vnet_lock.front.libvirt_client.domain import DomainState
from vnet_lock.front.libvirt_client.errors import Busy
from vnet_lock.journal import Companion
from vnet_lock.kernel import background
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.kernel.processes import is_alive
from vnet_lock.model import PciAddress, Process, State
from vnet_lock.request import Fixed, Form, Intent
from vnet_lock.session import Session
from vnet_lock.settings import DEFAULT, Settings

PF = "0000:01:00.0"


def until(is_so: Callable[[], object], deadline_s: float = 20) -> None:
    end = time.monotonic() + deadline_s
    while not is_so():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def end(process: Process | None) -> None:
    if process is not None:
        background.end(DEFAULT, process, "what a test started")


# --- a process of ours --------------------------------------------------------------------------


def test_a_process_begins_only_once_it_is_known(tmp_path: Path) -> None:
    seen: list[tuple[Process, bool]] = []
    mark = tmp_path / "begun"

    def journal(process: Process) -> bool:
        seen.append((process, is_alive(DEFAULT, process) and not mark.exists()))
        return True

    started = background.start(DEFAULT, mark.touch, journal)
    until(mark.exists)
    assert seen == [(started, True)]


def test_a_process_that_nobody_will_know_never_begins(tmp_path: Path) -> None:
    seen: list[Process] = []
    mark = tmp_path / "begun"

    def forget(process: Process) -> bool:
        seen.append(process)
        return False

    assert background.start(DEFAULT, mark.touch, forget) is None
    until(lambda: not is_alive(DEFAULT, seen[0]))

    def fail(process: Process) -> bool:
        seen.append(process)
        raise VnetLockError("no")

    with pytest.raises(VnetLockError, match="no"):
        background.start(DEFAULT, mark.touch, fail)
    until(lambda: not is_alive(DEFAULT, seen[1]))
    assert not mark.exists()


def test_a_process_is_nobodys_child_and_has_nothing_of_ours_open(tmp_path: Path) -> None:
    """libvirt waits until a hook's stdout and stderr are closed everywhere."""
    told = tmp_path / "told"

    def look() -> None:
        names = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
        more = [name for name in os.listdir("/proc/self/fd") if int(name) > 2]
        told.with_suffix(".new").write_text(
            f"{names} {os.getsid(0) == os.getpid()} {len(more)} {os.getcwd()}"
        )
        told.with_suffix(".new").rename(told)
        signal.pause()

    read, write = os.pipe()
    os.set_inheritable(write, True)
    process = background.start(DEFAULT, look, lambda _: True)
    try:
        until(told.exists)
        # What lists the directory is open itself.
        assert told.read_text() == f"{['/dev/null'] * 3} False 1 /"
        os.close(write)
        assert os.read(read, 1) == b""
        with suppress(ChildProcessError):
            assert os.waitpid(-1, os.WNOHANG) == (0, 0)
    finally:
        os.close(read)
        end(process)


def test_only_the_very_process_is_ended_and_again_is_no_error() -> None:
    process = background.start(DEFAULT, signal.pause, lambda _: True)
    assert process is not None
    background.end(DEFAULT, replace(process, start_ticks=process.start_ticks + 1), "another")
    assert is_alive(DEFAULT, process)
    for _ in range(2):
        background.end(DEFAULT, process, "it")
        assert not is_alive(DEFAULT, process)


# --- the hook's ---------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two free VFs, and the processes of this machine: that of this test is libvirt's daemon.

    The kernel is asked what the PF says of its VFs, so it has the name of a device that every machine has.
    """
    host = FakeHost(tmp_path)
    host.pf(PF, vfs=(VF0, VF1), netdev="lo")
    for group, vf in enumerate((VF0, VF1)):
        host.vf(vf, PF, driver=None, group=group)
    return replace(host.settings, proc=DEFAULT.proc)


def call(settings: Settings, operation: str, words: str = "") -> tuple[int, Told]:
    metadata = (
        f"<metadata><vnet:guest xmlns:vnet='{NAMESPACE}'><vnet:interface alias='ua-vf0' policy='veb'"
        f" dev='lo' backends='vfio' {words}/></vnet:guest></metadata>"
    )
    told = Told()
    xml = guest("a", metadata=metadata)
    status = answer(Call(settings, os.getpid(), "a", operation, xml), Session, told)
    print(told.said)
    return status, told


def companions(settings: Settings) -> list[Companion]:
    return [
        one
        for claim in ClaimTable(settings).read().records
        for one in claim.journal
        if isinstance(one, Companion)
    ]


def entry_of(settings: Settings) -> Companion:
    (entry,) = companions(settings)
    return entry


def test_a_start_claims_the_vf_and_leaves_a_companion_that_release_ends(settings: Settings) -> None:
    assert call(settings, "prepare", "mac='52:54:00:00:00:09' vlan='7'") == (0, Told())
    (claim,) = ClaimTable(settings).read().records
    assert (claim.resource.name, claim.interface, claim.combination) == (VF0, "ua-vf0", "veb-sriov-vfio")
    assert (claim.mac, claim.vlan, claim.state) == ("52:54:00:00:00:09", 7, State.ACTIVE)
    entry = entry_of(settings)
    process = Process(entry.pid, entry.start_ticks)
    assert is_alive(DEFAULT, process)
    assert call(settings, "release") == (0, Told())
    assert not is_alive(DEFAULT, process)
    assert not ClaimTable(settings).read().records


def test_a_guest_that_libvirt_is_busy_with_gets_its_vf_once_it_has_time(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = tmp_path / "tried"
    tried.touch()

    class Domain:
        state = DomainState.RUNNING

        def read_xml(self) -> str:
            return "<domain/>"

        def attach(self, xml: str) -> None:
            with tried.open("a") as file:
                file.write(xml)
            if tried.read_text().count("<interface ") < 3:
                raise Busy("cannot acquire state change lock")

    class Libvirt:
        def __init__(self, _: str) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def listen(self) -> None:
            pass

        def find(self, _: str) -> Domain:
            return Domain()

    monkeypatch.setattr(connection, "Libvirt", Libvirt)
    monkeypatch.setattr(companion, "_RETRY_S", 0.02)
    assert call(settings, "prepare") == (0, Told())
    until(lambda: not companions(settings))
    assert tried.read_text().count("<interface ") == 3
    assert call(settings, "release") == (0, Told())


def test_a_second_start_ends_the_companion_of_the_first(settings: Settings) -> None:
    assert call(settings, "prepare")[0] == 0
    first = entry_of(settings)
    assert call(settings, "prepare")[0] == 0
    second = entry_of(settings)
    assert not is_alive(DEFAULT, Process(first.pid, first.start_ticks))
    assert is_alive(DEFAULT, Process(second.pid, second.start_ticks))
    assert call(settings, "release")[0] == 0


@pytest.mark.parametrize("failure", ["", "no more available PCI slots"])
def test_a_guest_that_runs_without_its_vf_is_found_with_the_reason(settings: Settings, failure: str) -> None:
    assert call(settings, "prepare")[0] == 0
    entry = entry_of(settings)

    def findings() -> list[str]:
        claims = ClaimTable(settings).read()
        found = audit(settings, read_inventory(settings), claims).findings
        return [one.message for one in found if one.kind == "unplugged"]

    with qemu(settings) as pid:
        assert findings() == []  # it is at it
        background.end(DEFAULT, Process(entry.pid, entry.start_ticks), "the companion")
        if failure:
            with ClaimTable(settings).guarded() as writer:
                (claim,) = writer.read().records
                journal = (*claim.journal[:-1], replace(entry, failure=failure))
                writer.replace(replace(claim, journal=journal))
        (message,) = findings()
        assert f'guest "a" (pid {pid}) has not got VF {VF0} for its interface ua-vf0: ' in message
        assert (failure or f"the process that was to plug it in (pid {entry.pid}) is gone") in message
        assert f"vnet-lock release vf:{VF0} --force" in message
    assert findings() == []  # nobody runs
    assert call(settings, "release")[0] == 0


def test_a_guest_that_came_and_whose_link_stays_down_is_found(settings: Settings) -> None:
    assert call(settings, "prepare")[0] == 0
    entry = entry_of(settings)
    with ClaimTable(settings).guarded() as writer:
        (claim,) = writer.read().records
        writer.replace(replace(claim, journal=(*claim.journal[:-1], replace(entry, link="web-net0"))))
    with qemu(settings) as pid:
        background.end(DEFAULT, Process(entry.pid, entry.start_ticks), "the companion")
        claims = ClaimTable(settings).read()
        found = audit(settings, read_inventory(settings), claims).findings
        (message,) = [one.message for one in found if one.kind == "unraised"]
    assert f'guest "a" (pid {pid}) came from another host, and its link web-net0 is not up here' in message
    assert f"(pid {entry.pid}) is gone" in message
    assert call(settings, "release")[0] == 0


def qemu(settings: Settings) -> AbstractContextManager[int]:
    """Somebody who holds the lock on libvirt's pid file of the guest, as its QEMU does."""
    return locked(Path(settings.libvirt_run) / "qemu/a.pid")


def test_what_is_plugged_in_is_what_libvirt_will_read(settings: Settings) -> None:
    mac = "52:54:00:00:00:09"
    intent = Intent("ua-vf0", Policy.VEB, vlan=7, hotplug=True, teaming="ua-net0")
    xml = hostdev_xml(intent, PciAddress.parse("0001:af:10.2"), mac)
    root = parse(f"<domain><name>g</name><devices>{xml}</devices></domain>".encode())
    address = PciAddress.parse("0001:af:10.2")
    assert read_fixed(root).requests == (Fixed("ua-vf0", address, Form.HOSTDEV, mac, vlan=7),)
    teaming = root.find("devices/interface/teaming")
    assert teaming is not None
    assert teaming.attrib == {"type": "transient", "persistent": "ua-net0"}
    assert "vlan" not in hostdev_xml(replace(intent, vlan=None), address, mac)
    assert "teaming" not in hostdev_xml(replace(intent, teaming=""), address, mac)
