"""A QEMU that becomes a daemon: the claims go over to it, and a small process stays to give them back."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable

from vnet_lock.dataclass import dataclass, replace
from vnet_lock.errors import VnetLockError
from vnet_lock.front.command import print_error
from vnet_lock.front.program import ENDING
from vnet_lock.front.supervisor import PROGRAM, Lifecycle
from vnet_lock.kernel.processes import is_alive, read_lock_holder, read_process
from vnet_lock.model import Owner, Process
from vnet_lock.settings import Settings

_POLL_MS = 10


@dataclass(frozen=True, slots=True)
class Handing:
    """A process that hands the claims to the daemon as soon as its pid file tells which process that is.

    While the foreground QEMU still waits for its daemon to get ready, so that there is no moment in which the
    claims belong to a dead process. A process of its own, because it loads what the parent must not keep.
    """

    old: Owner
    pid: int
    result: int

    @classmethod
    def start(
        cls, settings: Settings, pidfile: str, old: Owner, open_session: Callable[[], Lifecycle]
    ) -> Handing:
        """Begin while QEMU does; ``old`` is the foreground QEMU, a child of ours."""
        assert old.process is not None  # noqa: S101 - ours always has one
        foreground = os.pidfd_open(old.process.pid)
        result_read, result_write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(foreground)
            os.close(result_write)
            return cls(old, pid, result_read)
        try:
            session = open_session()
            daemon = _wait_for_pidfile(settings, pidfile, old.process, foreground)
            if daemon:
                session.hand_over(old, replace(old, process=daemon))
                os.write(result_write, f"{daemon.pid} {daemon.start_ticks}".encode())
        except VnetLockError as error:
            print_error(PROGRAM, error)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(0)

    def finish(self) -> Owner | None:
        """Who has the claims now; None where they were not handed over. The foreground QEMU has ended."""
        text = os.read(self.result, 100).decode()
        os.close(self.result)
        os.waitpid(self.pid, 0)
        if not text:
            return None
        pid, ticks = text.split()
        return replace(self.old, process=Process(int(pid), int(ticks)))


def _wait_for_pidfile(settings: Settings, path: str, old: Process, foreground: int) -> Process | None:
    """The daemon that has written its pid and holds the file's lock; None where QEMU ended without one."""
    poll = select.poll()
    poll.register(foreground, select.POLLIN)
    ended = False
    while True:
        daemon = _read_pidfile(settings, path, old)
        if daemon or ended:
            return daemon
        ended = bool(poll.poll(_POLL_MS))


def _read_pidfile(settings: Settings, path: str, old: Process) -> Process | None:
    try:
        with open(path, "rb") as file:
            text = file.read(32).strip()
        holder = read_lock_holder(path)
    except OSError:
        return None
    if not text.isdigit() or int(text) == old.pid:
        return None
    # What an earlier QEMU left in the file has no lock, or is older than ours.
    if holder is None or (holder > 0 and holder != int(text)):
        return None
    process = read_process(settings, int(text))
    return process if process and process.start_ticks >= old.start_ticks else None


def start_keeper(
    settings: Settings, owner: Owner, pidfile: str, open_session: Callable[[], Lifecycle]
) -> None:
    """Leave a small process behind that gives back when the daemon has ended."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            _keep(settings, owner, pidfile, open_session)
    finally:
        os._exit(0)


def _keep(settings: Settings, owner: Owner, pidfile: str, open_session: Callable[[], Lifecycle]) -> None:
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    # Whoever reads from a pipe that we inherited waits for its end.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    # It ends when the guest does: a service manager that ends both by SIGTERM wants the devices back, too.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    assert owner.process is not None  # noqa: S101 - a daemon's owner has one
    try:
        daemon = os.pidfd_open(owner.process.pid)
    except ProcessLookupError:
        pass
    else:
        if is_alive(settings, owner.process):
            poll = select.poll()
            poll.register(daemon, select.POLLIN)
            poll.poll()
    try:
        _release_kept(settings, owner, pidfile, open_session)
    except VnetLockError as error:
        import syslog

        syslog.openlog("vnet-qemu", syslog.LOG_PID)
        syslog.syslog(syslog.LOG_ERR, str(error))


def _release_kept(
    settings: Settings, owner: Owner, pidfile: str, open_session: Callable[[], Lifecycle]
) -> None:
    if pidfile.startswith(f"{settings.run}/"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(pidfile)
    open_session().release(owner)
