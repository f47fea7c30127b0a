"""A tap in a bridge: one that exists, or one of ours that goes with its last guest."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vnet_lock.combination import Backend, Policy, Port
from vnet_lock.errors import Vanished, VnetLockError
from vnet_lock.journal import SharedLink
from vnet_lock.kernel import programs
from vnet_lock.model import Mode, Nic, Resource, Wanted, is_ifname
from vnet_lock.ports import Job, Opened, Share
from vnet_lock.ports.macvlan import find_nic
from vnet_lock.ports.macvtap import link_name, random_mac
from vnet_lock.ports.tap import make_tap
from vnet_lock.request import Intent
from vnet_lock.situation import Candidate, Situation, nic_wanted

# What the name of a NAT bridge begins with; the uplink's ifindex follows, 0 for none in particular.
NAT_NAME = "vlnat"
_IS_NAT = re.compile(NAT_NAME + "[0-9]+")
# The ifalias of a bridge of ours; its name follows.
SHARED = "vnet-lock:shared:"


def candidates(intent: Intent, backend: Backend, situation: Situation) -> Iterator[Candidate]:
    """Each bridge that the intent names, those that exist first, and what can be made for it."""
    del backend
    found = [(dev, find_nic(dev, situation)) for dev in intent.devs]
    for dev, nic in sorted(found, key=lambda pair: pair[1] is None):
        if nic is not None and nic.kind == "bridge":
            reason = _nat_lack(intent, nic) if intent.policy is Policy.NAT else ""
            if intent.vlan is not None and not nic.vlan_filtering:
                reason = f"{dev} has no VLANs; run: ip link set {dev} type bridge vlan_filtering 1"
            yield Candidate(dev, nic_wanted(situation.inventory, nic, Mode.SHARED), reason)
        elif intent.policy is Policy.NAT:
            yield _uplink(intent, dev, nic, situation)
        elif nic is not None:
            yield Candidate(dev, nic_wanted(situation.inventory, nic, Mode.SHARED), f"{dev} is no bridge")
        else:
            yield _new(intent, dev)
    if intent.policy is Policy.NAT and not intent.devs:
        reason = "a user network takes less; port=bridge makes a bridge" if _can_be_user(intent) else ""
        yield Candidate("a new bridge", _made(f"{NAT_NAME}0"), reason or _making_lack(intent, situation))


def open_port(job: Job) -> Opened:
    """Make a tap, up, as a port of the bridge; the bridge, too, where it is one of ours."""
    from vnet_lock.kernel import bridges, netlink, sysfs

    bridge = job.device.name
    if _is_ours(job, bridge):
        with job.sharing() as share:
            # Its last guest may have taken it away meanwhile.
            if _is_ours(job, bridge):
                _set_up(job, share, bridge)
    tap = make_tap(job)
    netlink.set_master(tap, bridge)
    if job.intent.vlan is not None:
        default = sysfs.read_text(f"{job.settings.sys}/class/net/{bridge}/bridge/default_pvid")
        bridges.set_vlan(tap, job.intent.vlan, int(default or 0))
    job.once_it_runs(lambda: netlink.set_link(tap, up=True))
    return Opened(netdev=tap, mac=job.intent.mac or random_mac())


# --- what can be had ------------------------------------------------------------------------------


def _nat_lack(intent: Intent, nic: Nic) -> str:
    """Why a bridge that exists can't be the way out, as far as can be seen: its host sees to the rest."""
    if not any(":" not in address for address in nic.addresses):
        return f"{nic.netdev} is no way out: the host has no IPv4 address on it; see: ip address"
    if intent.dhcp:
        return f"DHCP on {nic.netdev} is for whoever made it to serve; leave dhcp= out"
    return ""


def _uplink(intent: Intent, dev: str, nic: Nic | None, situation: Situation) -> Candidate:
    """A bridge of ours whose guests go out by this device."""
    if nic is None:
        return Candidate(dev, reason=f"there is no network device {dev!r} here; see: ip link")
    reason = _making_lack(intent, situation)
    if nic.master:
        reason = f"{dev} is a port of {nic.master}; name that"
    elif not any(":" not in address and not address.startswith("127.") for address in nic.addresses):
        reason = f"{dev} is up with no IPv4 address" if nic.up else f"{dev} is down"
        reason += "; nothing can go out by it: see: ip address"
    name = f"{NAT_NAME}{nic.ifindex}"
    return Candidate(dev, (*_made(name), *nic_wanted(situation.inventory, nic, Mode.SHARED)), reason)


def _new(intent: Intent, dev: str) -> Candidate:
    """A bridge that only guests are on."""
    reason = ""
    if intent.ports != (Port.BRIDGE,) or not is_ifname(dev):
        reason = f"there is no bridge {dev!r} here; see: ip link show type bridge"
    return Candidate(dev, _made(dev) if not reason else (), reason)


def _making_lack(intent: Intent, situation: Situation) -> str:
    """Why no NAT bridge can be made."""
    if intent.vlan is not None:
        return "a NAT bridge of ours has no VLANs; leave vlan= out"
    needed = ("nft", "dnsmasq") if intent.dhcp else ("nft",)
    return next((programs.lack(name) for name in needed if name not in situation.programs), "")


def _can_be_user(intent: Intent) -> bool:
    """Whether a user network would do: it takes no device, no claim, no root, and its DHCP is its own."""
    is_allowed = not intent.backends or not {Backend.PASST, Backend.USER}.isdisjoint(intent.backends)
    return is_allowed and (not intent.ports or Port.SOCKET in intent.ports) and intent.queues == 1


def _made(name: str) -> tuple[Wanted, ...]:
    return (Wanted(Resource.nic(name), Mode.SHARED),)


# --- a bridge of ours -----------------------------------------------------------------------------


def _is_ours(job: Job, bridge: str) -> bool:
    """Whether it is one of ours, or isn't there and is ours to make."""
    from vnet_lock.kernel import sysfs

    is_named = bridge in job.intent.devs
    if sysfs.read_nic(job.settings, bridge) is None:
        # One that was named without port=bridge was there when it was chosen, and isn't ours to make.
        return not is_named or (job.intent.policy is not Policy.NAT and job.intent.ports == (Port.BRIDGE,))
    is_ours = sysfs.read_text(f"{job.settings.sys}/class/net/{bridge}/ifalias") == SHARED + bridge
    if not is_ours and not is_named:
        raise VnetLockError(
            f"{bridge} is there, but isn't ours; give it another name: ip link set {bridge} name …"
        )
    return is_ours


def _set_up(job: Job, share: Share, bridge: str) -> None:
    """Make it, or what is missing of it: another guest's start may have ended half-way."""
    from vnet_lock.kernel import netlink, sysfs

    entry = share(SharedLink(link_name(job.token), bridge, SHARED + bridge))
    assert isinstance(entry, SharedLink)  # noqa: S101 - what is shared is of one kind
    if sysfs.read_nic(job.settings, bridge) is None:
        netlink.remove_link(entry.name, entry.alias)
        netlink.add_bridge(entry.name, random_mac(), entry.alias)
        netlink.rename_link(entry.name, bridge)
    netlink.set_link(bridge, up=True)
    if job.intent.policy is Policy.NAT and _IS_NAT.fullmatch(bridge):
        from vnet_lock.ports import nat  # only here: nft, and perhaps dnsmasq

        nat.set_up(job, share, bridge, _uplink_of(bridge))


def _uplink_of(bridge: str) -> str | None:
    """The device that a NAT bridge is named after; Vanished where that is gone."""
    import socket  # loaded by then

    index = int(bridge.removeprefix(NAT_NAME))
    try:
        return socket.if_indextoname(index) if index else None
    except OSError as error:
        raise Vanished(
            f"the device that {bridge} goes out by is not there (any more); see: ip link"
        ) from error
