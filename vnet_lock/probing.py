"""What this kernel and this user can do, found by doing it in a namespace that nobody sees.

It calls what a port would call, so that it fails as a guest's start would. The namespace goes away with
all that was made in it; the host itself isn't touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property

from vnet_lock.combination import Backend, Combination, Policy, Port
from vnet_lock.errors import VnetLockError
from vnet_lock.ports.macvlan import MODES
from vnet_lock.settings import Settings

_ALIAS, _MAC = "vnet-lock:probe", "52:54:00:00:00:fe"


class Probes:
    """Tries each thing once; each answer is why it can't be done, or empty."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def why_not(self, combination: Combination) -> str:
        """What stands in the way of a combination, whatever device it would be on."""
        if combination.port is Port.SOCKET:
            return ""
        return self.claims or self._port(combination)

    def close(self) -> None:
        """Let the namespace go, with all that was made in it."""
        if "namespace" in self.__dict__:
            os.close(self.namespace)

    @cached_property
    def claims(self) -> str:
        """Whether a claim could be written."""
        from vnet_lock.claims import ClaimTable

        if os.geteuid() != 0 and not os.path.isdir(self._settings.claims_dir):
            return "claims are root's to make; run as root"

        def take() -> None:
            with ClaimTable(self._settings).guarded():
                pass

        return _tried(take)

    @cached_property
    def namespace(self) -> int:
        """A network namespace with a veth pair, ``probe0`` and ``probe1``, both up."""
        from vnet_lock.kernel import netlink
        from vnet_lock.kernel.netns import call_in, make_namespace

        made = make_namespace(self._settings)

        def lay() -> None:
            netlink.add_veth("probe0", "probe1", f"{_ALIAS}-veth")
            for name in ("probe0", "probe1"):
                netlink.set_link(name, up=True)

        try:
            call_in(made, lay)
        except BaseException:
            os.close(made)
            raise
        return made

    @cached_property
    def tap(self) -> str:
        """Whether a tap can be made."""
        from vnet_lock.kernel import netlink

        return self._inside(lambda: netlink.add_tap("probetap", _ALIAS, settings=self._settings))

    @cached_property
    def node(self) -> str:
        """Whether a device node of our own can be made and opened, as a macvtap takes it."""
        from vnet_lock.kernel import nodes

        return _tried(lambda: nodes.try_node(self._settings))

    @cached_property
    def bridge(self) -> str:
        """Whether a bridge can be made."""
        from vnet_lock.kernel import netlink

        return self._inside(lambda: netlink.add_bridge("probebr", _MAC, _ALIAS))

    @cached_property
    def masquerade(self) -> str:
        """Whether nft can make a table that masquerades."""
        from vnet_lock.kernel import nftables

        return self._inside(lambda: nftables.make_table("probebr", "192.0.2.0/24", None))

    @cached_property
    def packet(self) -> str:
        """Whether a packet socket can be opened on a device in a namespace of its own."""
        from vnet_lock.kernel import packet

        def open_one() -> None:
            for one in packet.open_queues("probe0", has_header=True, has_auxdata=True):
                one.close()

        return self._inside(open_one)

    def macvlan(self, kind: str, mode: str) -> str:
        """Whether a macvtap or macvlan can be made in a mode."""
        from vnet_lock.kernel import netlink

        def make() -> None:
            netlink.add_macvlan("probemac", "probe0", mode, _MAC, _ALIAS, kind=kind)
            netlink.remove_link("probemac", _ALIAS)

        return self._inside(make)

    def _port(self, combination: Combination) -> str:
        policy, port, backend = combination.policy, combination.port, combination.backend
        if backend is Backend.VFIO:
            return ""  # of VFIO there is no more to try than its backend does
        link = self.packet if backend.has_socket else ""
        match port:
            case Port.BRIDGE:
                return self.tap or self.bridge or (self.masquerade if policy is Policy.NAT else "")
            case Port.NONE:
                return self.tap
            case Port.VETH_MACVLAN | Port.MACVLAN:
                kind = "macvlan" if backend.has_socket else "macvtap"
                return link or self.macvlan(kind, MODES.get(policy, "passthru")) or self._own_node(backend)
            case Port.SRIOV if not backend.has_socket:
                return self.macvlan("macvtap", "passthru") or self._own_node(backend)
            case _:
                return link

    def _own_node(self, backend: Backend) -> str:
        return "" if backend.has_socket else self.node

    def _inside(self, act: Callable[[], object]) -> str:
        from vnet_lock.kernel.netns import call_in

        return _tried(lambda: call_in(self.namespace, act))


def _tried(act: Callable[[], object]) -> str:
    """Why it can't be done, empty where it was."""
    try:
        act()
    except VnetLockError as error:
        return str(error)
    return ""
