"""What each hook operation does to claims, in every order in which libvirt can call them."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.fake_host import FakeHost, build, stat_line
from vnet_lock.claims import ClaimTable
from vnet_lock.errors import BadInput, Refused, VnetLockError
from vnet_lock.front import hooks_install
from vnet_lock.front.hook import Call, answer, perform
from vnet_lock.front.libvirt_guest import read_owner
from vnet_lock.journal import LibvirtMacvtap, VfAdmin
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, Process, Resource, State
from vnet_lock.request import Assignment, Fixed, Intent, Plan, Refusal, Request
from vnet_lock.session import Grant, Session
from vnet_lock.settings import Settings

XML = Path(__file__).parents[2] / "xml"
DAEMON = 4711
UUIDS = {"a": "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a0a", "b": "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a0b"}
VF0, VF1 = "0000:01:10.0", "0000:01:10.2"
OPERATIONS = ("prepare", "start", "started", "stopped", "release", "reconnect", "migrate", "restore", "new")
REFUSING = ("migrate", "restore", "prepare", "start")


def guest(name: str, *vfs: str, metadata: str = "") -> bytes:
    """A guest with VFs as libvirt writes it to a hook."""
    devices = "".join(
        f"<interface type='hostdev'><mac address='52:54:00:00:0{number}:{UUIDS[name][-2:]}'/><source>"
        f"<address type='pci' domain='0x{vf[:4]}' bus='0x{vf[5:7]}' slot='0x{vf[8:10]}'"
        f" function='0x{vf[-1]}'/>"
        "</source></interface>"
        for number, vf in enumerate(vfs)
    )
    return (
        f"<domain><name>{name}</name><uuid>{UUIDS[name]}</uuid>{metadata}<devices>{devices}</devices></domain>"
    ).encode()


@dataclass
class Fake:
    """A session that writes down what it is asked, and fails if told to."""

    fails: BaseException | None = None
    settings: Settings = field(default_factory=Settings)
    asked: list[tuple[str, Owner, tuple[Request, ...]]] = field(default_factory=list)

    def acquire(self, owner: Owner, requests: Iterable[Request]) -> tuple[Grant, ...]:
        self._ask("acquire", owner, requests)
        return ()

    def adopt(self, owner: Owner, requests: Iterable[Request], running: bool = False) -> None:
        self._ask("adopt running" if running else "adopt", owner, requests)

    def reserve(self, owner: Owner, requests: Iterable[Request], operation: str) -> tuple[Assignment, ...]:
        self._ask(f"reserve for {operation}", owner, requests)
        return ()

    def plan(self, requests: Iterable[Request]) -> Plan | Refusal:
        raise NotImplementedError

    def hand_over(self, old: Owner, new: Owner) -> None:
        assert old.process is not None
        assert new == replace(old, process=None)
        self._ask("hand over", old, ())

    def release(self, owner: Owner) -> None:
        self._ask("release", owner, ())

    def _ask(self, verb: str, owner: Owner, requests: Iterable[Request]) -> None:
        self.asked.append((verb, owner, tuple(requests)))
        if self.fails is not None:
            raise self.fails


@dataclass
class Told:
    """A report that is kept."""

    said: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    given: list[bytes] = field(default_factory=list)

    def give(self, xml: bytes) -> None:
        self.given.append(xml)

    def say(self, line: str) -> None:
        self.said.append(line)

    def log(self, text: str) -> None:
        self.logged.append(text)


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """Two free VFs, libvirt's daemon, and the process of this test."""
    host = FakeHost(tmp_path)
    host.pf("0000:01:00.0", vfs=(VF0, VF1), driver="vfio-pci")
    for group, vf in enumerate((VF0, VF1)):
        host.vf(vf, "0000:01:00.0", driver=None, group=group)
    host.process(DAEMON, "libvirtd")
    host.process(os.getpid(), "python")
    return host


def status_file(host: FakeHost, name: str, there: bool = True) -> None:
    """libvirt's file of a guest that has had its QEMU, and whose devices it hasn't all given back."""
    path = Path(host.settings.libvirt_run) / f"qemu/{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if there else path.unlink()


def run_with(fake: Fake, settings: Settings, operation: str, xml: bytes) -> tuple[int, Told]:
    told = Told()
    status = answer(Call(settings, DAEMON, "a", operation, xml), lambda _: fake, told)
    return status, told


# --- what a session is asked --------------------------------------------------------------------


def test_prepare_acquires_and_the_daemon_is_the_owner_until_qemu_is_there(host: FakeHost) -> None:
    fake = Fake()
    assert run_with(fake, host.settings, "prepare", guest("a", VF0, VF1)) == (0, Told())
    ((verb, owner, requests),) = fake.asked
    assert (verb, len(requests)) == ("acquire", 2)
    assert owner == Owner(
        kind=OwnerKind.LIBVIRT,
        name="a",
        boot_id="boot",
        uuid=UUIDS["a"],
        process=Process(DAEMON, 4242),
        pid_file=f"{host.settings.libvirt_run}/qemu/a.pid",
    )


@pytest.mark.parametrize("operation", ["start", "reconnect"])
def test_what_libvirt_chose_is_adopted_and_no_intent_is_planned_again(host: FakeHost, operation: str) -> None:
    fake = Fake()
    teaming = (XML / "teaming.xml").read_bytes()
    assert run_with(fake, host.settings, operation, teaming) == (0, Told())
    ((verb, _, requests),) = fake.asked
    assert verb == {"start": "adopt", "reconnect": "adopt running"}[operation]
    assert [type(request) for request in requests] == [Fixed]
    assert run_with(fake, host.settings, "prepare", teaming)[0] == 0
    assert {type(request) for request in fake.asked[-1][2]} == {Fixed, Intent}


def test_release_needs_no_definition_that_can_still_be_read(host: FakeHost) -> None:
    fake = Fake()
    broken = '<metadata><vnet:guest xmlns:vnet="urn:vnet-lock:guest:1"><vnet:x/></vnet:guest></metadata>'
    assert run_with(fake, host.settings, "release", guest("a", metadata=broken)) == (0, Told())
    ((verb, owner, _),) = fake.asked
    assert (verb, owner.uuid) == ("release", UUIDS["a"])


def test_stopped_leaves_it_to_libvirts_status_file_when_a_guest_is_dead(host: FakeHost) -> None:
    fake = Fake()
    assert run_with(fake, host.settings, "stopped", guest("a", VF0)) == (0, Told())
    # Without one it never had a QEMU.
    assert fake.asked == []
    status_file(host, "a")
    assert run_with(fake, host.settings, "stopped", guest("a", VF0)) == (0, Told())
    ((verb, owner, _),) = fake.asked
    assert (verb, owner.uuid) == ("hand over", UUIDS["a"])


@pytest.mark.parametrize("operation", ["started", "new"])
def test_other_operations_do_not_even_read_the_guest(host: FakeHost, operation: str) -> None:
    fake = Fake()
    assert run_with(fake, host.settings, operation, b"no XML") == (0, Told())
    assert fake.asked == []


@pytest.mark.parametrize("operation", [*REFUSING, "reconnect"])
def test_a_guest_without_devices_needs_no_session(host: FakeHost, operation: str) -> None:
    fake = Fake()
    assert run_with(fake, host.settings, operation, (XML / "no-device.xml").read_bytes()) == (0, Told())
    assert fake.asked == []


@pytest.mark.parametrize(
    ("mode", "metadata", "is_kept"),
    [
        ("passthrough", "", False),
        # Whatever else is wrong with it.
        (
            "passthrough",
            '<metadata><v:guest xmlns:v="urn:vnet-lock:guest:1"><v:x/></v:guest></metadata>',
            False,
        ),
        ("bridge", "", True),
    ],
)
def test_a_refused_guest_leaves_libvirt_no_note_to_change_anothers_vf_by(
    tmp_path: Path, mode: str, metadata: str, is_kept: bool
) -> None:
    """libvirt 9.0 would put the VF back below the guest that has it."""
    host = FakeHost(tmp_path)
    vf, other = host.add_pf("0000:01:00.0", "eth0", ("igbvf", "igbvf"))
    host.process(DAEMON, "libvirtd")
    host.process(os.getpid(), "python")
    notes = [Path(host.settings.libvirt_run) / f"qemu/eth0_vf{index}" for index in (0, 1)]
    notes[0].parent.mkdir(parents=True)
    for index, (pci, uuid) in enumerate(((vf, UUIDS["b"]), (other, UUIDS["a"]))):
        notes[index].write_text("{}")
        owner = Owner(OwnerKind.LIBVIRT, "x", "boot", uuid=uuid, process=Process(DAEMON, 4242))
        journal = (VfAdmin("0000:01:00.0", index, "", 0, 0), LibvirtMacvtap(pci.text, "52:54:00:00:00:01"))
        made = Claim(
            Resource.vf(pci), Mode.EXCLUSIVE, State.ACTIVE, owner, uuid[-16:].replace("-", "0"), "n", 0.0
        )
        host.claim(replace(made, journal=journal))
    xml = guest("a", metadata=metadata).replace(
        b"<devices>",
        b"<devices>"
        + b"".join(
            f"<interface type='direct'><source dev='eth0v{index}' mode='{mode}'/></interface>".encode()
            for index in (0, 1)
        ),
    )
    assert run_with(Fake(fails=Refused("it is held by b")), host.settings, "prepare", xml)[0] == 1
    assert [note.exists() for note in notes] == [is_kept, True]


# --- how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interface", "said"),
    [
        ("<interface><alias name='ua-net0'/></interface>", "ua-net0: its <interface> has no type"),
        (
            "<interface type='direct'><mac address='&#10;'/><alias name='ua-net0'/></interface>",
            "no MAC address",
        ),
    ],
)
def test_what_is_odd_about_an_interface_is_said_in_one_line(
    host: FakeHost, interface: str, said: str
) -> None:
    intent = "<v:interface alias='ua-net0' policy='veb' dev='eth0'/>"
    metadata = f"<metadata><v:guest xmlns:v='urn:vnet-lock:guest:1'>{intent}</v:guest></metadata>"
    xml = guest("a", metadata=metadata).replace(b"<devices>", f"<devices>{interface}".encode())
    status, told = run_with(Fake(), host.settings, "prepare", xml)
    (line,) = told.said
    assert (status, said in line, "\n" in line) == (1, True, False)


@pytest.mark.parametrize("operation", [*REFUSING, "stopped", "release", "reconnect"])
@pytest.mark.parametrize(
    "error", [Refused("VF is held by b"), VnetLockError("kernel says no"), BadInput("what")]
)
def test_a_failure_refuses_a_start_and_is_only_told_elsewhere(
    host: FakeHost, operation: str, error: VnetLockError
) -> None:
    status_file(host, "a")
    status, told = run_with(Fake(error), host.settings, operation, guest("a", VF0))
    refuses = operation in REFUSING
    assert status == (1 if refuses else 0)
    assert told.said == [f"vnet-lock: {error}"]
    assert told.logged == ([] if refuses else [f'{operation} of guest "a": {error}'])


@pytest.mark.parametrize("operation", [*REFUSING, "stopped", "release", "reconnect"])
def test_a_defect_of_ours_keeps_its_traceback(host: FakeHost, operation: str) -> None:
    status_file(host, "a")
    status, told = run_with(Fake(KeyError("oops")), host.settings, operation, guest("a", VF0))
    assert status == (1 if operation in REFUSING else 0)
    assert "Traceback" in told.logged[0]
    assert "Traceback" in told.said[0]
    assert told.said[-1].startswith("vnet-lock: unexpected KeyError")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("xml", [b"", b"<domain>", b"<domain><name>a</name></domain>", b"\xff"])
def test_xml_that_makes_no_sense_kills_no_running_guest(host: FakeHost, operation: str, xml: bytes) -> None:
    status, _ = run_with(Fake(), host.settings, operation, xml)
    assert status == 0 or operation in REFUSING


@pytest.mark.parametrize("name", ["", "../a", "/etc/passwd"])
def test_a_name_that_leads_out_of_libvirts_directory_is_refused(host: FakeHost, name: str) -> None:
    with pytest.raises(BadInput):
        perform(Call(host.settings, DAEMON, name, "prepare", guest("a", VF0)), lambda _: Fake())


def test_a_daemon_that_is_gone_can_own_nothing(host: FakeHost) -> None:
    with pytest.raises(VnetLockError, match="daemon"):
        perform(Call(host.settings, DAEMON + 1, "a", "prepare", guest("a", VF0)), lambda _: Fake())


# --- orders, with the real session --------------------------------------------------------------


class Libvirt:
    """Calls the hook as libvirt does."""

    def __init__(self, host: FakeHost) -> None:
        self.host = host

    def call(self, name: str, operation: str, *vfs: str) -> int:
        call = Call(self.host.settings, DAEMON, name, operation, guest(name, *vfs))
        told = Told()
        status = answer(call, Session, told)
        assert not any("Traceback" in line for line in told.said), told.said
        return status

    def held(self) -> dict[str, str]:
        """Whose each VF is."""
        claims = ClaimTable(self.host.settings).read()
        assert not claims.damaged
        found = {claim.resource.text: claim.owner.name for claim in claims.records}
        assert len(found) == len(claims.records), "a resource has two claims"
        return found


@pytest.fixture
def libvirt(host: FakeHost) -> Libvirt:
    return Libvirt(host)


V0, V1 = f"vf:{VF0}", f"vf:{VF1}"


def test_a_guests_whole_life(libvirt: Libvirt) -> None:
    for operation in ("prepare", "start", "started"):
        assert libvirt.call("a", operation, VF0, VF1) == 0
        assert libvirt.held() == {V0: "a", V1: "a"}
    assert libvirt.call("a", "reconnect", VF0, VF1) == 0
    assert libvirt.call("a", "stopped", VF0, VF1) == 0
    assert libvirt.held() == {V0: "a", V1: "a"}
    assert libvirt.call("a", "release", VF0, VF1) == 0
    assert libvirt.held() == {}


def test_release_without_prepare_touches_nothing(libvirt: Libvirt) -> None:
    assert libvirt.call("b", "prepare", VF0) == 0
    assert libvirt.call("a", "release", VF0) == 0
    assert libvirt.held() == {V0: "b"}


def test_prepare_twice_is_one_claim(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare", VF0) == 0
    assert libvirt.call("a", "prepare", VF0) == 0
    assert libvirt.held() == {V0: "a"}
    assert libvirt.call("a", "release", VF0) == 0
    assert libvirt.held() == {}


def test_prepare_after_a_release_that_never_came_takes_what_is_asked_for_now(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare", VF0) == 0
    assert libvirt.call("a", "prepare", VF1) == 0
    assert libvirt.held()[V1] == "a"
    assert libvirt.call("a", "release", VF1) == 0
    assert libvirt.held() == {}


@pytest.mark.parametrize("operation", ["migrate", "restore"])
def test_what_is_reserved_for_a_guest_on_its_way_is_nobody_elses_until_its_start_takes_it(
    libvirt: Libvirt, operation: str
) -> None:
    assert libvirt.call("a", operation, VF0) == 0
    assert libvirt.held() == {V0: "a"}
    assert libvirt.call("b", "prepare", VF0) == 1
    assert libvirt.call("b", operation, VF0) == 1
    assert libvirt.call("a", operation, VF0, VF1) == 0
    assert libvirt.held() == {V0: "a", V1: "a"}
    assert libvirt.call("a", "prepare", VF0) == 0
    assert libvirt.held() == {V0: "a"}
    assert libvirt.call("a", "release", VF0) == 0
    assert libvirt.held() == {}


def test_a_reservation_that_no_start_took_is_over_when_its_time_is(libvirt: Libvirt) -> None:
    """libvirt calls no release where a migration fails before its prepare."""
    host = libvirt.host
    libvirt.host.settings = replace(host.settings, reservation_s=-1)
    assert libvirt.call("a", "migrate", VF0) == 0
    assert libvirt.held() == {V0: "a"}
    libvirt.host.settings = replace(host.settings, reservation_s=60)
    assert libvirt.call("b", "prepare", VF0) == 0
    assert libvirt.held() == {V0: "b"}


def test_a_reservation_ends_with_the_daemon_that_would_have_started_the_guest(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "migrate", VF0) == 0
    shutil.rmtree(f"{libvirt.host.settings.proc}/{DAEMON}")
    assert Session(libvirt.host.settings).heal()
    assert libvirt.held() == {}


def test_a_guest_that_runs_here_keeps_what_it_has_whoever_says_it_comes(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare", VF0) == 0
    before = ClaimTable(libvirt.host.settings).read()
    assert libvirt.call("a", "migrate", VF0) == 1
    assert ClaimTable(libvirt.host.settings).read() == before


def test_a_late_release_never_touches_the_next_owners_claim(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare", VF0) == 0
    assert libvirt.call("a", "release", VF0) == 0
    assert libvirt.call("b", "prepare", VF0) == 0
    assert libvirt.call("a", "release", VF0) == 0
    assert libvirt.held() == {V0: "b"}


def test_the_second_guest_is_refused_and_gets_nothing_at_all(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare", VF1) == 0
    assert libvirt.call("b", "prepare", VF0, VF1) == 1
    assert libvirt.held() == {V1: "a"}
    # libvirt calls these after a refusal.
    assert libvirt.call("b", "stopped", VF0, VF1) == 0
    assert libvirt.call("b", "release", VF0, VF1) == 0
    assert libvirt.held() == {V1: "a"}


def test_a_vf_that_a_network_chose_is_claimed_at_start_or_the_start_is_refused(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare") == 0
    assert libvirt.call("a", "start", VF0) == 0
    assert libvirt.held() == {V0: "a"}
    assert libvirt.call("b", "prepare") == 0
    assert libvirt.call("b", "start", VF0) == 1
    assert libvirt.call("b", "release", VF0) == 0
    assert libvirt.held() == {V0: "a"}


def test_reconnect_claims_anew_after_the_table_was_lost(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare", VF0) == 0
    shutil.rmtree(libvirt.host.settings.run)
    assert libvirt.call("a", "reconnect", VF0) == 0
    assert libvirt.held() == {V0: "a"}


def test_reconnect_lets_a_running_guest_live_though_another_has_its_vf(libvirt: Libvirt) -> None:
    assert libvirt.call("b", "prepare", VF0) == 0
    assert libvirt.call("a", "reconnect", VF0) == 0
    assert libvirt.held() == {V0: "b"}


def test_a_guest_whose_release_was_killed_is_dead_once_libvirt_has_given_its_devices_back(
    libvirt: Libvirt,
) -> None:
    assert libvirt.call("a", "prepare", VF0) == 0
    status_file(libvirt.host, "a")
    # QEMU is dead; libvirt gives its devices back until it removes the file.
    assert libvirt.call("b", "prepare", VF0) == 1
    assert libvirt.call("a", "stopped", VF0) == 0
    assert libvirt.call("b", "prepare", VF0) == 1
    status_file(libvirt.host, "a", there=False)
    assert libvirt.call("b", "prepare", VF0) == 0
    assert libvirt.held() == {V0: "b"}
    assert libvirt.call("a", "release", VF0) == 0
    assert libvirt.held() == {V0: "b"}


def test_a_guest_that_failed_before_it_had_a_qemu_is_held_until_its_release(libvirt: Libvirt) -> None:
    """There is no file, but libvirt gives back what it had prepared for the guest."""
    assert libvirt.call("a", "prepare", VF0) == 0
    assert libvirt.call("a", "stopped", VF0) == 0
    assert libvirt.call("b", "prepare", VF0) == 1
    assert libvirt.call("a", "release", VF0) == 0
    assert libvirt.call("b", "prepare", VF0) == 0


def test_a_late_stopped_of_an_earlier_daemon_says_nothing_of_the_next_start(
    libvirt: Libvirt, host: FakeHost
) -> None:
    """The daemon was killed while the hook ran, and another has started the guest anew meanwhile."""
    assert libvirt.call("a", "prepare", VF0) == 0
    status_file(host, "a")
    host.process(DAEMON - 1, "libvirtd")
    assert answer(Call(host.settings, DAEMON - 1, "a", "stopped", guest("a", VF0)), Session, Told()) == 0
    status_file(host, "a", there=False)
    assert libvirt.call("b", "prepare", VF0) == 1
    assert libvirt.held() == {V0: "a"}


def test_a_late_release_of_an_earlier_daemon_takes_nothing_from_the_next_start(
    libvirt: Libvirt, host: FakeHost
) -> None:
    """The daemon was killed while the hook ran; it is gone, or not quite."""
    assert libvirt.call("a", "prepare", VF0) == 0
    call = Call(host.settings, DAEMON - 1, "a", "release", guest("a", VF0))
    for _ in range(2):
        assert answer(call, Session, Told()) == 0
        assert libvirt.held() == {V0: "a"}
        host.process(DAEMON - 1, "libvirtd")
    assert libvirt.call("a", "release", VF0) == 0
    assert libvirt.held() == {}


def test_init_is_no_daemon_of_libvirts_but_where_it_runs_guests(host: FakeHost) -> None:
    """A hook's parent is init once its daemon was killed, and a claim of init's would be one for ever."""
    host.process(1, "init")
    call = Call(host.settings, 1, "a", "prepare", guest("a", VF0))
    with pytest.raises(VnetLockError, match="is gone"):
        perform(call, Session)
    assert ClaimTable(host.settings).read().records == ()
    host.settings = replace(host.settings, proc="/proc")
    owner = read_owner(host.settings, "a", UUIDS["a"], 1)
    assert owner.process is None


def test_a_guest_that_starts_anew_after_a_killed_release_is_held_again(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare", VF0) == 0
    status_file(libvirt.host, "a")
    assert libvirt.call("a", "stopped", VF0) == 0
    status_file(libvirt.host, "a", there=False)
    assert libvirt.call("a", "prepare", VF0) == 0
    assert libvirt.call("b", "prepare", VF0) == 1
    assert libvirt.held() == {V0: "a"}


def test_a_vf_of_a_guest_whose_daemon_died_while_starting_it_is_free_again(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare", VF0) == 0
    # Another process has the daemon's pid by now.
    build(libvirt.host.root, {f"proc/{DAEMON}/stat": stat_line(DAEMON, "libvirtd", start_ticks=9999)})
    assert libvirt.call("b", "prepare", VF0) == 0
    assert libvirt.held() == {V0: "b"}


def test_a_vf_that_is_not_there_is_refused(libvirt: Libvirt) -> None:
    assert libvirt.call("a", "prepare", VF0, "0000:02:10.0") == 1
    assert libvirt.held() == {}


def of_a_user(host: FakeHost, operation: str, xml: bytes) -> tuple[int, Told]:
    told = Told()
    return answer(Call(host.settings, DAEMON, "b", operation, xml, is_root=False), Session, told), told


def test_a_users_own_daemon_is_refused_what_others_have_and_claims_nothing(
    libvirt: Libvirt, host: FakeHost
) -> None:
    assert libvirt.call("a", "prepare", VF0) == 0
    status, told = of_a_user(host, "prepare", guest("b", VF0))
    assert status == 1
    assert told.said[0].startswith(f'vnet-lock: VF {VF0} is held by guest "a"')
    # What root has given him is his.
    for operation in ("prepare", "start", "reconnect", "stopped", "release"):
        assert of_a_user(host, operation, guest("b", VF1)) == (0, Told())
    # He may call his guest as he likes.
    for operation in ("stopped", "release"):
        assert of_a_user(host, operation, guest("a", VF0)) == (0, Told())
    assert libvirt.held() == {V0: "a"}


def test_a_users_own_daemon_is_told_that_networks_of_the_host_take_root(host: FakeHost) -> None:
    status, told = of_a_user(host, "prepare", (XML / "intent-vepa.xml").read_bytes())
    assert status == 1
    (line,) = told.said
    assert "qemu:///system" in line


ORDERS = list(itertools.product(("prepare", "start", "stopped", "release", "reconnect"), repeat=3))


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_no_order_of_operations_ever_gives_a_vf_to_two_guests(
    libvirt: Libvirt, order: tuple[str, ...]
) -> None:
    """One guest in any order, the other in its usual one in between: only one holds the VF at any time."""
    usual = ("prepare", "start", "release")
    for mine, others in zip(order, usual, strict=True):
        before = libvirt.held()
        status = libvirt.call("a", mine, VF0)
        holder = libvirt.held().get(V0)
        if before.get(V0) == "b":
            assert holder == "b"
            assert status == (1 if mine in ("prepare", "start") else 0)
        else:
            assert status == 0
            assert holder == {"release": None, "stopped": before.get(V0)}.get(mine, "a")
        before = libvirt.held()
        status = libvirt.call("b", others, VF0)
        holder = libvirt.held().get(V0)
        if before.get(V0) == "a":
            assert holder == "a"
            assert status == (0 if others == "release" else 1)
    libvirt.call("a", "release", VF0)
    libvirt.call("b", "release", VF0)
    assert libvirt.held() == {}


# --- as a process -------------------------------------------------------------------------------


@pytest.fixture
def installed(host: FakeHost) -> Path:
    """The installed hook on the fake host, but with the real /proc, where real processes are."""
    shutil.rmtree(host.root / "proc")
    (host.root / "proc").symlink_to("/proc")
    hooks_install.install(host.settings)
    return Path(host.settings.etc_libvirt, "hooks/qemu.d/50-vnet-lock")


def run_hook(path: Path, name: str, operation: str, *vfs: str) -> subprocess.CompletedProcess[str]:
    argv = [path, name, operation, "begin", "-"]
    return subprocess.run(argv, input=guest(name, *vfs).decode(), capture_output=True, text=True, check=False)


def test_the_installed_hook_claims_refuses_and_releases(host: FakeHost, installed: Path) -> None:
    done = run_hook(installed, "a", "prepare", VF0, VF1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (claim,) = ClaimTable(host.settings).read().on(Resource.parse(V0))
    assert claim.owner.name == "a"
    assert claim.owner.process
    # This test plays the daemon that runs the hook.
    assert claim.owner.process.pid == os.getpid()
    assert run_hook(installed, "a", "start", VF0, VF1).returncode == 0
    done = run_hook(installed, "b", "prepare", VF1)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f'vnet-lock: VF {VF1} is held by guest "a"')
    assert done.stderr.count("\n") == 1
    assert run_hook(installed, "a", "release").returncode == 0
    assert ClaimTable(host.settings).read().records == ()
    assert run_hook(installed, "b", "prepare", VF1).returncode == 0


SLOW = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from vnet_lock.front import hook
report = hook.Outlets()
hook.arm_deadline(sys.argv[2], report, 60, 1)
class Slow:
    def acquire(self, owner, requests):
        try:
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(60)
        finally:
            open("undone", "w").close()
            time.sleep(float(sys.argv[4]))
    def adopt(self, owner, requests, running):
        self.acquire(owner, requests)
    def release(self, owner):
        self.acquire(owner, ())
call = hook.Call(hook.Settings.under(sys.argv[3]), os.getppid(), "a", sys.argv[2], sys.stdin.buffer.read())
sys.exit(hook.answer(call, lambda _: Slow(), report))
"""


@pytest.mark.parametrize("operation", ["prepare", "reconnect", "release"])
@pytest.mark.parametrize(("undo_s", "said"), [("0", "gave up"), ("60", "could not undo")])
def test_a_hook_ends_at_its_deadline_and_undoes_first(
    host: FakeHost, installed: Path, operation: str, undo_s: str, said: str
) -> None:
    assert installed
    started = time.monotonic()
    top = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SLOW, top, operation, host.root, undo_s],
        input=guest("a", VF0),
        capture_output=True,
        cwd=host.root,
        check=False,
    )
    assert time.monotonic() - started < 20
    assert (host.root / "undone").exists()
    assert done.returncode == (1 if operation == "prepare" else 0)
    assert said in done.stderr.decode()


def test_a_process_started_below_the_hook_holds_none_of_libvirts_pipes() -> None:
    top = Path(__file__).parents[2]
    code = (
        "import subprocess, sys; sys.path.insert(0, sys.argv[1])\n"
        "from vnet_lock.front import hook\n"
        "report = hook.Outlets()\n"
        "child = subprocess.Popen(['sleep', '30'], stdin=subprocess.DEVNULL, close_fds=False)\n"
        "report.say(str(child.pid))\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, top],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    try:
        assert time.monotonic() - started < 20
        assert done.stdout == ""
    finally:
        os.kill(int(done.stderr), signal.SIGKILL)
