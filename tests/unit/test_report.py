"""What a person and a script are shown: golden files, written anew with VNET_LOCK_REGEN=1."""

from __future__ import annotations

import json
import os
import pty
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_host import VFIO, FakeHost
from vnet_lock.audit import Audit, audit
from vnet_lock.claims import ClaimTable
from vnet_lock.combination import Combination, Policy
from vnet_lock.front import verbs
from vnet_lock.front.report import Style, plan_text, show_text, status_text
from vnet_lock.front.report_json import plan_json, show_json, since_iso, status_json
from vnet_lock.journal import MadeLink, VfAdmin
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import Claim, Mode, OwnerKind, PciAddress, Resource, State, Wanted
from vnet_lock.request import Assignment, Fixed, Form, Intent, Plan, Refusal, RefusalKind, Rejection

GOLDEN = Path(__file__).parent / "golden"
PF = PciAddress.parse("0000:01:00.0")
VF0, VF1 = PciAddress.parse("0000:01:10.0"), PciAddress.parse("0000:01:10.2")


@pytest.fixture(autouse=True)
def _in_one_time_zone(monkeypatch):
    monkeypatch.setenv("TZ", "UTC-5:30")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def check(name: str, text: str) -> None:
    """Compare with the golden file; with VNET_LOCK_REGEN=1 write it."""
    path = GOLDEN / name
    if os.environ.get("VNET_LOCK_REGEN") == "1":
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    assert text + "\n" == path.read_text(), f"{name} differs; if it is meant to: VNET_LOCK_REGEN=1"


@pytest.fixture
def busy(tmp_path) -> Audit:
    """A host with one of everything."""
    host = FakeHost(tmp_path)
    vfs = host.add_pf("0000:01:00.0", "enp1s0", ["igbvf", VFIO, VFIO, "igbvf", "igbvf", VFIO])
    host.add_pf("0000:02:00.0", "enp2s0", totalvfs=0, driver="e1000e")
    host.add_pf("0000:03:00.0", "enp3s0")
    host.add_link("bond0", ["enp2s0"], uevent="bond")
    for pid in (4711, 77, 78, 79, 80):
        host.add_process(pid)
    host.add_process(60, "libvirtd")
    host.open_vfio(4711, vfs[1], "/dev/null")
    host.open_vfio(77, vfs[2], "/dev/zero")
    host.open_vfio(79, vfs[5], "/dev/full")
    host.claim(
        _claim(host, Resource.vf(vfs[1]), 4711, 1, name="web1", combination="veb-sriov-vfio"),
        _claim(host, Resource.vf(vfs[3]), 99, 2, name="gone", combination="veb-sriov-tap+vhost"),
        replace(
            _claim(host, Resource.vf(vfs[4]), 60, 3, state=State.RELEASING),
            owner=host.owner(60, "db", OwnerKind.LIBVIRT, "11111111-0000-4000-8000-000000000000"),
            worker=host.add_process(61, "python3"),
        ),
        _claim(host, Resource.vf(vfs[5]), 78, 4, name="dpdk"),
        _claim(host, Resource.pf(PF), 80, 5, name="lan1", mode=Mode.SHARED, combination="vepa-macvlan-tap"),
        _claim(host, Resource.nic("bond0"), 80, 6, name="lan1", mode=Mode.SHARED),
        _claim(host, Resource.ip("192.0.2.7"), 80, 7, name="lan1", combination="route-none-tap"),
    )
    inventory = read_inventory(host.settings)
    return audit(host.settings, inventory, ClaimTable(host.settings).read())


def _claim(host: FakeHost, resource: Resource, pid: int, number: int, name: str = "vm", **changes) -> Claim:
    pf = PF if resource.kind == "vf" else None
    owner = host.owner(pid, name)
    token = f"{number:016x}"
    claim = Claim(resource, Mode.EXCLUSIVE, State.ACTIVE, owner, token, "net0", 1.7e9 + number, pf=pf)
    return replace(claim, **changes)


def test_status_is_a_tree_of_pfs_vfs_and_owners(busy):
    check("status.txt", status_text(busy))


def test_status_on_a_terminal_has_colours_and_fits_its_width(busy):
    text = status_text(busy, Style(colour=True, width=80))
    check("status-80-colour.txt", text.replace("\033", "<esc>"))


def test_status_without_colours_fits_the_width_of_a_terminal(busy):
    tree = status_text(busy, Style(width=80)).split("\n\n")[0]
    assert max(map(len, tree.splitlines())) <= 80
    assert "foreign" in tree


def test_status_as_json_keeps_its_contract(busy):
    check("status.json", json.dumps(status_json(busy, "box", "boot"), indent=2))


def test_status_json_has_the_keys_of_the_contract_and_no_others(busy):
    found = status_json(busy, "box", "boot")
    assert set(found) == {"version", "host", "pfs", "nics", "addresses", "findings"}
    assert set(found["host"]) == {"hostname", "boot_id"}
    pf = found["pfs"][0]
    more = {"state", "claims", "users", "vfs"}
    assert set(pf) == {"pci", "netdev", "driver", "eswitch", "numvfs", "totalvfs"} | more
    assert (pf["state"], pf["users"]) == ("active", [])
    vf = pf["vfs"][1]
    assert set(vf) == {"index", "pci", "netdev", "driver", "iommu_group", "state", "claim", "users"}
    assert set(vf["claim"]) == {"resource", "mode", "state", "owner", "combination", "since"}
    assert set(vf["claim"]["owner"]) == {"kind", "name", "uuid", "pid"}
    assert set(vf["users"][0]) == {"pid", "command", "how"}
    assert set(found["nics"][0]) == {"netdev", "pci", "state", "claims", "users"}
    assert found["nics"][0]["state"] == "active"
    assert set(found["addresses"][0]) == {"address", "claims"}
    assert set(found["findings"][0]) == {"severity", "kind", "resource", "message"}


def test_show_tells_all_about_one_resource(busy):
    claims = busy.state_of(Resource.vf(VF1)).claims
    journal = (VfAdmin(PF.text, 1, "52:54:00:00:00:09", 0, 0, True, False), MadeLink("vl0", "tap7", "x"))
    detailed = replace(claims[0], mac="52:54:00:00:00:01", journal=journal)
    state = replace(busy.state_of(Resource.vf(VF1)), claims=(detailed,))
    found = replace(busy, states={**busy.states, Resource.vf(VF1): state})
    check("show.txt", show_text(found, Resource.vf(VF1)))
    check("show.json", json.dumps(show_json(found, Resource.vf(VF1)), indent=2))


def test_a_name_with_control_characters_cannot_touch_the_terminal(busy):
    evil = replace(busy.state_of(Resource.vf(VF1)).claims[0], interface="\033[2Jnet0\n")
    state = replace(busy.state_of(Resource.vf(VF1)), claims=(evil,))
    text = show_text(replace(busy, states={Resource.vf(VF1): state}), Resource.vf(VF1))
    assert "\033" not in text
    assert "for ?[2Jnet0?" in text


ASSIGNED = Assignment(
    Intent("ua-net0", Policy.VEPA, ("enp1s0",)),
    Combination.parse("vepa-macvlan-tap+vhost"),
    (Wanted(Resource.nic("bond0"), Mode.SHARED), Wanted(Resource.pf(PF), Mode.SHARED)),
    (Rejection("vepa-sriov-tap+vhost on enp1s0", "the driver igb has no VEPA mode"),),
)
FIXED = Assignment(
    Fixed("hostdev0", VF0, Form.HOSTDEV),
    Combination.parse("veb-sriov-vfio"),
    (Wanted(Resource.vf(VF0), Mode.EXCLUSIVE, PF),),
)


def test_a_plan_is_a_table_with_each_rejected_candidate_and_its_reason():
    plan = Plan((ASSIGNED, FIXED))
    check("plan.txt", plan_text(plan))
    check("plan.json", json.dumps(plan_json(plan), indent=2))


def test_a_refusal_shows_what_was_tried():
    refusal = Refusal(
        ASSIGNED.request, RefusalKind.HELD, "held", Resource.vf(VF0), 'guest "web1"', ASSIGNED.rejected
    )
    check("refusal.txt", plan_text(refusal))
    check("refusal.json", json.dumps(plan_json(refusal), indent=2))


def test_a_guest_that_needs_no_device_has_an_empty_plan():
    assert plan_text(Plan(())).startswith("nothing to claim")


def test_a_user_network_is_planned_without_a_device():
    intent = Intent("net0", Policy.NAT)
    found = Plan((Assignment(intent, Combination.parse("nat-socket-passt"), ()),))
    assert plan_text(found).splitlines()[1] == "net0       nat-socket-passt  none"
    assert (plan_json(found)["plan"][0]["device"], plan_json(found)["plan"][0]["asked"]) == (None, "nat")


def test_since_has_its_time_zone():
    assert since_iso(0) == "1970-01-01T05:30:00+05:30"


@pytest.mark.parametrize(
    ("terminal", "variable", "width"), [(0, None, 80), (0, "132", 132), (100, "132", 100), (20, None, 40)]
)
def test_a_table_is_as_wide_as_the_terminal_or_as_columns_says_where_that_does_not_know(
    terminal, variable, width, monkeypatch
):
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb"), os.fdopen(theirs, "w") as stream:
        termios.tcsetwinsize(stream, (24, terminal))
        monkeypatch.setattr(sys, "__stdout__", stream)
        monkeypatch.delenv("COLUMNS", raising=False)
        if variable:
            monkeypatch.setenv("COLUMNS", variable)
        assert verbs._style(stream).width == width
