"""A packet socket, with a relay between it and QEMU's -netdev stream or dgram: any NIC model.

The host's stack has no part in it. What the guest gets is whole: no offloads reach it.
"""

from __future__ import annotations

import os
import socket

from vnet_lock.backends import Connection
from vnet_lock.combination import Combination, Port
from vnet_lock.errors import VnetLockError
from vnet_lock.ports import Opened
from vnet_lock.request import Intent
from vnet_lock.settings import Settings

# Some hundred frames, which the kernel counts with its own overhead; more would make a slow guest's network
# slow to answer, too.
_BUFFER = 1 << 20


def missing(settings: Settings) -> str:
    """Whether the kernel has packet sockets."""
    if os.path.exists(settings.proc + "/net/packet"):
        return ""
    return "this kernel has no packet sockets; run: modprobe af_packet"


def connect(settings: Settings, intent: Intent, opened: Opened, combination: Combination) -> Connection:
    """Start the relay, and return QEMU's end of it; it ends when nobody has that open any more."""
    if opened.netdev is None or opened.netns is None:
        raise VnetLockError(f"{intent.interface}: {combination.text} has no device to open")
    from vnet_lock.datapath import launch
    from vnet_lock.kernel import netns, packet

    netdev, is_promiscuous = opened.netdev, combination.port is not Port.MACVLAN
    (device,) = netns.call_in(
        opened.netns,
        lambda: packet.open_queues(
            netdev, has_header=True, has_auxdata=True, is_promiscuous=is_promiscuous, buffer=_BUFFER
        ),
    )
    kind = socket.SOCK_SEQPACKET if intent.datagrams else socket.SOCK_STREAM
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with device, ours, theirs:
        descriptors = {"packet": device.fileno(), "guest": ours.fileno(), "netns": opened.netns}
        process = launch.start(settings, "relay", [], descriptors)
        return Connection(combination, opened.mac, (theirs.detach(),), netdev=netdev, datapath=process)
