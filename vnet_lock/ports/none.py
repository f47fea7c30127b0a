"""A routed tap: no bridge, a host route to each of the guest's own addresses."""

from __future__ import annotations

from collections.abc import Iterator

from vnet_lock.combination import Backend
from vnet_lock.ports import Job, Opened
from vnet_lock.ports.macvtap import random_mac
from vnet_lock.ports.routed import lead_to, uplinks
from vnet_lock.ports.tap import make_tap
from vnet_lock.request import Intent
from vnet_lock.situation import Candidate, Situation


def candidates(intent: Intent, backend: Backend, situation: Situation) -> Iterator[Candidate]:
    """Each device that the intent names as the way out."""
    del backend
    return uplinks(intent, situation)


def open_port(job: Job) -> Opened:
    """Make a tap, and lead the guest's addresses to it."""
    tap = make_tap(job)
    lead_to(job, tap)
    return Opened(netdev=tap, mac=job.intent.mac or random_mac())
