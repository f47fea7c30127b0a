"""qemu-net-helper: opens a network for another process and hands the descriptors over a unix socket.

The claim is the other process's. Until the descriptors are on their way it is reserved by us: should we die
before, nobody has to wait for that process's end. With --exec we become the other process ourselves.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from vnet_lock.combination import Port
from vnet_lock.errors import BadInput, Unsupported, VnetLockError
from vnet_lock.front.command import print_error, printable, serve
from vnet_lock.front.helper_words import HINT, Target, Words, fill, read_intent, read_words
from vnet_lock.model import Owner, OwnerKind
from vnet_lock.request import Intent
from vnet_lock.settings import DEFAULT, Settings

if TYPE_CHECKING:
    import socket

    from vnet_lock.backends import Connection
    from vnet_lock.session import Grant, Session

_PROGRAM = "qemu-net-helper"
_USAGE = """\
usage: qemu-net-helper --mode=MODE --dev=DEVICE [OPTIONS] (--socketpair=FD | --fd=FD)
       qemu-net-helper --mode=MODE --dev=DEVICE [OPTIONS] --exec -- COMMAND {fd}...

Opens the best connection that policy, device and protocols allow, claims it for the process at the
other end of the socket, and sends the descriptors there; or runs a command that inherits them.
Anything but 0 means that there are none.

  --mode=MODE          veb (or bridge), vepa, private, nat, route
  --dev=DEVICE         a network device or a PCI address; again for more, tried in order
  --pool=NAME          instead: a VF of this pool of vnet-lock.toml(5)
  --protocols=LIST     what the receiver can use: tap, socket, vhost, user; separated by commas
  --port=PORT  --mac=MAC  --queues=N  --vlan=ID
  --ip=ADDRESS         for mode=route: the guest's own address; again for more
  --dhcp=on|off        for mode=nat: answer its DHCP
  --raw                plain Ethernet frames, without a vnet header before each
  --explain            say on standard error what was passed over, why, and what was chosen

  --socketpair=FD      one line of JSON with all descriptors beside it; an error comes the same way
  --fd=FD              as QEMU's -netdev tap,helper=…: one byte with one tap descriptor; and as
                       -netdev bridge,helper=…, which adds --br=BRIDGE, without --mode and --dev
  --exec -- COMMAND    in its words {fd} and {vhostfd} become numbers of descriptors, or {fd0}, {fd1} … of
                       each queue, or {fds} and {vhostfds} of all, joined by colons; {ifname}, {mac}, {path}
  --help, --version

Exit status: 0 the descriptors were sent, or COMMAND's own; 1 failed, 2 bad usage or input, 4 refused: held by
another, 5 this host can't do it.
"""
# Where the link is a plain tap; of a macvtap the kernel knows no such thing.
_PORTS_OF_TAPS = (Port.BRIDGE, Port.NONE)
# A receiver that doesn't read: a message this small only ever waits for one.
_SEND_S = 10.0


def main(args: Sequence[str] | None = None) -> int:
    """Serve one request; 0 only if the descriptors were sent (or help was all that was asked for)."""
    if args is not None:
        return serve(_PROGRAM, lambda: run(args, DEFAULT))
    # QEMU waits for our end: nothing that we load is garbage, and nothing is left to be taken down (10 %).
    gc.disable()
    status = serve(_PROGRAM, lambda: run(sys.argv[1:], DEFAULT))
    os._exit(status)


def run(args: Sequence[str], settings: Settings) -> int:
    """As ``main``, with errors raised; with --socketpair they are sent to the other end, too."""
    # Only alone: a QEMU that called us so would take 0 for success, and descriptor 0 for a tap.
    if list(args) in (["--help"], ["-h"]):
        print(_USAGE, end="")
        return 0
    if list(args) == ["--version"]:
        from importlib.metadata import version  # 40 ms

        print(f"qemu-net-helper {version('vnet-lock')}")
        return 0
    words = read_words(args)
    target = words.target
    if target is None:
        raise BadInput(f"{words.problem or '--socketpair=FD, --fd=FD or --exec is missing'}; {HINT}")
    if target is Target.COMMAND:
        _become_command(settings, words)
    with _open_socket(words.values[target.value][0], target.value) as peer:
        try:
            _serve(settings, peer, words)
        except BaseException as error:
            if target is Target.MESSAGE:
                from vnet_lock.front.helper_message import send_error

                send_error(peer, error)
            raise
    return 0


def _read_intent(words: Words) -> Intent:
    if words.problem:
        raise BadInput(f"{words.problem}; {HINT}")
    return read_intent(words)


def _open_socket(text: str, name: str) -> socket.socket:
    """The socket that we were started with; ours from now on."""
    import socket

    if not re.fullmatch("[0-9]{1,10}", text):
        raise BadInput(f"--{name}={text} is not the number of an open socket")
    try:
        peer = socket.socket(fileno=int(text))
    except (OSError, OverflowError) as error:
        raise BadInput(f"--{name}={text} is not the number of an open socket") from error
    if peer.family != socket.AF_UNIX:
        peer.close()
        raise BadInput(f"--{name}={text} is no unix socket, so it takes no descriptors")
    peer.settimeout(_SEND_S)
    return peer


# --- for the process at the other end of a socket -------------------------------------------------


def _serve(settings: Settings, peer: socket.socket, words: Words) -> None:
    intent = _read_intent(words)
    if words.is_for_bridge and not os.path.exists(f"{settings.sys}/class/net/{intent.devs[0]}/bridge"):
        # A bridge that is asked for by --port may be made, but QEMU's own helper makes none.
        raise BadInput(f"there is no bridge {intent.devs[0]!r} here; see: ip link show type bridge")
    owner, uid = _read_owner(settings, peer)
    from vnet_lock.front import helper_message

    with _connected(settings, owner, intent, words) as (session, grant, connection):
        if connection.path is not None:
            os.chown(connection.path, uid, -1, follow_symlinks=False)
        if words.target is Target.MESSAGE:
            helper_message.send_connection(peer, connection, intent)
        else:
            helper_message.send(peer, b"\0", connection.fds[:1])
        session.activate([grant])
    if words.target is Target.MESSAGE or intent.mac or connection.combination.port is Port.BRIDGE:
        return
    # This protocol has no word for it, and a macvtap hears nothing that is for another MAC.
    print_error(_PROGRAM, f"the guest's device needs mac={connection.mac}; or choose one for both by --mac=")


@contextmanager
def _connected(
    settings: Settings, owner: Owner, intent: Intent, words: Words
) -> Iterator[tuple[Session, Grant, Connection]]:
    """A connection that is open inside; what fails in there gives it back."""
    from vnet_lock.session import Session

    session = Session(settings)
    (grant,) = _acquire(session, owner, intent, words)
    fds: list[int] = []
    try:
        if words.has("explain"):
            from vnet_lock.front.report import plan_text  # 20 ms
            from vnet_lock.request import Plan

            _explain(plan_text(Plan((grant.assignment,))).splitlines())
        connection = session.connect(grant)
        fds += connection.descriptors
        if not fds:
            raise Unsupported(f"{connection.combination.text} has no descriptor to hand over")
        if connection.combination.port in _PORTS_OF_TAPS:
            from vnet_lock.kernel import nodes

            # Nobody will open it again, so nobody need be waited for to remove it.
            nodes.end_with_descriptor(fds[0])
        yield session, grant, connection
    except BaseException:
        # A device isn't free while we have it open ourselves.
        _close(fds)
        grant.close()
        try:
            session.give_back([grant])
        except VnetLockError as error:
            print_error(_PROGRAM, error)
        raise
    _close(fds)


def _acquire(session: Session, owner: Owner, intent: Intent, words: Words) -> tuple[Grant, ...]:
    """One call for each interface, so what the owner has already stays."""
    try:
        return session.acquire(owner, [intent], beside=True)
    except VnetLockError as error:
        passed_over = getattr(error, "__notes__", [])
        if words.has("explain"):
            _explain([f"{intent.interface}: refused", *(f"  {line}" for line in passed_over)])
        # Whoever only gets this line is to know all of it.
        unsaid = [line for line in passed_over if line.partition(": ")[2] not in str(error)]
        if unsaid:
            error.args = ("; ".join([str(error), *unsaid]),)
        raise


def _explain(lines: Sequence[str]) -> None:
    for line in lines:
        # Names of other processes are in it.
        print(f"{_PROGRAM}: {printable(line)}", file=sys.stderr, flush=True)


def _close(fds: list[int]) -> None:
    for descriptor in fds:
        os.close(descriptor)


def _read_owner(settings: Settings, peer: socket.socket) -> tuple[Owner, int]:
    """The process at the other end, and its uid: it lives as long as the guest, we don't."""
    from vnet_lock.kernel import processes

    pid, uid = processes.read_peer(peer)
    if pid == os.getpid():
        raise BadInput("the socket is one of our own; whoever runs the guest must make it, and start us then")
    try:
        process = processes.read_process(settings, pid) if pid > 0 else None
    except OSError as error:
        raise VnetLockError(f"pid {pid} at the other end of the socket hides from us; run as root") from error
    if process is None:
        raise VnetLockError(
            "there is no process at the other end of the socket: it is not connected, or whoever made it"
            " is gone, or lives in another pid namespace"
        )
    name = processes.read_command(settings, pid)
    return Owner(OwnerKind.QEMU, name, processes.read_boot_id(settings), process=process), uid


# --- for a command that we become -----------------------------------------------------------------


def _become_command(settings: Settings, words: Words) -> NoReturn:
    """Claim for ourselves and exec: pid and start ticks survive that, so the claim is the command's."""
    from vnet_lock.front.program import ENDING, become, find_program
    from vnet_lock.kernel import processes

    intent = _read_intent(words)
    path = find_program(words.command[0], "install it, or say where it is")
    # It is part of one-line messages, and of a record.
    name = printable(os.path.basename(path))
    me = processes.this_process(settings)
    owner = Owner(OwnerKind.PROCESS, name, processes.read_boot_id(settings), process=me)
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    with _connected(settings, owner, intent, words) as (session, grant, connection):
        values = _values(connection)
        command = fill(words.command, lambda place: values[place])
        session.activate([grant])
        for descriptor in connection.descriptors:
            os.set_inheritable(descriptor, True)
        become(path, command)
    raise AssertionError("become() doesn't return")


def _leave(number: int, frame: object) -> NoReturn:
    """What is made is given back on the way out; a second signal must not cut that short."""
    del frame
    from vnet_lock.front.program import ENDING

    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    raise SystemExit(128 + number)


def _values(connection: Connection) -> dict[str, str]:
    """What each place in a command stands for."""
    values = {"ifname": connection.netdev or "", "mac": connection.mac or "", "path": connection.path or ""}
    for name, fds in (("fd", connection.fds), ("vhostfd", connection.vhost_fds)):
        numbers = [str(descriptor) for descriptor in fds]
        values |= {f"{name}{at}": number for at, number in enumerate(numbers)}
        values |= {name: numbers[0] if numbers else "", f"{name}s": ":".join(numbers)}
    return values
