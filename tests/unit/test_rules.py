"""The conflict matrix, as the table that it is."""

from __future__ import annotations

import pytest

from vnet_lock.model import Claim, Mode, Owner, OwnerKind, PciAddress, Process, Resource, State, Wanted
from vnet_lock.rules import breaks_privacy, conflict, holder_text, same_mac, since_text

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


def test_a_private_vf_wants_no_neighbour_and_may_be_none() -> None:
    neighbour = claim(Wanted(Resource.vf(VF1), Mode.EXCLUSIVE, PF), "veb-sriov-vfio")
    hermit = claim(Wanted(Resource.vf(VF1), Mode.EXCLUSIVE, PF), "private-sriov-vfio")
    assert breaks_privacy(VF, True, neighbour)
    assert breaks_privacy(VF, False, hermit)
    assert not breaks_privacy(VF, False, neighbour)
    assert not breaks_privacy(VF, True, claim(PF_SHARED))
    assert not breaks_privacy(PF_SHARED, True, neighbour)


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
