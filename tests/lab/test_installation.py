"""An installation as its administrator meets it: pools, VFs left to the host, the doctor, AppArmor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.host import children_of
from tests.lab.contenders import hostdev_xml, late_xml, owner_of, status, vnet_lock
from tests.lab.daemons import hooks_served
from tests.lab.machines import Guests, virsh
from tests.lab.nic import Nic, run, wait_until

pytestmark = pytest.mark.long

CONFIG = Path("/etc/vnet-lock/config.toml")
HOOK = Path("/etc/libvirt/hooks/qemu.d/50-vnet-lock")
DAEMON = Path("/run/libvirtd.pid")
PROFILE = Path("/etc/apparmor.d/usr.sbin.libvirtd")
MAC = "52:54:00:00:09:0{}"


def daemon() -> int:
    return int(DAEMON.read_text())


def restart_libvirtd() -> None:
    pid = daemon()
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "libvirtd is gone")
    run("libvirtd", "-d", deadline_s=120)
    wait_until(lambda: virsh("list", check=False).returncode == 0, "libvirtd answers", 180)


def doctor() -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """Its exit status, and health and message of each check by kind."""
    done = vnet_lock("doctor", "--json")
    found: dict[str, list[tuple[str, str]]] = {}
    for one in json.loads(done.stdout)["checks"]:
        found.setdefault(one["check"], []).append((one["health"], one["message"]))
    return done.returncode, found


def intent(words: str) -> str:
    return (
        "<vnet:guest xmlns:vnet='urn:vnet-lock:guest:1'>"
        f"<vnet:interface alias='ua-net0' policy='veb' {words}/></vnet:guest>"
    )


@pytest.fixture
def config() -> Iterator[Path]:
    CONFIG.parent.mkdir(exist_ok=True)
    yield CONFIG
    shutil.rmtree(CONFIG.parent)


def test_the_doctor_finds_hooks_missing_then_unknown_to_the_daemon_then_well(lab: Nic) -> None:
    lab.set_numvfs(2)
    code, found = doctor()
    assert code == 3
    assert "vnet-lock hooks install" in found["hooks"][0][1]
    try:
        run("vnet-lock", "hooks", "install")
        code, found = doctor()
        assert code == 3
        assert found["hooks"] == [("ok", "the hooks are in place, and run")]
        ((health, message),) = found["daemon"]
        assert health == "error"
        assert message.startswith(f"libvirtd (pid {daemon()}) hasn't looked for hooks since that for qemu")
        os.kill(daemon(), signal.SIGHUP)
        wait_until(lambda: doctor()[1]["daemon"][0][0] == "ok", "libvirtd has looked for hooks")
        code, found = doctor()
        assert code == 0
        assert {health for checks in found.values() for health, _ in checks} <= {"ok", "warning"}
        assert found["kernel"][0][0] == "ok", found["kernel"]
        assert ("ok", f"{lab.pf} has 2 of 7 VFs") in found["vfs"]
    finally:
        run("vnet-lock", "hooks", "remove")


@pytest.mark.usefixtures("hook")
def test_guests_get_vfs_of_their_pool_and_none_that_is_left_to_the_host(
    lab: Nic, guests: Guests, config: Path
) -> None:
    vfs = lab.set_numvfs(4)
    config.write_text(
        f"[pools.fabric-a]\npf = ['{lab.pf}']\nvfs = '0,2-3'\n"
        f"[host.vfs]\n'{lab.pci}' = '0'\n"
        "[defaults.veb]\npool = 'fabric-a'\n"
        "[timeouts]\nhook = 90\n"
    )
    assert status()[vfs[0].pci]["state"] == "host"
    planned = vnet_lock("plan", "--mode", "veb", "--pool", "fabric-a", "--protocols", "tap").stdout
    assert f"VF {vfs[0].pci} is left to the host" in planned
    guests.libvirt("pooled", late_xml("pooled-tap", MAC.format(1)), metadata=intent("pool='fabric-a'"))
    assert owner_of(vfs[2]) == "pooled"
    guests.libvirt("usual", late_xml("usual-tap", MAC.format(2)), metadata=intent(""))
    assert owner_of(vfs[3]) == "usual"
    full = guests.libvirt(
        "full", late_xml("full-tap", MAC.format(3)), metadata=intent("pool='fabric-a'"), start=False
    )
    refused = full.start(check=False)
    assert refused.returncode != 0
    assert "nothing free for veb in pool fabric-a" in refused.stderr
    fixed = guests.libvirt("fixed", hostdev_xml(vfs[0], MAC.format(4)), start=False)
    refused = fixed.start(check=False)
    assert refused.returncode != 0
    assert f"VF {vfs[0].pci} is left to the host by its configuration" in refused.stderr
    assert vfs[0].driver == "igbvf"
    network = "host,id=net0,mode=veb,pool=fabric-a,protocols=tap"
    plain = guests.qemu("plain", ["-netdev", network, "-device", "virtio-net-pci,netdev=net0"],
                        program=["vnet-qemu"])  # fmt: skip
    assert plain.wait() == 4
    assert owner_of(vfs[1]) is None


@pytest.mark.usefixtures("hook")
def test_a_broken_configuration_refuses_guests_with_its_line_and_lets_the_others_end(
    lab: Nic, guests: Guests, config: Path
) -> None:
    lab.set_numvfs(2)
    made = guests.libvirt(
        "made", late_xml("made-tap", MAC.format(1)),
        metadata=intent(f"port='sriov' dev='{lab.pf}'"),
    )  # fmt: skip
    config.write_text("\n[polls.a]\n")
    other = guests.libvirt(
        "other", late_xml("other-tap", MAC.format(2)), start=False,
        metadata=intent(f"port='sriov' dev='{lab.pf}'"),
    )  # fmt: skip
    refused = other.start(check=False)
    assert refused.returncode != 0
    assert f"{config}:2: unknown key 'polls'" in refused.stderr
    code, found = doctor()
    assert code == 3
    assert found["configuration"][0][0] == "error"
    made.destroy()
    assert not os.listdir("/run/vnet-lock/claims")
    assert not Path("/sys/class/net/made-tap").exists()


@contextmanager
def confined() -> Iterator[None]:
    """libvirtd under the distribution's own AppArmor profile, enforcing."""
    run("apparmor_parser", "--replace", "--skip-cache", str(PROFILE))
    restart_libvirtd()
    try:
        yield
    finally:
        run("apparmor_parser", "--remove", str(PROFILE))
        restart_libvirtd()


def use_python(program: str) -> None:
    """Let the hook run another interpreter; libvirt knows of it since when it did before."""
    before = HOOK.stat().st_mtime_ns
    lines = HOOK.read_text().splitlines(keepends=True)
    HOOK.write_text(
        "".join(f"python='{program}'\n" if line.startswith("python=") else line for line in lines)
    )
    os.utime(HOOK, ns=(before, before))


@pytest.mark.usefixtures("hook")
def test_under_apparmor_the_hook_works_with_the_distributions_python_and_no_other(
    lab: Nic, guests: Guests, tmp_path: Path
) -> None:
    usual = Path("/usr/bin/python3").resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert usual.name == version, f"the venv's libraries are {version}'s"
    vf = lab.set_numvfs(1)[0]
    made = guests.libvirt(
        "confined", late_xml("confined-tap", MAC.format(1)), start=False,
        metadata=intent(f"port='sriov' dev='{lab.pf}'"),
    )  # fmt: skip
    other = tmp_path / "python3"
    shutil.copy(usual, other)
    with confined():
        assert Path(f"/proc/{daemon()}/attr/current").read_text() == "libvirtd (enforce)\n"
        use_python(str(other))
        refused = made.start(check=False)
        assert refused.returncode != 0
        assert "ended with status 126; see: vnet-lock doctor" in refused.stderr
        assert owner_of(vf) is None
        use_python(str(usual))
        made.start()
        assert owner_of(vf) == "confined"
        assert lab.uppers(str(vf.netdev)) == ["confined-tap"]
        made.destroy()
        assert owner_of(vf) is None
        assert not os.listdir("/run/vnet-lock/claims")
        with hooks_served() as server:
            ready = children_of(server)
            made.start()
            assert owner_of(vf) == "confined"
            made.destroy()
            # It was asked, at the start and twice at the end.
            assert not set(children_of(server)) & set(ready)
        assert not os.listdir("/run/vnet-lock/claims")
        # The doctor judges the Python that it would install.
        code, found = check_with(usual)
        assert found["confinement"] == [
            (
                "ok",
                f"AppArmor confines libvirtd (pid {daemon()}) as libvirtd (enforce), which may run the hooks",
            )
        ]
        assert found["hooks"][0][0] == "ok"
        assert code == 0, found
        code, found = check_with(other)
        assert code == 3
        assert f"AppArmor may keep libvirt from running {other}" in found["confinement"][0][1]


def check_with(python: Path) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """The doctor of an installation with this interpreter."""
    code = (
        "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from vnet_lock.front.cli import main;"
        "sys.exit(main(sys.argv[1:]))"
    )
    path = ":".join(entry for entry in sys.path if entry)
    for verb in ("hooks install", "doctor --json"):
        done = subprocess.run(
            [python, "-S", "-c", code, path, *verb.split()], capture_output=True, text=True, check=False
        )
    found: dict[str, list[tuple[str, str]]] = {}
    for one in json.loads(done.stdout)["checks"]:
        found.setdefault(one["check"], []).append((one["health"], one["message"]))
    return done.returncode, found
