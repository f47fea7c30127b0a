"""A pair of joined devices: the guest's addresses are routed to one, a macvlan stands on the other."""

from __future__ import annotations

import os
from collections.abc import Iterator

from vnet_lock.combination import Backend
from vnet_lock.journal import MadeLink
from vnet_lock.ports import Job, Opened
from vnet_lock.ports.macvtap import ALIAS, link_name, open_macvlan, open_macvtap, random_mac
from vnet_lock.ports.routed import disable_ipv6, lead_to, uplinks
from vnet_lock.request import Intent
from vnet_lock.situation import Candidate, Situation


def candidates(intent: Intent, backend: Backend, situation: Situation) -> Iterator[Candidate]:
    """Each device that the intent names as the way out."""
    del backend
    return uplinks(intent, situation)


def open_port(job: Job) -> Opened:
    """Make the pair, the host's end and the guest's, and lead the guest's addresses to the first.

    In passthru mode all that comes to the guest's end is the guest's; the host's stack, which sees broadcasts
    there, too, has neither ARP nor IPv6 on it. For a packet socket that end is in a namespace with the
    macvlan; the pair goes with either.
    """
    from vnet_lock.kernel import netlink

    mac = job.intent.mac or random_mac()
    host, guest = (link_name(job.token) + end for end in "hg")
    job.journal((MadeLink(host, host, ALIAS + job.token),))
    netlink.add_veth(host, guest, ALIAS + job.token)
    lead_to(job, host)
    combination = job.assignment.combination
    if not (combination and combination.backend.has_socket):
        _set_up(job, guest)
        return open_macvtap(job, guest, "passthru", mac)
    from vnet_lock.kernel.netns import call_in, make_namespace

    namespace = make_namespace(job.settings)
    try:
        netlink.move_link(guest, namespace)
        call_in(namespace, lambda: _set_up(job, guest))
        return open_macvlan(job, guest, "passthru", mac, namespace)
    except BaseException:
        os.close(namespace)
        raise


def _set_up(job: Job, guest: str) -> None:
    from vnet_lock.kernel import netlink

    disable_ipv6(job.settings, guest)
    netlink.set_link(guest, arp=False, addrgenmode="none", up=True)
