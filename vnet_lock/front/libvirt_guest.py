"""libvirt's guest as the owner of claims: its UUID, with what tells that it lives. Loads no libvirt."""

from __future__ import annotations

from vnet_lock.claims import ClaimTable
from vnet_lock.errors import BadInput
from vnet_lock.kernel import processes
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.kernel.sysfs import real_name
from vnet_lock.model import Mode, Owner, OwnerKind, PciAddress, Process
from vnet_lock.request import Fixed
from vnet_lock.settings import Settings

_INIT_PID = 1


def is_own_daemon(uri: str) -> bool:
    """Whether a libvirt URI is of this host's own system daemon; other daemons' guests claim nothing here."""
    from urllib.parse import urlsplit  # 5 ms, and no hook asks

    try:
        parts = urlsplit(uri)
    except ValueError:  # libvirt couldn't read it either
        return False
    is_local = not parts.netloc and parts.scheme.partition("+")[2] in ("", "unix")
    return is_local and parts.path == "/system"


def read_owner(settings: Settings, name: str, uuid: str, daemon_pid: int | None = None) -> Owner:
    """The guest as owner: the daemon while it starts, and QEMU by the lock on its pid file afterwards.

    ``daemon_pid`` is the pid of the daemon that runs the guest, as its hook sees it; without it, it is asked
    for. BadInput where that is no name or no UUID.
    """
    if not name or "/" in name:
        raise BadInput(f"{name!r} is no name of a guest")
    if not uuid:
        raise BadInput(f'the XML of guest "{name}" has no uuid')
    return Owner(
        kind=OwnerKind.LIBVIRT,
        name=name,
        boot_id=processes.read_boot_id(settings),
        uuid=uuid,
        process=read_daemon(settings) if daemon_pid is None else _read_caller(settings, daemon_pid),
        pid_file=f"{settings.libvirt_run}/qemu/{name}.pid",
    )


def _read_caller(settings: Settings, pid: int) -> Process | None:
    """A hook's parent where that is a daemon: once it was killed, init is, which never ends."""
    caller = processes.read_process(settings, pid)
    return None if pid == _INIT_PID and caller != read_daemon(settings) else caller


def read_daemon(settings: Settings) -> Process | None:
    """The daemon that has libvirt's QEMU driver, monolithic or not; None where there is none.

    It holds a lock on a file of its own for its life (qemuStateInitialize, libvirt's qemu_driver.c).
    """
    pid = processes.read_lock_holder(f"{settings.libvirt_run}/qemu/driver.pid")
    return processes.read_process(settings, pid) if pid is not None and pid > 0 else None


def find_tokens(settings: Settings, table: ClaimTable, owner: Owner, request: Fixed) -> list[str]:
    """The tokens of what a guest has claimed for one of its interfaces.

    What is exclusive is in a guest once; of a network device that several interfaces share each has a claim.
    """
    names = device_names(settings, request)
    found = (
        claim.token
        for claim in table.read().of(owner)
        if claim.resource.name in names
        and (claim.mode is Mode.EXCLUSIVE or claim.interface == request.interface or claim.mac == request.mac)
    )
    return list(dict.fromkeys(found))


def device_names(settings: Settings, request: Fixed) -> frozenset[str]:
    """What a claim on the device may be about: a network device with a PCI function is known by that."""
    name = real_name(settings, str(request.device))
    inventory = read_inventory(settings, [name])
    nic = inventory.nic_named(name)
    return frozenset({name, inventory.resource_of(nic).name} if nic else {name})


def address_words(pci: PciAddress) -> str:
    """The attributes of libvirt's <address> for a PCI function."""
    parts = (pci.domain, pci.bus, pci.device, pci.function)
    return "domain='{:#06x}' bus='{:#04x}' slot='{:#04x}' function='{:#x}'".format(*parts)
