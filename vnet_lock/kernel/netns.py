"""Makes network namespaces, and does one thing at a time in another; the caller stays in its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from vnet_lock.errors import Unsupported
from vnet_lock.settings import Settings

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000


def make_namespace(settings: Settings) -> int:
    """A descriptor of a new, empty network namespace, which goes with its last descriptor and socket.

    When it does, hardware in it returns to the first namespace, and links that were made go (netdevice's
    default_device_exit_net). Unsupported where we may not make one.
    """

    def make() -> int:
        _call("unshare", _CLONE_NEWNET)
        return os.open(f"{settings.proc}/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    try:
        return _in_a_thread(make)
    except OSError as error:
        raise Unsupported(f"cannot make a network namespace: {error.strerror}; run as root") from error


def call_in(namespace: int, function: Callable[[], T]) -> T:
    """What ``function`` returns or raises, called in the namespace that a descriptor is of.

    Sockets that it opens stay there. OSError where the namespace can't be entered.
    """

    def enter() -> T:
        _call("setns", namespace, _CLONE_NEWNET)
        return function()

    return _in_a_thread(enter)


def enter(namespace: int) -> None:
    """Go into the namespace that a descriptor is of, for good. OSError where it can't be entered."""
    _call("setns", namespace, _CLONE_NEWNET)


def _in_a_thread(function: Callable[[], T]) -> T:
    """setns(2) and unshare(2) are for one thread, so one of its own enters and ends there.

    Whatever happens, nobody else is ever in the wrong namespace.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _call(name: str, *arguments: int) -> None:
    import ctypes  # 3 ms; os.setns and os.unshare come with Python 3.12

    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
