"""vnet-lock-ifup: libvirt's <script> of an ethernet interface, which may refuse a device that is another's.

libvirt runs it at a guest's start and at a hot-plug, with the name of the tap or macvtap that it has just
opened, and doesn't say for which guest: nothing is claimed here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vnet_lock.claims import ClaimTable
from vnet_lock.errors import BadInput, Refused
from vnet_lock.front.command import serve
from vnet_lock.kernel.kinship import Kinship
from vnet_lock.kernel.liveness import Liveness
from vnet_lock.kernel.marks import read_mark
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.kernel.processes import read_holders
from vnet_lock.kernel.sysfs import read_macvtap_rdev
from vnet_lock.model import Mode, name_of
from vnet_lock.rules import conflict, holder_text
from vnet_lock.settings import DEFAULT, Settings
from vnet_lock.situation import nic_wanted

_USAGE = """\
usage: vnet-lock-ifup DEVICE

What libvirt runs as <script path='…'/> of an ethernet interface: may a guest have this tap or macvtap? It
claims nothing.

  --help, --version

Exit status: 0 the guest may have it, 1 failed, 2 bad usage or input, 4 refused: held by another.
"""


def main(argv: Sequence[str] | None = None, settings: Settings = DEFAULT) -> int:
    """Check one device and return the exit code: 0 where the guest may have it."""

    def run() -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        if len(words) != 1:
            raise BadInput(
                "libvirt gives it one word, the name of a network device: <script path='…'/>;"
                " see: vnet-lock-ifup --help"
            )
        if not _is_told(settings, words[0]):
            check(settings, words[0], os.getppid())
        return 0

    return serve("vnet-lock-ifup", run)


def _is_told(settings: Settings, word: str) -> bool:
    """Whether we were asked about ourselves: a device may be called so, and 0 would let a guest have it."""
    if word not in ("--help", "-h", "--version") or os.path.lexists(f"{settings.sys}/class/net/{word}"):
        return False
    if word == "--version":
        from importlib.metadata import version  # 40 ms

        print(f"vnet-lock-ifup {version('vnet-lock')}")
    else:
        print(_USAGE, end="")
    return True


def check(settings: Settings, netdev: str, opener: int) -> None:
    """Raise Refused where the device, or what it stands on, is another guest's.

    ``opener`` is the pid of the daemon that has opened it for a guest. BadInput where there is none.
    """
    inventory = read_inventory(settings, [netdev])
    nic = inventory.nic_named(netdev)
    if nic is None:
        raise BadInput(f"there is no network device {netdev!r}; see: ip link")
    mark = read_mark(settings, netdev)
    claims = ClaimTable(settings).read()
    stale = Liveness(settings).stale(claims)
    living = [claim for claim in claims.records if claim.token not in stale]
    if mark is not None and not any(claim.token == mark for claim in living):
        raise Refused(f"device {netdev} was made for a guest that is gone; see: vnet-lock status")
    rdev = read_macvtap_rdev(settings, netdev)
    for user in read_holders(settings, {rdev}).get(rdev, ()) if rdev else ():
        if user.pid != opener:
            raise Refused(f"device {netdev} is in use {user.by_whom}; stop that, or name another device")
    distrusted = {record.resource: record for record in claims.damaged}
    for wanted in nic_wanted(inventory, nic, Mode.SHARED)[1:]:
        if wanted.resource in distrusted:
            raise Refused(
                f"device {netdev} stands on {name_of(wanted.resource)}, which counts as held: "
                f"{distrusted[wanted.resource].path} cannot be trusted; see: vnet-lock status"
            )
        for claim in living:
            if claim.token != mark and conflict(wanted, claim):
                holder = holder_text(claim, Kinship(settings).guest_pid)
                raise Refused(
                    f"device {netdev} stands on {name_of(wanted.resource)}, which is held by {holder}; "
                    f"see: vnet-lock show {claim.resource}"
                )


if __name__ == "__main__":
    sys.exit(main())
