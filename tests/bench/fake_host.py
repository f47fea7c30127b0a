"""A host made of files below a directory: sysfs, /proc and a claim table, for logic tests and benchmarks.

It looks like what the kernel shows as far as our readers ask. Nothing in it is alive; a device that a process
has "open" is one that every machine has (/dev/null), under the number that the fake sysfs gives it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from vnet_lock.claims import ClaimTable
from vnet_lock.model import Claim, Owner, OwnerKind, PciAddress, Process
from vnet_lock.settings import Settings

BOOT_ID = "5e1c0de5-0000-4000-8000-000000000001"
START_TICKS = 4242
# The driver's own name for a device that VFIO has.
VFIO = "vfio-pci"


class FakeHost:
    """Add devices, processes and claims; then run anything with ``settings``."""

    def __init__(self, root: Path | str) -> None:
        self.root = str(root)
        self.settings = Settings.under(self.root)
        self._sys, self._proc = self.settings.sys, self.settings.proc
        self._ifindex = 1
        for folder in (
            "bus/pci/devices",
            "class/net",
            "class/vfio",
            "kernel/iommu_groups",
            "bus/pci/drivers",
        ):
            os.makedirs(f"{self._sys}/{folder}", exist_ok=True)
        self._write(f"{self._proc}/sys/kernel/random/boot_id", BOOT_ID)
        # A /proc without init hides others' processes (hidepid): the real kernel would be asked about ours.
        self.add_process(1, "init", parent=0)
        os.makedirs(self.settings.run, mode=0o755, exist_ok=True)
        os.makedirs(self.settings.claims_dir, mode=0o755, exist_ok=True)
        os.makedirs(self.settings.dev, exist_ok=True)
        os.chmod(self.settings.run, 0o755)
        os.chmod(self.settings.claims_dir, 0o755)

    # --- devices ------------------------------------------------------------------------------

    def add_pf(
        self,
        pci: str,
        netdev: str,
        vf_drivers: Sequence[str | None] = (),
        totalvfs: int = 7,
        driver: str = "igb",
    ) -> list[PciAddress]:
        """A PF and its VFs, numbered as the 82576 does it; those with a network driver have a netdev.

        IOMMU groups are the functions' routing IDs. Returns the VFs' addresses.
        """
        address = PciAddress.parse(pci)
        base = self._add_function(address, driver, netdev)
        self._write(f"{base}/sriov_numvfs", str(len(vf_drivers)))
        self._write(f"{base}/sriov_totalvfs", str(totalvfs))
        vfs = [vf_address(address, index) for index in range(len(vf_drivers))]
        for index, (vf, vf_driver) in enumerate(zip(vfs, vf_drivers, strict=True)):
            name = f"{netdev}v{index}" if vf_driver not in (None, VFIO) else None
            vf_base = self._add_function(vf, vf_driver, name)
            os.symlink(f"../{address}", f"{vf_base}/physfn")
            os.symlink(f"../{vf}", f"{base}/virtfn{index}")
        return vfs

    def add_link(self, netdev: str, lowers: Iterable[str] = (), uevent: str = "", alias: str = "") -> None:
        """A network device without hardware, on others; ``uevent`` is its DEVTYPE."""
        base = f"{self._sys}/devices/virtual/net/{netdev}"
        self._add_netdev(base, netdev, f"../../devices/virtual/net/{netdev}", alias)
        if uevent:
            self._write(f"{base}/uevent", f"DEVTYPE={uevent}\nINTERFACE={netdev}\n")
        for lower in lowers:
            os.symlink(f"{self._sys}/class/net/{lower}", f"{base}/lower_{lower}")
            os.symlink(base, f"{self._sys}/class/net/{lower}/upper_{netdev}")

    def remove_vf(self, pf: str, index: int) -> None:
        """As if the VF had gone."""
        os.unlink(f"{self._sys}/bus/pci/devices/{pf}/virtfn{index}")
        os.unlink(f"{self._sys}/bus/pci/devices/{vf_address(PciAddress.parse(pf), index)}")

    # --- who uses them --------------------------------------------------------------------------

    def add_process(self, pid: int, command: str = "qemu-system-x86", parent: int = 1) -> Process:
        """A process that lives until it is removed."""
        stat = [str(pid), f"({command})", "S", str(parent), *["0"] * 17, str(START_TICKS), *["0"] * 30]
        self._write(f"{self._proc}/{pid}/stat", " ".join(stat))
        self._write(f"{self._proc}/{pid}/comm", command)
        os.makedirs(f"{self._proc}/{pid}/fd", exist_ok=True)
        return Process(pid, START_TICKS)

    def remove_process(self, pid: int) -> None:
        """As if it had ended."""
        for folder, _, names in os.walk(f"{self._proc}/{pid}", topdown=False):
            for name in names:
                os.unlink(f"{folder}/{name}")
            os.rmdir(folder)

    def open_vfio(self, pid: int, vf: PciAddress, device: str = "/dev/null") -> None:
        """Let a process have a VF's VFIO group open; ``device`` stands for it, one for each VF."""
        self.number_vfio(vf, os.stat(device).st_rdev)
        self.open_file(pid, device)

    def number_vfio(self, vf: PciAddress, rdev: int) -> None:
        """Give a VF's VFIO group its device number."""
        self._write(f"{self._sys}/class/vfio/{routing_id(vf)}/dev", f"{os.major(rdev)}:{os.minor(rdev)}")

    def open_file(self, pid: int, target: str) -> None:
        """One more descriptor of a process."""
        folder = f"{self._proc}/{pid}/fd"
        os.symlink(target, f"{folder}/{len(os.listdir(folder))}")

    def owner(
        self, pid: int, name: str = "vm", kind: OwnerKind = OwnerKind.QEMU, uuid: str | None = None
    ) -> Owner:
        """An owner of this boot; its process need not be there."""
        return Owner(kind, name, BOOT_ID, uuid=uuid, process=Process(pid, START_TICKS))

    def claim(self, *claims: Claim) -> None:
        """Write claims, whatever speaks against them."""
        with ClaimTable(self.settings).guarded() as writer:
            writer.add(claims)

    # --- files ----------------------------------------------------------------------------------

    def _add_function(self, pci: PciAddress, driver: str | None, netdev: str | None) -> str:
        place = f"devices/pci{pci.domain:04x}:00/{pci}"
        base, group = f"{self._sys}/{place}", routing_id(pci)
        self._write(f"{base}/class", "0x020000")
        os.symlink(f"../../../{place}", f"{self._sys}/bus/pci/devices/{pci}")
        members = f"{self._sys}/kernel/iommu_groups/{group}/devices"
        os.makedirs(members)
        os.symlink(f"../../../../{place}", f"{members}/{pci}")
        os.symlink(f"../../../kernel/iommu_groups/{group}", f"{base}/iommu_group")
        if driver is not None:
            os.symlink(f"../../../bus/pci/drivers/{driver}", f"{base}/driver")
        if netdev is not None:
            self._add_netdev(f"{base}/net/{netdev}", netdev, f"../../{place}/net/{netdev}")
            os.symlink(f"../../../{pci}", f"{base}/net/{netdev}/device")
        return base

    def _add_netdev(self, base: str, netdev: str, link: str, alias: str = "") -> None:
        self._ifindex += 1
        mac = (0x5254 << 32 | self._ifindex).to_bytes(6, "big").hex(":")
        for name, text in (
            ("ifindex", str(self._ifindex)),
            ("flags", "0x1002"),
            ("address", mac),
            ("mtu", "1500"),
            ("ifalias", alias),
        ):
            self._write(f"{base}/{name}", text)
        os.symlink(link, f"{self._sys}/class/net/{netdev}")

    def _write(self, path: str, text: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            file = os.open(path, flags, 0o644)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path))
            file = os.open(path, flags, 0o644)
        os.write(file, text.encode() + b"\n")
        os.close(file)


def vf_address(pf: PciAddress, index: int) -> PciAddress:
    """The first VF 0x80 routing IDs after its PF, each two after the one before."""
    number = (pf.bus << 8 | pf.device << 3 | pf.function) + 0x80 + 2 * index
    return PciAddress(pf.domain, number >> 8, number >> 3 & 0x1F, number & 7)


def routing_id(pci: PciAddress) -> int:
    """A number that no other function of the host has."""
    return pci.domain << 16 | pci.bus << 8 | pci.device << 3 | pci.function
