"""What a port of a network does to claims: a new one may be refused, and no other."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_host import FakeHost, locked
from tests.unit.test_companion import qemu
from tests.unit.test_hook import UUIDS, VF0, VF1, Told
from vnet_lock.claims import ClaimTable
from vnet_lock.errors import BadInput
from vnet_lock.front.hook import answer_with
from vnet_lock.front.libvirt_guest import read_daemon
from vnet_lock.front.network_hook import perform
from vnet_lock.kernel.processes import read_process
from vnet_lock.model import PciAddress, Process, State
from vnet_lock.network_xml import Port, read_port
from vnet_lock.request import Fixed, Form
from vnet_lock.session import Session
from vnet_lock.settings import DEFAULT

PF = "0000:01:00.0"
MAC = "52:54:00:00:0b:01"


def plug_of(device: str) -> str:
    """As virNetworkPortDefFormatBuf writes it (seen of 11.3)."""
    if ":" not in device:
        return f"<plug type='direct' dev='{device}' mode='vepa'/>"
    pci = PciAddress.parse(device)
    return (
        "<plug type='hostdev-pci' managed='yes'><driver name='vfio'/>"
        f"<address domain='{pci.domain:#06x}' bus='{pci.bus:#04x}' slot='{pci.device:#04x}'"
        f" function='{pci.function:#x}'/></plug>"
    )


def told_of(plug: str, name: str = "a", mac: str = MAC, more: str = "") -> bytes:
    return f"""<hookData>
  <network connections='1'><name>net</name><uuid>ebb617d0-e22d-483b-b102-0838fbd4d15f</uuid>
    <forward mode='hostdev'/></network>
  <networkport>
    <uuid>97b42c45-4f6d-4237-b7ba-017f86036783</uuid>
    <owner><name>{name}</name><uuid>{UUIDS[name]}</uuid></owner>
    <mac address='{mac}'/>
    {plug}{more}
  </networkport>
</hookData>""".encode()


# --- what it is told ----------------------------------------------------------------------------


def test_a_port_is_read_as_the_guests_own_xml_would_be() -> None:
    vlan = "<vlan><tag id='42'/></vlan>"
    assert read_port(told_of(plug_of(VF0), more=vlan)) == Port(
        "a", UUIDS["a"], Fixed(MAC, PciAddress.parse(VF0), Form.HOSTDEV, MAC, vlan=42)
    )
    assert read_port(told_of(plug_of("eth0"))) == Port("a", UUIDS["a"], Fixed(MAC, "eth0", Form.VEPA, MAC))


@pytest.mark.parametrize(
    "xml",
    [
        told_of("<plug type='bridge' bridge='virbr0'/>"),
        told_of("<plug type='none'/>"),
        told_of(""),
        b"<hookData><network><name>net</name></network></hookData>",
    ],
)
def test_a_port_without_a_device_of_ours_is_none(xml: bytes) -> None:
    assert read_port(xml) is None


@pytest.mark.parametrize(
    "xml",
    [
        b"",
        b"<domain/>",
        told_of("<plug type='hostdev-pci'/>"),
        told_of(plug_of(VF0)).replace(UUIDS["a"].encode(), b""),
        told_of(plug_of("eth0").replace("eth0", "no device")),
        b"<!DOCTYPE hookData []>" + told_of(plug_of(VF0)),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(xml: bytes) -> None:
    with pytest.raises(BadInput) as caught:
        read_port(xml)
    assert "\n" not in str(caught.value)


# --- what it does -------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    """Two free VFs, a network device, and this machine's processes, one of which is libvirt's daemon."""
    host = FakeHost(tmp_path)
    host.pf(PF, vfs=(VF0, VF1), netdev="lo")
    for group, vf in enumerate((VF0, VF1)):
        host.vf(vf, PF, driver=None, group=group)
    host.nic("eth0", up=True)
    host.settings = replace(host.settings, proc=DEFAULT.proc)
    with locked(Path(host.settings.libvirt_run) / "qemu/driver.pid"):
        yield host


def hook(host: FakeHost, operation: str, xml: bytes) -> tuple[int, Told]:
    told = Told()
    status = answer_with(
        lambda: perform(host.settings, operation, xml, Session), operation, 'network "net"', told
    )
    return status, told


def claims(host: FakeHost) -> list[tuple[str, str]]:
    return [(one.resource.text, one.owner.name) for one in ClaimTable(host.settings).read().records]


@pytest.mark.parametrize(("device", "resource"), [(VF0, f"vf:{VF0}"), ("eth0", "nic:eth0")])
def test_a_new_port_claims_and_its_end_gives_back(host: FakeHost, device: str, resource: str) -> None:
    for _ in range(2):
        assert hook(host, "port-created", told_of(plug_of(device))) == (0, Told())
        assert claims(host) == [(resource, "a")]
    (claim,) = ClaimTable(host.settings).read().records
    assert claim.owner.process == read_daemon(host.settings)
    for _ in range(2):
        assert hook(host, "port-deleted", told_of(plug_of(device))) == (0, Told())
        assert claims(host) == []


def test_a_vf_of_anothers_refuses_a_new_port(host: FakeHost) -> None:
    assert hook(host, "port-created", told_of(plug_of(VF0), "b"))[0] == 0
    status, told = hook(host, "port-created", told_of(plug_of(VF0)))
    assert status == 1
    assert told.said == [f'vnet-lock: VF {VF0} is held by guest "b" since {told.said[0].split("since ")[1]}']
    assert hook(host, "port-created", told_of(plug_of(VF1), mac="52:54:00:00:0b:02"))[0] == 0
    # The end of a port that never came to be takes nothing from anybody.
    assert hook(host, "port-deleted", told_of(plug_of(VF0))) == (0, Told())
    assert claims(host) == [(f"vf:{VF0}", "b"), (f"vf:{VF1}", "a")]


def test_each_port_on_a_device_has_a_share_of_its_own(host: FakeHost) -> None:
    macs = ("52:54:00:00:0b:01", "52:54:00:00:0b:02")
    for mac in macs:
        assert hook(host, "port-created", told_of(plug_of("eth0"), mac=mac))[0] == 0
    assert len(claims(host)) == 2
    for left, mac in enumerate(macs):
        assert hook(host, "port-deleted", told_of(plug_of("eth0"), mac=mac))[0] == 0
        assert len(claims(host)) == 1 - left


def running(host: FakeHost, name: str, *devices: str) -> None:
    """libvirt's status file of a guest that runs and has these VFs."""
    sources = "".join(
        f"<source><address type='pci' domain='0x{vf[:4]}' bus='0x{vf[5:7]}' slot='0x{vf[8:10]}'"
        f" function='0x{vf[-1]}'/></source>"
        for vf in devices
    )
    path = Path(host.settings.libvirt_run) / f"qemu/{name}.xml"
    path.write_text(f"<domstatus><domain><uuid>{UUIDS[name]}</uuid>{sources}</domain></domstatus>")
    for vf in devices:
        driver = Path(host.settings.sys) / f"bus/pci/devices/{vf}/driver"
        driver.symlink_to("../../../bus/pci/drivers/vfio-pci")


def test_a_port_that_is_told_again_of_a_running_guest_is_claimed(host: FakeHost) -> None:
    """Where our hooks came while the guest ran, and its network daemon starts anew."""
    running(host, "a", VF0)
    with qemu(host.settings):
        assert hook(host, "port-created", told_of(plug_of(VF0))) == (0, Told())
        (claim,) = ClaimTable(host.settings).read().records
        assert (claim.resource.text, claim.journal) == (f"vf:{VF0}", ())


def test_a_port_of_a_running_guest_keeps_its_claim_whatever_began_to_give_it_back(host: FakeHost) -> None:
    assert hook(host, "port-created", told_of(plug_of(VF0)))[0] == 0
    leave_releasing(host, None)
    running(host, "a", VF0)
    with qemu(host.settings):
        assert hook(host, "port-created", told_of(plug_of(VF0))) == (0, Told())
    (claim,) = ClaimTable(host.settings).read().records
    assert (claim.resource.text, claim.state, claim.worker) == (f"vf:{VF0}", State.ACTIVE, None)


def test_what_somebody_is_giving_back_is_no_claim_of_a_new_ports(host: FakeHost) -> None:
    """Else he would undo it and drop it under the guest that goes on."""
    host.settings = replace(host.settings, busy_wait_s=0.2)
    assert hook(host, "port-created", told_of(plug_of(VF0)))[0] == 0
    leave_releasing(host, read_process(host.settings, os.getppid()))
    status, told = hook(host, "port-created", told_of(plug_of(VF0)))
    assert status == 1
    assert f"is being worked on by pid {os.getppid()}" in told.said[0]
    leave_releasing(host, None)  # he has gone
    assert hook(host, "port-created", told_of(plug_of(VF0)))[0] == 0
    (claim,) = ClaimTable(host.settings).read().records
    assert claim.state is State.ACTIVE


def leave_releasing(host: FakeHost, worker: Process | None) -> None:
    """The only claim is being given back by that process."""
    with ClaimTable(host.settings).guarded() as writer:
        (claim,) = writer.read().records
        writer.replace(replace(claim, state=State.RELEASING, worker=worker))


def test_a_port_that_its_guest_has_is_never_refused(host: FakeHost) -> None:
    assert hook(host, "port-created", told_of(plug_of(VF0), "b"))[0] == 0
    running(host, "a", VF0)
    with qemu(host.settings):
        status, told = hook(host, "port-created", told_of(plug_of(VF0)))
    assert status == 0
    assert 'is held by guest "b"' in told.logged[0]
    assert claims(host) == [(f"vf:{VF0}", "b")]


def test_without_a_daemon_for_guests_a_new_port_is_refused(host: FakeHost) -> None:
    os.unlink(Path(host.settings.libvirt_run) / "qemu/driver.pid")
    status, told = hook(host, "port-created", told_of(plug_of(VF0)))
    assert (status, len(told.said), claims(host)) == (1, 1, [])


@pytest.mark.parametrize("operation", ["start", "started", "stopped", "updated", "new"])
def test_any_other_operation_is_none_of_ours(host: FakeHost, operation: str) -> None:
    assert hook(host, operation, b"whatever") == (0, Told())


def test_what_makes_no_sense_refuses_a_new_port_and_nothing_else(host: FakeHost) -> None:
    assert hook(host, "port-created", b"<domain/>")[0] == 1
    status, told = hook(host, "port-deleted", b"<domain/>")
    assert (status, len(told.logged)) == (0, 1)


def test_what_an_earlier_start_left_is_given_back_before_this_one(host: FakeHost) -> None:
    """Else whoever heals it would give this guest's VF back under it."""
    assert hook(host, "port-created", told_of(plug_of(VF0)))[0] == 0
    with ClaimTable(host.settings).guarded() as writer:
        (old,) = writer.read().records
        assert old.owner.process is not None
        dead = replace(old.owner.process, start_ticks=1)
        writer.replace(replace(old, owner=replace(old.owner, process=dead)))
    assert hook(host, "port-created", told_of(plug_of(VF0))) == (0, Told())
    (new,) = ClaimTable(host.settings).read().records
    assert new.token != old.token
    assert new.owner.process == read_daemon(host.settings)
