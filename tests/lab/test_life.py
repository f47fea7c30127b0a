"""Guests live and die, and so do daemons: claims stay right, and nothing of a guest stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.lab.contenders import (
    CONTENDERS,
    HOST,
    appearance,
    direct_xml,
    hostdev_xml,
    intent_xml,
    late_xml,
    owner_of,
    status,
    vnet_lock,
)
from tests.lab.daemons import LIBVIRTD, Daemon, followed_by, newer
from tests.lab.machines import Guests, virsh
from tests.lab.nic import Nic, run, wait_until

pytestmark = pytest.mark.usefixtures("hook")

# Bound anew a VF is another link; its guest is to find everything else as it was.
OF_THE_LINK = ("ifindex", "operstate", "flags")


def looks(nic: Nic, index: int) -> dict[str, object]:
    return {key: value for key, value in appearance(nic, index).items() if key not in OF_THE_LINK}


# How the daemon ends, and which one comes after it.
RESTARTS = [
    pytest.param(signal.SIGTERM, LIBVIRTD, id="term"),
    pytest.param(signal.SIGKILL, LIBVIRTD, id="kill", marks=pytest.mark.long),
]
if upgraded := newer():
    RESTARTS.append(pytest.param(signal.SIGTERM, upgraded, id="upgrade"))


@pytest.mark.parametrize(("sign", "following"), RESTARTS)
def test_libvirtd_restarts_and_no_guest_notices(
    lab: Nic, guests: Guests, sign: signal.Signals, following: Daemon
) -> None:
    lab.set_numvfs(2)
    lab.set_address(f"{HOST}/24")
    before = [looks(lab, 0), looks(lab, 1)]
    taken = guests.libvirt("taken", hostdev_xml(lab.vfs[0], "52:54:00:00:01:01"), ip="10.7.0.2/24", ping=HOST)
    # One after the other: where a VF's driver starts in a guest while another VF is brought up, the NIC that
    # is emulated here at times gives it no packets, for good.
    assert taken.console.ready()["ping"] == "3/3"
    late = guests.libvirt(
        "late", late_xml("late-tap", "52:54:00:00:01:02"), metadata=intent_xml(lab.vfs[1].pci),
        ip="10.7.0.3/24", ping=HOST,
    )  # fmt: skip
    assert late.console.ready()["ping"] == "3/3"
    pids = taken.pid, late.pid
    with followed_by(following, sign):
        assert (taken.pid, late.pid) == pids
        assert (taken.state, late.state) == ("running", "running")
        assert [owner_of(vf) for vf in lab.vfs] == ["taken", "late"]
        assert vnet_lock("gc").returncode == 0
        assert [owner_of(vf) for vf in lab.vfs] == ["taken", "late"]
        netdev = lab.vfs[1].netdev
        assert netdev
        assert not CONTENDERS["vfio"](guests, lab.vfs[0], "", "other").runs
        assert taken.console.ask(f"ping {HOST}")["ping"] == "3/3"
        assert late.console.ask(f"ping {HOST}")["ping"] == "3/3"
        taken.destroy()
        late.destroy()
        wait_until(lambda: lab.vfs[0].netdev, "libvirt gives the VF back")
        assert [looks(lab, 0), looks(lab, 1)] == before
        assert [vf["state"] for vf in status().values()] == ["free", "free"]


def test_a_restart_of_the_daemon_claims_what_running_guests_use(lab: Nic, guests: Guests) -> None:
    """So a host that gets vnet-lock while guests run is protected as soon as libvirt's daemon restarts."""
    vf = lab.set_numvfs(1)[0]
    made = guests.libvirt("earlier", hostdev_xml(vf, "52:54:00:00:06:01"))
    for name in os.listdir("/run/vnet-lock/claims"):
        os.unlink(f"/run/vnet-lock/claims/{name}")
    assert status()[vf.pci]["state"] == "foreign"
    assert not CONTENDERS["vfio"](guests, vf, "", "other").runs
    LIBVIRTD.end()
    LIBVIRTD.begin()
    wait_until(lambda: owner_of(vf) == "earlier", "the running guest has its claim", 120)
    assert made.state == "running"
    made.destroy()
    assert not os.listdir("/run/vnet-lock/claims")


def test_a_libvirt_guest_that_fails_to_start_leaves_nothing(lab: Nic, guests: Guests) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    for name, interface, metadata in (
        ("broken-hostdev", hostdev_xml(vf, "52:54:00:00:02:01"), ""),
        ("broken-late", late_xml("broken-tap", "52:54:00:00:02:02"), intent_xml(vf.pci)),
    ):
        # A host has no such memory: QEMU itself fails, after the hook and libvirt have done their parts.
        made = guests.libvirt(name, interface, start=False, metadata=metadata)
        xml = made.dump_xml().replace("<kernel>", "<kernel>/nonexistent")
        path = made.console.log.with_suffix(".broken.xml")
        path.write_text(xml)
        virsh("define", str(path))
        assert made.start(check=False).returncode != 0
        wait_until(lambda: vf.netdev, "the VF has its driver again")
        assert looks(lab, 0) == before
        assert owner_of(vf) is None
        assert not Path("/sys/class/net/broken-tap").exists()
    assert not os.listdir("/run/vnet-lock/claims")


def test_a_plain_guest_that_fails_to_start_leaves_nothing(lab: Nic, guests: Guests) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    for protocols in ("vfio", "tap:vhost"):
        network = f"host,id=net0,mode=veb,port=sriov,dev={vf.pci},protocols={protocols}"
        made = guests.qemu(
            f"broken-{protocols[:3]}",
            ["-netdev", network, "-device", "no-such-device"],
            program=["vnet-qemu"],
        )
        assert made.wait(120) == 1
        assert "no-such-device" in made.said
        wait_until(lambda: vf.netdev, "the VF has its driver again")
        assert looks(lab, 0) == before
        assert owner_of(vf) is None


def test_a_killed_libvirt_guest_gives_its_vf_back(lab: Nic, guests: Guests) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    made = guests.libvirt("killed", hostdev_xml(vf, "52:54:00:00:03:01"))
    os.kill(made.pid, signal.SIGKILL)
    wait_until(lambda: not os.listdir("/run/vnet-lock/claims"), "the hook gave the VF back")
    wait_until(lambda: vf.netdev, "the VF has its driver again")
    assert looks(lab, 0) == before


@pytest.mark.parametrize("killed", ["release", "stopped|release"])
def test_a_release_hook_that_is_killed_keeps_a_vf_no_longer_than_is_doubtful(
    lab: Nic, guests: Guests, killed: str
) -> None:
    """libvirtd lives on. Where `stopped` is killed, too, nothing tells this guest from one that starts."""
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    made = guests.libvirt("unreleased", hostdev_xml(vf, "52:54:00:00:07:01"))
    hook = Path("/etc/libvirt/hooks/qemu.d/50-vnet-lock")
    text = hook.read_text()
    try:
        hook.write_text(text.replace("\n", f"\ncase $2 in {killed}) kill -KILL $$ ;; esac\n", 1))
        made.destroy()
    finally:
        hook.write_text(text)
    assert owner_of(vf) == "unreleased"
    if killed == "release":
        assert status()[vf.pci]["state"] == "stale"
        other = CONTENDERS["vfio"](guests, vf, "", "other")
        assert other.runs, other.message
        other.end()
    else:
        assert vnet_lock("gc").stdout == "nothing is stale\n"
        assert not CONTENDERS["vfio"](guests, vf, "", "other").runs
        made.start()
        made.destroy()
    wait_until(lambda: vf.netdev, "the VF has its driver again")
    assert looks(lab, 0) == before
    assert not os.listdir("/run/vnet-lock/claims")


def test_guests_exchange_packets_through_vhost(lab: Nic, guests: Guests) -> None:
    """veb on macvlan, plain and late, each with a macvlan beside it on the PF.

    One guest after the other: two at once, both with vhost, are more than an emulated CPU always bears.
    """
    run("ip", "link", "add", "link", lab.pf, "name", "peer0", "type", "macvlan", "mode", "bridge")
    run("ip", "address", "add", f"{HOST}/24", "dev", "peer0")
    run("ip", "link", "set", "peer0", "up")
    network = f"host,id=net0,mode=veb,port=macvlan,dev={lab.pf},protocols=tap:vhost"
    device = "virtio-net-pci,netdev=net0,mac=52:54:00:00:04:01,romfile="
    plain = guests.qemu(
        "plain", ["-netdev", network, "-device", device], program=["vnet-qemu"], ip="10.7.0.2/24", ping=HOST
    )
    assert plain.console.ready()["ping"] == "3/3"
    children = Path(f"/proc/{plain.pid}/task/{plain.pid}/children").read_text().split()
    check_shared_and_vhost(lab, int(children[0]))
    plain.kill(signal.SIGTERM)
    plain.wait(120)
    late = guests.libvirt(
        "late", late_xml("late-veb", "52:54:00:00:04:02"),
        metadata=intent_xml(lab.pf, policy="veb", port="macvlan"), ip="10.7.0.3/24", ping=HOST,
    )  # fmt: skip
    assert late.console.ready()["ping"] == "3/3"
    check_shared_and_vhost(lab, late.pid)
    late.destroy()
    assert lab.uppers(lab.pf) == ["peer0"]


def check_shared_and_vhost(nic: Nic, pid: int) -> None:
    """Whether a QEMU has the kernel's vhost-net, and its share of the PF is claimed."""
    opened = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    assert "/dev/vhost-net" in opened
    found = vnet_lock("show", f"pf:{nic.pci}", "--json")
    assert found.returncode == 0
    assert '"mode": "shared"' in found.stdout or '"mode":"shared"' in found.stdout


def test_what_a_network_resolved_to_is_claimed_at_start(lab: Nic, guests: Guests, tmp_path: Path) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    networks = {
        "lab-pool": f"<forward mode='hostdev' managed='yes'><pf dev='{lab.pf}'/></forward>",
        "lab-vepa": f"<forward mode='vepa'><interface dev='{lab.pf}'/></forward>",
    }
    try:
        for name, forward in networks.items():
            (tmp_path / f"{name}.xml").write_text(f"<network><name>{name}</name>{forward}</network>")
            virsh("net-define", str(tmp_path / f"{name}.xml"))
            virsh("net-start", name)
        pooled = guests.libvirt(
            "pooled", "<interface type='network'><source network='lab-pool'/></interface>"
        )
        assert owner_of(vf) == "pooled"
        shared = guests.libvirt(
            "shared", "<interface type='network'><source network='lab-vepa'/></interface>"
        )
        assert '"name": "shared"' in vnet_lock("status", "--json").stdout
        pooled.destroy()
        shared.destroy()
        wait_until(lambda: vf.netdev, "libvirt gives the VF back")
        assert looks(lab, 0) == before
        assert not os.listdir("/run/vnet-lock/claims")
    finally:
        for name in networks:
            virsh("net-destroy", name, check=False)
            virsh("net-undefine", name, check=False)


def test_a_guest_that_touches_no_device_of_ours_starts_without_python(lab: Nic, guests: Guests) -> None:
    del lab
    hook = Path("/etc/libvirt/hooks/qemu.d/50-vnet-lock")
    text = hook.read_text()
    try:
        hook.write_text(re.sub("(?m)^python=.*", "python=/nonexistent/python3", text, count=1))
        assert hook.read_text() != text
        assert guests.libvirt("plain", "").state == "running"
        needs = guests.libvirt(
            "needs", direct_xml(os.environ["VNET_LAB_PF"], "52:54:00:00:05:01"), start=False
        )
        refused = needs.start(check=False)
        assert refused.returncode != 0
        assert "hooks install" in refused.stderr
    finally:
        hook.write_text(text)


def test_a_daemonized_guest_keeps_its_vf_and_gives_it_back(lab: Nic, guests: Guests, tmp_path: Path) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    pid_file = tmp_path / "daemon.pid"
    network = f"host,id=net0,mode=veb,port=sriov,dev={vf.pci},protocols=vfio"
    argv = [
        "vnet-qemu",
        "--name",
        "daemon",
        "qemu-system-x86_64",
        "-machine",
        "q35",
        "-accel",
        "kvm",
        "-m",
        "64",
    ]
    argv += [
        "-display",
        "none",
        "-nodefaults",
        "-S",
        "-netdev",
        network,
        "-daemonize",
        "-pidfile",
        str(pid_file),
    ]
    subprocess.run(argv, check=True, timeout=180)
    pid = guests.daemonized(int(pid_file.read_text()))
    assert status()[vf.pci]["claim"]["owner"]["pid"] == pid  # type: ignore[index]
    assert not CONTENDERS["tap"](guests, vf, "", "other").runs
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not os.listdir("/run/vnet-lock/claims"), "the VF was given back", 120)
    assert looks(lab, 0) == before
