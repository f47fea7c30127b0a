"""A tap's descriptors with the kernel's vhost-net as its data plane."""

from __future__ import annotations

import os

from vnet_lock.backends import Connection
from vnet_lock.backends.tap import open_queues
from vnet_lock.combination import Combination
from vnet_lock.ports import Opened
from vnet_lock.request import Intent
from vnet_lock.settings import Settings


def missing(settings: Settings) -> str:
    """Whether vhost-net is there and may be opened."""
    node = settings.dev + "/vhost-net"
    if not os.path.exists(node):
        return f"there is no {node}; run: modprobe vhost_net"
    if not os.access(node, os.R_OK | os.W_OK):
        return f"{node} may not be opened by this user"
    return ""


def connect(settings: Settings, intent: Intent, opened: Opened, combination: Combination) -> Connection:
    """Open a tap and a vhost descriptor for each queue."""
    from vnet_lock.kernel import nodes

    fds = open_queues(settings, intent, opened, combination)
    try:
        vhost_fds = tuple(nodes.open_vhost_net(settings, intent.queues))
    except BaseException:
        for descriptor in fds:
            os.close(descriptor)
        raise
    return Connection(combination, opened.mac, fds, vhost_fds, netdev=opened.netdev)
