"""The embedded switch's mode, set for the first and restored with the last: the kernel is a fake socket."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_host import BOOT_ID, VFIO, FakeHost
from tests.unit.test_session import at_guard
from vnet_lock.claims import ClaimTable
from vnet_lock.combination import Backend, Policy, Port
from vnet_lock.errors import Refused, Unsupported
from vnet_lock.journal import EswitchMode
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, PciAddress, Process, Resource, State
from vnet_lock.ports import Job
from vnet_lock.ports.eswitch import hold_mode
from vnet_lock.request import Fixed, Form, Intent, Refusal
from vnet_lock.session import Session

PF = PciAddress.parse("0000:01:00.0")
WEB, DB = 50, 60
# include/uapi/linux/{netlink,rtnetlink}.h
ERROR, DONE, NEWLINK, GETLINK, SETLINK, DUMP, AF_BRIDGE = 2, 3, 16, 18, 19, 0x300, 7
EOPNOTSUPP = 95
_SOCKET = socket.socket


class Kernel:
    """The embedded switch of lo, which is ifindex 1 everywhere; ``mode`` is 0 (veb), 1 (vepa) or None."""

    def __init__(self, mode: int | None) -> None:
        self.mode = mode
        self.changes: list[int] = []
        self.vlans: dict[int, int] = {}

    def open(self, family: int = -1, *more: object, **named: object) -> object:
        return RouteSocket(self) if family == socket.AF_NETLINK else _SOCKET(family, *more, **named)

    def answer(self, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        if kind == SETLINK:
            mode = self.mode
            if mode is not None:
                self.mode = struct.unpack("=H", body[-4:-2])[0]
                self.changes.append(self.mode)
            yield ERROR, struct.pack("=i", -EOPNOTSUPP if mode is None else 0)
            return
        if kind == GETLINK and body[0] == AF_BRIDGE and self.mode is not None:
            yield NEWLINK, _ifinfo() + _attribute(26, _attribute(1, struct.pack("=H", self.mode)))
        if kind == GETLINK and not flags & DUMP:
            vfs = b"".join(_attribute(1, _vf(index, vlan)) for index, vlan in self.vlans.items())
            yield NEWLINK, _ifinfo() + _attribute(22, vfs)
        elif flags & DUMP:
            yield DONE, struct.pack("=i", 0)


class RouteSocket:
    """One socket to that kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._answers: list[bytes] = []

    def __enter__(self) -> RouteSocket:
        return self

    def __exit__(self, *error: object) -> None: ...

    def bind(self, address: object) -> None: ...

    def settimeout(self, seconds: float) -> None: ...

    def send(self, message: bytes) -> None:
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", message)
        assert length == len(message)
        for its_kind, body in self._kernel.answer(kind, flags, message[16:]):
            self._answers.append(struct.pack("=IHHII", 16 + len(body), its_kind, 2, sequence, 0) + body)

    def recvmsg(self, size: int) -> tuple[bytes, list[object], int, tuple[int, int]]:
        del size
        return self._answers.pop(0), [], 0, (0, 0)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _vf(index: int, vlan: int) -> bytes:
    """IFLA_VF_MAC and IFLA_VF_VLAN (struct ifla_vf_*)."""
    return _attribute(1, struct.pack("=I32s", index, b"")) + _attribute(
        2, struct.pack("=III", index, vlan, 0)
    )


def _ifinfo() -> bytes:
    return struct.pack("=BxHiII", 0, 1, 1, 0, 0)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(0)
    monkeypatch.setattr(socket, "socket", made.open)
    return made


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    host = FakeHost(tmp_path)
    host.vfs = host.add_pf(PF.text, "lo", [VFIO] * 3)  # type: ignore[attr-defined]
    Path(f"{host.settings.sys}/class/net/lo/ifindex").write_text("1\n")
    for pid, command in ((os.getpid(), "pytest"), (WEB, "qemu"), (DB, "qemu")):
        host.add_process(pid, command)
    host.settings = replace(host.settings, busy_wait_s=0.2, free_wait_s=0.1)
    return host


@pytest.fixture
def session(host: FakeHost, kernel: Kernel) -> Session:
    del kernel
    return Session(host.settings)


def qemu(pid: int) -> Owner:
    return Owner(OwnerKind.QEMU, f"vm{pid}", BOOT_ID, process=Process(pid, 4242))


def hostdev(host: FakeHost, index: int) -> Fixed:
    return Fixed("net0", host.vfs[index], Form.HOSTDEV)  # type: ignore[attr-defined]


def take(host: FakeHost, session: Session, index: int, pid: int, policy: Policy | None = None) -> None:
    """A guest's VF: libvirt's own, or with a policy what a port of ours does for it."""
    (grant,) = session.acquire(qemu(pid), [hostdev(host, index)])
    if policy is None:
        return
    with session.table.guarded() as writer:
        for claim in writer.read().with_token(grant.token):
            writer.replace(replace(claim, combination=f"{policy}-sriov-vfio", journal=()))
    job = Job(
        host.settings,
        read_inventory(host.settings),
        grant.assignment,
        Intent("net0", policy, ("lo",)),
        grant.token,
        journal=session._holding.journal_of(grant.token),
        sharing=lambda: session._holding.sharing(grant.token),
    )
    pf = job.inventory.pf_at(PF)
    assert pf is not None
    hold_mode(job, pf)


def entries(host: FakeHost) -> list[object]:
    claims = ClaimTable(host.settings).read().records
    return [entry for claim in claims for entry in claim.journal if isinstance(entry, EswitchMode)]


def test_the_mode_is_journalled_before_it_is_set_and_restored(
    host: FakeHost, session: Session, kernel: Kernel
) -> None:
    take(host, session, 0, WEB, Policy.VEPA)
    assert kernel.changes == [1]
    assert entries(host) == [EswitchMode(PF.text, "veb", "vepa")]
    session.release(qemu(WEB))
    session.release(qemu(WEB))
    assert kernel.changes == [1, 0]
    assert entries(host) == []


@pytest.mark.parametrize("first_out", [WEB, DB])
@pytest.mark.parametrize("second", [Policy.VEPA, None], ids=["vepa", "libvirt's own"])
def test_the_mode_is_restored_with_the_last_that_needs_it(
    host: FakeHost, session: Session, kernel: Kernel, first_out: int, second: Policy | None
) -> None:
    take(host, session, 0, WEB, Policy.VEPA)
    take(host, session, 1, DB, second)
    assert kernel.changes == [1]
    session.release(qemu(first_out))
    assert kernel.changes == [1]
    session.release(qemu(WEB + DB - first_out))
    assert kernel.changes == [1, 0]


def test_a_dead_guests_mode_is_restored_by_whoever_heals_it(
    host: FakeHost, session: Session, kernel: Kernel
) -> None:
    take(host, session, 0, WEB, Policy.VEPA)
    host.remove_process(WEB)
    session.heal()
    assert kernel.changes == [1, 0]
    assert ClaimTable(host.settings).read().records == ()


def test_a_mode_that_is_right_already_is_not_set(host: FakeHost, session: Session, kernel: Kernel) -> None:
    take(host, session, 0, WEB, Policy.VEB)
    kernel.mode = 1
    take(host, session, 1, DB, Policy.VEPA)
    assert kernel.changes == []


def test_a_mode_that_somebody_else_set_meanwhile_is_left_alone(
    host: FakeHost, session: Session, kernel: Kernel
) -> None:
    take(host, session, 0, WEB, Policy.VEPA)
    kernel.mode = 0
    session.release(qemu(WEB))
    assert kernel.changes == [1]
    assert kernel.mode == 0


def test_a_driver_without_modes_is_left_alone_and_has_no_journal(
    host: FakeHost, session: Session, kernel: Kernel
) -> None:
    kernel.mode = None
    take(host, session, 0, WEB, Policy.VEB)
    assert (kernel.changes, entries(host)) == ([], [])


def test_a_driver_that_takes_no_mode_after_all_is_an_error_of_ours(
    host: FakeHost, session: Session, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = kernel.answer

    def refuse(kind: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        return (
            iter([(ERROR, struct.pack("=i", -EOPNOTSUPP))]) if kind == SETLINK else answer(kind, flags, body)
        )

    monkeypatch.setattr(kernel, "answer", refuse)
    with pytest.raises(
        Unsupported, match="setting the embedded switch of lo to vepa failed: its driver has no"
    ):
        take(host, session, 0, WEB, Policy.VEPA)
    session.release(qemu(WEB))
    assert kernel.mode == 0


def test_a_plan_reads_the_mode_from_the_kernel(host: FakeHost, session: Session, kernel: Kernel) -> None:
    del kernel
    take(host, session, 0, WEB)
    wants = Intent("net0", Policy.VEPA, (host.vfs[1].text,), (Port.SRIOV,), (Backend.VFIO,))  # type: ignore[attr-defined]
    result = session.plan([wants], qemu(DB))
    assert isinstance(result, Refusal)
    assert "in vepa mode: VF 0000:01:10.0 is held by" in result.message


def test_a_private_guests_vlan_is_held_against_the_administrative_vlans(
    host: FakeHost, session: Session, kernel: Kernel
) -> None:
    """Also where the private guest came between a look at the host and the decision."""
    kernel.vlans = {0: 0, 1: 42, 2: 7}
    web, db = hostdev(host, 1), hostdev(host, 2)
    private = Claim(
        Resource.vf(host.vfs[0]), Mode.EXCLUSIVE, State.ACTIVE, qemu(WEB), "f" * 16, "net0", 1.0,  # type: ignore[attr-defined]
        "private-sriov-tap", pf=PF, vlan=42,
    )  # fmt: skip
    with at_guard(host, lambda: session.acquire(qemu(DB), [web])) as (future, writer):
        writer.add([private])  # type: ignore[attr-defined]
    with pytest.raises(Refused, match=r"would share VLAN 42 of PF 0000:01:00\.0") as caught:
        future.result()
    assert caught.value.resource == private.resource.text
    (grant,) = session.acquire(qemu(DB), [db])
    assert grant.assignment.device == Resource.vf(db.device)
