"""The kernel's settings below /proc/sys, by their path there: ``net/ipv4/conf/eth0/forwarding``."""

from __future__ import annotations

from vnet_lock.errors import Unsupported, Vanished, VnetLockError
from vnet_lock.settings import Settings


def read(settings: Settings, name: str) -> str:
    """A setting's value; Vanished where there is none of that name (any more)."""
    try:
        with open(_path(settings, name), encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError as error:
        raise Vanished(f"this kernel has no setting {name} (any more); see: sysctl -a") from error


def write(settings: Settings, name: str, value: str) -> None:
    """Set it; Vanished where there is no such setting, Unsupported where it may not be written."""
    try:
        with open(_path(settings, name), "w", encoding="ascii") as file:
            file.write(value)
    except FileNotFoundError as error:
        raise Vanished(f"this kernel has no setting {name} (any more); see: sysctl -a") from error
    except PermissionError as error:
        raise Unsupported(f"setting {name} to {value} failed: {error.strerror}; run as root") from error
    except OSError as error:
        raise VnetLockError(
            f"setting {name} to {value} failed: {error.strerror}; see: sysctl {name}"
        ) from error


def restore(settings: Settings, name: str, value: str) -> None:
    """Set it back unless it is so already; a setting that is gone with its device is no loss."""
    if read(settings, name) != value:
        write(settings, name, value)


def _path(settings: Settings, name: str) -> str:
    return f"{settings.proc}/sys/{name}"
