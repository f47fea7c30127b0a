"""The hook in every order that libvirt can call it in, with kills in between: no VF is lost or given twice.

A model of libvirt's own states (qemuProcessStart, qemuProcessStop and qemuProcessReconnect in its
qemu_process.c) says which step can come next; the hook's answers are the real ones, on claims in files.
Every state that two guests can get into is visited once. Between any two steps libvirt's daemon may be killed
and come back, or a QEMU die; a hook may be killed at each of its writes. A guest that comes from another host
or a file may not get as far as its `prepare`, and its reservation may end before.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import pytest

from tests.fake_host import FakeHost, build, stat_line
from vnet_lock.claims import ClaimTable
from vnet_lock.front.hook import Call, answer
from vnet_lock.session import Session

PF, VF0, VF1 = "0000:01:00.0", "0000:01:10.0", "0000:01:10.2"
UUID = "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a0{}"
DAEMON = 4711
# How many things are killed on the way to a state. With 2 it is three times as many states.
KILLS = int(os.environ.get("VNET_LOCK_KILLS", "1"))
# How the parent knows a hook that was killed.
KILLED = 137
# When a reservation ended, on the clock that it has.
LONG_AGO = 0.5


# Operations at which the hook grants what a guest needs, or refuses it.
REFUSES = ("migrate", "restore", "prepare", "start")


class Phase(StrEnum):
    """How far libvirt is with a guest."""

    OFF = "off"
    ARRIVED = "arrived"  # the hook was asked for its XML; no `release` follows where libvirt gives up
    PREPARED = "prepared"  # libvirt takes its devices; no status file yet
    RUNNING = "running"
    UNKNOWN = "unknown"  # it ran when this daemon began, which hasn't called `reconnect` yet
    DEAD = "dead"  # QEMU is gone, and libvirt hasn't called `stopped` yet
    FAILED = "failed"  # the same of a guest that never had a QEMU
    STOPPED = "stopped"  # libvirt gives its devices back
    FAILED_STOPPED = "failed stopped"
    RETURNED = "returned"  # libvirt has; only `release` is left

    @property
    def has_status_file(self) -> bool:
        """From the start of QEMU until the devices are given back."""
        return self in (Phase.RUNNING, Phase.UNKNOWN, Phase.DEAD, Phase.STOPPED)

    @property
    def has_qemu(self) -> bool:
        return self in (Phase.RUNNING, Phase.UNKNOWN)

    @property
    def after_a_daemons_death(self) -> Phase:
        """What the next daemon makes of it: it knows the guests that have a status file, and no others."""
        if not self.has_status_file:
            return Phase.OFF
        return Phase.UNKNOWN if self.has_qemu else Phase.DEAD


@dataclass(frozen=True)
class Guest:
    """A guest: the VFs that its definition names, those that a network chooses, and how it comes here."""

    name: str
    fixed: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    arrives: str = ""  # "migrate" or "restore"; it is not started here otherwise

    def vfs(self, operation: str) -> tuple[str, ...]:
        """Those in the XML at an operation; at the end it is the definition, which may have changed."""
        if operation in ("stopped", "release"):
            return ()
        return self.fixed + (() if operation == "prepare" else self.chosen)

    def xml(self, operation: str) -> bytes:
        devices = "".join(
            f"<interface type='hostdev'><mac address='52:54:00:00:0{number}:0{self.name}'/><source>"
            f"<address type='pci' domain='0x{vf[:4]}' bus='0x{vf[5:7]}' slot='0x{vf[8:10]}'"
            f" function='0x{vf[-1]}'/></source></interface>"
            for number, vf in enumerate(self.vfs(operation))
        )
        uuid = UUID.format(self.name)
        return (
            f"<domain><name>{self.name}</name><uuid>{uuid}</uuid><devices>{devices}</devices></domain>"
        ).encode()


@dataclass(frozen=True)
class State:
    """All that a step depends on: libvirt's side, the claim table, and what went wrong on the way here."""

    phases: tuple[Phase, ...]
    granted: tuple[frozenset[str], ...]  # what the hook has let each guest have, until libvirt gives it back
    is_up: bool
    daemon: int
    table: tuple[tuple[str, bytes], ...]
    hooks_killed: int = 0
    daemons_killed: int = 0
    path: tuple[str, ...] = field(default=(), compare=False)

    @property
    def key(self) -> object:
        """States with the same key go on in the same way."""
        claims = []
        for name, data in self.table:
            if name.startswith("."):
                claims.append(name)
                continue
            found = json.loads(data)
            process = found["owner"].get("process")
            owner = (found["owner"]["name"], process and process["pid"] == self.daemon)
            found = {**found, "owner": owner, "token": "", "since": 0, "worker": bool(found.get("worker"))}
            if reservation := found.get("reservation"):
                reservation["until_s"] = reservation["until_s"] == LONG_AGO
            claims.append(json.dumps(found, sort_keys=True))
        return self.phases, self.granted, self.is_up, tuple(sorted(claims))

    @property
    def after_a_while(self) -> State:
        """This one when all reservations have ended."""
        table = []
        for name, data in self.table:
            found = {} if name.startswith(".") else json.loads(data)
            if reservation := found.get("reservation"):
                reservation["until_s"] = LONG_AGO
            table.append((name, json.dumps(found).encode() if reservation else data))
        granted = tuple(
            frozenset() if phase is Phase.ARRIVED else had
            for had, phase in zip(self.granted, self.phases, strict=True)
        )
        return replace(self, table=tuple(table), granted=granted, path=(*self.path, "a minute passes"))

    def of(self, index: int, phase: Phase, step: str, granted: frozenset[str] | None = None) -> State:
        """This one with a guest in another phase."""
        phases = (*self.phases[:index], phase, *self.phases[index + 1 :])
        had = self.granted[index] if granted is None else granted
        all_granted = (*self.granted[:index], had, *self.granted[index + 1 :])
        return replace(self, phases=phases, granted=all_granted, path=(*self.path, step))


class World:
    """The fake host, set to any state; calls the hook there."""

    def __init__(self, root: Path, guests: tuple[Guest, ...]) -> None:
        self.guests = guests
        self.host = FakeHost(root)
        self.host.pf(PF, vfs=(VF0, VF1), driver="vfio-pci")
        for group, vf in enumerate((VF0, VF1)):
            self.host.vf(vf, PF, driver=None, group=group)
        self.settings = replace(self.host.settings, busy_wait_s=0.02, free_wait_s=0.02)
        self.claims = Path(self.settings.claims_dir)
        self.libvirt = Path(self.settings.libvirt_run) / "qemu"
        self.libvirt.mkdir(parents=True)
        self.calls = 0
        self._locks: dict[str, int] = {}
        self._load_all()

    def _load_all(self) -> None:
        """Have everything imported that a hook imports, for the processes that call it."""
        self.host.process(DAEMON, "libvirtd")
        self.host.process(os.getpid(), "python")
        for operation in ("restore", "prepare", "start", "reconnect", "stopped", "release"):
            guest = Guest("9", (VF0,))
            answer(Call(self.settings, DAEMON, "9", operation, guest.xml(operation)), Session, Told([]))

    def set_up(self, state: State) -> None:
        """Make files, processes and locks those of a state."""
        self._set_table(state)
        for guest, phase in zip(self.guests, state.phases, strict=True):
            status = self.libvirt / f"{guest.name}.xml"
            status.touch() if phase.has_status_file else status.unlink(missing_ok=True)
            self._lock_pid_file(guest.name, phase.has_qemu)
        for pid in filter(str.isdecimal, os.listdir(self.host.root / "proc")):
            if pid != "1":
                shutil.rmtree(self.host.root / "proc" / pid)
        if state.is_up:
            self.host.process(state.daemon, "libvirtd")

    def _set_table(self, state: State) -> None:
        table = dict(state.table)
        for path in self.claims.iterdir():
            if path.name not in table:
                path.unlink()
        for name, data in table.items():
            (self.claims / name).write_bytes(data)
            (self.claims / name).chmod(0o644)

    def _lock_pid_file(self, name: str, held: bool) -> None:
        """As its QEMU does. A lock of the open file: one of this process would not be seen by itself."""
        if held and name not in self._locks:
            descriptor = os.open(self.libvirt / f"{name}.pid", os.O_RDWR | os.O_CREAT)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
            self._locks[name] = descriptor
        elif not held and name in self._locks:
            os.close(self._locks.pop(name))

    def read_table(self) -> tuple[tuple[str, bytes], ...]:
        return tuple(sorted((path.name, path.read_bytes()) for path in self.claims.iterdir()))

    def call(self, state: State, guest: Guest, operation: str, kill_at: int | None = None) -> tuple[int, int]:
        """Run the hook in a process of its own; its status, and how many writes it began.

        With ``kill_at`` it is killed when it is about to do its write of that number, or where there are no
        so many, just before it would have ended.
        """
        self.calls += 1
        read_end, write_end = os.pipe()
        pid = os.fork()
        if not pid:
            self._be_the_hook(state, guest, operation, kill_at, write_end)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as told:
            said = told.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        shutil.rmtree(self.host.root / f"proc/{pid}")
        assert status == KILLED or said, f"the hook died of {status}"
        return status, int(said or b"0")

    def _be_the_hook(
        self, state: State, guest: Guest, operation: str, kill_at: int | None, told: int
    ) -> None:
        status, writes = 99, 0

        def count(event: str, _: object) -> None:
            nonlocal writes
            if event in ("os.rename", "os.remove", "os.mkdir"):
                if writes == kill_at:
                    os._exit(KILLED)
                writes += 1

        try:
            pid = os.getpid()
            # Start ticks that no other call has, as pids are used again.
            line = stat_line(pid, "python", start_ticks=10_000 + self.calls)
            build(self.host.root, {f"proc/{pid}/stat": line, f"proc/{pid}/fd/": ""})
            sys.addaudithook(count)
            call = Call(self.settings, state.daemon, guest.name, operation, guest.xml(operation))
            report = Told([])
            status = answer(call, Session, report)
            assert not any("Traceback" in line for line in report.lines), "\n".join(report.lines)
            if kill_at is not None:
                status = KILLED
            os.write(told, str(writes).encode())
        except BaseException as error:
            print(f"{operation} of {guest.name}: {error!r}", file=sys.stderr)
        finally:
            os._exit(status)


@dataclass
class Told:
    """A report that is kept."""

    lines: list[str]

    def say(self, line: str) -> None:
        self.lines.append(line)

    def log(self, text: str) -> None:
        self.lines.append(text)

    def give(self, xml: bytes) -> None:
        raise AssertionError(f"another XML: {xml!r}")


class Explorer:
    """Visits every state that can be reached with so many kills."""

    def __init__(self, world: World, kills: int) -> None:
        self.world = world
        self.kills = kills
        self.seen: dict[object, list[tuple[int, int]]] = {}
        self.visited = 0

    def run(self) -> None:
        count = len(self.world.guests)
        nobody = (frozenset[str](),) * count
        todo = deque([State((Phase.OFF,) * count, nobody, True, DAEMON, ())])
        while todo:
            state = todo.popleft()
            if not self._is_new(state):
                continue
            self.visited += 1
            self.check(state)
            todo.extend(self.steps(state))

    def _is_new(self, state: State) -> bool:
        """Whether it hasn't been seen with as few kills or fewer."""
        kills = state.hooks_killed, state.daemons_killed
        if sum(kills) > self.kills:
            return False
        known = self.seen.setdefault(state.key, [])
        if any(hooks <= kills[0] and daemons <= kills[1] for hooks, daemons in known):
            return False
        known.append(kills)
        return True

    # --- what can come next ---------------------------------------------------------------------

    def steps(self, state: State) -> Iterator[State]:
        for index, (guest, phase) in enumerate(zip(self.world.guests, state.phases, strict=True)):
            if phase.has_qemu:
                yield state.of(index, Phase.DEAD, f"QEMU of {guest.name} dies")
            if state.is_up:
                yield from self.steps_of_guest(state, index)
        if (later := state.after_a_while).key != state.key:
            yield later
        if state.is_up:
            yield replace(
                state,
                is_up=False,
                phases=tuple(phase.after_a_daemons_death for phase in state.phases),
                granted=tuple(
                    had if phase.has_status_file else frozenset()
                    for had, phase in zip(state.granted, state.phases, strict=True)
                ),
                daemons_killed=state.daemons_killed + 1,
                path=(*state.path, "the daemon is killed"),
            )
        else:
            yield replace(
                state, is_up=True, daemon=state.daemon + 1, path=(*state.path, "a new daemon begins")
            )

    def steps_of_guest(self, state: State, index: int) -> Iterator[State]:
        """What libvirt's daemon can do next with a guest."""
        match state.phases[index]:
            case Phase.OFF if operation := self.world.guests[index].arrives:
                yield from self.hook(state, index, operation, Phase.ARRIVED, Phase.OFF)
            case Phase.ARRIVED:
                yield from self.hook(state, index, "prepare", Phase.PREPARED, Phase.FAILED)
                name = self.world.guests[index].name
                yield state.of(index, Phase.OFF, f"libvirt gives {name} up", frozenset())
            case Phase.OFF:
                yield from self.hook(state, index, "prepare", Phase.PREPARED, Phase.FAILED)
            case Phase.PREPARED:
                yield from self.hook(state, index, "start", Phase.RUNNING, Phase.FAILED)
                yield state.of(index, Phase.FAILED, f"{self.world.guests[index].name} fails")
            case Phase.UNKNOWN:
                yield from self.hook(state, index, "reconnect", Phase.RUNNING, Phase.RUNNING)
            case Phase.DEAD:
                yield from self.hook(state, index, "stopped", Phase.STOPPED, Phase.STOPPED)
            case Phase.FAILED:
                yield from self.hook(state, index, "stopped", Phase.FAILED_STOPPED, Phase.FAILED_STOPPED)
            case Phase.STOPPED | Phase.FAILED_STOPPED:
                name = self.world.guests[index].name
                yield state.of(index, Phase.RETURNED, f"libvirt has returned {name}'s devices", frozenset())
            case Phase.RETURNED:
                yield from self.hook(state, index, "release", Phase.OFF, Phase.OFF)
            case Phase.RUNNING:
                pass

    def hook(self, state: State, index: int, operation: str, done: Phase, failed: Phase) -> Iterator[State]:
        """A call of the hook: as it is, and killed at each of its writes."""
        guest = self.world.guests[index]
        writes, kill_at = 0, None
        while kill_at is None or kill_at <= writes:
            self.world.set_up(state)
            status, began = self.world.call(state, guest, operation, kill_at)
            step = f"{operation} of {guest.name} ends with {status}"
            after = replace(state, table=self.world.read_table())
            if kill_at is None:
                writes, kill_at = began, 0
                assert status == 0 or operation in REFUSES, (*state.path, step)
            else:
                step += f" at write {kill_at}"
                after, kill_at = replace(after, hooks_killed=state.hooks_killed + 1), kill_at + 1
            granted = state.granted[index]
            if status == 0 and operation in REFUSES:
                granted = frozenset(guest.vfs(operation))
            elif operation == "prepare":
                granted = frozenset()  # libvirt has touched nothing yet
            yield after.of(index, done if status == 0 else failed, step, granted)
            if state.hooks_killed + state.daemons_killed >= self.kills:
                return

    # --- what must hold -------------------------------------------------------------------------

    def check(self, state: State) -> None:
        """No VF is given twice, each that is given has its claim, and none is lost."""
        given = [vf for had in state.granted for vf in had]
        assert len(given) == len(set(given)), f"given twice: {given} after {state.path}"
        self.world.set_up(state)
        claims = ClaimTable(self.world.settings).read()
        assert not claims.damaged, (claims.damaged, state.path)
        for guest, had in zip(self.world.guests, state.granted, strict=True):
            owned = {claim.resource.name for claim in claims.records if claim.owner.name == guest.name}
            assert had <= owned, f"{guest.name} has no claim on {had - owned} after {state.path}"
        if set(state.phases) == {Phase.OFF} and state.is_up:
            # Where a hook was killed, it may take a new daemon to prove that no start is going on.
            again = replace(state, daemon=state.daemon + 1) if state.hooks_killed else state
            self.check_that_nothing_is_lost(again.after_a_while)

    def check_that_nothing_is_lost(self, state: State) -> None:
        """Another guest gets all VFs, and when it has gone there are no claims."""
        self.world.set_up(state)
        probe = Guest("9", (VF0, VF1))
        status, _ = self.world.call(state, probe, "prepare")
        assert status == 0, f"a VF is lost after {state.path}"
        self.world.call(state, probe, "release")
        left = [name for name, _ in self.world.read_table() if not name.startswith(".")]
        assert left == [], f"{left} are left after {state.path}"


PAIRS = {
    "the same VF": (Guest("1", (VF0,)), Guest("2", (VF0, VF1))),
    "a network chooses": (Guest("1", (VF0,)), Guest("2", (), (VF0,))),
    "one comes from a file": (Guest("1", (VF0,), arrives="restore"), Guest("2", (VF0, VF1))),
    "one comes from another host": (Guest("1", (VF0,)), Guest("2", (VF0, VF1), arrives="migrate")),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("guests", PAIRS.values(), ids=PAIRS)
def test_no_order_and_no_kill_loses_a_vf_or_gives_it_twice(tmp_path: Path, guests: tuple[Guest, ...]) -> None:
    world = World(tmp_path, guests)
    explorer = Explorer(world, KILLS)
    explorer.run()
    print(f"{explorer.visited} states, {world.calls} calls of the hook")
