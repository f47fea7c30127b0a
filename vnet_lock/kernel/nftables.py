"""The nftables table of a NAT bridge: one for each, made and removed in one transaction of nft's.

IPv4 only: what else a guest sends is not forwarded. Other tables of the host stay in force: what they drop is
dropped (an accept here ends nothing there).
"""

from __future__ import annotations

import re

from vnet_lock.errors import Unsupported
from vnet_lock.kernel import programs

# A device's name may be nearly anything: a quote would end nft's string, an asterisk be any end.
_PLAIN = re.compile(r"[A-Za-z0-9_.@-]+")


def make_table(bridge: str, subnet: str, uplink: str | None) -> None:
    """Hide ``subnet`` (10.0.0.0/24) behind the host's addresses; made anew where it is there already.

    What comes from the bridge leaves by ``uplink`` alone, or by any other device where that is None.
    Unsupported where that has a name that nft's language has no words for.
    """
    if uplink and not _PLAIN.fullmatch(uplink):
        raise Unsupported(f"{uplink!r} can't be named in a rule of nft's; give it a plain name: ip link set")
    programs.run("nft", "-f", "-", text=_absent(bridge) + _table(bridge, subnet, uplink))


def remove_table(bridge: str) -> None:
    """Remove a bridge's table; absent is success."""
    programs.run("nft", "-f", "-", text=_absent(bridge))


def _name(bridge: str) -> str:
    # Only letters, digits and _ need no quotes in nft's language, and all versions take them.
    return "vnet_lock_" + "".join(letter if letter.isalnum() else "_" for letter in bridge)


def _absent(bridge: str) -> str:
    """Made first, so that deleting it never fails: "destroy" came with nft 1.0.6 and kernel 6.3."""
    return f"table inet {_name(bridge)}\ndelete table inet {_name(bridge)}\n"


def _table(bridge: str, subnet: str, uplink: str | None) -> str:
    from_guest = f'iifname "{bridge}" oifname != "{bridge}"'
    to_guest = f'oifname "{bridge}" iifname != "{bridge}"'
    out = f'oifname "{uplink}"' if uplink else f'oifname != "{bridge}"'
    only_uplink = f'        {from_guest} oifname != "{uplink}" drop\n' if uplink else ""
    # Nobody outside begins a connection, and nothing leaves that isn't masqueraded: that is the policy.
    return f"""\
table inet {_name(bridge)} {{
    chain forward {{
        type filter hook forward priority filter; policy accept;
        {from_guest} meta nfproto ipv6 drop
        {from_guest} ip saddr != {subnet} drop
{only_uplink}        {to_guest} ct state != {{ established, related }} drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} {out} masquerade
    }}
}}
"""
