"""A call of libvirt's hooks: answered by a process that `vnet-lock hooks serve` keeps ready, or by this one.

Loads nothing but what is inside the interpreter, which makes it worth while: who has loaded what a hook needs
answers in a tenth of the time. Whatever is wrong with that process before it has our call, we answer it
ourselves; once it has it, only its answer counts, and to lose that is a failure.

The two speak by messages (SOCK_SEQPACKET): the ready one says which package it is; we pass our stdin, stdout
and stderr, and it says that it has them; we say our driver and our arguments, and with that the call is its;
it says the exit status. Only who is awake gets the streams: in a message that nobody reads they stay open,
and libvirt waits for their end.
"""

import _socket
import posix
import sys

# Neither typing nor __future__, which take as long as all of this.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Below the directory of our run-time state.
SOCKET = "hooks.sock"
PACKAGE = __file__.rpartition("/front/")[0].encode()
# Longer than any call: a guest's name and a few words.
MOST = 65536
# The status that the shim takes for a Python that has not said itself what went wrong.
LOST = 3
STREAMS = (0, 1, 2)
# What is said beside streams, and of them.
STREAMS_PASSED, STREAMS_HAD = b"streams", b"had"
# How long one that is ready may need to say so.
READY_S = 1.0


def find_answer(driver: str, argv: "Sequence[str]") -> "Callable[[], int]":
    """What answers a call of a hook (`qemu` or `network`) and returns the exit status that libvirt is to see.

    ``argv`` is what ``hook.main`` takes. Raises what importing our package does.
    """
    ready = _reach(driver, argv)
    if ready is not None:
        return lambda: _wait(ready)
    import gc

    # It ends in a moment, and leaves nothing.
    gc.disable()
    if driver == "qemu":
        from vnet_lock.front.hook import main
    else:
        from vnet_lock.front.network_hook import main
    return lambda: main(argv, sys.stdin.buffer)


def end(status: int) -> None:
    """End without being taken down, which takes as long as the work: what was written was written at once."""
    posix._exit(status)


def _reach(driver: str, argv: "Sequence[str]") -> "_socket.socket | None":
    """The process that has our call from now on; None where nobody has it."""
    streams = b"".join(stream.to_bytes(4, sys.byteorder) for stream in STREAMS)
    words = "\0".join((driver, *argv)).encode(errors="surrogateescape")
    try:
        ready = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        ready.settimeout(READY_S)
        ready.connect(f"{argv[0]}/run/vnet-lock/{SOCKET}")
        # struct ucred: pid, uid, gid. Whoever could put a socket there is no one to trust with a guest.
        peer = ready.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        if int.from_bytes(peer[4:8], sys.byteorder) != posix.geteuid() or len(words) > MOST:
            return None
        if ready.recv(MOST) != PACKAGE:
            return None
        ready.sendmsg([STREAMS_PASSED], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
        if ready.recv(MOST) == STREAMS_HAD:
            ready.send(words)
            return ready
    except OSError:  # there is none, or none that is in time
        pass
    return None


def _wait(ready: _socket.socket) -> int:
    """The exit status; it has a deadline of its own."""
    ready.settimeout(None)
    try:
        status = ready.recv(MOST)
    except OSError:
        return LOST
    return status[0] if status else LOST
