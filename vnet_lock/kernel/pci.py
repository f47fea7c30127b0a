"""PCI functions: their drivers and the number of their VFs, read and changed through sysfs.

Says what is bound; never decides who may have it, and never takes a function from a process that has it open.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from vnet_lock.errors import BadInput, Refused, Unsupported, Vanished, VnetLockError
from vnet_lock.kernel.sysfs import read_vfio_rdevs
from vnet_lock.model import PciAddress
from vnet_lock.settings import Settings

if TYPE_CHECKING:
    from typing import NoReturn

_MODPROBE_TIMEOUT_S = 30


def is_vfio_driver(driver: str | None) -> bool:
    """Whether a driver gives the function to user space: vfio-pci, or a variant like mlx5_vfio_pci."""
    return driver is not None and "vfio" in driver.replace("_", "-").split("-")


def read_driver(settings: Settings, pci: PciAddress) -> str | None:
    """The driver that a function is bound to; None for none. Vanished where there is no such function."""
    try:
        return os.path.basename(os.readlink(f"{_device(settings, pci)}/driver"))
    except FileNotFoundError as error:
        if not os.path.isdir(_device(settings, pci)):
            _vanished(pci, error)
        return None


def read_driver_override(settings: Settings, pci: PciAddress) -> str | None:
    """The only driver that may be bound to a function; None where any may."""
    try:
        with open(f"{_device(settings, pci)}/driver_override", encoding="utf-8") as file:
            text = file.read().strip()
    except FileNotFoundError as error:
        if not os.path.isdir(_device(settings, pci)):
            _vanished(pci, error)
        return None
    return None if text in ("", "(null)") else text


def set_driver_override(settings: Settings, pci: PciAddress, driver: str | None) -> None:
    """Say which driver alone may be bound to a function; None: any."""
    # An empty line takes it back (Documentation/ABI/testing/sysfs-bus-pci).
    _write(
        f"{_device(settings, pci)}/driver_override", (driver or "") + "\n", f"driver_override of {pci}", pci
    )


def bind_driver(settings: Settings, pci: PciAddress, driver: str | None) -> None:
    """Bind a function to a driver, or leave it without one (None), and see that it is so.

    driver_override is what it was before. vfio drivers are loaded where they are missing.

    Refused where a process has the function open through VFIO: taking the driver away would block until it
    lets go. Unsupported where there is no such driver, or it doesn't take the function.
    """
    before = read_driver(settings, pci)
    if before == driver:
        return
    if driver is not None:
        _require_driver(settings, driver)
    if before is not None:
        _unbind(settings, pci, before)
    if driver is not None:
        override = read_driver_override(settings, pci)
        set_driver_override(settings, pci, driver)
        try:
            _write(f"{settings.sys}/bus/pci/drivers_probe", pci.text, f"probing {pci} for {driver}", pci)
        finally:
            set_driver_override(settings, pci, override)
    after = read_driver(settings, pci)
    if after != driver:
        raise Unsupported(f"{pci} is bound to {after or 'no driver'}, not {driver or 'none'}; see: dmesg")


def read_numvfs(settings: Settings, pf: PciAddress) -> int:
    """How many VFs a PF has; Unsupported where it has no SR-IOV."""
    return _read_sriov(settings, pf, "sriov_numvfs")


def set_numvfs(settings: Settings, pf: PciAddress, count: int) -> None:
    """Change the number of a PF's VFs, which destroys those that there are, whoever uses them.

    BadInput where the PF can't have so many; Unsupported where it has no SR-IOV or its driver refuses.
    """
    total = _read_sriov(settings, pf, "sriov_totalvfs")
    if not 0 <= count <= total:
        raise BadInput(f"PF {pf} can have 0 to {total} VFs, not {count}")
    before = read_numvfs(settings, pf)
    if before == count:
        return
    path = f"{_device(settings, pf)}/sriov_numvfs"
    # The kernel takes no change from one number of VFs to another (sriov_numvfs_store: EBUSY).
    for step in (0, count) if before and count else (count,):
        _write(path, str(step), f"setting sriov_numvfs of {pf} to {step}", pf)
    after = read_numvfs(settings, pf)
    if after != count:
        raise VnetLockError(f"PF {pf} has {after} VFs after {count} were asked for; see: dmesg")


def _require_driver(settings: Settings, driver: str) -> None:
    """See that a driver is registered, and load it if it is one of VFIO's."""
    path = f"{settings.sys}/bus/pci/drivers/{driver}"
    if not os.path.isdir(path) and is_vfio_driver(driver):
        _load_module(driver)
    if not os.path.isdir(path):
        raise Unsupported(f"there is no driver {driver} here; run: modprobe {driver}")


def _load_module(name: str) -> None:
    import subprocess  # 10 ms, and only where a module is missing

    try:
        done = subprocess.run(
            ["modprobe", "--", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_MODPROBE_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise Unsupported(f"module {name} is not loaded and there is no modprobe; install kmod") from error
    except subprocess.TimeoutExpired as error:
        raise VnetLockError(
            f"modprobe {name} took longer than {_MODPROBE_TIMEOUT_S} s; see: dmesg"
        ) from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise Unsupported(f"module {name} cannot be loaded: {said}")


def _unbind(settings: Settings, pci: PciAddress, driver: str) -> None:
    if is_vfio_driver(driver):
        _refuse_if_open(settings, pci)
    path = f"{settings.sys}/bus/pci/drivers/{driver}/unbind"
    try:
        _write(path, pci.text, f"unbinding {pci} from {driver}", pci)
    except Vanished:
        # It lost its driver between our reading and writing (ENODEV), which is what we wanted.
        if read_driver(settings, pci) is not None:
            raise


def _refuse_if_open(settings: Settings, pci: PciAddress) -> None:
    from vnet_lock.kernel.processes import read_holders  # only where something is unbound

    for users in read_holders(settings, read_vfio_rdevs(settings, pci)).values():
        for user in users:
            raise Refused(
                f"{pci} is in use {user.by_whom}; stop that first, its driver cannot be taken away under it",
                resource=pci.text,
                holder=user.text,
            )


def _read_sriov(settings: Settings, pf: PciAddress, name: str) -> int:
    try:
        with open(f"{_device(settings, pf)}/{name}", encoding="ascii") as file:
            return int(file.read())
    except FileNotFoundError as error:
        if not os.path.isdir(_device(settings, pf)):
            _vanished(pf, error)
        raise Unsupported(f"{pf} has no SR-IOV (no {name}); see: vnet-lock status") from error


def _write(path: str, text: str, what: str, pci: PciAddress) -> None:
    """One write to sysfs; errors say what was tried."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            raise Vanished(f"{what} failed: {error.strerror}; is {pci} still there?") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Unsupported(
                f"{what} failed: {error.strerror}; run as root, with a writable sysfs"
            ) from error
        if error.errno == errno.EBUSY:
            raise VnetLockError(f"{what} failed: in use; see: vnet-lock status") from error
        raise VnetLockError(f"{what} failed: {error.strerror}; see: dmesg") from error


def _device(settings: Settings, pci: PciAddress) -> str:
    return f"{settings.sys}/bus/pci/devices/{pci.text}"


def _vanished(pci: PciAddress, error: OSError) -> NoReturn:
    raise Vanished(f"there is no PCI function {pci} here (any more); see: vnet-lock status") from error
