"""The words of the domain: what they parse, what they refuse, and who is the same guest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vnet_lock.journal import Driver, Entry, Link, MadeLink, VfAdmin, from_json, to_json
from vnet_lock.model import (
    Claim,
    Claims,
    Inventory,
    Mode,
    Nic,
    Owner,
    OwnerKind,
    PciAddress,
    Pf,
    Process,
    Resource,
    ResourceKind,
    State,
    User,
    Vf,
    is_ifname,
)

PF = PciAddress.parse("0000:01:00.0")
VF = PciAddress.parse("0000:01:10.0")


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("0:af:06.0", "0000:af:06.0"),
        ("af:06.0", "0000:af:06.0"),
        ("0000:AF:1F.7", "0000:af:1f.7"),
        ("10000:01:00.0", "10000:01:00.0"),  # VMD domains have five digits
        ("1:2.3", "0000:01:02.3"),
    ],
)
def test_a_pci_address_is_written_in_full(text: str, full: str) -> None:
    assert PciAddress.parse(text).text == full
    assert PciAddress.parse(full) == PciAddress.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "eth0", "af:06", "af:06.8", "af:20.0", "0000:af:06.0 ", "0000:1af:06.0", "g0:00.0", "../1:2.3"],
)
def test_what_is_no_pci_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a PCI address"):
        PciAddress.parse(text)


def test_pci_addresses_sort_by_number_and_not_as_text() -> None:
    texts = ["10000:00:00.0", "0000:02:00.0", "0000:01:1f.7", "0000:01:02.0"]
    assert [address.text for address in sorted(map(PciAddress.parse, texts))] == texts[::-1]


@pytest.mark.parametrize("text", ["vf:0000:01:10.0", "pf:0000:01:00.0", "nic:bond0", "nic:a~b", "nic:eth0.5"])
def test_a_resource_is_read_as_it_is_written(text: str) -> None:
    assert Resource.parse(text).text == text


def test_a_resource_has_one_spelling() -> None:
    assert Resource.parse("vf:1:10.0") == Resource.vf(VF)
    assert Resource.vf(VF).pci == VF
    assert Resource.nic("bond0").pci is None


@pytest.mark.parametrize(
    "text",
    ["", "vf", "vf:", "vf:eth0", "nic:", "nic:a/b", "nic:..", "nic:sixteen-letters!", "tap:x", "VF:01:10.0"],
)
def test_what_is_no_resource_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no|is not"):
        Resource.parse(text)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("eth0", True),
        ("a" * 15, True),
        ("a" * 16, False),
        ("ä" * 8, False),
        ("a b", False),
        (".", False),
        ("eth\udcff", False),
    ],
)
def test_names_of_devices_are_those_that_the_kernel_takes(name: str, is_one: bool) -> None:
    assert is_ifname(name) is is_one


# --- guests --------------------------------------------------------------------------------------

LIBVIRT = Owner(OwnerKind.LIBVIRT, "web1", "boot1", "uuid1", Process(10, 1), "pid-file")
QEMU = Owner(OwnerKind.QEMU, "vm2", "boot1", process=Process(20, 2))


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (LIBVIRT, replace(LIBVIRT, process=Process(11, 5), pid_file=None), True),  # libvirtd was restarted
        (LIBVIRT, replace(LIBVIRT, name="renamed"), True),
        (LIBVIRT, replace(LIBVIRT, uuid="uuid2"), False),
        (LIBVIRT, replace(LIBVIRT, boot_id="boot2"), False),
        (QEMU, replace(QEMU, name="renamed"), True),
        (QEMU, replace(QEMU, process=Process(20, 3)), False),  # the pid was given to another
        (QEMU, replace(QEMU, boot_id="boot2"), False),
        (QEMU, replace(QEMU, kind=OwnerKind.PROCESS), False),
    ],
)
def test_the_same_guest_is_known_again(one: Owner, other: Owner, is_same: bool) -> None:
    assert one.is_same_guest(other) is is_same
    assert other.is_same_guest(one) is is_same


def test_an_owner_in_words_has_what_a_person_looks_for() -> None:
    assert LIBVIRT.text == 'guest "web1"'  # its process is the daemon's
    assert QEMU.text == 'qemu "vm2" (pid 20)'


def test_claims_are_found_by_resource_guest_and_token() -> None:
    first = Claim(Resource.vf(VF), Mode.EXCLUSIVE, State.ACTIVE, LIBVIRT, "a", "net0", 0.0)
    second = replace(first, resource=Resource.pf(PF), mode=Mode.SHARED)
    third = replace(first, owner=QEMU, token="b")
    claims = Claims((first, second, third))
    assert claims.on(Resource.vf(VF)) == (first, third)
    assert claims.of(replace(LIBVIRT, process=None)) == (first, second)
    assert claims.with_token("b") == (third,)


# --- devices -------------------------------------------------------------------------------------


def test_what_a_network_device_is_claimed_as_depends_on_its_function() -> None:
    vf = Vf(VF, PF, 0, "enp1s0v0", "igbvf", 5)
    pf = Pf(PF, "enp1s0", "igb", 4, 1, 7, vfs=(vf,))
    nics = (
        Nic("enp1s0", 2, "physical", "", 1500, True, PF),
        Nic("enp1s0v0", 3, "physical", "", 1500, True, VF),
        Nic("bond0", 4, "bond", "", 1500, True),
    )
    inventory = Inventory((pf,), nics, {vf.resource: (User(7, "qemu", "vfio"),)})
    assert [inventory.resource_of(nic).text for nic in inventory.nics] == [
        "pf:0000:01:00.0",
        "vf:0000:01:10.0",
        "nic:bond0",
    ]
    assert inventory.vf_at(VF) is vf
    assert inventory.pf_at(PF) is pf
    assert inventory.pf_at(VF) is None
    assert inventory.nic_named("bond0") is nics[2]
    assert [user.pid for user in inventory.users_of(vf.resource)] == [7]
    assert inventory.users_of(pf.resource) == ()
    assert vf.resource.kind is ResourceKind.VF


# --- the journal ---------------------------------------------------------------------------------

ENTRIES: list[Entry] = [
    VfAdmin(PF.text, 3, "02:00:00:00:00:01", 42, 1, None, True, 2, 10, 100),
    Link(VF.text, "02:00:00:00:00:02", 9000, True, True),
    Driver(VF.text, None, "vfio-pci"),
    MadeLink("vl1", "tap0", "alias"),
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_of_the_journal_comes_back_from_json(entry: Entry) -> None:
    assert from_json(to_json(entry)) == entry


@pytest.mark.parametrize("value", [{}, {"kind": "x"}, {"kind": "link"}, {"kind": ["link"]}])
def test_what_is_no_entry_is_refused(value: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_json(value)
