"""A user network: the guest's packets become sockets of a process that QEMU talks to, or of QEMU itself."""

from __future__ import annotations

from collections.abc import Iterator

from vnet_lock.combination import Backend
from vnet_lock.ports import Job, Opened
from vnet_lock.ports.macvtap import random_mac
from vnet_lock.request import Intent
from vnet_lock.situation import Candidate, Situation


def candidates(intent: Intent, backend: Backend, situation: Situation) -> Iterator[Candidate]:
    """One, which needs no device and no claim."""
    del backend, situation
    reason = ""
    if intent.devs:
        reason = "a user network goes out by whatever the host would use; leave dev= out, or take port=bridge"
    elif intent.vlan is not None:
        reason = "a user network has no VLANs; leave vlan= out"
    elif intent.ifname is not None:
        reason = f"a user network has no device that could be called {intent.ifname}"
    yield Candidate("this host", reason=reason)


def open_port(job: Job) -> Opened:
    """Nothing is made, and nothing journalled."""
    return Opened(mac=job.intent.mac or random_mac())
