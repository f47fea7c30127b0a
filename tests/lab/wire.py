"""A cable from the lab VM to a machine of its own: a veth whose other end is in a network namespace.

Its own helpers only, as it has to judge what vnet-lock makes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.lab.nic import run

T = TypeVar("T")

NETDEV, PEER, ADDRESS = "up0", "peer0", "10.9.0.1"
_EVERYBODY = "10.9.0.255"
_NAMESPACE = "peer"
_CLONE_NEWNET = 0x40000000
# A transfer at the pace of an emulated CPU.
_WAIT_S = 400


class Wire:
    """``up0`` for guests, and behind it a peer at 10.9.0.1."""

    def __init__(self) -> None:
        run("ip", "netns", "add", _NAMESPACE)
        run("ip", "link", "add", NETDEV, "type", "veth", "peer", "name", PEER, "netns", _NAMESPACE)
        run("ip", "link", "set", NETDEV, "up")
        self.ip("address", "add", f"{ADDRESS}/24", "broadcast", _EVERYBODY, "dev", PEER)
        self.ip("link", "set", PEER, "up")

    @property
    def mac(self) -> str:
        """The peer's MAC."""
        told = run("ip", "-n", _NAMESPACE, "-j", "link", "show", "dev", PEER).stdout
        return str(json.loads(told)[0]["address"])

    def close(self) -> None:
        """Take it away."""
        run("ip", "link", "delete", NETDEV)
        run("ip", "netns", "delete", _NAMESPACE)

    def ip(self, *words: str) -> None:
        """iproute2 at the peer."""
        run("ip", "-n", _NAMESPACE, *words)

    def inside(self, function: Callable[[], T]) -> T:
        """What a function returns that is called at the peer; sockets that it makes stay there."""
        results: list[T] = []

        def enter() -> None:
            with Path(f"/run/netns/{_NAMESPACE}").open() as namespace:
                assert ctypes.CDLL(None).setns(namespace.fileno(), _CLONE_NEWNET) == 0
            results.append(function())

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return results[0]

    @contextmanager
    def chatter(self) -> Iterator[None]:
        """Meanwhile the peer talks to everybody, so that packets wait for whoever begins to listen."""
        over = threading.Event()
        talker = self.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        talker.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)

        def talk() -> None:
            while not over.wait(0.02):
                talker.sendto(b"hear", (_EVERYBODY, 9))

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            talker.close()

    def receive(self) -> Transfer:
        """Take what a guest sends to port 5000."""
        return Transfer(self.inside(lambda: _listen(5000)), None)

    def send(self, data: bytes) -> Transfer:
        """Give these bytes to whoever connects to port 5001, and wait until he closes."""
        return Transfer(self.inside(lambda: _listen(5001)), data)


class Transfer:
    """One TCP connection at the peer; ``data`` goes to the guest, None: comes from it."""

    def __init__(self, listener: socket.socket, data: bytes | None) -> None:
        self._listener = listener
        self._data = data
        self._digest = hashlib.md5(data or b"", usedforsecurity=False)
        self.size = len(data or b"")
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    @property
    def sum(self) -> str:
        """The MD5 sum of what goes over it, in hexadecimal; what comes from the guest is waited for."""
        if self._data is None:
            self.wait()
        return self._digest.hexdigest()

    def wait(self) -> None:
        """Until it is over."""
        self._thread.join(_WAIT_S)
        assert not self._thread.is_alive(), "the transfer hangs"

    def _carry(self) -> None:
        with self._listener:
            end, _ = self._listener.accept()
        began = time.monotonic()
        with end:
            if self._data is not None:
                end.sendall(self._data)
                end.shutdown(socket.SHUT_WR)
            while chunk := end.recv(1 << 16):
                self._digest.update(chunk)
                self.size += len(chunk)
        self.seconds = time.monotonic() - began


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((ADDRESS, port))
    listener.listen()
    listener.settimeout(_WAIT_S)
    return listener
