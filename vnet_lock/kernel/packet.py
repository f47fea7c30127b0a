"""Opens packet sockets (packet(7)): all that comes to a device of this namespace, whole frames."""

from __future__ import annotations

import errno
import socket
import struct

from vnet_lock.errors import Unsupported, Vanished, VnetLockError

# include/uapi/linux/if_packet.h, if_ether.h, asm-generic/socket.h
_SOL_PACKET, _ADD_MEMBERSHIP, _IGNORE_OUTGOING, _MR_PROMISC = 263, 1, 23, 1
_AUXDATA, _VNET_HDR = 8, 15
_ETH_P_ALL = 0x0003
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER = 4 << 20


def open_queues(
    netdev: str,
    queues: int = 1,
    *,
    has_header: bool = False,
    has_auxdata: bool = False,
    is_promiscuous: bool = True,
) -> list[socket.socket]:
    """So many sockets on one device, which see all packets to it and none of their own.

    With ``has_header`` a virtio_net_hdr of 10 bytes is before each frame, both ways; with ``has_auxdata``
    each comes with a tpacket_auxdata, where its VLAN tag is. A macvlan gets no more by being promiscuous, but
    the device below it is so, too, then. What there is no room for (4 MiB) is dropped.
    """
    opened: list[socket.socket] = []
    try:
        for _ in range(queues):
            one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # deaf until it is bound to its device
            opened.append(one)
            one.setsockopt(_SOL_PACKET, _VNET_HDR, int(has_header))
            one.setsockopt(_SOL_PACKET, _AUXDATA, int(has_auxdata))
            if is_promiscuous:
                membership = struct.pack("=IHH8s", socket.if_nametoindex(netdev), _MR_PROMISC, 0, b"")
                one.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, membership)
            _bind(one, netdev)
    except OSError as error:
        for one in opened:
            one.close()
        # if_nametoindex says it without a number.
        if error.errno in (errno.ENODEV, errno.ENXIO, None):
            raise Vanished(f"there is no network device {netdev} (any more)") from error
        if error.errno in (errno.EPERM, errno.EAFNOSUPPORT):
            raise Unsupported(f"no packet socket on {netdev}: {error.strerror}; run as root") from error
        raise VnetLockError(f"no packet socket on {netdev}: {error.strerror}") from error
    return opened


def _bind(one: socket.socket, netdev: str) -> None:
    one.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
    one.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    one.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    one.bind((netdev, _ETH_P_ALL))
