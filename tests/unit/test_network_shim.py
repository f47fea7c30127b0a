"""hooks/network as libvirt runs it: Python starts only for a port with a device, only a new port fails."""

import os
import shutil
from pathlib import Path

import pytest

from tests.unit.test_hook import VF0
from tests.unit.test_network_hook import plug_of, told_of
from tests.unit.test_shim import SHELLS, Ended, Shim


class NetworkShim(Shim):
    driver = "network"
    unread = ("start", "started", "stopped", "new")


@pytest.fixture(params=SHELLS)
def shim(request: pytest.FixtureRequest, tmp_path: Path) -> NetworkShim:
    shell = SHELLS[request.param]
    if not shutil.which(shell[0]):
        pytest.skip(f"needs {shell[0]}; on Debian: apt-get install {shell[0]}")
    return NetworkShim(tmp_path, shell)


@pytest.mark.parametrize("operation", ["port-created", "port-deleted"])
@pytest.mark.parametrize("device", [VF0, "eth0"])
def test_a_port_with_a_device_starts_python(shim: NetworkShim, operation: str, device: str) -> None:
    xml = told_of(plug_of(device))
    assert shim.run(operation, xml) == Ended(0, "", "")
    assert (shim.root / "stdin").read_bytes() == xml + b"\n"
    assert shim.argv[-7:] == ["/nowhere", str(shim.root), str(os.getpid()), "g", operation, "begin", "-"]


@pytest.mark.parametrize("operation", ["port-created", "port-deleted", "start", "started", "stopped", "new"])
def test_anything_else_never_starts_python(shim: NetworkShim, operation: str) -> None:
    xml = told_of("<plug type='bridge' bridge='virbr0'/>")
    assert shim.run(operation, xml) == Ended(0, "", "")
    if not operation.startswith("port"):
        assert shim.run(operation, told_of(plug_of(VF0))) == Ended(0, "", "")
    assert not shim.started_python


@pytest.mark.parametrize(("operation", "status"), [("port-created", 1), ("port-deleted", 0)])
def test_only_a_new_port_fails_where_python_does(shim: NetworkShim, operation: str, status: int) -> None:
    xml = told_of(plug_of(VF0))
    shim.python_does("echo 'vnet-lock: held' >&2; exit 1")
    assert shim.run(operation, xml) == Ended(status, "", "vnet-lock: held\n")
    shim.python_does("kill -KILL $$")
    ended = shim.run(operation, xml)
    assert ended.status == status
    assert "ended with status 137; run: vnet-lock hooks install" in ended.stderr
    shim.fill_in(python="/nonexistent/python3")
    ended = shim.run(operation, xml)
    assert ended.status == status
    assert "/nonexistent/python3 is gone; run: vnet-lock hooks install" in ended.stderr


@pytest.mark.parametrize(("operation", "status"), [("port-created", 1), ("port-deleted", 0)])
def test_a_new_port_without_xml_is_refused(shim: NetworkShim, operation: str, status: int) -> None:
    said = 'vnet-lock: network "g": libvirt gave no XML to the hook\n'
    assert shim.run(operation, b"") == Ended(status, "", said)
    assert not shim.started_python
