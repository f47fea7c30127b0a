"""libvirt's errors as ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import libvirt

from vnet_lock.errors import BadInput, Unsupported, Vanished, VnetLockError

# What turns libvirt's errors into ours within it, with what they are about before them.
About = Callable[[str], AbstractContextManager[None]]

_BAD_INPUT = (
    libvirt.VIR_ERR_NO_DOMAIN,
    libvirt.VIR_ERR_XML_ERROR,
    libvirt.VIR_ERR_XML_DETAIL,
    libvirt.VIR_ERR_XML_INVALID_SCHEMA,
)
_UNSUPPORTED = (
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
    libvirt.VIR_ERR_NO_SUPPORT,
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
)
# What libvirt puts around a hook's own words.
_OF_A_HOOK = re.compile(r".*?\bvnet-lock: (.*)", re.DOTALL)


class Disconnected(VnetLockError):
    """There is no libvirt daemon at the other end (any more)."""


class Busy(VnetLockError):
    """Something else is done to the guest, and libvirt gave up waiting for its end (after 30 s)."""


@contextmanager
def translated(what: str, is_alive: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Libvirt's errors as ours, with what they are about before them."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise _error_of(error, what, is_alive) from error
    except SystemError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # ^C, noticed while libvirt told of another error
            raise KeyboardInterrupt from error
        raise
    except ValueError as error:  # a letter that is no text, or a NUL, where libvirt wants a name
        raise BadInput(f"{what}: {error}") from error


def _error_of(error: Any, what: str, is_alive: Callable[[], bool]) -> VnetLockError:
    code = error.get_error_code()
    message = " ".join(str(error.get_error_message() or error).split())
    if code == libvirt.VIR_ERR_HOOK_SCRIPT_FAILED and (match := _OF_A_HOOK.fullmatch(message)):
        message = match[1]
    message = f"{what}: {message}"
    # An error of RPC's own is about what was to be sent.
    is_lost = error.get_error_domain() == libvirt.VIR_FROM_RPC and code != libvirt.VIR_ERR_RPC
    if code == libvirt.VIR_ERR_NO_CONNECT or is_lost:
        return Disconnected(f"{message}; is libvirt's daemon running?")
    if not is_alive():
        return Disconnected(message)
    if code in _BAD_INPUT:
        return BadInput(message)
    if code in _UNSUPPORTED:
        return Unsupported(message)
    if code == libvirt.VIR_ERR_DEVICE_MISSING:
        return Vanished(message)
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return Busy(f"{message}; try again")
    return VnetLockError(message)
