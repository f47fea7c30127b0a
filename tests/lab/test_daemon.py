"""libvirt's daemon dies in the middle of something, starts guests by itself, is split, or is a user's own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.lab.contenders import (
    CONTENDERS,
    appearance,
    hostdev_xml,
    intent_xml,
    late_xml,
    owner_of,
    status,
    vnet_lock,
)
from tests.lab.daemons import AUTOSTARTED, HOOKS, LIBVIRTD, killed_at, split
from tests.lab.machines import Guests, virsh
from tests.lab.nic import Function, Nic, wait_until

pytestmark = pytest.mark.usefixtures("hook")

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


@pytest.mark.parametrize("operation", ["prepare", "start", "started"])
def test_a_daemon_that_is_killed_while_it_starts_a_guest_leaves_its_vf_to_others_or_the_guest_runs(
    lab: Nic, guests: Guests, operation: str
) -> None:
    vf = lab.set_numvfs(1)[0]
    before = looks(lab, 0)
    made = guests.libvirt("halfway", hostdev_xml(vf, "52:54:00:00:08:01"), start=False)
    with killed_at("halfway", operation):
        assert made.start(check=False).returncode != 0
    assert not LIBVIRTD.is_alive
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


@pytest.mark.parametrize("window", ["qemu", "stopped", "release"])
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
        with killed_at("ended", window, before_ours=window == "release"):
            made.destroy(check=False)
            wait_until(lambda: not LIBVIRTD.is_alive, "libvirtd is killed")
    if window == "release":
        # All is given back; only our hook was not called.
        assert status()[vf.pci]["state"] == "stale"
        assert try_to_take(guests, vf) == ""
    else:
        assert vnet_lock("gc").stdout == "nothing is stale\n"
        assert 'guest "ended"' in try_to_take(guests, vf)
    LIBVIRTD.begin()
    wait_until(lambda: is_free_again(lab, before), "libvirt has given the VF back")
    assert made.state == "shut off"
    made.start()
    assert owner_of(vf) == "ended"


def test_guests_that_start_with_the_daemon_have_their_vfs_or_are_refused(lab: Nic, guests: Guests) -> None:
    """Two that start by themselves and want the same VF, and a late one beside them."""
    vfs = lab.set_numvfs(2)
    both = [
        guests.libvirt(name, hostdev_xml(vfs[0], f"52:54:00:00:09:0{number}"), start=False)
        for number, name in enumerate(("first", "second"))
    ]
    late = guests.libvirt(
        "late", late_xml("late-auto", "52:54:00:00:09:09"), metadata=intent_xml(vfs[1].pci), start=False
    )
    for made in (*both, late):
        virsh("autostart", made.uuid)
    LIBVIRTD.end()
    AUTOSTARTED.unlink(missing_ok=True)
    LIBVIRTD.begin()

    def running() -> list[str]:
        return [made.name for made in (*both, late) if made.state == "running"]

    wait_until(lambda: len(running()) == 2, "one of the two, and the late one run", 120)
    virsh("list")  # waits for what is still being started
    assert running()[1:] == ["late"]
    assert [owner_of(vf) for vf in vfs] == running()
    told = Path("/var/log/libvirt/libvirtd.log").read_text()
    assert f'vnet-lock: VF {vfs[0].pci} is held by guest "{running()[0]}"' in told


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


USER = 65534


@pytest.fixture
def readable_hook(tmp_path: Path) -> Iterator[None]:
    """The hook with an interpreter and libraries that any user can read, as an installed one has them."""
    library = tmp_path / "lib"
    for name in ("vnet_lock", "filelock"):
        origin = find_spec(name).origin  # type: ignore[union-attr]
        shutil.copytree(Path(str(origin)).parent, library / name)
    hook = HOOKS / "50-vnet-lock"
    text = hook.read_text()
    changed = re.sub("(?m)^python=.*", "python=/usr/bin/python3", text, count=1)
    hook.write_text(re.sub("(?m)^path=.*", f"path={library}", changed, count=1))
    yield
    hook.write_text(text)


@pytest.fixture
def session_virsh(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """virsh of a user who isn't root, with a daemon of his own."""
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, USER, USER)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.is_relative_to("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o011)
    os.chmod("/dev/kvm", 0o666)
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    environment = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}

    def virsh(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [*user, "virsh", "-q", "-c", "qemu:///session", *words]
        return subprocess.run(
            argv, env=environment, capture_output=True, text=True, timeout=180, check=False, cwd=home
        )

    yield virsh
    for pid in (path.name for path in Path("/proc").glob("[0-9]*")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == USER:
                os.kill(int(pid), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.mark.usefixtures("readable_hook")
def test_a_users_own_daemon_starts_his_guests_and_takes_nothing_from_others(
    lab: Nic, guests: Guests, session_virsh: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    vfs = lab.set_numvfs(2)
    guests.libvirt("roots", hostdev_xml(vfs[0], "52:54:00:00:0b:01"))
    claims = {path.name: path.read_bytes() for path in CLAIMS.iterdir()}
    metadata = f"<metadata>{intent_xml(vfs[1].pci)}</metadata>"
    cases = {
        "plain": ("<interface type='user'/>", "", ""),
        "taken": (hostdev_xml(vfs[0], "52:54:00:00:0b:02"), "", 'guest "roots"'),
        "late": (late_xml("user-tap", "52:54:00:00:0b:03"), metadata, "qemu:///system"),
    }
    for name, (interface, more, refusal) in cases.items():
        path = tmp_path / f"{name}.xml"
        path.write_text(
            f"<domain type='kvm'><name>{name}</name>{more}<memory unit='MiB'>64</memory>"
            "<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>"
            f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{interface}"
            "<memballoon model='none'/></devices></domain>"
        )
        path.chmod(0o644)
        made = session_virsh("create", "--paused", str(path))
        assert (made.returncode == 0) == (not refusal), made.stderr
        assert refusal in made.stderr
        if refusal:
            assert "vnet-lock: " in made.stderr
            assert "Traceback" not in made.stderr
    assert session_virsh("destroy", "plain").returncode == 0
    assert {path.name: path.read_bytes() for path in CLAIMS.iterdir()} == claims
