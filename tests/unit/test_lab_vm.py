"""The lab's outside: how a run of the VM ends. A script stands in for vng, and plays each end of a VM."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.lab.vm import HUNG, LOST, Outcome, Vm


def end_as(tmp_path: Path, story: str, deadline_s: float = 30) -> Outcome:
    """The outcome of a VM whose life is ``story``, in shell, in the results directory."""
    results = tmp_path / "results"
    vng = tmp_path / "vng"
    vng.write_text(f"#!/bin/sh\ncd {results}\n{story}\n")
    vng.chmod(0o755)
    return Vm(["true"], results, deadline_s, vng=str(vng)).run()


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
    assert (outcome.exit_code, (tmp_path / "results/boots").read_text().count("boot")) == (LOST, 2)


def test_what_vng_said_last_stands_in_the_complaint_about_a_lost_vm(tmp_path: Path) -> None:
    outcome = end_as(tmp_path, "printf 'Traceback:\\nNo such file: qemu\\n\\n' >&2; exit 3")
    assert "(vng's exit code 3, No such file: qemu); see " in outcome.complaint


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
