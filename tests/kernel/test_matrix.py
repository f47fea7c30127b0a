"""vnet-lock matrix: what it calls ready can be had, and what it calls missing is missing; nothing stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.kernel.conftest import need
from tests.kernel.host import QEMU, VNET_LOCK, Host, children_of, eventually
from tests.policies import PROTOCOLS, Footprint
from vnet_lock.combination import COMBINATIONS, Combination, Policy, Port


def read(*words: str) -> dict[str, dict[str, object]]:
    done = subprocess.run([VNET_LOCK, "matrix", "--json", *words], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)["combinations"]
    assert [one["combination"] for one in told] == [one.text for one in COMBINATIONS]
    return {one["combination"]: one for one in told}


def test_every_combination_has_a_line_and_nothing_stays(host: Host) -> None:
    del host
    before = Footprint.read()
    text = subprocess.run([VNET_LOCK, "matrix"], capture_output=True, text=True, check=True).stdout
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [one.text for one in COMBINATIONS]
    assert all("  ready" in line or "  not here: " in line for line in lines[:-1])
    ready = sum("  ready" in line for line in lines[:-1])
    assert lines[-1] == f"{ready} of {len(COMBINATIONS)} combinations are ready"
    before.wait_until_again()


def test_what_is_ready_can_be_had(host: Host, ip: Callable[[str], str]) -> None:
    """Each that is ready on up0 (or br0) starts a QEMU."""
    ip("address add 10.9.0.9/24 dev up0")
    need(shutil.which("qemu-system-x86_64"), "qemu-system-x86_64")
    verdicts = read("--dev", "up0", "--dev", "br0")
    ready = [Combination.parse(name) for name, one in verdicts.items() if one["ready"]]
    assert {"veb-bridge-tap", "vepa-macvlan-tap", "private-macvlan-socket"} <= {one.text for one in ready}
    for one in ready:
        dev = (
            "" if one.port is Port.SOCKET else ",dev=br0" if one.text.startswith("veb-bridge") else ",dev=up0"
        )
        address = ",ip=10.9.0.7" if one.policy is Policy.ROUTE else ""
        protocols = PROTOCOLS[one.backend]
        network = f"host,id=n,mode={one.policy},port={one.port}{dev}{address},protocols={protocols}"
        with host.running(f"{QEMU} -netdev {network} -device virtio-net-pci,netdev=n") as process:
            eventually(lambda: any(b"qemu-system" in comm(pid) for pid in children_of(process.pid)))
            assert process.poll() is None, one.text
        subprocess.run([VNET_LOCK, "gc"], check=True, capture_output=True)


def comm(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/comm").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_what_the_kernel_has_not_is_said(host: Host) -> None:
    del host
    verdicts = read()
    if not os.path.exists("/dev/vhost-net"):
        assert verdicts["veb-bridge-tap+vhost"]["reason"] == (
            "there is no /dev/vhost-net; run: modprobe vhost_net"
        )
    assert "no device that port sriov could use" in str(verdicts["veb-sriov-tap"]["reason"])


def test_a_device_that_does_not_fit_is_named(host: Host) -> None:
    del host
    done = subprocess.run([VNET_LOCK, "matrix", "--dev", "nix"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, "'nix'" in done.stderr) == (2, "", True)
    verdicts = read("--dev", "br0", "--dev", "nix")
    assert "br0" in str(verdicts["vepa-macvlan-tap"]["reason"])
    # Where no device is needed, none is asked for.
    assert verdicts["nat-socket-user"]["ready"] is True
