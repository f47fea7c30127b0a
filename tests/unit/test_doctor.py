"""What vnet-lock doctor finds, on hosts made of files; the hooks in them are run as libvirt runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fake_host import START_TICKS, FakeHost, build
from vnet_lock.front import doctor, hooks_install
from vnet_lock.front.cli import main
from vnet_lock.kernel.confinement import read_daemons

DAEMON = 40
MATCHPATHCON = "#!/bin/sh\necho system_u:object_r:bin_t:s0\n"
HZ = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A host where all is well: a PF with two VFs, libvirt's daemon, our hooks, which it has found."""
    host = FakeHost(tmp_path)
    host.vfs = host.add_pf("0000:01:00.0", "enp1", ["igbvf", "igbvf"])
    host.add_process(DAEMON, "libvirtd")
    release = os.uname().release
    tree = {
        "etc/libvirt/": "",
        "proc/stat": f"cpu 0\nbtime {int(time.time()) + 1000}\n",
        "dev/net/tun": "",
        "dev/vhost-net": "",
        f"lib/modules/{release}/modules.dep": "kernel/drivers/net/macvtap.ko.xz: kernel/drivers/net/tap.ko\n",
        f"lib/modules/{release}/modules.builtin": "kernel/drivers/vfio/pci/vfio-pci.ko\n",
    }
    build(tmp_path, tree)
    hooks_install.install(host.settings)
    return host


def hook(host: FakeHost, driver: str = "qemu") -> Path:
    return Path(host.settings.etc_libvirt, f"hooks/{driver}.d/50-vnet-lock")


def started(host: FakeHost, epoch_s: float) -> None:
    """Let the daemon have been started then."""
    (host.root / "proc/stat").write_text(f"btime {int(epoch_s) - START_TICKS // HZ - 1}\n")


def found(host: FakeHost, kind: str = "") -> list[tuple[str, str]]:
    """What isn't ok, or all of one kind."""
    checks = [one for one in doctor.examine(host.settings) if one.kind != "root"]
    assert all("\n" not in one.message for one in checks)
    if kind:
        return [(one.health.value, one.message) for one in checks if one.kind == kind]
    return [(one.health.value, one.kind) for one in checks if one.health is not doctor.Health.OK]


def test_a_host_where_all_is_well_has_nothing_but_ok(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found(host) == []
    before = sorted(str(path) for path in host.root.rglob("*"))
    assert main(["doctor"], host.settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ok: hooks: the hooks are in place, and run" in lines
    assert f"ok: daemon: libvirtd (pid {DAEMON}) knows its hooks" in lines
    assert "ok: vfs: enp1 has 2 of 7 VFs" in lines
    assert sorted(str(path) for path in host.root.rglob("*")) == before


def test_as_json_each_check_has_its_health_and_an_error_gives_3(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks_install.remove(host.settings)
    assert main(["doctor", "--json"], host.settings) == 3
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"version", "checks"}
    assert all(set(one) == {"health", "check", "message"} for one in told["checks"])
    assert {one["health"] for one in told["checks"] if one["check"] == "hooks"} == {"error"}


# --- libvirt --------------------------------------------------------------------------------------


def test_hooks_that_are_not_there_or_not_ours_are_errors(host: FakeHost) -> None:
    hook(host).write_text(hook(host).read_text() + "# older\n")
    hook(host, "network").write_text("#!/bin/sh\n")
    hook(host, "daemon").unlink()
    said = found(host, "hooks")
    assert [health for health, _ in said] == ["warning", "error", "error"]
    hooks_install.remove(host.settings)
    (host.root / "etc/libvirt/hooks/network.d/50-vnet-lock").unlink()
    assert found(host, "daemon") == [], "there is nothing that it could know"
    assert str(hook(host, "daemon")) in said[0][1]
    assert "not of this version" in said[1][1]
    assert "another program or person wrote it" in said[2][1]


@pytest.mark.parametrize(
    ("absent", "health", "words"),
    [
        (("daemon",), "warning", "so nobody sees whether libvirt's daemon looked for hooks"),
        (("network", "daemon"), "error", "libvirt asks nobody about networks: there is no"),
        (("qemu", "network"), "error", "libvirt asks nobody about guests and networks: there is no"),
    ],
)
def test_of_hooks_that_are_not_there_is_said_what_is_not_asked(
    host: FakeHost, absent: tuple[str, ...], health: str, words: str
) -> None:
    for driver in absent:
        hook(host, driver).unlink()
    ((said_health, message),) = found(host, "hooks")
    assert (said_health, words in message) == (health, True), message
    assert all(str(hook(host, driver)) in message for driver in absent)
    assert message.endswith("; do: vnet-lock hooks install")


def test_without_libvirt_nobody_misses_its_hooks(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    assert found(host, "hooks") == [("ok", "libvirt isn't installed here")]
    assert found(host, "daemon") == []


def test_a_hook_that_cannot_run_is_an_error_with_its_own_words(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter that the hooks were installed with is gone since then.
    monkeypatch.setattr(sys, "executable", str(host.root / "gone"))
    hooks_install.install(host.settings)
    ((health, message),) = found(host, "hooks")
    assert health == "error"
    assert "gone can't be run; do: vnet-lock hooks install" in message


def test_a_daemon_older_than_its_hook_is_an_error_until_it_has_looked(host: FakeHost) -> None:
    started(host, time.time() - 3600)
    ((health, message),) = found(host, "daemon")
    assert health == "error"
    assert message.startswith(
        f"libvirtd (pid {DAEMON}) hasn't looked for hooks since that for qemu and network"
    )
    assert message.endswith("systemctl reload libvirtd")
    Path(host.settings.looked_path(DAEMON + 1)).touch()
    assert found(host, "daemon")[0][0] == "error", "another process's note"
    note = Path(host.settings.looked_path(DAEMON))
    note.touch()
    os.utime(note, (1000, 1000))
    assert found(host, "daemon")[0][0] == "error", "a note from before"
    note.touch()
    assert found(host, "daemon")[0][0] == "ok"


def test_a_newer_version_of_a_hook_that_the_daemon_knows_asks_for_no_reload(host: FakeHost) -> None:
    for driver in hooks_install.DRIVERS:
        os.utime(hook(host, driver), (1000, 1000))
    started(host, 2000)
    assert found(host, "daemon")[0][0] == "ok"
    hook(host).write_text(hook(host).read_text() + "# older\n")
    os.utime(hook(host), (1000, 1000))
    hooks_install.install(host.settings)
    assert found(host) == []


def test_a_daemon_that_found_anothers_hook_in_the_folder_runs_ours_too(host: FakeHost) -> None:
    other = hook(host).parent / "10-other"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    started(host, time.time() + 1000)
    os.utime(hook(host), (time.time() + 3600,) * 2)
    assert found(host, "daemon")[0][0] == "ok"
    other.chmod(0o644)
    assert "since that for qemu was put there" in found(host, "daemon")[0][1]


def test_a_split_daemon_needs_its_own_hook_only_and_a_users_daemon_is_left_out(host: FakeHost) -> None:
    host.remove_process(DAEMON)
    assert found(host, "daemon") == [("ok", "no libvirt daemon runs now")]
    host.process(41, "virtnetworkd")
    host.process(42, "virtlogd")
    started(host, time.time() - 3600)
    ((_, message),) = found(host, "daemon")
    assert "virtnetworkd (pid 41) hasn't looked for hooks since that for network was" in message
    if os.geteuid() == 0:
        os.chown(host.root / "proc/41", 1000, 1000)
        assert read_daemons(host.settings) == ()


@pytest.mark.parametrize("operation", ["start", "reload"])
def test_the_daemons_own_hook_notes_that_it_has_looked(host: FakeHost, operation: str) -> None:
    for pid in (DAEMON, DAEMON + 1):
        Path(host.settings.looked_path(pid)).touch()
    run_daemon_hook(host, operation)
    notes = sorted(path.name for path in Path(host.settings.run).glob("*.hooks"))
    assert notes == sorted([f"{DAEMON}.hooks", f"{os.getpid()}.hooks"]), "and none of who is gone"
    (daemon,) = [one for one in read_daemons(host.settings) if one.pid == os.getpid()]
    assert daemon.looked > time.time_ns() - 60 * 10**9
    assert daemon.started < daemon.looked or daemon.started > time.time_ns()


@pytest.mark.parametrize("operation", ["shutdown", ""])
def test_the_daemons_own_hook_notes_nothing_else(host: FakeHost, operation: str) -> None:
    run_daemon_hook(host, operation)
    assert not [*Path(host.settings.run).glob("*.hooks")]


def test_the_daemons_own_hook_is_silent_where_it_may_not_write(host: FakeHost) -> None:
    Path(host.settings.claims_dir).rmdir()
    Path(host.settings.run).rmdir()
    Path(host.settings.run).write_text("")
    run_daemon_hook(host, "start")
    assert Path(host.settings.run).read_text() == ""


def run_daemon_hook(host: FakeHost, operation: str) -> None:
    """As libvirt does, with this test in the place of the daemon."""
    host.process(os.getpid(), "libvirtd")
    done = subprocess.run(
        [hook(host, "daemon"), "-", operation, "begin", "SIGHUP"], capture_output=True, check=False, env={}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# --- confinement ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "interpreter", "health", "words"),
    [
        ("libvirtd (enforce)", "/opt/python/bin/python3", "error", "confines libvirtd (pid 40) as libvirtd"),
        ("libvirtd (enforce)", "/usr/bin/python3", "ok", "may run the hooks"),
        ("libvirtd (complain)", "/opt/python/bin/python3", "warning", "/opt/python/bin/python3"),
        ("unconfined", "/usr/bin/python3", "ok", "confines no libvirt daemon"),
    ],
)
def test_apparmor_lets_hooks_run_programs_of_the_distribution_only(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, label: str, interpreter: str, health: str, words: str
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter)
    hooks_install.install(host.settings)
    attributes = {
        "sys/module/apparmor/parameters/enabled": "Y\n",
        f"proc/{DAEMON}/attr/apparmor/current": label + "\n",
    }
    build(host.root, attributes)
    ((said_health, message),) = found(host, "confinement")
    assert said_health == health
    assert words in message


@pytest.mark.as_root
def test_a_hook_with_another_selinux_type_than_the_policy_has_is_an_error(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(host.root, {"sys/fs/selinux/enforce": "1", "bin/matchpathcon": MATCHPATHCON})
    if shutil.which("matchpathcon") is None:
        assert found(host, "confinement")[0][0] == "ok", "nobody can tell"
    (host.root / "bin/matchpathcon").chmod(0o755)
    monkeypatch.setenv("PATH", f"{host.root}/bin:{os.environ['PATH']}")
    os.setxattr(hook(host), "security.selinux", b"system_u:object_r:user_tmp_t:s0\0")
    told = dict(reversed(one) for one in found(host, "confinement"))
    path = hook(host)
    message = f"{path} has the SELinux type user_tmp_t, and is to have bin_t; do: restorecon {path}"
    assert told[message] == "error"
    for driver in hooks_install.DRIVERS:
        os.setxattr(hook(host, driver), "security.selinux", b"system_u:object_r:bin_t:s0\0")
    assert [health for health, _ in found(host, "confinement")] == ["ok"]
    (host.root / "sys/fs/selinux/enforce").write_text("0")
    assert found(host, "confinement") == []


# --- all else -------------------------------------------------------------------------------------


def test_a_configuration_is_checked_against_the_devices_that_are_here(host: FakeHost) -> None:
    path = Path(host.settings.config_path)
    build(
        host.root,
        {
            "etc/vnet-lock/config.toml": "[pools.a]\npf=['enp1', 'enp9']\nvfs='0-1,5,9'\n"
            "[pools.b]\npf=['enp1']\nvfs='1'\n[host.vfs]\nenp1='1-2'\nenp8='0'\n"
        },
    )
    path.chmod(0o644)
    said = found(host, "configuration")
    assert {health for health, _ in said} == {"warning"}
    assert [message.removeprefix(f"{path}: ") for _, message in said] == [
        "pool a: enp1 has 2 VFs now, so there is no VF 5,9; it can have 7",
        "pool a: there is no PF enp9 here; see: vnet-lock status",
        "pool b: all of its VFs are left to the host by [host.vfs]",
        "[host.vfs]: enp1 has 2 VFs now, so there is no VF 2; run: vnet-lock vfs enp1 3",
        "[host.vfs]: there is no PF enp8 here; see: vnet-lock status",
    ]
    path.write_text("\n[polls]\n")
    ((health, message),) = found(host, "configuration")
    assert health == "error"
    assert message.startswith(f"{path}:2: unknown key")
    path.write_text("[pools.a]\npf=['enp1']\n")
    assert found(host, "configuration") == [("ok", f"{path}: 1 pool")]


def test_a_claims_directory_that_others_can_write_is_an_error(host: FakeHost) -> None:
    os.chmod(host.settings.claims_dir, 0o777)
    ((health, message),) = found(host, "claims")
    assert health == "error"
    assert "others can write it" in message
    os.chmod(host.settings.claims_dir, 0o755)
    Path(host.settings.claims_dir, f"vf:{host.vfs[0]}~1~{'a' * 16}.json").write_text("{")
    assert found(host, "claims")[0] == ("error", "1 claim record can't be trusted; see: vnet-lock status")


def test_what_the_kernel_lacks_is_a_warning_with_what_to_do(host: FakeHost) -> None:
    (host.root / "dev/net/tun").unlink()
    (host.root / "dev/vhost-net").unlink()
    (host.root / f"lib/modules/{os.uname().release}/modules.dep").write_text("")
    said = found(host, "kernel")
    assert {health for health, _ in said} == {"warning"}
    assert [message.partition(":")[0] for _, message in said] == ["no macvtaps", "no taps", "no vhost"]
    assert "modprobe vhost_net" in said[2][1]
    assert found(FakeHost(host.root / "other"), "kernel")[0][1].startswith("no VFIO: this host has no IOMMU")


def test_a_pf_without_vfs_and_vfs_without_drivers_are_warnings(host: FakeHost) -> None:
    host.add_pf("0000:02:00.0", "enp2", [])
    vfs = host.add_pf("0000:03:00.0", "enp3", [None, "igbvf", None])
    assert len(vfs) == 3
    build(host.root, {"sys/bus/pci/devices/0000:03:00.0/sriov_drivers_autoprobe": "0\n"})
    assert found(host, "vfs")[1:] == [
        ("warning", "enp2 has no VFs; run: vnet-lock vfs enp2 7"),
        ("warning", "enp3: VF 0,2 without a driver (sriov_drivers_autoprobe is 0) fit vfio only"),
    ]
