"""Gives whole PCI functions to VFIO, for the ports that have one: with all of their IOMMU group."""

from __future__ import annotations

from vnet_lock.errors import Unsupported
from vnet_lock.model import Inventory, PciAddress, name_of
from vnet_lock.ports import Job

# Drivers that VFIO bears in a group beside its own: they do no DMA (driver_managed_dma in the kernel).
_HARMLESS = ("pci-stub", "pcieport")


def find_function(dev: str, inventory: Inventory) -> PciAddress | None:
    """The PCI function that a network device's name or a PCI address means; None where it has none."""
    nic = inventory.nic_named(dev)
    if nic is not None:
        return nic.pci
    try:
        return PciAddress.parse(dev)
    except ValueError:
        return None


def why_not(inventory: Inventory, pci: PciAddress) -> str:
    """Why the function can't be given to VFIO; empty where it can."""
    vf, pf = inventory.vf_at(pci), inventory.pf_at(pci)
    function = vf or pf
    if function is None or function.iommu_group is None:
        return f"{name_of(function.resource) if function else pci} is in no IOMMU group"
    return ""


def require_group(job: Job, pci: PciAddress) -> None:
    """See that nothing keeps the function's group from VFIO; Unsupported names what does.

    Functions of the group that are no network devices are not ours to take from their drivers.
    """
    from vnet_lock.kernel.pci import is_vfio_driver, read_driver

    vf, pf = job.inventory.vf_at(pci), job.inventory.pf_at(pci)
    function = vf or pf
    group = function.iommu_group if function else None
    ours = {item.resource.pci for item in job.assignment.wanted}
    for member in job.inventory.iommu_groups.get(group, ()) if group is not None else ():
        driver = read_driver(job.settings, member) if member not in ours else None
        if driver and driver not in _HARMLESS and not is_vfio_driver(driver):
            raise Unsupported(
                f"{name_of(job.device)} can't be given away alone: {member} of its IOMMU group {group} is no "
                f"network device and has driver {driver}; take that driver from it, or choose another device"
            )


def bind_to_vfio(job: Job) -> None:
    """Journal and bind every function that is wanted; one that VFIO has already keeps its driver."""
    from vnet_lock.kernel.before import read_before
    from vnet_lock.kernel.modules import find_vfio_driver
    from vnet_lock.kernel.pci import bind_driver, is_vfio_driver, read_driver

    functions = [item.resource.pci for item in job.assignment.wanted if item.resource.pci]
    for pci in functions[1:]:
        job.journal(read_before(job.settings, pci))
    for pci in functions:
        if not is_vfio_driver(read_driver(job.settings, pci)):
            bind_driver(job.settings, pci, find_vfio_driver(job.settings, pci))
