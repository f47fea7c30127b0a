"""What a process of ours needs that stays as long as its host: to be the only one, and to be told to end."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from vnet_lock.errors import Refused
from vnet_lock.kernel.processes import read_command, read_lock_holder
from vnet_lock.locks import os_failure
from vnet_lock.settings import Settings


@contextmanager
def alone(settings: Settings, path: str, what: str) -> Iterator[None]:
    """Hold the lock at ``path``; Refused, saying who has it, where ``what`` runs already.

    A POSIX lock: its holder's pid can be asked for, it ends with the process, and no child has it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        raise os_failure("open the lock file", path, error) from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = read_lock_holder(path) or 0
            who = f"{read_command(settings, pid)} (pid {pid})" if pid > 0 else "another"
            raise Refused(f"{what} runs already: {who}; one serves the whole host") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def woken_by_signals() -> Iterator[int]:
    """A descriptor that is readable once we are told to end."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(write)
