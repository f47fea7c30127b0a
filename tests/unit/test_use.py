"""Whose an observed use is."""

from __future__ import annotations

import pytest

from vnet_lock.journal import MadeLink
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, PciAddress, Process, Resource, State, UseKind, User
from vnet_lock.use import counts, foreign_users

PCI = PciAddress.parse("0000:01:10.0")
VF = Resource.vf(PCI)
PF = Resource.pf(PciAddress.parse("0000:01:00.0"))
TOKEN, OTHER_TOKEN = "a" * 16, "b" * 16
UUID, OTHER_UUID = "11111111-0000-4000-8000-000000000000", "22222222-0000-4000-8000-000000000000"
QEMU = Owner(OwnerKind.QEMU, "vm", "boot", process=Process(77, 5))
LIBVIRT = Owner(OwnerKind.LIBVIRT, "web1", "boot", uuid=UUID, process=Process(50, 5))

# Pid 78 is a child of 77; 80 is libvirt's QEMU.
FAMILY = {(QEMU, 77), (QEMU, 78), (LIBVIRT, 50), (LIBVIRT, 80)}


def is_own(owner: Owner, pid: int) -> bool:
    return (owner, pid) in FAMILY


def claim(owner: Owner = QEMU, worker: int | None = None) -> Claim:
    link = MadeLink("vl-first", "vl-final", f"vnet-lock:{TOKEN}")
    return Claim(
        VF,
        Mode.EXCLUSIVE,
        State.ACTIVE,
        owner,
        TOKEN,
        "net0",
        0.0,
        journal=(link,),
        worker=Process(worker, 5) if worker else None,
    )


def user(kind: UseKind, pid: int | None = None, link: str | None = None, mark: str | None = None) -> User:
    return User(pid, "qemu" if pid else "", "evidence", kind, link, mark)


@pytest.mark.parametrize("kind", list(UseKind))
def test_any_use_of_a_vf_without_a_claim_is_foreign(kind):
    assert foreign_users(VF, [user(kind)], [], is_own) == (user(kind),)


@pytest.mark.parametrize("kind", list(UseKind))
def test_a_use_that_names_nobody_is_presumed_the_claims(kind):
    assert foreign_users(VF, [user(kind)], [claim()], is_own) == ()


@pytest.mark.parametrize(
    ("seen", "owner"),
    [
        (user(UseKind.VFIO, 77), QEMU),
        (user(UseKind.VFIO, 78), QEMU),
        (user(UseKind.VFIO, 80), LIBVIRT),
        (user(UseKind.UPPER, 50, "macvtap0"), LIBVIRT),
        (user(UseKind.UPPER, 90, "vl-x", TOKEN), QEMU),
        (user(UseKind.UPPER, 90, "vl-first"), QEMU),
        (user(UseKind.UPPER, 90, "vl-final"), QEMU),
        (user(UseKind.LIBVIRT, 90, mark=UUID), LIBVIRT),
        (user(UseKind.SOCKET, 90), QEMU),
        (user(UseKind.NAMESPACE, 90), QEMU),
    ],
)
def test_what_a_claims_owner_does_is_not_foreign(seen, owner):
    assert foreign_users(VF, [seen], [claim(owner)], is_own) == ()


@pytest.mark.parametrize(
    ("seen", "owner"),
    [
        (user(UseKind.VFIO, 90), QEMU),
        (user(UseKind.VFIO, 78), LIBVIRT),
        (user(UseKind.DRIVER, 90), QEMU),
        (user(UseKind.UPPER, 90, "macvtap0"), QEMU),
        (user(UseKind.UPPER, None, "vl-x", OTHER_TOKEN), QEMU),
        (user(UseKind.LIBVIRT, None, mark=OTHER_UUID), LIBVIRT),
        (user(UseKind.LIBVIRT, 90, mark=UUID), QEMU),
    ],
)
def test_a_stranger_is_foreign_although_there_is_a_claim(seen, owner):
    assert foreign_users(VF, [seen], [claim(owner)], is_own) == (seen,)


def test_the_process_that_works_for_a_claim_is_no_stranger():
    assert foreign_users(VF, [user(UseKind.VFIO, 91)], [claim(worker=91)], is_own) == ()


def test_a_claimants_own_use_is_not_foreign_before_it_has_a_claim():
    seen = [user(UseKind.VFIO, 80), user(UseKind.LIBVIRT, None, mark=UUID), user(UseKind.DRIVER)]
    assert foreign_users(VF, seen, [], is_own, claimant=LIBVIRT) == ()


def test_one_own_use_doesnt_make_a_strangers_own():
    seen = [user(UseKind.VFIO, 80), user(UseKind.VFIO, 90)]
    assert foreign_users(VF, seen, [], is_own, claimant=LIBVIRT) == (seen[1],)


def test_a_claimant_without_any_use_of_its_own_accounts_for_nothing():
    assert foreign_users(VF, [user(UseKind.ADDRESS)], [], is_own, claimant=LIBVIRT) == (
        user(UseKind.ADDRESS),
    )


@pytest.mark.parametrize("kind", list(UseKind))
def test_a_shared_pf_is_the_hosts_own_unless_a_driver_takes_it_away(kind):
    assert counts(PF, Mode.SHARED, kind) is (kind in (UseKind.VFIO, UseKind.DRIVER, UseKind.UNSEEN))
    assert counts(PF, Mode.EXCLUSIVE, kind)
    assert counts(VF, Mode.SHARED, kind)
