import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_host import FakeHost, Link, build, rdev_text, stat_line
from tests.kernel.host import eventually
from vnet_lock.errors import VnetLockError
from vnet_lock.kernel import processes
from vnet_lock.model import Owner, OwnerKind, Process, UseKind
from vnet_lock.settings import DEFAULT


@pytest.mark.parametrize("command", ["qemu", "a b", "a) S 1 2 (b", "((", ") Z 1"])
def test_a_command_with_blanks_and_parentheses_does_not_shift_the_fields(tmp_path: Path, command: str):
    host = FakeHost(tmp_path)
    build(tmp_path, {"proc/900001/stat": stat_line(900001, command, start_ticks=77)})
    assert processes.read_process(host.settings, 900001) == Process(900001, 77)


@pytest.mark.parametrize("state", ["Z", "X", "x"])
def test_a_zombie_counts_as_gone(tmp_path: Path, state: str):
    host = FakeHost(tmp_path)
    build(tmp_path, {"proc/900001/stat": stat_line(900001, "q", state, start_ticks=77)})
    assert processes.read_process(host.settings, 900001) is None
    assert not processes.is_alive(host.settings, Process(900001, 77))


def test_a_process_lives_on_without_its_first_thread_and_holds_what_it_has_open():
    code = (
        "import ctypes, threading, time\nfile = open('/dev/full')\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "print(flush=True)\nctypes.CDLL(None).pthread_exit(None)"
    )
    rdev = os.stat("/dev/full").st_rdev
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            eventually(lambda: state_of(process.pid) == "Z")
            found = processes.read_process(DEFAULT, process.pid)
            assert found is not None
            assert processes.is_alive(DEFAULT, found)
            assert process.pid in {user.pid for user in processes.read_holders(DEFAULT, [rdev])[rdev]}
        finally:
            process.kill()
    assert not processes.is_alive(DEFAULT, found)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_another_process_with_the_pid_is_no_sign_of_life(tmp_path: Path):
    host = FakeHost(tmp_path)
    build(tmp_path, {"proc/900001/stat": stat_line(900001, "q", start_ticks=78)})
    assert not processes.is_alive(host.settings, Process(900001, 77))
    assert processes.is_alive(host.settings, Process(900001, 78))
    assert not processes.is_alive(host.settings, Process(900002, 78))


@pytest.mark.parametrize("text", ["", "900001 (q", "900001 (q) S 1 2 3", "900001 (q) S one " + "x " * 30])
def test_a_stat_file_that_makes_no_sense_counts_as_alive(tmp_path: Path, text: str):
    host = FakeHost(tmp_path)
    build(tmp_path, {"proc/900001/stat": text})
    with pytest.raises(VnetLockError, match="makes no sense"):
        processes.read_process(host.settings, 900001)
    assert processes.is_alive(host.settings, Process(900001, 77))


def test_what_cannot_be_read_counts_as_alive(tmp_path: Path):
    host = FakeHost(tmp_path)
    build(tmp_path, {"proc/900001/stat/": ""})  # EISDIR, even for root
    assert processes.is_alive(host.settings, Process(900001, 77))


def test_a_real_child_lives_until_it_is_dead_and_before_it_is_reaped():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = processes.read_process(DEFAULT, child.pid)
        assert process is not None
        assert processes.is_alive(DEFAULT, process)
        assert os.getpid() in processes.read_ancestors(DEFAULT, child.pid)
        child.kill()
        # WNOWAIT leaves the zombie there.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not processes.is_alive(DEFAULT, process)
    assert not processes.is_alive(DEFAULT, process)
    assert processes.read_command(DEFAULT, process.pid) == ""


def test_this_process_is_alive():
    me = processes.this_process(DEFAULT)
    assert me.pid == os.getpid()
    assert processes.is_alive(DEFAULT, me)


def test_an_owner_of_another_boot_is_dead():
    me = processes.this_process(DEFAULT)
    assert not processes.is_owner_alive(DEFAULT, Owner(OwnerKind.PROCESS, "me", "another boot", process=me))
    boot = processes.read_boot_id(DEFAULT)
    assert processes.is_owner_alive(DEFAULT, Owner(OwnerKind.PROCESS, "me", boot, process=me))


LOCKER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
print(flush=True)
input()
"""


@pytest.mark.parametrize("kind", [OwnerKind.LIBVIRT, OwnerKind.QEMU])
def test_a_libvirt_guest_lives_while_its_pid_file_is_locked_or_who_starts_it_is_there(
    tmp_path: Path, kind: OwnerKind
):
    path = str(tmp_path / "web1.pid")
    boot = processes.read_boot_id(DEFAULT)
    dead = Process(os.getpid(), 1)
    owner = Owner(kind, "web1", boot, uuid="u", process=dead, pid_file=path)
    assert processes.read_lock_holder(path) is None
    assert not processes.is_owner_alive(DEFAULT, owner)
    command = [sys.executable, "-c", LOCKER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert processes.read_lock_holder(path) == child.pid
        assert processes.is_owner_alive(DEFAULT, owner)
        child.kill()
    assert processes.read_lock_holder(path) is None
    assert not processes.is_owner_alive(DEFAULT, owner)
    alive = Owner(kind, "web1", boot, uuid="u", process=processes.this_process(DEFAULT), pid_file=path)
    assert processes.is_owner_alive(DEFAULT, alive)


@pytest.mark.parametrize(
    ("window", "marked", "files", "lives"),
    [
        ("prepare has claimed, and there is no QEMU yet", False, (), True),
        ("QEMU's pid file is there, and not locked yet", False, ("web1.pid",), True),
        ("QEMU was killed, and libvirt has not noticed", False, ("web1.pid", "web1.xml"), True),
        ("stopped was called, and libvirt gives its devices back", True, ("web1.pid", "web1.xml"), True),
        ("libvirt removes the status file first", True, ("web1.pid",), False),
        ("libvirt has given all back, and release was killed", True, (), False),
        ("stopped was killed, too", False, (), True),
        ("another libvirt guest has its name", True, ("web1.xml",), True),
        ("it is started anew, which claims anew", False, ("web1.pid",), True),
        ("what libvirt has can't be seen from here", True, None, True),
    ],
)
def test_a_libvirt_guest_is_dead_only_once_libvirt_has_given_back_what_it_had(
    tmp_path: Path, window: str, marked: bool, files: tuple[str, ...] | None, lives: bool
):
    """libvirt's daemon is alive all the time; ``marked``: `stopped` found the guest's status file."""
    if files is not None:
        build(tmp_path, {"qemu/": "", **{f"qemu/{name}": "" for name in files}})
    owner = Owner(
        OwnerKind.LIBVIRT,
        "web1",
        processes.read_boot_id(DEFAULT),
        uuid="u",
        process=None if marked else processes.this_process(DEFAULT),
        pid_file=str(tmp_path / "qemu/web1.pid"),
    )
    assert processes.is_owner_alive(DEFAULT, owner) is lives, window


@pytest.mark.parametrize(
    ("window", "files", "lives"),
    [
        ("no QEMU yet: the next daemon knows nothing of it", ("web1.pid",), False),
        ("QEMU has died, and the next daemon gives back what it had", ("web1.pid", "web1.xml"), True),
        ("the next daemon has", (), False),
        ("what libvirt has can't be seen from here", None, False),
    ],
)
def test_a_libvirt_guest_outlives_its_daemon_until_the_next_one_has_given_back_what_it_had(
    tmp_path: Path, window: str, files: tuple[str, ...] | None, lives: bool
):
    if files is not None:
        build(tmp_path, {"qemu/": "", **{f"qemu/{name}": "" for name in files}})
    daemon = processes.Process(processes.this_process(DEFAULT).pid, 1)  # its pid is another's by now
    owner = Owner(
        OwnerKind.LIBVIRT,
        "web1",
        processes.read_boot_id(DEFAULT),
        uuid="u",
        process=daemon,
        pid_file=str(tmp_path / "qemu/web1.pid"),
    )
    assert processes.is_owner_alive(DEFAULT, owner) is lives, window


def test_a_marked_guest_lives_while_its_pid_file_is_locked(tmp_path: Path):
    """libvirt could not kill it: its QEMU hangs in the kernel, or another libvirt guest has its name."""
    path = str(tmp_path / "web1.pid")
    owner = Owner(OwnerKind.LIBVIRT, "web1", processes.read_boot_id(DEFAULT), uuid="u", pid_file=path)
    command = [sys.executable, "-c", LOCKER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert processes.is_owner_alive(DEFAULT, owner)
        child.kill()
    assert not processes.is_owner_alive(DEFAULT, owner)


@pytest.mark.parametrize("tree", [{"qemu": "no directory"}, {"qemu/": "", "qemu/web1.xml": Link("web1.xml")}])
def test_a_status_file_that_is_doubtful_counts_as_there(tmp_path: Path, tree: dict[str, str | Link]):
    build(tmp_path, tree)
    owner = Owner(
        OwnerKind.LIBVIRT,
        "web1",
        processes.read_boot_id(DEFAULT),
        uuid="u",
        pid_file=str(tmp_path / "qemu/web1.pid"),
    )
    assert processes.is_owner_alive(DEFAULT, owner)


def test_a_pid_file_that_cannot_be_opened_counts_as_locked(tmp_path: Path):
    (tmp_path / "web1.pid").symlink_to("web1.pid")  # ELOOP, even for root
    owner = Owner(
        OwnerKind.LIBVIRT,
        "web1",
        processes.read_boot_id(DEFAULT),
        uuid="u",
        process=Process(os.getpid(), 1),
        pid_file=str(tmp_path / "web1.pid"),
    )
    assert processes.is_owner_alive(DEFAULT, owner)


def test_a_lock_of_an_open_file_description_is_seen_without_a_pid(tmp_path: Path):
    path = tmp_path / "lock"
    with path.open("w") as file:
        fcntl.fcntl(file, getattr(fcntl, "F_OFD_SETLK", 37), processes._FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
        assert processes.read_lock_holder(str(path)) == -1


def test_holders_are_found_by_device_number_whatever_the_node_is_called(tmp_path: Path):
    host = FakeHost(tmp_path)
    host.process(900001, "qemu-system-x86", "/dev/zero", "/dev/null", "/dev/null", "socket:[5]")
    host.process(900002, "dpdk", "/dev/zero", "/nowhere")
    build(
        tmp_path, {"proc/900003/fd/": "", "proc/self/": "", "proc/900004": "vanished between list and look"}
    )
    null = os.stat("/dev/null").st_rdev
    found = processes.read_holders(host.settings, [null, 12345])
    assert [(user.pid, user.command, user.how, user.kind) for user in found[null]] == [
        (900001, "qemu-system-x86", "has /dev/null open", UseKind.VFIO)
    ]
    assert found.keys() == {null}
    assert rdev_text("/dev/null") == "1:3\n"


def test_nothing_asked_for_reads_nothing(tmp_path: Path):
    assert processes.find_holders(FakeHost(tmp_path / "nowhere").settings, (), ()) == ({}, {})


def test_a_real_socket_is_found_by_its_inode():
    with socket.socket() as end:
        inode = os.fstat(end.fileno()).st_ino
        _, sockets = processes.find_holders(DEFAULT, (), [inode])
    assert os.getpid() in [user.pid for user in sockets[inode]]
