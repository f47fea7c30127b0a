"""Five ways to use one VF, each started the way its user would; and how a VF looks from outside meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.lab.machines import Guests, LibvirtGuest, PlainGuest
from tests.lab.nic import Function, Nic, wait_until

HOST = "10.7.0.1"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to start a guest: who tried, whether it runs, and what it was told."""

    guest: LibvirtGuest | PlainGuest
    runs: bool
    message: str

    @property
    def qemu(self) -> int:
        """The pid of the guest's QEMU."""
        if isinstance(self.guest, LibvirtGuest):
            return self.guest.pid
        children = Path(f"/proc/{self.guest.pid}/task/{self.guest.pid}/children").read_text().split()
        return int(children[0])

    def end(self) -> None:
        """End it the usual way."""
        if isinstance(self.guest, LibvirtGuest):
            self.guest.destroy()
        else:
            self.guest.kill(signal.SIGTERM)
            self.guest.wait(120)


def vnet_lock(*words: str) -> subprocess.CompletedProcess[str]:
    """The command, whatever its exit status."""
    return subprocess.run(["vnet-lock", *words], capture_output=True, text=True, timeout=120, check=False)


def status() -> dict[str, dict[str, object]]:
    """All VFs by PCI address, as ``vnet-lock status --json`` has them."""
    found = json.loads(vnet_lock("status", "--json").stdout)
    return {vf["pci"]: vf for pf in found["pfs"] for vf in pf["vfs"]}


def owner_of(vf: Function) -> str | None:
    """Who owns a VF, as vnet-lock says."""
    claim = status()[vf.pci]["claim"]
    return claim["owner"]["name"] if isinstance(claim, dict) else None


def appearance(nic: Nic, index: int) -> dict[str, object]:
    """Everything of a VF that an attempt to take it could change."""
    vf = nic.vfs[index]
    netdev = vf.netdev
    own: dict[str, object] = {"driver": vf.driver, "netdev": netdev, "mac": vf.mac}
    if netdev:
        base = Path(f"/sys/class/net/{netdev}")
        names = ("ifindex", "operstate", "mtu", "flags")
        own |= {name: (base / name).read_text().strip() for name in names}
        own["uppers"] = nic.uppers(netdev)
    return own | {f"admin {name}": value for name, value in nic.admin(index).items()}


def hostdev_xml(vf: Function, mac: str) -> str:
    """A VF named outright."""
    return (
        f"<interface type='hostdev' managed='yes'><mac address='{mac}'/>"
        f"<source>{vf.xml_address}</source></interface>"
    )


def direct_xml(netdev: str, mac: str, mode: str = "passthrough") -> str:
    """libvirt's own macvtap."""
    return (
        f"<interface type='direct'><mac address='{mac}'/><source dev='{netdev}' mode='{mode}'/>"
        "<model type='virtio'/></interface>"
    )


def late_xml(target: str, mac: str) -> str:
    """An interface whose device the hook makes."""
    return (
        f"<interface type='ethernet'><mac address='{mac}'/><target dev='{target}' managed='no'/>"
        "<model type='virtio'/><alias name='ua-net0'/></interface>"
    )


def intent_xml(dev: str, policy: str = "veb", port: str = "sriov") -> str:
    """What such an interface wants."""
    return (
        "<vnet:guest xmlns:vnet='urn:vnet-lock:guest:1'>"
        f"<vnet:interface alias='ua-net0' policy='{policy}' port='{port}' dev='{dev}'/></vnet:guest>"
    )


def _libvirt(guests: Guests, name: str, interfaces: str, metadata: str = "", **words: str | int) -> Attempt:
    made = guests.libvirt(name, interfaces, start=False, metadata=metadata, **words)
    done = made.start(check=False)
    return Attempt(made, done.returncode == 0, done.stderr)


def _plain(guests: Guests, name: str, devices: list[str], **words: str | int) -> Attempt:
    made = guests.qemu(name, devices, program=["vnet-qemu"], **words)
    # The claim is there before QEMU is; QEMU is there once its console is.
    socket = made.console.log.with_suffix(".sock")
    wait_until(lambda: socket.exists() or made.process.poll() is not None, f"{name} runs or was refused", 120)
    return Attempt(made, made.process.poll() is None, made.said)


def _mac(name: str) -> str:
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in os.fsencode(name)[-3:])


def start_hostdev(guests: Guests, vf: Function, netdev: str, name: str, **words: str | int) -> Attempt:
    """libvirt, the VF itself."""
    del netdev
    return _libvirt(guests, name, hostdev_xml(vf, _mac(name)), **words)


def start_direct(guests: Guests, vf: Function, netdev: str, name: str, **words: str | int) -> Attempt:
    """libvirt, its own macvtap in passthrough mode on the VF."""
    del vf
    return _libvirt(guests, name, direct_xml(netdev, _mac(name)), **words)


def start_late(guests: Guests, vf: Function, netdev: str, name: str, **words: str | int) -> Attempt:
    """libvirt, a macvtap that the hook makes."""
    del netdev
    return _libvirt(guests, name, late_xml(f"t-{name}"[:15], _mac(name)), intent_xml(vf.pci), **words)


def start_vfio(guests: Guests, vf: Function, netdev: str, name: str, **words: str | int) -> Attempt:
    """Plain QEMU, the VF itself."""
    del netdev
    network = f"host,id=net0,mode=veb,port=sriov,dev={vf.pci},protocols=vfio,mac={_mac(name)}"
    return _plain(guests, name, ["-netdev", network], **words)


def start_tap(guests: Guests, vf: Function, netdev: str, name: str, **words: str | int) -> Attempt:
    """Plain QEMU, a macvtap on the VF with vhost."""
    del netdev
    network = f"host,id=net0,mode=veb,port=sriov,dev={vf.pci},protocols=tap:vhost"
    device = f"virtio-net-pci,netdev=net0,mac={_mac(name)},romfile="
    return _plain(guests, name, ["-netdev", network, "-device", device], **words)


CONTENDERS: dict[str, Callable[..., Attempt]] = {
    "hostdev": start_hostdev,
    "direct": start_direct,
    "late": start_late,
    "vfio": start_vfio,
    "tap": start_tap,
}
