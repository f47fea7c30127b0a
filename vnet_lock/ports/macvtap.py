"""Makes the macvtap that the macvlan and sriov ports give to a guest, or the macvlan for a packet socket."""

from __future__ import annotations

import os
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
    job.once_it_runs(lambda: netlink.set_link(final, up=True))
    _wait_for_node(job, final)
    return Opened(netdev=final, mac=mac)


def open_macvlan(job: Job, lower: str, mode: str, mac: str, namespace: int | None = None) -> Opened:
    """Make a macvlan on ``lower`` with the guest's MAC, up, alone in a namespace that nobody else sees.

    The host's stack has no part in it then, and never answers for the guest. Where ``lower`` isn't in this
    namespace but in the one that the descriptor ``namespace`` is of, the macvlan is made there, too, and the
    descriptor becomes the result's.
    """
    from vnet_lock.kernel import netlink
    from vnet_lock.kernel.netns import call_in, make_namespace

    name, alias = link_name(job.token), ALIAS + job.token
    job.journal((MadeLink(name, name, alias),))
    at = make_namespace(job.settings) if namespace is None else namespace
    try:
        if namespace is None:
            netlink.add_macvlan(name, lower, mode, mac, alias, namespace=at)
        else:
            call_in(at, lambda: netlink.add_macvlan(name, lower, mode, mac, alias))
        call_in(at, lambda: netlink.set_link(name, up=True))
    except BaseException:
        if namespace is None:
            os.close(at)
        raise
    return Opened(netdev=name, mac=mac, netns=at)


def link_name(token: str) -> str:
    """A link name (at most 15 bytes) that no other claim's link has."""
    return f"vl{token[:12]}"


def is_link_name(name: str) -> bool:
    """Whether a link is one of ours that hasn't got the name yet that it is made for."""
    import re

    return re.fullmatch("vl[0-9a-f]{12}", name) is not None


def random_mac() -> str:
    """A locally administered MAC under QEMU's and libvirt's usual prefix."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in os.urandom(3))


def _wait_for_node(job: Job, netdev: str) -> None:
    """Wait until the tap's device node is there: libvirt waits for it only once it exists.

    A container's /dev may never have it; then whoever opens it makes a node of his own.
    """
    with open(f"{job.settings.sys}/class/net/{netdev}/ifindex", encoding="ascii") as file:
        node = f"{job.settings.dev}/tap{int(file.read())}"
    deadline = time.monotonic() + _NODE_WAIT_S
    while not os.path.exists(node):
        if time.monotonic() > deadline:
            if job.intent.ifname is None:
                return
            raise VnetLockError(f"{netdev}: {node} did not appear; is devtmpfs mounted, or udev running?")
        time.sleep(0.005)
