"""The combinations that need vhost-net, on wires: packets, policies with two guests, nothing left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.machines import Guests
from tests.lab.nic import Nic, run
from tests.policies import HARDWARE, IN_LAB, Case, Footprint, Pair, start_pair
from tests.wires import Outside, Wire
from vnet_lock.combination import Combination

# Two guests boot, on a machine that may have other things to do, too.
pytestmark = pytest.mark.timeout(1800)

ON_WIRES = tuple(one for one in IN_LAB if one.port not in HARDWARE)


@pytest.fixture(scope="module")
def nic() -> Iterator[Nic]:
    made = Nic(os.environ["VNET_LAB_PF"])
    made.reset()
    yield made
    made.reset()


@pytest.fixture(scope="module")
def outside(nic: Nic) -> Iterator[Outside]:
    made = Outside()
    made.open()
    try:
        yield made
    finally:
        made.close()


@contextmanager
def booted(cases: dict[Combination, Case], outside: Outside, folder: Path) -> Iterator[Pair]:
    """Two guests on all of these, and everything as it was when they have ended."""
    guests = Guests(folder)
    for case in cases.values():
        case.open()
    laid = Footprint.read()
    try:
        made = start_pair(guests, outside, cases)
        yield made
        for neighbour in made.both():
            neighbour.guest.kill(signal.SIGTERM)
            assert neighbour.guest.wait(120) == 0
        laid.wait_until_again(60)
    finally:
        guests.end()
        run("vnet-lock", "gc")
        for case in cases.values():
            case.close()


def asked_for(request: pytest.FixtureRequest, name: str) -> list[Combination]:
    """What this run is about, of the parameters with a name."""
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    return [one.callspec.params[name] for one in mine if name in getattr(one, "callspec", _NONE).params]


class _NONE:
    params: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def on_wires(
    outside: Outside, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    asked = asked_for(request, "wired")
    cases = {one: Case(one, Wire(number)) for number, one in enumerate(asked)}
    with booted(cases, outside, tmp_path_factory.mktemp("wires")) as pair:
        yield pair


@pytest.mark.parametrize("wired", ON_WIRES, ids=lambda one: one.text)
def test_guests_exchange_packets_and_the_policy_holds(on_wires: Pair, wired: Combination) -> None:
    on_wires.show(wired)
