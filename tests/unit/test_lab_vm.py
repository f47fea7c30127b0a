"""The lab's outside: how a run of the VM ends. A script stands in for vng, and plays each end of a VM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lab import older
from tests.lab.vm import HUNG, LOST, TOP, TRIES_S, Outcome, Vm


def end_as(
    tmp_path: Path,
    story: str,
    deadline_s: float = 30,
    tries_s: Sequence[float] = TRIES_S,
    *,
    resumable: bool = False,
) -> Outcome:
    """The outcome of a VM whose life is ``story``, in shell, in the results directory."""
    results = tmp_path / "results"
    vng = tmp_path / "vng"
    vng.write_text(f"#!/bin/sh\ncd {results}\n{story}\n")
    vng.chmod(0o755)
    return Vm(["true"], results, deadline_s, resumable=resumable, tries_s=tries_s, vng=str(vng)).run()


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_commands_exit_code_is_the_runs(tmp_path: Path, code: int) -> None:
    outcome = end_as(tmp_path, f": >started; echo {code} >exit-code")
    assert (outcome.exit_code, outcome.complaint) == (code, "")


def test_output_is_shown_and_kept(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    end_as(tmp_path, ": >started; echo of a test; echo 0 >exit-code")
    assert b"\nof a test\n" in capfdbinary.readouterr().out
    assert (tmp_path / "results/output.log").read_bytes() == b"of a test\n"


def test_a_vm_that_ends_without_an_exit_code_is_lost(tmp_path: Path) -> None:
    outcome = end_as(tmp_path, ": >started; exit 0")
    assert outcome.exit_code == LOST
    assert "lab VM lost" in outcome.complaint
    assert "running its command" in outcome.complaint


def test_a_vm_that_is_lost_before_its_command_ran_is_booted_once_more(tmp_path: Path) -> None:
    outcome = end_as(tmp_path, "[ -e again ] && { : >started; echo 0 >exit-code; }; : >again")
    assert outcome.exit_code == 0
    outcome = end_as(tmp_path, "echo boot >>boots")
    boots = (tmp_path / "results/boots").read_text().count("boot")
    assert (outcome.exit_code, boots) == (LOST, len(TRIES_S))


def test_a_command_that_can_resume_is_run_in_another_vm_when_its_own_is_lost(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lost_once = "echo a word; : >started; [ -e again ] || { : >again; exit; }; echo 4 >exit-code"
    outcome = end_as(tmp_path, lost_once, resumable=True)
    assert (outcome.exit_code, outcome.complaint) == (4, "")
    assert "s while running its command (vng's exit code 0)" in capfd.readouterr().out
    assert (tmp_path / "results/lost-1/output.log").read_text() == "a word\n"
    outcome = end_as(tmp_path, "echo boot >>boots; : >started", resumable=True)
    boots = (tmp_path / "results/boots").read_text().count("boot")
    assert (outcome.exit_code, boots) == (LOST, len(TRIES_S))


THREE_TESTS = """
import os, pathlib
tries = pathlib.Path(os.environ["VNET_LAB_RESULTS"], "tries")
def try_it(name):
    with tries.open("a") as file:
        file.write(name)
    return tries.read_text()
def test_a():
    try_it("a")
def test_b():
    if "b" not in try_it("b")[:-1]:
        assert 0
def test_c():
    if "c" not in try_it("c")[:-1]:
        os.abort()
"""


@pytest.mark.parametrize(
    ("reruns", "tried", "end"), [(1, "abbc", "1 passed, 2 deselected"), (0, "abc", "2 passed")]
)
def test_what_passed_in_a_lost_vm_is_not_run_again(tmp_path: Path, reruns: int, tried: str, end: str) -> None:
    (tmp_path / "test_three.py").write_text(THREE_TESTS)
    results = tmp_path / "results"
    results.mkdir()
    pytest_ = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.lab.resume",
        "-c",
        os.devnull,
    ]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*pytest_, f"--reruns={reruns}", str(tmp_path / "test_three.py")],
            cwd=TOP,
            env={**os.environ, "VNET_LAB_RESULTS": str(results)},
            capture_output=True,
            text=True,
            check=False,
        )

    assert run().returncode == -signal.SIGABRT
    assert (results / "tries").read_text() == tried
    again = run()
    assert end in again.stdout
    assert again.returncode == 0
    # Where all passed something is run all the same.
    assert "1 passed, 2 deselected" in run().stdout


def test_a_vm_that_hangs_while_it_boots_is_booted_once_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hangs_once = "[ -e again ] || { : >again; exec sleep 1000; }; : >started; echo 3 >exit-code"
    outcome = end_as(tmp_path, hangs_once, tries_s=(0.5, 20))
    assert (outcome.exit_code, outcome.complaint) == (3, "")
    assert "lab VM hung: ended after " in capfd.readouterr().out
    outcome = end_as(tmp_path, "exec sleep 1000", tries_s=(0.1, 0.2))
    assert outcome.exit_code == LOST
    assert "s while booting; see " in outcome.complaint


def test_a_command_may_take_longer_than_a_boot(tmp_path: Path) -> None:
    outcome = end_as(tmp_path, ": >started; sleep 2.5; echo 0 >exit-code", tries_s=(2,))
    assert (outcome.exit_code, outcome.complaint) == (0, "")


def test_what_vng_said_last_stands_in_the_complaint_about_a_lost_vm(tmp_path: Path) -> None:
    outcome = end_as(tmp_path, "printf 'Traceback:\\nNo such file: qemu\\n\\n' >&2; exit 3")
    assert "(vng's exit code 3, No such file: qemu); see " in outcome.complaint


def test_what_an_older_libvirt_learnt_about_qemu_is_kept_with_it(tmp_path: Path) -> None:
    results, folder, vng = tmp_path / "results", tmp_path / "libvirt-1", tmp_path / "vng"
    folder.mkdir()
    story = 'mkdir capabilities; echo "$*" >capabilities/x; echo 0 >exit-code'
    vng.write_text(f"#!/bin/sh\ncd {results}\n{story}\n")
    vng.chmod(0o755)
    assert Vm(["true"], results, 30, vng=str(vng), older=folder).run().exit_code == 0
    assert f"tests/lab/inside {results} {folder}" in (folder / "capabilities/x").read_text()


APT = """#!/bin/sh
case "$0 $*" in
*dpkg-query*) echo 11.3.0-2~bpo12+1 ;;
*madison*) for one in 11.3.0-2~bpo12+1 {offered}; do echo " libvirt-daemon | $one | somewhere"; done ;;
*download*) echo "no such host" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("offered", "said"),
    [("11.3.0-1", "apt offers no libvirt"), ("9.0.0-4+deb12u2", "apt-get failed: no such host")],
)
def test_an_older_libvirt_that_cannot_be_had_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offered: str, said: str
) -> None:
    for name in ("apt-cache", "apt-get", "dpkg-query"):
        (tmp_path / name).write_text(APT.format(offered=offered))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "cache").mkdir()
    with pytest.raises(older.NoOlder, match=said):
        older.unpack(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_an_exit_code_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    assert end_as(tmp_path, ": >started; echo 0 >exit-code").exit_code == 0
    assert end_as(tmp_path, ": >started").exit_code == LOST


def test_a_vm_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    outcome = end_as(tmp_path, ": >started; sleep 1000 & echo $! >child; wait", deadline_s=1)
    assert outcome.exit_code == HUNG
    assert "lab VM hung" in outcome.complaint
    assert time.monotonic() - began < 20
    child = int((tmp_path / "results/child").read_text())
    with pytest.raises(ProcessLookupError):
        _signal_unless_zombie(child)


def _signal_unless_zombie(pid: int) -> None:
    """ProcessLookupError when it is gone, or dead and waiting for a parent to notice."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        os.kill(pid, 0)
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError(pid)
        time.sleep(0.05)


def test_a_command_that_hung_is_not_a_hung_vm(tmp_path: Path) -> None:
    outcome = end_as(tmp_path, f": >started; echo {HUNG} >exit-code")
    assert outcome.exit_code == HUNG
    assert "the command did not end in time" in outcome.complaint
