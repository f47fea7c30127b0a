"""The vhost-user back-end of one guest: a monitor, and the worker that it starts again whenever that ends.

    vnet_lock.datapath.vhost_user NODE --listener=FD --life=FD --queue0=FD... --netns=FD --ready=FD

The worker hands the guest's memory and rings to /dev/vhost-net with a packet socket for each pair of rings:
no packet comes through this program. It serves one front-end, the connection that sets the owner, until
that ends, and starts with nothing, so the next one finds it as the first did. vhost-net's thread is a thread
of the worker (since Linux 6.4), so the guest's network ends with it; QEMU connects again.

Both end with the guest: ``life`` is a pipe's end whose other end QEMU inherited, or a pidfd.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import socket
import sys
import syslog
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from vnet_lock.dataclass import dataclass, field
from vnet_lock.datapath.launch import report_ready
from vnet_lock.datapath.packet_queues import PacketQueues
from vnet_lock.datapath.vhost_device import Device, Kernel, Packets, offered_features
from vnet_lock.datapath.vhost_message import ProtocolError, Reader, reply
from vnet_lock.datapath.vhost_net import VhostNet
from vnet_lock.kernel.netns import enter

# A worker that ended sooner is started again only after that long.
_PAUSE_S = 1.0
# Front-ends beside the one that is served: whoever connects may be on his way to give the socket away.
_MOST_CONNECTIONS = 8
_NOBODY = 65534  # the kernel's overflowuid
_PR_SET_NO_NEW_PRIVS = 38


@dataclass(slots=True)
class Inherited:
    """What we were started with; ``node`` is vhost-net's."""

    node: str
    listener: int = -1
    life: int = -1
    netns: int = -1
    ready: int = -1
    queues: list[int] = field(default_factory=list)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Inherited:
        """The node, then ``--NAME=FD`` words; ``--queueN`` once for each pair of rings, in order."""
        found = cls(words[0])
        for word in words[1:]:
            name, _, number = word.removeprefix("--").partition("=")
            if name.startswith("queue"):
                found.queues.append(int(number))
            else:
                setattr(found, name, int(number))
        return found


def main() -> None:
    """Serve until the guest ends."""
    inherited = Inherited.parse(sys.argv[1:])
    syslog.openlog("vnet-lock", syslog.LOG_PID, syslog.LOG_DAEMON)
    try:
        if inherited.netns >= 0:
            enter(inherited.netns)
            os.close(inherited.netns)
        monitor = Monitor(inherited)
    except OSError as error:
        report_ready(inherited.ready, f"{error.filename or inherited.node}: {error.strerror}")
        return
    report_ready(inherited.ready)
    monitor.run()


class Monitor:
    """Holds what must outlive a worker: the packet sockets, with them the namespace, and the listener."""

    def __init__(self, inherited: Inherited) -> None:
        self._node = inherited.node
        self._life = inherited.life
        self._listener = socket.socket(fileno=inherited.listener)
        self._packets = PacketQueues([socket.socket(fileno=number) for number in inherited.queues])
        probe = VhostNet.open(self._node)
        self._features = probe.read_features()
        probe.close()

    def run(self) -> None:
        """Have a worker until the guest ends."""
        while True:
            began = time.monotonic()
            try:
                pid = self._fork_worker()
            except OSError as error:
                _log_error(f"the guest's vhost-user back-end can't be started: {error}; trying again")
                self._turn_away()
            else:
                status = self._wait(pid)
                if status is None:
                    return
                if status:
                    how = f"signal {-status}" if status < 0 else f"status {status}"
                    _log_error(f"the guest's vhost-user back-end ended with {how}; starting it again")
            pause = _PAUSE_S - (time.monotonic() - began)
            if pause > 0 and _is_readable(self._life, pause):
                return

    def _fork_worker(self) -> int:
        """A worker; only we may open vhost-net, so it gets what it needs of that."""
        with ExitStack() as stack:
            kernels = []
            for _ in range(self._packets.pairs):
                kernels.append(VhostNet.open(self._node))
                stack.callback(kernels[-1].close)
            pid = os.fork()
            if pid == 0:
                worker = Worker(
                    self._listener, self._life, self._packets, kernels, kernel_features=self._features,
                    complain=lambda text: syslog.syslog(syslog.LOG_WARNING, text),
                )  # fmt: skip
                _run_worker(worker)
            return pid

    def _turn_away(self) -> None:
        """QEMU stands still while it waits for an answer: who is connected already gets an end instead."""
        self._listener.setblocking(False)
        with suppress(OSError):
            while True:
                self._listener.accept()[0].close()

    def _wait(self, pid: int) -> int | None:
        """The worker's exit status, negative for a signal; None where the guest ended, and it was ended."""
        process = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            poll.register(self._life, select.POLLIN)
            is_over = any(number == self._life for number, _ in poll.poll())
            if is_over:
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return None if is_over else status
        finally:
            os.close(process)


def _run_worker(worker: Worker) -> None:
    """Never return into the monitor's code."""
    status = 1
    try:
        _drop_privileges()
        status = worker.run()
    except Exception:
        for line in traceback.format_exc().splitlines():
            _log_error(line)
    finally:
        os._exit(status)


def _drop_privileges() -> None:
    """What others send is read as nobody, who can open nothing; ptrace(2) keeps other nobodies out."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


class Worker:
    """Accepts front-ends and does what the one says that set the owner."""

    def __init__(
        self,
        listener: socket.socket,
        life: int,
        packets: Packets,
        kernels: Sequence[Kernel],
        *,
        kernel_features: int,
        complain: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._life = life
        self._kernels = list(kernels)
        self._packets = packets
        self._complain = complain
        self._offered = offered_features(kernel_features, packets.has_header)
        self._connections: dict[int, _Connection] = {}

    def run(self) -> int:
        """Serve until the guest, or the front-end that was served, ends; the exit status."""
        try:
            return self._serve()
        finally:
            for connection in self._connections.values():
                connection.close()

    def _serve(self) -> int:
        self._listener.setblocking(False)
        poll = select.poll()
        poll.register(self._life, select.POLLIN)
        poll.register(self._listener, select.POLLIN)
        while True:
            ready = [number for number, _ in poll.poll()]
            if self._life in ready:
                return 0
            for number in ready:
                connection = self._connections.get(number)
                if connection is None or connection.serve():
                    continue
                was_served = connection.device.is_owner
                poll.unregister(number)
                self._connections.pop(number).close()
                if was_served:
                    return 0
            if self._listener.fileno() in ready:
                self._accept(poll)

    def _accept(self, poll: select.poll) -> None:
        try:
            end, _ = self._listener.accept()
        except OSError:
            return  # whoever it was changed his mind
        if len(self._connections) >= _MOST_CONNECTIONS:
            end.close()
            return
        device = Device(self._offered, len(self._kernels), self._packets, self._take)
        self._connections[end.fileno()] = _Connection(end, device, self._complain)
        poll.register(end, select.POLLIN)

    def _take(self) -> Sequence[Kernel]:
        if any(one.device.is_owner for one in self._connections.values()):
            raise ProtocolError("another connection has set the owner already")
        return self._kernels


class _Connection:
    """A front-end's end, and its device."""

    def __init__(self, end: socket.socket, device: Device, complain: Callable[[str], None]) -> None:
        self._end = end
        self._complain = complain
        self._reader = Reader(end)
        self.device = device

    def serve(self) -> bool:
        """Do what was sent so far; False where the connection is over."""
        try:
            while message := self._reader.read():
                try:
                    answer = self.device.handle(message)
                finally:
                    message.close()
                if answer is not None:
                    data = reply(message.request, answer)
                    if self._end.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) != len(data):
                        raise ProtocolError("it doesn't read what it asks for")
        except (EOFError, ConnectionError):
            return False
        except (ProtocolError, OSError) as error:
            self._complain(f"a vhost-user front-end is left alone: {error}")
            return False
        return True

    def close(self) -> None:
        """Stop what it had running."""
        self.device.close()
        self._reader.close()
        self._end.close()


def _log_error(text: str) -> None:
    syslog.syslog(syslog.LOG_ERR, text)


def _is_readable(descriptor: int, wait_s: float) -> bool:
    return bool(select.select([descriptor], [], [], wait_s)[0])


if __name__ == "__main__":
    main()
