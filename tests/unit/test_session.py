"""What a session does to the claim table, in which order, and what is left when it is cut short anywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_host import BOOT_ID, VFIO, FakeHost, build, routing_id
from tests.fake_host import Link as SymbolicLink
from vnet_lock.administration import Administration
from vnet_lock.claims import ClaimTable, Writer
from vnet_lock.combination import Backend, Policy
from vnet_lock.errors import BadInput, Refused, VnetLockError
from vnet_lock.journal import Driver, EswitchMode, Link, SocketFile, Sysctl, VfAdmin
from vnet_lock.kernel.processes import read_boot_id, this_process
from vnet_lock.locks import guard
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, PciAddress, Process, Resource, State
from vnet_lock.request import Fixed, Form, Intent
from vnet_lock.session import Session
from vnet_lock.settings import Settings

TOP = Path(__file__).parents[2]
PF = PciAddress.parse("0000:01:00.0")
WEB, DB, DAEMON = 50, 60, 40
UUID = {"web": "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a0a", "db": "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a0b"}
TOKEN = "0123456789abcdef"
NOBODY = 65534


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A PF with three free VFs that VFIO has, two guests and libvirt's daemon; nothing is waited for long."""
    host = FakeHost(tmp_path)
    # The kernel is asked for the PF's VFs: every machine has this one, with none.
    host.vfs = host.add_pf(PF.text, "lo", [VFIO] * 3)
    for pid, command in ((os.getpid(), "pytest"), (WEB, "qemu"), (DB, "qemu"), (DAEMON, "libvirtd")):
        host.add_process(pid, command)
    host.settings = replace(host.settings, busy_wait_s=0.4, free_wait_s=0.1, guard_wait_s=5, pf_wait_s=5)
    return host


@pytest.fixture
def session(host: FakeHost) -> Administration:
    return Administration(host.settings)


def qemu(pid: int) -> Owner:
    return Owner(OwnerKind.QEMU, f"vm{pid}", BOOT_ID, process=Process(pid, 4242))


def libvirt(host: FakeHost, name: str) -> Owner:
    pid_file = f"{host.settings.libvirt_run}/qemu/{name}.pid"
    return Owner(OwnerKind.LIBVIRT, name, BOOT_ID, UUID[name], Process(DAEMON, 4242), pid_file)


def hostdev(vf: PciAddress, interface: str = "net0") -> Fixed:
    return Fixed(interface, vf, Form.HOSTDEV)


def intent(*devs: str) -> Intent:
    return Intent("net0", Policy.VEB, devs, backends=(Backend.VFIO,))


def held(host: FakeHost) -> dict[str, str]:
    """Whose each resource is; each has one claim."""
    claims = ClaimTable(host.settings).read()
    assert not claims.damaged
    found = {claim.resource.text: claim.owner.name for claim in claims.records}
    assert len(found) == len(claims.records), "a resource has two claims"
    return found


def put(host: FakeHost, vf: PciAddress, owner: Owner, **more: object) -> Claim:
    """A claim record, whatever speaks against it."""
    claim = Claim(Resource.vf(vf), Mode.EXCLUSIVE, State.ACTIVE, owner, TOKEN, "net0", time.time(), pf=PF)
    claim = replace(claim, **more)
    host.claim(claim)
    return claim


def share_group(host: FakeHost, first: PciAddress, second: PciAddress) -> None:
    """Put the second function into the IOMMU group of the first."""
    group = f"{host.settings.sys}/kernel/iommu_groups/{routing_id(first)}"
    device = f"{host.settings.sys}/bus/pci/devices/{second}"
    os.unlink(f"{device}/iommu_group")
    os.symlink(f"../../../kernel/iommu_groups/{routing_id(first)}", f"{device}/iommu_group")
    os.symlink(f"../../../../bus/pci/devices/{second}", f"{group}/devices/{second}")


@contextmanager
def stopped_at(
    path: str, act: Callable[[], object], holding: contextmanager
) -> Iterator[tuple[Future, object]]:
    """Run ``act`` in a thread until it waits for the lock file ``path``, which ``holding`` has; then go on.

    The body sees the world at that moment and may change it.
    """
    with ThreadPoolExecutor(1) as pool, holding as held_lock:
        future = pool.submit(act)
        deadline = time.monotonic() + 10
        while _count_open(path) < 2:
            assert not future.done(), future.exception()
            assert time.monotonic() < deadline, f"nobody waits for {path}"
            time.sleep(0.005)
        yield future, held_lock


def _count_open(path: str) -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{name}") == path
    return count


def at_guard(host: FakeHost, act: Callable[[], object]):
    """Stop before the claim table is written; the body has its Writer."""
    return stopped_at(host.settings.guard_path, act, ClaimTable(host.settings).guarded())


def at_pf_lock(host: FakeHost, act: Callable[[], object]):
    """Stop after the claims are written, before the PF is touched."""
    path = host.settings.pf_lock_path(PF.text)
    return stopped_at(path, act, guard(path, 5, "the PF"))


# --- a device that goes away meanwhile ------------------------------------------------------------


def test_a_vf_that_vanishes_before_it_is_claimed_fails_in_one_line_and_leaves_no_claim(
    host: FakeHost, session: Session
) -> None:
    vf = host.vfs[1]
    with at_guard(host, lambda: session.acquire(libvirt(host, "web"), [hostdev(vf)])) as (future, _):
        host.remove_vf(PF.text, 1)
    with pytest.raises(VnetLockError, match=str(vf)) as caught:
        future.result()
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert held(host) == {}


def test_a_vf_that_vanishes_before_its_journal_is_written_fails_and_is_given_back(
    host: FakeHost, session: Session
) -> None:
    vf = host.vfs[1]
    with at_pf_lock(host, lambda: session.acquire(qemu(WEB), [intent(vf.text)])) as (future, _):
        assert held(host) == {f"vf:{vf}": "vm50"}
        host.remove_vf(PF.text, 1)
    with pytest.raises(VnetLockError, match=str(vf)) as caught:
        future.result()
    assert caught.value.exit_code == 1
    assert held(host) == {}


def test_of_several_interfaces_one_that_fails_takes_back_what_the_others_got(
    host: FakeHost, session: Session
) -> None:
    wanted = [hostdev(host.vfs[0], "a"), intent(host.vfs[1].text)]
    with at_pf_lock(host, lambda: session.acquire(qemu(WEB), wanted)) as (future, _):
        assert len(held(host)) == 2
        host.remove_vf(PF.text, 1)
    with pytest.raises(VnetLockError):
        future.result()
    assert held(host) == {}


def test_a_claim_removed_by_hand_under_a_worker_is_an_error_not_a_crash(
    host: FakeHost, session: Session
) -> None:
    with at_pf_lock(host, lambda: session.acquire(qemu(WEB), [intent(host.vfs[1].text)])) as (future, _):
        for name in os.listdir(host.settings.claims_dir):
            os.unlink(f"{host.settings.claims_dir}/{name}")
    with pytest.raises(VnetLockError, match="gone"):
        future.result()


def test_a_vf_that_is_not_there_at_all_is_bad_input(session: Session) -> None:
    with pytest.raises(BadInput, match=r"0000:09:00\.0"):
        session.acquire(qemu(WEB), [hostdev(PciAddress.parse("0000:09:00.0"))])


# --- what stands in the way -----------------------------------------------------------------------


def break_record(host: FakeHost, how: str) -> str:
    (name,) = os.listdir(host.settings.claims_dir)
    path = f"{host.settings.claims_dir}/{name}"
    if how == "cut short":
        os.truncate(path, 40)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "of another user":
        os.chown(path, NOBODY, NOBODY)
    else:
        os.chmod(path, 0o666)
    return path


BREAKS = ["cut short", "empty", "writable by others"] + (["of another user"] if os.geteuid() == 0 else [])


@pytest.mark.parametrize("how", BREAKS)
def test_a_record_that_cannot_be_trusted_holds_its_vf_and_the_refusal_names_it(
    host: FakeHost, session: Administration, how: str
) -> None:
    put(host, host.vfs[0], qemu(999))  # even of a dead owner
    path = break_record(host, how)
    with pytest.raises(Refused) as caught:
        session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    assert path in str(caught.value)
    assert os.path.exists(path)
    session.acquire(qemu(WEB), [hostdev(host.vfs[1])])
    with pytest.raises(Refused, match=r"cannot be trusted"):
        session.release_resource(Resource.vf(host.vfs[0]), force=True)


def test_a_record_that_cannot_be_trusted_keeps_others_from_the_whole_pf(
    host: FakeHost, session: Session
) -> None:
    put(host, host.vfs[0], qemu(999))
    path = break_record(host, "cut short")
    with pytest.raises(Refused) as caught:
        session.acquire(qemu(WEB), [hostdev(PF)])
    assert path in str(caught.value)


def test_a_record_of_a_pf_that_cannot_be_trusted_keeps_others_from_its_vfs(
    host: FakeHost, session: Session
) -> None:
    put(host, host.vfs[0], qemu(999), resource=Resource.pf(PF), pf=None)
    path = break_record(host, "cut short")
    with pytest.raises(Refused) as caught:
        session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    assert path in str(caught.value)


def test_a_run_directory_that_is_not_writable_is_one_clear_line(host: FakeHost, session: Session) -> None:
    if os.geteuid() == 0:
        os.chown(host.settings.run, NOBODY, NOBODY)
    else:
        os.rmdir(host.settings.claims_dir)
        os.chmod(host.settings.run, 0o555)
    with pytest.raises(VnetLockError, match=r"not ours|run as root") as caught:
        session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    os.chmod(host.settings.run, 0o755)
    assert caught.value.exit_code == 1
    assert host.settings.run in str(caught.value)


def test_a_run_directory_of_a_file_is_one_clear_line(host: FakeHost, session: Session) -> None:
    shutil.rmtree(host.settings.run)
    Path(host.settings.run).write_text("")
    with pytest.raises(VnetLockError, match="move away") as caught:
        session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    assert host.settings.run in str(caught.value)


def test_a_use_that_ended_while_we_looked_is_no_strangers(host: FakeHost, session: Session) -> None:
    vf = host.vfs[0]
    claim = put(host, vf, qemu(DB))
    host.open_vfio(DB, vf)
    with at_guard(host, lambda: session.acquire(qemu(WEB), [hostdev(vf)])) as (future, writer):
        assert isinstance(writer, Writer)
        writer.drop(claim)
        host.remove_process(DB)
    future.result()
    assert held(host) == {f"vf:{vf}": "vm50"}


def test_a_strangers_use_is_refused_with_his_pid(host: FakeHost, session: Session) -> None:
    host.add_process(77, "stranger")
    host.open_vfio(77, host.vfs[0])
    with pytest.raises(Refused, match=r"stranger \(pid 77\)"):
        session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    assert held(host) == {}


# --- the same guest again -------------------------------------------------------------------------


def test_acquiring_twice_keeps_one_claim_for_each_interface(host: FakeHost, session: Session) -> None:
    web = libvirt(host, "web")
    wanted = [hostdev(host.vfs[0], "a"), hostdev(host.vfs[1], "b")]
    first = session.acquire(web, wanted)
    second = session.acquire(web, wanted)
    assert {grant.token for grant in first}.isdisjoint(grant.token for grant in second)
    assert held(host) == {f"vf:{host.vfs[0]}": "web", f"vf:{host.vfs[1]}": "web"}
    assert {claim.state for claim in ClaimTable(host.settings).read().records} == {State.ACTIVE}


def test_a_guest_that_is_refused_the_second_time_holds_nothing(host: FakeHost, session: Session) -> None:
    session.acquire(qemu(DB), [hostdev(host.vfs[1])])
    session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    with pytest.raises(Refused):
        session.acquire(qemu(WEB), [hostdev(host.vfs[1])])
    assert held(host) == {f"vf:{host.vfs[1]}": "vm60"}


def test_beside_keeps_what_there_is_and_never_gives_it_twice(host: FakeHost, session: Session) -> None:
    session.acquire(qemu(WEB), [hostdev(host.vfs[0])], beside=True)
    session.acquire(qemu(WEB), [hostdev(host.vfs[1])], beside=True)
    with pytest.raises(Refused):
        session.acquire(qemu(WEB), [hostdev(host.vfs[0])], beside=True)
    assert held(host) == {f"vf:{host.vfs[0]}": "vm50", f"vf:{host.vfs[1]}": "vm50"}


def test_giving_back_one_grant_leaves_the_guests_others(host: FakeHost, session: Session) -> None:
    session.acquire(qemu(WEB), [hostdev(host.vfs[0])], beside=True)
    second = session.acquire(qemu(WEB), [hostdev(host.vfs[1])], beside=True)
    session.give_back(second)
    session.give_back(second)
    assert held(host) == {f"vf:{host.vfs[0]}": "vm50"}


# --- release --------------------------------------------------------------------------------------


def test_releasing_twice_is_no_error(host: FakeHost, session: Session) -> None:
    session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    session.release(qemu(WEB))
    session.release(qemu(WEB))
    assert held(host) == {}


def test_a_late_release_by_the_old_owner_never_touches_the_next_owners_claim(
    host: FakeHost, session: Session
) -> None:
    old = session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    session.release(qemu(WEB))
    session.acquire(qemu(DB), [hostdev(host.vfs[0])])
    session.release(qemu(WEB))
    session.give_back(old)
    assert held(host) == {f"vf:{host.vfs[0]}": "vm60"}


def test_a_release_that_comes_while_the_claims_are_handed_over_leaves_them_to_the_new_owner(
    host: FakeHost, session: Session
) -> None:
    claim = put(host, host.vfs[0], qemu(WEB))
    with at_guard(host, lambda: session.release(qemu(WEB))) as (future, writer):
        assert isinstance(writer, Writer)
        writer.replace(replace(claim, owner=qemu(DB)))
    future.result()
    assert held(host) == {f"vf:{host.vfs[0]}": "vm60"}


def test_one_interface_is_given_back_and_the_others_stay(host: FakeHost, session: Session) -> None:
    grants = session.acquire(qemu(WEB), [hostdev(host.vfs[0], "a"), hostdev(host.vfs[1], "b")])
    session.release_tokens(qemu(WEB), [grants[0].token])
    assert held(host) == {f"vf:{host.vfs[1]}": "vm50"}


def test_a_device_that_is_still_open_stays_claimed_until_it_is_not(host: FakeHost, session: Session) -> None:
    vf = host.vfs[0]
    session.acquire(qemu(WEB), [hostdev(vf)])
    host.open_vfio(WEB, vf)
    with pytest.raises(VnetLockError, match=r"still in use by qemu \(pid 50\)"):
        session.release(qemu(WEB))
    with pytest.raises(Refused):
        session.acquire(qemu(DB), [hostdev(vf)])
    host.remove_process(WEB)
    session.acquire(qemu(DB), [hostdev(vf)])
    assert held(host) == {f"vf:{vf}": "vm60"}


def test_a_release_that_fails_for_one_device_still_gives_back_the_others(
    host: FakeHost, session: Session
) -> None:
    session.acquire(qemu(WEB), [hostdev(host.vfs[0], "a"), hostdev(host.vfs[1], "b")])
    host.open_vfio(WEB, host.vfs[0])
    with pytest.raises(VnetLockError, match="vnet-lock gc"):
        session.release(qemu(WEB))
    assert held(host) == {f"vf:{host.vfs[0]}": "vm50"}


def test_a_pf_that_is_busy_for_too_long_fails_its_vfs_release_only(host: FakeHost) -> None:
    session = Administration(replace(host.settings, pf_wait_s=0.1))
    (other,) = host.add_pf("0000:02:00.0", "eth1", [VFIO])
    put(host, host.vfs[0], qemu(WEB))
    put(host, other, qemu(WEB), pf=PciAddress.parse("0000:02:00.0"), token=TOKEN[::-1])
    with guard(host.settings.pf_lock_path(PF.text), 1, "the PF"):
        with pytest.raises(VnetLockError, match=str(PF)):
            session.release(qemu(WEB))
        assert held(host) == {f"vf:{host.vfs[0]}": "vm50"}
        # Nor does it keep anybody from another PF.
        session.claim(person(DB), Resource.vf(other), Mode.EXCLUSIVE)
    assert len(session.heal()) == 1
    assert held(host) == {f"vf:{other}": "tool"}


def test_siblings_in_an_iommu_group_are_claimed_and_released_together(
    host: FakeHost, session: Session
) -> None:
    share_group(host, host.vfs[0], host.vfs[1])
    session.acquire(qemu(WEB), [hostdev(host.vfs[1])])
    assert held(host) == {f"vf:{host.vfs[0]}": "vm50", f"vf:{host.vfs[1]}": "vm50"}
    with pytest.raises(Refused):
        session.acquire(qemu(DB), [hostdev(host.vfs[0])])
    session.release(qemu(WEB))
    assert held(host) == {}


# --- heal -----------------------------------------------------------------------------------------


def test_a_claim_of_a_dead_process_is_healed(host: FakeHost, session: Session) -> None:
    put(host, host.vfs[0], qemu(999))
    assert [len(one.claims) for one in session.heal(dry_run=True)] == [1]
    assert len(held(host)) == 1
    assert session.heal()[0].failures == ()
    assert held(host) == {}
    assert session.heal() == []


def test_a_claim_whose_pid_is_anothers_by_now_is_healed(host: FakeHost, session: Session) -> None:
    put(host, host.vfs[0], replace(qemu(WEB), process=Process(WEB, 1)))
    session.heal()
    assert held(host) == {}


def test_a_claim_of_another_boot_is_healed(host: FakeHost, session: Session) -> None:
    put(host, host.vfs[0], replace(qemu(WEB), boot_id="another"))
    session.heal()
    assert held(host) == {}


def test_what_is_stale_is_healed_by_the_next_claim_on_whatever_device(
    host: FakeHost, session: Session
) -> None:
    """Else what dead guests left on a device that many share would pile up."""
    put(host, host.vfs[0], qemu(999))
    session.acquire(qemu(WEB), [hostdev(host.vfs[1])])
    assert held(host) == {f"vf:{host.vfs[1]}": "vm50"}


def test_what_cannot_be_healed_keeps_no_other_claim_from_being_made(host: FakeHost, session: Session) -> None:
    put(host, host.vfs[0], qemu(999), journal=(Driver(host.vfs[0].text, "gone-driver"),))
    session.acquire(qemu(WEB), [hostdev(host.vfs[1])])
    assert held(host) == {f"vf:{host.vfs[0]}": "vm999", f"vf:{host.vfs[1]}": "vm50"}


def test_from_a_pid_namespace_nothing_is_proven_of_the_hosts_processes(
    host: FakeHost, session: Session
) -> None:
    """A container that has the host's run directory sees none of the host's processes, dead or alive."""
    link = Path(f"{host.settings.proc}/self/ns/pid")
    build(host.root, {"proc/self/ns/pid": SymbolicLink("pid:[4026531836]")})
    session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    host.remove_process(WEB)
    link.unlink()
    link.symlink_to("pid:[4026532000]")
    assert session.heal() == []
    with pytest.raises(Refused):
        session.acquire(qemu(DB), [hostdev(host.vfs[0])])
    session.acquire(qemu(DB), [hostdev(host.vfs[1])])
    host.remove_process(DB)
    assert [one.claims[0].owner.name for one in session.heal()] == ["vm60"]
    link.unlink()
    link.symlink_to("pid:[4026531836]")
    assert [one.claims[0].owner.name for one in session.heal()] == ["vm50"]


def test_what_was_made_in_the_hosts_network_is_undone_there_alone(
    host: FakeHost, session: Administration
) -> None:
    """In another network namespace its devices seem to be gone, so nothing of them would be undone."""
    build(host.root, {"proc/1/ns/net": "", "proc/self/ns/net": SymbolicLink("../../1/ns/net")})
    session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    host.remove_process(WEB)
    ours = Path(f"{host.settings.proc}/self/ns/net")
    ours.unlink()
    ours.touch()
    assert session.heal() == []
    with pytest.raises(
        VnetLockError, match="can only be given back in the host's own network namespace: nsenter"
    ):
        session.release_resource(Resource.vf(host.vfs[0]), force=True)
    assert held(host) == {f"vf:{host.vfs[0]}": "vm50"}
    ours.unlink()
    ours.symlink_to("../../1/ns/net")
    assert session.heal()[0].failures == ()
    assert held(host) == {}


def test_of_another_boot_nothing_is_put_back_but_files_are_removed(host: FakeHost, session: Session) -> None:
    """The kernel that had it is gone: what is called so now is as whoever set this boot up wants it."""
    vf, path = host.vfs[0], Path(f"{host.settings.proc}/sys/{SETTING}")
    build(host.root, {f"proc/sys/{SETTING}": "1"})
    left = Path(host.settings.socket_path(TOKEN))
    left.touch()
    journal = (Sysctl(SETTING, "0"), Driver(vf.text, "gone-driver"), SocketFile(str(left)))
    put(host, vf, replace(qemu(WEB), boot_id="another"), journal=journal)
    host.open_vfio(DB, vf)
    assert session.heal()[0].failures == ()
    assert held(host) == {}
    assert path.read_text() == "1"
    assert not left.exists()


def test_what_a_guest_of_another_boot_shared_is_nothing_that_there_is_now(
    host: FakeHost, session: Session
) -> None:
    build(host.root, {f"proc/sys/{SETTING}": "1"})
    put(host, host.vfs[0], replace(qemu(DB), boot_id="another"), journal=(Sysctl(SETTING, "0"),))
    forward(host, session, host.vfs[1], qemu(WEB))
    session.release(qemu(WEB))
    assert read_setting(host) == "1"
    assert held(host) == {}


@pytest.mark.parametrize("state", [State.RESERVED, State.RELEASING])
def test_the_work_of_a_dead_worker_is_finished_though_the_owner_lives(
    host: FakeHost, session: Session, state: State
) -> None:
    put(host, host.vfs[0], qemu(WEB), state=state, worker=Process(998, 1))
    session.heal()
    assert held(host) == {}


@pytest.mark.parametrize("state", [State.RESERVED, State.RELEASING])
def test_a_living_worker_is_waited_for_though_the_owner_is_dead(
    host: FakeHost, session: Session, state: State
) -> None:
    put(host, host.vfs[0], qemu(999), state=state, worker=Process(DB, 4242))
    assert session.heal() == []
    started = time.monotonic()
    with pytest.raises(Refused):
        session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    waited = time.monotonic() - started
    assert (waited > 0.4) is (state is State.RELEASING)
    assert held(host) == {f"vf:{host.vfs[0]}": "vm999"}


def test_what_is_being_released_is_had_as_soon_as_it_is_free(host: FakeHost) -> None:
    session = Session(replace(host.settings, busy_wait_s=10))
    claim = put(host, host.vfs[0], qemu(DB), state=State.RELEASING, worker=Process(DB, 4242))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(session.acquire, qemu(WEB), [hostdev(host.vfs[0])])
        time.sleep(0.2)
        assert not future.done()
        with ClaimTable(host.settings).guarded() as writer:
            writer.drop(claim)
        assert future.result()


@pytest.mark.parametrize("kind", ["qemu", "libvirt"])
def test_a_living_owners_claim_is_never_healed(host: FakeHost, session: Session, kind: str) -> None:
    put(host, host.vfs[0], qemu(WEB) if kind == "qemu" else libvirt(host, "web"))
    assert session.heal() == []
    with pytest.raises(Refused):
        session.acquire(qemu(DB), [hostdev(host.vfs[0])])
    assert len(held(host)) == 1


def test_a_claim_that_gets_a_living_owner_while_it_is_healed_is_left_alone(
    host: FakeHost, session: Session
) -> None:
    claim = put(host, host.vfs[0], qemu(999))
    with at_guard(host, session.heal) as (future, writer):
        assert isinstance(writer, Writer)
        writer.replace(replace(claim, owner=qemu(WEB)))
    future.result()
    (after,) = ClaimTable(host.settings).read().records
    assert (after.state, after.owner) == (State.ACTIVE, qemu(WEB))


def test_claims_left_by_who_was_killed_while_handing_over_live_by_either_owner(
    host: FakeHost, session: Session
) -> None:
    put(host, host.vfs[0], qemu(WEB))
    put(host, host.vfs[1], qemu(999))
    assert session.heal() == []
    host.remove_process(WEB)
    session.heal()
    assert held(host) == {}


def test_what_cannot_be_undone_stays_claimed_and_is_told(host: FakeHost, session: Session) -> None:
    vf = host.vfs[0]
    put(host, vf, qemu(999), journal=(Driver(vf.text, "gone-driver"),))
    (healed,) = session.heal()
    assert "gone-driver" in healed.failures[0]
    with pytest.raises(Refused):
        session.acquire(qemu(WEB), [hostdev(vf)])
    os.mkdir(f"{host.settings.sys}/bus/pci/drivers/gone-driver")
    assert held(host) == {f"vf:{vf}": "vm999"}


def test_what_is_gone_is_undone(host: FakeHost, session: Session) -> None:
    vf = host.vfs[2]
    journal = (Link(vf.text, "52:54:00:00:00:09", 1500, False), Driver(vf.text, "igbvf"))
    put(host, vf, qemu(999), journal=journal)
    host.remove_vf(PF.text, 2)
    assert session.heal()[0].failures == ()
    assert held(host) == {}


@pytest.mark.parametrize(
    "entry",
    [VfAdmin(PF.text, 0, "52:54:00:00:00:09", 42, 0), EswitchMode(PF.text, "veb", "vepa")],
    ids=["vf-admin", "eswitch-mode"],
)
def test_what_only_a_pf_can_put_back_waits_for_one_that_is_elsewhere(
    host: FakeHost, session: Session, entry: VfAdmin | EswitchMode
) -> None:
    """In another network namespace, say: its VFs keep what was set, so the next guest would have it."""
    put(host, host.vfs[0], qemu(999), journal=(entry,))
    os.rename(f"{host.settings.sys}/bus/pci/devices/{PF}/net", f"{host.root}/elsewhere")
    (healed,) = session.heal()
    assert f"PF {PF} has no network device here" in healed.failures[0]
    assert held(host) == {f"vf:{host.vfs[0]}": "vm999"}
    for index in range(3):
        host.remove_vf(PF.text, index)
    assert session.heal()[0].failures == ()
    assert held(host) == {}


# --- adopt ----------------------------------------------------------------------------------------


def test_what_was_claimed_at_prepare_is_not_claimed_again_at_start(host: FakeHost, session: Session) -> None:
    web = libvirt(host, "web")
    session.acquire(web, [hostdev(host.vfs[0])])
    assert session.adopt(web, [hostdev(host.vfs[0]), hostdev(host.vfs[1], "b")]) == [f"vf:{host.vfs[1]}"]
    assert session.adopt(web, [hostdev(host.vfs[0]), hostdev(host.vfs[1], "b")]) == []
    assert held(host) == {f"vf:{host.vfs[0]}": "web", f"vf:{host.vfs[1]}": "web"}
    session.release(web)
    assert held(host) == {}


def test_what_another_has_claimed_is_not_adopted(host: FakeHost, session: Session) -> None:
    session.acquire(qemu(DB), [hostdev(host.vfs[0])])
    with pytest.raises(Refused, match="pid 60"):
        session.adopt(libvirt(host, "web"), [hostdev(host.vfs[1], "a"), hostdev(host.vfs[0], "b")])
    assert held(host) == {f"vf:{host.vfs[0]}": "vm60"}


def test_what_another_process_has_open_through_vfio_is_not_adopted(host: FakeHost, session: Session) -> None:
    host.add_process(77, "stranger")
    host.open_vfio(77, host.vfs[0])
    with pytest.raises(Refused, match="pid 77"):
        session.adopt(libvirt(host, "web"), [hostdev(host.vfs[0])])
    assert held(host) == {}


def test_a_dead_guests_claim_is_no_obstacle_to_adopting(host: FakeHost, session: Session) -> None:
    put(host, host.vfs[0], qemu(999))
    session.adopt(libvirt(host, "web"), [hostdev(host.vfs[0])])
    assert held(host) == {f"vf:{host.vfs[0]}": "web"}


@pytest.mark.parametrize("state", [State.RESERVED, State.RELEASING])
def test_what_a_dead_process_left_half_done_of_the_guests_own_is_adopted_whole(
    host: FakeHost, session: Session, state: State
) -> None:
    """Else it would be healed under the guest."""
    web = libvirt(host, "web")
    put(host, host.vfs[0], replace(web, process=None), state=state, worker=Process(998, 1))
    assert session.adopt(web, [hostdev(host.vfs[0])]) == []
    (claim,) = session.table.read().records
    assert (claim.owner, claim.state, claim.worker) == (web, State.ACTIVE, None)


def test_what_is_being_plugged_into_the_guest_is_left_to_who_does_it(
    host: FakeHost, session: Session
) -> None:
    web = libvirt(host, "web")
    put(host, host.vfs[0], web, state=State.RESERVED, worker=Process(DB, 4242))
    put(host, host.vfs[1], web, state=State.RELEASING, worker=Process(DB, 4242), token="f" * 16)
    before = session.table.read().records
    assert session.adopt(web, [hostdev(host.vfs[0])]) == []
    with pytest.raises(Refused, match=f"pid {DB}"):
        session.adopt(web, [hostdev(host.vfs[1])])
    assert session.table.read().records == before


def test_a_start_waits_for_a_vf_that_is_just_being_released(host: FakeHost) -> None:
    session = Session(replace(host.settings, busy_wait_s=10))
    claim = put(host, host.vfs[0], qemu(DB), state=State.RELEASING, worker=Process(DB, 4242))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(session.adopt, libvirt(host, "web"), [hostdev(host.vfs[0])])
        time.sleep(0.2)
        assert not future.done()
        with ClaimTable(host.settings).guarded() as writer:
            writer.drop(claim)
        assert future.result() == [f"vf:{host.vfs[0]}"]


# --- by hand --------------------------------------------------------------------------------------


def person(pid: int) -> Owner:
    return Owner(OwnerKind.PROCESS, "tool", BOOT_ID, process=Process(pid, 4242))


def test_a_claim_by_hand_is_had_once_and_given_back_without_force(
    host: FakeHost, session: Administration
) -> None:
    vf = Resource.vf(host.vfs[0])
    first = session.claim(person(WEB), vf, Mode.EXCLUSIVE)
    assert session.claim(person(WEB), vf, Mode.EXCLUSIVE) == first
    with pytest.raises(Refused):
        session.claim(person(DB), vf, Mode.EXCLUSIVE)
    assert session.release_resource(vf) is True
    assert session.release_resource(vf) is False
    assert held(host) == {}


def test_a_share_of_a_pf_becomes_the_whole_pf_if_nobody_else_has_a_share(
    host: FakeHost, session: Administration
) -> None:
    pf = Resource.pf(PF)
    session.claim(person(WEB), pf, Mode.SHARED)
    assert session.claim(person(WEB), pf, Mode.EXCLUSIVE).mode is Mode.EXCLUSIVE
    with pytest.raises(Refused):
        session.claim(person(DB), pf, Mode.SHARED)
    session.release_resource(pf)
    session.claim(person(WEB), pf, Mode.SHARED)
    session.claim(person(DB), pf, Mode.SHARED)
    with pytest.raises(Refused):
        session.claim(person(WEB), pf, Mode.EXCLUSIVE)


def test_a_claim_by_a_devices_name_is_had_and_given_back_by_that_name(
    host: FakeHost, session: Administration
) -> None:
    nic = Resource.nic("lo")
    made = session.claim(person(WEB), nic, Mode.SHARED)
    assert made.resource == Resource.pf(PF)
    assert session.claim(person(WEB), nic, Mode.SHARED) == made
    assert session.release_resource(nic) is True
    assert held(host) == {}


def test_a_living_guests_claim_takes_force(host: FakeHost, session: Administration) -> None:
    session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    with pytest.raises(Refused, match=r"vm50.*--force"):
        session.release_resource(Resource.vf(host.vfs[0]))
    assert session.release_resource(Resource.vf(host.vfs[0]), force=True)
    assert held(host) == {}


@pytest.mark.parametrize(("interface", "combination"), [("net0", "veb-sriov-tap"), ("vfs", None)])
def test_a_living_command_of_ours_takes_force(
    host: FakeHost, session: Administration, interface: str, combination: str | None
) -> None:
    """What it has was made for it; a claim by hand is another thing of such an owner's."""
    vf = Resource.vf(host.vfs[0])
    mine = person(WEB)
    host.claim(
        Claim(vf, Mode.EXCLUSIVE, State.ACTIVE, mine, "a" * 16, interface, 0.0, combination=combination)
    )
    with pytest.raises(Refused, match="--force"):
        session.release_resource(vf)
    assert session.release_resource(vf, force=True)


def test_a_dead_guests_claim_takes_no_force(host: FakeHost, session: Administration) -> None:
    put(host, host.vfs[0], qemu(999))
    assert session.release_resource(Resource.vf(host.vfs[0]))
    assert held(host) == {}


def test_a_device_in_use_is_not_released_even_by_force(host: FakeHost, session: Administration) -> None:
    session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    host.open_vfio(WEB, host.vfs[0])
    with pytest.raises(Refused, match="pid 50") as caught:
        session.release_resource(Resource.vf(host.vfs[0]), force=True)
    assert caught.value.exit_code == 4
    (claim,) = ClaimTable(host.settings).read().records
    assert claim.state is State.ACTIVE


def test_a_release_by_hand_that_the_kernel_fails_is_no_refusal(
    host: FakeHost, session: Administration
) -> None:
    vf = host.vfs[0]
    put(host, vf, person(WEB), journal=(Driver(vf.text, "gone-driver"),))
    with pytest.raises(VnetLockError, match="gone-driver") as caught:
        session.release_resource(Resource.vf(vf), force=True)
    assert caught.value.exit_code == 1
    assert len(held(host)) == 1


def test_claims_are_handed_over_as_they_are(host: FakeHost, session: Session) -> None:
    session.acquire(qemu(WEB), [hostdev(host.vfs[0])])
    before = ClaimTable(host.settings).read().records
    session.hand_over(qemu(WEB), qemu(DB))
    after = ClaimTable(host.settings).read().records
    assert after == tuple(replace(claim, owner=qemu(DB)) for claim in before)
    session.release(qemu(WEB))
    assert len(held(host)) == 1
    session.release(qemu(DB))
    assert held(host) == {}


# --- the number of VFs ----------------------------------------------------------------------------


def numvfs(host: FakeHost) -> int:
    return int(Path(host.settings.sys, "bus/pci/devices", PF.text, "sriov_numvfs").read_text())


def test_the_number_of_vfs_changes_where_nobody_uses_one(host: FakeHost, session: Administration) -> None:
    session.set_numvfs(PF, 5)
    assert numvfs(host) == 5
    assert held(host) == {}


def test_a_share_of_the_pf_is_no_obstacle_to_changing_its_vfs(
    host: FakeHost, session: Administration
) -> None:
    session.claim(person(WEB), Resource.pf(PF), Mode.SHARED)
    session.set_numvfs(PF, 5)
    assert numvfs(host) == 5


@pytest.mark.parametrize("case", ["claimed", "in use", "damaged", "whole PF"])
def test_the_number_of_vfs_stays_where_one_is_in_use(
    host: FakeHost, session: Administration, case: str
) -> None:
    if case == "claimed":
        put(host, host.vfs[2], qemu(WEB))
    elif case == "in use":
        host.open_vfio(WEB, host.vfs[2])
    elif case == "damaged":
        put(host, host.vfs[2], qemu(WEB))
        break_record(host, "cut short")
    else:
        put(host, host.vfs[2], qemu(WEB), resource=Resource.pf(PF), pf=None)
    with pytest.raises(Refused):
        session.set_numvfs(PF, 5)
    assert numvfs(host) == 3
    assert len(os.listdir(host.settings.claims_dir)) == (case != "in use")


@pytest.mark.parametrize("count", [-1, 8, 10**30])
def test_a_number_of_vfs_that_the_pf_cannot_have_is_bad_input(session: Administration, count: int) -> None:
    with pytest.raises(BadInput, match="0 to 7"):
        session.set_numvfs(PF, count)


def test_vfs_that_another_made_meanwhile_are_not_destroyed(host: FakeHost, session: Administration) -> None:
    host.add_pf("0000:02:00.0", "eth1")
    empty = PciAddress.parse("0000:02:00.0")
    path = host.settings.pf_lock_path(empty.text)
    file = Path(host.settings.sys, "bus/pci/devices", empty.text, "sriov_numvfs")
    lock = guard(path, 5, "the PF")
    with stopped_at(path, lambda: session.set_numvfs(empty, 2), lock) as (future, _):
        file.write_text("4\n")
    with pytest.raises(Refused, match="another"):
        future.result()
    assert file.read_text() == "4\n"


# --- as processes ---------------------------------------------------------------------------------

PROCESS = """
import json, os, signal, sys
from vnet_lock.errors import Refused
from vnet_lock.kernel.processes import read_boot_id, this_process
from vnet_lock.model import *
from vnet_lock.request import Fixed, Form, Intent
from vnet_lock.session import Session
from vnet_lock.settings import Settings
settings = Settings.under(sys.argv[1])
session = Session(settings)
owner = Owner(OwnerKind.QEMU, sys.argv[2], read_boot_id(settings), process=this_process(settings))
wanted = [Fixed("net0", PciAddress.parse(sys.argv[3]), Form.HOSTDEV)]
print("ready", flush=True)
sys.stdin.readline()
"""
ONCE = """
try:
    session.acquire(owner, wanted)
    print("got", flush=True)
except Refused as error:
    print("refused", flush=True)
sys.stdin.readline()
"""
AGAIN = """
import select
tries = got = 0
while not select.select([0], [], [], 0)[0]:
    tries += 1
    try:
        session.acquire(owner, wanted)
        got += 1
    except Refused:
        pass
print(json.dumps([tries, got]), flush=True)
"""


class Contender:
    """A process that wants a VF."""

    def __init__(self, host: FakeHost, name: str, vf: PciAddress, code: str) -> None:
        argv = [sys.executable, "-c", PROCESS + code, host.root, name, vf.text]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TOP
        )
        assert self.hear() == "ready"

    def tell(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def real(host: FakeHost) -> FakeHost:
    """The fake devices with the real processes of this machine."""
    shutil.rmtree(host.settings.proc)
    os.symlink("/proc", host.settings.proc)
    return host


def test_of_two_processes_that_want_one_vf_exactly_one_gets_it(real: FakeHost) -> None:
    vf = real.vfs[0]
    both = [Contender(real, name, vf, ONCE) for name in ("a", "b")]
    try:
        for one in both:
            one.tell()
        heard = [one.hear() for one in both]
        assert sorted(heard) == ["got", "refused"]
        assert held(real) == {f"vf:{vf}": "ab"[heard.index("got")]}
    finally:
        for one in both:
            one.end()
    # Killed: the next one heals.
    third = Contender(real, "c", vf, ONCE)
    try:
        third.tell()
        assert third.hear() == "got"
    finally:
        third.end()


def test_a_guest_that_acquires_again_and_again_never_lets_another_in(real: FakeHost) -> None:
    vf = real.vfs[0]
    session = Session(Settings.under(real.root))
    owner = Owner(OwnerKind.QEMU, "web", read_boot_id(real.settings), process=this_process(real.settings))
    session.acquire(owner, [hostdev(vf)])
    contender = Contender(real, "db", vf, AGAIN)
    try:
        contender.tell()
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            session.acquire(owner, [hostdev(vf)])
        assert held(real) == {f"vf:{vf}": "web"}
        contender.tell()
        tries, got = json.loads(contender.hear())
    finally:
        contender.end()
    assert tries > 0
    assert got == 0


def test_a_process_killed_at_the_pf_lock_leaves_a_claim_that_the_next_one_heals(real: FakeHost) -> None:
    vf = real.vfs[0]
    code = ONCE.replace("wanted)", "[intent])").replace(
        "try:",
        "from vnet_lock.combination import *\n"
        f"intent = Intent('net0', Policy.VEB, ('{vf}',), backends=(Backend.VFIO,))\ntry:",
        1,
    )
    os.makedirs(real.settings.run, exist_ok=True)
    with guard(real.settings.pf_lock_path(PF.text), 5, "the PF"):
        contender = Contender(real, "db", vf, code)
        contender.tell()
        deadline = time.monotonic() + 10
        while not held(real):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(contender.process.pid, signal.SIGKILL)
        contender.end()
    assert held(real) == {f"vf:{vf}": "db"}
    session = Session(Settings.under(real.root))
    owner = Owner(OwnerKind.QEMU, "web", read_boot_id(real.settings), process=this_process(real.settings))
    session.acquire(owner, [hostdev(vf)])
    assert held(real) == {f"vf:{vf}": "web"}


# --- what guests share ----------------------------------------------------------------------------

SETTING = "net/ipv4/conf/lo/forwarding"


def read_setting(host: FakeHost) -> str:
    return Path(f"{host.settings.proc}/sys/{SETTING}").read_text()


def forward(host: FakeHost, session: Session, vf: PciAddress, owner: Owner) -> None:
    """What a port does that needs a setting of the whole host."""
    (grant,) = session.acquire(owner, [hostdev(vf)])
    with session._holding.sharing(grant.token) as share:
        share(Sysctl(SETTING, read_setting(host)))
        Path(f"{host.settings.proc}/sys/{SETTING}").write_text("1")


@pytest.mark.parametrize("first_out", [WEB, DB])
def test_what_two_guests_share_is_restored_with_the_last_to_what_was_before_the_first(
    host: FakeHost, session: Session, first_out: int
) -> None:
    path = Path(f"{host.settings.proc}/sys/{SETTING}")
    path.parent.mkdir(parents=True)
    path.write_text("0")
    forward(host, session, host.vfs[0], qemu(WEB))
    forward(host, session, host.vfs[1], qemu(DB))
    session.release(qemu(first_out))
    assert read_setting(host) == "1"
    session.release(qemu(WEB + DB - first_out))
    assert read_setting(host) == "0"


def test_what_a_dead_guest_shared_stays_until_it_is_healed(host: FakeHost, session: Session) -> None:
    path = Path(f"{host.settings.proc}/sys/{SETTING}")
    path.parent.mkdir(parents=True)
    path.write_text("0")
    forward(host, session, host.vfs[0], qemu(WEB))
    forward(host, session, host.vfs[1], qemu(DB))
    host.remove_process(WEB)
    session.release(qemu(DB))
    assert read_setting(host) == "1"
    session.heal()
    assert read_setting(host) == "0"
