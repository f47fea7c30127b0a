"""Guests of a test, by libvirt or by plain QEMU, and the consoles that they report on.

A guest is ended by the pid or UUID that was made for it, never by a name that another could have.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab import guest
from tests.lab.nic import wait_until

# A nested guest boots in 12 s on a quiet machine; a busy one takes many times that.
READY_S = 400
VIRSH_S = 180
VNET_LOCK = str(Path(sys.executable).with_name("vnet-lock"))


def virsh(*words: str, check: bool = True, deadline_s: float = VIRSH_S) -> subprocess.CompletedProcess[str]:
    """A virsh command on the system daemon; with ``check`` it has to succeed."""
    argv = ["virsh", "-q", "-c", "qemu:///system", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=deadline_s, check=False)
    assert not check or done.returncode == 0, f"virsh {' '.join(words)}: {done.stderr.strip()}"
    return done


@dataclass(slots=True)
class Console:
    """A guest's serial port: its log, and the socket beside it that takes orders."""

    log: Path
    is_alive: Callable[[], bool] = lambda: True
    # Starts the guest anew where its kernel died before its first word, which an emulated CPU makes happen
    # now and then; used once.
    again: Callable[[], object] | None = None
    # What the program that runs the guest says.
    output: Path | None = None
    _orders: int = 0

    @property
    def text(self) -> str:
        """All that was said so far."""
        return self.log.read_text(errors="replace").replace("\r", "") if self.log.exists() else ""

    @property
    def _program_said(self) -> str:
        if not self.output or not self.output.exists():
            return ""
        return "\nand its program:\n" + self.output.read_text(errors="replace")[-2000:]

    def wait_for(self, words: str, deadline_s: float = READY_S) -> dict[str, str]:
        """The ``key=value`` words of the first line with these words.

        AssertionError, with the end of the log, when the guest ends before or takes too long.
        """
        end = time.monotonic() + deadline_s
        while True:
            alive = self.is_alive()
            for line in self.text.splitlines(keepends=True):
                if words in line and line.endswith("\n"):
                    return dict(word.partition("=")[::2] for word in line.split() if "=" in word)
            if not alive and not self.text.strip() and self.again:
                again, self.again = self.again, None
                print(f"{self.log.stem} ended without a word: once more{self._program_said}")
                again()
                continue
            heard = "; it said last:\n" + "\n".join(self.text.splitlines()[-20:]) + self._program_said
            assert alive, f"{self.log.stem} ended before it said {words!r}{heard}"
            assert time.monotonic() < end, f"{self.log.stem} didn't say {words!r} in {deadline_s} s{heard}"
            time.sleep(0.2)

    def ready(self, deadline_s: float = READY_S) -> dict[str, str]:
        """What the guest saw when it had booted: nics, mac, driver, link, ping."""
        return self.wait_for("VNET-GUEST ready", deadline_s)

    def ask(self, order: str, deadline_s: float = 60) -> dict[str, str]:
        """Have the guest do ``ping ADDRESS``, ``run COMMAND`` or ``poweroff`` and return its answer."""
        self._orders += 1
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(deadline_s)
            line.connect(str(self.log.with_suffix(".sock")))
            line.sendall(f"{self._orders} {order}\n".encode())
            return self.wait_for(f"VNET-GUEST answer id={self._orders}", deadline_s)


@dataclass(slots=True)
class LibvirtGuest:
    """A guest that is defined in libvirt."""

    name: str
    uuid: str
    console: Console

    @property
    def state(self) -> str:
        """As ``virsh domstate`` names it; empty when it isn't defined."""
        return virsh("domstate", self.uuid, check=False).stdout.strip()

    @property
    def pid(self) -> int:
        """The pid of its QEMU."""
        return int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text())

    def start(self, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Start it; with ``check=False`` the caller judges."""
        return virsh("start", self.uuid, check=check)

    def destroy(self, *, check: bool = True) -> None:
        """End it at once."""
        virsh("destroy", self.uuid, check=check)

    def dump_xml(self) -> str:
        """Its XML as libvirt has it now."""
        return virsh("dumpxml", self.uuid).stdout


@dataclass(slots=True)
class PlainGuest:
    """A QEMU, or a program that starts one, that is our child and leads a session of its own."""

    name: str
    process: subprocess.Popen[bytes]
    console: Console

    @property
    def pid(self) -> int:
        """The pid of the program that was started, QEMU or its wrapper."""
        return self.process.pid

    @property
    def said(self) -> str:
        """What the program wrote to stdout and stderr."""
        return self.console.output.read_text(errors="replace") if self.console.output else ""

    def wait(self, deadline_s: float = 60) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        return self.process.wait(deadline_s)

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """Send the program a signal; its own children, if any, are left alone."""
        self.process.send_signal(sign)


@dataclass(slots=True)
class Guests:
    """Makes a test's guests and, at its end, sees that none of them is left."""

    directory: Path
    accel: str = "kvm"
    _libvirt: list[LibvirtGuest] = field(default_factory=list)
    _plain: list[PlainGuest] = field(default_factory=list)
    _daemons: list[int] = field(default_factory=list)

    def libvirt(
        self,
        name: str,
        interfaces: str,
        *,
        start: bool = True,
        metadata: str = "",
        shares_memory: bool = False,
        **words: str | int,
    ) -> LibvirtGuest:
        """Define a guest with these interfaces and start it; ``words`` go to kernel_words."""
        console = Console(self.directory / f"{name}.log", output=Path(f"/var/log/libvirt/qemu/{name}.log"))
        made = LibvirtGuest(name, str(uuid.uuid4()), console)
        console.is_alive = lambda: made.state == "running"
        xml = guest.domain_xml(
            name, interfaces, words=guest.kernel_words(**words), console=console.log, uuid=made.uuid,
            metadata=metadata, shares_memory=shares_memory,
        )  # fmt: skip
        path = self.directory / f"{name}.xml"
        path.write_text(xml)
        virsh("define", str(path))
        self._libvirt.append(made)
        if start:
            made.start()
        console.again = made.start
        return made

    def qemu(
        self,
        name: str,
        devices: list[str],
        *,
        program: Sequence[str] = ("qemu-system-x86_64",),
        pass_fds: Sequence[int] = (),
        **words: str | int,
    ) -> PlainGuest:
        """Start a plain QEMU with these devices.

        ``program`` stands in for QEMU's name (``vnet-qemu`` and options); ``words`` go to kernel_words.
        """
        console = Console(self.directory / f"{name}.log")
        argv = guest.qemu_argv(
            name, devices, words=guest.kernel_words(**words), console=console.log, accel=self.accel
        )
        made = self._start(name, [*program, *argv[1:]], console, pass_fds=pass_fds)

        def again() -> None:
            # A program of ours that fails isn't tried again.
            if made.process.poll() == 0:
                made.process = self._start(name, [*program, *argv[1:]], console).process

        if not pass_fds:
            console.again = again
        console.is_alive = lambda: made.process.poll() is None
        return made

    def program(self, name: str, argv: Sequence[str], console: Path) -> PlainGuest:
        """Start a program that runs a guest whose console is known, in the console's directory."""
        made = self._start(name, argv, Console(console), cwd=console.parent)
        made.console.is_alive = lambda: made.process.poll() is None
        return made

    def _start(self, name: str, argv: Sequence[str], console: Console, **more: Any) -> PlainGuest:
        console.output = self.directory / f"{name}.out"
        with console.output.open("wb") as sink:
            process = subprocess.Popen(
                [*argv],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **more,
            )
        self._plain.append(made := PlainGuest(name, process, console))
        return made

    def daemonized(self, pid: int) -> int:
        """Take care of a QEMU that left its session (``-daemonize``); returns its pid."""
        self._daemons.append(pid)
        return pid

    def end(self) -> None:
        """End and undefine all that was made."""
        for pid in self._daemons:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not _is_alive(pid), f"QEMU {pid} is gone")
        for plain in reversed(self._plain):
            # The session still has the QEMU of a wrapper that was killed.
            for pid in _session(plain.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            plain.process.wait(60)
            wait_until(lambda sid=plain.pid: not _session(sid), f"{plain.name} is gone")
        if self._plain:
            # What was killed with its wrapper left claims: the next test is to find none.
            subprocess.run([VNET_LOCK, "gc"], capture_output=True, timeout=120, check=False)
        for made in reversed(self._libvirt):
            virsh("destroy", made.uuid, check=False)
            virsh("undefine", made.uuid, "--managed-save", "--snapshots-metadata", check=False)


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the state on; FileNotFoundError, ProcessLookupError: it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _is_alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return _stat(pid)[0] != "Z"
    return False


def _session(sid: int) -> list[int]:
    """The live processes of a session."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = _stat(pid)
            if int(fields[3]) == sid and fields[0] != "Z":
                found.append(int(pid))
    return found
