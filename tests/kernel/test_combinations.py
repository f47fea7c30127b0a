"""All combinations that need no vhost-net and no SR-IOV NIC: packets, policies, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import need, own_namespaces
from tests.kernel.test_crash import kill_all, start
from tests.kernel.test_wrapper import QEMU, children_of, eventually, handles_signals
from tests.lab.machines import Guests
from tests.policies import IN_NAMESPACES, Case, Footprint, Pair, lay_wires, start_pair
from tests.wires import Outside, Wire
from vnet_lock.combination import Combination

VNET_LOCK = str(Path(sys.executable).with_name("vnet-lock"))
# Two guests boot, in an emulated CPU.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    """The module's own namespaces, with the far end of all wires."""
    need(os.geteuid() == 0, "root")
    need(shutil.which("qemu-system-x86_64"), "qemu-system-x86_64")
    with own_namespaces():
        made = Outside()
        made.open()
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def pair(
    outside: Outside, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Two guests, with a network of each combination that is asked for in this run."""
    asked = [item.callspec.params["shown"] for item in request.session.items if "shown" in _params(item)]
    guests = Guests(tmp_path_factory.mktemp("guests"), accel="tcg")
    before = Footprint.read()
    cases = lay_wires(asked)
    laid = Footprint.read()
    try:
        made = start_pair(guests, outside, cases)
        yield made
        for neighbour in made.both():
            neighbour.guest.kill(signal.SIGTERM)
            assert neighbour.guest.wait() == 0
        laid.wait_until_again()
    finally:
        guests.end()
        for case in cases.values():
            case.close()
    before.wait_until_again()


def _params(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") and item.path == Path(__file__) else {}


@pytest.mark.parametrize("shown", IN_NAMESPACES, ids=lambda one: one.text)
def test_guests_exchange_packets_and_the_policy_holds(pair: Pair, shown: Combination) -> None:
    pair.show(shown)


@pytest.fixture
def case(outside: Outside, combination: Combination) -> Iterator[Case]:
    """One combination's wire, which is as it was at the end."""
    del outside
    made = Case(combination, Wire(77))
    made.open()
    try:
        before = Footprint.read()
        yield made
        subprocess.run([VNET_LOCK, "gc"], check=True, capture_output=True)
        before.wait_until_again()
    finally:
        made.close()


def words(case: Case) -> str:
    return " ".join([QEMU, *case.devices(2)])


def is_up(process: subprocess.Popen[bytes]) -> bool:
    """Whether QEMU is there, and so far that it handles signals itself."""
    return any(handles_signals(pid) for pid in children_of(process.pid))


@pytest.mark.parametrize("combination", IN_NAMESPACES, ids=lambda one: one.text)
def test_twice_in_a_row_leaves_nothing_behind(case: Case, combination: Combination) -> None:
    del combination
    before = Footprint.read()
    for _ in range(2):
        process = start(words(case))
        try:
            eventually(lambda process=process: is_up(process), 60)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                kill_all(process)
        before.wait_until_again()


@pytest.mark.parametrize("delay_s", [0.35, 0.6, None], ids=["early", "later", "running"])
@pytest.mark.parametrize("combination", IN_NAMESPACES, ids=lambda one: one.text)
def test_killed_half_way_and_healed_nothing_is_left(
    case: Case, combination: Combination, delay_s: float | None
) -> None:
    """The fixture heals, and compares."""
    del combination
    process = start(words(case))
    if delay_s is None:
        eventually(lambda: is_up(process), 60)
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay_s)
    kill_all(process)
