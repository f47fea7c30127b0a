"""Each test of this ring runs in network and mount namespaces of its own.

The process that runs the tests enters them and comes back (setns), so that everything a test starts is in
them, too. /sys there shows the new network namespace, and /run is empty: nothing a test does is seen by the
host, and what a test leaves behind goes with its namespaces.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.kernel.host import Host

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_LIBC = ctypes.CDLL(None, use_errno=True)


def need(met: object, what: str) -> None:
    """Skip a test that needs a capability which isn't there; fail where this ring is required."""
    if met:
        return
    if "kernel" in re.split(r"[ ,]+", os.environ.get("VNET_LOCK_REQUIRE", "")):
        pytest.fail(f"needs {what}, and VNET_LOCK_REQUIRE says that it must be there")
    pytest.skip(f"needs {what} (VNET_LOCK_REQUIRE=kernel fails instead)")


@contextmanager
def own_namespaces() -> Iterator[None]:
    """This process in new network and mount namespaces, and back in its old ones afterwards."""
    kept = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "mnt")]
    folder = os.open(".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("unshare", _CLONE_NEWNS | _CLONE_NEWNET)
        try:
            _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
            _call("mount", b"sysfs", b"/sys", b"sysfs", 0, None)
            _call("mount", b"tmpfs", b"/run", b"tmpfs", 0, b"mode=0755")
            yield
        finally:
            for descriptor in kept:
                _enter(descriptor)
            # Entering a mount namespace puts one into its root (setns(2)).
            os.fchdir(folder)
    finally:
        for descriptor in (*kept, folder):
            os.close(descriptor)


@pytest.fixture
def netns() -> Iterator[None]:
    """Network and mount namespaces of its own for a test: only a loopback device, /run empty."""
    need(os.geteuid() == 0, "root")
    with own_namespaces():
        yield


@pytest.fixture
def ip(netns: None) -> Callable[[str], str]:
    """``ip("link add v0 type veth")``: iproute2 in the test's namespaces; its output."""
    del netns

    def run(words: str) -> str:
        return subprocess.run(
            ["ip", *words.split()], check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True
        ).stdout

    return run


@pytest.fixture
def veth(ip: Callable[[str], str]) -> tuple[str, str]:
    """A pair of devices that are up and joined: ``v0`` for the test, ``v1`` as the wire's other end."""
    ip("link add v0 type veth peer name v1")
    ip("link set v0 up")
    ip("link set v1 up")
    return "v0", "v1"


@pytest.fixture
def macvtap_works(veth: tuple[str, str], ip: Callable[[str], str]) -> None:
    """Skips where the kernel has no macvtap."""
    tried = subprocess.run(
        ["ip", "link", "add", "link", veth[0], "name", "probe0", "type", "macvtap"],
        check=False,
        capture_output=True,
    )
    need(tried.returncode == 0, "macvtap")
    ip("link del probe0")


@pytest.fixture
def host(ip: Callable[[str], str], macvtap_works: None) -> Host:
    """A host for whole commands: a veth pair up0-peer0 and a bridge br0, all up."""
    del macvtap_works
    need(shutil.which("qemu-system-x86_64"), "qemu-system-x86_64")
    ip("link add up0 type veth peer name peer0")
    ip("link add br0 type bridge")
    for link in ("up0", "peer0", "br0"):
        ip(f"link set {link} up")
    return Host()


def _enter(namespace: int) -> None:
    """setns(2) into a mount namespace says EINVAL while a thread that was joined is still on its way out."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return _call("setns", namespace, 0)
        except OSError as error:
            if error.errno != errno.EINVAL or time.monotonic() > deadline:
                raise
            time.sleep(0.001)


def _call(name: str, *arguments: object) -> None:
    if getattr(_LIBC, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
