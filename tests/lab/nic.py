"""The lab's SR-IOV NIC: how a test reads and resets it. Uses no code of vnet-lock, as it has to judge it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PCI = Path("/sys/bus/pci")


@dataclass(frozen=True, slots=True)
class Function:
    """A PCI function as sysfs shows it now; names and drivers come and go."""

    pci: str

    @property
    def _device(self) -> Path:
        return PCI / "devices" / self.pci

    @property
    def driver(self) -> str | None:
        """The driver that it is bound to."""
        with suppress(FileNotFoundError):
            return (self._device / "driver").readlink().name
        return None

    @property
    def netdev(self) -> str | None:
        """Its network device, where its driver makes one and it is in this namespace."""
        with suppress(FileNotFoundError):
            return next(iter(os.listdir(self._device / "net")), None)
        return None

    @property
    def mac(self) -> str | None:
        """The effective MAC, as its own driver tells it."""
        netdev = self.netdev
        return Path(f"/sys/class/net/{netdev}/address").read_text().strip() if netdev else None

    @property
    def iommu_group(self) -> str:
        """The number of its IOMMU group."""
        return (self._device / "iommu_group").readlink().name

    @property
    def group_members(self) -> list[str]:
        """All functions of its IOMMU group."""
        return sorted(os.listdir(self._device / "iommu_group/devices"))

    def bind(self, driver: str) -> None:
        """Take it from the driver that it has and give it to another, which from then on is the default."""
        with suppress(FileNotFoundError):
            (self._device / "driver/unbind").write_text(self.pci)
        (self._device / "driver_override").write_text("\n" if driver == "igbvf" else driver)
        (PCI / "drivers_probe").write_text(self.pci)
        wait_until(lambda: self.driver == driver, f"{self.pci} is bound to {driver}")
        settle()

    @property
    def xml_address(self) -> str:
        """It as libvirt's <address type='pci'> wants it."""
        domain, bus, slot, function = re.split("[:.]", self.pci)
        return (
            f"<address domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{function}' type='pci'/>"
        )


class Nic:
    """The PF and, while there are some, its VFs."""

    def __init__(self, pf: str) -> None:
        self.pf = pf
        self.function = Function(Path(f"/sys/class/net/{pf}/device").resolve().name)

    @property
    def pci(self) -> str:
        """The PF's PCI address."""
        return self.function.pci

    @property
    def numvfs(self) -> int:
        """How many VFs there are."""
        return int((PCI / "devices" / self.pci / "sriov_numvfs").read_text())

    @property
    def vfs(self) -> list[Function]:
        """The VFs in the order of their indexes."""
        device = PCI / "devices" / self.pci
        return [Function((device / f"virtfn{index}").readlink().name) for index in range(self.numvfs)]

    def set_numvfs(self, count: int) -> list[Function]:
        """Make this many VFs, fresh ones, each with its driver and its network device."""
        path = PCI / "devices" / self.pci / "sriov_numvfs"
        if self.numvfs:
            path.write_text("0")
        if count:
            path.write_text(str(count))
        wait_until(lambda: all(vf.driver == "igbvf" and vf.netdev for vf in self.vfs), "the VFs have igbvf")
        settle()
        return self.vfs

    def admin(self, index: int) -> dict[str, object]:
        """What the PF says about a VF: mac, vlan, qos, spoofchk, trust, link_state."""
        done = run("ip", "-j", "link", "show", "dev", self.pf)
        told = next(vf for vf in json.loads(done.stdout)[0]["vfinfo_list"] if vf["vf"] == index)
        vlans = told.get("vlan_list") or [{}]
        return {
            "mac": told.get("address", told.get("mac")),
            "vlan": vlans[0].get("vlan", 0),
            "qos": vlans[0].get("qos", 0),
            "spoofchk": told.get("spoofchk"),
            "trust": told.get("trust"),
            "link_state": told.get("link_state"),
        }

    def uppers(self, netdev: str) -> list[str]:
        """The devices on top of a network device: macvtaps, bridges."""
        names = os.listdir(f"/sys/class/net/{netdev}")
        return sorted(name.removeprefix("upper_") for name in names if name.startswith("upper_"))

    def set_address(self, address: str) -> None:
        """Give the PF an address for guests to ping, for the rest of the test."""
        run("ip", "address", "replace", address, "dev", self.pf)

    def reset(self) -> None:
        """No VFs, no addresses, up and with a link: how the VM's boot left it."""
        (PCI / "devices" / self.pci / "sriov_numvfs").write_text("0")
        run("ip", "address", "flush", "dev", self.pf)
        for upper in self.uppers(self.pf):
            run("ip", "link", "delete", upper)
        run("ip", "link", "set", self.pf, "up")
        carrier = Path(f"/sys/class/net/{self.pf}/carrier")
        wait_until(lambda: carrier.read_text().strip() == "1", f"{self.pf} has a link")


def run(*argv: str, deadline_s: float = 60) -> subprocess.CompletedProcess[str]:
    """A command that has to succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=deadline_s, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}"
    return done


def settle() -> None:
    """Wait until udev has named what is new."""
    run("udevadm", "settle", "--timeout=60", deadline_s=70)


def wait_until(is_so: Callable[[], object], what: str, deadline_s: float = 60) -> None:
    """Wait for a state of the machine; AssertionError says which one didn't come."""
    end = time.monotonic() + deadline_s
    while not is_so():
        assert time.monotonic() < end, f"not so after {deadline_s:.0f} s: {what}"
        time.sleep(0.1)
