"""Putting our files among libvirt's hooks, taking them away, and telling what is there."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vnet_lock.errors import BadInput, VnetLockError
from vnet_lock.front.hooks_install import DRIVERS, HookState, install, read_status, remove
from vnet_lock.settings import Settings

TOP = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.under(tmp_path)


def hook(settings: Settings, driver: str = "qemu") -> Path:
    return Path(settings.etc_libvirt, "hooks", f"{driver}.d", "50-vnet-lock")


def states(settings: Settings) -> list[HookState]:
    return [file.state for file in read_status(settings)]


def everything_below(settings: Settings) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(settings.etc_libvirt).rglob("*") if path.is_file()}


def test_installed_hooks_are_real_executable_files_and_nothing_else_is_left(settings: Settings) -> None:
    assert states(settings) == [HookState.ABSENT] * len(DRIVERS)
    install(settings)
    assert states(settings) == [HookState.INSTALLED] * len(DRIVERS)
    assert sorted(everything_below(settings)) == sorted(str(hook(settings, driver)) for driver in DRIVERS)
    for driver in DRIVERS:
        path = hook(settings, driver)
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o7777 == 0o755
        assert path.parent.stat().st_mode & 0o7777 == 0o755


def test_a_tight_umask_keeps_nobody_from_running_the_hooks(settings: Settings) -> None:
    before = os.umask(0o077)
    try:
        install(settings)
    finally:
        os.umask(before)
    assert hook(settings).stat().st_mode & 0o7777 == 0o755
    assert hook(settings).parent.parent.stat().st_mode & 0o7777 == 0o755


def test_only_the_first_install_asks_for_a_reload_of_the_daemon(settings: Settings) -> None:
    assert any("SIGHUP" in line for line in install(settings))
    assert not any("SIGHUP" in line for line in install(settings))


def test_an_older_version_of_ours_is_replaced(settings: Settings) -> None:
    install(settings)
    path = hook(settings)
    path.write_text(path.read_text() + "# an older one\n")
    os.utime(path, (1000, 1000))
    assert states(settings) == [HookState.OUTDATED, HookState.INSTALLED, HookState.INSTALLED]
    install(settings)
    assert states(settings) == [HookState.INSTALLED] * len(DRIVERS)
    assert path.stat().st_mtime == 1000, "when libvirt could first find it"


def test_a_hook_that_cannot_be_executed_is_not_installed(settings: Settings) -> None:
    install(settings)
    hook(settings).chmod(0o644)
    assert states(settings)[0] is HookState.OUTDATED
    install(settings)
    assert states(settings)[0] is HookState.INSTALLED


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("kind", ["script", "link", "dangling link", "directory"])
def test_what_is_not_ours_is_never_replaced_or_removed(settings: Settings, driver: str, kind: str) -> None:
    path = hook(settings, driver)
    path.parent.mkdir(parents=True)
    other = path.parent / "other"
    other.write_text("#!/bin/sh\n")
    match kind:
        case "script":
            path.write_text("#!/bin/sh\nexit 0\n")
        case "link":
            path.symlink_to(TOP / "hooks/qemu")
        case "dangling link":
            path.symlink_to("nowhere")
        case "directory":
            path.mkdir()
    before = everything_below(settings)
    assert HookState.FOREIGN in states(settings)
    with pytest.raises(BadInput, match="is not ours"):
        install(settings)
    assert everything_below(settings) == before
    assert any("not ours" in line for line in remove(settings))
    assert everything_below(settings) == before


def test_remove_takes_ours_away_and_again_is_no_error(settings: Settings) -> None:
    install(settings)
    neighbour = hook(settings).parent / "10-other"
    neighbour.write_text("#!/bin/sh\n")
    remove(settings)
    assert states(settings) == [HookState.ABSENT] * len(DRIVERS)
    assert everything_below(settings) == {str(neighbour): b"#!/bin/sh\n"}
    assert all("is not there" in line for line in remove(settings))


def test_a_directory_that_cannot_be_made_is_one_clear_line(settings: Settings) -> None:
    Path(settings.etc_libvirt).parent.mkdir(parents=True)
    Path(settings.etc_libvirt).write_text("")
    with pytest.raises(VnetLockError) as caught:
        install(settings)
    assert "cannot write" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_installed_hook_loads_our_package_with_nothing_in_its_environment(settings: Settings) -> None:
    install(settings)
    done = subprocess.run(
        [hook(settings), "g", "prepare", "begin", "-"],
        input=b"<domain><name>g</name><devices><hostdev mode='subsystem' type='usb'/></devices></domain>",
        capture_output=True,
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_apparmor_is_mentioned_where_it_is_on_and_the_interpreter_is_elsewhere(settings: Settings) -> None:
    enabled = Path(settings.sys, "module/apparmor/parameters/enabled")
    enabled.parent.mkdir(parents=True)
    enabled.write_text("Y\n")
    is_elsewhere = not os.path.realpath(sys.executable).startswith("/usr/bin/")
    assert any("AppArmor" in line for line in install(settings)) == is_elsewhere
    enabled.write_text("N\n")
    assert not any("AppArmor" in line for line in install(settings))


def test_set_up_puts_each_shim_where_it_is_looked_for() -> None:
    config = configparser.ConfigParser()
    config.read(TOP / "setup.cfg")
    listed = config["options.data_files"]["share/vnet-lock/hooks"].split()
    assert listed == [f"hooks/{driver}" for driver in DRIVERS]
    assert all(os.access(TOP / name, os.X_OK) for name in listed)


def test_the_shims_are_found_when_the_package_is_not_run_from_its_sources(tmp_path: Path) -> None:
    site = tmp_path / "lib/site-packages"
    shutil.copytree(TOP / "vnet_lock", site / "vnet_lock", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TOP / "hooks", tmp_path / "share/vnet-lock/hooks")
    # What pip writes for data files of a wheel: paths relative to the site's directory.
    info = site / "vnet_lock-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vnet-lock\nVersion: 0.1.0\n")
    (info / "RECORD").write_text(
        "vnet_lock/__init__.py,,\n"
        + "".join(f"../../share/vnet-lock/hooks/{driver},,\n" for driver in DRIVERS)
    )
    # Somebody else's directory of that name beside the package is not taken for ours.
    (site / "hooks").mkdir()
    (site / "hooks/qemu").write_text("#!/bin/sh\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from vnet_lock.front.hooks_install import install\n"
        "from vnet_lock.settings import Settings\n"
        "install(Settings.under(sys.argv[2]))\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code, site, tmp_path], check=True, cwd="/")
    text = hook(Settings.under(tmp_path)).read_text()
    assert f"path={site}" in text
    assert f"root={tmp_path}\n" in text
