"""A guest gets the free VF that its metadata asks for, plugged in as soon as it runs, and gives it back."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.lab.contenders import HOST, appearance, owner_of, vnet_lock
from tests.lab.machines import Guests, LibvirtGuest, virsh
from tests.lab.nic import Nic, run, wait_until

pytestmark = pytest.mark.usefixtures("hook")

OF_THE_LINK = ("ifindex", "operstate", "flags")
# Where devices are plugged in: a q35 guest has no port of its own that is free.
PORTS = "<controller type='pci' model='pcie-root'/>" + "<controller type='pci' model='pcie-root-port'/>" * 4
STANDBY = (
    "<interface type='ethernet'><mac address='52:54:00:00:08:01'/><target dev='late-standby' managed='no'/>"
    "<model type='virtio'/><teaming type='persistent'/><alias name='ua-net0'/></interface>"
)
CLAIMS = Path("/run/vnet-lock/claims")
# What a guest in an emulated CPU may take for a word.
ANSWER_S = 240


def wanting(*intents: str) -> str:
    found = "".join(f"<vnet:interface {intent}/>" for intent in intents)
    return f"<vnet:guest xmlns:vnet='urn:vnet-lock:guest:1'>{found}</vnet:guest>"


def looks(nic: Nic, index: int) -> dict[str, object]:
    return {key: value for key, value in appearance(nic, index).items() if key not in OF_THE_LINK}


def has_plugged(made: LibvirtGuest) -> bool:
    return "<interface type='hostdev'" in made.dump_xml()


def companions() -> list[int]:
    """The pids that stand in the claims' journals."""
    records = [json.loads(path.read_text()) for path in CLAIMS.glob("*.json")]
    entries = (entry for record in records for entry in record["journal"])
    return [entry["pid"] for entry in entries if entry["kind"] == "companion"]


def findings() -> list[tuple[str, str, str]]:
    found = json.loads(vnet_lock("status", "--json").stdout)["findings"]
    return [(one["severity"], one["kind"], one["message"]) for one in found]


@pytest.fixture
def bridged(lab: Nic) -> Iterator[str]:
    """A bridge with the PF in it and the host on it: a tap of it and a VF of the PF are on one wire."""
    mac = Path(f"/sys/class/net/{lab.pf}/address").read_text().strip()
    run("ip", "link", "add", "wire0", "address", mac, "type", "bridge")
    run("ip", "link", "set", lab.pf, "master", "wire0", "up")
    run("ip", "address", "add", f"{HOST}/24", "dev", "wire0")
    run("ip", "link", "set", "wire0", "up")
    yield "wire0"
    run("ip", "link", "del", "wire0")


@pytest.fixture
def journal() -> Iterator[Callable[[], str]]:
    """What is sent to the system's log, which the lab VM has nobody else to take."""
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind("/dev/log")
        log.setblocking(False)

        def read() -> str:
            with suppress(BlockingIOError):
                while True:
                    heard.append(log.recv(8192).decode(errors="replace"))
            return "\n".join(heard)

        yield read
    os.unlink("/dev/log")


def test_a_teamed_vf_is_plugged_in_at_a_plain_start_and_the_guest_fails_over(
    lab: Nic, bridged: str, guests: Guests
) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    wish = wanting(
        f'alias="ua-net0" policy="veb" port="bridge" dev="{bridged}"',
        f'alias="ua-vf0" policy="veb" dev="{lab.pf}" backends="vfio" teaming="ua-net0"',
    )
    made = guests.libvirt("teamed", PORTS + STANDBY, metadata=wish, ip="10.7.0.2/24", ping=HOST)
    assert owner_of(vf) == "teamed"
    other = guests.libvirt("other", PORTS + STANDBY.replace("late", "more"), metadata=wish, start=False)
    refused = other.start(check=False)
    assert refused.returncode != 0
    assert f'VF {vf.pci} is held by guest "teamed"' in refused.stderr
    assert "3/3" in made.console.ready()["ping"]
    wait_until(lambda: has_plugged(made), "the VF is plugged in", 240)
    wait_until(lambda: not companions(), "the companion is done", 120)
    assert findings() == []
    both, standby_alone = ("run test $(ls -d /sys/class/net/*/lower_* | wc -l) = " + each for each in "21")
    wait_until(lambda: made.console.ask(both, ANSWER_S)["exit"] == "0", "the guest has teamed both", ANSWER_S)
    assert made.console.ask(f"ping {HOST}", ANSWER_S)["ping"] == "3/3"
    virsh("detach-device-alias", made.uuid, "ua-vf0", "--live")
    wait_until(lambda: not has_plugged(made), "the VF is unplugged", 120)
    wait_until(
        lambda: made.console.ask(standby_alone, ANSWER_S)["exit"] == "0",
        "the guest has its standby",
        ANSWER_S,
    )
    assert made.console.ask(f"ping {HOST}", ANSWER_S)["ping"] == "3/3"
    made.destroy()
    wait_until(lambda: vf.netdev, "the VF has its driver again")
    assert looks(lab, 0) == before
    assert not os.listdir(CLAIMS)


def test_a_vf_waits_for_a_paused_guest_and_one_that_cannot_be_plugged_in_is_said(
    lab: Nic, guests: Guests, journal: Callable[[], str]
) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    wish = wanting(
        f'alias="ua-vf0" policy="veb" dev="{lab.pf}" backends="vfio" mac="52:54:00:00:08:02" vlan="7"'
    )
    portless = guests.libvirt("portless", "", metadata=wish)
    wait_until(lambda: findings(), "status tells", 240)
    ((severity, kind, message),) = findings()
    assert (severity, kind) == ("error", "unplugged")
    assert f'guest "portless" (pid {portless.pid}) has not got VF {vf.pci}' in message
    assert "No more available PCI slots" in message
    assert "No more available PCI slots" in journal()
    portless.destroy()
    assert (looks(lab, 0), os.listdir(CLAIMS)) == (before, [])

    made = guests.libvirt("paused", PORTS, metadata=wish, start=False)
    for killed in (True, False):
        virsh("start", made.uuid, "--paused")
        (pid,) = companions()
        assert Path(f"/proc/{pid}/comm").read_text() == "vnet-companion\n"
        assert not has_plugged(made)
        if killed:
            os.kill(pid, signal.SIGKILL)
            virsh("resume", made.uuid)
            ((severity, kind, message),) = findings()
            assert (severity, kind) == ("error", "unplugged")
            assert f"(pid {pid}) is gone" in message
            made.destroy()
            assert (looks(lab, 0), os.listdir(CLAIMS)) == (before, [])
    virsh("resume", made.uuid)
    wait_until(lambda: has_plugged(made), "the VF is plugged in", 240)
    wait_until(lambda: not companions(), "the companion is done", 120)
    assert findings() == []
    admin = lab.admin(0)
    assert (admin["mac"], admin["vlan"]) == ("52:54:00:00:08:02", 7)
    seen = made.console.ready()
    print(f"seen by a guest that was plugged as soon as it ran: {seen}")
    wait_until(
        lambda: made.console.ask("run test -e /sys/class/net/eth0", ANSWER_S)["exit"] == "0",
        "the guest has it",
        ANSWER_S,
    )
    made.destroy()
    wait_until(lambda: vf.netdev, "the VF has its driver again")
    assert (looks(lab, 0), os.listdir(CLAIMS)) == (before, [])
