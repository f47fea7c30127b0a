"""What can be combined: a policy, a port (kernel implementation) and a backend (QEMU implementation).

The list is the one that the libvirt list wrote down in 2009, with passt beside QEMU's own user network, and
our own vfio forms.
"""

from __future__ import annotations

from enum import StrEnum

from vnet_lock.dataclass import dataclass


class Policy(StrEnum):
    """Who may talk to whom."""

    NAT = "nat"
    ROUTE = "route"
    VEB = "veb"
    VEPA = "vepa"
    PRIVATE = "private"

    @classmethod
    def parse(cls, text: str) -> Policy:
        """``bridge`` is an alias of ``veb``; anything unknown raises ValueError."""
        return cls.VEB if text == "bridge" else cls(text)


class Port(StrEnum):
    """What exists on the host."""

    SOCKET = "socket"
    BRIDGE = "bridge"
    NONE = "none"
    VETH_MACVLAN = "veth+macvlan"
    MACVLAN = "macvlan"
    SRIOV = "sriov"
    PHYSDEV = "physdev"


class Backend(StrEnum):
    """How a guest is connected to the port."""

    TAP_VHOST = "tap+vhost"
    TAP = "tap"
    SOCKET_VHOST = "socket+vhost"
    SOCKET = "socket"
    USER = "user"
    PASST = "passt"
    VFIO = "vfio"

    @property
    def has_socket(self) -> bool:
        """Whether the guest is connected through a packet socket, on a device that the host doesn't see."""
        return self in (Backend.SOCKET, Backend.SOCKET_VHOST)

    @property
    def has_queues(self) -> bool:
        """Whether it can have more than one of them that we open."""
        return self in (Backend.TAP, Backend.TAP_VHOST, Backend.SOCKET_VHOST)


# The order in which backends are preferred where the user names none; vfio is never a default.
DEFAULT_BACKENDS = (
    *(Backend.TAP_VHOST, Backend.TAP, Backend.SOCKET_VHOST, Backend.SOCKET),
    *(Backend.PASST, Backend.USER),
)

_USERS = (Backend.PASST, Backend.USER)
_TAPS = (Backend.TAP, Backend.TAP_VHOST)
_SOCKETS = (Backend.SOCKET, Backend.SOCKET_VHOST)

# In the order in which ports are tried where the user names none.
_TABLE: tuple[tuple[Policy, Port, tuple[Backend, ...]], ...] = (
    (Policy.NAT, Port.SOCKET, _USERS),
    (Policy.NAT, Port.BRIDGE, _TAPS),
    (Policy.ROUTE, Port.NONE, _TAPS),
    (Policy.ROUTE, Port.VETH_MACVLAN, _TAPS + _SOCKETS),
    (Policy.VEB, Port.BRIDGE, _TAPS),
    (Policy.VEB, Port.MACVLAN, _TAPS + _SOCKETS),
    (Policy.VEB, Port.SRIOV, (*_SOCKETS, *_TAPS, Backend.VFIO)),
    (Policy.VEPA, Port.MACVLAN, _TAPS + _SOCKETS),
    (Policy.VEPA, Port.SRIOV, (*_SOCKETS, *_TAPS, Backend.VFIO)),
    (Policy.PRIVATE, Port.MACVLAN, _TAPS + _SOCKETS),
    (Policy.PRIVATE, Port.SRIOV, (*_SOCKETS, *_TAPS, Backend.VFIO)),
    (Policy.PRIVATE, Port.PHYSDEV, (*_SOCKETS, Backend.VFIO)),
)


@dataclass(frozen=True, slots=True, order=True)
class Combination:
    """A policy, a port and a backend, written ``vepa-macvlan-tap+vhost``."""

    policy: Policy
    port: Port
    backend: Backend

    @classmethod
    def parse(cls, text: str) -> Combination:
        """Raise ValueError where the text is no combination that exists."""
        parts = text.split("-")
        if len(parts) != 3:
            raise ValueError(f"{text!r} is not POLICY-PORT-BACKEND")
        combination = cls(Policy.parse(parts[0]), Port(parts[1]), Backend(parts[2]))
        if not combination.exists:
            raise ValueError(f"there is no combination {text!r}")
        return combination

    @property
    def text(self) -> str:
        """The three parts joined by dashes."""
        return f"{self.policy}-{self.port}-{self.backend}"

    @property
    def exists(self) -> bool:
        """Whether it is one of COMBINATIONS."""
        return self in COMBINATIONS


COMBINATIONS: tuple[Combination, ...] = tuple(
    Combination(policy, port, backend) for policy, port, backends in _TABLE for backend in backends
)


def ports_of(policy: Policy) -> tuple[Port, ...]:
    """The ports a policy can have, in the order in which they are tried."""
    return tuple(port for known, port, _ in _TABLE if known is policy)


def backends_of(policy: Policy, port: Port) -> tuple[Backend, ...]:
    """The backends of a policy on a port; empty where the two don't go together."""
    for known_policy, known_port, backends in _TABLE:
        if (known_policy, known_port) == (policy, port):
            return backends
    return ()
