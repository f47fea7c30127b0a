"""A packet socket with the kernel's vhost-net as its data plane: QEMU's vhost-user, with us at its other end.

VLAN-tagged packets for the guest are lost (vhost-net has no place for a packet socket's tag), and a guest
can't be migrated (there is no log of what was written).
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

from vnet_lock.backends import Connection
from vnet_lock.backends.tap_vhost import missing
from vnet_lock.combination import Combination, Port
from vnet_lock.errors import VnetLockError
from vnet_lock.ports import Opened
from vnet_lock.request import Intent
from vnet_lock.settings import Settings

__all__ = ["connect", "missing"]


def connect(settings: Settings, intent: Intent, opened: Opened, combination: Combination) -> Connection:
    """Start the process at the other end of the socket that QEMU finds at ``opened.path``.

    It ends when the descriptor that QEMU inherits is gone, and the device's namespace with it.
    """
    if opened.netdev is None or opened.netns is None or opened.path is None:
        raise VnetLockError(f"{intent.interface}: {combination.text} has no device to open")
    from vnet_lock.datapath import launch

    with ExitStack() as stack:
        listener = stack.enter_context(listen(opened.path))
        is_macvlan = combination.port in (Port.MACVLAN, Port.VETH_MACVLAN)
        queues = _open_queues(opened.netns, opened.netdev, intent.queues, not is_macvlan)
        for one in queues:
            stack.enter_context(one)
        life, kept = os.pipe()
        stack.callback(os.close, life)
        try:
            process = launch.start(
                settings,
                "vhost_user",
                [f"{settings.dev}/vhost-net"],
                {
                    "listener": listener.fileno(),
                    "life": life,
                    "netns": opened.netns,
                    **{f"queue{at}": one.fileno() for at, one in enumerate(queues)},
                },
            )
        except BaseException:
            os.close(kept)
            raise
    return Connection(
        combination, opened.mac, netdev=opened.netdev, path=opened.path, kept=(kept,), datapath=process
    )


def listen(path: str) -> socket.socket:
    """A unix socket that we alone may connect to, from its first moment on."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        # Its node gets the mode that the socket has (unix_bind_bsd).
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        listener.listen()
    except OSError as error:
        listener.close()
        raise VnetLockError(f"cannot listen at {path}: {error.strerror}") from error
    return listener


def _open_queues(namespace: int, netdev: str, queues: int, is_promiscuous: bool) -> list[socket.socket]:
    from vnet_lock.datapath.packet_queues import share
    from vnet_lock.kernel import netns, packet

    opened = netns.call_in(
        namespace, lambda: packet.open_queues(netdev, queues, is_promiscuous=is_promiscuous)
    )
    share(opened)
    return opened
