"""Programs that inherit their network from qemu-net-helper --exec, User-mode Linux among them."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kernel.conftest import need
from tests.kernel.host import HELPER, MAC, eventually, started
from tests.lab import image

# Says what it was given, and waits to be killed.
TELL = """
import fcntl, os, struct, sys
def name(fd):
    told = fcntl.ioctl(int(fd), 0x800454D2, struct.pack("=16sH22x", b"", 0))
    name, flags = struct.unpack("=16sH22x", told)
    return name.rstrip(b"\\0").decode(), bool(flags & 0x4000)
print(os.getpid(), sys.argv[1:], [name(fd) for fd in sys.argv[1].split(":")], flush=True)
import time; time.sleep(100)
"""
VEPA = f"--mode=vepa --dev=up0 --mac={MAC}"


def helper_words(line: str, *command: str) -> list[str]:
    return [HELPER, *line.split(), "--exec", "--", *command]


@pytest.mark.parametrize(
    ("line", "places", "queues", "has_header"),
    [
        (f"{VEPA} --protocols=tap", "{fd}", 1, True),
        (f"{VEPA} --protocols=tap --queues=2", "{fds}", 2, True),
        (f"{VEPA} --raw --protocols=tap", "{fd0}", 1, False),
        ("--mode=veb --port=bridge --dev=br0 --raw --protocols=tap", "{fd}", 1, False),
    ],
)
def test_a_program_becomes_the_owner_of_what_it_inherits(host, line, places, queues, has_header):
    with started(helper_words(line, sys.executable, "-c", TELL, places, "{ifname} {mac}")) as program:
        told = program.stdout.readline()
        assert told.startswith(f"{program.pid} ")
        (claim,) = host.claims()
        owner = claim["owner"]
        assert (owner["kind"], owner["process"]["pid"]) == ("process", program.pid)
        assert owner["name"].startswith("python")
        assert (claim["state"], claim["worker"]) == ("active", None)
        (link,) = [name for name in host.links() if name.startswith("vl")]
        assert told.count(str((link, has_header))) == queues
        assert f"'{link} " in told
        host.gc()
        assert host.claims() == [claim]
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=20) == -signal.SIGTERM
    host.gc()
    assert host.is_clean()


def test_a_tap_in_a_bridge_goes_with_its_program_before_anybody_heals(host):
    words = helper_words("--mode=veb --port=bridge --dev=br0", sys.executable, "-c", TELL, "{fd}")
    with started(words) as program:
        program.stdout.readline()
        assert any(name.startswith("vl") for name in host.links())
        program.kill()
        program.wait(timeout=20)
        eventually(lambda: not any(name.startswith("vl") for name in host.links()))
    assert len(host.claims()) == 1
    host.gc()
    assert host.is_clean()


def test_one_helper_in_another_gives_a_program_two_interfaces(host):
    inner = helper_words("--mode=veb --port=bridge --dev=br0", sys.executable, "-c", TELL, "{fd}:{{fd}}")
    outer = helper_words(VEPA, *(word.replace("{", "{{").replace("}", "}}") for word in inner))
    # The outer one fills what the inner one was to leave.
    outer[-1] = "{{fd}}:{fd}"
    with started(outer) as program:
        told = program.stdout.readline()
        assert told.startswith(f"{program.pid} "), program.stderr.read()
        assert {claim["resource"] for claim in host.claims()} == {"nic:up0", "nic:br0"}
        assert {claim["owner"]["process"]["pid"] for claim in host.claims()} == {program.pid}
        assert told.count("('vl") == 2
    host.gc()
    assert host.is_clean()


def test_what_cannot_be_executed_leaves_nothing_behind(host, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF, but no more of it")
    broken.chmod(0o755)
    result = subprocess.run(
        helper_words(VEPA, str(broken), "{fd}"), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr.count("\n")) == (5, 1)
    assert f"cannot run {broken}" in result.stderr
    assert host.is_clean()


def test_a_refusal_runs_no_command_and_names_what_was_passed_over(host, tmp_path):
    ran = tmp_path / "ran"
    command = ["sh", "-c", f"touch {ran}; : {{fd}} {{vhostfd}}"]
    for explain in ([], ["--explain"]):
        words = helper_words("--mode=veb --port=bridge --dev=up0", *command)
        words[1:1] = explain
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert result.returncode == 5
        assert not ran.exists()
        if explain:
            assert "qemu-net-helper: net0: refused\n" in result.stderr
            assert "not veb-bridge-tap+vhost" in result.stderr
        else:
            assert result.stderr.count("\n") == 1
    assert host.is_clean()


def test_what_was_passed_over_and_what_was_chosen_is_explained(host):
    words = helper_words("--explain --mode=vepa --dev=nosuch0 --dev=up0 --protocols=tap", "true", "{fd}")
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")
    lines = result.stderr.splitlines()
    assert all(line.startswith("qemu-net-helper: ") for line in lines)
    assert re.search(r"^qemu-net-helper: net0 +vepa-macvlan-tap +nic:up0$", result.stderr, re.MULTILINE)
    assert "qemu-net-helper:   not vepa-macvlan-tap on nosuch0: " in result.stderr
    host.gc()
    assert host.is_clean()


def test_a_signal_before_the_program_runs_gives_back(host, tmp_path):
    """A helper that waits for the claims' lock is told to end."""
    words = helper_words(VEPA, sys.executable, "-c", TELL, "{fd}")
    with started(words) as program:
        eventually(lambda: host.claims() or program.poll() is not None)
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=20) in (143, -signal.SIGTERM)
    host.gc()
    assert host.is_clean()


@pytest.mark.timeout(300)
def test_a_helper_killed_at_any_moment_on_its_way_to_the_program_leaves_nothing_that_stays(host):
    seed = random.randrange(1 << 32)
    print(f"random.seed({seed})")
    dice = random.Random(seed)
    words = helper_words(VEPA, sys.executable, "-c", TELL, "{fd}")
    began = time.monotonic()
    with started(words) as program:
        program.stdout.readline()
        span_s = time.monotonic() - began
        program.kill()
    for _ in range(6):
        with started(words) as program:
            time.sleep(span_s * (0.2 + 0.9 * dice.random()))
            program.kill()
            program.wait(timeout=20)
        host.gc()
        assert host.is_clean()


@pytest.fixture
def uml(tmp_path: Path) -> list[str]:
    """A User-mode Linux that boots into tests/kernel/uml-init; its console is standard output."""
    program = shutil.which("linux.uml")
    need(program, "linux.uml (Debian's user-mode-linux)")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(image.build_initrd(Path(__file__).with_name("uml-init")))
    words = [
        program,
        "mem=64M",
        f"initrd={initrd}",
        "root=/dev/ram0",
        "con=null",
        "con0=null,fd:1",
        "ssl=null",
    ]
    return [*words, f"uml_dir={tmp_path}", "quiet", "vl.ip=10.9.0.2/24", "vl.ping=10.9.0.1"]


# A macvtap sends no SIGIO (its driver has no fasync), which UML waits for; a plain tap and a socket do.
@pytest.mark.parametrize(
    ("line", "vector"),
    [
        ("--mode=veb --port=bridge --dev=br0 --protocols=tap", ",vec=0"),
        ("--mode=vepa --port=macvlan --dev=up0 --protocols=socket", ""),
        ("--mode=veb --port=macvlan --dev=up0 --protocols=socket", ""),
    ],
)
def test_user_mode_linux_exchanges_packets_with_its_wires_other_end(host, ip, uml, tmp_path, line, vector):
    if "socket" in line:
        pytest.importorskip("vnet_lock.backends.socket")
    else:
        ip("link set up0 master br0")
    ip("address add 10.9.0.1/24 dev peer0")
    words = helper_words(
        f"{line} --mac={MAC} --raw", *uml, f"vec0:transport=fd,fd={{fd}},mac={{mac}}{vector}"
    )
    with started(words, env={**os.environ, "TMPDIR": str(tmp_path)}, process_group=0) as guest:
        report = next(line for line in guest.stdout if "VNET-GUEST" in line)
        assert "ping=3/3 long=2/2" in report
        assert f"mac={MAC}" in report
        owners = {(claim["owner"]["name"], claim["owner"]["process"]["pid"]) for claim in host.claims()}
        assert owners == {("linux.uml", guest.pid)}
        # It has processes of its own, which hold its network as long as they live.
        os.killpg(guest.pid, signal.SIGKILL)
        guest.wait(timeout=20)
    eventually(lambda: host.gc() or host.is_clean())
