"""Lets the host forward packets that come in on a device: settings that guests share."""

from __future__ import annotations

from vnet_lock.journal import Sysctl
from vnet_lock.kernel import sysctl
from vnet_lock.ports import Share
from vnet_lock.settings import Settings


def forward_ipv4(settings: Settings, share: Share, netdev: str) -> None:
    """Forward IPv4 from this device alone: what comes in on others stays with the host.

    Not net/ipv4/ip_forward: written, it changes all devices, those of other guests as well.
    """
    _set(settings, share, f"net/ipv4/conf/{netdev}/forwarding", "1")


def _set(settings: Settings, share: Share, name: str, value: str) -> None:
    now = sysctl.read(settings, name)
    # Journalled also where it is right: another guest, whose claim ends first, may have made it so.
    share(Sysctl(name, now))
    if now != value:
        sysctl.write(settings, name, value)
