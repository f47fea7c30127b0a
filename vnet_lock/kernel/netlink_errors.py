"""What the kernel's errno means where a network device is changed, and what to do then."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vnet_lock.errors import Unsupported, Vanished, VnetLockError

NEW_MACVLAN = {
    errno.EADDRINUSE: "a device on it has that MAC already; see: ip -d link show type macvtap",
    errno.EBUSY: "it is a port of a bridge or bond, or a passthru macvtap has it; see: vnet-lock show",
    errno.EINVAL: "passthru takes a device with no other macvtap or macvlan on it; see: vnet-lock show",
    errno.EEXIST: "there is a device of that name; see: ip link",
}
NEW_TAP = {
    errno.EBUSY: "there is a device of that name; see: ip link",
    errno.EINVAL: "there is a device of that name that is no tap; see: ip link",
}
NEW_BRIDGE = {
    errno.EEXIST: "there is a device of that name; see: ip link",
    errno.EOPNOTSUPP: "this kernel has no bridge; run: modprobe bridge",
}
NEW_VETH = {
    errno.EEXIST: "there is a device of that name; see: ip link",
    errno.EOPNOTSUPP: "this kernel has no veth; run: modprobe veth",
}
NEW_VLAN = {
    errno.EEXIST: "another VLAN device on it has that VLAN, or that name; see: ip -d link show type vlan",
    errno.EOPNOTSUPP: "this kernel has no VLAN devices; run: modprobe 8021q",
}
RENAME = {
    errno.EEXIST: "another device has that name; see: ip link",
    errno.EINVAL: "the kernel takes no such name",
    errno.ERANGE: "a device's name has 15 bytes at most",
    errno.EBUSY: "it is up; set it down first",
}
MTU = {errno.EINVAL: "the device takes no such MTU; see: ip -d link"}
MAC = {
    errno.EADDRINUSE: "another device on the same lower device has that MAC",
    errno.EADDRNOTAVAIL: "the device takes no such MAC; a VF whose MAC was set through its PF needs trust",
    errno.EBUSY: "the device must be down for that",
    errno.EPERM: "not permitted; a VF whose MAC was set through its PF needs trust",
}
UP = {
    errno.EADDRINUSE: "another device on the same lower device has its MAC; see: ip -d link",
    errno.ENETDOWN: "its lower device is down; set that up first",
    errno.EBUSY: "its MAC is the lower device's own; give it another",
}
MOVE = {
    errno.EEXIST: "there is a device of that name already",
    errno.EINVAL: "its driver keeps it where it is",
}
MASTER = {
    errno.EBUSY: "it is a port of another bridge, or a macvtap stands on it; see: ip -d link",
    errno.EINVAL: "that device takes no such port",
    errno.ELOOP: "that would be a loop",
    errno.EOPNOTSUPP: "that is neither a bridge nor a bond",
}
_GONE = (errno.ENODEV, errno.ENOENT, errno.ENXIO)
_CANNOT = (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES)


@contextmanager
def explained(what: str, device: str, meanings: dict[int, str]) -> Iterator[None]:
    """Turn the kernel's errno into an error of ours, which says what was tried and what to do."""
    try:
        yield
    except OSError as error:
        code = error.errno
        cause = meanings.get(code or 0) or f"{os.strerror(code) if code else error}"
        message = f"{what} failed: {cause}"
        if code in _GONE:
            raise Vanished(f"{what} failed: {device} is not there (any more); see: ip link") from error
        if code in (errno.EPERM, errno.EACCES) and code not in meanings:
            raise Unsupported(f"{message}; run as root") from error
        if code in _CANNOT:
            raise Unsupported(message) from error
        raise VnetLockError(message) from error
