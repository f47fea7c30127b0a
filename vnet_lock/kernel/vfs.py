"""Sets VFs through their PF, which is meant by its name in this network namespace.

That is done by netlink.py; how they are set is rtnetlink.py's to read.
"""

from __future__ import annotations

import errno
from typing import Any

from vnet_lock.errors import BadInput
from vnet_lock.kernel import netlink

_REFUSED = {
    errno.EINVAL: "there is no such VF, or the driver doesn't take that value; see: ip link show",
    errno.EOPNOTSUPP: "the driver of the PF has no such setting",
    errno.EBUSY: "the VF is not ready yet; set the PF up and try again",
    errno.EAGAIN: "the VF is not ready yet; set the PF up and try again",
}


def set_vf(
    pf_netdev: str,
    index: int,
    *,
    mac: str | None = None,
    vlan: int | None = None,
    qos: int | None = None,
    spoofchk: bool | None = None,
    trust: bool | None = None,
    link_state: int | None = None,
    min_tx_rate_mbps: int | None = None,
    max_tx_rate_mbps: int | None = None,
) -> None:
    """Change of a VF, through its PF, what is not None.

    VLAN 0 is none; ``qos`` goes with a VLAN. ``link_state`` is one of IFLA_VF_LINK_STATE_*
    (include/uapi/linux/if_link.h). Rates are in Mbit/s, 0 is no limit. Each setting is a request of its own,
    so the error says which one was refused; trust comes first, because some drivers refuse a MAC while it is
    off.
    """
    if qos is not None and vlan is None:
        raise BadInput(f"VF {index} of {pf_netdev}: qos {qos} needs a VLAN beside it")
    settings: list[tuple[str, dict[str, Any]]] = []
    if trust is not None:
        settings.append((f"trust {_onoff(trust)}", {"trust": int(trust)}))
    if mac is not None:
        settings.append((f"MAC {mac}", {"mac": mac}))
    if vlan is not None:
        settings.append((f"VLAN {vlan}", {"vlan": {"vlan": vlan, "qos": qos or 0}}))
    if spoofchk is not None:
        settings.append((f"spoofchk {_onoff(spoofchk)}", {"spoofchk": int(spoofchk)}))
    if link_state is not None:
        settings.append((f"link-state {link_state}", {"link_state": link_state}))
    if min_tx_rate_mbps is not None or max_tx_rate_mbps is not None:
        rate = {"min_tx_rate": min_tx_rate_mbps or 0, "max_tx_rate": max_tx_rate_mbps or 0}
        settings.append((f"rates {rate['min_tx_rate']} to {rate['max_tx_rate']} Mbit/s", {"rate": rate}))
    for words, setting in settings:
        _set(pf_netdev, f"setting VF {index} of {pf_netdev} to {words}", {"vf": index, **setting})


def _set(pf_netdev: str, what: str, vf: dict[str, Any]) -> None:
    netlink.change(pf_netdev, what, _REFUSED, lambda route, index: route.link("set", index=index, vf=vf))


def _onoff(value: bool) -> str:
    return "on" if value else "off"
