"""What a claim costs: alone, and among 32 processes that want 8 resources.

A claim is granted or refused, never queued: what a process waits for is the table's answer. So that a
wait is the others' doing and not a full processor's, each holds what it got for HOLD_S and pauses three
times that, for which 8 resources are just enough. Processes that claim in a tight loop measure the
scheduler: whoever runs goes on, and the others' turns come with their time slices.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import random
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.row import Row
from vnet_lock.claims import ClaimTable, new_token
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, PciAddress, Process, Resource, State
from vnet_lock.records import encode
from vnet_lock.settings import Settings

PROCESSES = 32
RESOURCES = 8
ROUNDS = 40
REPETITIONS = 2000
HOLD_S = 0.02


def rows() -> tuple[Row, ...]:
    """Both rows; takes some 10 s."""
    alone_s, raw_s = measure_alone()
    waits_s = measure_waits()
    p99_s = statistics.quantiles(waits_s, n=100)[98]
    return (
        Row("claim + release, no contention", alone_s, raw_s, 10),
        Row("32 processes, 8 resources: p99 wait for the answer", p99_s, alone_s, 50 * PROCESSES / RESOURCES),
    )


def measure_alone() -> tuple[float, float]:
    """Medians of claim + release, and of the least that these could be, taken in turns."""
    with _run_dir() as settings:
        table = ClaimTable(settings)
        alone, raw = [], []
        for index in range(REPETITIONS):
            alone.append(_time_claim_and_release(table, _claim(index % RESOURCES)))
            raw.append(_time_raw(settings, encode(_claim(index % RESOURCES))))
    return statistics.median(alone), statistics.median(raw)


def measure_waits() -> list[float]:
    """How long each answer took, in seconds: for ROUNDS tries of each process."""
    # What the guard loads at its first wait is loaded: these wait often, and a guest's hook at most once.
    importlib.import_module("filelock")
    with _run_dir() as settings:
        start = time.monotonic() + 1
        children = [_start_contender(settings, number, start) for number in range(PROCESSES)]
        waits: list[float] = []
        for pid, fd in children:
            with os.fdopen(fd, "rb") as pipe:
                data = pipe.read()
            waits.extend(wait for (wait,) in struct.iter_unpack("d", data))
            if os.waitpid(pid, 0)[1] != 0:
                raise RuntimeError(f"the contender with pid {pid} failed")
    return waits


def _start_contender(settings: Settings, number: int, start: float) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        table = ClaimTable(settings)
        chance = random.Random(number)
        waits = []
        time.sleep(max(0.0, start - time.monotonic()) + chance.random() * 4 * HOLD_S)
        for _ in range(ROUNDS):
            claim = _claim(number % RESOURCES)
            before = time.perf_counter()
            is_ours = _try_to_claim(table, claim)
            waits.append(time.perf_counter() - before)
            if is_ours:
                time.sleep(HOLD_S)
                with table.guarded() as claims:
                    claims.drop(claim)
            time.sleep(HOLD_S * 6 * chance.random())
        os.write(writer, struct.pack(f"{len(waits)}d", *waits))
        status = 0
    finally:
        os._exit(status)


def _try_to_claim(table: ClaimTable, claim: Claim) -> bool:
    with table.guarded() as claims:
        if claims.read().on(claim.resource):
            return False
        claims.add([claim])
        return True


def _time_claim_and_release(table: ClaimTable, claim: Claim) -> float:
    before = time.perf_counter()
    if not _try_to_claim(table, claim):
        raise RuntimeError("a resource is claimed, and there is nobody else")
    with table.guarded() as claims:
        claims.drop(claim)
    return time.perf_counter() - before


def _time_raw(settings: Settings, data: bytes) -> float:
    lock, temporary, final = (f"{settings.run}/{name}" for name in ("raw", ".raw-record", "raw-record"))
    before = time.perf_counter()
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    record = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(record, data)
    os.close(record)
    os.rename(temporary, final)
    os.unlink(final)
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
    return time.perf_counter() - before


def _claim(index: int) -> Claim:
    owner = Owner(OwnerKind.QEMU, f"guest{index}", "b" * 36, process=Process(os.getpid(), 1))
    return Claim(
        resource=Resource.vf(PciAddress(0, 1, 16, index)),
        mode=Mode.EXCLUSIVE,
        state=State.RESERVED,
        owner=owner,
        token=new_token(),
        interface="net0",
        since=time.time(),
        combination="veb-sriov-vfio",
        pf=PciAddress(0, 1, 0, 0),
    )


@contextmanager
def _run_dir() -> Iterator[Settings]:
    """A run directory in memory, as the real one is."""
    memory = "/dev/shm"
    root = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
    try:
        yield Settings.under(root)
    finally:
        shutil.rmtree(root)
