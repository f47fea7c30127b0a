"""libvirt's daemon is killed in the middle of something, starts guests by itself, is split, or a user's own.

A libvirtd of the test's own, in its namespaces. Its guests never run: what libvirt does for them is all that
counts, and it does that on macvtaps as on VFs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernel.conftest import need
from tests.kernel.host import LINKS, RUN, VNET_LOCK, Host, children_of, eventually, has_open, is_running
from tests.lab import older
from tests.lab.contenders import intent_xml, late_xml
from tests.lab.daemons import (
    AUTOSTARTED,
    HOOKS,
    LIBVIRTD,
    cannot_read_status,
    hook_with,
    hooks_served,
    killed_at,
    split,
)
from tests.lab.machines import virsh
from vnet_lock.kernel.processes import read_lock_holder

FOLDERS = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
CONFIGURATION = {
    "qemu.conf": 'security_driver = "none"\nuser = "root"\ngroup = "root"\ncgroup_controllers = []\n'
    'stdio_handler = "file"\n',
    "libvirtd.conf": 'auth_unix_ro = "none"\nauth_unix_rw = "none"\n'
    'log_outputs = "3:file:/var/log/libvirt/libvirtd.log"\n',
}
MAC = "52:54:00:00:00:07"
USER, HOME = 65534, "/run/user-home"


@pytest.fixture(params=["installed", "served", *(["older"] if older.is_offered() else [])])
def libvirtd(host: Host, request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host with libvirt's daemon and our hook, served or not, and a guest ``g`` that has up0 to itself."""
    need(shutil.which("libvirtd"), "libvirtd")
    if request.param == "older":
        lower = f"lowerdir={older.unpack()}/usr:/usr"
        subprocess.run(["mount", "-t", "overlay", "-o", lower, "older", "/usr"], check=True)
    for folder in FOLDERS:
        os.makedirs(folder, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "libvirt", folder], check=True)
    for name in ("/etc/libvirt/hooks", "/etc/libvirt/qemu", "/var/log/libvirt/qemu", "/run/libvirt"):
        os.mkdir(name)
    for name, text in CONFIGURATION.items():
        Path("/etc/libvirt", name).write_text(text)
    command(VNET_LOCK, "hooks", "install")
    with hooks_served() if request.param == "served" else contextlib.nullcontext():
        LIBVIRTD.begin()
        try:
            virsh("define", write_guest("g", direct(MAC)))
            yield host
        finally:
            if not LIBVIRTD.is_alive:
                LIBVIRTD.begin()
            for name in virsh("list", "--name").stdout.split():
                virsh("destroy", name, check=False)
            LIBVIRTD.end()


def write_guest(name: str, interface: str, metadata: str = "") -> str:
    path = Path(f"/run/{name}.xml")
    path.write_text(
        f"<domain type='qemu'><name>{name}</name>{metadata}<memory unit='MiB'>32</memory><os>"
        "<type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>"
        f"{interface}<memballoon model='none'/><controller type='usb' model='none'/></devices></domain>"
    )
    path.chmod(0o644)
    return str(path)


def direct(mac: str, mode: str = "passthrough") -> str:
    return (
        f"<interface type='direct'><mac address='{mac}'/><source dev='up0' mode='{mode}'/>"
        "<model type='virtio'/></interface>"
    )


def owners(host: Host) -> list[str]:
    return [claim["owner"]["name"] for claim in host.claims()]


def command(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def gc() -> str:
    return command(VNET_LOCK, "gc")


def is_clean(host: Host) -> bool:
    return not host.claims() and host.links() == LINKS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("operation", ["prepare", "start", "started"])
def test_what_a_daemon_leaves_that_is_killed_while_it_starts_a_guest_is_healed(
    libvirtd: Host, operation: str
) -> None:
    with killed_at("g", operation):
        assert virsh("start", "--paused", "g", check=False).returncode != 0
    eventually(lambda: not LIBVIRTD.is_alive)
    if operation != "started":
        # libvirt will know nothing of this start.
        assert gc() == 'healed nic:up0: left by guest "g"\n'
        assert is_clean(libvirtd)
    LIBVIRTD.begin()
    if operation == "started":
        state = virsh("domstate", "g").stdout.strip()
        assert (state == "shut off") == is_clean(libvirtd), state
        virsh("destroy", "g", check=False)
    # The MAC and the device are to be had again.
    virsh("start", "--paused", "g")
    assert owners(libvirtd) == ["g"]
    virsh("destroy", "g")
    assert is_clean(libvirtd)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("window", ["qemu", "stopped", "release"])
def test_what_libvirt_has_not_given_back_when_it_is_killed_is_nobodys_before_it_has(
    libvirtd: Host, window: str
) -> None:
    virsh("start", "--paused", "g")
    pid = int(Path("/run/libvirt/qemu/g.pid").read_text())
    if window == "qemu":
        LIBVIRTD.end(signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not is_running(pid))
    else:
        with killed_at("g", window, before_ours=window == "release"):
            virsh("destroy", "g", check=False)
            eventually(lambda: not LIBVIRTD.is_alive)
    if window == "release":
        assert gc() == 'healed nic:up0: left by guest "g"\n'
        assert is_clean(libvirtd)
    else:
        assert gc() == "nothing is stale\n"
        refused = libvirtd.qemu("qemu-system-x86_64 -M q35 -netdev host,id=n,mode=vepa,dev=up0")
        assert refused.returncode == 4
        assert 'guest "g"' in refused.stderr
    LIBVIRTD.begin()
    eventually(lambda: is_clean(libvirtd) or cannot_read_status("g"))
    assert is_clean(libvirtd) or (window == "stopped" and gc() == "nothing is stale\n")
    assert virsh("domstate", "g").stdout.strip() == "shut off"
    virsh("start", "--paused", "g")
    virsh("destroy", "g")
    assert is_clean(libvirtd)


def test_a_macvtap_whose_name_was_chosen_is_healed_too(libvirtd: Host) -> None:
    virsh("undefine", "g")
    interface = direct(MAC, "bridge").replace("</interface>", "<target dev='chosen0'/></interface>")
    virsh("define", write_guest("g", interface))
    with killed_at("g", "start"):
        assert virsh("start", "--paused", "g", check=False).returncode != 0
    eventually(lambda: not LIBVIRTD.is_alive)
    assert "chosen0" in libvirtd.links()
    assert gc() == 'healed nic:up0: left by guest "g"\n'
    assert is_clean(libvirtd)
    LIBVIRTD.begin()
    virsh("start", "--paused", "g")
    virsh("destroy", "g")
    assert is_clean(libvirtd)


def test_a_macvtap_on_a_guests_device_that_is_not_libvirts_stays(libvirtd: Host) -> None:
    """One with another MAC or name on a shared device, and one that a process has open."""
    virsh("undefine", "g")
    virsh("define", write_guest("g", direct(MAC, "bridge")))
    for name, mac in (("macvtap7", "52:54:00:00:00:08"), ("mine0", MAC)):
        with killed_at("g", "prepare"):
            virsh("start", "--paused", "g", check=False)
        eventually(lambda: not LIBVIRTD.is_alive)
        command("ip", "link", "add", "link", "up0", "name", name, "address", mac, "type", "macvtap")
        try:
            assert gc() == 'healed nic:up0: left by guest "g"\n'
            assert name in libvirtd.links()
        finally:
            command("ip", "link", "del", name)
        LIBVIRTD.begin()
    assert is_clean(libvirtd)


def test_a_guest_larger_than_a_pipe_starts_though_not_each_call_of_the_hook_reads_it(libvirtd: Host) -> None:
    virsh("define", write_guest("large", direct(MAC), f"<description>{'x' * 200_000}</description>"))
    virsh("start", "large")
    assert owners(libvirtd) == ["large"]
    virsh("destroy", "large")
    assert is_clean(libvirtd)
    assert "unable to write to child" not in Path("/var/log/libvirt/libvirtd.log").read_text()


@pytest.mark.timeout(300)
def test_a_guest_that_starts_with_the_daemon_has_its_device_or_is_refused(libvirtd: Host) -> None:
    virsh("define", write_guest("h", direct("52:54:00:00:00:09")))
    for name in ("g", "h"):
        virsh("autostart", name)
    LIBVIRTD.end()
    AUTOSTARTED.unlink(missing_ok=True)
    LIBVIRTD.begin()
    log = Path("/var/log/libvirt/libvirtd.log")
    eventually(lambda: "vnet-lock: device up0 is held by guest" in log.read_text(), 60)
    eventually(lambda: virsh("list", "--name").stdout.split(), 60)
    running = virsh("list", "--name").stdout.split()
    assert len(running) == 1
    assert owners(libvirtd) == running
    assert f'vnet-lock: device up0 is held by guest "{running[0]}"' in log.read_text()


@pytest.mark.timeout(300)
def test_split_daemons_protect_what_guests_have_and_may_be_killed(libvirtd: Host) -> None:
    networks = "-c", "network:///system"
    Path("/run/net.xml").write_text(
        "<network><name>net</name><forward mode='vepa'><interface dev='up0'/></forward></network>"
    )
    pooled = "<interface type='network'><source network='net'/></interface>"
    with split() as (qemu, network):
        virsh(*networks, "net-define", "/run/net.xml")
        virsh(*networks, "net-start", "net")
        virsh("create", "--paused", write_guest("pooled", pooled))
        assert owners(libvirtd) == ["pooled"]
        for daemon in (network, qemu):
            daemon.end(signal.SIGKILL)
            daemon.begin()
        assert virsh("list", "--name").stdout.split() == ["pooled"]
        assert gc() == "nothing is stale\n"
        assert owners(libvirtd) == ["pooled"]
        refused = virsh("start", "g", check=False)
        assert 'guest "pooled"' in refused.stderr
        virsh("destroy", "pooled")
        assert is_clean(libvirtd)
        virsh("start", "--paused", "g")
        assert owners(libvirtd) == ["g"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("libvirtd", ["served"], indirect=True)
@pytest.mark.parametrize("killed", ["nobody", "the server", "who answers"])
def test_a_hook_that_another_process_answers_has_its_answer_or_refuses(libvirtd: Host, killed: str) -> None:
    server = read_lock_holder(f"{RUN}/hooks.lock")
    argv = ["virsh", "-q", "-c", "qemu:///system", "start", "--paused", "g"]
    with open(RUN / "guard", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as start:
            (answering,) = eventually(
                lambda: [pid for pid in children_of(server) if has_open(pid, RUN / "guard")]
            )
            if killed != "nobody":
                os.kill(server if killed == "the server" else answering, signal.SIGKILL)
            fcntl.flock(guard, fcntl.LOCK_UN)
            _, said = start.communicate(timeout=60)
    if killed == "who answers":
        assert start.returncode == 1
        assert "the hook's Python ended with status 3; see: vnet-lock doctor" in said
        assert is_clean(libvirtd)
        virsh("start", "--paused", "g")
    assert owners(libvirtd) == ["g"]
    virsh("destroy", "g")
    assert is_clean(libvirtd)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("libvirtd", ["installed"], indirect=True)
@pytest.mark.usefixtures("libvirtd")
def test_a_guest_that_libvirt_is_busy_with_is_told_from_one_that_it_refuses() -> None:
    virsh("start", "--paused", "g")
    qemu = int(Path("/run/libvirt/qemu/g.pid").read_text())
    code = (
        "from vnet_lock.front.libvirt_client.connection import Libvirt\n"
        "from vnet_lock.front.libvirt_client.errors import Busy\n"
        "try: Libvirt('qemu:///system').find('g').attach('<interface type=\"user\"/>')\n"
        "except Busy as error: print(error)"
    )
    ask = ["virsh", "-q", "-c", "qemu:///system", "qemu-monitor-command", "g", "--hmp", "info status"]
    os.kill(qemu, signal.SIGSTOP)
    with subprocess.Popen(ask):
        try:
            eventually(lambda: virsh("domcontrol", "g").stdout.startswith("occupied"))
            told = command(sys.executable, "-c", code)
        finally:
            # virsh ends once QEMU has answered it.
            os.kill(qemu, signal.SIGCONT)
    assert 'guest "g": ' in told
    assert "cannot acquire state change lock" in told
    assert told.endswith("; try again\n")


def run_as_user(*words: str) -> subprocess.CompletedProcess[str]:
    """virsh of a user who isn't root, with a daemon of his own."""
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    environment = {**os.environ, "HOME": HOME, "XDG_RUNTIME_DIR": HOME}
    argv = [*user, "virsh", "-q", "-c", "qemu:///session", *words]
    return subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=180, check=False, cwd=HOME
    )


@pytest.fixture
def user(libvirtd: Host) -> Iterator[None]:
    """A user's home, and a hook whose interpreter and libraries he can read, as he can installed ones."""
    os.mkdir(HOME)
    os.chown(HOME, USER, USER)
    for name in ("vnet_lock", "filelock"):
        shutil.copytree(Path(find_spec(name).origin).parent, f"/run/lib/{name}")
    hook = HOOKS / "50-vnet-lock"
    hook.write_text(hook_with(hook.read_text(), "/usr/bin/python3", "/run/lib"))
    yield
    for path in Path(HOME).rglob("*.pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("user")
def test_a_users_own_daemon_starts_his_guests_and_takes_nothing_from_others(libvirtd: Host) -> None:
    virsh("start", "--paused", "g")
    claims = libvirtd.claims()
    metadata = f"<metadata>{intent_xml('up0', 'vepa', 'macvlan')}</metadata>"
    cases = {
        "plain": (write_guest("plain", "<interface type='user'/>"), ""),
        "taken": (write_guest("taken", direct("52:54:00:00:00:0a")), 'is held by guest "g"'),
        "late": (write_guest("late", late_xml("user-tap", MAC), metadata), "are root's to give"),
    }
    for name, (path, refusal) in cases.items():
        made = run_as_user("create", "--paused", path)
        assert (made.returncode == 0) == (not refusal), (name, made.stderr)
        assert refusal in made.stderr
        assert ("vnet-lock: " in made.stderr) == bool(refusal)
    assert run_as_user("destroy", "plain").returncode == 0
    assert libvirtd.claims() == claims
