"""The mode of a PF's embedded switch, for all of its VFs: ``veb`` or ``vepa``.

For hooks, so on our own wire (netlink_wire.py), changing it too: pyroute2 has no call for it that all its
versions know.
Numbers and layouts are from the kernel's include/uapi/linux/{netlink,rtnetlink,if_link,if_bridge}.h.
"""

from __future__ import annotations

import errno
import struct
import sys

from vnet_lock.errors import BadInput
from vnet_lock.kernel.netlink_wire import (
    NLM_F_ACK,
    RTM_GETLINK,
    ask,
    dump,
    open_route_socket,
    pack,
    pack_ext_mask,
    pack_link,
    parse_attributes,
    read_ifindex,
    split_link,
)

_AF_BRIDGE = 7
_RTM_SETLINK, _NLA_F_NESTED = 19, 0x8000
_IFLA_PROTINFO, _IFLA_AF_SPEC = 12, 26
_IFLA_BRIDGE_FLAGS, _IFLA_BRIDGE_MODE = 0, 1
_BRIDGE_FLAGS_SELF = 2
_NUMBERS = {"veb": 0, "vepa": 1}
_MODES = {number: mode for mode, number in _NUMBERS.items()}
_REFUSED = {
    errno.EOPNOTSUPP: "its driver has no such mode; see: bridge link set dev … hwmode",
    errno.EINVAL: "its driver takes no such mode now; see: dmesg",
}


def read_modes() -> dict[int, str]:
    """The mode of embedded switches by ifindex of the PF: ``veb`` or ``vepa``, where the driver tells."""
    modes: dict[int, str] = {}
    for message in dump("embedded switches", RTM_GETLINK, pack_link(_AF_BRIDGE) + pack_ext_mask()):
        ifindex, attributes = split_link(message)
        spec = dict(parse_attributes(attributes.get(_IFLA_AF_SPEC, b"")))
        if len(spec.get(_IFLA_BRIDGE_MODE, b"")) == 2:
            mode = _MODES.get(int.from_bytes(spec[_IFLA_BRIDGE_MODE], sys.byteorder))
            if mode is not None:
                modes[ifindex] = mode
    return modes


def read_mode(pf_netdev: str) -> str | None:
    """The mode of one PF's embedded switch, None where the driver doesn't tell or the PF is gone."""
    import socket  # loaded by then

    try:
        return read_modes().get(socket.if_nametoindex(pf_netdev))
    except OSError:
        return None


def set_mode(pf_netdev: str, mode: str) -> None:
    """Set a PF's embedded switch, for all of its VFs, to ``veb`` or ``vepa``.

    Unsupported where the driver has no such modes. The request is the one that iproute2 sends for
    ``bridge link set dev PF hwmode MODE``.
    """
    if mode not in _NUMBERS:
        raise BadInput(f"embedded switch mode {mode!r} is none of: {', '.join(_NUMBERS)}")
    from vnet_lock.kernel.netlink_errors import explained

    attributes = struct.pack("=H", _BRIDGE_FLAGS_SELF), struct.pack("=H", _NUMBERS[mode])
    spec = pack(_IFLA_BRIDGE_FLAGS, attributes[0]) + pack(_IFLA_BRIDGE_MODE, attributes[1])
    body = pack_link(_AF_BRIDGE, read_ifindex(pf_netdev))
    body += pack(_IFLA_PROTINFO | _NLA_F_NESTED, b"") + pack(_IFLA_AF_SPEC, spec)
    what = f"setting the embedded switch of {pf_netdev} to {mode}"
    with explained(what, pf_netdev, _REFUSED), open_route_socket() as route:
        list(ask(route, _RTM_SETLINK, NLM_F_ACK, body))
