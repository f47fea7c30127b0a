"""What makes a bridge of ours a NAT network: a subnet that nobody has, forwarding, masquerading, DHCP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from vnet_lock.errors import Unsupported
from vnet_lock.journal import DhcpServer, Entry, NatTable
from vnet_lock.kernel import bridges, dnsmasq, nftables, rtnetlink
from vnet_lock.kernel.processes import is_alive
from vnet_lock.model import Process
from vnet_lock.ports import Job, Share
from vnet_lock.ports.forwarding import forward_ipv4

if TYPE_CHECKING:
    from ipaddress import IPv4Network  # 8 ms

# Where subnets are taken from, in this order (RFC 1918); the first is one that few others take.
_PRIVATE = ("10.177.0.0/16", "172.30.0.0/16", "192.168.0.0/16", "10.0.0.0/8")
_LENGTH = 24
# A route this wide is a default route in other words, and says nothing about who is there.
_WIDE = 7


def set_up(job: Job, share: Share, bridge: str, uplink: str | None) -> None:
    """Make a bridge of ours, which is up, what a NAT network takes; what is right already stays as it is.

    Unsupported where there is no subnet left, or a program isn't installed.
    """
    from ipaddress import IPv4Network

    addresses = _addresses()
    own = addresses.pop(bridge, ())
    if own:
        subnet = IPv4Network(f"{own[0]}/{_LENGTH}", strict=False)
    else:
        subnet = choose_subnet(rtnetlink.read_ipv4_networks())
        bridges.add_address(bridge, str(subnet[1]), _LENGTH)
    # Answers come in on any device that the host talks through.
    for netdev in (bridge, *([uplink] if uplink else sorted(addresses))):
        forward_ipv4(job.settings, share, netdev)
    share(NatTable(bridge))
    nftables.make_table(bridge, str(subnet), uplink)
    if job.intent.dhcp:
        _serve_dhcp(job, share, bridge, subnet)


def choose_subnet(taken: Iterable[tuple[str, int]]) -> IPv4Network:
    """The first private network that overlaps none of these (any address of it, prefix length).

    Unsupported where there is none.
    """
    from ipaddress import IPv4Network

    others = [IPv4Network((address, length), strict=False) for address, length in taken if length > _WIDE]
    for subnet in _private_subnets():
        if not any(subnet.overlaps(other) for other in others):
            return subnet
    raise Unsupported(
        "this host has routes to all private IPv4 networks, so none is left for NAT; see: ip route"
    )


def _private_subnets() -> Iterator[IPv4Network]:
    from ipaddress import IPv4Network

    for text in _PRIVATE:
        yield from IPv4Network(text).subnets(new_prefix=_LENGTH)


def _addresses() -> dict[str, list[str]]:
    """The host's IPv4 addresses by device, but for the loopback."""
    import socket  # loaded by then

    found: dict[str, list[str]] = {}
    for ifindex, addresses in rtnetlink.read_addresses().items():
        own = [one for one in addresses if ":" not in one and not one.startswith("127.")]
        if own:
            try:
                found[socket.if_indextoname(ifindex)] = own
            except OSError:
                continue  # gone meanwhile
    return found


def _serve_dhcp(job: Job, share: Share, bridge: str, subnet: IPv4Network) -> None:
    def serves(entry: Entry) -> bool:
        return (
            isinstance(entry, DhcpServer)
            and entry.bridge == bridge
            and is_alive(job.settings, Process(entry.pid, entry.start_ticks))
        )

    def journal(process: Process) -> bool:
        """Whether it is to serve: not where another guest's does so already."""
        mine = DhcpServer(bridge, process.pid, process.start_ticks)
        return share(mine, like=serves) == mine

    pool = (str(subnet[2]), str(subnet[-2]), str(subnet.netmask))
    dnsmasq.start(job.settings, bridge, pool, journal)
