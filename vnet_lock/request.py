"""What a guest asks for, and what is decided about it: requests, plans and refusals. Values only."""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never

from vnet_lock.combination import Backend, Combination, Policy, Port
from vnet_lock.dataclass import dataclass
from vnet_lock.errors import BadInput, Refused, Unsupported, VnetLockError
from vnet_lock.model import PciAddress, Resource, Wanted


class Form(StrEnum):
    """How libvirt itself will use a device that its domain XML names."""

    HOSTDEV = "hostdev"
    PASSTHRU = "passthru"
    VEPA = "vepa"
    PRIVATE = "private"
    BRIDGE = "bridge"


@dataclass(frozen=True, slots=True)
class Fixed:
    """A device that the guest names and somebody else (libvirt) opens: to be claimed, not touched.

    ``is_interface`` tells whether it is known to be a network device: a plain hostdev may be a disk.
    ``vlan`` is the one that libvirt will set, None where its XML names none; ``policy`` the one that the
    guest's metadata asks for, None where it doesn't. ``ifname`` is the name that the macvtap is to have,
    None where libvirt chooses it.
    """

    interface: str
    device: PciAddress | str
    form: Form
    mac: str | None = None
    is_interface: bool = True
    vlan: int | None = None
    policy: Policy | None = None
    ifname: str | None = None


@dataclass(frozen=True, slots=True)
class Intent:
    """What a guest's interface wants; all that is not said is ours to choose.

    ``devs`` are in order of preference: a PF's name or address, or the very VF that is wanted, or another
    network device; only nat can do without.
    ``ports`` and ``backends`` are in order of preference, empty means the usual order.
    ``ifname`` is the name that a macvtap or tap is to have.
    ``addresses`` are the guest's own IP addresses, which a route leads to; ``dhcp`` asks for a server.
    ``raw`` asks a tap for plain frames, without a vnet header before each. ``datagrams`` asks a socket for a
    datagram a frame, which any program understands, where QEMU is faster with a stream.
    ``pool`` names VFs in the place of ``devs``, which the host's configuration fills in, with the indices of
    the VFs that may be chosen (``vfs``, None for any).
    ``socket`` is where a libvirt guest's QEMU looks for the socket of socket+vhost.
    ``hotplug`` leaves it to libvirt to plug the device in, once the guest runs; ``teaming`` is the alias of
    the interface then that stands by for it, empty for none.
    """

    interface: str
    policy: Policy
    devs: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()
    backends: tuple[Backend, ...] = ()
    mac: str | None = None
    vlan: int | None = None
    queues: int = 1
    ifname: str | None = None
    addresses: tuple[str, ...] = ()
    dhcp: bool = False
    raw: bool = False
    datagrams: bool = False
    pool: str | None = None
    vfs: frozenset[int] | None = None
    socket: str | None = None
    hotplug: bool = False
    teaming: str = ""

    @property
    def place(self) -> str:
        """Where it wants to be, in words; empty where it names nothing."""
        if self.pool is not None:
            return f"in pool {self.pool}"
        return f"on {' or '.join(self.devs)}" if self.devs else ""


Request = Fixed | Intent


@dataclass(frozen=True, slots=True)
class Rejection:
    """A candidate that was passed over, and why."""

    candidate: str
    reason: str

    @property
    def text(self) -> str:
        """In words."""
        return f"not {self.candidate}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one request gets: a combination on a device, and the claims that it takes.

    ``combination`` is None where libvirt uses the device in a way that is none of ours.
    ``wanted[0]`` is the device itself; a user network takes none, and nothing is wanted.
    """

    request: Request
    combination: Combination | None
    wanted: tuple[Wanted, ...]
    rejected: tuple[Rejection, ...] = ()

    @property
    def device(self) -> Resource:
        """The device that the guest gets."""
        return self.wanted[0].resource


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done for a guest: one assignment for each request, in their order."""

    assignments: tuple[Assignment, ...]


class RefusalKind(StrEnum):
    """Why there is no plan."""

    HELD = "held"
    IMPOSSIBLE = "impossible"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request gets nothing; ``message`` is one line that names object, cause and next step."""

    request: Request
    kind: RefusalKind
    message: str
    resource: Resource | None = None
    holder: str = ""
    rejected: tuple[Rejection, ...] = ()


def error_of(refusal: Refusal) -> VnetLockError:
    """A refusal as the error to raise, with a note for each candidate that was passed over."""
    error = _error_of(refusal)
    for rejection in refusal.rejected:
        error.add_note(rejection.text)
    return error


def _error_of(refusal: Refusal) -> VnetLockError:
    match refusal.kind:
        case RefusalKind.HELD:
            resource = refusal.resource.text if refusal.resource else ""
            return Refused(refusal.message, resource=resource, holder=refusal.holder)
        case RefusalKind.INVALID:
            return BadInput(refusal.message)
        case RefusalKind.IMPOSSIBLE:
            return Unsupported(refusal.message)
        case _ as never:
            assert_never(never)
