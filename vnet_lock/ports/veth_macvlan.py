"""A pair of joined devices: the guest's addresses are routed to one, a macvtap stands on the other."""

from __future__ import annotations

from collections.abc import Iterator

from vnet_lock.combination import Backend
from vnet_lock.journal import MadeLink
from vnet_lock.model import Intent
from vnet_lock.planning import Candidate, Situation
from vnet_lock.ports import Job, Opened
from vnet_lock.ports.macvtap import ALIAS, link_name, open_macvtap, random_mac
from vnet_lock.ports.routed import lead_to, uplinks


def candidates(intent: Intent, backend: Backend, situation: Situation) -> Iterator[Candidate]:
    """Each device that the intent names as the way out."""
    del backend
    return uplinks(intent, situation)


def open_port(job: Job) -> Opened:
    """Make the pair, the host's end and the guest's, and lead the guest's addresses to the first.

    In passthru mode all that comes to the guest's end is the guest's, none of it the host's own stack's.
    """
    from vnet_lock.kernel import netlink

    host, guest = (link_name(job.token) + end for end in "hg")
    job.journal((MadeLink(host, host, ALIAS + job.token),))
    netlink.add_veth(host, guest, ALIAS + job.token)
    lead_to(job, host)
    netlink.set_link(guest, arp=False, addrgenmode="none", up=True)
    return open_macvtap(job, guest, "passthru", job.intent.mac or random_mac())
