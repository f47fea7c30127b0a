"""Routed guests that run: they and the wire see each other's own addresses, and no address that isn't."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.host import NIC, QEMU, Host, eventually
from tests.kernel.test_crash import put_back
from tests.kernel.test_routed import ADDRESSES, PORTS, assert_as, uplink
from tests.kernel.test_wrapper import MACHINE, wait_for_line
from tests.lab import guest
from vnet_lock.combination import Port
from vnet_lock.kernel.netns import call_in

__all__ = ["uplink"]  # a fixture


def network(port: Port, *addresses: str) -> str:
    ips = "".join(f",ip={address}" for address in addresses or ADDRESSES)
    return f"-netdev host,id=net0,mode=route,port={port},dev=up0{ips}"


class Console:
    """A running guest's serial port. What it says is read: QEMU waits where nobody takes it."""

    def __init__(self, path: Path) -> None:
        wait_for_line(path.with_suffix(".log"), r"VNET-GUEST ready nics=1 .*link=up")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._count = 0

    def order(self, words: str) -> str:
        """What the guest answers to an order."""
        self._count += 1
        self._socket.sendall(f"{self._count} {words}\n".encode())
        said = b""
        while not (answer := re.search(rb"VNET-GUEST answer id=%d (\S+)\r?\n" % self._count, said)):
            more = self._socket.recv(4096)
            assert more, f"{words}: the guest is gone: {said!r}"
            said += more
        return answer[1].decode()

    def run(self, words: str) -> None:
        assert self.order(f"run {words}") == "exit=0", words

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def guests(host: Host, folder: Path, port: Port, *numbers: int) -> Iterator[list[Console]]:
    """Guests with 192.0.2.N/24 as the wire's other hosts have, and 2001:db8::N with fe80::1 as its router."""
    image = guest.build()
    with contextlib.ExitStack() as stack:
        for number in numbers:
            words = guest.kernel_words(ip=f"192.0.2.{number}/24")
            path = folder / str(number)
            console = (
                f"-chardev socket,id=c,path={path},server=on,wait=off,logfile={path}.log -serial chardev:c"
            )
            boot = f"-kernel {image.kernel} -initrd {image.initrd} -append '{words}'"
            net = network(port, f"192.0.2.{number}", f"2001:db8::{number}")
            stack.enter_context(host.running(f"{MACHINE} {console} {boot} {net} {NIC}"))
        consoles = [Console(folder / str(number)) for number in numbers]
        for number, console in zip(numbers, consoles, strict=True):
            stack.callback(console.close)
            console.run("ip route add default via 192.0.2.1")
            console.run("sysctl -w net.ipv6.conf.eth0.accept_dad=0")
            console.run(f"ip -6 address add 2001:db8::{number}/128 dev eth0")
            console.run("ip -6 route add default via fe80::1 dev eth0")
        yield consoles


def pings(address: str) -> bool:
    argv = ["ip", "netns", "exec", "wire", "ping", "-c", "3", "-W", "5", address]
    return "3 received" in subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def sources_seen(order: Callable[[], object]) -> set[str]:
    """The addresses from which echo requests reach the wire's end meanwhile."""
    wire = os.open("/run/netns/wire", os.O_RDONLY)
    raw = call_in(wire, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003)))
    os.close(wire)
    found = set()
    with raw:
        raw.setblocking(False)
        order()
        with contextlib.suppress(BlockingIOError):
            while True:
                seen = raw.recv(2048)
                if seen[0] >> 4 == 4 and seen[9] == 1 and seen[20] == 8:
                    found.add(socket.inet_ntop(socket.AF_INET, seen[12:16]))
                elif seen[0] >> 4 == 6 and seen[6] == 58 and seen[40] == 128:
                    found.add(socket.inet_ntop(socket.AF_INET6, seen[8:24]))
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("port", PORTS)
def test_the_wire_and_the_guests_see_the_guests_own_addresses(host, uplink, tmp_path, port: Port) -> None:
    before = uplink()
    with guests(host, tmp_path, port, 7, 8) as (first, second):
        for number in (7, 8):
            assert pings(f"192.0.2.{number}")
            assert pings(f"2001:db8::{number}")
        assert sources_seen(lambda: first.order("ping 192.0.2.9")) == {"192.0.2.7"}
        assert sources_seen(lambda: second.order("ping 2001:db8::9")) == {"2001:db8::8"}
        # Neighbours by their addresses, but not on one wire.
        assert first.order("ping 192.0.2.8") == "ping=3/3"
        assert first.order("ping 2001:db8::8") == "ping=3/3"
        # An address that isn't the guest's own comes no further than its link.
        first.run("ip address add 192.0.2.77/32 dev eth0")
        assert sources_seen(lambda: first.order("run ping -c 2 -I 192.0.2.77 192.0.2.9")) == set()
    # They were killed, with their wrappers.
    eventually(lambda: put_back() or not host.claims())
    assert_as(before)


@pytest.mark.parametrize("port", PORTS)
def test_qemu_takes_a_routed_network_and_leaves_nothing(host, uplink, port: Port) -> None:
    before = uplink()
    for _ in range(2):
        result = host.qemu(
            f"{QEMU} -monitor stdio {network(port)},queues=2 {NIC}", input="info network\nquit\n"
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert len([line for line in result.stdout.splitlines() if "type=tap" in line]) == 2
        assert_as(before)
