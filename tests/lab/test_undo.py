"""From its claim's journal alone a VF gets back what a killed guest changed, also what it can't set itself.

igb lets an untrusted VF change its MAC only until its PF has set one. From then on the VF takes the PF's,
when its driver is bound anew.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.contenders import CONTENDERS, HOST, appearance, owner_of, vnet_lock
from tests.lab.machines import Guests
from tests.lab.nic import Function, Nic, run, settle, wait_until
from vnet_lock.claims import ClaimTable
from vnet_lock.model import Claim
from vnet_lock.settings import DEFAULT
from vnet_lock.undo import undo

PF_MAC = "52:54:00:00:20:01"


@dataclass(frozen=True, slots=True)
class Before:
    """What was done to the VF before its guest came.

    ``keeps``: it may set its MAC itself, so it stays the same link throughout. ``mac``: the one that it has
    afterwards, where that isn't the one that it had.
    """

    name: str
    words: tuple[str, ...] = ()
    bound_anew: bool = False
    up: bool = False
    netdev: str | None = None
    keeps: bool = False
    mac: str | None = None

    def set_up(self, nic: Nic, vf: Function) -> None:
        for words in self.words:
            run("ip", "link", "set", nic.pf, "vf", "0", *words.split())
        if self.bound_anew:
            vf.bind("igbvf")
            wait_until(lambda: vf.netdev, "the VF has a network device")
            settle()
        netdev = vf.netdev
        assert netdev
        if self.netdev:
            run("ip", "link", "set", netdev, "name", self.netdev)
            netdev = self.netdev
        if self.up:
            # An address that a router gives it would be the host's own use of it.
            Path(f"/proc/sys/net/ipv6/conf/{netdev}/accept_ra").write_text("0")
            run("ip", "link", "set", netdev, "addrgenmode", "none")
            run("ip", "link", "set", netdev, "mtu", "1400", "allmulticast", "on", "up")


BEFORE = [
    Before("untouched"),
    Before("up", up=True),
    Before("renamed", up=True, netdev="uplink7"),
    Before("administrative", (f"mac {PF_MAC}",), bound_anew=True, up=True),
    Before("administrative-to-come", (f"mac {PF_MAC}",), mac=PF_MAC),
    Before("trusted", (f"mac {PF_MAC}", "trust on"), bound_anew=True, up=True, keeps=True),
]
# A CI sees the others.
LONG = ("renamed", "administrative-to-come", "trusted")


def looks(nic: Nic) -> dict[str, object]:
    """The VF, without what comes and goes by itself; of its flags, whether it is up and allmulticast."""
    found = appearance(nic, 0)
    found.pop("operstate", None)
    mode = Path(f"/proc/sys/net/ipv6/conf/{found['netdev']}/addr_gen_mode")
    found["addr_gen_mode"] = mode.read_text() if mode.exists() else None
    return found | {"flags": int(str(found.get("flags", "0")), 16) & 0x201}


def kill_guest(nic: Nic, guests: Guests, kind: str) -> Claim:
    """Let a plain guest have the VF, with a MAC of its own, and kill it and its wrapper; the claim stays."""
    vf = nic.vfs[0]
    attempt = CONTENDERS[kind](guests, vf, vf.netdev, "killed", ip="10.7.0.2/24", ping=HOST)
    assert attempt.runs, attempt.message
    qemu = attempt.qemu
    attempt.guest.kill(signal.SIGKILL)  # type: ignore[union-attr]
    os.kill(qemu, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{qemu}").exists(), "QEMU is gone")
    claims = [claim for claim in ClaimTable(DEFAULT).read().records if claim.journal]
    assert len(claims) == 1
    return claims[0]


@pytest.fixture(autouse=True)
def _no_claim_is_left(lab: Nic, guests: Guests) -> Iterator[None]:
    """What fails here fails no other test."""
    del guests
    yield
    for vf in lab.vfs:
        vnet_lock("release", f"vf:{vf.pci}", "--force")
    for path in Path("/run/vnet-lock/claims").glob("*"):
        path.unlink()


@pytest.mark.parametrize("kind", ["tap", "vfio"])
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(before, id=before.name, marks=[pytest.mark.long] * (before.name in LONG))
        for before in BEFORE
    ],
)
def test_a_vf_gets_its_own_mac_back_that_it_may_not_set_itself(
    lab: Nic, guests: Guests, before: Before, kind: str
) -> None:
    vf = lab.set_numvfs(1)[0]
    before.set_up(lab, vf)
    as_it_was = looks(lab)
    claim = kill_guest(lab, guests, kind)
    assert looks(lab) != as_it_was
    assert undo(DEFAULT, claim) == []
    first = looks(lab)
    assert (first["ifindex"] == as_it_was["ifindex"]) is (before.keeps and kind == "tap")
    changes = {"ifindex": first["ifindex"]} | ({"mac": before.mac} if before.mac else {})
    assert first == as_it_was | changes
    assert undo(DEFAULT, claim) == []
    assert looks(lab) == first
    assert vnet_lock("gc").returncode == 0
    assert owner_of(vf) is None
    assert looks(lab) == first
