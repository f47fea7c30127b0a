"""What qemu-net-helper says over a socket: a connection with its descriptors, or why there is none."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence

from vnet_lock.backends import Connection
from vnet_lock.combination import Backend
from vnet_lock.errors import BadInput, Refused, Unsupported, Vanished, VnetLockError
from vnet_lock.qemu_rewrite import Connected
from vnet_lock.request import Intent

VERSION = 1
# What each backend's own descriptors are.
_NOUNS = {
    Backend.TAP: "tap",
    Backend.TAP_VHOST: "tap",
    Backend.SOCKET: "socket",
    Backend.PASST: "passt",
}
# The guest's memory as whoever runs it will say it; not the first letter, where JSON would begin.
_MEMORY = ("-m", "size={memory}")


def send_connection(peer: socket.socket, connection: Connection, intent: Intent) -> None:
    """The message with all descriptors beside it; VnetLockError where it can't be sent."""
    send(peer, encode(connection, intent), connection.descriptors)


def encode(connection: Connection, intent: Intent) -> bytes:
    """One line of JSON; Vanished where the link is gone meanwhile."""
    backend = connection.combination.backend
    names = descriptor_names(connection)
    message = {
        "version": VERSION,
        "combination": connection.combination.text,
        "ifname": connection.netdev,
        "ifindex": _read_ifindex(connection),
        "mac": connection.mac,
        "features": {
            "vnet_hdr": backend in (Backend.TAP, Backend.TAP_VHOST) and not intent.raw,
            "vhost": backend in (Backend.TAP_VHOST, Backend.SOCKET_VHOST),
            "queues": intent.queues,
        },
        "fds": names,
        "qemu": qemu_words(connection, intent),
    }
    return json.dumps(message).encode() + b"\n"


def descriptor_names(connection: Connection) -> list[str]:
    """What each descriptor is, in the order in which they are sent.

    ``keep`` is one that the receiver only keeps open: who serves it ends with that.
    """
    names = [_NOUNS.get(connection.combination.backend, "keep")] * len(connection.fds)
    names += ["vhost"] * len(connection.vhost_fds)
    return names + ["keep"] * (len(connection.descriptors) - len(names))


def qemu_words(connection: Connection, intent: Intent) -> list[str]:
    """As vnet-qemu would write them, with {N} for the number that the receiver gets for the N-th descriptor.

    Where the guest's memory must be shared, {memory} is its size (like 2G), and no other -m is to be there.
    """
    from vnet_lock.dataclass import replace
    from vnet_lock.front.wrapper import Shown
    from vnet_lock.qemu_argv import read_argv
    from vnet_lock.qemu_rewrite import rewrite

    count = len(connection.fds)
    places = [f"{{{at}}}" for at in range(len(connection.descriptors))]
    placed: Connected = Shown(
        connection.combination,
        connection.mac,
        fds=tuple(places[:count]),
        vhost_fds=tuple(places[count : count + len(connection.vhost_fds)]),
        pci=None,
        path=connection.path,
    )
    memory = [] if connection.path is None else _MEMORY
    # Only its place on the line matters: what it wants, it has.
    argv = read_argv([*memory, "-netdev", f"host,id={intent.interface},mode=nat"])
    argv = replace(argv, hosts=(replace(argv.hosts[0], intent=intent),))
    words = rewrite(argv, {intent.interface: placed})
    return [word.replace("size={memory}", "{memory}") if word == _MEMORY[1] else word for word in words]


def _read_ifindex(connection: Connection) -> int | None:
    """The link's number in this namespace; None where it isn't there: a user network, a packet socket."""
    if connection.netdev is None or connection.combination.backend.has_socket:
        return None
    try:
        return socket.if_nametoindex(connection.netdev)
    except OSError as error:
        raise Vanished(f"{connection.netdev} is gone already; see: ip link") from error


def send(peer: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """All of the data, the descriptors beside its first byte; VnetLockError where that can't be done."""
    try:
        sent = socket.send_fds(peer, [data], list(fds))
        if sent < len(data):
            peer.sendall(data[sent:])
    except OSError as error:
        raise VnetLockError(f"the descriptors could not be sent: {error.strerror or error}") from error


def kind_of(error: BaseException) -> str:
    """The word for a refusal's kind."""
    kinds = {Refused: "held", BadInput: "input", Unsupported: "unsupported"}
    return next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "failed")


def send_error(peer: socket.socket, error: BaseException) -> None:
    """A refusal, where there is still somebody to hear it."""
    text = str(error) if isinstance(error, VnetLockError) else f"{type(error).__name__}: {error}"
    message = {"version": VERSION, "error": {"kind": kind_of(error), "message": text}}
    try:
        peer.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # the exit code says it, too
