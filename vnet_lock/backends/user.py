"""QEMU's own user network (slirp): all is in QEMU, which needs no descriptor of ours."""

from __future__ import annotations

from vnet_lock.backends import Connection
from vnet_lock.combination import Combination
from vnet_lock.ports import Opened
from vnet_lock.request import Intent
from vnet_lock.settings import Settings


def missing(settings: Settings) -> str:
    """Nothing is needed; a QEMU that was built without slirp says so itself."""
    del settings
    return ""


def connect(settings: Settings, intent: Intent, opened: Opened, combination: Combination) -> Connection:
    """Nothing is opened."""
    del settings, intent
    return Connection(combination, opened.mac)
