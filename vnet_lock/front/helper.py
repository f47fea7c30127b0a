"""qemu-net-helper: opens a network for another process and hands the descriptors over a unix socket.

The claim is the other process's. Until the descriptors are on their way it is reserved by us: should we die
before, nobody has to wait for that process's end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vnet_lock.combination import Backend, Port
from vnet_lock.errors import BadInput, Refused, Unsupported, Vanished, VnetLockError
from vnet_lock.front.command import print_error, serve
from vnet_lock.model import Intent, Owner, OwnerKind
from vnet_lock.settings import DEFAULT, Settings

if TYPE_CHECKING:
    import socket

    from vnet_lock.backends import Connection

_PROGRAM = "qemu-net-helper"
_USAGE = """\
usage: qemu-net-helper --mode=MODE --dev=DEVICE [OPTIONS] (--socketpair=FD | --fd=FD)

Opens the best connection that policy, device and protocols allow, claims it for the process at the
other end of the socket, and sends the descriptors there. Anything but 0 means that there are none.

  --mode=MODE          veb (or bridge), vepa, private
  --dev=DEVICE         a network device or a PCI address; again for more, tried in order
  --protocols=LIST     what the receiver can use: tap, vhost; separated by commas
  --port=PORT  --mac=MAC  --queues=N  --vlan=ID
  --socketpair=FD      one line of JSON with all descriptors beside it; an error comes the same way
  --fd=FD              as QEMU's -netdev tap,helper=…: one byte with one tap descriptor
  --help, --version
"""
# What becomes a key of the same name of QEMU's -netdev host, where it is checked.
_KEYS = ("mode", "dev", "protocols", "port", "mac", "queues", "vlan")
_TARGETS = ("socketpair", "fd")
# A receiver that doesn't read: a message this small only ever waits for one.
_SEND_S = 10.0
# As many descriptors go beside one message (SCM_MAX_FD, include/net/scm.h).
_MOST_FDS = 253


def main(args: Sequence[str] | None = None) -> int:
    """Serve one request; 0 only if the descriptors were sent (or help was all that was asked for)."""
    words = sys.argv[1:] if args is None else args
    return serve(_PROGRAM, lambda: run(words, DEFAULT))


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
    words, problem = _read_words(args)
    target = next((name for name in _TARGETS if name in words), None)
    if target is None:
        raise BadInput(f"{problem or '--socketpair=FD or --fd=FD is missing'}; see: qemu-net-helper --help")
    as_json = target == "socketpair"
    with _open_socket(words[target][0], target) as peer:
        try:
            if problem:
                raise BadInput(f"{problem}; see: qemu-net-helper --help")
            _serve(settings, peer, _read_intent(words, as_json), as_json)
        except BaseException as error:
            if as_json:
                _send_error(peer, error)
            raise
    return 0


def _read_words(args: Sequence[str]) -> tuple[dict[str, list[str]], str]:
    """The values of each word, and what is wrong with the first odd one: where to say so is among them."""
    words: dict[str, list[str]] = {}
    problems: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        # QEMU adds these to any helper's arguments.
        if word == "--use-vnet" or word.startswith("--br="):
            continue
        if not word.startswith("--") or name not in (*_KEYS, *_TARGETS):
            problems.append(f"unknown word {word!r}")
            continue
        if not equals:
            value = rest.pop(0) if rest else ""
        if not value:
            problems.append(f"--{name} has no value")
            continue
        words.setdefault(name, []).append(value)
    if sum(len(words.get(name, ())) for name in _TARGETS) > 1:
        problems.append("only one of --socketpair=FD and --fd=FD can be, and once")
    return words, problems[0] if problems else ""


def _read_intent(words: dict[str, list[str]], as_json: bool) -> Intent:
    from vnet_lock.qemu_argv import read_argv

    keys = ["host", "id=net0"]
    for name in _KEYS:
        for value in words.get(name, []):
            text = value.replace(",", ":") if name == "protocols" else value.replace(",", ",,")
            keys.append(f"{name}={text}")
    if "protocols" not in words:
        keys.append("protocols=tap:vhost" if as_json else "protocols=tap")
    network = ",".join(keys)
    try:
        intent = read_argv(["-netdev", network]).intents[0]
    except BadInput as error:
        raise BadInput(str(error).removeprefix(f"-netdev {network}: ")) from error
    if not as_json and intent.queues > 1:
        raise BadInput("--fd takes one descriptor, so there is no --queues; use --socketpair")
    if 2 * intent.queues > _MOST_FDS:
        raise BadInput(f"--queues={intent.queues}: a socket takes those of {_MOST_FDS // 2} queues at once")
    # QEMU opens vhost itself beside a descriptor that it got by --fd.
    unfit = (Backend.VFIO, Backend.USER) if as_json else set(Backend) - {Backend.TAP}
    backends = tuple(backend for backend in intent.backends if backend not in unfit)
    if not backends:
        raise Unsupported(f"--protocols={words['protocols'][0]} has no descriptor to hand over; add tap")
    return replace(intent, backends=backends)


def _open_socket(text: str, name: str) -> socket.socket:
    """The socket that we were started with; ours from now on."""
    import socket

    if not (text.isascii() and text.isdecimal()):
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


def _serve(settings: Settings, peer: socket.socket, intent: Intent, as_json: bool) -> None:
    owner = _read_owner(settings, peer)

    from vnet_lock.session import Session

    session = Session(settings)
    grants = session.acquire(owner, [intent], beside=True)  # one call for each interface
    fds: list[int] = []
    try:
        connection = session.connect(grants[0])
        fds += connection.descriptors
        if not connection.fds:
            raise Unsupported(f"{connection.combination.text} has no descriptor to hand over")
        _send(peer, _message(connection) if as_json else b"\0", fds if as_json else fds[:1])
        session.activate(grants)
    except BaseException:
        # A device isn't free while we have it open ourselves.
        _close(fds)
        grants[0].close()
        try:
            session.give_back(grants)
        except VnetLockError as error:
            print_error(_PROGRAM, error)
        raise
    _close(fds)
    if not (as_json or intent.mac or connection.combination.port is Port.BRIDGE):
        # This protocol has no word for it, and a macvtap hears nothing that is for another MAC.
        print_error(
            _PROGRAM, f"the guest's device needs mac={connection.mac}; or choose one for both by --mac="
        )


def _close(fds: list[int]) -> None:
    for descriptor in fds:
        os.close(descriptor)


def _read_owner(settings: Settings, peer: socket.socket) -> Owner:
    """The process at the other end (unix(7), SO_PEERCRED): it lives as long as the guest, we don't."""
    import socket
    import struct

    from vnet_lock.kernel import processes

    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", credentials)[0]
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
    return Owner(OwnerKind.QEMU, name, processes.read_boot_id(settings), process=process)


def _message(connection: Connection) -> bytes:
    import json
    import socket

    queues = len(connection.fds)
    names = ["tap"] * queues + ["vhost"] * len(connection.vhost_fds)
    # {N} stands for the number that the receiver gets for the N-th descriptor.
    places = [f"{{{index}}}" for index in range(len(names))]
    taps, vhosts = ":".join(places[:queues]), ":".join(places[queues:])
    many = "s" if queues > 1 else ""
    vhost = f",vhost=on,vhostfd{many}={vhosts}" if vhosts else ""
    try:
        ifindex = socket.if_nametoindex(connection.netdev) if connection.netdev else None
    except OSError as error:
        raise Vanished(f"{connection.netdev} is gone already; see: ip link") from error
    message = {
        "version": 1,
        "combination": connection.combination.text,
        "ifname": connection.netdev,
        "ifindex": ifindex,
        "mac": connection.mac,
        "features": {"vnet_hdr": True, "vhost": bool(vhosts), "queues": queues},
        "fds": names,
        "qemu": ["-netdev", f"tap,id=net0,fd{many}={taps}{vhost}"],
    }
    return json.dumps(message).encode() + b"\n"


def _send(peer: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    import socket

    try:
        sent = socket.send_fds(peer, [data], list(fds))
        if sent < len(data):
            peer.sendall(data[sent:])
    except OSError as error:
        raise VnetLockError(f"the descriptors could not be sent: {error.strerror or error}") from error


def _kind_of(error: BaseException) -> str:
    kinds = {Refused: "held", BadInput: "input", Unsupported: "unsupported"}
    return next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "failed")


def _send_error(peer: socket.socket, error: BaseException) -> None:
    import json

    text = str(error) if isinstance(error, VnetLockError) else f"{type(error).__name__}: {error}"
    message = {"version": 1, "error": {"kind": _kind_of(error), "message": text}}
    try:
        peer.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # the exit code says it, too
