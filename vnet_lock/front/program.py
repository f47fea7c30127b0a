"""A program that takes our place: where it is, and how it starts. Loads nothing; QEMU's start waits."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import NoReturn

from vnet_lock.errors import Unsupported

# What ends a program, and may have a handler of ours.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
# Python ignores these at its start, and an ignored signal stays ignored across exec.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def find_program(program: str, hint: str) -> str:
    """Where it is, as a shell would find it; Unsupported, with a hint at what to do, where it isn't."""
    folders = [""] if "/" in program else os.environ.get("PATH", os.defpath).split(":")
    for folder in folders:
        path = os.path.join(folder, program)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    where = "" if "/" in program else " in PATH"
    raise Unsupported(f'there is no program "{program}"{where}; {hint}')


def become(path: str, argv: Sequence[str]) -> NoReturn:
    """Exec the program with the signals as a shell would start it; Unsupported where it can't be."""
    for number in ENDING:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(path, list(argv))  # noqa: S606 - it takes our place
    except OSError as error:
        raise Unsupported(f"cannot run {path}: {error.strerror}") from error
