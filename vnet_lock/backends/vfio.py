"""The PCI function itself, through VFIO."""

from __future__ import annotations

import os

from vnet_lock.backends import Connection
from vnet_lock.combination import Combination
from vnet_lock.kernel.sysfs import list_names
from vnet_lock.model import PciAddress
from vnet_lock.ports import Opened
from vnet_lock.request import Intent
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
    del intent
    has_node = opened.pci is not None and bool(read_device_node(settings, opened.pci))
    return Connection(combination, opened.mac, pci=opened.pci, iommufd=has_node and offers_iommufd(settings))


def offers_iommufd(settings: Settings) -> bool:
    """Whether this kernel hands out functions through iommufd: IOMMUFD and VFIO_DEVICE_CDEV (Linux 6.6)."""
    return os.path.exists(f"{settings.dev}/iommu") and os.path.isdir(f"{settings.sys}/class/vfio-dev")


def read_device_node(settings: Settings, pci: PciAddress) -> str:
    """The function's own VFIO node, which iommufd takes; empty while it has none."""
    names = list_names(f"{settings.sys}/bus/pci/devices/{pci.text}/vfio-dev")
    nodes = (f"{settings.dev}/vfio/devices/{name}" for name in names)
    return next(filter(os.path.exists, nodes), "")
