"""A host made of files below a directory: sysfs, /proc and a claim table, for logic tests and benchmarks.

It looks like what the kernel shows as far as our readers ask. Nothing in it is alive; a device that a process
has "open" is one that every machine has (/dev/null), under the number that the fake sysfs gives it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vnet_lock.claims import ClaimTable
from vnet_lock.model import Claim, Owner, OwnerKind, PciAddress, Process
from vnet_lock.settings import Settings

BOOT_ID = "boot"
START_TICKS = 4242
# The driver's own name for a device that VFIO has.
VFIO = "vfio-pci"


@dataclass(frozen=True)
class Link:
    """A symbolic link in a tree."""

    target: str


def build(root: Path, tree: Mapping[str, str | bytes | Link]) -> None:
    """Make files and links below ``root``; a name that ends in a slash is a folder."""
    for name, content in tree.items():
        path = root / name.lstrip("/")
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.target)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content)


class FakeHost:
    """Add devices, processes and claims; then run anything with ``settings``."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.settings = Settings.under(root)
        self._ifindex = 1
        folders = ("sys/bus/pci/devices/", "sys/bus/pci/drivers/", "sys/class/net/", "dev/")
        build(self.root, dict.fromkeys(folders, "") | {"proc/sys/kernel/random/boot_id": BOOT_ID + "\n"})
        os.makedirs(self.settings.claims_dir)
        for folder in (self.settings.run, self.settings.claims_dir):
            os.chmod(folder, 0o755)  # whatever the umask
        # A /proc without init hides others' processes (hidepid): the real kernel would be asked about ours.
        self.add_process(1, "init", parent=0)

    # --- devices, one by one --------------------------------------------------------------------

    def function(
        self,
        pci: str,
        *,
        driver: str | None = "igb",
        netdev: str | None = None,
        group: int | None = None,
        kind: str = "0x020000",
        **more: str | Link,
    ) -> str:
        """A PCI function; ``more`` are further files of it."""
        base = f"sys/bus/pci/devices/{pci}"
        tree: dict[str, str | bytes | Link] = {
            f"{base}/class": kind + "\n",
            f"{base}/driver_override": "(null)\n",
        }
        if driver:
            tree[f"{base}/driver"] = Link(f"../../../bus/pci/drivers/{driver}")
            tree[f"sys/bus/pci/drivers/{driver}/"] = ""
        if group is not None:
            tree[f"{base}/iommu_group"] = Link(f"../../../kernel/iommu_groups/{group}")
            tree[f"sys/kernel/iommu_groups/{group}/devices/{pci}"] = Link(
                f"../../../../bus/pci/devices/{pci}"
            )
        tree |= {f"{base}/{name}": content for name, content in more.items()}
        build(self.root, tree)
        if netdev:
            build(self.root, {f"{base}/net/{netdev}/": ""})
            self.nic(netdev, device=Link(f"../../../bus/pci/devices/{pci}"))
        return pci

    def pf(self, pci: str, *, vfs: tuple[str, ...] = (), totalvfs: int = 7, **more: object) -> str:
        """A PF with links to its VFs, which are made by ``vf``."""
        self.function(pci, sriov_numvfs=f"{len(vfs)}\n", sriov_totalvfs=f"{totalvfs}\n", **more)  # type: ignore[arg-type]
        for index, vf in enumerate(vfs):
            build(self.root, {f"sys/bus/pci/devices/{pci}/virtfn{index}": Link(f"../{vf}")})
        return pci

    def vf(self, pci: str, pf: str, *, driver: str | None = "igbvf", **more: object) -> str:
        """A VF with the link to its PF."""
        return self.function(pci, driver=driver, physfn=Link(f"../{pf}"), **more)  # type: ignore[arg-type]

    def nic(self, name: str, *, up: bool = False, **more: str | Link) -> int:
        """A network device; ``more`` are further files and links of it. Returns its ifindex."""
        self._ifindex += 1
        files: dict[str, str | Link] = {
            "ifindex": f"{self._ifindex}\n",
            "address": (0x5254 << 32 | self._ifindex).to_bytes(6, "big").hex(":") + "\n",
            "mtu": "1500\n",
            "flags": "0x1003\n" if up else "0x1002\n",
            "uevent": f"INTERFACE={name}\nIFINDEX={self._ifindex}\n",
            **more,
        }
        build(self.root, {f"sys/class/net/{name}/{key}": content for key, content in files.items()})
        return self._ifindex

    def stack(self, upper: str, lower: str) -> None:
        """Say that one network device stands on another."""
        build(
            self.root,
            {
                f"sys/class/net/{lower}/upper_{upper}": Link(f"../{upper}"),
                f"sys/class/net/{upper}/lower_{lower}": Link(f"../{lower}"),
            },
        )

    # --- and many at once -----------------------------------------------------------------------

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
        vfs = [vf_address(address, index) for index in range(len(vf_drivers))]
        names = tuple(vf.text for vf in vfs)
        self.pf(pci, vfs=names, totalvfs=totalvfs, driver=driver, netdev=netdev, group=routing_id(address))
        for index, (vf, vf_driver) in enumerate(zip(vfs, vf_drivers, strict=True)):
            name = f"{netdev}v{index}" if vf_driver not in (None, VFIO) else None
            self.vf(vf.text, pci, driver=vf_driver, netdev=name, group=routing_id(vf))
        return vfs

    def add_link(self, netdev: str, lowers: Iterable[str] = (), uevent: str = "", alias: str = "") -> None:
        """A network device without hardware, on others; ``uevent`` is its DEVTYPE."""
        more = {"uevent": f"DEVTYPE={uevent}\nINTERFACE={netdev}\n"} if uevent else {}
        self.nic(netdev, ifalias=alias + "\n", **more)
        for lower in lowers:
            self.stack(netdev, lower)

    def remove_vf(self, pf: str, index: int) -> None:
        """As if the VF had gone."""
        devices = self.root / "sys/bus/pci/devices"
        (devices / f"{pf}/virtfn{index}").unlink()
        shutil.rmtree(devices / vf_address(PciAddress.parse(pf), index).text)

    # --- who uses them --------------------------------------------------------------------------

    def process(self, pid: int, command: str, *opened: str, parent: int = 1) -> None:
        """A process with descriptors of these files open."""
        build(
            self.root,
            {
                f"proc/{pid}/comm": command + "\n",
                f"proc/{pid}/stat": stat_line(pid, command, parent=parent),
                f"proc/{pid}/fd/": "",
            },
        )
        for target in opened:
            self.open_file(pid, target)

    def add_process(self, pid: int, command: str = "qemu-system-x86", parent: int = 1) -> Process:
        """A process that lives until it is removed."""
        self.process(pid, command, parent=parent)
        return Process(pid, START_TICKS)

    def remove_process(self, pid: int) -> None:
        """As if it had ended."""
        shutil.rmtree(self.root / f"proc/{pid}")

    def open_vfio(self, pid: int, vf: PciAddress, device: str = "/dev/null") -> None:
        """Let a process have a VF's VFIO group open; ``device`` stands for it, one for each VF."""
        self.number_vfio(vf, os.stat(device).st_rdev)
        self.open_file(pid, device)

    def number_vfio(self, vf: PciAddress, rdev: int) -> None:
        """Give a VF's VFIO group its device number."""
        build(self.root, {f"sys/class/vfio/{routing_id(vf)}/dev": f"{os.major(rdev)}:{os.minor(rdev)}\n"})

    def open_file(self, pid: int, target: str) -> None:
        """One more descriptor of a process."""
        number = len(os.listdir(self.root / f"proc/{pid}/fd"))
        build(self.root, {f"proc/{pid}/fd/{number}": Link(target)})

    def owner(
        self, pid: int, name: str = "vm", kind: OwnerKind = OwnerKind.QEMU, uuid: str | None = None
    ) -> Owner:
        """An owner of this boot; its process need not be there."""
        return Owner(kind, name, BOOT_ID, uuid=uuid, process=Process(pid, START_TICKS))

    def claim(self, *claims: Claim) -> None:
        """Write claims, whatever speaks against them."""
        with ClaimTable(self.settings).guarded() as writer:
            writer.add(claims)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Somebody holds a POSIX lock on the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print(flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def stat_line(
    pid: int, command: str, state: str = "S", parent: int = 1, start_ticks: int = START_TICKS
) -> str:
    """/proc/PID/stat as proc(5) describes it."""
    middle = " ".join("0" for _ in range(17))
    return f"{pid} ({command}) {state} {parent} {middle} {start_ticks} 0 0\n"


def rdev_text(path: str) -> str:
    """What a device's ``dev`` file in sysfs says."""
    rdev = os.stat(path).st_rdev
    return f"{os.major(rdev)}:{os.minor(rdev)}\n"


def vf_address(pf: PciAddress, index: int) -> PciAddress:
    """The first VF 0x80 routing IDs after its PF, each two after the one before."""
    number = (pf.bus << 8 | pf.device << 3 | pf.function) + 0x80 + 2 * index
    return PciAddress(pf.domain, number >> 8, number >> 3 & 0x1F, number & 7)


def routing_id(pci: PciAddress) -> int:
    """A number that no other function of the host has."""
    return pci.domain << 16 | pci.bus << 8 | pci.device << 3 | pci.function
