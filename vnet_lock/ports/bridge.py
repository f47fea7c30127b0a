"""A tap in a bridge that exists."""

from __future__ import annotations

from collections.abc import Iterator

from vnet_lock.combination import Backend, Policy
from vnet_lock.model import Intent, Mode
from vnet_lock.planning import Candidate, Situation, nic_wanted
from vnet_lock.ports import Job, Opened
from vnet_lock.ports.macvtap import random_mac
from vnet_lock.ports.tap import make_tap


def candidates(intent: Intent, backend: Backend, situation: Situation) -> Iterator[Candidate]:
    """Each bridge that the intent names."""
    del backend
    for dev in intent.devs:
        nic = situation.inventory.nic_named(dev)
        if nic is None:
            yield Candidate(dev, reason=f"there is no bridge {dev!r} here; see: ip link show type bridge")
            continue
        reason = ""
        if nic.kind != "bridge":
            reason = f"{dev} is no bridge"
        elif intent.policy is Policy.NAT:
            reason = f"whether {dev} masquerades isn't known"
        elif intent.vlan is not None:
            reason = "a VLAN on a bridge's port isn't built in this version"
        yield Candidate(dev, nic_wanted(situation.inventory, nic, Mode.SHARED), reason)


def open_port(job: Job) -> Opened:
    """Make a tap, up, as a port of the bridge."""
    from vnet_lock.kernel import netlink

    tap = make_tap(job)
    netlink.set_master(tap, job.device.name)
    netlink.set_link(tap, up=True)
    return Opened(netdev=tap, mac=job.intent.mac or random_mac())
