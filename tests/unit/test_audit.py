"""What an audit finds, on hosts made of files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.fake_host import VFIO, FakeHost
from vnet_lock.audit import Audit, Severity, Standing, audit
from vnet_lock.claims import ClaimTable
from vnet_lock.kernel.kinship import Kinship
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import Claim, Mode, OwnerKind, PciAddress, Process, Resource, State
from vnet_lock.session import Session

PF = PciAddress.parse("0000:01:00.0")
TOKEN, OTHER_TOKEN = "a" * 16, "b" * 16


@pytest.fixture
def host(tmp_path):
    return FakeHost(tmp_path)


def look(host: FakeHost, devices: list[str] | None = None) -> Audit:
    claims = ClaimTable(host.settings).read()
    return audit(host.settings, read_inventory(host.settings, devices), claims, devices)


def claim(host: FakeHost, resource: Resource, pid: int, token: str = TOKEN, **changes) -> Claim:
    pf = PF if resource.kind == "vf" else None
    plain = Claim(resource, Mode.EXCLUSIVE, State.ACTIVE, host.owner(pid), token, "net0", 1000.0, pf=pf)
    return replace(plain, **changes)


def kinds(found: Audit) -> list[tuple[str, str]]:
    return [(finding.kind, finding.resource) for finding in found.findings]


def test_a_host_that_nobody_uses_has_nothing_to_find(host):
    vfs = host.add_pf("0000:01:00.0", "eth0", ["igbvf", "igbvf"])
    found = look(host)
    assert found.findings == ()
    assert found.state_of(Resource.vf(vfs[0])).standing is Standing.FREE
    assert found.state_of(Resource.pf(PF)).standing is Standing.FREE


@pytest.mark.parametrize("state", list(State))
def test_a_living_claim_is_in_the_state_that_it_says(host, state):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    host.add_process(50)
    worker = host.add_process(51, "vnet-lock")
    host.claim(claim(host, Resource.vf(vf), 50, state=state, worker=worker))
    found = look(host)
    assert found.state_of(Resource.vf(vf)).standing == state.value
    assert found.findings == ()
    assert found.pids == {host.owner(50): 50}


def test_a_claim_of_a_dead_owner_is_stale_and_only_a_warning(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    host.claim(claim(host, Resource.vf(vf), 50))
    found = look(host)
    assert found.state_of(Resource.vf(vf)).standing is Standing.STALE
    assert kinds(found) == [("stale", f"vf:{vf}")]
    assert not found.has_error
    assert found.stale == {TOKEN}
    assert "vnet-lock gc" in found.findings[0].message


def test_a_claim_whose_pid_is_another_process_by_now_is_stale(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    host.add_process(50)
    owner = replace(host.owner(50), process=Process(50, 1))
    host.claim(claim(host, Resource.vf(vf), 50, owner=owner))
    assert look(host).state_of(Resource.vf(vf)).standing is Standing.STALE


def test_a_claim_from_before_a_reboot_is_stale(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    host.add_process(50)
    host.claim(claim(host, Resource.vf(vf), 50, owner=replace(host.owner(50), boot_id="another")))
    assert look(host).state_of(Resource.vf(vf)).standing is Standing.STALE


def test_a_reserved_claim_whose_worker_died_is_stale_while_its_owner_lives(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    host.add_process(50)
    host.claim(claim(host, Resource.vf(vf), 50, state=State.RESERVED, worker=Process(51, 4242)))
    found = look(host)
    assert found.state_of(Resource.vf(vf)).standing is Standing.STALE
    assert "what was working on it died" in found.findings[0].message


@pytest.mark.parametrize("worker_lives", [True, False])
@pytest.mark.parametrize("owner_lives", [True, False])
@pytest.mark.parametrize("states", [("active", "active"), ("reserved", "active"), ("active", "releasing")])
def test_what_is_shown_as_stale_is_what_would_be_healed(host, states, owner_lives, worker_lives):
    """Whoever is killed between two records of one interface leaves them in different states."""
    vfs = host.add_pf("0000:01:00.0", "eth0", ["igbvf", "igbvf"])
    if owner_lives:
        host.add_process(50)
    if worker_lives:
        host.add_process(51, "vnet-lock")
    for vf, state in zip(vfs, map(State, states), strict=True):
        worker = None if state is State.ACTIVE else Process(51, 4242)
        host.claim(claim(host, Resource.vf(vf), 50, state=state, worker=worker))
    host.add_process(os.getpid(), "pytest")
    found = look(host)
    healed = {one.token for each in Session(host.settings).heal(dry_run=True) for one in each.claims}
    assert found.stale == healed
    assert [found.state_of(Resource.vf(vf)).standing is Standing.STALE for vf in vfs] == [bool(healed)] * 2
    unfinished = states != ("active", "active")
    assert bool(healed) is not (worker_lives if unfinished else owner_lives)


def test_a_vf_in_use_without_a_claim_is_foreign_and_its_pid_is_named(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", [VFIO])
    host.add_process(77)
    host.open_vfio(77, vf)
    found = look(host)
    assert found.state_of(Resource.vf(vf)).standing is Standing.FOREIGN
    assert kinds(found) == [("foreign", f"vf:{vf}")]
    assert found.has_error
    assert "(pid 77)" in found.findings[0].message
    assert f"vnet-lock claim vf:{vf} --pid 77" in found.findings[0].message


@pytest.mark.parametrize("parents", [(), (78,), (79, 78)])
def test_the_owner_and_what_it_started_may_use_what_it_claimed(host, parents):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", [VFIO])
    for pid, parent in ((77, 1), (78, 77), (79, 78)):
        host.add_process(pid, parent=parent)
    host.open_vfio(max((77, *parents)), vf)
    host.claim(claim(host, Resource.vf(vf), 77))
    found = look(host)
    assert found.state_of(Resource.vf(vf)).standing is Standing.ACTIVE
    assert found.findings == ()


def test_a_stranger_on_a_claimed_vf_is_a_conflict(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", [VFIO])
    host.add_process(50)
    host.add_process(77)
    host.open_vfio(77, vf)
    host.claim(claim(host, Resource.vf(vf), 50))
    found = look(host)
    assert found.state_of(Resource.vf(vf)).standing is Standing.CONFLICT
    assert kinds(found) == [("conflict", f"vf:{vf}")]
    assert "(pid 50)" in found.findings[0].message
    assert "(pid 77)" in found.findings[0].message


def test_a_process_that_uses_what_a_dead_owner_claimed_is_foreign(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", [VFIO])
    host.add_process(77)
    host.open_vfio(77, vf)
    host.claim(claim(host, Resource.vf(vf), 50))
    found = look(host)
    assert found.state_of(Resource.vf(vf)).standing is Standing.FOREIGN
    assert sorted(kinds(found)) == [("foreign", f"vf:{vf}"), ("stale", f"vf:{vf}")]


def test_two_guests_with_claims_on_one_vf_are_a_conflict_said_once(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    for pid in (50, 51):
        host.add_process(pid)
    host.claim(claim(host, Resource.vf(vf), 50), claim(host, Resource.vf(vf), 51, OTHER_TOKEN))
    found = look(host)
    assert found.state_of(Resource.vf(vf)).standing is Standing.CONFLICT
    assert kinds(found) == [("conflict", f"vf:{vf}")]


def test_two_claims_of_one_guest_on_one_vf_are_none(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    host.add_process(50)
    host.claim(claim(host, Resource.vf(vf), 50), claim(host, Resource.vf(vf), 50, OTHER_TOKEN))
    assert look(host).findings == ()


def test_a_pf_held_alone_and_a_vf_of_it_are_a_conflict(host):
    vfs = host.add_pf("0000:01:00.0", "eth0", ["igbvf", "igbvf"])
    for pid in (50, 51):
        host.add_process(pid)
    host.claim(claim(host, Resource.pf(PF), 50), claim(host, Resource.vf(vfs[1]), 51, OTHER_TOKEN))
    found = look(host)
    assert [finding.kind for finding in found.findings] == ["conflict"]
    assert found.state_of(Resource.pf(PF)).standing is Standing.CONFLICT
    assert found.state_of(Resource.vf(vfs[1])).standing is Standing.CONFLICT
    assert found.state_of(Resource.vf(vfs[0])).standing is Standing.FREE


def test_a_shared_pf_and_vfs_of_it_go_together(host):
    vfs = host.add_pf("0000:01:00.0", "eth0", ["igbvf", "igbvf"])
    for pid in (50, 51, 52):
        host.add_process(pid)
    host.claim(
        claim(host, Resource.pf(PF), 50, mode=Mode.SHARED),
        claim(host, Resource.pf(PF), 51, OTHER_TOKEN, mode=Mode.SHARED),
        claim(host, Resource.vf(vfs[0]), 52, "c" * 16),
    )
    found = look(host)
    assert found.findings == ()
    assert found.state_of(Resource.pf(PF)).standing is Standing.ACTIVE
    assert len(found.state_of(Resource.pf(PF)).claims) == 2


def test_a_damaged_record_is_an_error_and_its_vf_is_not_free(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    host.add_process(50)
    host.claim(claim(host, Resource.vf(vf), 50))
    (name,) = os.listdir(host.settings.claims_dir)
    os.truncate(f"{host.settings.claims_dir}/{name}", 20)
    found = look(host)
    assert kinds(found) == [("damaged", f"vf:{vf}")]
    assert found.has_error
    assert found.state_of(Resource.vf(vf)).standing is Standing.CONFLICT


def test_a_claim_on_a_vf_that_is_gone_is_an_error(host):
    host.add_pf("0000:01:00.0", "eth0", ["igbvf", "igbvf"])
    host.add_process(50)
    gone = PciAddress.parse("0000:01:10.2")
    host.claim(claim(host, Resource.vf(gone), 50))
    host.remove_vf("0000:01:00.0", 1)
    found = look(host)
    assert kinds(found) == [("vanished", f"vf:{gone}")]
    assert found.findings[0].severity is Severity.ERROR


def test_a_link_of_ours_that_no_claim_knows_is_an_orphan(host):
    host.add_pf("0000:01:00.0", "eth0")
    host.add_process(50)
    host.add_link("vl-known", ["eth0"], alias=f"vnet-lock:{TOKEN}")
    host.add_link("vl-lost", ["eth0"], alias=f"vnet-lock:{OTHER_TOKEN}")
    host.add_link("somebodys", ["eth0"], alias="a person's note")
    host.claim(claim(host, Resource.pf(PF), 50, mode=Mode.SHARED))
    assert kinds(look(host)) == [("orphan", "nic:vl-lost")]
    assert kinds(look(host, ["eth0"])) == [("orphan", "nic:vl-lost")]


def test_a_macvtap_made_for_a_claim_is_its_use_and_another_is_a_strangers(host):
    vfs = host.add_pf("0000:01:00.0", "eth0", ["igbvf", "igbvf"])
    host.add_process(50)
    host.add_link("vl0", ["eth0v0"], alias=f"vnet-lock:{TOKEN}")
    host.add_link("vl1", ["eth0v1"], alias=f"vnet-lock:{OTHER_TOKEN}")
    host.claim(
        claim(host, Resource.vf(vfs[0]), 50),
        claim(host, Resource.vf(vfs[1]), 50, "c" * 16),
    )
    found = look(host)
    assert found.state_of(Resource.vf(vfs[0])).standing is Standing.ACTIVE
    assert found.state_of(Resource.vf(vfs[1])).standing is Standing.CONFLICT


def test_bridges_and_vlans_on_a_pf_are_the_hosts_own_business(host):
    host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    host.add_link("eth0.5", ["eth0"], uevent="vlan")
    assert look(host).findings == ()


@pytest.mark.parametrize(
    ("uid", "severity", "step"),
    [
        (0, Severity.ERROR, "; who has it: lsns --type net"),
        (1000, Severity.WARNING, "; run as root to see where that is"),
    ],
)
def test_what_takes_root_to_see_is_no_error_to_others(host, monkeypatch, uid, severity, step):
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    shutil.rmtree(host.root / f"sys/bus/pci/devices/{vf}/net")
    shutil.rmtree(host.root / "sys/class/net/eth0v0")
    found = look(host)
    (finding,) = found.findings
    assert (finding.severity, finding.kind) == (severity, "foreign")
    assert finding.message.endswith(step)
    assert found.state_of(Resource.vf(vf)).standing is Standing.FOREIGN


def test_where_no_process_is_known_the_way_to_find_it_is_said(host):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", ["igb_uio"])
    shutil.rmtree(host.root / f"sys/bus/pci/devices/{vf}/net")
    shutil.rmtree(host.root / "sys/class/net/eth0v0")
    (finding,) = look(host).findings
    assert finding.message == (
        f"VF {vf} is in use without a claim (bound to igb_uio); who has it: fuser -v {host.settings.dev}/uio*"
    )


def test_two_guests_with_one_mac_on_one_pf_are_a_warning(host):
    vfs = host.add_pf("0000:01:00.0", "eth0", ["igbvf", "igbvf"])
    for pid in (50, 51):
        host.add_process(pid)
    mac = "52:54:00:00:00:01"
    host.claim(
        claim(host, Resource.vf(vfs[0]), 50, mac=mac),
        claim(host, Resource.vf(vfs[1]), 51, OTHER_TOKEN, mac=mac),
    )
    found = look(host)
    assert [finding.kind for finding in found.findings] == ["same-mac"]
    assert not found.has_error


def test_a_look_at_one_pf_leaves_claims_elsewhere_alone(host):
    host.add_pf("0000:01:00.0", "eth0", ["igbvf"])
    (other,) = host.add_pf("0000:02:00.0", "eth1", ["igbvf"])
    host.claim(claim(host, Resource.vf(other), 50, pf=PciAddress.parse("0000:02:00.0")))
    assert look(host, ["eth0"]).findings == ()
    assert kinds(look(host, ["eth1"])) == [("stale", f"vf:{other}")]


LOCK_AND_WAIT = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_libvirt_guests_qemu_is_the_one_that_locks_its_pid_file(host, tmp_path):
    (vf,) = host.add_pf("0000:01:00.0", "eth0", [VFIO])
    host.add_process(60, "libvirtd")
    owner = replace(
        host.owner(60, "web1", OwnerKind.LIBVIRT, "11111111-0000-4000-8000-000000000000"),
        pid_file=str(tmp_path / "web1.pid"),
    )
    host.claim(claim(host, Resource.vf(vf), 60, owner=owner))
    assert look(host).pids == {owner: None}

    command = [sys.executable, "-c", LOCK_AND_WAIT, str(tmp_path / "web1.pid")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        qemu.stdout.readline()
        host.add_process(qemu.pid)
        host.open_vfio(qemu.pid, vf)
        host.remove_process(60)
        found = look(host)
        qemu.stdin.close()
    assert found.pids == {owner: qemu.pid}
    assert found.findings == (), "it lives as long as its QEMU, whatever becomes of the daemon"
    assert found.state_of(Resource.vf(vf)).standing is Standing.ACTIVE
    host.remove_process(qemu.pid)
    assert look(host).state_of(Resource.vf(vf)).standing is Standing.STALE


def test_what_a_libvirt_daemon_started_is_not_its_guests_own(host):
    host.add_process(60, "libvirtd")
    host.add_process(61, "dnsmasq", parent=60)
    owner = host.owner(60, "web1", OwnerKind.LIBVIRT, "11111111-0000-4000-8000-000000000000")
    kinship = Kinship(host.settings)
    assert kinship.is_own(owner, 60)
    assert not kinship.is_own(owner, 61)
