"""A dnsmasq for the guests on one bridge: DHCP, and names. Nobody's child, and ended as the very process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

from vnet_lock.errors import VnetLockError
from vnet_lock.kernel import background, programs
from vnet_lock.kernel.processes import is_alive
from vnet_lock.model import Process
from vnet_lock.settings import Settings

_START_S = 10.0
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
    said, errors = os.pipe()
    try:

        def become() -> None:
            # Its pid is part of its words.
            pid_file = _pid_file(settings, bridge, os.getpid())
            os.execv(program, [program, *_words(bridge, pool), f"--pid-file={pid_file}"])  # noqa: S606

        process = background.start(settings, become, journal, errors)
        os.close(errors)
        errors = -1
        if process:
            _wait(settings, bridge, process, said)
    finally:
        for descriptor in (said, errors):
            if descriptor >= 0:
                os.close(descriptor)


def end(settings: Settings, bridge: str, process: Process) -> None:
    """End precisely this process, if it lives, and remove its file; VnetLockError where it doesn't end."""
    background.end(settings, process, "dnsmasq")
    remove_file(settings, bridge, process.pid)


def remove_file(settings: Settings, bridge: str, pid: int) -> None:
    """Remove the file of one that has ended."""
    with suppress(FileNotFoundError):
        os.unlink(_pid_file(settings, bridge, pid))


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
