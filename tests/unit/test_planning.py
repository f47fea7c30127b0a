"""Planning is pure: inventory and claims in, a plan or a refusal with every reason out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vnet_lock import ports
from vnet_lock.combination import Backend, Policy, Port
from vnet_lock.journal import Link
from vnet_lock.model import (
    Claim,
    Claims,
    Damaged,
    Inventory,
    Mode,
    Nic,
    Owner,
    OwnerKind,
    PciAddress,
    Pf,
    Process,
    Resource,
    State,
    UseKind,
    User,
    Vf,
)
from vnet_lock.planning import plan
from vnet_lock.request import Fixed, Form, Intent, Plan, Refusal, RefusalKind, Request
from vnet_lock.situation import Situation

PF_A, PF_B = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:02:00.0")


def owner(name: str) -> Owner:
    return Owner(OwnerKind.LIBVIRT, name, "boot", uuid=f"uuid-{name}", process=Process(1, 1))


WEB, DB = owner("web"), owner("db")


def pf(pci: PciAddress, netdev: str, count: int, eswitch: str | None = None) -> Pf:
    vfs = tuple(
        Vf(
            pci=PciAddress(0, pci.bus, 0x10 + index // 4, 2 * (index % 4)),
            pf=pci,
            index=index,
            netdev=f"{netdev}v{index}",
            driver="igbvf",
            iommu_group=100 * pci.bus + index,
        )
        for index in range(count)
    )
    return Pf(pci, netdev, "igb", 100 * pci.bus + 99, count, 7, eswitch, vfs)


def nic(netdev: str, pci: PciAddress | None = None, kind: str = "physical", **more: object) -> Nic:
    return replace(Nic(netdev, 1, kind, "52:54:00:aa:00:01", 1500, up=True, pci=pci), **more)


def host(*pfs: Pf, nics: tuple[Nic, ...] = (), **more: object) -> Inventory:
    own = [nic(one.netdev, one.pci) for one in pfs if one.netdev]
    own += [nic(vf.netdev, vf.pci) for one in pfs for vf in one.vfs if vf.netdev]
    groups = {vf.iommu_group: (vf.pci,) for one in pfs for vf in one.vfs if vf.iommu_group is not None}
    return replace(Inventory(pfs, (*own, *nics), {}, groups), **more)


def claim(
    who: Owner,
    resource: Resource,
    pf_pci: PciAddress | None = None,
    mode: Mode = Mode.EXCLUSIVE,
    combination: str | None = None,
    mac: str | None = None,
) -> Claim:
    token = f"{abs(hash((who.name, resource))):016x}"[:16]
    return Claim(resource, mode, State.ACTIVE, who, token, "net0", 0.0, combination, mac, pf_pci)


def decide(
    inventory: Inventory, *requests: Request, claims: tuple[Claim, ...] = (), **more: object
) -> Plan | Refusal:
    sources = {port: module.candidates for port in Port if (module := ports.find(port))}
    situation = Situation(
        inventory,
        Claims(claims),
        WEB,
        pid_of=lambda who: 4711,
        is_own=lambda who, pid: pid == 4711,
        sources=sources,
    )
    return plan(requests, replace(situation, **more))


def planned(result: Plan | Refusal) -> list[tuple[str, str]]:
    assert isinstance(result, Plan), result
    return [(one.combination.text if one.combination else "-", one.device.text) for one in result.assignments]


def refused(result: Plan | Refusal, kind: RefusalKind = RefusalKind.HELD) -> str:
    assert isinstance(result, Refusal), result
    assert result.kind is kind
    assert "\n" not in result.message
    return result.message


VFIO = Intent("net0", Policy.VEB, ("enp1",), (Port.SRIOV,), (Backend.VFIO,))
VEPA = Intent("net0", Policy.VEPA, ("enp1",))


def test_an_intent_takes_the_first_free_vf() -> None:
    inventory = host(pf(PF_A, "enp1", 3))
    first = claim(DB, inventory.pfs[0].vfs[0].resource, PF_A)
    result = decide(inventory, VFIO, claims=(first,))
    assert planned(result) == [("veb-sriov-vfio", "vf:0000:01:10.2")]
    assert isinstance(result, Plan)
    assert 'held by guest "db"' in result.assignments[0].rejected[0].reason


def test_a_vf_that_is_held_names_holder_and_next_step() -> None:
    inventory = host(pf(PF_A, "enp1", 1))
    vf = inventory.pfs[0].vfs[0]
    message = refused(decide(inventory, VFIO, claims=(claim(DB, vf.resource, PF_A),)))
    assert message.startswith('net0: VF 0000:01:10.0 is held by guest "db" (pid 4711) since ')
    assert message.endswith("; see: vnet-lock show vf:0000:01:10.0")


def test_the_pf_with_the_most_free_vfs_is_preferred() -> None:
    inventory = host(pf(PF_A, "enp1", 2), pf(PF_B, "enp2", 2))
    taken = claim(DB, inventory.pfs[0].vfs[0].resource, PF_A)
    both = replace(VFIO, devs=("enp1", "enp2"))
    assert planned(decide(inventory, both)) == [("veb-sriov-vfio", "vf:0000:01:10.0")]
    assert planned(decide(inventory, both, claims=(taken,))) == [("veb-sriov-vfio", "vf:0000:02:10.0")]


def test_a_vf_that_is_named_is_the_only_candidate() -> None:
    inventory = host(pf(PF_A, "enp1", 3))
    named = replace(VFIO, devs=("0000:01:10.4",))
    assert planned(decide(inventory, named)) == [("veb-sriov-vfio", "vf:0000:01:10.4")]
    assert planned(decide(inventory, replace(VFIO, devs=("enp1v1",)))) == [
        ("veb-sriov-vfio", "vf:0000:01:10.2")
    ]


def test_two_interfaces_of_one_guest_get_two_vfs() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    second = replace(VFIO, interface="net1")
    assert [device for _, device in planned(decide(inventory, VFIO, second))] == [
        "vf:0000:01:10.0",
        "vf:0000:01:10.2",
    ]
    message = refused(
        decide(inventory, VFIO, second, replace(VFIO, interface="net2")), RefusalKind.IMPOSSIBLE
    )
    assert "another interface of this guest" in message


def test_a_fixed_vf_is_not_given_to_another_interface_of_the_guest() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    fixed = Fixed("hostdev0", inventory.pfs[0].vfs[0].pci, Form.HOSTDEV)
    assert planned(decide(inventory, VFIO, fixed)) == [
        ("veb-sriov-vfio", "vf:0000:01:10.2"),
        ("veb-sriov-vfio", "vf:0000:01:10.0"),
    ]
    message = refused(decide(inventory, fixed, replace(fixed, interface="hostdev1")), RefusalKind.INVALID)
    assert "named twice" in message


def test_without_a_port_a_macvlan_is_used_and_shared() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    other = claim(DB, Resource.pf(PF_A), mode=Mode.SHARED)
    result = decide(inventory, VEPA, claims=(other,))
    assert planned(result) == [("vepa-macvlan-tap+vhost", "pf:0000:01:00.0")]
    assert isinstance(result, Plan)
    assert result.assignments[0].wanted[0].mode is Mode.SHARED


def test_what_the_host_lacks_is_passed_over_with_its_reason() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    result = decide(inventory, VEPA, lacking={Backend.TAP_VHOST: "no vhost here"})
    assert planned(result) == [("vepa-macvlan-tap", "pf:0000:01:00.0")]
    assert isinstance(result, Plan)
    assert [rejection.reason for rejection in result.assignments[0].rejected][:1] == ["no vhost here"]


def test_a_whole_pf_waits_for_its_vfs_and_the_vfs_for_it() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    whole = Fixed("net0", PF_A, Form.HOSTDEV)
    vf = claim(DB, inventory.pfs[0].vfs[1].resource, PF_A)
    assert "VF 0000:01:10.2 is held" in refused(decide(inventory, whole, claims=(vf,)))
    held = claim(DB, Resource.pf(PF_A))
    assert "PF 0000:01:00.0 is held" in refused(decide(inventory, VFIO, claims=(held,)))
    assert "PF 0000:01:00.0 is held" in refused(decide(inventory, VEPA, claims=(held,)))


def test_the_same_guests_claim_is_no_conflict() -> None:
    inventory = host(pf(PF_A, "enp1", 1))
    own = claim(WEB, inventory.pfs[0].vfs[0].resource, PF_A)
    assert planned(decide(inventory, VFIO, claims=(own,))) == [("veb-sriov-vfio", "vf:0000:01:10.0")]


def test_a_vf_in_use_without_a_claim_is_not_given_out() -> None:
    inventory = host(pf(PF_A, "enp1", 1))
    vf = inventory.pfs[0].vfs[0]
    inventory = replace(inventory, users={vf.resource: (User(99, "qemu", "vfio", UseKind.VFIO),)})
    message = refused(decide(inventory, VFIO))
    assert "in use without a claim" in message
    assert "pid 99" in message
    fixed = Fixed("net0", vf.pci, Form.HOSTDEV)
    assert "pid 99" in refused(decide(inventory, fixed))


def test_use_that_names_nobody_is_said_by_its_evidence() -> None:
    inventory = host(pf(PF_A, "enp1", 1))
    vf = inventory.pfs[0].vfs[0]
    inventory = replace(inventory, users={vf.resource: (User(None, "", "bound to igb_uio", UseKind.DRIVER),)})
    assert "in use without a claim (bound to igb_uio); see" in refused(decide(inventory, VFIO))


def test_foreign_use_of_a_vf_keeps_the_whole_pf_from_being_given_out() -> None:
    inventory = host(pf(PF_A, "enp1", 1))
    vf = inventory.pfs[0].vfs[0]
    inventory = replace(inventory, users={vf.resource: (User(99, "qemu", "vfio", UseKind.VFIO),)})
    assert "pid 99" in refused(decide(inventory, Fixed("net0", "enp1", Form.PASSTHRU)))
    assert planned(decide(inventory, VEPA)) == [("vepa-macvlan-tap+vhost", "pf:0000:01:00.0")]


def test_an_iommu_group_is_given_out_whole() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    first, second = inventory.pfs[0].vfs
    inventory = replace(inventory, iommu_groups={100: (first.pci, second.pci)})
    result = decide(inventory, VFIO)
    assert isinstance(result, Plan)
    assert [item.resource for item in result.assignments[0].wanted] == [first.resource, second.resource]
    sibling = claim(DB, second.resource, PF_A)
    one_vf = replace(VFIO, devs=(first.pci.text,))
    assert "VF 0000:01:10.2 is held" in refused(decide(inventory, one_vf, claims=(sibling,)))


def one_group(count: int) -> tuple[Inventory, list[Vf]]:
    """A PF all of whose VFs are in one IOMMU group."""
    made = pf(PF_A, "enp1", count)
    vfs = [replace(vf, iommu_group=100) for vf in made.vfs]
    inventory = host(replace(made, vfs=tuple(vfs)))
    return replace(inventory, iommu_groups={100: tuple(vf.pci for vf in vfs)}), vfs


def test_a_guest_may_have_several_functions_of_a_group_and_the_rest_goes_with_one_of_them() -> None:
    inventory, (first, second, third) = one_group(3)
    both = [Fixed(f"net{vf.index}", vf.pci, Form.HOSTDEV) for vf in (first, third)]
    result = decide(inventory, *both)
    assert isinstance(result, Plan)
    assert [[item.resource for item in one.wanted] for one in result.assignments] == [
        [first.resource, second.resource],
        [third.resource],
    ]
    assert "named twice" in refused(decide(inventory, both[0], both[0]), RefusalKind.INVALID)
    # What is in VFIO's group can't have a macvtap of the same guest.
    for order in (1, -1):
        requests = [both[0], Fixed("net1", "enp1v1", Form.PASSTHRU)][::order]
        assert "named twice" in refused(decide(inventory, *requests), RefusalKind.INVALID)


def test_a_function_comes_to_another_of_its_group_that_the_guest_has() -> None:
    inventory, (first, second) = one_group(2)
    own, late = claim(WEB, first.resource, PF_A), Fixed("net1", second.pci, Form.HOSTDEV)
    result = decide(inventory, late, claims=(own,), beside=True)
    assert isinstance(result, Plan)
    assert [item.resource for item in result.assignments[0].wanted] == [second.resource]
    assert "VF 0000:01:10.0 is held" in refused(decide(inventory, late, claims=(own,), owner=DB))


def test_a_guests_own_are_no_strangers_to_what_comes_to_them() -> None:
    """Both halves of a team have one MAC, and what is private is so from other guests."""
    mac = "52:54:00:00:00:01"
    inventory = host(pf(PF_A, "enp1", 2))
    standby = claim(WEB, Resource.pf(PF_A), mode=Mode.SHARED, mac=mac)
    private = claim(WEB, inventory.pfs[0].vfs[0].resource, PF_A, combination="private-sriov-vfio")
    late = Fixed("net1", inventory.pfs[0].vfs[1].pci, Form.HOSTDEV, mac)
    held = (standby, private)
    assert planned(decide(inventory, late, claims=held, beside=True)) == [
        ("veb-sriov-vfio", "vf:0000:01:10.2")
    ]
    assert mac in refused(decide(inventory, late, claims=(standby,), beside=True, owner=DB))
    again = replace(VEPA, mac=mac)
    assert mac in refused(decide(inventory, again, claims=(standby,), beside=True))
    assert "alone" in refused(decide(inventory, late, claims=(private,), beside=True, owner=DB))
    # Only the switch is one for all.
    other = replace(private, combination="vepa-sriov-vfio")
    wanted = replace(late, policy=Policy.VEB)
    assert "switch" in refused(decide(inventory, wanted, claims=(other,), beside=True))


def test_a_claim_on_a_bond_is_a_share_of_what_is_below() -> None:
    bond = nic("bond0", kind="bond", lowers=("enp1",))
    inventory = host(pf(PF_A, "enp1", 1), nics=(bond,))
    on_bond = replace(VEPA, devs=("bond0",))
    result = decide(inventory, on_bond)
    assert isinstance(result, Plan)
    assert [(item.resource.text, item.mode) for item in result.assignments[0].wanted] == [
        ("nic:bond0", Mode.SHARED),
        ("pf:0000:01:00.0", Mode.SHARED),
    ]
    assert "PF 0000:01:00.0 is held" in refused(
        decide(inventory, on_bond, claims=(claim(DB, Resource.pf(PF_A)),))
    )


def test_a_vf_is_never_shared_whatever_stands_on_it() -> None:
    inventory = host(pf(PF_A, "enp1", 1))
    for form in (Form.BRIDGE, Form.VEPA, Form.PRIVATE, Form.PASSTHRU):
        result = decide(inventory, Fixed("net0", "enp1v0", form))
        assert isinstance(result, Plan)
        assert result.assignments[0].wanted[0].mode is Mode.EXCLUSIVE


def test_two_guests_with_one_mac_on_one_device_are_refused() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    mac = "52:54:00:00:00:09"
    other = claim(DB, Resource.pf(PF_A), mode=Mode.SHARED, mac=mac)
    assert "give each guest its own" in refused(decide(inventory, replace(VEPA, mac=mac), claims=(other,)))


def switch(now: str | None, *claims: Claim, **more: object) -> Plan | Refusal:
    """What a guest gets that wants the second VF of a PF, as a VEPA if nothing else is said."""
    wants = replace(VFIO, **{"policy": Policy.VEPA, "devs": ("enp1v1",), **more})
    return decide(host(pf(PF_A, "enp1", 2, now)), wants, claims=claims)


def test_the_embedded_switch_is_set_where_its_driver_has_modes() -> None:
    for now in ("veb", "vepa"):
        assert planned(switch(now)) == [("vepa-sriov-vfio", "vf:0000:01:10.2")]
        assert planned(switch(now, policy=Policy.VEB)) == [("veb-sriov-vfio", "vf:0000:01:10.2")]
    assert planned(switch(None, policy=Policy.VEB)) == [("veb-sriov-vfio", "vf:0000:01:10.2")]
    message = refused(switch(None), RefusalKind.IMPOSSIBLE)
    assert "the embedded switch of enp1 has no VEPA mode that igb could set" in message


@pytest.mark.parametrize(
    ("now", "combination", "goes"),
    [
        ("veb", "veb-sriov-vfio", False),
        ("veb", "veb-sriov-tap", False),
        ("veb", "vepa-sriov-tap", True),  # reserved, and not at it yet
        ("vepa", "vepa-sriov-vfio", True),
        ("veb", None, False),  # claimed by hand: it relies on what there is
        ("vepa", None, True),
        ("veb", "vepa-macvlan-tap", False),
    ],
)
def test_the_embedded_switch_is_not_changed_under_another_guest(
    now: str, combination: str | None, goes: bool
) -> None:
    vf = host(pf(PF_A, "enp1", 2)).pfs[0].vfs[0]
    result = switch(now, claim(DB, vf.resource, PF_A, combination=combination))
    if goes:
        assert planned(result) == [("vepa-sriov-vfio", "vf:0000:01:10.2")]
    else:
        message = refused(result)
        assert "VF 0000:01:10.2 would need the embedded switch of PF 0000:01:00.0 in vepa mode" in message
        assert message.endswith("see: vnet-lock show vf:0000:01:10.0")


def test_the_embedded_switch_is_not_changed_under_a_use_without_a_claim() -> None:
    inventory = host(pf(PF_A, "enp1", 2, "veb"))
    used = {inventory.pfs[0].vfs[0].resource: (User(99, "dpdk", "has it", UseKind.VFIO),)}
    wants = replace(VFIO, policy=Policy.VEPA, devs=("enp1v1",))
    message = refused(decide(replace(inventory, users=used), wants))
    assert "VF 0000:01:10.0 is in use without a claim by dpdk (pid 99)" in message
    assert planned(decide(replace(inventory, users=used), replace(wants, policy=Policy.VEB)))


def test_one_guests_interfaces_need_one_mode_of_the_embedded_switch() -> None:
    inventory = host(pf(PF_A, "enp1", 2, "veb"))
    vepa = replace(VFIO, interface="net1", policy=Policy.VEPA)
    message = refused(decide(inventory, VFIO, vepa), RefusalKind.IMPOSSIBLE)
    assert "net0 of this guest needs another mode of PF 0000:01:00.0" in message
    assert len(planned(decide(inventory, vepa, replace(vepa, interface="net2")))) == 2


def test_libvirts_own_vf_takes_the_switch_as_it_is() -> None:
    inventory = host(pf(PF_A, "enp1", 2, "veb"))
    fixed = Fixed("hostdev0", inventory.pfs[0].vfs[1].pci, Form.HOSTDEV)
    other = claim(DB, inventory.pfs[0].vfs[0].resource, PF_A, combination="vepa-sriov-vfio")
    assert planned(decide(inventory, fixed, claims=(other,)))


def test_a_private_vf_is_alone_on_its_pf() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    private = replace(VFIO, policy=Policy.PRIVATE)
    neighbour = claim(DB, inventory.pfs[0].vfs[0].resource, PF_A, combination="veb-sriov-vfio")
    assert "alone" in refused(decide(inventory, replace(private, devs=("enp1v1",)), claims=(neighbour,)))
    hermit = replace(neighbour, combination="private-sriov-vfio")
    assert "alone" in refused(decide(inventory, replace(VFIO, devs=("enp1v1",)), claims=(hermit,)))


def test_a_private_vf_with_a_vlan_may_have_neighbours_with_others_or_none() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    wants = replace(VFIO, policy=Policy.PRIVATE, vlan=42, devs=("enp1v1",))
    neighbour = claim(DB, inventory.pfs[0].vfs[0].resource, PF_A, combination="veb-sriov-vfio")
    for vlan in (None, 41):
        assert planned(decide(inventory, wants, claims=(replace(neighbour, vlan=vlan),)))
    message = refused(decide(inventory, wants, claims=(replace(neighbour, vlan=42),)))
    assert "VF 0000:01:10.2 would share VLAN 42 of PF 0000:01:00.0: VF 0000:01:10.0 is held by" in message
    private = replace(neighbour, combination="private-sriov-tap", vlan=42)
    later = replace(VFIO, vlan=42, devs=("enp1v1",))
    assert "would share VLAN 42" in refused(decide(inventory, later, claims=(private,)))
    assert planned(decide(inventory, replace(later, vlan=43), claims=(private,)))


def test_the_administrative_vlan_counts_for_what_libvirt_has_or_nobody_claimed() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    one = inventory.pfs[0]
    vlans = replace(one, vfs=(replace(one.vfs[0], vlan=42), one.vfs[1]))
    inventory = replace(inventory, pfs=(vlans,))
    wants = replace(VFIO, policy=Policy.PRIVATE, vlan=42, devs=("enp1v1",))
    fixed = claim(DB, one.vfs[0].resource, PF_A, combination="veb-sriov-vfio")
    assert "would share VLAN 42" in refused(decide(inventory, wants, claims=(fixed,)))
    assert planned(decide(inventory, wants, claims=(replace(fixed, vlan=7),)))
    used = {one.vfs[0].resource: (User(99, "dpdk", "has it", UseKind.VFIO),)}
    assert "would share VLAN 42" in refused(decide(replace(inventory, users=used), wants))
    private = claim(DB, one.vfs[1].resource, PF_A, combination="private-sriov-tap")
    named = Fixed("hostdev0", one.vfs[0].pci, Form.HOSTDEV)
    assert "share VLAN 42" in refused(decide(inventory, named, claims=(replace(private, vlan=42),)))
    assert planned(decide(inventory, replace(named, vlan=7), claims=(replace(private, vlan=42),)))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (replace(VFIO, devs=("enp3",)), "has no VFs yet; run: vnet-lock vfs enp3 7"),
        (replace(VFIO, devs=("eth0",)), "no SR-IOV network device 'eth0'"),
        (replace(VEPA, devs=("br0",), ports=(Port.MACVLAN,)), "is a bridge"),
        (replace(VEPA, devs=("eth1",), ports=(Port.MACVLAN,)), "port of bridge br0"),
        (replace(VEPA, devs=("eth2",), ports=(Port.MACVLAN,)), "is down"),
    ],
)
def test_what_cannot_be_says_why(request_: Request, words: str) -> None:
    empty = replace(pf(PciAddress.parse("0000:03:00.0"), "enp3", 0), totalvfs=7)
    nics = (
        nic("eth0"),
        nic("br0", kind="bridge", lowers=("eth1",)),
        nic("eth1", master="br0"),
        nic("eth2", up=False),
    )
    message = refused(decide(host(pf(PF_A, "enp1", 1), empty, nics=nics), request_), RefusalKind.IMPOSSIBLE)
    assert words in message


WHOLE = Intent("net0", Policy.PRIVATE, ("enp1",), (Port.PHYSDEV,), (Backend.VFIO,))


def test_a_whole_nic_goes_to_one_guest_with_its_iommu_group() -> None:
    second = replace(pf(PciAddress.parse("0000:01:00.1"), "enp2", 0), iommu_group=199)
    inventory = host(pf(PF_A, "enp1", 0), second)
    inventory = replace(inventory, iommu_groups={199: (PF_A, second.pci)})
    for dev in ("enp1", PF_A.text):
        result = decide(inventory, replace(WHOLE, devs=(dev,)))
        assert planned(result) == [("private-physdev-vfio", "pf:0000:01:00.0")]
        assert isinstance(result, Plan)
        assert {(item.resource.text, item.mode) for item in result.assignments[0].wanted} == {
            ("pf:0000:01:00.0", Mode.EXCLUSIVE),
            ("pf:0000:01:00.1", Mode.EXCLUSIVE),
        }


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (UseKind.ADDRESS, "address 192.0.2.1 on enp1"),
        (UseKind.UPPER, 'port of bridge "br0"'),
        (UseKind.SOCKET, "packet socket on enp1"),
    ],
)
def test_a_nic_that_the_host_uses_is_never_given_away(kind: UseKind, how: str) -> None:
    inventory = host(pf(PF_A, "enp1", 0))
    inventory = replace(inventory, users={Resource.pf(PF_A): (User(None, "host", how, kind),)})
    assert how in refused(decide(inventory, WHOLE))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"devs": ("enp2",)}, "enp2 has 2 VFs, which would go with it; run: vnet-lock vfs enp2 0"),
        ({"devs": ("enp2v0",)}, "enp2v0 is a VF: use port=sriov"),
        ({"devs": ("veth0",)}, "veth0 has no PCI function of its own"),
        ({"vlan": 7}, "leave vlan=7 to the guest"),
        ({"mac": "52:54:00:00:00:09"}, "keeps its own MAC"),
        ({"devs": ("enp3",)}, "in no IOMMU group"),
    ],
)
def test_a_whole_nic_that_cannot_be_given_says_why(more: dict[str, object], words: str) -> None:
    loose = replace(pf(PciAddress.parse("0000:03:00.0"), "enp3", 0), iommu_group=None)
    inventory = host(pf(PF_A, "enp1", 0), pf(PF_B, "enp2", 2), loose, nics=(nic("veth0"),))
    assert words in refused(decide(inventory, replace(WHOLE, **more)), RefusalKind.IMPOSSIBLE)


SOCKET = replace(WHOLE, backends=(Backend.SOCKET,))


def test_a_packet_socket_takes_the_whole_nic_alone_whatever_its_iommu_group() -> None:
    second = replace(pf(PciAddress.parse("0000:01:00.1"), "enp2", 0), iommu_group=199)
    loose = replace(pf(PciAddress.parse("0000:03:00.0"), "enp3", 0), iommu_group=None)
    inventory = replace(host(pf(PF_A, "enp1", 2), second, loose), iommu_groups={199: (PF_A, second.pci)})
    assert claims_of(decide(inventory, SOCKET)) == [("pf:0000:01:00.0", Mode.EXCLUSIVE)]
    # Its MAC may be the guest's choice: no driver of the guest's has to agree.
    chosen = replace(SOCKET, devs=("enp3",), mac="52:54:00:00:00:09")
    assert claims_of(decide(inventory, chosen)) == [("pf:0000:03:00.0", Mode.EXCLUSIVE)]


def test_a_packet_socket_gets_no_nic_that_somebody_has() -> None:
    inventory = host(pf(PF_A, "enp1", 2))
    holder = claim(DB, inventory.pfs[0].vfs[0].resource, PF_A)
    assert "db" in refused(decide(inventory, SOCKET, claims=(holder,)))
    away = host(replace(pf(PF_A, "enp1", 0), netdev=None, driver="igb"))
    message = refused(decide(away, replace(SOCKET, devs=(PF_A.text,))), RefusalKind.IMPOSSIBLE)
    assert "has no network device here (driver: igb)" in message


VLAN = replace(VEPA, vlan=42, ports=(Port.MACVLAN,))


def claims_of(result: Plan | Refusal) -> list[tuple[str, str]]:
    assert isinstance(result, Plan), result
    return [(item.resource.text, item.mode) for item in result.assignments[0].wanted]


def test_a_vlan_of_a_device_is_a_device_that_guests_share() -> None:
    inventory = host(pf(PF_A, "enp1", 0))
    assert claims_of(decide(inventory, VLAN)) == [
        ("nic:vl1.42", Mode.SHARED),
        ("pf:0000:01:00.0", Mode.SHARED),
    ]
    other = claim(DB, Resource.nic("vl1.42"), mode=Mode.SHARED)
    assert planned(decide(inventory, VLAN, claims=(other,))) == [("vepa-macvlan-tap+vhost", "nic:vl1.42")]


def test_a_vlan_device_that_is_there_is_used_as_it_is() -> None:
    there = nic("enp1.42", kind="vlan", lowers=("enp1",), vlan=42)
    others = nic("enp1.41", kind="vlan", lowers=("enp1",), vlan=41), nic("tag", kind="vlan", lowers=("enp1",))
    inventory = host(pf(PF_A, "enp1", 0), nics=(*others, there))
    assert claims_of(decide(inventory, VLAN)) == [
        ("nic:enp1.42", Mode.SHARED),
        ("pf:0000:01:00.0", Mode.SHARED),
    ]
    down = host(pf(PF_A, "enp1", 0), nics=(replace(there, up=False),))
    assert "ip link set enp1.42 up" in refused(decide(down, VLAN), RefusalKind.IMPOSSIBLE)
    port = host(pf(PF_A, "enp1", 0), nics=(replace(there, master="br7"), nic("br7", kind="bridge")))
    assert "enp1.42 is a port of bridge br7" in refused(decide(port, VLAN), RefusalKind.IMPOSSIBLE)


def test_a_vlan_device_that_another_guest_is_making_is_waited_for_and_not_taken_for_the_hosts() -> None:
    half = nic("vl0123456789ab", kind="vlan", lowers=("enp1",), vlan=42, up=False)
    assert claims_of(decide(host(pf(PF_A, "enp1", 0), nics=(half,)), VLAN))[0] == (
        "nic:vl1.42",
        Mode.SHARED,
    )


def test_a_kernel_without_vlan_devices_is_said() -> None:
    message = refused(decide(host(pf(PF_A, "enp1", 0)), VLAN, no_vlans="no 8021q"), RefusalKind.IMPOSSIBLE)
    assert "no 8021q" in message


def test_a_combination_that_does_not_exist_is_bad_input() -> None:
    request = Intent("net0", Policy.NAT, ("enp1",), (Port.SRIOV,), (Backend.VFIO,))
    assert "it goes with" in refused(decide(host(pf(PF_A, "enp1", 1)), request), RefusalKind.INVALID)


def test_who_has_a_device_is_said_though_its_name_is_out_of_sight() -> None:
    taken = replace(
        claim(DB, Resource.pf(PF_B)), journal=(Link(PF_B.text, "52:54:00:aa:00:01", 1500, True, name="eno2"),)
    )
    want = Intent("net0", Policy.PRIVATE, ("eno2",), (Port.PHYSDEV,), (Backend.SOCKET,))
    inventory = host(pf(PF_A, "eno1", 1))
    assert "no network device 'eno2' here" in refused(decide(inventory, want), RefusalKind.INVALID)
    message = refused(decide(inventory, want, claims=(taken,)))
    assert 'is held by guest "db"' in message
    assert f"vnet-lock show pf:{PF_B}" in message


def test_a_plain_hostdev_that_is_no_network_device_is_none_of_ours() -> None:
    gpu = Fixed("hostdev0", PciAddress.parse("0000:09:00.0"), Form.HOSTDEV, is_interface=False)
    assert planned(decide(host(pf(PF_A, "enp1", 1)), gpu)) == []


def test_a_damaged_record_counts_as_held() -> None:
    inventory = host(pf(PF_A, "enp1", 1))
    vf = inventory.pfs[0].vfs[0].resource
    claims = Claims(damaged=(Damaged("claims/x.json", "it is cut short", vf),))
    message = refused(_with(inventory, claims))
    assert "claims/x.json" in message
    assert "cut short" in message


def _with(inventory: Inventory, claims: Claims) -> Plan | Refusal:
    sources = {port: module.candidates for port in Port if (module := ports.find(port))}
    situation = Situation(
        inventory, claims, WEB, pid_of=lambda who: None, is_own=lambda who, pid: False, sources=sources
    )
    return plan([VFIO], situation)


def test_a_stale_claim_does_not_count_in_a_preview() -> None:
    inventory = host(pf(PF_A, "enp1", 1))
    dead = claim(DB, inventory.pfs[0].vfs[0].resource, PF_A)
    result = decide(inventory, VFIO, claims=(dead,), stale=frozenset({dead.token}))
    assert planned(result) == [("veb-sriov-vfio", "vf:0000:01:10.0")]


def test_a_device_of_several_that_is_not_there_is_passed_over() -> None:
    both = replace(VEPA, devs=("eth9", "enp1"))
    assert planned(decide(host(pf(PF_A, "enp1", 1)), both))[0][1] == "pf:0000:01:00.0"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Fixed("host0", PciAddress.parse("9:00.0"), Form.HOSTDEV), "no network device at 0000:09:00.0"),
        (Fixed("net0", "eth9", Form.VEPA), "no network device 'eth9'"),
        (replace(VEPA, devs=("eth9",)), "no network device 'eth9'"),
        (replace(VFIO, devs=("0000:09:00.0",)), "no network device '0000:09:00.0'"),
    ],
)
def test_a_device_that_is_not_there_is_bad_input(request_: Request, words: str) -> None:
    assert words in refused(decide(host(pf(PF_A, "enp1", 1)), request_), RefusalKind.INVALID)
