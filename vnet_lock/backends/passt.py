"""passt: a user network in a process of its own, which ends with the socket that QEMU talks to it on."""

from __future__ import annotations

import socket

from vnet_lock.backends import Connection
from vnet_lock.combination import Combination
from vnet_lock.errors import VnetLockError
from vnet_lock.kernel import programs
from vnet_lock.ports import Opened
from vnet_lock.request import Intent
from vnet_lock.settings import Settings


def missing(settings: Settings) -> str:
    """Whether it can serve: tried, as it takes an address, a default route, user namespaces and its --fd."""
    del settings
    try:
        _start().close()
    except VnetLockError as error:
        return str(error)
    return ""


def connect(settings: Settings, intent: Intent, opened: Opened, combination: Combination) -> Connection:
    """Start it and give QEMU the other end of its socket."""
    del settings, intent
    return Connection(combination, opened.mac, (_start().detach(),))


def _start() -> socket.socket:
    """A stream socket with a passt at its other end that serves; VnetLockError where it can't.

    Once it is ready it goes into the background, into a session and a pid namespace of its own; root's
    becomes nobody's. It ends when our end is closed: it serves only this one (passt(1), --fd).
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with its:
            programs.run("passt", "--quiet", "--one-off", "--fd", str(its.fileno()), kept=(its.fileno(),))
    except BaseException:
        ours.close()
        raise
    return ours
