"""A running QEMU: what it was started with, what its descriptors and claims stand for. Changes nothing."""

from __future__ import annotations

import os

from vnet_lock.claims import ClaimTable
from vnet_lock.errors import BadInput, Unsupported, Vanished
from vnet_lock.front.rerun import Origin, Running, origin_of, rebuild
from vnet_lock.kernel import netlink
from vnet_lock.kernel.descriptors import DescriptorKind, read_descriptor
from vnet_lock.kernel.kinship import Kinship
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import Claim, PciAddress
from vnet_lock.qemu_argv import read_argv
from vnet_lock.settings import Settings

_MODES = {"bridge": "veb", "vepa": "vepa", "private": "private"}


def rerun(settings: Settings, pid: int) -> str:
    """The script by which a person runs the guest of this QEMU again.

    BadInput where there is no such process or it is no QEMU; Unsupported where we may not look into it.
    """
    argv, running = read_running(settings, pid)
    return rebuild(argv, running).text(f'guest "{running.name}" as pid {pid} runs it now; what differs:')


def read_running(settings: Settings, pid: int) -> tuple[list[str], Running]:
    """A QEMU's command line, and what stands behind it; raises as ``rerun`` does."""
    try:
        with open(f"{settings.proc}/{pid}/cmdline", "rb") as file:
            words = os.fsdecode(file.read()).split("\0")[:-1]
        program = os.readlink(f"{settings.proc}/{pid}/exe")
    except FileNotFoundError as error:
        raise BadInput(f"there is no process {pid}; see: vnet-lock status, ps") from error
    except PermissionError as error:
        raise Unsupported(f"pid {pid} may not be looked into by this user; run as root") from error
    if "qemu" not in os.path.basename(program):
        raise BadInput(f"pid {pid} is {program}, which is no QEMU; see: pgrep -a qemu")
    argv = read_argv(words[1:])
    claims = _read_claims(settings, pid)
    running = Running(
        pid,
        argv.name or os.path.basename(words[0]),
        lambda number: _tap_at(settings, pid, number),
        lambda number: _file_at(settings, pid, number),
        lambda host: _function_at(settings, host, claims),
        claims,
    )
    return words, running


def _read_claims(settings: Settings, pid: int) -> dict[str, tuple[Claim, ...]]:
    """The guest's own claims, by interface, the device itself first."""
    kinship = Kinship(settings)
    found: dict[str, tuple[Claim, ...]] = {}
    for claim in ClaimTable(settings).read().records:
        if kinship.guest_pid(claim.owner) == pid:
            found[claim.interface] = (*found.get(claim.interface, ()), claim)
    return found


def _tap_at(settings: Settings, pid: int, number: int) -> Origin | None:
    try:
        found = read_descriptor(settings, pid, number)
    except Vanished:
        return None
    inventory = read_inventory(settings, [found.name])
    nic = inventory.nic_named(found.name)
    if nic is None:
        return None
    if found.kind is DescriptorKind.TAP:
        if nic.master is None:
            return None
        keys = (("mode", "veb"), ("port", "bridge"), ("dev", nic.master), ("protocols", "tap"))
        return Origin(keys, f"was the tap {nic.netdev} in {nic.master}")
    if found.kind is not DescriptorKind.MACVTAP or not nic.lowers:
        return None
    mode = netlink.read_macvtap_mode(nic.netdev)
    lower = inventory.nic_named(nic.lowers[0])
    text = f"was the macvtap {nic.netdev}, mode {mode}, on {nic.lowers[0]}"
    if mode in _MODES:
        keys = (("mode", _MODES[mode]), ("port", "macvlan"), ("dev", nic.lowers[0]), ("protocols", "tap"))
        return Origin(keys, text)
    if lower is None or lower.pci is None or inventory.vf_at(lower.pci) is None:
        return None
    keys = (("mode", "veb"), ("port", "sriov"), ("dev", lower.pci.text), ("protocols", "tap"))
    return Origin(keys, text)


def _file_at(settings: Settings, pid: int, number: int) -> str | None:
    try:
        found = read_descriptor(settings, pid, number)
    except Vanished:
        return None
    return found.name if found.kind is DescriptorKind.FILE else None


def _function_at(settings: Settings, host: str, claims: dict[str, tuple[Claim, ...]]) -> Origin | None:
    try:
        pci = PciAddress.parse(host)
    except ValueError:
        return None
    for own in claims.values():
        claim = next((claim for claim in own if claim.resource.pci == pci), None)
        origin = origin_of([claim]) if claim else None
        if origin and claim:
            return Origin((*origin.keys, *((("mac", claim.mac),) if claim.mac else ())), origin.text)
    inventory = read_inventory(settings, [pci.text])
    if inventory.vf_at(pci) is None and inventory.pf_at(pci) is None:
        return None
    mode, port = ("veb", "sriov") if inventory.vf_at(pci) else ("private", "physdev")
    keys = (("mode", mode), ("port", port), ("dev", pci.text), ("protocols", "vfio"))
    return Origin(keys, f"was {pci} itself, through VFIO")
