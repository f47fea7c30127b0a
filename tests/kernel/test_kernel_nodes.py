import fcntl
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator

import pytest

from vnet_lock.errors import VnetLockError
from vnet_lock.kernel import netlink, nodes, processes
from vnet_lock.kernel.sysfs import read_macvtap_rdev
from vnet_lock.settings import DEFAULT

Ip = Callable[[str], str]
TUNGETIFF = 0x800454D2
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x100, 0x1000, 0x4000


def flags_of(descriptor: int) -> int:
    """What QEMU asks a tap's descriptor that it is handed."""
    return struct.unpack_from("=H", fcntl.ioctl(descriptor, TUNGETIFF, bytes(40)), 16)[0]


@pytest.fixture
def opened() -> Iterator[list[int]]:
    descriptors: list[int] = []
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.fixture
def macvtap(veth: tuple[str, str], macvtap_works: None, ip: Ip) -> str:
    netlink.add_macvtap("vl0", veth[0], "bridge", "52:54:00:00:00:07", "vnet-lock:x")
    netlink.set_link("vl0", up=True)
    return "vl0"


def ours_in_dev() -> list[str]:
    return [name for name in os.listdir("/dev") if "vnet-lock" in name]


@pytest.mark.parametrize("queues", [1, 3])
def test_a_macvtap_is_opened_as_qemu_expects_it(macvtap: str, opened: list[int], queues: int):
    opened += nodes.open_macvtap(DEFAULT, macvtap, queues)
    assert len(opened) == queues
    expected = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
    for descriptor in opened:
        assert flags_of(descriptor) & (expected | IFF_MULTI_QUEUE) == expected
        assert os.fstat(descriptor).st_rdev == read_macvtap_rdev(DEFAULT, macvtap)
        assert not os.get_inheritable(descriptor)
    assert ours_in_dev() == []


def test_packets_come_out_of_the_descriptor(macvtap: str, veth: tuple[str, str], opened: list[int]):
    import socket

    opened += nodes.open_macvtap(DEFAULT, macvtap)
    frame = bytes.fromhex("52540000000752540000009988b5") + b"to the guest".ljust(46, b".")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((veth[1], 0))
        wire.send(frame)
    os.set_blocking(opened[0], False)
    received = [os.read(opened[0], 2048)[10:]]  # behind a vnet header of 10 bytes
    while received[-1] != frame:
        received.append(os.read(opened[0], 2048)[10:])


def test_the_node_that_another_namespaces_macvtap_has_by_our_ifindex_is_not_opened(
    macvtap: str, opened: list[int], ip: Ip
):
    # /dev/tap<ifindex> made by hand with another macvtap's number, as with two namespaces.
    ip("link add link v1 name other0 type macvtap")
    other = read_macvtap_rdev(DEFAULT, "other0")
    ours = read_macvtap_rdev(DEFAULT, macvtap)
    assert other is not None
    assert other != ours
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev"], check=True)
    with open(f"/sys/class/net/{macvtap}/ifindex", encoding="ascii") as file:
        os.mknod(f"/dev/tap{int(file.read())}", stat.S_IFCHR | 0o600, other)
    opened += nodes.open_macvtap(DEFAULT, macvtap)
    assert os.fstat(opened[0]).st_rdev == ours


def test_a_dev_that_is_mounted_nodev_is_an_error_that_says_so(macvtap: str):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nodev", "tmpfs", "/dev"], check=True)
    with pytest.raises(VnetLockError, match="nodev"):
        nodes.open_macvtap(DEFAULT, macvtap)
    assert ours_in_dev() == []


@pytest.mark.parametrize("queues", [1, 2])
def test_a_tap_is_opened_with_the_queues_that_it_was_made_for(netns: None, opened: list[int], queues: int):
    netlink.add_tap("vl0", "vnet-lock:x", queues=queues)
    with pytest.raises(VnetLockError, match="made for another number"):
        nodes.open_tap(DEFAULT, "vl0", 3 - queues)
    opened += nodes.open_tap(DEFAULT, "vl0", queues)
    assert len(opened) == queues
    assert flags_of(opened[0]) & IFF_VNET_HDR


def test_a_tap_that_is_open_is_busy(netns: None, opened: list[int]):
    netlink.add_tap("vl0", "vnet-lock:x")
    opened += nodes.open_tap(DEFAULT, "vl0")
    with pytest.raises(VnetLockError, match="all its queues are open already"):
        nodes.open_tap(DEFAULT, "vl0")


def test_who_has_a_macvtap_open_is_found(macvtap: str, opened: list[int]):
    rdev = read_macvtap_rdev(DEFAULT, macvtap)
    assert rdev is not None
    assert processes.read_holders(DEFAULT, [rdev]) == {}
    opened += nodes.open_macvtap(DEFAULT, macvtap)
    (user,) = processes.read_holders(DEFAULT, [rdev])[rdev]
    assert user.pid == os.getpid()
