"""The combinations on VFs and whole NICs: packets and policies with two guests, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from tests.lab.machines import Guests, PlainGuest
from tests.lab.nic import Nic, run, settle, wait_until
from tests.lab.test_combinations import ON_WIRES, booted, nic, outside
from tests.policies import IN_LAB, Case, Footprint, Pair
from tests.wires import OUTSIDE, Outside, Wire, ip
from vnet_lock.combination import Backend, Combination, Policy, Port

__all__ = ["nic", "outside"]  # fixtures

pytestmark = pytest.mark.timeout(1800)

VEB, PRIVATE, REFUSED = (
    tuple(one for one in IN_LAB if one.port is Port.SRIOV and one.policy is policy)
    for policy in (Policy.VEB, Policy.PRIVATE, Policy.VEPA)
)
# The PF has a VF for the far end, and three for each of two guests.
GROUPS = (VEB[:3], VEB[3:], PRIVATE[:3], PRIVATE[3:])
WHOLE = tuple(one for one in IN_LAB if one.port is Port.PHYSDEV)
# Their network is another than those of wires.
VF_NETWORK = 100


@dataclass(frozen=True, slots=True)
class VfWire(Wire):
    """The PF's embedded switch in the place of a wire: its far end is the PF's first VF, moved outside."""

    REFLECTIONS: ClassVar = (False,)

    pf: str

    @property
    def dev(self) -> str:
        return self.pf

    def open(self) -> None:
        ip(f"address add {self.peer}/24 dev far", OUTSIDE)

    def close(self) -> None:
        ip(f"address delete {self.peer}/24 dev far", OUTSIDE)
        self.leave_vlan()

    def leave_vlan(self) -> None:
        """Put the far end where it was before it faced a private guest."""
        ip(f"link set {self.pf} vf 0 vlan 0")

    def reflect(self, on: bool) -> None:
        """An embedded switch does what its mode says."""


@dataclass(frozen=True, slots=True)
class VfCase(Case):
    """A combination on VFs; a private guest has a VLAN that no other has."""

    def vlan(self, host: int) -> int:
        return 100 * host + self.wire.number

    def more(self, host: int) -> list[str]:
        return [f"vlan={self.vlan(host)}"] if self.combination.policy is Policy.PRIVATE else []

    def face(self, host: int) -> None:
        """Put the far end into the guest's VLAN, as whoever runs that network would."""
        vlan = self.vlan(host) if self.combination.policy is Policy.PRIVATE else 0
        ip(f"link set {self.wire.dev} vf 0 vlan {vlan}")


@pytest.fixture(scope="module")
def far_vf(nic: Nic, outside: Outside) -> Iterator[None]:
    """The first of all VFs is called ``far``, outside."""
    del outside
    with far_end(nic):
        yield


@contextmanager
def far_end(nic: Nic) -> Iterator[None]:
    """As the fixture; the namespace outside is there already."""
    far, *_ = nic.set_numvfs(7)
    netdev = far.netdev
    assert netdev
    ip(f"link set {netdev} down")
    ip(f"link set {netdev} netns {OUTSIDE} name far")
    ip("link set far addrgenmode none", OUTSIDE)
    ip("link set far up", OUTSIDE)
    try:
        yield
    finally:
        ip(f"link set far netns 1 name {netdev}", OUTSIDE)
        settle()


@dataclass(slots=True)
class Pairs:
    """Two guests that are on VFs by each of some combinations, and then two others by others."""

    nic: Nic
    outside: Outside
    folder: Path
    _group: tuple[Combination, ...] = ()
    _pair: Pair | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def on(self, combination: Combination) -> Pair:
        """Those that have it; everything is as it was when the ones before them have ended."""
        if combination not in self._group or self._pair is None:
            self.close()
            self._group = next(group for group in GROUPS if combination in group)
            cases = vf_cases(self.nic, self._group)
            folder = self.folder / combination.text
            folder.mkdir()
            self._pair = self._stack.enter_context(booted(cases, self.outside, folder))
        return self._pair

    def close(self) -> None:
        """End the guests."""
        self._pair = None
        VfWire(VF_NETWORK, self.nic.pf).leave_vlan()  # before it is looked whether all is as it was
        self._stack.close()


@pytest.fixture(scope="module")
def pairs(
    nic: Nic, outside: Outside, far_vf: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pairs]:
    made = Pairs(nic, outside, tmp_path_factory.mktemp("vfs"))
    yield made
    made.close()


def vf_cases(nic: Nic, combinations: Sequence[Combination]) -> dict[Combination, Case]:
    return {one: VfCase(one, VfWire(VF_NETWORK + number, nic.pf)) for number, one in enumerate(combinations)}


@pytest.mark.parametrize("on_vf", [*VEB, *PRIVATE], ids=lambda one: one.text)
def test_guests_on_vfs_exchange_packets_and_the_policy_holds(pairs: Pairs, on_vf: Combination) -> None:
    pairs.on(on_vf).show(on_vf)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda one: one.text)
def test_a_mode_that_the_nics_driver_has_not_is_refused_and_nothing_is_left(
    nic: Nic, far_vf: None, tmp_path: Path, refused: Combination
) -> None:
    before = Footprint.read()
    made = start([VfCase(refused, VfWire(0, nic.pf))], Guests(tmp_path), "refused")
    assert made.wait(120) == 5, made.said
    assert "has no VEPA mode that igb could set" in made.said
    before.wait_until_again()


def start(cases: Iterable[Case], guests: Guests, name: str) -> PlainGuest:
    """A guest whose CPU stands still: what is shown is how it begins and ends."""
    words = [word for case in cases for word in case.devices(2)]
    return guests.qemu(name, [*words, "-S"], program=["vnet-qemu"])


@pytest.mark.parametrize(
    "combinations",
    [
        pytest.param(ON_WIRES, id="wires", marks=pytest.mark.long),
        pytest.param(VEB, id="veb VFs"),
        pytest.param(PRIVATE, id="private VFs", marks=pytest.mark.long),
    ],
)
def test_twice_in_a_row_and_killed_the_second_time_nothing_is_left(
    nic: Nic, pairs: Pairs, tmp_path: Path, combinations: tuple[Combination, ...]
) -> None:
    pairs.close()
    cases = {one: Case(one, Wire(number)) for number, one in enumerate(combinations)}
    if combinations is not ON_WIRES:
        cases = vf_cases(nic, combinations)
    guests = Guests(tmp_path)
    for case in cases.values():
        case.open()
    try:
        before = Footprint.read()
        for name in ("first", "second"):
            made = start(cases.values(), guests, name)
            socket = made.console.log.with_suffix(".sock")
            wait_until(lambda: socket.exists() or made.process.poll() is not None, "QEMU runs", 240)  # noqa: B023
            assert made.process.poll() is None, made.said
            if name == "first":
                made.kill(signal.SIGTERM)
                # QEMU may not have come to wait for signals yet.
                assert made.wait(240) in (0, -signal.SIGTERM), made.said
                before.wait_until_again(60)
        guests.end()  # with SIGKILL: the wrapper, QEMU, all of its session
        subprocess.run(["vnet-lock", "gc"], check=True, capture_output=True, timeout=240)
        before.wait_until_again(60)
    finally:
        guests.end()
        for case in cases.values():
            case.close()


@pytest.mark.parametrize("whole", WHOLE, ids=lambda one: one.text)
def test_a_whole_nic_is_one_guests_who_exchanges_packets_by_it(
    nic: Nic, tmp_path: Path, whole: Combination
) -> None:
    """A NIC beside the SR-IOV one, whose cable leads to an address 10.0.2.2 that answers."""
    dev = plain_nic(nic)
    before = Footprint.read()
    guests = Guests(tmp_path)
    words = {Backend.VFIO: "vfio", Backend.SOCKET: "socket", Backend.SOCKET_VHOST: "socket:vhost"}
    network = f"host,id=net0,mode=private,port=physdev,dev={dev},protocols={words[whole.backend]}"
    devices = ["-netdev", network, "-device", "virtio-net-pci,netdev=net0,romfile="]
    try:
        made = guests.qemu("whole", devices, program=["vnet-qemu"], ip="10.0.2.15/24", ping="10.0.2.2")
        assert made.console.ready(600)["ping"] == "3/3", made.said
        second = guests.qemu("second", devices, program=["vnet-qemu"])
        assert second.wait(120) == 4
        assert "is held by" in second.said
        made.kill(signal.SIGTERM)
        assert made.wait(120) == 0
        wait_until(lambda: Path(f"/sys/class/net/{dev}").exists(), f"{dev} is the host's again")
        before.wait_until_again(60)
    finally:
        guests.end()
        run("vnet-lock", "gc")


def plain_nic(nic: Nic) -> str:
    """The lab's NIC that has no SR-IOV."""
    drivers = {
        path.parents[1].name: path.resolve().name for path in Path("/sys/class/net").glob("*/device/driver")
    }
    return next(name for name, driver in drivers.items() if name != nic.pf and driver == "e1000e")
