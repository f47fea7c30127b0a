"""What libvirt has noted of a device that it gave to a guest, to put it back at that guest's end.

libvirt 9.0 reads the note at the end of any guest that wants the device in mode ``passthrough``, and at the
end of a start that a hook has refused, too: it puts the device "back" below the guest that has it, whose
network is gone then (seen: the VF has its old MAC address again; 11.3 only reads the notes of its own).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from vnet_lock.claims import ClaimTable
from vnet_lock.domain_document import parse
from vnet_lock.domain_xml import read_fixed
from vnet_lock.front.libvirt_guest import device_names
from vnet_lock.journal import LibvirtMacvtap, Link, VfAdmin
from vnet_lock.kernel.before import read_netdev
from vnet_lock.model import Claim, PciAddress
from vnet_lock.request import Fixed, Form
from vnet_lock.settings import Settings


def remove_of_others(settings: Settings, xml: bytes) -> None:
    """Before libvirt ends the start of a guest that is refused: remove its notes of what other guests have.

    Only where the journal of the other's claim says the same, and puts the device back by itself. BadInput
    where the XML can't be read.
    """
    guest = read_fixed(parse(xml))
    wanted = [one for one in guest.requests if isinstance(one, Fixed) and one.form is Form.PASSTHRU]
    if not wanted:
        return
    names = {name for one in wanted for name in device_names(settings, one)}
    for claim in ClaimTable(settings).read().records:
        if claim.resource.name in names and claim.owner.uuid != guest.uuid:
            for name in _notes_of(settings, claim):
                with suppress(FileNotFoundError, PermissionError):
                    os.unlink(f"{settings.libvirt_run}/qemu/{name}")


def _notes_of(settings: Settings, claim: Claim) -> Iterator[str]:
    """The names of the files (virNetDevSaveNetConfig, libvirt's virnetdev.c)."""
    if not any(isinstance(entry, LibvirtMacvtap) for entry in claim.journal):
        return
    for entry in claim.journal:
        if isinstance(entry, VfAdmin):
            yield f"{read_netdev(settings, PciAddress.parse(entry.pf))}_vf{entry.index}"
        elif isinstance(entry, Link) and entry.name:
            yield entry.name
