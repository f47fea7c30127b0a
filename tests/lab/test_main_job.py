"""The demo is the main job: each of its lines holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.nic import Nic

TOP = Path(__file__).resolve().parents[2]
# As make demo has it: on a busy machine five minutes become half an hour.
DEADLINE_S = 2400


@pytest.fixture(scope="module")
def told() -> list[tuple[str, str, bool]]:
    """What ``make demo`` checked: chapter, line, whether it held."""
    nic = Nic(os.environ["VNET_LAB_PF"])
    nic.reset()
    argv = [sys.executable, "-m", "tests.lab.demo"]
    done = subprocess.run(argv, cwd=TOP, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    print(done.stdout, done.stderr)
    nic.reset()
    subprocess.run(["vnet-lock", "hooks", "remove"], check=True, timeout=60)
    lines = json.loads(Path(os.environ["VNET_LAB_RESULTS"], "demo.json").read_text())
    assert (done.returncode == 0) == all(held for _, _, held in lines)
    return [tuple(line) for line in lines]


@pytest.mark.timeout(DEADLINE_S + 300)
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_each_line_of_the_main_job_holds(told: list[tuple[str, str, bool]], number: int) -> None:
    lines = [(what, held) for chapter, what, held in told if chapter.startswith(f"{number}.")]
    assert len(lines) >= 2
    assert [what for what, held in lines if not held] == []
