"""vnet-lock's own verbs for libvirt guests: what they choose runs, and nothing is left where it can't."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.lab.contenders import HOST, appearance, owner_of, status, vnet_lock
from tests.lab.daemons import newer
from tests.lab.guest import domain_xml, kernel_words
from tests.lab.machines import Guests, LibvirtGuest, virsh
from tests.lab.nic import Function, Nic, run, wait_until

pytestmark = pytest.mark.long

CLAIMS = "/run/vnet-lock/claims"
XML = Path(__file__).parents[2] / "xml"
# Bound anew a VF's device is another link, and igbvf makes up another MAC where the PF has none for it.
OF_THE_LINK = ("ifindex", "operstate", "flags", "mac")
UUID = "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1a99"
MAC = "52:54:00:00:09:01"
# A q35 machine has no free port of its own to plug something in.
PORTS = "<controller type='pci' model='pcie-root'/>" + "<controller type='pci' model='pcie-root-port'/>" * 3


def late(name: str) -> str:
    return (
        f"<interface type='ethernet'><mac address='{MAC}'/><target dev='{name}' managed='no'/>"
        "<model type='virtio'/><alias name='ua-net0'/></interface>"
    )


def wish(words: str) -> str:
    return (
        "<vnet:guest xmlns:vnet='urn:vnet-lock:guest:1'>"
        f"<vnet:interface alias='ua-net0' policy='veb' {words}/></vnet:guest>"
    )


def looks(nic: Nic) -> list[dict[str, object]]:
    found = [appearance(nic, index) for index in range(nic.numvfs)]
    return [{key: value for key, value in one.items() if key not in OF_THE_LINK} for one in found]


def nothing_is_left(nic: Nic, before: list[dict[str, object]]) -> None:
    wait_until(lambda: all(vf.netdev for vf in nic.vfs), "the VFs have their driver again")
    assert looks(nic) == before
    assert os.listdir(CLAIMS) == []


def states(nic: Nic) -> list[str]:
    found = status()
    return [str(found[vf.pci]["state"]) for vf in nic.vfs]


@pytest.mark.usefixtures("hook")
def test_a_defined_guest_is_started_with_the_vf_that_is_free_then(lab: Nic, guests: Guests) -> None:
    lab.set_numvfs(2)
    lab.set_address(f"{HOST}/24")
    before = looks(lab)
    made = guests.libvirt(
        "chosen", late("chosen-net0") + PORTS, start=False,
        metadata=wish(f"port='sriov' dev='{lab.pf}' backends='vfio tap'"),
        ip="10.7.0.2/24", ping=HOST,
    )  # fmt: skip
    # A plain start can't have what isn't in the definition, and says what to do.
    refused = made.start(check=False)
    assert "vnet-lock start" in refused.stderr
    assert vnet_lock("claim", f"vf:{lab.vfs[0].pci}", "--pid", str(os.getpid())).returncode == 0
    defined = made.dump_xml()
    done = vnet_lock("start", "-c", "qemu:///system", "chosen")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'guest "chosen" is started: ua-net0 hostdev {lab.vfs[1].pci}\n'
    assert owner_of(lab.vfs[1]) == "chosen"
    again = vnet_lock("start", "chosen")
    assert (again.returncode, "running already" in again.stderr) == (1, True)
    seen = made.console.ready()
    assert (seen["mac"], seen["driver"], seen["ping"]) == (MAC, "igbvf", "3/3"), seen
    assert vnet_lock("release", f"vf:{lab.vfs[0].pci}").returncode == 0
    _plug_and_unplug(lab, made)
    made.destroy()
    wait_until(lambda: states(lab) == ["free", "free"], "the VFs are free")
    assert (
        virsh("dumpxml", "--inactive", made.uuid).stdout.split("<devices>")[1]
        == defined.split("<devices>")[1]
    )
    nothing_is_left(lab, before)


def _plug_and_unplug(lab: Nic, made: LibvirtGuest) -> None:
    """Into the guest that has the second VF the first: by VFIO, by a macvtap of libvirt's, and by ours."""
    first = lab.vfs[0]
    for words, form in (
        (["--protocols", "vfio", "--vlan", "42"], "full"),
        (["--protocols", "tap"], "full"),
        (["--protocols", "tap"], "late"),
    ):
        done = _attach(made, first, *words, "--form", form)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith('interface ua-net1 is attached to guest "chosen"')
        assert owner_of(first) == "chosen"
        if "42" in words:
            assert lab.admin(0)["vlan"] == 42
        refused = _attach(made, first, *words, "--form", form)
        assert refused.returncode == 4, refused.stderr
        assert "ua-net2" in refused.stderr
        assert made.console.ask(f"ping {HOST}")["ping"] == "3/3"
        # The guest's kernel lets go of a device once it has taken it.
        done = vnet_lock("detach", "chosen", "ua-net1", "--timeout", "90")
        assert done.returncode == 0, done.stderr
        assert owner_of(first) is None
        assert owner_of(lab.vfs[1]) == "chosen"
    absent = vnet_lock("detach", "chosen", "ua-net1")
    assert (absent.returncode, "no interface ua-net1" in absent.stderr) == (2, True)


def _attach(made: LibvirtGuest, vf: Function, *words: str) -> subprocess.CompletedProcess[str]:
    return vnet_lock("attach", made.name, "--mode", "veb", "--port", "sriov", "--dev", vf.pci, *words)


@pytest.mark.parametrize("has_hook", [False, True])
def test_where_libvirt_or_its_qemu_refuses_nothing_is_left(
    lab: Nic, guests: Guests, has_hook: bool, request: pytest.FixtureRequest
) -> None:
    if has_hook:
        request.getfixturevalue("hook")
    lab.set_numvfs(1)
    before = looks(lab)
    broken = "<disk type='file'><source file='/nowhere'/><target dev='vda' bus='virtio'/></disk>"
    for backends in ("vfio", "tap"):
        words = f"port='sriov' dev='{lab.pf}' backends='{backends}'"
        name = f"broken-{backends}"
        interface = "" if backends == "vfio" else late("broken-net0")
        made = guests.libvirt(name, interface + broken, start=False, metadata=wish(words))
        done = vnet_lock("start", name)
        assert done.returncode == 1, done.stderr
        assert "/nowhere" in done.stderr
        assert made.state == "shut off"
        nothing_is_left(lab, before)
    claimed = vnet_lock("claim", f"vf:{lab.vfs[0].pci}", "--pid", str(os.getpid()))
    assert claimed.returncode == 0
    done = vnet_lock("start", "broken-vfio")
    assert done.returncode == 4
    assert done.stderr.startswith(f"vnet-lock: ua-net0: VF {lab.vfs[0].pci} is held by process")
    assert vnet_lock("release", f"vf:{lab.vfs[0].pci}").returncode == 0


@pytest.mark.usefixtures("hook")
def test_a_start_that_is_killed_leaves_no_claim_without_a_guest(lab: Nic, guests: Guests) -> None:
    lab.set_numvfs(1)
    before = looks(lab)
    words = f"port='sriov' dev='{lab.pf}' backends='vfio'"
    made = guests.libvirt("killed", "", start=False, metadata=wish(words))
    starting = subprocess.Popen(["vnet-lock", "start", "killed"], stdout=subprocess.DEVNULL)
    wait_until(lambda: os.path.isdir(CLAIMS) and os.listdir(CLAIMS), "the VF is claimed")
    starting.send_signal(signal.SIGKILL)
    starting.wait(30)
    # libvirt does what it was asked to, if it was, and then ends it.
    made.destroy(check=False)
    assert vnet_lock("gc").returncode == 0
    nothing_is_left(lab, before)


@pytest.mark.parametrize("path", sorted(XML.glob("*.xml")), ids=lambda path: path.name)
def test_libvirt_defines_every_example(lab: Nic, path: Path, tmp_path: Path) -> None:
    del lab
    example = path.read_text()
    if newer():
        # Which has it in its schema only.
        example = example.replace("<backend type='passt'/>", "")
    defined = tmp_path / path.name
    defined.write_text(example)
    virsh("define", str(defined))
    virsh("undefine", example.partition("<name>")[2].partition("</name>")[0])


@pytest.fixture
def file_guest(lab: Nic, tmp_path: Path) -> Path:
    """A guest in a file, for libvirt's embedded driver: a VF by VFIO, and a macvtap that is made for it."""
    # What libvirt knows of this QEMU already; it would ask for a minute.
    cache = Path("/var/lib/vnet-lock/embed/alone/cache/qemu")
    cache.mkdir(parents=True, exist_ok=True)
    shutil.copytree("/var/cache/libvirt/qemu/capabilities", cache / "capabilities", dirs_exist_ok=True)
    intents = (
        "<vnet:guest xmlns:vnet='urn:vnet-lock:guest:1'>"
        f"<vnet:interface alias='ua-net0' policy='veb' port='sriov' dev='{lab.pf}' backends='vfio'/>"
        f"<vnet:interface alias='ua-net1' policy='veb' port='macvlan' dev='{lab.pf}'/></vnet:guest>"
    )
    second = late("alone-net1").replace("ua-net0", "ua-net1").replace(MAC, "52:54:00:00:09:02")
    path = tmp_path / "alone.xml"
    path.write_text(
        domain_xml(
            "alone", late("alone-net0") + second, uuid=UUID, metadata=intents,
            words=kernel_words(ip="10.7.0.2/24,-", ping=HOST, nics=2), console=tmp_path / "alone.log",
        )
    )  # fmt: skip
    return path


def test_a_guest_of_a_file_runs_without_the_daemon_and_outlives_its_wrapper(
    lab: Nic, guests: Guests, file_guest: Path
) -> None:
    lab.set_numvfs(1)
    lab.set_address(f"{HOST}/24")
    before = looks(lab)
    argv = ["vnet-qemu", str(file_guest)]
    shown = run("vnet-qemu", "--print", str(file_guest)).stdout
    assert "<interface type='hostdev' managed='yes'>" in shown
    assert "<target dev='alone-net1' managed='no'/>" in shown
    assert not os.path.exists(CLAIMS) or os.listdir(CLAIMS) == []
    made = guests.program("alone", argv, file_guest.with_suffix(".log"))
    seen = made.console.ready()
    assert {*seen["driver"].split(",")} == {"igbvf", "virtio_net"}, seen
    assert owner_of(lab.vfs[0]) == "alone"
    second = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (second.returncode, "run by another vnet-qemu" in second.stderr) == (1, True), second.stderr
    made.kill()
    made.wait()
    assert vnet_lock("gc").stdout == "nothing is stale\n"
    second = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (second.returncode, "is running already, without" in second.stderr) == (1, True), second.stderr
    qemu = int(second.stderr.rpartition(" ")[2])
    assert owner_of(lab.vfs[0]) == "alone"
    os.kill(qemu, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{qemu}/exe"), "QEMU is gone")
    healed = vnet_lock("gc")
    assert healed.returncode == 0, healed.stderr
    nothing_is_left(lab, before)
    # The next start is as the first.
    made = guests.program("alone", argv, file_guest.with_suffix(".log"))
    wait_until(lambda: owner_of(lab.vfs[0]) == "alone" and lab.vfs[0].driver == "vfio-pci", "it runs", 400)
    made.kill(signal.SIGTERM)
    assert made.wait(120) == 0, made.said
    nothing_is_left(lab, before)
