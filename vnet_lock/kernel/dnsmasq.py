"""A dnsmasq for the guests on one bridge: DHCP, and names. Nobody's child, and ended as the very process."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from vnet_lock.errors import VnetLockError
from vnet_lock.kernel import programs
from vnet_lock.kernel.processes import is_alive, read_process
from vnet_lock.model import Process
from vnet_lock.settings import Settings

_START_S = 10.0
_END_S = 2.0
_POLL_S = 0.01


def start(
    settings: Settings, bridge: str, pool: tuple[str, str, str], journal: Callable[[Process], bool]
) -> None:
    """Serve the addresses of ``pool`` (first, last, netmask) on a bridge; returns when it serves.

    The process is there before it is a dnsmasq, which it becomes only where ``journal``, told which one it
    is, says so: whenever we are killed, no server is left that no journal knows. VnetLockError where it
    can't serve.
    """
    program = programs.require("dnsmasq")
    words = [program, *_words(bridge, pool)]
    said, errors = os.pipe()
    go_read, go = os.pipe()
    try:
        # Its pid is part of its words.
        pid = _fork(lambda own: [*words, f"--pid-file={_pid_file(settings, bridge, own)}"], go_read, errors)
        os.close(errors)
        errors = -1
        process = read_process(settings, pid)
        if process is None:
            raise VnetLockError(f"the process that was to serve DHCP on {bridge} is gone; was it killed?")
        if journal(process):
            os.write(go, b"!")
            _wait(settings, bridge, process, said)
    finally:
        for descriptor in (said, errors, go_read, go):
            if descriptor >= 0:
                os.close(descriptor)


def end(settings: Settings, bridge: str, process: Process) -> None:
    """End precisely this process, if it lives, and remove its file; VnetLockError where it doesn't end."""
    try:
        # Whoever has the pid from now on is the one that we look at.
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        descriptor = -1
    if descriptor >= 0:
        try:
            if is_alive(settings, process):
                _end(descriptor, process.pid)
        finally:
            os.close(descriptor)
    with suppress(FileNotFoundError):
        os.unlink(_pid_file(settings, bridge, process.pid))


def _words(bridge: str, pool: tuple[str, str, str]) -> list[str]:
    return [
        f"--conf-file={os.devnull}",
        "--keep-in-foreground",
        # On this bridge alone: no other network is answered, and no other dnsmasq disturbed.
        f"--interface={bridge}",
        "--except-interface=lo",
        "--bind-interfaces",
        "--no-hosts",
        "--domain-needed",
        "--bogus-priv",
        f"--dhcp-range={','.join(pool)},1h",
        "--dhcp-authoritative",
        "--leasefile-ro",
    ]


def _pid_file(settings: Settings, bridge: str, pid: int) -> str:
    return f"{settings.run}/dnsmasq-{bridge}-{pid}.pid"


def _fork(words: Callable[[int], list[str]], go: int, errors: int) -> int:
    """A process that waits for a byte from ``go`` and then becomes a program; its pid.

    It ends where the byte doesn't come, and keeps nothing of ours open.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if pid := os.fork():
                os.write(tell, str(pid).encode())
            else:
                _become(words, go, errors)
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


def _become(words: Callable[[int], list[str]], go: int, errors: int) -> NoReturn:
    null = os.open(os.devnull, os.O_RDWR)
    # Standard input is what it waits for, until it is another program.
    for descriptor, stream in ((go, 0), (null, 1), (errors, 2)):
        os.dup2(descriptor, stream)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if os.read(0, 1):
        argv = words(os.getpid())
        os.dup2(1, 0)
        os.execv(argv[0], argv)  # noqa: S606 - a list of words, found by us
    os._exit(1)


def _wait(settings: Settings, bridge: str, process: Process, said: int) -> None:
    """It writes its pid when it has its sockets (main() of dnsmasq.c)."""
    ready = _pid_file(settings, bridge, process.pid)
    deadline = time.monotonic() + _START_S
    while not os.path.exists(ready):
        if not is_alive(settings, process):
            reason = programs.reason_in(os.read(said, 4096).decode(errors="replace"))
            raise VnetLockError(
                f"dnsmasq can't serve DHCP on {bridge}: {reason or 'it ended without a word'}"
            )
        if time.monotonic() > deadline:
            raise VnetLockError(
                f"dnsmasq didn't start on {bridge} within {_START_S:g} s; is the host overloaded?"
            )
        time.sleep(_POLL_S)


def _end(descriptor: int, pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
        if select.select([descriptor], [], [], _END_S)[0]:
            return
    raise VnetLockError(f"dnsmasq (pid {pid}) doesn't end; see: ps -fp {pid}")
