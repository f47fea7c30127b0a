"""The outer end of our commands: their streams, and the one place that turns errors into a line and a status.

No traceback but for a bug of ours. Loads nothing: QEMU's start waits for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from io import TextIOWrapper

from vnet_lock.errors import VnetLockError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def serve(program: str, run: Callable[[], int], unencodable: str = "replace") -> int:
    """Run a command and return its exit status; what went wrong is one line of ``program``'s on stderr.

    ``unencodable`` is what becomes of a letter that its output's encoding doesn't have.
    """
    _require_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors=unencodable)
    try:
        try:
            status = run()
        except SystemExit as leave:  # argparse's own, whose words are still to be written
            status = leave.code if isinstance(leave.code, int) else 0
        sys.stdout.flush()
    except VnetLockError as error:
        return _fail(program, str(error), error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE  # who read our output has enough of it
    except PermissionError as error:
        return _fail(program, f"{error.filename or 'the kernel'}: {error.strerror}; run as root")
    except OSError as error:
        if error.errno not in (ENOSPC, EIO, EFBIG, EDQUOT) or error.filename is not None:
            raise
        return _fail(program, f"cannot write the output: {error.strerror}")
    finally:
        _drop_what_cannot_be_written()
    return status


def print_error(program: str, error: VnetLockError | str) -> None:
    """One line on stderr, whatever a name in it contains."""
    line = printable(" ".join(str(error).split()))
    with suppress(OSError):  # nobody listens; the exit status says it, too
        print(f"{program}: {line}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Without what could move a terminal's cursor or end a line: others choose the names that are shown."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "?" for each in text)


def _fail(program: str, message: str, status: int = VnetLockError.exit_code) -> int:
    print_error(program, message)
    return status


def _require_streams() -> None:
    """Put /dev/null where we were started without a standard input, output or error.

    Else the first thing that we open would be one of them, to us and to the QEMU that we become.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _drop_what_cannot_be_written() -> None:
    """What is still buffered would be tried again at exit, and change the status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
