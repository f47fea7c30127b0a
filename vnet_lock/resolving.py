"""The full form: what libvirt itself can open of that which was planned, in its own words. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from vnet_lock.combination import Backend, Combination, Policy, Port
from vnet_lock.dataclass import replace
from vnet_lock.domain_document import RESERVED_NAMES
from vnet_lock.domain_rewrite import InterfaceForm, bridge, direct, function, made, user, vf
from vnet_lock.domain_wishes import LATE_BACKENDS, Wish
from vnet_lock.errors import BadInput, Unsupported
from vnet_lock.model import Inventory, Nic, Vf, is_ifname
from vnet_lock.request import Assignment, Intent

# What libvirt can open in some way.
_BACKENDS = (*LATE_BACKENDS, Backend.VFIO, Backend.USER, Backend.PASST)
_MODES = {Policy.VEB: "bridge", Policy.VEPA: "vepa", Policy.PRIVATE: "private"}
# libvirt keeps names like these for itself.
_RESERVED = (*RESERVED_NAMES, "vl")


def full_intent(wish: Wish) -> Intent:
    """What is to be planned for the full form; BadInput, Unsupported where libvirt can't have it."""
    intent, what = wish.intent, f"interface {wish.intent.interface}"
    if wrong := [backend for backend in intent.backends if backend not in _BACKENDS]:
        known = " ".join(_BACKENDS)
        raise Unsupported(f"{what}: libvirt takes no backend {wrong[0]}; choose from: {known}")
    if intent.teaming and intent.mac is None:
        raise BadInput(
            f"{what}: it has the MAC of {intent.teaming}, which has none yet; write <mac address=''/> there"
        )
    return replace(intent, backends=intent.backends or LATE_BACKENDS)


def full_form(
    assignment: Assignment, inventory: Inventory, is_ours: Callable[[str], bool]
) -> InterfaceForm | str:
    """How libvirt opens what was planned; where only we can make it, the reason why.

    ``is_ours`` tells whether a bridge goes with its last guest of ours.
    """
    combination, intent = assignment.combination, assignment.request
    assert combination is not None  # noqa: S101 - an Intent's assignment has one
    assert isinstance(intent, Intent)  # noqa: S101 - nothing else is resolved
    match combination.port:
        case Port.SRIOV:
            return _on_vf(combination, intent, assignment, inventory)
        case Port.PHYSDEV if assignment.device.pci and combination.backend is Backend.VFIO:
            return function(assignment.device.pci)
        case Port.SOCKET:
            return user(combination.backend is Backend.PASST)
        case Port.MACVLAN | Port.BRIDGE if intent.vlan is not None:
            return f"libvirt makes no VLAN {intent.vlan} of its own"
        case Port.MACVLAN:
            nic = _nic(assignment, inventory)
            mode = _MODES[combination.policy]
            return direct(nic.netdev, mode, queues=intent.queues) if nic else "its device is gone"
        case Port.BRIDGE:
            nic = _nic(assignment, inventory)
            if nic is None or is_ours(nic.netdev):
                return f"the bridge {assignment.device.name} goes with its last guest"
            return bridge(nic.netdev, intent.queues)
        case _:
            return f"libvirt has nothing like {combination.text}"


def late_backends(intent: Intent) -> tuple[Backend, ...]:
    """Those of its backends that libvirt takes late; Unsupported where there is none."""
    wanted = intent.backends or LATE_BACKENDS
    found = tuple(backend for backend in wanted if backend in LATE_BACKENDS)
    if not found:
        raise Unsupported(
            f'interface {intent.interface}: libvirt takes no backend {wanted[0]} late; use "tap+vhost tap"'
        )
    return found


def late_form(wish: Wish, guest: str) -> InterfaceForm | None:
    """How the interface stands there until the hook makes its device; None for a VF, which doesn't."""
    if Backend.VFIO in wish.intent.backends:
        return None
    return made(wish.intent.ifname or name_link(guest, wish.intent.interface), wish.intent.queues)


def made_late(intent: Intent, guest: str) -> tuple[Intent, InterfaceForm]:
    """What is to be claimed and made where no hook reads the guest's metadata, and how libvirt takes it.

    The device and the guest's NIC have one MAC, the intent's: libvirt would make up another.
    """
    ifname = intent.ifname or name_link(guest, intent.interface)
    late = replace(intent, ifname=ifname, backends=late_backends(intent))
    return late, replace(made(ifname, intent.queues), mac=intent.mac)


def name_link(guest: str, alias: str) -> str:
    """A name for a guest's tap or macvtap: ``web7-net0``; a checksum where that is long, odd or unclear."""
    short = alias.removeprefix("ua-")
    name = f"{guest}-{short}"
    # Else web's vm-net0 and web-vm's net0 were one.
    is_only_its = "-" not in short
    if is_only_its and name.isascii() and is_ifname(name) and not name.startswith(_RESERVED):
        return name
    return f"g{zlib.crc32(guest.encode()):08x}{zlib.crc32(alias.encode()) & 0xFFFFFF:06x}"


def _on_vf(
    combination: Combination, intent: Intent, assignment: Assignment, inventory: Inventory
) -> InterfaceForm | str:
    found = inventory.vf_at(assignment.device.pci) if assignment.device.pci else None
    if found is None:
        return "its VF is gone"
    pf = inventory.pf_at(found.pf)
    mode = {Policy.VEB: "veb", Policy.VEPA: "vepa"}.get(combination.policy)
    if pf and pf.eswitch and mode and pf.eswitch != mode:
        return f"libvirt doesn't set the embedded switch of {pf.netdev or pf.pci} to {mode}"
    if combination.backend is Backend.VFIO:
        return vf(found.pci, intent.vlan, intent.teaming, intent.mac)
    return _by_macvtap(found, intent)


def _by_macvtap(found: Vf, intent: Intent) -> InterfaceForm | str:
    if found.netdev is None:
        return f"VF {found.pci} has no network device here"
    return direct(found.netdev, "passthrough", intent.vlan, intent.queues)


def _nic(assignment: Assignment, inventory: Inventory) -> Nic | None:
    return next((nic for nic in inventory.nics if inventory.resource_of(nic) == assignment.device), None)
