"""Lets the host forward packets that come in on a device: settings that guests share."""

from __future__ import annotations

import os
from contextlib import suppress

from vnet_lock.errors import Unsupported, Vanished
from vnet_lock.journal import Sysctl, Sysctls
from vnet_lock.kernel import sysctl
from vnet_lock.ports import Share
from vnet_lock.settings import Settings

_IPV6 = "net/ipv6/conf"


def forward_ipv4(settings: Settings, share: Share, netdev: str) -> None:
    """Forward IPv4 from this device alone: what comes in on others stays with the host.

    Not net/ipv4/ip_forward: written, it changes all devices, those of other guests as well.
    """
    _set(settings, share, f"net/ipv4/conf/{netdev}/forwarding", "1")


def forward_ipv6(settings: Settings, share: Share, netdev: str) -> None:
    """Forward IPv6, which the kernel does on all devices or none (ip6_forward).

    A host that forwards listens to router advertisements only where accept_ra is 2, and drops the default
    routes that it has from others at once (rt6_purge_dflt_routers): so that comes first.
    """
    if not os.path.exists(f"{settings.proc}/sys/{_IPV6}"):
        raise Unsupported("this kernel has no IPv6; leave the guest's IPv6 address out")
    before = _read_all(settings)
    # Not devices to come: whose links they will be isn't known, a guest's say.
    listening = [name for name, pair in before.items() if pair == ("0", "1") and name != "default"]
    everywhere = sysctl.read(settings, f"{_IPV6}/all/forwarding")
    words = [f"all/forwarding={everywhere}"]
    if everywhere == "0":
        # Written last, "all" has set the others to the same.
        words += [f"{name}/forwarding={value}" for name, (value, _) in before.items() if value != "0"]
        words += [f"{name}/accept_ra=1" for name in listening]
    share(Sysctls(_IPV6, " ".join(words)))
    if everywhere == "0":
        for name in listening:
            with suppress(Vanished):
                sysctl.write(settings, f"{_IPV6}/{name}/accept_ra", "2")
        sysctl.write(settings, f"{_IPV6}/all/forwarding", "1")
    elif sysctl.read(settings, f"{_IPV6}/{netdev}/forwarding") == "0":
        raise Unsupported(
            f"{netdev} forwards no IPv6, though this host does; run: sysctl {_IPV6}/{netdev}/forwarding=1"
        )


def answer_for_others(settings: Settings, share: Share, netdev: str) -> None:
    """Answer neighbour solicitations on a device for the addresses that have a proxy there."""
    _set(settings, share, f"{_IPV6}/{netdev}/proxy_ndp", "1")


def _set(settings: Settings, share: Share, name: str, value: str) -> None:
    now = sysctl.read(settings, name)
    # Journalled also where it is right: another guest, whose claim ends first, may have made it so.
    share(Sysctl(name, now))
    if now != value:
        sysctl.write(settings, name, value)


def _read_all(settings: Settings) -> dict[str, tuple[str, str]]:
    """Each device's forwarding and accept_ra, and those of devices to come ("default")."""
    found = {}
    for name in sorted(os.listdir(f"{settings.proc}/sys/{_IPV6}")):
        with suppress(Vanished):  # other guests' devices come and go
            forwarding = sysctl.read(settings, f"{_IPV6}/{name}/forwarding")
            found[name] = forwarding, sysctl.read(settings, f"{_IPV6}/{name}/accept_ra")
    del found["all"]
    return found
