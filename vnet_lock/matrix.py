"""Every combination, and whether a guest could have it here and now: planned and probed, never looked up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vnet_lock.combination import COMBINATIONS, Combination, Policy, Port
from vnet_lock.dataclass import dataclass
from vnet_lock.errors import BadInput
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import Inventory, Nic
from vnet_lock.probing import Probes
from vnet_lock.request import Intent, Plan, Refusal, RefusalKind
from vnet_lock.session import Session
from vnet_lock.settings import Settings

# A guest's address that nobody has (RFC 5737): a route needs one.
_ADDRESS = "192.0.2.7"
# Devices that are a guest's, or nobody's to stand on.
_NO_UPLINKS = ("tun", "macvtap", "macvlan")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One combination: the ``device`` that it would get, or the ``reason`` why it can't be had."""

    combination: Combination
    device: str = ""
    reason: str = ""

    @property
    def is_ready(self) -> bool:
        """Whether a guest could have it."""
        return not self.reason


def read_matrix(settings: Settings, devices: Sequence[str] = ()) -> tuple[Verdict, ...]:
    """A verdict for each combination, on these devices, or on any that this host has.

    Changes nothing that stays. Who isn't root is told what takes root. BadInput where none of the devices
    that are named is here.
    """
    session = Session(settings)
    if devices:
        _require_any(session, tuple(devices))
    inventory = read_inventory(settings)
    probes = Probes(settings)
    try:
        return tuple(
            _judge(session, probes, one, tuple(devices) or _fitting(one, inventory)) for one in COMBINATIONS
        )
    finally:
        probes.close()


def _require_any(session: Session, devices: tuple[str, ...]) -> None:
    """BadInput where there is none of them, as a plan says it: of a typo no line of a matrix is any use."""
    found = session.plan([Intent("matrix", Policy.PRIVATE, devices)])
    if isinstance(found, Refusal) and found.kind is RefusalKind.INVALID:
        raise BadInput(found.message.removeprefix("matrix: "))


def _judge(session: Session, probes: Probes, one: Combination, devices: tuple[str, ...]) -> Verdict:
    if one.policy is Policy.NAT:
        devices = () if one.port is Port.SOCKET else devices
    elif not devices:
        return Verdict(one, reason=f"this host has no device that port {one.port} could use; see: ip link")
    addresses = (_ADDRESS,) if one.policy is Policy.ROUTE else ()
    intent = Intent("matrix", one.policy, devices, (one.port,), (one.backend,), addresses=addresses)
    found = session.plan([intent])
    if isinstance(found, Refusal):
        return Verdict(one, reason=_reason(found))
    reason = probes.why_not(one)
    return Verdict(one, _device(found), reason)


def _fitting(one: Combination, inventory: Inventory) -> tuple[str, ...]:
    """The devices that a person might name for a port, the likelier first."""
    nics = [nic for nic in inventory.nics if nic.netdev != "lo" and nic.kind not in _NO_UPLINKS]
    bridges = [nic.netdev for nic in nics if nic.kind == "bridge"]
    if one.port is Port.BRIDGE:
        return () if one.policy is Policy.NAT else tuple(bridges)
    if one.port in (Port.SRIOV, Port.PHYSDEV):
        functions = [pf for pf in inventory.pfs if one.port is Port.PHYSDEV or pf.totalvfs]
        return tuple(pf.netdev or pf.pci.text for pf in functions)
    return tuple(nic.netdev for nic in _by_use(nics, inventory))


def _by_use(nics: Iterable[Nic], inventory: Inventory) -> list[Nic]:
    """What is up before what isn't, hardware before what was made; no bridges, their ports, VFs."""
    fit = [
        nic
        for nic in nics
        if nic.kind != "bridge" and nic.master is None and not (nic.pci and inventory.vf_at(nic.pci))
    ]
    return sorted(fit, key=lambda nic: (not nic.up, nic.pci is None))


def _device(found: Plan) -> str:
    (assignment,) = found.assignments
    return assignment.device.text if assignment.wanted else ""


def _reason(refusal: Refusal) -> str:
    """One line of a refusal: the reason of the likeliest device, and how many more have one of theirs."""
    reasons = list(dict.fromkeys(one.reason for one in refusal.rejected)) or [
        refusal.message.removeprefix("matrix: ")
    ]
    more = len(reasons) - 1
    return reasons[0] + (f" (and {more} more device{'s' if more > 1 else ''})" if more else "")
