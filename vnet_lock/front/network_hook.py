"""libvirt's network hook: a device of a network is claimed before libvirt touches it, or its guest refused.

libvirt chooses the device, at a guest's start and at a hot-plug, and asks then; it tells again of the ports
that there are, when its network daemon starts. Never calls libvirt, and fails a new port only.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, BinaryIO, Protocol

from vnet_lock.errors import VnetLockError
from vnet_lock.front.hook import Outlets, TooLate, answer_with, arm_deadline, read_deadline_s
from vnet_lock.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vnet_lock.claims import ClaimTable
    from vnet_lock.front.hook import Leave
    from vnet_lock.model import Claim, Owner, UseKind
    from vnet_lock.request import Fixed, Request
    from vnet_lock.session import Grant


class NetworkHookSession(Protocol):
    """What this hook needs of a session."""

    table: ClaimTable

    def acquire(self, owner: Owner, requests: Iterable[Request], beside: bool = False) -> Sequence[Grant]:
        """Claim what a guest is about to get."""

    def activate(self, grants: Iterable[Grant]) -> None:
        """Let it live as long as the guest."""

    def adopt(self, owner: Owner, requests: Iterable[Request]) -> object:
        """Claim what a guest has."""

    def release_tokens(self, owner: Owner, tokens: Iterable[str]) -> None:
        """Give back some of what a guest has."""


def main(argv: Sequence[str], stdin: BinaryIO, leave: Leave = os._exit) -> int:
    """Serve one call of libvirt's and return the exit status; ``leave`` with it where an undo takes too long.

    ``argv`` is what the shim passes: the host's root ("" but for a fake host), the pid of the daemon that has
    the networks, and libvirt's own arguments: the network's name, the operation, and two more.
    """
    root, _, network, operation = argv[:4]
    settings = Settings.under(root)
    xml = stdin.read()
    report = Outlets()
    arm_deadline(operation, report, read_deadline_s(settings), leave=leave)

    def body() -> None:
        if os.geteuid() == 0:  # a user's own daemon has no devices to give out, and we couldn't claim them
            perform(settings, operation, xml, _open_session)

    status = answer_with(body, operation, f'network "{network}"', report)
    signal.alarm(0)
    return status


def perform(
    settings: Settings, operation: str, xml: bytes, open_session: Callable[[Settings], NetworkHookSession]
) -> None:
    """Claim what a new port takes, or give back what an old one had; any VnetLockError where that can't be.

    TooLate where the guest has the device already, so that nothing can be refused.
    """
    if operation not in ("port-created", "port-deleted"):
        return
    from vnet_lock.front.libvirt_guest import find_tokens, read_owner
    from vnet_lock.kernel.liveness import Liveness
    from vnet_lock.model import UseKind
    from vnet_lock.network_xml import RESERVING, read_port

    port = read_port(xml)
    if port is None or port.uuid == RESERVING:
        return
    owner = read_owner(settings, port.guest, port.uuid)
    session = open_session(settings)
    tokens = find_tokens(settings, session.table, owner, port.request)
    if operation == "port-deleted":
        # libvirt 11.3 also ends the port of a guest that keeps its macvtap, when its link is set down or up
        # (virsh domif-setlink): that one gives its claim back at its end. A status file may name a VF still.
        if not _has(settings, owner, port.request, UseKind.VFIO):
            session.release_tokens(owner, tokens)
        return
    claims = session.table.read()
    stale = Liveness(settings).stale(claims)
    if any(_stands(claim) for claim in claims.records if claim.token in tokens and claim.token not in stale):
        return  # told again
    if _has(settings, owner, port.request, UseKind.VFIO, UseKind.LIBVIRT):
        try:
            session.adopt(owner, [port.request])
        except VnetLockError as error:
            raise TooLate(str(error)) from error
        return
    # What an earlier start left that nobody gave back, or somebody is giving back now, must not be given back
    # under this one.
    session.release_tokens(owner, tokens)
    if owner.process is None:
        raise VnetLockError("libvirt's daemon for QEMU guests is gone; start it and then the guest")
    session.activate(session.acquire(owner, [port.request], beside=True))


def _stands(claim: Claim) -> bool:
    """Whether a claim is the port's for good: not one that is being given back, or kept for an arrival."""
    from vnet_lock.model import State

    return claim.state is State.ACTIVE or (claim.state is State.RESERVED and not claim.reservation)


def _has(settings: Settings, owner: Owner, request: Fixed, *kinds: UseKind) -> bool:
    """Whether the guest's QEMU has the device: a VF by such evidence, or the port's macvtap on it."""
    from vnet_lock.kernel.kinship import Kinship
    from vnet_lock.kernel.observe import read_inventory
    from vnet_lock.request import Form

    pid = Kinship(settings).guest_pid(owner)
    if pid is None:
        return False
    device = str(request.device)
    inventory = read_inventory(settings, [device])
    if request.form is not Form.HOSTDEV:
        return any(nic.mac == request.mac and device in nic.lowers for nic in inventory.nics)
    users = (user for resource, each in inventory.users.items() if resource.name == device for user in each)
    return any(user.pid == pid and user.kind in kinds for user in users)


def _open_session(settings: Settings) -> NetworkHookSession:
    from vnet_lock.session import Session

    return Session(settings)
