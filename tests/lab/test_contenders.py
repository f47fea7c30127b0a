"""One VF, two guests: whoever comes second is refused, and whoever came first doesn't notice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.contenders import (
    CONTENDERS,
    HOST,
    Attempt,
    appearance,
    direct_xml,
    hostdev_xml,
    owner_of,
    vnet_lock,
)
from tests.lab.machines import Guests
from tests.lab.nic import Nic

pytestmark = pytest.mark.usefixtures("hook")


@dataclass(slots=True)
class Taken:
    """A VF that a guest has, and what it looked like to begin with."""

    nic: Nic
    guests: Guests
    netdev: str
    kind: str
    first: Attempt
    looks: dict[str, object]


@pytest.fixture(scope="module", params=list(CONTENDERS))
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    """A VF whose guest came first; all second comers try it in turn."""
    nic = Nic(os.environ["VNET_LAB_PF"])
    nic.reset()
    vf = nic.set_numvfs(1)[0]
    nic.set_address(f"{HOST}/24")
    netdev = vf.netdev
    assert netdev
    untouched = appearance(nic, 0)
    guests = Guests(tmp_path_factory.mktemp(request.param))
    try:
        first = CONTENDERS[request.param](guests, vf, netdev, "first", ip="10.7.0.2/24", ping=HOST)
        assert first.runs, first.message
        seen = first.guest.console.ready()
        assert seen["ping"] == "3/3", seen
        yield Taken(nic, guests, netdev, request.param, first, appearance(nic, 0))
        first.end()
        after = appearance(nic, 0)
        # Bound anew it is another link, and igbvf makes up another MAC where the PF has none for it.
        for key in ("ifindex", "operstate", "flags"):
            untouched.pop(key), after.pop(key, None)
        assert after == untouched
        assert owner_of(vf) is None
        assert not os.listdir("/run/vnet-lock/claims")
    finally:
        guests.end()
        nic.reset()


@pytest.mark.parametrize("second", list(CONTENDERS))
def test_the_second_is_refused_and_the_first_does_not_notice(taken: Taken, second: str) -> None:
    vf = taken.nic.vfs[0]
    qemu = taken.first.qemu
    attempt = CONTENDERS[second](taken.guests, vf, taken.netdev, f"second-{second}")
    assert not attempt.runs
    # Given away whole, the VF has no network device that libvirt could name.
    gone = second == "direct" and taken.kind in ("hostdev", "vfio")
    assert ("no network device" if gone else "first") in attempt.message, attempt.message
    if second in ("vfio", "tap"):
        assert attempt.guest.process.returncode == 4  # type: ignore[union-attr]
    assert appearance(taken.nic, 0) == taken.looks
    assert Path(f"/proc/{qemu}").exists()
    assert taken.first.qemu == qemu
    assert owner_of(vf) == "first"
    assert taken.first.guest.console.ask(f"ping {HOST}")["ping"] == "3/3"


def test_the_whole_pf_is_refused_while_a_vf_is_used(taken: Taken) -> None:
    for name, xml in (
        ("whole-direct", direct_xml(taken.nic.pf, "52:54:00:00:77:01")),
        ("whole-hostdev", hostdev_xml(taken.nic.function, "52:54:00:00:77:02")),
    ):
        made = taken.guests.libvirt(name, xml, start=False)
        refused = made.start(check=False)
        assert refused.returncode != 0
        assert "first" in refused.stderr, refused.stderr
    assert taken.nic.function.driver == "igb"
    assert appearance(taken.nic, 0) == taken.looks


def test_the_number_of_vfs_does_not_change_while_one_is_used(taken: Taken) -> None:
    for count in ("0", "3"):
        refused = vnet_lock("vfs", taken.nic.pf, count)
        assert refused.returncode == 4
        assert "first" in refused.stderr
    assert taken.nic.numvfs == 1
    assert appearance(taken.nic, 0) == taken.looks
