"""A network of libvirt's."""

from __future__ import annotations

from functools import partial
from typing import Any

import libvirt

from vnet_lock.front.libvirt_client.errors import About


class Network:
    """A network of libvirt's, with the ports by which guests are connected to it."""

    def __init__(self, about: About, network: Any) -> None:
        """``network`` is libvirt-python's own, ``about`` says whatever fails."""
        self._network = network
        self.name: str = network.name()
        self._about = partial(about, f'network "{self.name}"')

    def read_xml(self) -> str:
        """Its XML as it is now, with the devices that it found for itself."""
        with self._about():
            return str(self._network.XMLDesc(0))

    def read_ports(self) -> list[tuple[str, str]]:
        """The UUID and XML of each port."""
        with self._about():
            return [(port.UUIDString(), str(port.XMLDesc(0))) for port in self._network.listAllPorts()]

    def add_port(self, xml: str) -> None:
        """Make a port with the device that its XML names; VnetLockError where another port has it."""
        with self._about():
            self._network.portCreateXML(xml, libvirt.VIR_NETWORK_PORT_CREATE_RECLAIM)

    def remove_port(self, uuid: str) -> None:
        """Remove a port; absent is success."""
        with self._about():
            try:
                self._network.portLookupByUUIDString(uuid).delete()
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_NETWORK_PORT:
                    raise
