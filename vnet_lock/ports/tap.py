"""Makes the plain tap that the bridge and none ports give to a guest."""

from __future__ import annotations

from vnet_lock.journal import MadeLink
from vnet_lock.ports import Job
from vnet_lock.ports.macvtap import ALIAS, link_name


def make_tap(job: Job) -> str:
    """Make a tap, down, under the name that the intent asks for, and return its name."""
    from vnet_lock.kernel import netlink

    name = link_name(job.token)
    final = job.intent.ifname or name
    alias = ALIAS + job.token
    job.journal((MadeLink(name, final, alias),))
    netlink.add_tap(name, alias, queues=job.intent.queues)
    if final != name:
        netlink.rename_link(name, final)
    return final
