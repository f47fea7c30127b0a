"""Which VFIO driver is bound, and when a function goes through iommufd."""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_host import FakeHost, build
from vnet_lock.backends import Connection, vfio
from vnet_lock.combination import Combination
from vnet_lock.errors import Unsupported
from vnet_lock.front.qemu_features import read_dialect
from vnet_lock.kernel.modules import find_vfio_driver, lacks_vlans
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import PciAddress
from vnet_lock.ports import Job, Opened
from vnet_lock.ports.function import require_group
from vnet_lock.request import Assignment, Intent
from vnet_lock.situation import function_wanted

VF, PF = PciAddress.parse("01:10.0"), PciAddress.parse("01:00.0")
CONNECTX6_VF = "pci:v000015B3d0000101Esv000015B3sd00000016bc02sc00i00"
# As depmod writes them: what the kernel's own drivers say, and one that fits a vendor alone.
ALIASES = """\
# Aliases extracted from modules themselves.
alias vfio_pci:v000015B3d*sv*sd*bc*sc*i* any_mellanox_vfio_pci
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
alias vfio_pci:v000019E5d0000A255sv*sd*bc*sc*i* hisi_acc_vfio_pci
alias vfio_pci:v00001DD8d00001003sv*sd*bc02sc00i00 pds_vfio_pci
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_core
"""


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A PF and a VF in a group of its own."""
    host = FakeHost(tmp_path)
    host.pf(PF.text, vfs=(VF.text,), netdev="enp1s0", group=1)
    host.vf(VF.text, PF.text, group=10)
    return host


def teach(host: FakeHost, modalias: str, aliases: str | None = ALIASES) -> None:
    build(host.root, {f"sys/bus/pci/devices/{VF}/modalias": modalias + "\n"})
    if aliases is not None:
        build(host.root, {f"lib/modules/{os.uname().release}/modules.alias": aliases})


@pytest.mark.parametrize(
    ("modalias", "driver"),
    [
        (CONNECTX6_VF, "mlx5_vfio_pci"),
        (CONNECTX6_VF.replace("101E", "1019"), "any_mellanox_vfio_pci"),
        ("pci:v000019E5d0000A255sv00000000sd00000000bc10sc00i00", "hisi_acc_vfio_pci"),
        ("pci:v00001DD8d00001003sv00001DD8sd00005001bc02sc00i00", "pds_vfio_pci"),
        ("pci:v00001DD8d00001003sv00001DD8sd00005001bc01sc00i00", "vfio-pci"),
        ("pci:v00008086d000010CAsv00008086sd0000A03Cbc02sc00i00", "vfio-pci"),
        ("virtio:d00000001v00001AF4", "vfio-pci"),
    ],
)
def test_the_vfio_driver_with_the_fewest_wildcards_is_bound(
    host: FakeHost, modalias: str, driver: str
) -> None:
    teach(host, modalias)
    assert find_vfio_driver(host.settings, VF) == driver


def test_without_aliases_or_a_modalias_it_is_vfio_pci(host: FakeHost) -> None:
    assert find_vfio_driver(host.settings, VF) == "vfio-pci"
    teach(host, CONNECTX6_VF, None)
    assert find_vfio_driver(host.settings, VF) == "vfio-pci"


def test_a_kernel_lacks_vlans_only_where_its_modules_say_so(host: FakeHost) -> None:
    assert lacks_vlans(host.settings) == ""
    teach(host, CONNECTX6_VF)
    assert "8021q" in lacks_vlans(host.settings)
    build(host.root, {"proc/net/vlan/config": ""})
    assert lacks_vlans(host.settings) == ""


def test_a_kernel_without_modules_tells_by_its_configuration(host: FakeHost) -> None:
    for text, lacks in (("CONFIG_VLAN_8021Q=y\n", False), ("# CONFIG_VLAN_8021Q is not set\n", True)):
        (host.root / "proc/config.gz").write_bytes(gzip.compress(text.encode()))
        assert bool(lacks_vlans(host.settings)) is lacks
    (host.root / "proc/config.gz").write_bytes(b"no gzip")
    assert lacks_vlans(host.settings) == ""


def test_a_kernel_that_could_load_8021q_has_vlans(host: FakeHost) -> None:
    teach(host, CONNECTX6_VF, ALIASES + "alias rtnl-link-vlan 8021q\n")
    assert lacks_vlans(host.settings) == ""


def connect(host: FakeHost) -> bool:
    intent = Intent("net0", Combination.parse("veb-sriov-vfio").policy)
    return vfio.connect(host.settings, intent, Opened(pci=VF), Combination.parse("veb-sriov-vfio")).iommufd


def test_iommufd_is_used_where_kernel_and_function_offer_it(host: FakeHost) -> None:
    assert not connect(host)
    build(host.root, {f"sys/bus/pci/devices/{VF}/vfio-dev/vfio3/dev": "511:3\n", "sys/class/vfio-dev/": ""})
    assert not connect(host)
    build(host.root, {"dev/iommu": ""})
    assert not connect(host)  # its node isn't there (yet)
    build(host.root, {"dev/vfio/devices/vfio3": ""})
    assert connect(host)


@pytest.mark.parametrize(("helps", "knows"), [("iommufd=<link<iommufd>>", True), ("x-iommufd-no=1", False)])
def test_qemu_itself_is_asked_whether_it_knows_iommufd(tmp_path: Path, helps: str, knows: bool) -> None:
    program = tmp_path / "qemu"
    program.write_text(f'#!/bin/sh\n[ "$*" = "-device vfio-pci,help" ] && echo "  {helps}"\n')
    program.chmod(0o755)
    function = Connection(Combination.parse("veb-sriov-vfio"), pci=VF, iommufd=True)
    assert read_dialect(str(program), [function]).iommufd is knows
    assert not read_dialect(str(tmp_path / "nix"), [function]).iommufd


def job(host: FakeHost) -> Job:
    inventory = read_inventory(host.settings)
    intent = Intent("net0", Combination.parse("veb-sriov-vfio").policy)
    assignment = Assignment(intent, Combination.parse("veb-sriov-vfio"), function_wanted(inventory, VF))
    return Job(host.settings, inventory, assignment, intent, "0" * 16, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("driver", "goes"), [("ahci", False), ("pci-stub", True), ("vfio-pci", True), (None, True)]
)
def test_a_group_with_another_kind_of_device_is_not_taken_from_its_driver(
    host: FakeHost, driver: str | None, goes: bool
) -> None:
    host.function("0000:01:1f.0", driver=driver, kind="0x010601", group=10)
    if goes:
        require_group(job(host), VF)
        return
    with pytest.raises(Unsupported, match=r"0000:01:1f\.0 of its IOMMU group 10 .* has driver ahci"):
        require_group(job(host), VF)


def test_a_group_of_network_functions_is_no_obstacle(host: FakeHost) -> None:
    host.function("0000:01:00.1", driver="igb", group=10)
    made = job(host)
    assert len(made.assignment.wanted) == 2
    require_group(replace(made), VF)
