"""The PCI function itself, through VFIO."""

from __future__ import annotations

import os

from vnet_lock.backends import Connection
from vnet_lock.combination import Combination
from vnet_lock.model import Intent
from vnet_lock.ports import Opened
from vnet_lock.settings import Settings


def missing(settings: Settings) -> str:
    """Whether there is an IOMMU at work."""
    groups = settings.sys + "/kernel/iommu_groups"
    try:
        if os.listdir(groups):
            return ""
    except FileNotFoundError:
        pass
    return "this host has no IOMMU at work; turn it on in the firmware, and with intel_iommu=on"


def connect(settings: Settings, intent: Intent, opened: Opened, combination: Combination) -> Connection:
    """QEMU opens the function itself: only its address is needed."""
    del settings, intent
    return Connection(combination, opened.mac, pci=opened.pci)
