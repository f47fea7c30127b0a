"""Makes the macvtap that the macvlan and sriov ports give to a guest."""

from __future__ import annotations

import time

from vnet_lock.errors import VnetLockError
from vnet_lock.journal import MadeLink
from vnet_lock.ports import Job, Opened

# The prefix of the ifalias of every link that is ours; the claim's token follows.
ALIAS = "vnet-lock:"
# systemd-udevd is done with a new link within milliseconds; a loaded host takes longer.
_NODE_WAIT_S = 3.0


def open_macvtap(job: Job, lower: str, mode: str, mac: str) -> Opened:
    """Make a macvtap on ``lower`` with the guest's MAC, up, under the name that the intent asks for.

    It is made under a name of its own and renamed then, so that an undo never takes another's link
    for ours.
    """
    from vnet_lock.kernel import netlink

    name = link_name(job.token)
    final = job.intent.ifname or name
    alias = ALIAS + job.token
    job.journal((MadeLink(name, final, alias),))
    netlink.add_macvtap(name, lower, mode, mac, alias)
    if final != name:
        netlink.rename_link(name, final)
    netlink.set_link(final, up=True)
    _wait_for_node(job, final)
    return Opened(netdev=final, mac=mac)


def link_name(token: str) -> str:
    """A link name (at most 15 bytes) that no other claim's link has."""
    return f"vl{token[:12]}"


def is_link_name(name: str) -> bool:
    """Whether a link is one of ours that hasn't got the name yet that it is made for."""
    import re

    return re.fullmatch("vl[0-9a-f]{12}", name) is not None


def random_mac() -> str:
    """A locally administered MAC under QEMU's and libvirt's usual prefix."""
    import os

    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in os.urandom(3))


def _wait_for_node(job: Job, netdev: str) -> None:
    """Wait until the tap's device node is there: libvirt waits for it only once it exists.

    A container's /dev may never have it; then whoever opens it makes a node of his own.
    """
    import os

    with open(f"{job.settings.sys}/class/net/{netdev}/ifindex", encoding="ascii") as file:
        node = f"{job.settings.dev}/tap{int(file.read())}"
    deadline = time.monotonic() + _NODE_WAIT_S
    while not os.path.exists(node):
        if time.monotonic() > deadline:
            if job.intent.ifname is None:
                return
            raise VnetLockError(f"{netdev}: {node} did not appear; is devtmpfs mounted, or udev running?")
        time.sleep(0.005)
