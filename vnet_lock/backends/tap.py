"""A tap's or macvtap's descriptors, handed to QEMU."""

from __future__ import annotations

from vnet_lock.backends import Connection
from vnet_lock.combination import Combination, Port
from vnet_lock.errors import VnetLockError
from vnet_lock.ports import Opened
from vnet_lock.request import Intent
from vnet_lock.settings import Settings


def missing(settings: Settings) -> str:
    """Nothing is needed beyond what the port itself needs."""
    del settings
    return ""


def connect(settings: Settings, intent: Intent, opened: Opened, combination: Combination) -> Connection:
    """Open one descriptor for each queue."""
    return Connection(
        combination, opened.mac, open_queues(settings, intent, opened, combination), netdev=opened.netdev
    )


def open_queues(
    settings: Settings, intent: Intent, opened: Opened, combination: Combination
) -> tuple[int, ...]:
    """The tap's descriptors: a plain tap's, or those of a macvtap."""
    from vnet_lock.kernel import nodes

    if opened.netdev is None:
        raise VnetLockError(f"{intent.interface}: {combination.text} has no link to open")
    open_link = nodes.open_tap if combination.port in (Port.BRIDGE, Port.NONE) else nodes.open_macvtap
    return tuple(open_link(settings, opened.netdev, intent.queues, has_header=not intent.raw))
