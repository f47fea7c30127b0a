"""vnet-lock reap --follow: one process of a host that heals claims as soon as their owners are dead.

It sleeps until a process ends or a claim is made, and keeps nothing that it doesn't need for that: whatever
it does to claims is done by a child, which loads what that takes and ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable

from vnet_lock.claims import ClaimTable
from vnet_lock.errors import VnetLockError
from vnet_lock.front import resident
from vnet_lock.front.command import print_error
from vnet_lock.kernel import inotify
from vnet_lock.kernel.liveness import Liveness
from vnet_lock.kernel.processes import is_alive, read_lock_holder, read_process
from vnet_lock.model import Claim, OwnerKind, Process
from vnet_lock.settings import Settings

_PROGRAM = "vnet-lock"
# A libvirt guest that has no QEMU yet, or none any more, has no process whose end tells: its claims are
# looked at again.
_UNSETTLED_S = 1.0
# What can't be undone now is tried again, each time after twice as long.
_RETRY_S, _MOST_RETRY_S = 1.0, 60.0


def follow(settings: Settings, heal: Callable[[], None]) -> int:
    """Heal, until SIGTERM or SIGINT; 0 then. Refused where another is at it already.

    ``heal`` undoes what is stale; it is called in a child.
    """
    if not _run(ClaimTable(settings).make_directories):
        return VnetLockError.exit_code
    _allow_many_descriptors()
    with (
        resident.alone(settings, settings.reap_lock_path, "vnet-lock reap --follow"),
        resident.woken_by_signals() as signals,
    ):
        _Reaper(settings, heal, signals).run()
    return 0


class _Reaper:
    """Whom we wait for: a pidfd of each process that a claim lives by."""

    def __init__(self, settings: Settings, heal: Callable[[], None], signals: int) -> None:
        self._settings = settings
        self._heal = heal
        self._signals = signals
        self._table = ClaimTable(settings)
        self._waited: dict[Process, int] = {}
        self._retry_s = 0.0

    def run(self) -> None:
        """Until we are told to end."""
        while True:
            watch = self._watch()
            try:
                if not self._serve(watch):
                    return
            finally:
                os.close(watch)

    def _watch(self) -> int:
        """The claims' directory, made anew where somebody removed it."""
        with contextlib.suppress(FileNotFoundError):
            return inotify.open_watch(self._settings.claims_dir)
        _run(ClaimTable(self._settings).make_directories)
        return inotify.open_watch(self._settings.claims_dir)

    def _serve(self, watch: int) -> bool:
        """Until the directory is another one (True), or we are to end (False)."""
        own = os.stat(self._settings.claims_dir).st_ino
        while True:
            timeout_s = self._look()
            ready = self._wait(watch, timeout_s)
            if self._signals in ready:
                return False
            if watch in ready:
                inotify.drain(watch)
                try:
                    if os.stat(self._settings.claims_dir).st_ino != own:
                        return True
                except FileNotFoundError:
                    return True

    def _look(self) -> float | None:
        """Heal what is stale and see whom to wait for; when to look again without being woken."""
        claims = self._table.read()
        if Liveness(self._settings).stale(claims):
            _run(self._heal)
            claims = self._table.read()
            failed = bool(Liveness(self._settings).stale(claims))
            self._retry_s = min(self._retry_s * 2 or _RETRY_S, _MOST_RETRY_S) if failed else 0.0
        else:
            self._retry_s = 0.0
        wanted: set[Process] = set()
        settled = True
        for claim in claims.records:
            process = self._lives_by(claim)
            settled = settled and process is not None
            wanted |= {process} if process else set()
        self._wait_for(wanted)
        times = ([] if settled else [_UNSETTLED_S]) + ([self._retry_s] if self._retry_s else [])
        return min(times, default=None)

    def _lives_by(self, claim: Claim) -> Process | None:
        """The process whose end may make a claim stale; None where no single one's does."""
        if claim.worker is not None:
            return claim.worker
        owner = claim.owner
        if owner.pid_file is None:
            return owner.process
        with contextlib.suppress(OSError):
            pid = read_lock_holder(owner.pid_file)
            if pid is not None and pid > 0:
                return read_process(self._settings, pid)
        if owner.kind is not OwnerKind.LIBVIRT and owner.process and is_alive(self._settings, owner.process):
            return owner.process
        return None

    def _wait_for(self, wanted: set[Process]) -> None:
        for process in self._waited.keys() - wanted:
            os.close(self._waited.pop(process))
        for process in wanted - self._waited.keys():
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(process.pid)
                self._waited[process] = descriptor
                if not is_alive(self._settings, process):
                    # The pid is another's: what is stale by now is found at once.
                    os.close(self._waited.pop(process))

    def _wait(self, watch: int, timeout_s: float | None) -> set[int]:
        poll = select.poll()
        for descriptor in (self._signals, watch, *self._waited.values()):
            poll.register(descriptor, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
        for process, descriptor in list(self._waited.items()):
            if descriptor in ready:
                os.close(self._waited.pop(process))
        return ready


def _allow_many_descriptors() -> None:
    """One for each guest: as many as we may have, for select(2)'s 1024 are none to poll(2)."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(body: Callable[[], None]) -> bool:
    """In a child, which takes all that it loaded with it; what it raises is said on stderr, and False."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            body()
            code = 0
        except VnetLockError as error:
            print_error(_PROGRAM, error)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0
