"""Starts a process of the datapath so that it outlives whoever started it, and waits until it serves."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from vnet_lock.errors import VnetLockError

# It has Python to start and a device to open; under full emulation that takes seconds.
_READY_S = 30.0
# What a process says on its descriptor ``ready`` when it serves, and its pid; anything else is why it can't.
READY = b"ready "
# A module of ours, from where we are, and nothing else but the standard library: a hook's interpreter knows
# of no environment, and it starts in half the time.
_PROGRAM = (
    "import runpy, sys; module, home = sys.argv[1:3]; del sys.argv[1:3];"
    " sys.path.insert(0, home); runpy.run_module(module, run_name='__main__')"
)
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def start(name: str, args: Sequence[str], descriptors: Mapping[str, int]) -> int:
    """Run ``vnet_lock.datapath.NAME`` with ``args`` and a word ``--KEY=FD`` for each descriptor; its pid.

    It is nobody's child, has a session of its own, no standard streams, and no other descriptor of ours; the
    caller keeps those that it passes. Raises VnetLockError with its own words where it doesn't come to serve.
    """
    ready, told = os.pipe()
    try:
        words = [f"--{key}={descriptor}" for key, descriptor in (*descriptors.items(), ("ready", told))]
        module = f"vnet_lock.datapath.{name}"
        argv = [sys.executable, "-I", "-S", "-c", _PROGRAM, module, _HOME, *args, *words]
        child = os.fork()
        if child == 0:
            _exit_after(lambda: _detach(argv, {*descriptors.values(), told}))
        os.close(told)
        told = -1
        os.waitpid(child, 0)
        answer = _read_answer(ready)
    finally:
        os.close(ready)
        if told >= 0:
            os.close(told)
    if not answer.startswith(READY):
        reason = answer.decode(errors="replace").strip() or "it ended without a word"
        raise VnetLockError(f"the process that is to carry the packets ({name}) can't: {reason}")
    return int(answer.removeprefix(READY))


def report_ready(descriptor: int, problem: str = "") -> None:
    """Tell whoever started us that we serve, or why we can't; once."""
    os.write(descriptor, problem.encode() if problem else READY + b"%d" % os.getpid())
    os.close(descriptor)


def _read_answer(ready: int) -> bytes:
    answer = b""
    deadline = time.monotonic() + _READY_S
    while select.select([ready], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(ready, 4096)
        if not chunk:
            return answer
        answer += chunk
    return b"it didn't start in time"


def _exit_after(body: Callable[[], None]) -> NoReturn:
    """Never return into the parent's code."""
    try:
        body()
    finally:
        os._exit(1)


def _detach(argv: list[str], kept: set[int]) -> None:
    os.setsid()
    if os.fork() > 0:
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    lowest = 3
    for descriptor in sorted(kept):
        os.closerange(lowest, descriptor)
        lowest = descriptor + 1
    os.closerange(lowest, os.sysconf("SC_OPEN_MAX"))
    for descriptor in kept:
        os.set_inheritable(descriptor, True)
    os.execv(argv[0], argv)  # noqa: S606 - our own interpreter
