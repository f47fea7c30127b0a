"""The guard: one at a time, gone with its process, never on a file that isn't ours."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from vnet_lock.errors import VnetLockError
from vnet_lock.locks import guard


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "guard")


def start_holder(path: str) -> int:
    """A process that holds the guard until it is killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with guard(path, 5, "a test"):
                os.write(writer, b"x")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_process_waits_and_is_told_who_holds_the_lock(path: str) -> None:
    holder = start_holder(path)
    try:
        before = time.monotonic()
        with pytest.raises(VnetLockError) as caught, guard(path, 0.2, "the claim table"):
            pass
        waited_s = time.monotonic() - before
    finally:
        end(holder)
    assert 0.2 <= waited_s < 2
    message = str(caught.value)
    assert message.startswith("the claim table: ")
    assert path in message
    assert f"held by pid {holder} " in message
    assert "\n" not in message


def test_a_timeout_without_a_list_of_locks_still_says_what_to_run(path: str, tmp_path: Path) -> None:
    holder = start_holder(path)
    try:
        with (
            pytest.raises(VnetLockError, match=r"held by another process.*lslocks"),
            guard(path, 0, "x", str(tmp_path / "no-proc")),
        ):
            pass
    finally:
        end(holder)


def test_the_lock_of_a_killed_process_is_free_at_once(path: str) -> None:
    end(start_holder(path))
    before = time.monotonic()
    with guard(path, 5, "a test"):
        assert time.monotonic() - before < 1


def test_a_lock_that_is_given_back_is_had_within_a_few_milliseconds(path: str) -> None:
    released = 0.0

    def hold() -> None:
        nonlocal released
        with guard(path, 5, "a test"):
            held.set()
            time.sleep(0.1)
            released = time.monotonic()

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    with guard(path, 5, "a test"):
        late_s = time.monotonic() - released
        assert is_locked(path)
    thread.join()
    assert released > 0
    assert 0 <= late_s < 0.04  # filelock's own interval would be 50 ms
    found = os.stat(path)
    assert (stat.S_IMODE(found.st_mode), found.st_size) == (0o600, 0)


def test_a_second_guard_in_the_same_thread_fails_and_the_first_stays(path: str) -> None:
    with guard(path, 5, "a test"):
        with pytest.raises(VnetLockError), guard(path, 0, "a test"):
            pass
        assert is_locked(path)
    assert not is_locked(path)


def test_an_error_inside_gives_the_lock_back(path: str) -> None:
    with pytest.raises(KeyError), guard(path, 5, "a test"):
        raise KeyError
    assert not is_locked(path)


def test_the_lock_file_is_empty_for_us_alone_and_stays(path: str) -> None:
    old = os.umask(0)
    try:
        with guard(path, 5, "a test"):
            pass
    finally:
        os.umask(old)
    found = os.stat(path)
    assert (stat.S_IMODE(found.st_mode), found.st_size) == (0o600, 0)


def test_a_lock_file_that_others_may_open_is_closed_to_them(path: str) -> None:
    Path(path).touch(mode=0o644)
    with guard(path, 5, "a test"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_symbolic_link_is_not_followed(path: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    os.symlink(target, path)
    with pytest.raises(VnetLockError, match="symbolic link"), guard(path, 5, "a test"):
        pass
    assert not target.exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_plain_file_is_refused_without_hanging(path: str, make: object) -> None:
    make(path)  # type: ignore[operator]
    with pytest.raises(VnetLockError, match="guard"), guard(path, 1, "a test"):
        pass


def test_a_missing_directory_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(VnetLockError, match=r"cannot open the lock file .*/none/guard"):  # noqa: SIM117
        with guard(f"{tmp_path}/none/guard", 1, "a test"):
            pass


def test_a_lock_file_removed_while_we_wait_guards_nothing_and_is_made_anew(path: str) -> None:
    holder = start_holder(path)
    done: list[bool] = []

    def take() -> None:
        with guard(path, 5, "a test"):
            done.append(is_locked(path))

    thread = threading.Thread(target=take)
    thread.start()
    time.sleep(0.1)
    os.unlink(path)
    end(holder)
    thread.join()
    assert done == [True]


def test_a_program_started_meanwhile_does_not_inherit_the_lock(path: str) -> None:
    with guard(path, 5, "a test"):
        pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)
    try:
        assert not is_locked(path)
    finally:
        end(pid)


def is_locked(path: str) -> bool:
    """Asked of the kernel, past the library."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
