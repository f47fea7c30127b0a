"""The conflict matrix, as the table that it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vnet_lock.combination import Policy
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, PciAddress, Process, Resource, State, Wanted
from vnet_lock.rules import (
    Tenancy,
    are_neighbours,
    breaks_eswitch,
    breaks_privacy,
    conflict,
    holder_text,
    same_mac,
    since_text,
)

PF = PciAddress.parse("0000:01:00.0")
OTHER_PF = PciAddress.parse("0000:02:00.0")
VF0, VF1 = PciAddress.parse("0000:01:10.0"), PciAddress.parse("0000:01:10.2")

VF = Wanted(Resource.vf(VF0), Mode.EXCLUSIVE, PF)
PF_SHARED = Wanted(Resource.pf(PF), Mode.SHARED)
PF_EXCLUSIVE = Wanted(Resource.pf(PF), Mode.EXCLUSIVE)
BOND_SHARED = Wanted(Resource.nic("bond0"), Mode.SHARED)
BOND_EXCLUSIVE = Wanted(Resource.nic("bond0"), Mode.EXCLUSIVE)


def claim(wanted: Wanted, combination: str | None = None, mac: str | None = None) -> Claim:
    owner = Owner(OwnerKind.QEMU, "vm", "boot", process=Process(77, 5))
    return Claim(
        wanted.resource, wanted.mode, State.ACTIVE, owner, "0" * 16, "net0", 0.0, combination, mac, wanted.pf
    )


@pytest.mark.parametrize(
    ("wanted", "there_is", "forbidden"),
    [
        (VF, VF, True),
        (VF, Wanted(Resource.vf(VF1), Mode.EXCLUSIVE, PF), False),
        (VF, PF_SHARED, False),
        (VF, PF_EXCLUSIVE, True),
        (VF, Wanted(Resource.pf(OTHER_PF), Mode.EXCLUSIVE), False),
        (PF_SHARED, VF, False),
        (PF_SHARED, PF_SHARED, False),
        (PF_SHARED, PF_EXCLUSIVE, True),
        (PF_EXCLUSIVE, VF, True),
        (PF_EXCLUSIVE, PF_SHARED, True),
        (PF_EXCLUSIVE, PF_EXCLUSIVE, True),
        (PF_EXCLUSIVE, Wanted(Resource.vf(VF0), Mode.EXCLUSIVE, OTHER_PF), False),
        (BOND_SHARED, BOND_SHARED, False),
        (BOND_SHARED, BOND_EXCLUSIVE, True),
        (BOND_EXCLUSIVE, BOND_SHARED, True),
        (BOND_EXCLUSIVE, VF, False),
    ],
)
def test_the_conflict_matrix(wanted: Wanted, there_is: Wanted, forbidden: bool) -> None:
    assert conflict(wanted, claim(there_is)) is forbidden


UNKNOWN, VEB, VEPA = Tenancy(), Tenancy(Policy.VEB), Tenancy(Policy.VEPA)
HERMIT, PRIVATE_5 = Tenancy(Policy.PRIVATE), Tenancy(Policy.PRIVATE, 5)


@pytest.mark.parametrize(
    ("one", "other", "forbidden"),
    [
        (VEB, VEB, False),
        (VEB, HERMIT, True),
        (UNKNOWN, HERMIT, True),
        (HERMIT, HERMIT, True),
        (HERMIT, PRIVATE_5, True),
        (VEB, PRIVATE_5, False),
        (UNKNOWN, PRIVATE_5, False),
        (Tenancy(Policy.VEB, 5), PRIVATE_5, True),
        (Tenancy(None, 5), PRIVATE_5, True),
        (Tenancy(Policy.VEB, 6), PRIVATE_5, False),
        (PRIVATE_5, PRIVATE_5, True),
        (Tenancy(Policy.PRIVATE, 6), PRIVATE_5, False),
        (Tenancy(Policy.VEB, 5), Tenancy(Policy.VEB, 5), False),
        (Tenancy(Policy.PRIVATE, 0), Tenancy(Policy.VEB, 0), True),
    ],
)
def test_a_private_vf_has_a_vlan_of_its_own_or_no_neighbour(
    one: Tenancy, other: Tenancy, forbidden: bool
) -> None:
    assert breaks_privacy(one, other) is forbidden
    assert breaks_privacy(other, one) is forbidden


@pytest.mark.parametrize(
    ("one", "other", "now", "forbidden"),
    [
        (VEB, VEB, "veb", False),
        (VEPA, VEPA, "veb", False),
        (VEB, VEPA, "veb", True),
        (VEB, VEPA, "vepa", True),
        (VEPA, UNKNOWN, "veb", True),
        (VEPA, UNKNOWN, "vepa", False),
        (VEB, UNKNOWN, "vepa", True),
        (VEPA, PRIVATE_5, "veb", False),
        (VEB, UNKNOWN, None, False),
    ],
)
def test_the_users_of_a_pfs_vfs_need_one_mode_of_its_embedded_switch(
    one: Tenancy, other: Tenancy, now: str | None, forbidden: bool
) -> None:
    assert breaks_eswitch(one, other, now) is forbidden
    assert breaks_eswitch(other, one, now) is forbidden


def test_a_claim_tells_what_its_guest_is_to_the_neighbours() -> None:
    wanted = Wanted(Resource.vf(VF1), Mode.EXCLUSIVE, PF)
    assert Tenancy.of(claim(wanted, "private-sriov-vfio")) == HERMIT
    assert Tenancy.of(replace(claim(wanted, "veb-sriov-tap"), vlan=7), 8) == Tenancy(Policy.VEB, 7)
    assert Tenancy.of(claim(wanted), 8) == Tenancy(None, 8)
    # A macvlan on a VF sets nothing at the PF.
    assert Tenancy.of(claim(wanted, "vepa-macvlan-tap")) == UNKNOWN


def test_neighbours_are_other_vfs_of_the_same_pf() -> None:
    assert are_neighbours(VF, claim(Wanted(Resource.vf(VF1), Mode.EXCLUSIVE, PF)))
    assert not are_neighbours(VF, claim(VF))
    assert not are_neighbours(VF, claim(PF_SHARED))
    assert not are_neighbours(VF, claim(Wanted(Resource.vf(VF1), Mode.EXCLUSIVE, OTHER_PF)))
    assert not are_neighbours(PF_SHARED, claim(VF))


def test_one_mac_twice_on_one_device_or_pf_is_seen() -> None:
    mac = "52:54:00:00:00:01"
    assert same_mac([PF_SHARED], mac, claim(PF_SHARED, mac=mac))
    assert same_mac([VF], mac, claim(Wanted(Resource.vf(VF1), Mode.EXCLUSIVE, PF), mac=mac))
    assert same_mac([VF], mac, claim(PF_SHARED, mac=mac))
    assert not same_mac([VF], mac, claim(Wanted(Resource.pf(OTHER_PF), Mode.SHARED), mac=mac))
    assert not same_mac([VF], "52:54:00:00:00:02", claim(PF_SHARED, mac=mac))
    assert not same_mac([VF], None, claim(PF_SHARED))


def test_a_holder_is_named_with_its_pid_and_time() -> None:
    text = holder_text(claim(VF), lambda owner: owner.process.pid if owner.process else None)
    assert text.startswith('qemu "vm" (pid 77) since 1970-01-0')
    libvirt = Owner(OwnerKind.LIBVIRT, "web1", "boot", uuid="u")
    held = Claim(VF.resource, VF.mode, State.RELEASING, libvirt, "0" * 16, "net0", 0.0)
    assert holder_text(held, lambda owner: 4711).startswith('guest "web1" (pid 4711) since ')
    assert holder_text(held, lambda owner: None).endswith("(being released)")


def test_a_time_of_today_has_no_date() -> None:
    now = 1_000_000_000.0
    assert len(since_text(now, now)) == len("10:02")
    assert len(since_text(now - 3 * 86400, now)) == len("2001-09-09 10:02")
