"""qemu-net-helper: opens a network for another process and hands the descriptors over a unix socket."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vnet_lock.errors import BadInput, Refused, Unsupported, VnetLockError
from vnet_lock.model import Intent, Owner, OwnerKind
from vnet_lock.settings import DEFAULT, Settings

if TYPE_CHECKING:
    import socket

    from vnet_lock.backends import Connection

_USAGE = """\
usage: qemu-net-helper --mode=MODE --dev=DEVICE [OPTIONS] (--socketpair=FD | --fd=FD)

Opens the best connection that policy, device and protocols allow, claims it for the process at the
other end of the socket, and sends the descriptors there.

  --mode=MODE          veb (or bridge), vepa, private
  --dev=DEVICE         a network device or a PCI address; again for more, tried in order
  --protocols=LIST     of tap, vhost; separated by commas
  --port=PORT  --mac=MAC  --queues=N  --vlan=ID
  --socketpair=FD      one line of JSON with all descriptors beside it; an error comes the same way
  --fd=FD              as QEMU's -netdev tap,helper=…: one byte with one tap descriptor
  --help, --version
"""
# What becomes a key of the same name of QEMU's -netdev host, where it is checked.
_KEYS = ("mode", "dev", "protocols", "port", "mac", "queues", "vlan")


def main(args: Sequence[str] | None = None) -> int:
    """Serve one request; never 0 unless the descriptors were sent."""
    try:
        return run(sys.argv[1:] if args is None else args, DEFAULT)
    except VnetLockError as error:
        print(f"qemu-net-helper: {error}", file=sys.stderr)
        return error.exit_code


def run(args: Sequence[str], settings: Settings) -> int:
    """As ``main``, with errors raised."""
    if "--help" in args or "-h" in args:
        print(_USAGE, end="")
        return 0
    if "--version" in args:
        from importlib.metadata import version  # 40 ms

        print(f"qemu-net-helper {version('vnet-lock')}")
        return 0
    words = _read_words(args)
    targets = [name for name in ("socketpair", "fd") if name in words]
    if len(targets) != 1:
        raise BadInput("one of --socketpair=FD and --fd=FD is needed; see: qemu-net-helper --help")
    as_json = targets == ["socketpair"]
    with _open_socket(words[targets[0]][-1], targets[0]) as peer:
        try:
            _serve(settings, peer, _read_intent(words, as_json), as_json)
        except VnetLockError as error:
            if as_json:
                _send_error(peer, error)
            raise
    return 0


def _read_words(args: Sequence[str]) -> dict[str, list[str]]:
    known = (*_KEYS, "socketpair", "fd")
    words: dict[str, list[str]] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        # QEMU and libvirt add these to any bridge helper's arguments.
        if word == "--use-vnet" or name == "br":
            continue
        if not word.startswith("--") or name not in known:
            raise BadInput(f"unknown word {word!r}; see: qemu-net-helper --help")
        if not equals:
            value = rest.pop(0) if rest else ""
        if not value:
            raise BadInput(f"--{name} has no value; see: qemu-net-helper --help")
        words.setdefault(name, []).append(value)
    return words


def _read_intent(words: dict[str, list[str]], as_json: bool) -> Intent:
    from vnet_lock.qemu_argv import read_argv

    keys = ["host", "id=net0"]
    for name in _KEYS:
        for value in words.get(name, []):
            text = value.replace(",", ":") if name == "protocols" else value.replace(",", ",,")
            keys.append(f"{name}={text}")
    if "protocols" not in words:
        keys.append("protocols=tap:vhost" if as_json else "protocols=tap")
    intent = read_argv(["-netdev", ",".join(keys)]).intents[0]
    if not as_json and intent.queues > 1:
        raise BadInput("--fd takes one descriptor, so there is no --queues; use --socketpair")
    return intent


def _open_socket(text: str, name: str) -> socket.socket:
    import socket

    try:
        return socket.socket(fileno=int(text))
    except (ValueError, OSError, OverflowError) as error:
        raise BadInput(f"--{name}={text} is not the number of an open socket") from error


def _serve(settings: Settings, peer: socket.socket, intent: Intent, as_json: bool) -> None:
    import os

    from vnet_lock.session import Session

    owner = _read_owner(settings, peer)
    session = Session(settings)
    grants = session.acquire(owner, [intent], beside=True)  # one call for each interface
    try:
        connection = session.connect(grants[0])
        if connection.pci is not None:
            raise Unsupported("VFIO has no descriptor to hand over; use vnet-qemu, or --protocols=tap,vhost")
        fds = [*connection.fds, *connection.vhost_fds]
        _send(peer, _message(connection) if as_json else b"\0", fds if as_json else fds[:1])
        for descriptor in fds:
            os.close(descriptor)
    except BaseException:
        session.give_back(grants)
        raise


def _read_owner(settings: Settings, peer: socket.socket) -> Owner:
    """The process at the other end (unix(7), SO_PEERCRED): it lives as long as the guest, we don't."""
    import socket
    import struct

    from vnet_lock.kernel import processes

    try:
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError as error:
        raise BadInput(f"the descriptor is no unix socket: {error.strerror}") from error
    pid = struct.unpack("3i", credentials)[0]
    process = processes.read_process(settings, pid) if pid > 0 else None
    if process is None:
        raise VnetLockError("the process at the other end of the socket is not to be seen from here")
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
    message = {
        "version": 1,
        "combination": connection.combination.text,
        "ifname": connection.netdev,
        "ifindex": socket.if_nametoindex(connection.netdev) if connection.netdev else None,
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
        raise VnetLockError(f"the descriptors could not be sent: {error.strerror}") from error


def _send_error(peer: socket.socket, error: VnetLockError) -> None:
    import json

    kinds = {Refused: "held", BadInput: "input", Unsupported: "unsupported"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "failed")
    message = {"version": 1, "error": {"kind": kind, "message": str(error)}}
    try:
        peer.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # the exit code says it, too
