from pathlib import Path

import pytest

from tests.fake_host import FakeHost, build, rdev_text
from vnet_lock.errors import BadInput, Refused, Unsupported, Vanished
from vnet_lock.kernel import pci
from vnet_lock.model import PciAddress

PF, VF = PciAddress.parse("01:00.0"), PciAddress.parse("01:10.0")


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A PF and its VF, in a sysfs that takes every write and does nothing."""
    host = FakeHost(tmp_path)
    host.pf(PF.text, vfs=(VF.text,))
    host.vf(VF.text, PF.text, group=10)
    build(
        tmp_path,
        {
            "sys/bus/pci/drivers_probe": "",
            "sys/bus/pci/drivers/igbvf/unbind": "",
            "sys/bus/pci/drivers/vfio-pci/unbind": "",
        },
    )
    return host


def read(host: FakeHost, path: str) -> str:
    return (host.root / "sys/bus/pci" / path).read_text()


def test_drivers_are_read(host: FakeHost):
    assert pci.read_driver(host.settings, VF) == "igbvf"
    assert pci.read_driver_override(host.settings, VF) is None
    (host.root / f"sys/bus/pci/devices/{VF}/driver").unlink()
    (host.root / f"sys/bus/pci/devices/{VF}/driver_override").write_text("vfio-pci\n")
    assert pci.read_driver(host.settings, VF) is None
    assert pci.read_driver_override(host.settings, VF) == "vfio-pci"


def test_a_function_that_is_gone_is_vanished(host: FakeHost):
    gone = PciAddress.parse("77:00.0")
    for call in (pci.read_driver, pci.read_driver_override, pci.read_numvfs):
        with pytest.raises(Vanished, match=r"0000:77:00\.0"):
            call(host.settings, gone)
    with pytest.raises(Vanished):
        pci.bind_driver(host.settings, gone, None)


def test_binding_what_is_bound_writes_nothing(host: FakeHost):
    pci.bind_driver(host.settings, VF, "igbvf")
    assert read(host, "drivers/igbvf/unbind") == ""
    assert read(host, "drivers_probe") == ""


def test_a_driver_that_is_not_there_is_refused_before_the_old_one_is_taken_away(host: FakeHost):
    with pytest.raises(Unsupported, match="modprobe ixgbevf"):
        pci.bind_driver(host.settings, VF, "ixgbevf")
    assert read(host, "drivers/igbvf/unbind") == ""


def test_a_probe_that_comes_to_nothing_is_an_error_and_the_override_is_put_back(host: FakeHost):
    override = host.root / f"sys/bus/pci/devices/{VF}/driver_override"
    override.write_text("")
    with pytest.raises(Unsupported, match=r"0000:01:10.0 is bound to igbvf, not vfio-pci; see: dmesg"):
        pci.bind_driver(host.settings, VF, "vfio-pci")
    assert read(host, "drivers/igbvf/unbind") == VF.text
    assert read(host, "drivers_probe") == VF.text
    # A file keeps what the longer write left behind the newline; sysfs would not.
    assert override.read_text().startswith("\n")


def test_a_function_that_is_open_is_not_unbound_from_vfio(host: FakeHost):
    driver = host.root / f"sys/bus/pci/devices/{VF}/driver"
    driver.unlink()
    driver.symlink_to("../../../bus/pci/drivers/vfio-pci")
    build(host.root, {"sys/class/vfio/10/dev": rdev_text("/dev/null")})
    host.process(900001, "qemu", "/dev/null")
    with pytest.raises(Refused, match=r"qemu \(pid 900001\)") as caught:
        pci.bind_driver(host.settings, VF, "igbvf")
    assert caught.value.resource == VF.text
    assert read(host, "drivers/vfio-pci/unbind") == ""


@pytest.mark.parametrize(
    ("driver", "is_vfio"),
    [
        ("vfio-pci", True), ("mlx5_vfio_pci", True), ("hisi-acc-vfio-pci", True),
        ("igbvf", False), ("vfiox", False), (None, False),
    ],
)  # fmt: skip
def test_vfio_drivers_are_known_by_their_names(driver: str | None, is_vfio: bool):
    assert pci.is_vfio_driver(driver) is is_vfio


@pytest.mark.parametrize("count", [-1, 8, 1000])
def test_more_vfs_than_there_can_be_are_bad_input(host: FakeHost, count: int):
    with pytest.raises(BadInput, match="0 to 7"):
        pci.set_numvfs(host.settings, PF, count)
    assert pci.read_numvfs(host.settings, PF) == 1


def test_numvfs_is_changed_by_way_of_zero(host: FakeHost):
    pci.set_numvfs(host.settings, PF, 1)
    pci.set_numvfs(host.settings, PF, 3)
    assert pci.read_numvfs(host.settings, PF) == 3


def test_a_function_without_sriov_is_unsupported(host: FakeHost):
    with pytest.raises(Unsupported, match="no SR-IOV"):
        pci.set_numvfs(host.settings, VF, 1)
