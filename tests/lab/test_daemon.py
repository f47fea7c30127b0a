"""libvirt's daemon dies in the middle of something, or is split: VFs that it binds and gives back itself.

All that needs no VF is in tests/kernel/test_libvirtd.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.contenders import (
    CONTENDERS,
    appearance,
    hostdev_xml,
    owner_of,
    status,
    vnet_lock,
)
from tests.lab.daemons import LIBVIRTD, cannot_read_status, killed_at, split
from tests.lab.machines import Guests, virsh
from tests.lab.nic import Function, Nic, wait_until

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("hook")]

CLAIMS = Path("/run/vnet-lock/claims")
# Bound anew a VF is another link.
OF_THE_LINK = ("ifindex", "operstate", "flags")


@pytest.fixture(autouse=True)
def _libvirtd_is_there(guests: Guests) -> Iterator[None]:
    """For the guests' end, and the next test."""
    del guests
    yield
    if not LIBVIRTD.is_alive:
        LIBVIRTD.begin()


def looks(nic: Nic, index: int) -> dict[str, object]:
    return {key: value for key, value in appearance(nic, index).items() if key not in OF_THE_LINK}


def is_free_again(nic: Nic, before: dict[str, object]) -> bool:
    """Whether the first VF is nobody's, and looks as it did."""
    return not os.listdir(CLAIMS) and bool(nic.vfs[0].netdev) and looks(nic, 0) == before


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def try_to_take(guests: Guests, vf: Function) -> str:
    """What a plain QEMU is told that wants the VF; empty where it got it, and then it is gone again."""
    other = CONTENDERS["vfio"](guests, vf, "", "other")
    if other.runs:
        other.end()
    return "" if other.runs else other.message


@pytest.mark.parametrize("operation", ["start", "started"])
def test_a_daemon_that_is_killed_while_it_starts_a_guest_leaves_its_vf_to_others_or_the_guest_runs(
    lab: Nic, guests: Guests, operation: str
) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    made = guests.libvirt("halfway", hostdev_xml(vf, "52:54:00:00:08:01"), start=False)
    with killed_at("halfway", operation):
        assert made.start(check=False).returncode != 0
    wait_until(lambda: not LIBVIRTD.is_alive, "libvirtd is killed")
    LIBVIRTD.begin()
    if operation == "started":
        # There is a QEMU with its status file. Whether libvirt lets it live is libvirt's to say.
        wait_until(lambda: made.state in ("running", "shut off"), "libvirt knows what it makes of it")
        print(f"killed at started, it is {made.state}")
        assert made.state == "shut off" or owner_of(vf) == "halfway"
        made.destroy(check=False)
        wait_until(lambda: is_free_again(lab, before), "the VF is free again")
    else:
        # libvirt knows nothing of it any more.
        assert made.state == "shut off"
        assert status()[vf.pci]["state"] == "stale"
    assert try_to_take(guests, vf) == ""
    wait_until(lambda: is_free_again(lab, before), "the VF is free again")


@pytest.mark.parametrize("window", ["qemu", "stopped"])
def test_a_vf_that_libvirt_had_not_given_back_when_it_was_killed_is_nobodys_before_it_has(
    lab: Nic, guests: Guests, window: str
) -> None:
    """libvirt would take the VF from its driver under whoever had it by then."""
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    made = guests.libvirt("ended", hostdev_xml(vf, "52:54:00:00:08:02"))
    if window == "qemu":
        pid = made.pid
        LIBVIRTD.end(signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid), "QEMU is dead")
    else:
        with killed_at("ended", window):
            made.destroy(check=False)
            wait_until(lambda: not LIBVIRTD.is_alive, "libvirtd is killed")
    assert vnet_lock("gc").stdout == "nothing is stale\n"
    assert 'guest "ended"' in try_to_take(guests, vf)
    LIBVIRTD.begin()
    wait_until(
        lambda: is_free_again(lab, before) or cannot_read_status("ended"), "libvirt has given the VF back"
    )
    if not is_free_again(lab, before):
        assert window == "stopped"
        assert owner_of(vf) == "ended"
    assert made.state == "shut off"
    made.start()
    assert owner_of(vf) == "ended"
    made.destroy()
    wait_until(lambda: is_free_again(lab, before), "libvirt has given the VF back")


def test_split_daemons_protect_what_guests_and_networks_have(
    lab: Nic, guests: Guests, tmp_path: Path
) -> None:
    vfs = lab.set_numvfs(2)
    path = tmp_path / "pool.xml"
    path.write_text(
        f"<network><name>lab-pool</name><forward mode='hostdev' managed='yes'><pf dev='{lab.pf}'/>"
        "</forward></network>"
    )
    networks = "-c", "network:///system"
    with split() as (qemu, network):
        virsh(*networks, "net-define", str(path))
        virsh(*networks, "net-start", "lab-pool")
        try:
            pooled = guests.libvirt(
                "pooled", "<interface type='network'><source network='lab-pool'/></interface>"
            )
            fixed = guests.libvirt("fixed", hostdev_xml(vfs[1], "52:54:00:00:0a:01"))
            assert [owner_of(vf) for vf in vfs] == ["pooled", "fixed"]
            for one in (pooled, fixed):
                one.console.ready()
            pids = pooled.pid, fixed.pid
            assert 'guest "pooled"' in try_to_take(guests, vfs[0])
            for daemon in (network, qemu):
                daemon.end(signal.SIGKILL)
                daemon.begin()
            assert (pooled.state, fixed.state) == ("running", "running")
            assert (pooled.pid, fixed.pid) == pids
            assert vnet_lock("gc").stdout == "nothing is stale\n"
            again = guests.libvirt("again", hostdev_xml(vfs[1], "52:54:00:00:0a:02"), start=False)
            assert 'guest "fixed"' in again.start(check=False).stderr
            for made in (pooled, fixed):
                made.destroy()
            assert not os.listdir(CLAIMS)
        finally:
            virsh(*networks, "net-destroy", "lab-pool", check=False)
            virsh(*networks, "net-undefine", "lab-pool", check=False)
