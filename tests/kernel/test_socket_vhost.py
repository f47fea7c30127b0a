"""socket+vhost as far as a kernel without vhost-net goes: what is made, and that nothing of it stays."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vnet_lock.backends import socket_vhost
from vnet_lock.combination import Backend, Combination, Policy, Port
from vnet_lock.errors import BadInput, VnetLockError
from vnet_lock.front.supervisor import uid_of
from vnet_lock.journal import SocketFile
from vnet_lock.kernel import netns
from vnet_lock.kernel.processes import read_boot_id, this_process
from vnet_lock.model import Owner, OwnerKind
from vnet_lock.ports import Opened
from vnet_lock.request import Intent
from vnet_lock.session import Session
from vnet_lock.settings import DEFAULT, Settings

COMBINATION = Combination(Policy.VEB, Port.MACVLAN, Backend.SOCKET_VHOST)


@pytest.fixture
def settings(veth: tuple[str, str], tmp_path: Path) -> Settings:
    """A host whose vhost-net is none."""
    del veth
    (tmp_path / "vhost-net").touch()
    return replace(DEFAULT, dev=str(tmp_path))


@pytest.fixture
def namespace(settings: Settings) -> Iterator[int]:
    made = netns.make_namespace(settings)
    yield made
    os.close(made)


def test_a_back_end_that_cannot_serve_says_why_and_nothing_of_it_stays(
    settings: Settings, ip: Callable[[str], str]
) -> None:
    session = Session(settings)
    process = this_process(settings)
    owner = Owner(OwnerKind.QEMU, "web1", read_boot_id(settings), process=process)
    intent = Intent("net0", Policy.VEB, ("v0",), (Port.MACVLAN,), (Backend.SOCKET_VHOST,), queues=2)
    before = set(os.listdir("/proc/self/fd"))
    (grant,) = session.acquire(owner, [intent])
    with pytest.raises(VnetLockError, match=r"vhost_user\) can't: .*/vhost-net: Inappropriate ioctl"):
        session.connect(grant)
    (claim,) = session.table.read().of(owner)
    (entry,) = [entry for entry in claim.journal if isinstance(entry, SocketFile)]
    node = os.lstat(entry.path)
    assert stat.S_ISSOCK(node.st_mode)
    assert (stat.S_IMODE(node.st_mode), node.st_uid) == (0o600, 0)
    for _ in range(2):
        session.release(owner)
    assert not os.path.exists(entry.path)
    assert set(os.listdir("/proc/self/fd")) == before
    # The macvlan goes with its namespace, and that with the process that held it.
    deadline = time.monotonic() + 10
    while "macvlan" in ip("-d link show dev v0") or "upper" in str(os.listdir("/sys/class/net/v0")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_guest_never_gets_the_socket_of_the_hooks_and_its_end_takes_none_away(settings: Settings) -> None:
    session = Session(settings)
    owner = Owner(OwnerKind.QEMU, "web1", read_boot_id(settings), process=this_process(settings))
    path = settings.hooks_socket_path
    intent = Intent("net0", Policy.VEB, ("v0",), (Port.MACVLAN,), (Backend.SOCKET_VHOST,), socket=path)
    (grant,) = session.acquire(owner, [intent])
    with socket_vhost.listen(path):
        with pytest.raises(BadInput, match=r"hooks\.sock is no place for a socket of a guest"):
            session.connect(grant)
        session.release(owner)
        assert os.path.exists(path)


def test_the_socket_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with socket_vhost.listen(str(tmp_path / "s")):
            assert stat.S_IMODE(os.lstat(tmp_path / "s").st_mode) == 0o600
    finally:
        os.umask(before)


def test_another_may_not_listen_where_there_is_something(tmp_path: Path) -> None:
    with (
        socket_vhost.listen(str(tmp_path / "s")),
        pytest.raises(VnetLockError, match=r"cannot listen at .*: Address already in use"),
        socket_vhost.listen(str(tmp_path / "s")),
    ):
        pass


def test_without_its_device_nothing_is_begun(settings: Settings, namespace: int, tmp_path: Path) -> None:
    opened = Opened("gone0", "52:54:00:00:00:01", netns=namespace, path=str(tmp_path / "s"))
    with pytest.raises(VnetLockError, match="no network device gone0"):
        socket_vhost.connect(settings, Intent("net0", Policy.VEB), opened, COMBINATION)


def test_users_are_known_as_qemu_knows_them() -> None:
    assert uid_of("root") == 0
    assert uid_of("64055:106") == 64055
    with pytest.raises(VnetLockError, match='"nobody-of-that-name"'):
        uid_of("nobody-of-that-name")


def test_who_may_not_write_to_the_socket_cannot_connect(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    with socket_vhost.listen(path):
        assert _connects_as(65534, path) is False
        os.chown(path, 65534, -1)
        assert _connects_as(65534, path) is True


def _connects_as(uid: int, path: str) -> bool:
    """In a process of its own, as it can't become root again."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            socket.socket(socket.AF_UNIX).connect(path)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0
