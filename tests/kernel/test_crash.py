"""kill -9 at any moment: whatever is left is healed by one command, and by nothing worse."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.host import (
    LINKS,
    MAC,
    NIC,
    QEMU,
    RUN,
    STAYING,
    VNET_LOCK,
    VNET_QEMU,
    Host,
    children_of,
    eventually,
)
from vnet_lock.kernel.processes import read_boot_id, this_process
from vnet_lock.model import Owner, OwnerKind
from vnet_lock.qemu_argv import read_argv
from vnet_lock.session import Session
from vnet_lock.settings import DEFAULT

# For each of the networks; by lines, below, nothing is left to chance.
ROUNDS = 9
NETS = {
    "vepa-macvlan": "-netdev host,id=net0,mode=vepa,port=macvlan,dev=up0",
    "veb-macvlan": "-netdev host,id=net0,mode=veb,port=macvlan,dev=up0",
    "veb-bridge": "-netdev host,id=net0,mode=veb,port=bridge,dev=br0",
}


def gc() -> subprocess.CompletedProcess[str]:
    return subprocess.run([VNET_LOCK, "gc"], capture_output=True, text=True, timeout=60, check=False)


def start(line: str) -> subprocess.Popen[bytes]:
    """A vnet-qemu, the first of a process group of its own, so that no child of it is ever missed."""
    words = [VNET_QEMU, *shlex.split(line)]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(words, process_group=0, **quiet)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """The wrapper, its child and whatever they started, all at once; returns when they are dead."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=20)
    eventually(lambda: not has_members(process.pid))


def has_members(group: int) -> bool:
    """Whether a process group has a process that is no zombie."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                return True
    return False


def leftovers(host: Host) -> list[str]:
    """What is there that shouldn't be, in words."""
    found = [f"in claims: {path.name} {path.read_text()}" for path in RUN.glob("claims/*")]
    found += [f"file {path.name}" for path in RUN.glob("*") if path.name not in STAYING]
    found += [f"link {name}" for name in host.links() if name not in LINKS]
    return found + [f"node {path}" for path in Path("/dev").glob(".vnet-lock-*")]


def heal(host: Host, where: str) -> None:
    """Heal twice: the first puts all right, the second finds nothing to do."""
    for turn in ("first", "second"):
        done = gc()
        assert done.returncode == 0, f"{where}, {turn} gc: {done.stdout}{done.stderr}"
        assert leftovers(host) == [], f"{where}, after the {turn} gc: {done.stdout}{done.stderr}"


def check_fresh_start(host: Host, net: str) -> None:
    """The device can be had as before, and under the MAC that the dead ones had."""
    done = host.qemu(f"{QEMU} -monitor stdio {net},mac={MAC} {NIC}", input="info network\nquit\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "type=tap" in done.stdout
    assert leftovers(host) == []


def measure_start(host: Host, line: str) -> float:
    """Seconds until QEMU is there, and its claim active."""
    started = time.monotonic()
    process = start(line)
    try:
        eventually(lambda: [claim for claim in host.claims() if claim["state"] == "active"])
        return time.monotonic() - started
    finally:
        kill_all(process)


@pytest.fixture
def dice():
    seed = int(os.environ.get("VNET_LOCK_SEED", random.randrange(1 << 32)))
    print(f"VNET_LOCK_SEED={seed}")  # shown where a test fails
    return random.Random(seed)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_start_killed_at_any_moment_is_healed(host, dice, net):
    line = f"{QEMU} {net},mac={MAC} {NIC}"
    span_s = measure_start(host, line)
    heal(host, "after a start that was measured")
    for number in range(ROUNDS):
        # A little beyond the end of the start; most of what can go wrong is in its second half.
        wait_s = span_s * (1.2 * dice.random() if number % 3 == 0 else 0.5 + 0.7 * dice.random())
        process = start(line)
        time.sleep(wait_s)
        if number == ROUNDS - 1:
            # On a machine that was quicker when it was measured nothing might be killed that matters.
            eventually(host.claims)
        kill_all(process)
        heal(host, f"round {number}, killed after {wait_s:.3f} of {span_s:.3f} s")
    check_fresh_start(host, net)


@pytest.mark.timeout(400)
def test_a_child_killed_under_its_wrapper_leaves_nothing_behind(host, dice):
    """The wrapper lives on, and gives back what its child had at that moment."""
    net = NETS["vepa-macvlan"]
    line = f"{QEMU} {net},mac={MAC} {NIC}"
    span_s = measure_start(host, line)
    heal(host, "after a start that was measured")
    for number in range(ROUNDS):
        wait_s = span_s * 0.9 * dice.random()
        where = f"round {number}, child killed {wait_s:.3f} s after it was there, of {span_s:.3f} s"
        process = start(line)
        try:
            children = eventually(lambda pid=process.pid: children_of(pid))
            time.sleep(wait_s)
            for child in children:
                os.kill(child, signal.SIGKILL)
            process.wait(timeout=30)
        finally:
            if process.poll() is None:
                kill_all(process)
        assert process.returncode in (1, -signal.SIGKILL), where
        assert leftovers(host) in ([], ["in claims: .new"]), where
        heal(host, where)
    check_fresh_start(host, net)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("net", [NETS["vepa-macvlan"], NETS["veb-bridge"]], ids=["macvlan", "bridge"])
def test_a_gc_killed_at_any_moment_is_finished_by_the_next(host, dice, net):
    line = f"{QEMU} {net},mac={MAC} {NIC}"
    measure_start(host, line)
    started = time.monotonic()
    assert gc().returncode == 0
    span_s = time.monotonic() - started
    for number in range(ROUNDS):
        measure_start(host, line)
        assert len(host.claims()) == 1
        wait_s = span_s * (0.2 + dice.random())
        with subprocess.Popen([VNET_LOCK, "gc"], stdout=subprocess.DEVNULL) as healer:
            time.sleep(wait_s)
            healer.kill()
        heal(host, f"round {number}, gc killed after {wait_s:.3f} of {span_s:.3f} s")
    check_fresh_start(host, net)


# --- by lines -------------------------------------------------------------------------------------

# What makes, changes and removes things; what only reads can be killed at no worse moment than these.
CHANGING = (
    "session.py",
    "deciding.py",
    "claims.py",
    "undo.py",
    "/ports/",
    "/backends/",
    "kernel/netlink.py",
    "kernel/netlink_errors.py",
    "kernel/vfs.py",
    "kernel/nodes.py",
    "kernel/bridges.py",
    "kernel/nftables.py",
    "kernel/dnsmasq.py",
)


def killed_at(line: int, work: Callable[[], object]) -> int:
    """Do the work in a process that is killed before it runs a line; the number of its lines, if it ran all.

    ``line`` counts from 1; with 0 it is not killed.
    """
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            del argument
            name = frame.f_code.co_filename
            if "vnet_lock" not in name or not any(part in name for part in CHANGING):
                return None
            if event == "line":
                count += 1
                if count == line:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            work()
            sys.settrace(None)
            os.write(writes, str(count).encode())
        finally:
            os._exit(0)
    os.close(writes)
    _, status = os.waitpid(child, 0)
    text = os.read(reads, 20)
    os.close(reads)
    assert text or os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return int(text or 0)


def take(net: str) -> None:
    """What vnet-qemu does before it becomes QEMU."""
    session = Session()
    owner = Owner(OwnerKind.QEMU, "test", read_boot_id(DEFAULT), process=this_process(DEFAULT))
    words = [*shlex.split(f"{net},mac={MAC},queues=2"), *shlex.split(NIC)]
    for grant in session.acquire(owner, read_argv(words).intents):
        session.connect(grant)


def put_back() -> None:
    """What any next command does."""
    failures = [failure for healed in Session().heal() for failure in healed.failures]
    assert failures == []


def some_of(lines: int, dice: random.Random) -> list[int]:
    """As many as take a minute; VNET_LOCK_LINES=all for all."""
    every = range(1, lines + 1)
    return list(every) if os.environ.get("VNET_LOCK_LINES") == "all" else sorted(dice.sample(every, 100))


def check_deaths(
    host: Host,
    dice: random.Random,
    lines: int,
    act: Callable[[], None],
    prepare: Callable[[], None] | None = None,
) -> None:
    """Whether ``act``, killed before one of its lines, leaves nothing that ``put_back`` doesn't put right."""
    wrong = {}
    for line in some_of(lines, dice):
        if prepare:
            prepare()
        killed_at(line, act)
        put_back()
        if found := leftovers(host):
            wrong[line] = found
            remove_files()
    assert wrong == {}, f"of {lines} lines"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("net", [NETS["vepa-macvlan"], NETS["veb-bridge"]], ids=["macvlan", "bridge"])
def test_a_start_killed_before_any_of_its_lines_is_healed(host, dice, net):
    lines = killed_at(0, lambda: take(net))
    put_back()
    check_deaths(host, dice, lines, lambda: take(net))
    check_fresh_start(host, net)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("net", [NETS["vepa-macvlan"], NETS["veb-bridge"]], ids=["macvlan", "bridge"])
def test_a_gc_killed_before_any_of_its_lines_is_finished_by_the_next(host, dice, net):
    def left_behind() -> None:
        killed_at(0, lambda: take(net))
        assert len(host.claims()) == 1

    left_behind()
    check_deaths(host, dice, killed_at(0, put_back), put_back, prepare=left_behind)
    check_fresh_start(host, net)


def remove_files() -> None:
    """So that what was left by one death isn't found again after the next."""
    for path in (*RUN.glob("claims/.*"), *Path("/dev").glob(".vnet-lock-*")):
        path.unlink()
