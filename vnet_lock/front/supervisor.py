"""The parent of a QEMU that we start: signals and status pass through, and its end gives back what it had.

The child claims, connects and then becomes QEMU, so that from the first moment the claims belong to the
process that uses the devices (pid and start ticks survive exec). The parent only waits; whatever becomes of
it, a claim is held as long as its QEMU lives. It loads nothing heavy before the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

from vnet_lock.dataclass import dataclass
from vnet_lock.errors import BadInput, VnetLockError
from vnet_lock.front.command import print_error
from vnet_lock.front.program import ENDING, become
from vnet_lock.front.qemu_features import read_dialect
from vnet_lock.kernel.processes import read_boot_id, read_process, this_process
from vnet_lock.model import Owner, OwnerKind, Process
from vnet_lock.qemu_argv import QemuArgv
from vnet_lock.qemu_rewrite import Dialect, rewrite
from vnet_lock.request import Request
from vnet_lock.settings import Settings

if TYPE_CHECKING:
    from vnet_lock.backends import Connection
    from vnet_lock.session import Grant

PROGRAM = "vnet-qemu"
# Passed on to QEMU when somebody sends them to us. Those of the terminal (^C, ^\, a hang-up, a new size) it
# gets itself, being in the same foreground process group; ^Z stops us both, as the shell wants it.
_PASSED_ON = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH),
)


class Lifecycle(Protocol):
    """What a guest's life takes of a session."""

    def acquire(self, owner: Owner, requests: Sequence[Request]) -> Sequence[Grant]: ...  # noqa: D102
    def connect(self, grant: Grant) -> Connection: ...  # noqa: D102
    def hand_over(self, old: Owner, new: Owner) -> None: ...  # noqa: D102
    def release(self, owner: Owner) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Guest:
    """What is to be run: the program as the user wrote it, where it is, its arguments, the guest's name."""

    program: str
    path: str
    argv: QemuArgv
    name: str

    def pidfile(self, settings: Settings, pid: int) -> str:
        """Where a QEMU that becomes a daemon writes its pid: where the user says, or under /run."""
        return self.argv.pidfile or f"{settings.run}/qemu-{pid}.pid"


class _Interrupted(BaseException):
    """A signal that ends QEMU came before there was one."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_guest(settings: Settings, guest: Guest, open_session: Callable[[], Lifecycle]) -> int:
    """Run QEMU and give back at its end; return its exit status, or die by the signal it died by.

    With -daemonize it returns when QEMU itself would; a small process then waits for the daemon's end.
    VnetLockError where giving back failed after a QEMU that ended well.
    """
    # Whoever started us may ignore it, and wait() would see nothing then.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    watched = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*watched, signal.SIGCHLD})
    child = _Child.fork(watched, before, lambda: _become_qemu(settings, guest, open_session()))
    process = read_process(settings, child.pid)
    if process is None:
        # It waits for our word, so somebody killed it, or this is another pid namespace's /proc.
        os.close(child.go)
        status = os.waitpid(child.pid, 0)[1]
        if os.WIFEXITED(status):
            raise VnetLockError(f"{settings.proc} doesn't know pid {child.pid}; is it this pid namespace's?")
        return _end_like(status)
    owner = _owner(settings, guest, process)
    with contextlib.suppress(BrokenPipeError):  # killed just now: its status will tell
        os.write(child.go, b"!")
    os.close(child.go)
    handing = None
    if guest.argv.daemonize:
        from vnet_lock.front.daemonized import Handing, start_keeper

        pidfile = guest.pidfile(settings, child.pid)
        handing = Handing.start(settings, pidfile, owner, open_session)
    status = _wait(child.pid, watched)
    if handing and (daemon := handing.finish()):
        owner = daemon
        if status == 0:
            start_keeper(settings, owner, pidfile, open_session)
            return 0
    if not os.read(child.report, 1):
        _release(open_session, owner, status)
    return _end_like(status)


def _owner(settings: Settings, guest: Guest, process: Process) -> Owner:
    return Owner(OwnerKind.QEMU, guest.name, read_boot_id(settings), process=process)


def _wait(child: int, watched: set[signal.Signals]) -> int:
    """Sleep until the child has ended, passing signals on; its wait status."""
    while True:
        info = signal.sigwaitinfo({*watched, signal.SIGCHLD})
        if info.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
        elif info.si_code <= 0:
            # A process sent it (SI_USER and below), to us; QEMU has what the terminal sends (SI_KERNEL).
            os.kill(child, info.si_signo)


def _release(open_session: Callable[[], Lifecycle], owner: Owner, status: int) -> None:
    try:
        open_session().release(owner)
    except VnetLockError as error:
        if status == 0:
            raise
        print_error(PROGRAM, error)


def _end_like(status: int) -> int:
    """QEMU's exit status; where a signal ended it, die by the same."""
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    import resource  # only here: a guest that crashed

    # The core that matters is QEMU's.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number


# --- the child ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Child:
    """The future QEMU: begins when ``go`` gets a byte, writes one to ``report`` where it gave all back."""

    pid: int
    go: int
    report: int

    @classmethod
    def fork(
        cls, watched: set[signal.Signals], before: set[int | signal.Signals], body: Callable[[], NoReturn]
    ) -> _Child:
        """Called with the watched signals blocked, so that none is lost; ``before`` is the mask for QEMU."""
        go_read, go_write = os.pipe()
        report_read, report_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go_write)
            if not os.read(go_read, 1):
                os._exit(1)  # the parent is gone
            for number in watched & set(ENDING):
                signal.signal(number, _interrupt)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _run_child(body, report_write)
        os.close(go_read)
        os.close(report_write)
        return cls(pid, go_write, report_read)


def _run_child(body: Callable[[], NoReturn], report: int) -> NoReturn:
    """Become QEMU, or say why not and exit; whatever happens, never return into the parent's code.

    Without a report the parent gives back whatever there is.
    """
    code = 1
    try:
        body()
    except VnetLockError as error:
        os.write(report, b"!")
        print_error(PROGRAM, error)
        code = error.exit_code
    except _Interrupted as interrupted:
        signal.signal(interrupted.number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {interrupted.number})
        os.kill(os.getpid(), interrupted.number)
    except BaseException:
        # A defect of ours.
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _interrupt(number: int, frame: object) -> NoReturn:
    del frame
    # A second one must not cut short what undoes the first.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    raise _Interrupted(number)


def _become_qemu(settings: Settings, guest: Guest, session: Lifecycle) -> NoReturn:
    owner = _owner(settings, guest, this_process(settings))
    grants = session.acquire(owner, guest.argv.intents)
    opened: list[int] = []
    try:
        connections: dict[str, Connection] = {}
        for grant in grants:
            connection = session.connect(grant)
            opened += connection.descriptors
            connections[grant.assignment.request.interface] = connection
        args = rewrite(guest.argv, connections, _dialect(guest, connections.values()))
        if guest.argv.daemonize and not guest.argv.pidfile:
            args = [*args, "-pidfile", guest.pidfile(settings, os.getpid())]
        for descriptor in opened:
            os.set_inheritable(descriptor, True)
        become(guest.path, [guest.program, *args])
    except BaseException:
        # A device isn't free while we have it open ourselves.
        for descriptor in opened:
            os.close(descriptor)
        for grant in grants:
            grant.close()
        try:
            session.release(owner)
        except VnetLockError as error:
            print_error(PROGRAM, error)
        raise


def _dialect(guest: Guest, connections: Collection[Connection]) -> Dialect:
    """The words of this QEMU, whose user may connect to our unix sockets again and again.

    The first time it does as the user that it is started by, later as the one that it became.
    """
    for connection in connections:
        if connection.path is not None and guest.argv.run_as is not None:
            os.chown(connection.path, uid_of(guest.argv.run_as), -1, follow_symlinks=False)
    return read_dialect(guest.path, connections)


def uid_of(user: str) -> int:
    """As QEMU's -runas reads it: a name, or UID:GID (os_parse_runas_uid_gid)."""
    import pwd

    uid, colon, gid = user.partition(":")
    if colon and uid.isdecimal() and gid.isdecimal():
        return int(uid)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise BadInput(f'QEMU is to become user "{user}", who isn\'t here') from error
