"""vnet-lock hooks serve, and who calls it: with real processes, for a host of files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

import pytest

import vnet_lock
from tests.fake_host import FakeHost
from tests.kernel.host import children_of, eventually, has_open, is_running
from vnet_lock.front import hook_call
from vnet_lock.front.doctor import Check, Health, examine
from vnet_lock.settings import DEFAULT

PACKAGE = Path(vnet_lock.__file__).parent
XML = (Path(__file__).parents[2] / "xml/hostdev-device.xml").read_bytes()
VFS = ("0000:01:10.0", "0000:01:10.2")
SERVER = """
import sys
from vnet_lock.front.command import serve
from vnet_lock.front.hook_server import follow
from vnet_lock.settings import Settings
sys.exit(serve("vnet-lock", lambda: follow(Settings.under(sys.argv[1]))))
"""
# As the shim does, and says before the answer whether it is another process's.
CALL = """
import sys
sys.path += sys.argv[1].split(":")
from vnet_lock.front.hook_call import end, find_answer
answer = find_answer(sys.argv[2], sys.argv[3:])
with open(sys.argv[3] + "/served", "a") as file:
    print("vnet_lock.front.hook" not in sys.modules, file=file)
end(answer())
"""


def xml_of(guest: str) -> bytes:
    """Another guest's is the same but for its UUID."""
    return re.sub(rb"<uuid>.*</uuid>", f"<uuid>{uuid5(NAMESPACE_OID, guest)}</uuid>".encode(), XML)


class Served:
    """A host with two free VFs, and calls of its hook."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = PACKAGE
        host = FakeHost(root)
        host.pf("0000:01:00.0", vfs=VFS, driver="vfio-pci")
        for group, vf in enumerate(VFS):
            host.vf(vf, "0000:01:00.0", driver=None, group=group)
        shutil.rmtree(root / "proc")
        (root / "proc").symlink_to("/proc")
        self.run = Path(host.settings.run)
        self.settings = host.settings

    @property
    def python(self) -> list[str]:
        return [sys.executable, "-I", "-S", "-c"]

    @property
    def path(self) -> str:
        """Where our package is, and those that it takes."""
        import filelock
        import pyroute2

        places = (Path(one.__file__ or "").parents[1] for one in (filelock, pyroute2))
        return ":".join((str(self.package.parent), *map(str, places)))

    def start_server(self) -> subprocess.Popen[str]:
        load = f"import sys; sys.path += {self.path!r}.split(':')\n"
        return subprocess.Popen(
            [*self.python, load + SERVER, str(self.root)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    @contextlib.contextmanager
    def serving(self) -> Iterator[subprocess.Popen[str]]:
        with self.start_server() as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == "ready for libvirt's calls\n"
                eventually(lambda: len(children_of(server.pid)) == 3)
                yield server
            finally:
                server.send_signal(signal.SIGCONT)
                server.kill()

    def call(
        self, operation: str = "prepare", guest: str = "web2", driver: str = "qemu"
    ) -> subprocess.Popen[bytes]:
        argv = [*self.python, CALL, self.path, driver, str(self.root), str(os.getpid()), guest, operation]
        process = subprocess.Popen(
            [*argv, "begin", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(xml_of(guest))
        process.stdin.close()
        process.stdin = None
        return process

    def ended(self, operation: str = "prepare", guest: str = "web2") -> tuple[int, str, str]:
        """The status and the streams of one call."""
        with self.call(operation, guest) as process:
            out, err = process.communicate(timeout=20)
        return process.returncode, out.decode(), err.decode()

    @property
    def was_served(self) -> list[bool]:
        return [line == "True" for line in (self.root / "served").read_text().split()]

    def claimed(self) -> list[str]:
        return sorted(path.name.partition("~")[0] for path in (self.run / "claims").iterdir())

    def copy_package(self) -> None:
        """Have a package of our own, to be changed."""
        self.package = Path(shutil.copytree(PACKAGE, self.root / "other/vnet_lock"))

    @staticmethod
    def let_changes_settle() -> None:
        """A file's time and a process's start are those of a tick: what came before is to be so by both."""
        time.sleep(0.1)

    @contextlib.contextmanager
    def guard_held(self) -> Iterator[None]:
        """Whatever claims waits."""
        with open(self.run / "guard", "w") as file:
            os.chmod(file.fileno(), 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@pytest.fixture
def host(tmp_path: Path) -> Served:
    return Served(tmp_path)


def answering(server: subprocess.Popen[str], host: Served) -> list[int]:
    """Those that wait for the guard, which another holds."""
    return [pid for pid in children_of(server.pid) if has_open(pid, host.run / "guard")]


def test_the_socket_is_where_our_other_files_are():
    assert DEFAULT.hooks_socket_path == f"/run/vnet-lock/{hook_call.SOCKET}"


def test_a_call_is_answered_by_one_that_is_ready(host):
    with host.serving() as server:
        assert host.ended() == (0, "", "")
        assert host.claimed() == [f"vf:{vf}" for vf in VFS]
        assert host.ended("release") == (0, "", "")
        assert host.claimed() == []
        server.terminate()
        out, err = server.communicate(timeout=20)
    assert (server.returncode, out, err) == (0, "", "")
    assert host.was_served == [True, True]
    assert not os.path.lexists(host.settings.hooks_socket_path)


def test_a_refusal_is_told_as_ever(host):
    alone = host.ended(guest="first"), host.ended(guest="second")
    assert host.ended("release", guest="first")[0] == 0
    with host.serving():
        served = host.ended(guest="first"), host.ended(guest="second")
    assert alone == served
    assert served[1][0] == 1
    assert 'guest "first"' in served[1][2]
    assert host.was_served == [False, False, False, True, True]


def test_what_it_has_loaded_is_all_that_a_call_loads(host):
    """The sharp libraries too: that is what it is for."""
    code = f"""
import io, os, sys
sys.path += {host.path!r}.split(":")
from vnet_lock.front import hook, hook_server, network_hook
hook_server.load()
root = {str(host.root)!r}
before = set(sys.modules)
for operation in ("migrate", "prepare", "start", "reconnect", "stopped", "release"):
    assert hook.main([root, {os.getpid()}, "g", operation, "begin", "-"], io.BytesIO({XML!r})) == 0
assert hook.main([root, {os.getpid()}, "g", "prepare", "begin", "-"], io.BytesIO(b"<")) == 1
print(sorted(set(sys.modules) - before), file=open(root + "/loaded", "w"))
"""
    subprocess.run([*host.python, code], check=True, timeout=60)
    assert (host.root / "loaded").read_text() == "[]\n"


def test_many_calls_at_once_are_all_answered(host):
    with host.serving():
        calls = [host.call("stopped", f"g{number}") for number in range(20)]
        statuses = []
        for call in calls:
            with call:
                call.communicate(timeout=30)
            statuses.append(call.returncode)
    assert statuses == [0] * 20
    assert any(host.was_served)


# --- who answers ----------------------------------------------------------------------------------


def test_without_one_the_hook_answers_itself(host):
    assert host.ended() == (0, "", "")
    assert len(host.claimed()) == 2
    # What one that was killed leaves.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(host.settings.hooks_socket_path)
    assert host.ended("release") == (0, "", "")
    assert host.claimed() == []
    assert host.was_served == [False, False]


def test_one_that_sleeps_is_not_waited_for(host):
    with host.serving() as server:
        sleeping = [server.pid, *children_of(server.pid)]
        for pid in sleeping:
            os.kill(pid, signal.SIGSTOP)
        assert host.ended() == (0, "", "")
        assert host.was_served == [False]
        for pid in sleeping:
            os.kill(pid, signal.SIGCONT)
        # It has found by now that the caller is gone.
        eventually(lambda: host.ended("reconnect")[0] == 0 and host.was_served[-1])
    assert len(host.claimed()) == 2


def test_one_of_another_installation_is_not_asked(host):
    with host.serving():
        host.copy_package()
        assert host.ended() == (0, "", "")
    assert host.was_served == [False]


def test_one_whose_package_was_changed_ends_and_is_not_asked(host):
    host.copy_package()
    host.let_changes_settle()
    with host.serving() as server:
        (host.package / "rules.py").touch()
        assert host.ended() == (0, "", "")
        out, err = server.communicate(timeout=20)
    assert (server.returncode, err) == (0, "")
    assert out == "vnet-lock was changed, so this one ends; its unit starts it anew\n"
    assert host.was_served == [False]


def test_one_that_was_changed_while_it_loaded_ends(host):
    host.copy_package()
    with (host.package / "rules.py").open("a") as file:
        file.write("\nimport os\nos.utime(__file__.replace('rules', 'use'))\n")
    host.let_changes_settle()
    with host.start_server() as server:
        out, err = server.communicate(timeout=20)
    assert (server.returncode, err) == (0, "")
    assert out == "vnet-lock was changed, so this one ends; its unit starts it anew\n"


@pytest.mark.as_root
def test_one_that_is_not_roots_is_not_asked(host):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(host.settings.hooks_socket_path)
        impostor = os.fork()
        if impostor == 0:
            os.setuid(65534)
            listener.listen()
            while True:
                peer, _ = listener.accept()
                with contextlib.suppress(OSError):
                    peer.send(hook_call.PACKAGE)
                    peer.send(b"\0")
        try:
            eventually(lambda: Path("/proc/net/unix").read_text().count(host.settings.hooks_socket_path))
            eventually(lambda: "\t65534\t" in Path(f"/proc/{impostor}/status").read_text())
            assert host.ended() == (0, "", "")
        finally:
            os.kill(impostor, signal.SIGKILL)
            os.waitpid(impostor, 0)
    assert len(host.claimed()) == 2
    assert host.was_served == [False]


def test_a_call_that_is_too_long_for_it_is_answered_by_the_hook(host):
    with host.serving():
        assert host.ended("stopped", guest="g" * 70_000)[0] == 0
    assert host.was_served == [False]


def test_a_hook_that_can_make_no_socket_answers_itself(host):
    code = "import _socket\n_socket.socket = lambda *_: open('/nonexistent')\n" + CALL
    argv = [*host.python, code, host.path, "qemu", str(host.root), str(os.getpid()), "web2"]
    done = subprocess.run([*argv, "prepare", "begin", "-"], input=XML, timeout=20, check=False)
    assert done.returncode == 0
    assert len(host.claimed()) == 2
    assert host.was_served == [False]


def test_it_takes_no_call_whose_streams_it_has_not(host):
    with host.serving(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ours:
        ours.settimeout(20)
        ours.connect(host.settings.hooks_socket_path)
        assert ours.recv(1000) == hook_call.PACKAGE
        socket.send_fds(ours, [hook_call.STREAMS_PASSED], [0, 1])
        assert ours.recv(100) == b""
        assert host.ended() == (0, "", "")
    assert host.was_served == [True]


def test_a_hook_that_leaves_at_once_has_its_status_told(host):
    host.copy_package()
    with (host.package / "front/hook.py").open("a") as file:
        file.write("\ndef main(argv, stdin, leave):\n    leave(7)\n")
    host.let_changes_settle()
    with host.serving():
        assert host.ended() == (7, "", "")
    assert host.was_served == [True]


@pytest.mark.as_root
@pytest.mark.parametrize("kind", ["net", "mount", "user"])
def test_one_that_sees_another_host_is_not_asked(host, kind):
    with host.serving():
        words = [
            "unshare",
            f"--{kind}",
            *host.python,
            CALL,
            host.path,
            "qemu",
            str(host.root),
            str(os.getpid()),
        ]
        done = subprocess.run([*words, "web2", "stopped", "begin", "-"], input=XML, timeout=20, check=False)
    assert done.returncode == 0
    assert host.was_served == [False]


@pytest.mark.as_root
def test_nobody_else_can_ask_it(host):
    with host.serving():
        assert os.stat(host.settings.hooks_socket_path).st_mode & 0o777 == 0o600
        os.chmod(host.settings.hooks_socket_path, 0o777)  # were it open to all
        told, tell = os.pipe()
        if os.fork() == 0:
            os.chdir(host.run)  # the way there is root's, too
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ours:
                ours.connect("hooks.sock")
                os.write(tell, b"hears " + ours.recv(100))
            os._exit(0)
        os.close(tell)
        assert os.read(told, 100) == b"hears "
        os.close(told)
        os.wait()


def test_the_doctor_tells_whether_it_is_asked(host):
    os.makedirs(host.settings.etc_libvirt)
    ready = Check(Health.OK, "hooks", "vnet-lock hooks serve is ready for libvirt's calls")
    with host.serving() as server:
        assert ready in examine(host.settings)
        eventually(lambda: len(children_of(server.pid)) == 2)  # the one that was asked has ended
        sleeping = (server.pid, *children_of(server.pid))
        for pid in sleeping:
            os.kill(pid, signal.SIGSTOP)
        asleep = "vnet-lock hooks serve is not ready; end it, and begin it again"
        assert Check(Health.WARNING, "hooks", asleep) in examine(host.settings)
        for pid in sleeping:
            os.kill(pid, signal.SIGCONT)
    # Those that were ready see a bit later that it was killed.
    eventually(lambda: not any("serve" in check.message for check in examine(host.settings)))
    host.copy_package()
    host.let_changes_settle()
    with host.serving():
        message = (
            f"vnet-lock hooks serve is of {host.package}, and not asked by hooks of {PACKAGE};"
            " end it, and begin ours"
        )
        assert Check(Health.WARNING, "hooks", message) in examine(host.settings)


# --- it, and what it does, killed -----------------------------------------------------------------


def test_a_call_whose_answer_is_lost_has_failed(host):
    with host.serving() as server, host.guard_held(), host.call() as call:
        (pid,) = eventually(lambda: answering(server, host))
        os.kill(pid, signal.SIGKILL)
        assert call.wait(20) == hook_call.LOST
        assert host.was_served == [True]
        assert server.poll() is None


def test_a_call_goes_on_when_the_server_is_told_to_end(host):
    with host.serving() as server, host.call() as call:
        with host.guard_held():
            (busy,) = eventually(lambda: answering(server, host))
            idle = [pid for pid in children_of(server.pid) if pid != busy]
            server.terminate()
            assert server.wait(20) == 0
            eventually(lambda: not any(map(is_running, idle)))
            assert call.poll() is None
        out, err = call.communicate(timeout=20)
    assert (call.returncode, out, err) == (0, b"", b"")
    assert len(host.claimed()) == 2


def test_those_that_wait_end_with_a_server_that_is_killed(host):
    with host.serving() as server:
        waiting = children_of(server.pid)
        server.kill()
        server.wait(20)
        eventually(lambda: not any(map(is_running, waiting)))
    assert host.ended() == (0, "", "")
    # The next one takes its place.
    with host.serving():
        assert host.ended("release") == (0, "", "")
    assert host.was_served == [False, True]


def test_a_server_says_that_one_of_those_that_wait_was_killed(host):
    with host.serving() as server:
        os.kill(children_of(server.pid)[0], signal.SIGKILL)
        out, err = server.communicate(timeout=20)
    assert (server.returncode, out) == (1, "")
    what = "a process that was ready for libvirt's calls was killed; begin again: vnet-lock hooks serve"
    assert err == f"vnet-lock: {what}\n"


def test_there_is_one_for_a_host(host):
    with host.serving() as first, host.start_server() as second:
        out, err = second.communicate(timeout=20)
        assert (second.returncode, out) == (4, "")
        assert f"(pid {first.pid})" in err
        assert host.ended() == (0, "", "")
    assert host.was_served == [True]


def test_a_link_in_the_place_of_its_socket_is_not_followed(host, tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    os.symlink(other, host.settings.hooks_socket_path)
    with host.serving():
        assert host.ended() == (0, "", "")
    assert host.was_served == [True]
    assert other.read_text() == "mine"
