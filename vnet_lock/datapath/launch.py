"""Starts a process of the datapath so that it outlives whoever started it, and waits until it serves."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vnet_lock.errors import VnetLockError

if TYPE_CHECKING:
    from vnet_lock.model import Process
    from vnet_lock.settings import Settings

# It has Python to start and a device to open; under full emulation that takes seconds.
_READY_S = 30.0
# What a process says on its descriptor ``ready`` when it serves; anything else is why it can't.
_READY = b"ready"
# A module of ours, from where we are, and nothing else but the standard library: a hook's interpreter knows
# of no environment, and it starts in half the time.
_PROGRAM = (
    "import runpy, sys; module, home = sys.argv[1:3]; del sys.argv[1:3];"
    " sys.path.insert(0, home); runpy.run_module(module, run_name='__main__')"
)
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def start(settings: Settings, name: str, args: Sequence[str], descriptors: Mapping[str, int]) -> Process:
    """Run ``vnet_lock.datapath.NAME`` with ``args`` and a word ``--KEY=FD`` for each descriptor.

    It is nobody's child, and has no descriptor of ours but these; the caller keeps those that it passes.
    Raises VnetLockError with its own words where it doesn't come to serve.
    """
    from vnet_lock.kernel import background  # what we start needs none of it

    ready, told = os.pipe()
    try:
        passed = {**descriptors, "ready": told}
        words = [f"--{key}={descriptor}" for key, descriptor in passed.items()]
        module = f"vnet_lock.datapath.{name}"
        argv = [sys.executable, "-I", "-S", "-c", _PROGRAM, module, _HOME, *args, *words]
        process = background.start(
            settings,
            lambda: os.execv(argv[0], argv),  # noqa: S606 - our own interpreter
            lambda _: True,
            kept=passed.values(),
        )
        os.close(told)
        told = -1
        answer = _read_answer(ready)
    finally:
        os.close(ready)
        if told >= 0:
            os.close(told)
    if answer != _READY or process is None:
        reason = answer.decode(errors="replace").strip() or "it ended without a word"
        raise VnetLockError(f"the process that is to carry the packets ({name}) can't: {reason}")
    return process


def report_ready(descriptor: int, problem: str = "") -> None:
    """Tell whoever started us that we serve, or why we can't; once."""
    os.write(descriptor, problem.encode() if problem else _READY)
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
