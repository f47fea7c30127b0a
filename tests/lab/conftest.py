"""Fixtures of the lab ring: inside the lab VM the NIC and guests, elsewhere a skip that says what to run."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.machines import Guests, virsh
from tests.lab.nic import Nic, run

# Beyond this a test hangs; a busy machine makes an emulated CPU very slow.
TEST_S = 600


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test has a deadline."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_S))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tell at once why a test failed: the whole report comes at the end of an hour."""
    if report.failed or report.outcome == "rerun":
        crash = getattr(report.longrepr, "reprcrash", None)
        print(f"\n    {report.when}: {crash.message if crash else report.longrepr}", flush=True)


@pytest.fixture(scope="session", autouse=True)
def _in_the_lab_vm() -> None:
    if not os.environ.get("VNET_LAB_PF"):
        pytest.skip("needs the lab VM: make test-lab (VNET_LOCK_REQUIRE=lab fails instead)")


@pytest.fixture
def lab() -> Iterator[Nic]:
    """The SR-IOV NIC, without VFs and addresses at the start of each test."""
    nic = Nic(os.environ["VNET_LAB_PF"])
    nic.reset()
    yield nic
    nic.reset()


@pytest.fixture
def logs(request: pytest.FixtureRequest) -> Path:
    """A directory for what a test wants to keep; it is in the results."""
    name = re.sub(r"[^\w.-]+", "-", request.node.name)
    path = Path(os.environ["VNET_LAB_RESULTS"]) / "tests" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def guests(lab: Nic, logs: Path, tmp_path: Path) -> Iterator[Guests]:
    """Makes guests, plain and by libvirt; none of them outlives the test, or the VFs that they use."""
    made = Guests(tmp_path)
    yield made
    try:
        made.end()
    finally:
        for path in tmp_path.iterdir():
            if path.suffix in {".log", ".out", ".xml"}:
                (logs / path.name).write_bytes(path.read_bytes())


@pytest.fixture(name="virsh")
def run_virsh() -> Callable[..., object]:
    """``virsh("list", check=False)``."""
    return virsh


@pytest.fixture(scope="module")
def hook() -> Iterator[None]:
    """vnet-lock's hook, as a person installs it; libvirtd looks for hooks when it gets SIGHUP."""
    daemon = int(Path("/run/libvirtd.pid").read_text())
    run("vnet-lock", "hooks", "install")
    os.kill(daemon, signal.SIGHUP)
    yield
    run("vnet-lock", "hooks", "remove")
