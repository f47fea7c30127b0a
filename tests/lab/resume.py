"""pytest's plugin for a VM that may be lost: what passed in one isn't run again in the next.

The results directory, which both see, has the names of the tests that passed in ``passed``, a line each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_failed: set[str] = set()


def _list() -> Path:
    return Path(os.environ["VNET_LAB_RESULTS"]) / "passed"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is left, but always something: a run without a test has failed."""
    try:
        passed = set(_list().read_text().splitlines())
    except FileNotFoundError:
        return
    left = [item for item in items if item.nodeid not in passed] or items[-1:]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test has passed when its clean-up has, too."""
    if not report.passed:
        _failed.add(report.nodeid)
    if report.when == "setup" and report.passed:
        _failed.discard(report.nodeid)
    if report.when == "teardown" and report.nodeid not in _failed:
        with _list().open("a") as passed:
            passed.write(f"{report.nodeid}\n")
