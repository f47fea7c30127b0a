"""Small fake trees of /sys, /proc and /run, built from a dict or device by device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vnet_lock.settings import Settings


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
    """A host of fake PFs, VFs and network devices below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = Settings.under(root)
        self._ifindex = 1000
        build(
            root,
            {"sys/bus/pci/devices/": "", "sys/class/net/": "", "proc/sys/kernel/random/boot_id": "boot\n"},
        )

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
        """A PF with links to its VFs, which are made by ``function``."""
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
        base = f"sys/class/net/{name}"
        build(
            self.root,
            {
                f"{base}/ifindex": f"{self._ifindex}\n",
                f"{base}/address": "52:54:00:00:00:01\n",
                f"{base}/mtu": "1500\n",
                f"{base}/flags": "0x1003\n" if up else "0x1002\n",
                f"{base}/uevent": f"INTERFACE={name}\nIFINDEX={self._ifindex}\n",
                **{f"{base}/{key}": content for key, content in more.items()},
            },
        )
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

    def process(self, pid: int, command: str, *opened: str) -> None:
        """A process with descriptors of these files open."""
        build(
            self.root,
            {
                f"proc/{pid}/comm": command + "\n",
                f"proc/{pid}/stat": stat_line(pid, command),
                f"proc/{pid}/fd/": "",
                **{f"proc/{pid}/fd/{number}": Link(target) for number, target in enumerate(opened)},
            },
        )


def stat_line(pid: int, command: str, state: str = "S", parent: int = 1, start_ticks: int = 4242) -> str:
    """/proc/PID/stat as proc(5) describes it."""
    middle = " ".join("0" for _ in range(17))
    return f"{pid} ({command}) {state} {parent} {middle} {start_ticks} 0 0\n"


def rdev_text(path: str) -> str:
    """What a device's ``dev`` file in sysfs says."""
    rdev = os.stat(path).st_rdev
    return f"{os.major(rdev)}:{os.minor(rdev)}\n"
