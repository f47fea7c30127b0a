"""A guest gets the free VF that its metadata asks for, plugged in as soon as it runs, and gives it back."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.contenders import HOST, appearance, intent_xml, owner_of, status, vnet_lock
from tests.lab.machines import Guests, LibvirtGuest, virsh
from tests.lab.nic import Nic, run, wait_until

pytestmark = pytest.mark.usefixtures("hook")

OF_THE_LINK = ("ifindex", "operstate", "flags")
# Where a device is to be plugged in: a q35 machine has no free port of its own.
PORTS = "<controller type='pci' model='pcie-root'/>" + "<controller type='pci' model='pcie-root-port'/>" * 4
STANDBY = (
    "<interface type='ethernet'><mac address='52:54:00:00:08:01'/><target dev='late-standby' managed='no'/>"
    "<model type='virtio'/><teaming type='persistent'/><alias name='ua-net0'/></interface>"
)


def wanting(*intents: str) -> str:
    found = "".join(f"<vnet:interface {intent}/>" for intent in intents)
    return f"<vnet:guest xmlns:vnet='urn:vnet-lock:guest:1'>{found}</vnet:guest>"


def looks(nic: Nic, index: int) -> dict[str, object]:
    return {key: value for key, value in appearance(nic, index).items() if key not in OF_THE_LINK}


def has_plugged(made: LibvirtGuest) -> bool:
    return "<interface type='hostdev'" in made.dump_xml()


def companions() -> list[int]:
    """The pids that stand in the claims' journals."""
    found = []
    for path in Path("/run/vnet-lock/claims").glob("*.json"):
        record = json.loads(path.read_text())
        found += [entry["pid"] for entry in record["journal"] if entry["kind"] == "companion"]
    return found


def findings() -> list[dict[str, str]]:
    return list(json.loads(vnet_lock("status", "--json").stdout)["findings"])


@pytest.fixture
def bridged(lab: Nic) -> Iterator[str]:
    """A bridge with the PF in it, so that a tap of it and a VF of the PF are on one wire; the host is there."""
    mac = Path(f"/sys/class/net/{lab.pf}/address").read_text().strip()
    run("ip", "link", "add", "wire0", "address", mac, "type", "bridge")
    run("ip", "link", "set", lab.pf, "master", "wire0", "up")
    run("ip", "address", "add", f"{HOST}/24", "dev", "wire0")
    run("ip", "link", "set", "wire0", "up")
    yield "wire0"
    run("ip", "link", "del", "wire0")


@pytest.fixture
def journal() -> Iterator[list[str]]:
    """What is sent to the system's log; the lab VM has nobody else who would take it."""
    path = "/dev/log"
    lines: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taken:
        taken.bind(path)
        taken.setblocking(False)

        class Lines(list[str]):
            def __str__(self) -> str:
                while True:
                    try:
                        lines.append(taken.recv(8192).decode(errors="replace"))
                    except BlockingIOError:
                        return "\n".join(lines)

        yield Lines()
    os.unlink(path)


def test_a_teamed_vf_is_plugged_in_at_a_plain_start_and_given_back(
    lab: Nic, bridged: str, guests: Guests
) -> None:
    lab.set_numvfs(2)
    before = [looks(lab, 0), looks(lab, 1)]
    made = guests.libvirt(
        "teamed", STANDBY + PORTS,
        metadata=wanting(
            f'alias="ua-net0" policy="veb" port="bridge" dev="{bridged}"',
            f'alias="ua-vf0" policy="veb" dev="{lab.pf}" backends="vfio" teaming="ua-net0"',
        ),
        ip="10.7.0.2/24", ping=HOST,
    )  # fmt: skip
    print("virsh start came back; plugged:", has_plugged(made), "companions:", companions())
    vf = next(vf for vf in lab.vfs if owner_of(vf) == "teamed")
    print(made.console.ready())
    wait_until(lambda: has_plugged(made), "the VF is plugged in", 120)
    wait_until(lambda: not companions(), "the companion is done", 60)
    print(status()[vf.pci], vnet_lock("status").stdout)
    made.console.ask(
        "run ls -l /sys/class/net; ip link; for n in /sys/class/net/*; do readlink $n/device/driver; done"
    )
    print(made.console.ask(f"ping {HOST}"))
    print(virsh("detach-device-alias", made.uuid, "ua-vf0", "--live", check=False))
    wait_until(lambda: not has_plugged(made), "the VF is unplugged", 60)
    print(made.console.ask(f"ping {HOST}"))
    made.console.ask("run ip link")
    print(vnet_lock("status").stdout)
    made.destroy()
    print(made.console.text)
    wait_until(lambda: vf.netdev, "the VF has its driver again")
    assert [looks(lab, 0), looks(lab, 1)] == before
    assert not os.listdir("/run/vnet-lock/claims")


def test_a_vf_that_cannot_be_plugged_in_is_kept_and_said(
    lab: Nic, guests: Guests, journal: list[str]
) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    wish = wanting(f'alias="ua-vf0" policy="veb" dev="{lab.pf}" backends="vfio" vlan="7"')
    made = guests.libvirt("portless", "", metadata=wish)
    wait_until(lambda: findings(), "status tells", 120)
    print(findings(), str(journal), owner_of(vf))
    made.destroy()
    assert looks(lab, 0) == before
    assert not os.listdir("/run/vnet-lock/claims")
    # paused, killed
    made = guests.libvirt("paused", PORTS, metadata=wish, start=False)
    virsh("start", made.uuid, "--paused")
    (pid,) = companions()
    print(
        Path(f"/proc/{pid}/comm").read_text(),
        os.listdir(f"/proc/{pid}/fd"),
        Path(f"/proc/{pid}/status").read_text(),
    )
    print([os.readlink(p) for p in Path(f"/proc/{pid}/fd").iterdir()])
    assert not has_plugged(made)
    virsh("resume", made.uuid)
    wait_until(lambda: has_plugged(made), "the VF is plugged in", 120)
    wait_until(lambda: not companions(), "the companion is done", 60)
    print(lab.admin(0), vnet_lock("status").stdout, vnet_lock("show", f"vf:{vf.pci}").stdout)
    print(made.console.ready())
    other = guests.libvirt("other", PORTS, metadata=wish, start=False)
    print(other.start(check=False))
    made.destroy()
    wait_until(lambda: vf.netdev, "the VF has its driver again")
    assert looks(lab, 0) == before
    virsh("start", made.uuid, "--paused")
    (pid,) = companions()
    os.kill(pid, signal.SIGKILL)
    virsh("resume", made.uuid)
    print(vnet_lock("status").stdout)
    made.destroy()
    assert looks(lab, 0) == before
    assert not os.listdir("/run/vnet-lock/claims")
