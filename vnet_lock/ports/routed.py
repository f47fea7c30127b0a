"""What a routed guest has, whatever its link is: a route to each of its own addresses, and a way out.

The host is the guest's router on a link that they have for themselves. There it is 169.254.1.1, and answers
for every other IPv4 address (proxy ARP), so that any gateway and any prefix length serve; and it is fe80::1.
On the uplink it answers for the guest's own addresses, so that its neighbours find the guest without a route.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from vnet_lock.errors import Refused, Vanished
from vnet_lock.journal import ProxyNeighbour
from vnet_lock.model import Mode, Resource, Wanted
from vnet_lock.ports import Job
from vnet_lock.ports.macvlan import find_nic
from vnet_lock.request import Intent
from vnet_lock.settings import Settings
from vnet_lock.situation import Candidate, Situation, nic_wanted

_GATEWAY_IPV4, _GATEWAY_IPV6 = "169.254.1.1", "fe80::1"
# On the guest's link, {} is its name. With rp_filter 1 only the guest's own addresses come in, unless that of
# "all" is 2: the kernel takes the larger one.
_IPV4_SETTINGS = {
    "net/ipv4/conf/{}/rp_filter": "1",
    "net/ipv4/conf/{}/accept_redirects": "0",
    "net/ipv4/conf/{}/proxy_arp": "1",
    "net/ipv4/neigh/{}/proxy_delay": "0",
    "net/ipv4/conf/{}/forwarding": "1",
}
# A guest is no router for the host.
_IPV6_SETTINGS = {
    "net/ipv6/conf/{}/accept_ra": "0",
    "net/ipv6/conf/{}/accept_redirects": "0",
    "net/ipv6/conf/{}/forwarding": "1",
}


def uplinks(intent: Intent, situation: Situation) -> Iterator[Candidate]:
    """Each device that the intent names; the guest's addresses are claimed beside it."""
    addresses = tuple(Wanted(Resource.ip(address), Mode.EXCLUSIVE) for address in intent.addresses)
    for dev in intent.devs:
        nic = find_nic(dev, situation)
        if nic is None:
            yield Candidate(dev, reason=f"there is no network device {dev!r} here; see: ip link")
            continue
        reason = ""
        master = situation.inventory.nic_named(nic.master) if nic.master else None
        if not addresses:
            reason = "a route needs the guest's own address; add ip=192.0.2.7"
        elif master:
            reason = (
                f"{nic.netdev} is a port of {master.netdev}, which has its addresses; name {master.netdev}"
            )
        elif nic.netdev == "lo":
            reason = "lo leads nowhere"
        elif not nic.up:
            reason = f"{nic.netdev} is down; run: ip link set {nic.netdev} up"
        elif intent.vlan is not None:
            reason = f"a routed guest has no VLAN; name a VLAN device on {nic.netdev}"
        yield Candidate(nic.netdev, (*nic_wanted(situation.inventory, nic, Mode.SHARED), *addresses), reason)


def uplink_of(job: Job) -> str:
    """The network device that was granted."""
    inventory = job.inventory
    return next(nic.netdev for nic in inventory.nics if inventory.resource_of(nic) == job.device)


def disable_ipv6(settings: Settings, link: str) -> None:
    """Let the host's stack take no IPv6 from a link of ours, where it has any."""
    from vnet_lock.kernel import sysctl

    with suppress(Vanished):  # a kernel without IPv6
        sysctl.write(settings, f"net/ipv6/conf/{link}/disable_ipv6", "1")


def lead_to(job: Job, link: str) -> None:
    """Set a link of ours up as the way to the guest's addresses, and let the uplink's neighbours know.

    Neighbours are answered last of all. Refused where somebody else has the host answer for an address.
    """
    from vnet_lock.kernel import routes, sysctl
    from vnet_lock.ports import forwarding

    uplink = uplink_of(job)
    has_ipv6 = any(":" in address for address in job.intent.addresses)
    has_ipv4 = any(":" not in address for address in job.intent.addresses)
    for address in job.intent.addresses:
        if routes.has_proxy(uplink, address):
            raise Refused(
                f"address {address}: this host answers for it on {uplink} already; if nobody needs that:"
                f" ip neighbour delete proxy {address} dev {uplink}"
            )
    with job.sharing() as share:
        if has_ipv4:
            forwarding.forward_ipv4(job.settings, share, uplink)
        if has_ipv6:
            forwarding.forward_ipv6(job.settings, share, uplink)
            forwarding.answer_for_others(job.settings, share, uplink)
    # Before it is up: else a guest could be taken for a router.
    chosen = (_IPV4_SETTINGS if has_ipv4 else {}) | (_IPV6_SETTINGS if has_ipv6 else {})
    for name, value in chosen.items():
        sysctl.write(job.settings, name.format(link), value)
    if not has_ipv6:
        disable_ipv6(job.settings, link)
    job.journal(tuple(ProxyNeighbour(uplink, address) for address in job.intent.addresses))
    job.once_it_runs(lambda: _open_the_way(job.intent.addresses, uplink, link))


def _open_the_way(addresses: tuple[str, ...], uplink: str, link: str) -> None:
    from vnet_lock.kernel import netlink, routes

    netlink.set_link(link, up=True)
    if any(":" not in address for address in addresses):
        routes.add_gateway(link, _GATEWAY_IPV4, 32)
    if any(":" in address for address in addresses):
        routes.add_gateway(link, _GATEWAY_IPV6, 64)
    for address in addresses:
        routes.add_host_route(link, address)
    for address in addresses:
        routes.add_proxy(uplink, address)
