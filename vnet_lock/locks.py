"""The guard: one process at a time, by an empty file that never means anything itself.

It refuses to keep state: a guard dies with its process, so who owns what stands in a claim record.
Nobody forks or starts a program while holding one.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EEXIST, ELOOP, ENOSPC, ENOTDIR, EPERM, EROFS

from vnet_lock.errors import VnetLockError
from vnet_lock.model import PciAddress
from vnet_lock.settings import DEFAULT, Settings

# filelock's own 50 ms would be the p99 of a wait; a hold is well under one millisecond.
_POLL_S = 0.002


@contextmanager
def guard(path: str, timeout_s: float, what: str, proc: str = DEFAULT.proc) -> Iterator[None]:
    """Hold the lock file ``path`` exclusively; ``what`` names in a message what it guards.

    The directory must be writable by us alone. Raises VnetLockError where the lock can't be had within
    ``timeout_s`` (with the holder, read below ``proc``), or where the path is no plain file of ours.
    Not reentrant: a second guard on the same path waits in vain, in the same thread too.
    """
    fd = _lock(path, 0, _flock)
    if fd is None:
        import filelock  # 30 to 50 ms, more than all else that a hook does: only who has to wait pays for it

        if not hasattr(filelock, "lock_descriptor"):  # before 3.30
            with _file_lock(path, timeout_s, what, proc):
                yield
            return
        fd = _lock(path, timeout_s, lambda it: filelock.lock_descriptor(it, blocking=False))
        if fd is None:
            raise _timed_out(path, timeout_s, what, proc)
    try:
        yield
    finally:
        # A close alone would leave the lock with a child, should somebody have forked.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


@contextmanager
def _file_lock(path: str, timeout_s: float, what: str, proc: str) -> Iterator[None]:
    """As ``guard``, with a FileLock of filelock's."""
    import inspect

    import filelock

    # Those with a mode set it on each acquire, to 0644 unless told; 3.9 has none and leaves the file alone.
    # Asked first: an instance refused halfway complains from its __del__ on our stderr.
    has_mode = "mode" in inspect.signature(filelock.FileLock).parameters
    lock = filelock.FileLock(path, mode=0o600) if has_mode else filelock.FileLock(path)
    try:
        lock.acquire(timeout=timeout_s, poll_interval=_POLL_S)
    except filelock.Timeout as error:
        raise _timed_out(path, timeout_s, what, proc) from error
    except OSError as error:
        raise os_failure("lock", path, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def pf_lock(settings: Settings, pf: PciAddress | None) -> Iterator[None]:
    """Hold the lock under which a PF, and its VFs through it, are written; none without a PF."""
    if pf is None:
        yield
        return
    with guard(settings.pf_lock_path(pf.text), settings.pf_wait_s, f"PF {pf}", settings.proc):
        yield


@contextmanager
def host_lock(settings: Settings) -> Iterator[None]:
    """Hold the lock under which what guests share on this host is changed."""
    with guard(settings.host_lock_path, settings.host_wait_s, "this host's shared settings", settings.proc):
        yield


def os_failure(verb: str, path: str, error: OSError) -> VnetLockError:
    """The error of a system call on a path of ours, in one line that ends with what to do."""
    room = f"make room, see: df {os.path.dirname(path)}; df -i {os.path.dirname(path)}"
    steps = {
        EACCES: "run as root",
        EPERM: "run as root",
        EROFS: "its file system must be writable (it is meant to be a tmpfs)",
        ENOSPC: room,
        EDQUOT: room,
        ENOTDIR: "move away what is in the way",
        EEXIST: "move away what is in the way",
        ELOOP: "it is a symbolic link: move it away",
    }
    step = steps.get(error.errno or 0, f"see: ls -ld {path}")
    return VnetLockError(f"cannot {verb} {path}: {error.strerror}; {step}")


def _open(path: str) -> int:
    # O_NONBLOCK: a FIFO put in its place must not hang a hook.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise os_failure("open the lock file", path, error) from error
    # Not for others to open: flock(2) asks for no right to write, so a reader could hold us up for ever.
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(fd)
        raise VnetLockError(f"the lock file {path} is not ours or no plain file; see: ls -l {path}")
    if found.st_mode & 0o077:
        os.fchmod(fd, 0o600)
    return fd


def _flock(fd: int) -> bool:
    """Lock what nobody has: the flock(2) that filelock's locks are on Linux."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(path: str, timeout_s: float, lock: Callable[[int], bool]) -> int | None:
    """A descriptor that is locked, or None at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        fd = _open(path)
        try:
            while not lock(fd):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    os.close(fd)
                    return None
                time.sleep(min(_POLL_S, left_s))
            if _is_named(fd, path):
                return fd
        except OSError as error:
            os.close(fd)
            raise os_failure("lock", path, error) from error
        except BaseException:
            os.close(fd)
            raise
        # Removed while we waited (by a person, or a filelock between 3.20.4 and 3.29.4): the lock that
        # we have excludes nobody any more.
        os.close(fd)


def _is_named(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _timed_out(path: str, timeout_s: float, what: str, proc: str) -> VnetLockError:
    pid = _read_holder(path, proc)
    who = f"held by pid {pid}" if pid else "held by another process"
    step = f"see: ps -fp {pid}" if pid else "see: lslocks"
    return VnetLockError(f"{what}: the lock {path} was {who} for all of {timeout_s:g} s; {step}")


def _read_holder(path: str, proc: str) -> int | None:
    """Who has the flock, as the kernel's list of locks says (proc_locks(5)); None where it doesn't."""
    try:
        found = os.stat(path, follow_symlinks=False)
        with open(f"{proc}/locks", encoding="ascii") as lines:
            rows = [line.split() for line in lines]
    except OSError:
        return None
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for row in rows:
        # "1: FLOCK ADVISORY WRITE 4711 00:19:1234 0 EOF"; a waiter has "->" after the number.
        if row[1] == "FLOCK" and row[5] == name:
            return int(row[4])
    return None
