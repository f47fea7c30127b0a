"""Processes of ours that outlive who started them: known before they do anything, and ended as themselves."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import NoReturn

from vnet_lock.errors import VnetLockError
from vnet_lock.kernel import programs
from vnet_lock.kernel.processes import is_alive, read_process
from vnet_lock.model import Process
from vnet_lock.settings import Settings

_END_S = 2.0


def start(
    settings: Settings,
    body: Callable[[], object],
    journal: Callable[[Process], bool],
    errors: int | None = None,
    kept: Collection[int] = (),
) -> Process | None:
    """Run ``body`` in a process that is nobody's child, has a session of its own and nothing of ours open.

    Nothing but ``kept``; its streams are /dev/null, but for standard error where ``errors`` is a descriptor
    for that. It is there before it does anything, and begins only where ``journal``, told which one it is,
    says so: whenever we are killed, nothing is at work that no journal knows. None where it was not to begin;
    VnetLockError where there can be no process.
    """
    go_read, go = os.pipe()
    try:
        pid = _fork(body, go_read, errors, kept)
        process = read_process(settings, pid)
        if process is None:
            raise VnetLockError("a process that was just started is gone; was it killed?")
        if not journal(process):
            return None
        os.write(go, b"!")
        return process
    finally:
        os.close(go_read)
        os.close(go)


def end(settings: Settings, process: Process, what: str) -> None:
    """End precisely this process, if it lives; VnetLockError, with what it is, where it doesn't end."""
    try:
        # Whoever has the pid from now on is the one that we look at.
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if not is_alive(settings, process):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
            if select.select([descriptor], [], [], _END_S)[0]:
                return
    finally:
        os.close(descriptor)
    raise VnetLockError(f"{what} (pid {process.pid}) doesn't end; see: ps -fp {process.pid}")


def keep() -> NoReturn:
    """Do nothing but hold what was kept open, until somebody ends us."""
    sleep = programs.require("sleep")
    # The memory of whoever started us isn't needed for it.
    os.execv(sleep, [sleep, "infinity"])  # noqa: S606


def _fork(body: Callable[[], object], go: int, errors: int | None, kept: Collection[int]) -> int:
    """A process that waits for a byte from ``go``, and ends where it doesn't come; its pid."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if pid := os.fork():
                os.write(tell, str(pid).encode())
            else:
                _wait_and_run(body, go, errors, kept)
        finally:
            os._exit(1)
    os.close(tell)
    try:
        os.waitpid(child, 0)
        answer = os.read(told, 20)
    finally:
        os.close(told)
    if not answer:
        raise VnetLockError("cannot start another process; see: ulimit -u")
    return int(answer)


def _wait_and_run(body: Callable[[], object], go: int, errors: int | None, kept: Collection[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    # Standard input is what it waits for.
    for descriptor, stream in ((go, 0), (null, 1), (null if errors is None else errors, 2)):
        os.dup2(descriptor, stream)
    lowest = 3
    for descriptor in sorted(kept):
        os.set_inheritable(descriptor, True)
        os.closerange(lowest, descriptor)
        lowest = descriptor + 1
    os.closerange(lowest, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    if os.read(0, 1):
        os.dup2(1, 0)
        body()
