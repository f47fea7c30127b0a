"""libvirt's daemons in the lab VM: begun, ended, killed in the middle of something, or split by driver."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.lab.machines import VNET_LOCK
from tests.lab.nic import run, wait_until

RUN = Path("/run/libvirt")
HOOKS = Path("/etc/libvirt/hooks/qemu.d")
# Once in a boot, unless nothing says that it was done.
AUTOSTARTED = RUN / "qemu/autostarted"


@dataclass(frozen=True, slots=True)
class Daemon:
    """A libvirtd: the usual one, of another installation, or with other drivers."""

    pid_file: Path = Path("/run/libvirtd.pid")
    program: str = "libvirtd"
    words: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    uri: str = "qemu:///system"

    @property
    def pid(self) -> int:
        """Its pid; FileNotFoundError where it never ran."""
        return int(self.pid_file.read_text())

    @property
    def is_alive(self) -> bool:
        return self.pid_file.exists() and Path(f"/proc/{self.pid}").exists()

    def begin(self) -> None:
        """Start it and wait until it answers."""
        words = [f"{name}={value}" for name, value in self.environment.items()]
        run("env", *words, self.program, "-d", "-p", str(self.pid_file), *self.words, deadline_s=120)
        wait_until(self._answers, f"{self.pid_file.stem} answers", 180)

    def _answers(self) -> bool:
        argv = ["virsh", "-q", "-c", self.uri, "uri"]
        return not subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode

    def end(self, sign: signal.Signals = signal.SIGTERM) -> None:
        """End it, and no guest."""
        pid = self.pid
        os.kill(pid, sign)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "libvirt's daemon is gone")


LIBVIRTD = Daemon()


def cannot_read_status(guest: str) -> bool:
    """Whether the daemon can't read the status file of a guest: 9.0 can't where it was killed in `stopped`.

    Then it gives back nothing of what the guest had, and leaves the file there until the guest's next start.
    """
    log = Path("/var/log/libvirt/libvirtd.log").read_text()
    return f"Failed to load config for domain '{guest}'" in log


def newer() -> Daemon | None:
    """The libvirtd that this machine has, where the lab runs an older one."""
    usr = os.environ.get("VNET_LAB_NEWER")
    if not usr:
        return None
    drivers = next(Path(usr).glob("lib/*/libvirt"))
    # Of libraries those of libvirt alone: its hooks get this, too, and their Python is another one.
    libraries = Path("/run/newer")
    libraries.mkdir(exist_ok=True)
    for path in drivers.parent.glob("libvirt*.so.*"):
        (libraries / path.name).unlink(missing_ok=True)
        (libraries / path.name).symlink_to(path)
    environment = {
        "LD_LIBRARY_PATH": str(libraries),
        "LIBVIRT_DRIVER_DIR": str(drivers / "connection-driver"),
        "LIBVIRT_STORAGE_BACKEND_DIR": str(drivers / "storage-backend"),
    }
    return Daemon(program=f"{usr}/sbin/libvirtd", environment=environment)


@contextmanager
def hooks_served(*argv: str) -> Iterator[int]:
    """The server of our hooks, started by another command line where there is one; its pid."""
    argv = argv or (VNET_LOCK, "hooks", "serve")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready for libvirt's calls\n"
            yield server.pid
        finally:
            server.terminate()


def hook_with(shim: str, python: str, path: str) -> str:
    """A hook file's text, with another interpreter and modules that are elsewhere."""
    for name, value in (("python", python), ("path", path)):
        shim, count = re.subn(f"(?m)^{name}=.*", f"{name}={value}", shim, count=1)
        assert count == 1, f"the hook has no line {name}="
    return shim


@contextmanager
def followed_by(following: Daemon, sign: signal.Signals) -> Iterator[None]:
    """The daemon ends by a signal and another comes after it, until the usual one is back."""
    LIBVIRTD.end(sign)
    following.begin()
    try:
        yield
    finally:
        if following is not LIBVIRTD:
            following.end()
            LIBVIRTD.begin()


@contextmanager
def killed_at(guest: str, operation: str, *, before_ours: bool = False) -> Iterator[None]:
    """The daemon is killed while it calls the hooks of an operation: after ours, or before it comes to it."""
    path = HOOKS / ("10-kill" if before_ours else "90-kill")
    path.write_text(f'#!/bin/sh\ncat >/dev/null\n[ "$1 $2" != "{guest} {operation}" ] || kill -KILL $PPID\n')
    path.chmod(0o755)
    try:
        yield
    finally:
        path.unlink()


# Where the network driver is: outside of this process.
_ELSEWHERE = """
#include <libvirt/libvirt.h>
virConnectPtr virGetConnectNetwork(void);
virConnectPtr virGetConnectNetwork(void)
{
    return virConnectOpen("network+ext://localhost/system?command=%s");
}
"""


_PARTS = ("virtqemud", "virtnetworkd")


@contextmanager
def split() -> Iterator[tuple[Daemon, Daemon]]:
    """One daemon for QEMU and one for networks, in the place of libvirtd.

    Libvirt's own virtqemud and virtnetworkd where this machine has them, which Debian doesn't build. To reach
    networks, virsh has to be told ``-c network:///system``.
    """
    with TemporaryDirectory() as name:
        qemu, network = _real_parts() if shutil.which(_PARTS[0]) else _stand_ins(Path(name))
        LIBVIRTD.end()
        try:
            network.begin()
            qemu.begin()
            yield qemu, network
        finally:
            for part in (qemu, network):
                if part.is_alive:
                    part.end()
            # Not virtlogd's, beside them.
            for part_name in _PARTS:
                (RUN / f"{part_name}-sock").unlink(missing_ok=True)
            LIBVIRTD.begin()


def _real_parts() -> tuple[Daemon, Daemon]:
    qemu, network = (Path(f"/run/{name}.pid") for name in _PARTS)
    return Daemon(qemu, _PARTS[0]), Daemon(network, _PARTS[1], uri="network:///system")


def _stand_ins(folder: Path) -> tuple[Daemon, Daemon]:
    """Two libvirtds, each with some drivers, that listen elsewhere: which is what the real ones are.

    Yet a libvirtd looks for the network driver in its own process alone: a function of libvirt's is replaced.
    """
    drivers = next(Path("/usr/lib").glob("*/libvirt/connection-driver"))
    qemu = _part(folder, _PARTS[0], "qemu:///system", drivers.glob("*_qemu.so"))
    others = (path for path in drivers.iterdir() if not path.name.endswith("_qemu.so"))
    network = _part(folder, _PARTS[1], "network:///system", others)
    return replace(qemu, environment={**qemu.environment, "LD_PRELOAD": _elsewhere(folder)}), network


def _elsewhere(folder: Path) -> str:
    """The library with that function."""
    command, source, library = folder / "reach", folder / "elsewhere.c", folder / "elsewhere.so"
    command.write_text("#!/bin/sh\nexec virt-ssh-helper network:///system\n")
    command.chmod(0o755)
    source.write_text(_ELSEWHERE % command)
    run("gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-lvirt")
    return str(library)


def _part(folder: Path, name: str, uri: str, drivers: Iterable[Path]) -> Daemon:
    """A libvirtd with these drivers alone, at the socket of the daemon whose part it plays."""
    (folder / name).mkdir()
    for path in drivers:
        (folder / name / path.name).symlink_to(path)
    # Sockets have names of 107 bytes at most.
    sockets = RUN / name
    sockets.mkdir(exist_ok=True)
    (RUN / f"{name}-sock").symlink_to(sockets / "libvirt-sock")
    configuration = folder / f"{name}.conf"
    usual = Path("/etc/libvirt/libvirtd.conf").read_text().replace("libvirtd.log", f"{name}.log")
    configuration.write_text(f'{usual}unix_sock_dir = "{sockets}"\n')
    return Daemon(
        Path(f"/run/{name}.pid"),
        words=("-f", str(configuration)),
        environment={"LIBVIRT_DRIVER_DIR": str(folder / name)},
        uri=uri,
    )
