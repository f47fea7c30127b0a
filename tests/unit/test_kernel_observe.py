import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_host import FakeHost, Link, build, rdev_text
from vnet_lock.errors import VnetLockError
from vnet_lock.kernel import sysfs
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.kernel.users import read_status, read_users
from vnet_lock.model import PciAddress, Resource, UseKind, User

PF, VF0, VF1 = "0000:01:00.0", "0000:01:10.0", "0000:01:10.2"


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """One igb PF with two VFs, each in a group of its own; another NIC without SR-IOV; a disk."""
    host = FakeHost(tmp_path)
    host.pf(PF, netdev="enp1s0", group=1, vfs=(VF0, VF1))
    host.vf(VF0, PF, netdev="enp1s0v0", group=10)
    host.vf(VF1, PF, netdev="enp1s0v1", group=11)
    host.function("0000:02:00.0", driver="e1000e", netdev="eno1", group=2)
    host.function("0000:03:00.0", driver="nvme", kind="0x010802", group=3)
    host.function("0000:00:1c.0", driver="pcieport", kind="0x060400", group=1)
    host.function("0000:01:00.1", driver=None, kind="0x0c0300", group=1)
    return host


def users(host: FakeHost, resource: str, *devices: str) -> tuple[User, ...]:
    return read_inventory(host.settings, devices or None).users_of(Resource.parse(resource))


def drive(host: FakeHost, pci: str, driver: str) -> None:
    """Take a function's network device away and bind it to another driver."""
    base = host.root / f"sys/bus/pci/devices/{pci}"
    (base / "driver").unlink()
    (base / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")
    for netdev in (base / "net").iterdir():
        netdev.rmdir()
        shutil.rmtree(host.root / "sys/class/net" / netdev.name)


def test_pfs_have_their_vfs_and_what_is_no_network_function_is_left_out(host: FakeHost):
    inventory = read_inventory(host.settings)
    assert [(pf.pci.text, pf.netdev, pf.driver, pf.numvfs, pf.totalvfs) for pf in inventory.pfs] == [
        (PF, "enp1s0", "igb", 2, 7),
        ("0000:02:00.0", "eno1", "e1000e", 0, 0),
    ]
    assert [(vf.pci.text, vf.index, vf.netdev, vf.driver, vf.iommu_group) for vf in inventory.vfs()] == [
        (VF0, 0, "enp1s0v0", "igbvf", 10),
        (VF1, 1, "enp1s0v1", "igbvf", 11),
    ]
    assert inventory.users == {}


def test_an_iommu_group_has_all_its_functions_but_no_bridges(host: FakeHost):
    groups = read_inventory(host.settings).iommu_groups
    assert groups.keys() == {1, 2, 10, 11}
    assert [pci.text for pci in groups[1]] == [PF, "0000:01:00.1"]


def test_vf_indexes_are_numbers_and_not_words(tmp_path: Path):
    host = FakeHost(tmp_path)
    vfs = tuple(f"0000:01:{16 + index // 8:02x}.{index % 8}" for index in range(12))
    host.pf(PF, vfs=vfs, totalvfs=12)
    for vf in vfs:
        host.vf(vf, PF)
    (pf,) = read_inventory(host.settings).pfs
    assert [vf.index for vf in pf.vfs] == list(range(12))


@pytest.mark.parametrize("device", [PF, VF0, "01:10.2", "enp1s0", "enp1s0v1"])
def test_any_name_of_a_pf_or_vf_reads_that_pf_whole_and_no_other(host: FakeHost, device: str):
    inventory = read_inventory(host.settings, [device])
    assert [pf.pci.text for pf in inventory.pfs] == [PF]
    assert len(inventory.pfs[0].vfs) == 2
    assert {nic.netdev for nic in inventory.nics} == {"enp1s0", "enp1s0v0", "enp1s0v1"}


def test_what_a_device_stands_on_is_read_down_to_its_pfs(host: FakeHost):
    host.nic("bond0", **{"bonding/mode": "802.3ad 4\n"})
    host.nic("bond0.5", uevent="DEVTYPE=vlan\nINTERFACE=bond0.5\n")
    host.nic("br7", **{"bridge/bridge_id": "x\n"})
    host.stack("bond0", "enp1s0")
    host.stack("bond0", "eno1")
    host.stack("bond0.5", "bond0")
    host.stack("br7", "bond0.5")
    inventory = read_inventory(host.settings, ["bond0.5"])
    kinds = {nic.netdev: nic.kind for nic in inventory.nics}
    assert (kinds["bond0"], kinds["bond0.5"]) == ("bond", "vlan")
    assert kinds["br7"] == "bridge"
    assert kinds["enp1s0"] == "physical"
    assert [pf.pci.text for pf in inventory.pfs] == [PF, "0000:02:00.0"]
    assert [user.how for user in inventory.users_of(Resource.nic("bond0"))] == ['vlan "bond0.5" on it']
    assert [user.how for user in inventory.users_of(Resource.pf(PciAddress.parse(PF)))] == [
        'port of bond "bond0"'
    ]


@pytest.mark.parametrize("device", ["nix0", "0000:77:00.0", "0000:03:00.0", "../../etc", "", "..", "a\0b"])
def test_a_device_that_is_not_there_or_no_network_device_is_absent(host: FakeHost, device: str):
    inventory = read_inventory(host.settings, [device, "eno1"])
    assert [nic.netdev for nic in inventory.nics] == ["eno1"]


def test_a_nic_is_read_with_its_state(host: FakeHost):
    ifindex = host.nic(
        "br0", up=True, address="52:54:00:aa:bb:cc\n", mtu="9000\n", **{"bridge/bridge_id": "x"}
    )
    nic = sysfs.read_nic(host.settings, "br0")
    assert nic is not None
    assert (nic.ifindex, nic.kind, nic.mac, nic.mtu, nic.up, nic.pci) == (
        ifindex, "bridge", "52:54:00:aa:bb:cc", 9000, True, None,
    )  # fmt: skip


def test_a_virtio_nic_belongs_to_the_function_behind_its_virtio_device(tmp_path: Path):
    host = FakeHost(tmp_path)
    host.function("0000:00:03.0", driver="virtio-pci")
    build(tmp_path, {"sys/bus/pci/devices/0000:00:03.0/virtio2/net/eth0/": ""})
    host.nic("eth0", device=Link("../../../bus/pci/devices/0000:00:03.0/virtio2"))
    inventory = read_inventory(host.settings)
    assert inventory.pfs[0].netdev == "eth0"
    assert inventory.nics[0].pci == PciAddress.parse("0000:00:03.0")


def test_a_virtio_nic_that_goes_while_it_is_looked_at_is_read_as_one_without_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    host = FakeHost(tmp_path)
    host.nic("eth0", device=Link("../../../bus/pci/devices/0000:00:03.0/virtio2"))

    def gone(path: str) -> str:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr("os.path.realpath", gone)
    assert read_inventory(host.settings).nics[0].pci is None


def test_a_usb_nic_is_no_pci_function(tmp_path: Path):
    host = FakeHost(tmp_path)
    host.nic("enx0", device=Link("../../../devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2:1.0"))
    assert read_inventory(host.settings).nics[0].pci is None


def test_a_vf_that_vanishes_between_two_reads_is_absent_or_without_parts(host: FakeHost):
    base = host.root / "sys/bus/pci/devices" / VF1
    for name in ("driver", "iommu_group", "class"):
        (base / name).unlink()
    vf = read_inventory(host.settings).vf_at(PciAddress.parse(VF1))
    assert vf is not None
    assert (vf.driver, vf.iommu_group) == (None, None)
    (host.root / "sys/bus/pci/devices" / PF / "virtfn1").unlink()
    assert read_inventory(host.settings, [VF0]).vf_at(PciAddress.parse(VF1)) is None
    (host.root / "sys/class/net/enp1s0v0/ifindex").unlink()
    assert read_inventory(host.settings, [VF0]).nic_named("enp1s0v0") is None


def test_what_may_not_be_read_does_not_pass_for_absent(host: FakeHost):
    flags = host.root / "sys/class/net/enp1s0/flags"
    flags.unlink()
    flags.mkdir()  # EISDIR, even for root
    with pytest.raises(VnetLockError, match="cannot read"):
        read_inventory(host.settings)


def test_a_network_device_that_is_renamed_all_the_time_is_no_traceback(host: FakeHost):
    shutil.rmtree(host.root / "sys/class/net/enp1s0v0")
    for devices in ([VF0], None):
        inventory = read_inventory(host.settings, devices)
        assert inventory.nic_named("enp1s0v0") is None
        assert inventory.vf_at(PciAddress.parse(VF0)) is not None


def test_an_empty_host_has_nothing(tmp_path: Path):
    inventory = read_inventory(FakeHost(tmp_path).settings)
    assert (inventory.pfs, inventory.nics, inventory.users, inventory.iommu_groups) == ((), (), {}, {})


# --- users --------------------------------------------------------------------------------------


def test_a_vf_on_vfio_is_in_use_only_once_somebody_has_its_group_open(host: FakeHost):
    drive(host, VF0, "vfio-pci")
    build(host.root, {"sys/class/vfio/10/dev": rdev_text("/dev/null")})
    assert users(host, f"vf:{VF0}", VF0) == ()
    host.process(900001, "qemu-system-x86", "/dev/null")
    assert users(host, f"vf:{VF0}", VF0) == (
        User(900001, "qemu-system-x86", "has /dev/null open", UseKind.VFIO),
    )


def test_a_vf_on_a_vfio_variant_is_in_use_through_its_own_vfio_device(host: FakeHost):
    drive(host, VF0, "mlx5_vfio_pci")
    build(host.root, {f"sys/bus/pci/devices/{VF0}/vfio-dev/vfio3/dev": rdev_text("/dev/null")})
    host.process(900001, "qemu", "/dev/null")
    host.process(900002, "cloud-hypervisor", "/dev/null")
    assert [user.pid for user in users(host, f"vf:{VF0}", VF0)] == [900001, 900002]


def test_a_user_space_driver_is_a_use_and_names_who_has_its_device_open(host: FakeHost):
    drive(host, VF0, "igb_uio")
    assert [user.text for user in users(host, f"vf:{VF0}")] == ["bound to igb_uio"]
    build(host.root, {f"sys/bus/pci/devices/{VF0}/uio/uio0/dev": rdev_text("/dev/null")})
    host.process(900001, "dpdk-testpmd", "/dev/null")
    found = users(host, f"vf:{VF0}")
    assert [(user.pid, user.kind) for user in found] == [(None, UseKind.DRIVER), (900001, UseKind.DRIVER)]


def test_a_network_driver_without_a_network_device_is_a_use(host: FakeHost):
    drive(host, VF0, "igbvf")
    (found,) = users(host, f"vf:{VF0}")
    assert found.kind is UseKind.UNSEEN
    assert found.text == "bound to igbvf, with no network device that could be found"


def test_a_function_without_a_driver_is_free(host: FakeHost):
    drive(host, VF0, "none")
    (host.root / f"sys/bus/pci/devices/{VF0}/driver").unlink()
    assert users(host, f"vf:{VF0}") == ()


def test_a_macvtap_on_a_vf_names_its_mark_and_the_process_behind_it(host: FakeHost):
    host.nic("web0", ifalias="vnet-lock:0123456789abcdef\n", **{"macvtap/tap9/dev": rdev_text("/dev/null")})
    host.stack("web0", "enp1s0v0")
    (found,) = users(host, f"vf:{VF0}", VF0)
    assert (found.pid, found.how, found.kind) == (None, 'macvtap "web0" on it', UseKind.UPPER)
    assert (found.link, found.mark) == ("web0", "0123456789abcdef")
    host.process(900001, "qemu", "/dev/null")
    assert users(host, f"vf:{VF0}", VF0) == (
        User(900001, "qemu", 'macvtap "web0" on it', UseKind.UPPER, "web0", "0123456789abcdef"),
    )


def test_who_is_behind_the_macvtaps_of_a_shared_pf_is_asked_only_for_the_whole_host(host: FakeHost):
    host.nic("web0", **{"macvtap/tap9/dev": rdev_text("/dev/null")})
    host.stack("web0", "enp1s0")
    host.process(900001, "qemu", "/dev/null")
    assert [user.pid for user in users(host, f"pf:{PF}", "enp1s0")] == [None]
    assert [user.pid for user in users(host, f"pf:{PF}")] == [900001]


def test_a_bridge_above_is_a_use(host: FakeHost):
    host.nic("br0", **{"bridge/bridge_id": "x"})
    host.stack("br0", "eno1")
    (found,) = users(host, "pf:0000:02:00.0", "eno1")
    assert (found.how, found.link) == ('port of bridge "br0"', "br0")


def test_a_device_that_guests_share_is_no_claims_alone(host: FakeHost):
    host.nic("vl7.42", uevent="DEVTYPE=vlan\n", ifalias="vnet-lock:shared:vl7.42\n")
    host.stack("vl7.42", "eno1")
    (found,) = users(host, "pf:0000:02:00.0", "eno1")
    assert (found.link, found.mark) == ("vl7.42", None)


def test_addresses_count_on_a_device_that_is_up(host: FakeHost):
    up = host.nic("br0", up=True, **{"bridge/bridge_id": "x"})
    down = host.nic("br1", **{"bridge/bridge_id": "x"})
    inventory = read_inventory(host.settings)
    found = read_users(
        host.settings,
        inventory.pfs,
        inventory.nics,
        {up: ("10.0.0.1", "fd00::1"), down: ("10.0.0.2",)},
        thorough=True,
    )
    assert found == {
        Resource.nic("br0"): (User(None, "host", "address 10.0.0.1, fd00::1 on br0", UseKind.ADDRESS),)
    }


def test_a_default_route_through_a_device_without_an_address_is_the_hosts_use(host: FakeHost):
    row = "{}\t{}\t00000000\t0001\t0\t0\t0\t{}\t0\t0\t0"
    rows = [
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT",
        row.format("eno1", "00000000", "00000000"),
        row.format("enp1s0", "0000A8C0", "00FFFFFF"),
    ]
    build(host.root, {"proc/net/route": "\n".join(rows) + "\n"})
    (found,) = users(host, "pf:0000:02:00.0")
    assert (found.by_whom, found.kind) == ("by host: default route through eno1", UseKind.ADDRESS)
    assert users(host, f"pf:{PF}") == ()


def test_a_packet_socket_is_a_use_and_names_its_process(host: FakeHost):
    ifindex = host.nic("lab0")
    packet = "sk       RefCnt Type Proto  Iface R Rmem   User   Inode\n"
    packet += f"0000000000000000 3      3    0003   {ifindex}     1 0      0      5551\n"
    packet += "0000000000000000 3      3    0003   0     1 0      0      5552\n"
    build(host.root, {"proc/net/packet": packet})
    assert [user.text for user in users(host, "nic:lab0")] == ["packet socket on lab0"]
    host.process(900001, "tcpdump", "socket:[5551]", "socket:[5552]")
    assert [user.text for user in users(host, "nic:lab0")] == ["tcpdump (pid 900001): packet socket on lab0"]
    assert [user.pid for user in users(host, "nic:lab0", "lab0")] == [None]


LOCKER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
print(flush=True)
input()
"""

STATUS = """<domstatus state='running' reason='booted' pid='4711'>
  <domain type='kvm' id='1'>
    <name>web1</name>
    <uuid>7A2B8C3D-0000-4000-8000-0123456789ab</uuid>
    <metadata>
      <x:y xmlns:x='u'><source><address bus='0x01' slot='0x10' function='0x4'/></source></x:y>
    </metadata>
    <devices>
      <interface type='network'>
        <source network='pool' portid='x'/>
        <actual type='hostdev' managed='yes'>
          <source>
            <address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x0'/>
          </source>
        </actual>
        <address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/>
      </interface>
      <hostdev mode='subsystem' type='pci' managed='yes'>
        <source>
          <address domain="0x0000" bus="0x03" slot="0x00" function="0x0"/>
          <origstates><unbind/></origstates>
        </source>
      </hostdev>
    </devices>
  </domain>
</domstatus>
"""


def test_a_status_file_names_sources_and_not_the_guests_own_addresses():
    assert [pci.text for pci in read_status(STATUS.encode())] == [VF0, "0000:03:00.0"]
    assert read_status(STATUS.encode()[: STATUS.index("slot='0x10' function='0x0'")]) == ()
    assert read_status(b"\xff<source>" * 1000) == ()


def test_a_status_file_counts_while_its_guests_pid_file_is_locked(host: FakeHost):
    drive(host, VF0, "vfio-pci")
    build(host.root, {"run/libvirt/qemu/web1.xml": STATUS, "run/libvirt/qemu/web1.pid": ""})
    assert users(host, f"vf:{VF0}", VF0) == ()
    pid_file = host.root / "run/libvirt/qemu/web1.pid"
    command = [sys.executable, "-c", LOCKER, str(pid_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (found,) = users(host, f"vf:{VF0}", VF0)
        child.kill()
    assert (found.pid, found.kind) == (child.pid, UseKind.LIBVIRT)
    assert found.how == 'libvirt\'s guest "web1" has it'
    assert found.mark == "7a2b8c3d-0000-4000-8000-0123456789ab"
    assert users(host, f"vf:{VF0}", VF0) == ()


def test_a_quiet_host_is_read_without_a_look_at_any_process(host: FakeHost):
    # A process whose fd folder is a file: reading it would raise.
    build(host.root, {"proc/900001/fd": Link("fd")})
    assert read_inventory(host.settings, [VF0, VF1]).users == {}
    drive(host, VF0, "vfio-pci")
    build(host.root, {"sys/class/vfio/10/dev": rdev_text("/dev/null")})
    with pytest.raises(OSError, match="symbolic links"):
        read_inventory(host.settings, [VF0, VF1])
