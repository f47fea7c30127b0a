"""vnet-lock hooks serve: processes that have loaded what a hook of libvirt's needs, and wait for its calls.

Optional: without it each call loads that itself, which is most of what it takes. One process keeps others
ready, each of which answers one call as the hook's own process would, and ends: nothing that a guest's call
leaves in memory is there for the next.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pkgutil import iter_modules
from typing import NoReturn

import vnet_lock
from vnet_lock.claims import ClaimTable
from vnet_lock.dataclass import dataclass
from vnet_lock.domain_xml import read_guest
from vnet_lock.errors import VnetLockError
from vnet_lock.front import hook, hook_call, network_hook, resident
from vnet_lock.kernel.processes import read_peer, read_uptime_s, this_process
from vnet_lock.locks import os_failure
from vnet_lock.session import Session
from vnet_lock.settings import Settings

_MAINS = {"qemu": hook.main, "network": network_hook.main}
# What of the front, and of others, these load only where they need it.
_LATER = (
    "vnet_lock.front.arrival",
    "vnet_lock.front.companion",
    "vnet_lock.front.libvirt_guest",
    "vnet_lock.front.libvirt_notes",
    "encodings.ascii",
    "filelock",
    "syslog",
    "traceback",
    "xml.etree.ElementTree",
)
# Programs, not for a hook.
_OTHERS = ("vnet_lock.front", "vnet_lock.datapath")
_NAMESPACES = ("mnt", "net", "pid", "user")
# A guest's end has two calls in a row, and its next start one more.
_READY = 3
# To make another one ready takes a processor's time, which a guest that is being started needs itself.
_QUIET_S = 5.0
# What is done for the first time takes twice as long: each one plans this guest while it waits.
_REHEARSED = b"""<domain><name>rehearsed</name><uuid>00000000-0000-4000-8000-000000000000</uuid>
<devices><hostdev mode='subsystem' type='pci'>
<source><address domain='0' bus='0' slot='0' function='0'/></source>
</hostdev></devices></domain>"""
_CHANGED = "vnet-lock was changed, so this one ends; its unit starts it anew"
_ENDED_EARLY = "a process that was ready for libvirt's calls was killed; begin again: vnet-lock hooks serve"


def follow(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; 0 then, and once our package isn't any more what was loaded of it.

    Refused where another serves already.
    """
    load()
    ClaimTable(settings).make_directories()
    with (
        resident.alone(settings, settings.hooks_lock_path, "vnet-lock hooks serve"),
        resident.woken_by_signals() as signals,
    ):
        code = _Code.read()
        if code.changed_since(_began_ns(settings)):
            print(_CHANGED, flush=True)
            return 0
        with _listening(settings.hooks_socket_path) as listener:
            print("ready for libvirt's calls", flush=True)
            _Server(settings, code, listener, signals).run()
    return 0


def find_package(settings: Settings) -> str | None:
    """Where the package of the one that serves is; "" where it doesn't answer, None where there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ours:
        ours.settimeout(hook_call.READY_S)
        try:
            ours.connect(settings.hooks_socket_path)
            return ours.recv(hook_call.MOST).decode(errors="replace")
        except TimeoutError:
            return ""
        except OSError:
            return None


def load() -> None:
    """All that a call of any hook needs."""
    packages = [vnet_lock]
    for package in packages:
        for _, name, is_package in iter_modules(package.__path__, f"{package.__name__}."):
            if name in _OTHERS:
                continue
            module = import_module(name)
            if is_package:
                packages.append(module)
    for name in _LATER:
        import_module(name)


def _began_ns(settings: Settings) -> int:
    """When this process was started, in ns of the epoch, or a bit before: a file's time is a tick late."""
    ticks_s = os.sysconf("SC_CLK_TCK")
    age_s = read_uptime_s() - (this_process(settings).start_ticks - 2) / ticks_s
    return time.time_ns() - int(age_s * 1_000_000_000)


@dataclass(frozen=True, slots=True)
class _Code:
    """What of our package was loaded: each file with its inode and the time of its last change (ns)."""

    files: tuple[tuple[str, int, int], ...]

    @classmethod
    def read(cls) -> _Code:
        paths = [
            module.__file__
            for name, module in sorted(sys.modules.items())
            if name.partition(".")[0] == "vnet_lock" and module.__file__
        ]
        return cls(tuple(cls._look(path) for path in paths))

    @property
    def is_current(self) -> bool:
        """Whether it still is what a hook would load."""
        with suppress(OSError):
            return all(self._look(file[0]) == file for file in self.files)
        return False

    def changed_since(self, began_ns: int) -> bool:
        """Whether a file was changed meanwhile, which then may not be what was loaded of it."""
        return any(began_ns <= changed_ns <= time.time_ns() for _, _, changed_ns in self.files)

    @staticmethod
    def _look(path: str) -> tuple[str, int, int]:
        found = os.stat(path)
        return path, found.st_ino, found.st_ctime_ns


class _Server:
    """Keeps some ready. Each has a pipe to us, that it writes to when it is called, and closes at its end."""

    def __init__(self, settings: Settings, code: _Code, listener: socket.socket, signals: int) -> None:
        self._settings = settings
        self._code = code
        self._listener = listener
        self._signals = signals
        self._ready: set[int] = set()
        # Those that wait see by its end that we are gone.
        self._alive, self._hold = os.pipe()

    def run(self) -> None:
        """Until we are told to end; VnetLockError where one of those that wait was killed."""
        gc.collect()
        gc.freeze()  # what all have in common stays so
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
        while self._code.is_current:
            happened = self._poll()
            if not self._ready or not happened:
                self._ready |= {self._fork() for _ in range(_READY - len(self._ready))}
            if self._signals in happened:
                return
            for told in self._ready & happened:
                self._ready.remove(told)
                was_called = os.read(told, 1)
                os.close(told)
                if not was_called:
                    raise VnetLockError(_ENDED_EARLY)
        print(_CHANGED, flush=True)

    def _poll(self) -> set[int]:
        """Which of our descriptors something happened to; none where it was quiet and one is missing."""
        poll = select.poll()
        for descriptor in (self._signals, *self._ready):
            poll.register(descriptor, select.POLLIN)
        quiet_s = None if len(self._ready) == _READY else _QUIET_S if self._ready else 0
        return {descriptor for descriptor, _ in poll.poll(None if quiet_s is None else quiet_s * 1000)}

    def _fork(self) -> int:
        """Make another one ready; the pipe that tells of it."""
        told, tell = os.pipe()
        try:
            child = os.fork()
        except OSError as error:
            raise VnetLockError("cannot start another process; see: ulimit -u") from error
        if child == 0:
            # Whatever happens below, what is ours above must not go on here.
            try:
                self._wait(tell)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(1)
        os.close(tell)
        return told

    def _wait(self, tell: int) -> None:
        """What one that is ready does."""
        os.setsid()  # what a terminal sends is for the one that it knows
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(self._hold)
        gc.disable()  # it ends in a moment
        with suppress(Exception):  # what is wrong here is the call's to say
            Session(self._settings).plan(read_guest(_REHEARSED).requests)
        poll = select.poll()
        poll.register(self._alive, 0)  # POLLHUP comes unasked
        poll.register(self._listener, select.POLLIN)
        while True:
            if any(descriptor == self._alive for descriptor, _ in poll.poll()):
                os._exit(0)
            with suppress(BlockingIOError):  # another was quicker
                peer, _ = self._listener.accept()
                break
        self._listener.close()
        os.write(tell, b"!")
        peer.setblocking(True)
        if self._code.is_current and _is_like_us(self._settings, peer):
            _answer(peer)


def _answer(peer: socket.socket) -> NoReturn:
    """Take a call, answer it as the hook's own process, and end as it does."""
    words, streams = _take_over(peer)
    if not words:
        os._exit(0)  # whoever calls does it itself

    def leave(status: int) -> NoReturn:
        with suppress(ConnectionError):  # nobody waits for it any more
            peer.send(bytes([status]))
        os._exit(0)

    for ours, stream in zip(streams, hook_call.STREAMS, strict=True):
        os.dup2(ours, stream)
        os.close(ours)
    driver, *argv = words.decode(errors="surrogateescape").split("\0")
    with open(0, "rb", closefd=False) as stdin:
        leave(_MAINS[driver](argv, stdin, leave))


def _take_over(peer: socket.socket) -> tuple[bytes, list[int]]:
    """The words of a call and its streams, which are there before it is ours; no words where it isn't."""
    with suppress(ConnectionError):
        peer.send(hook_call.PACKAGE)
        _, streams, flags, _ = socket.recv_fds(peer, hook_call.MOST, len(hook_call.STREAMS))
        # One that SELinux keeps from us is missing.
        if flags & socket.MSG_CTRUNC or len(streams) != len(hook_call.STREAMS):
            return b"", []
        peer.send(hook_call.STREAMS_HAD)
        return peer.recv(hook_call.MOST), streams
    return b"", []


def _is_like_us(settings: Settings, peer: socket.socket) -> bool:
    """Whether whoever calls has our rights, and sees the processes, devices and files that we see."""
    pid, uid = read_peer(peer)
    if uid != os.geteuid():
        return False
    with suppress(OSError):
        return all(
            os.path.samefile(f"{settings.proc}/{pid}/ns/{kind}", f"{settings.proc}/self/ns/{kind}")
            for kind in _NAMESPACES
        )
    return False


@contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener:
        before = os.umask(0o177)  # root's alone
        try:
            with suppress(FileNotFoundError):
                os.unlink(path)
            listener.bind(path)
        except OSError as error:
            raise os_failure("listen at", path, error) from error
        finally:
            os.umask(before)
        listener.listen(64)
        try:
            yield listener
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
