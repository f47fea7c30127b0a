"""Ports in libvirt's networks of VFs that stand for what others hold, so that libvirt chooses another VF.

libvirt gives a new guest the first VF of such a network that has no port, whoever uses it, and the network
hook can only refuse it: the next start would try the same VF. A port that names its VF (a "reclaimed" one) is
taken as it is, and ends that.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from typing import Protocol

from vnet_lock.errors import VnetLockError
from vnet_lock.front.command import print_error
from vnet_lock.front.libvirt_client.connection import Libvirt
from vnet_lock.front.libvirt_client.errors import Disconnected
from vnet_lock.front.libvirt_client.network import Network
from vnet_lock.front.libvirt_guest import address_words
from vnet_lock.model import PciAddress
from vnet_lock.network_xml import RESERVING, read_pool, read_port
from vnet_lock.settings import Settings

# Use without a claim changes nothing that could be waited for.
_LOOK_S = 10.0


class PoolSession(Protocol):
    """What this needs of a session."""

    def held_vfs(self, pcis: Collection[PciAddress]) -> set[PciAddress]:
        """Those VFs that can't be given to anybody now."""


class PoolPorts:
    """What was seen of the claims the last time."""

    def __init__(self, settings: Settings, session: PoolSession) -> None:
        self._settings = settings
        self._session = session
        self._claims: tuple[int, int] | None = None
        self._looked = 0.0
        # What failed the last time, and how often.
        self._failure = ("", 0)

    def update(self, libvirt: Libvirt) -> None:
        """Make and remove ports where that is due; where another was quicker, the next time."""
        claims = self._read_claims()
        now = time.monotonic()
        if claims == self._claims and now - self._looked < _LOOK_S:
            return
        self._claims, self._looked = claims, now
        try:
            for network in libvirt.read_networks():
                self._update(network)
        except Disconnected:
            raise
        except VnetLockError as error:
            self._claims = None
            text, count = self._failure
            self._failure = (str(error), count + 1 if text == str(error) else 1)
            if self._failure[1] == 2:
                print_error("vnet-lock", error)

    def remove(self, libvirt: Libvirt) -> None:
        """Take all of ours away: nobody will any more when their VFs are free."""
        with suppress(VnetLockError):
            for network in libvirt.read_networks():
                for port in self._read_ports(network)[0].values():
                    network.remove_port(port)

    def _update(self, network: Network) -> None:
        pool = read_pool(network.read_xml().encode())
        if not pool:
            return
        ours, theirs = self._read_ports(network)
        held = self._session.held_vfs(pool) - theirs
        for pci in ours.keys() - held:
            network.remove_port(ours[pci])
        for pci in sorted(held - ours.keys()):
            network.add_port(_port_xml(pci))

    @staticmethod
    def _read_ports(network: Network) -> tuple[dict[PciAddress, str], set[PciAddress]]:
        """Our ports' UUIDs by their VF, and the VFs of all others."""
        ours: dict[PciAddress, str] = {}
        theirs: set[PciAddress] = set()
        for port, xml in network.read_ports():
            found = read_port(f"<hookData>{xml}</hookData>".encode())
            if found is None or not isinstance(found.request.device, PciAddress):
                continue
            if found.uuid == RESERVING:
                ours[found.request.device] = port
            else:
                theirs.add(found.request.device)
        return ours, theirs

    def _read_claims(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._settings.claims_dir)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns


def _port_xml(pci: PciAddress) -> str:
    return (
        f"<networkport><uuid>{uuid.uuid4()}</uuid>"
        f"<owner><name>vnet-lock</name><uuid>{RESERVING}</uuid></owner><mac address='02:00:00:00:00:00'/>"
        f"<plug type='hostdev-pci' managed='yes'><address {address_words(pci)}/></plug></networkport>"
    )
