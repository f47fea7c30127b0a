"""The rings' own rules: a skip says what it needs, and is a failure where its ring is required."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("required", "code", "words"),
    [
        ("", 0, "needs the lab VM: make test-lab (VNET_LOCK_REQUIRE=lab fails instead)"),
        ("unit, kernel", 0, "needs the lab VM"),
        ("unit,lab", 1, "a skip fails here: VNET_LOCK_REQUIRE=unit,lab"),
    ],
)
def test_the_lab_ring_outside_of_its_vm_skips_or_fails(required: str, code: int, words: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VNET_L")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/lab/test_lab.py"],
        cwd=TOP,
        env=environment | {"VNET_LOCK_REQUIRE": required},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, words in done.stdout) == (code, True), done.stdout
