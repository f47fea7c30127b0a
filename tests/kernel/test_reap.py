"""vnet-lock reap: what a dead guest had is given back, at once by the one process that follows."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.host import HELPER, RUN, VNET_LOCK, Running, eventually, started
from vnet_lock.claims import ClaimTable, new_token
from vnet_lock.kernel import processes
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, Resource, State
from vnet_lock.settings import DEFAULT

RESIDENT_KB = 20_000


def guest(dev: str = "up0", program: str = "exec sleep 1000") -> Running:
    """A program with a macvtap that says "up" once it has it."""
    words = [HELPER, "--mode=vepa", f"--dev={dev}", "--protocols=tap", "--exec", "--"]
    return started([*words, "sh", "-c", f": {{fd}}; echo up; {program}"])


@contextlib.contextmanager
def following() -> Iterator[subprocess.Popen[str]]:
    """``vnet-lock reap --follow`` that sees to the claims."""
    with started([VNET_LOCK, "reap", "--follow"]) as process:
        eventually(lambda: any("inotify" in link for link in descriptors_of(process.pid)))
        yield process


def descriptors_of(pid: int) -> list[str]:
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return found


def waits_for(pid: int) -> int:
    """How many processes it waits for."""
    return sum("pidfd" in link for link in descriptors_of(pid))


def cpu_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def test_a_dead_guests_link_goes_at_once(host):
    with following() as reaper:
        with guest() as first, guest() as second:
            assert (first.stdout.readline(), second.stdout.readline()) == ("up\n", "up\n")
            assert len(host.claims()) == len(host.macvtaps()) == 2
            eventually(lambda: waits_for(reaper.pid) == 2)
            first.kill()
            eventually(lambda: len(host.claims()) == len(host.macvtaps()) == 1)
            assert host.claims()[0]["owner"]["process"]["pid"] == second.pid
            second.kill()
            eventually(host.is_clean)
        reaper.send_signal(signal.SIGTERM)
        out, err = reaper.communicate(timeout=20)
    assert (reaper.returncode, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["healed nic"] * 2


def test_what_died_before_it_came_is_healed_first(host):
    with guest() as dead:
        dead.stdout.readline()
        dead.kill()
    assert len(host.claims()) == 1
    with following():
        eventually(host.is_clean)


def test_it_sleeps_and_is_small(host):
    with following() as reaper, guest() as living:
        living.stdout.readline()
        eventually(lambda: waits_for(reaper.pid) == 1)
        time.sleep(0.5)  # the reading of the claim's last change
        before = cpu_ns(reaper.pid)
        time.sleep(2.5)
        assert cpu_ns(reaper.pid) == before
        status = Path(f"/proc/{reaper.pid}/status").read_text()
        assert int(status.partition("VmRSS:")[2].split()[0]) < RESIDENT_KB


def test_there_is_one_for_a_host(host):
    with following() as first:
        second = subprocess.run(
            [VNET_LOCK, "reap", "--follow"], capture_output=True, text=True, timeout=30, check=False
        )
        assert (second.returncode, second.stdout) == (4, "")
        assert f"(pid {first.pid})" in second.stderr
        first.kill()
        first.wait(timeout=20)
    with following():
        pass
    del host


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_well_when_it_is_told_to(host, number):
    with following() as reaper:
        reaper.send_signal(number)
        out, err = reaper.communicate(timeout=20)
    assert (reaper.returncode, out, err) == (0, "", "")
    del host


def test_claims_in_a_directory_that_was_made_anew_are_seen(host):
    with following() as reaper:
        shutil.rmtree(RUN / "claims")
        eventually((RUN / "claims").exists)
        with guest() as living:
            living.stdout.readline()
            eventually(lambda: waits_for(reaper.pid) == 1)
            living.kill()
            eventually(host.is_clean)


LOCKER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(1000)
"""


def test_a_libvirt_guest_is_waited_for_by_its_pid_files_lock(host, tmp_path):
    """Its QEMU holds the lock; the daemon that started it is gone, so nobody else gives it back."""
    pid_file = tmp_path / "web1.pid"
    with started(["sleep", "1000"]) as daemon:
        gone = processes.read_process(DEFAULT, daemon.pid)
    with started([sys.executable, "-c", LOCKER, str(pid_file)]) as qemu:
        assert qemu.stdout.readline() == "locked\n"
        owner = Owner(
            OwnerKind.LIBVIRT,
            "web1",
            processes.read_boot_id(DEFAULT),
            uuid=str(uuid.uuid4()),
            process=gone,
            pid_file=str(pid_file),
        )
        resource = Resource.parse("nic:up0")
        claim = Claim(resource, Mode.SHARED, State.ACTIVE, owner, new_token(), "net0", time.time())
        with ClaimTable(DEFAULT).guarded() as writer:
            writer.add([claim])
        with following() as reaper:
            eventually(lambda: waits_for(reaper.pid) == 1)
            time.sleep(0.3)
            assert len(host.claims()) == 1
            qemu.kill()
            eventually(lambda: not host.claims())


def test_without_follow_it_heals_once_and_says_only_what_it_did(host):
    def reap() -> str:
        return subprocess.run([VNET_LOCK, "reap"], capture_output=True, text=True, check=True).stdout

    assert reap() == ""
    with guest() as dead:
        dead.stdout.readline()
        assert reap() == ""
        dead.kill()
    assert reap().startswith("healed nic:up0: left by process")
    assert host.is_clean()
