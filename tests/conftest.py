"""What all rings share: a test that is skipped where its ring is required has failed.

VNET_LOCK_REQUIRE names rings (unit, kernel, lab) with commas between them; ``make test`` requires all.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

RINGS = Path(__file__).parent


def pytest_configure() -> None:
    """Signals as on a terminal: nohup and a shell's & have some ignored, and what we start inherits it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def is_required(path: Path) -> bool:
    """Whether the ring that ``path`` is in was asked for by name."""
    asked = re.split(r"[ ,]+", os.environ.get("VNET_LOCK_REQUIRE", ""))
    return path.is_relative_to(RINGS) and path.relative_to(RINGS).parts[0] in asked


def _fail_instead(path: Path, report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not is_required(path):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{reason} [a skip fails here: VNET_LOCK_REQUIRE={os.environ['VNET_LOCK_REQUIRE']}]"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The unit ring needs no root: the few of its tests that become somebody else are left out without it."""
    if os.geteuid() != 0:
        left_out = [item for item in items if item.get_closest_marker("as_root")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test."""
    report = yield
    _fail_instead(item.path, report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that is skipped as a whole."""
    report = yield
    _fail_instead(collector.path, report)
    return report
