"""The network around a test's guests: wires, each with a switch of its own at the far end.

The far ends are in a namespace of their own, "outside". A switch reflects (hairpin) only when it is told to,
which is what vepa depends on.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from tests.lab.nic import wait_until

T = TypeVar("T")

OUTSIDE = "outside"
PORT = 7000
_CLONE_NEWNET = 0x40000000


def run(*argv: str) -> str:
    """A command that has to succeed; its output."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}"
    return done.stdout


def ip(words: str, netns: str = "") -> str:
    """iproute2, here or in a named namespace."""
    return run("ip", *(["-n", netns] if netns else []), *words.split())


@dataclass(slots=True)
class Outside:
    """The namespace at the far ends, with a server that tells each caller the address that it sees."""

    seen: list[tuple[str, str]] = field(default_factory=list)
    _server: socket.socket | None = None

    def open(self) -> None:
        ip(f"netns add {OUTSIDE}")
        ip("link set lo up", OUTSIDE)
        # As a host that is nobody's router, and answers only for what it has on the wire that it is asked on.
        run("ip", "netns", "exec", OUTSIDE, "sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1")
        self._server = self.inside(lambda: socket.create_server(("0.0.0.0", PORT), backlog=64))
        threading.Thread(target=self._serve, args=(self._server,), daemon=True).start()

    def close(self) -> None:
        if self._server:
            # shutdown(2) wakes the accept(2) that close(2) leaves waiting.
            with suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()
        ip(f"netns delete {OUTSIDE}")

    def inside(self, act: Callable[[], T]) -> T:
        """What ``act`` returns in that namespace; sockets that it opens stay there."""
        result: list[T] = []
        libc = ctypes.CDLL(None, use_errno=True)

        def enter() -> None:
            with open(f"/run/netns/{OUTSIDE}", "rb") as namespace:
                assert libc.setns(namespace.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            result.append(act())

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return result[0]

    def ping(self, address: str, count: int = 3) -> int:
        """How many answers come."""
        argv = ["ip", "netns", "exec", OUTSIDE, "ping", "-n", "-c", str(count), "-W", "2", address]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        return next((int(line.split()[3]) for line in done.stdout.splitlines() if " received" in line), 0)

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                caller, (address, _) = server.accept()
            except OSError:
                return
            with caller:
                self.seen.append((caller.getsockname()[0], address))
                caller.sendall(f"{address}\n".encode())


@dataclass(frozen=True, slots=True)
class Wire:
    """A cable from this host, ``upN``, to a switch outside, which has an address itself: the peer.

    Its network is 10.9.N.0/24: the peer is .1, guests .2 and .3, the host .9 where it has an address at all.
    """

    # What its switch can be told.
    REFLECTIONS: ClassVar = (False, True)

    number: int

    @property
    def dev(self) -> str:
        """This host's end."""
        return f"up{self.number}"

    @property
    def peer(self) -> str:
        """The address outside."""
        return self.address(1)

    def address(self, host: int) -> str:
        """An address of this wire's network."""
        return f"10.9.{self.number}.{host}"

    def open(self) -> None:
        """Lay it. Nothing on it has an address of its own making."""
        far, switch = f"far{self.number}", f"sw{self.number}"
        ip(f"link add {self.dev} type veth peer name {far}")
        ip(f"link set {far} netns {OUTSIDE}")
        ip(f"link add {switch} type bridge forward_delay 0", OUTSIDE)
        ip(f"link set {far} master {switch}", OUTSIDE)
        for name in (far, switch):
            ip(f"link set {name} addrgenmode none", OUTSIDE)
            ip(f"link set {name} up", OUTSIDE)
        ip(f"address add {self.peer}/24 dev {switch}", OUTSIDE)
        ip(f"link set {self.dev} addrgenmode none")
        ip(f"link set {self.dev} up")
        # The kernel takes its time to see the carrier (linkwatch), and nothing is to change by itself later.
        wait_until(
            lambda: "NO-CARRIER" not in ip(f"link show dev {self.dev} up"), f"{self.dev} has a carrier"
        )

    def close(self) -> None:
        ip(f"link delete {self.dev}")
        ip(f"link delete sw{self.number}", OUTSIDE)

    def reflect(self, on: bool) -> None:
        """Have the switch send frames back out of the port that they came in by, or not."""
        hairpin = "on" if on else "off"
        ip(f"link set far{self.number} type bridge_slave hairpin {hairpin}", OUTSIDE)

    def add_host_address(self) -> str:
        """Give this host an address on the wire."""
        ip(f"address add {self.address(9)}/24 dev {self.dev}")
        return self.address(9)
