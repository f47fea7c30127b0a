"""The lab VM, seen from outside: boots it, runs one command in it, tells a failed command from a lost VM.

The VM is this machine's own root file system, read-only below overlays, on the distribution's kernel, with an
emulated SR-IOV NIC (QEMU's igb), and a second one for a second host. One directory is shared writable: the
results. Never changes the machine that it runs on outside ``.lab`` of the checkout.

    python -m tests.lab.vm [--deadline SECONDS] [--results DIR] [--env NAME=VALUE]... [--cpus N] [--older]
        [--resumable] -- COMMAND...
    python -m tests.lab.vm --shell
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab import image, older

TOP = Path(__file__).resolve().parents[2]
LAB = TOP / ".lab"

# Exit codes of a run that has no exit code of its own; env(1) and timeout(1) use them alike.
HUNG = 124
LOST = 125

# Below 2816 MB: with more, the firmware puts the VFs' BARs above 4 GiB, where igb's mailbox is deaf.
MEMORY_MB = 2750
# vng mounts a tmpfs over these.
_HIDDEN = ("/var/tmp", "/var/log", "/run", "/dev/shm")
_TRACED = "trace:runstate_set,trace:qemu_system_*_request"
# No router there gives out addresses: a host's are its tests'.
CABLE = "user,ipv6=off"
# What a boot and the collecting of logs may take beside the command itself.
BOOT_S = 150
# How long a boot may take, try by try; it takes 25 s, and has been seen to stand still for good.
TRIES_S = (180, 360, float("inf"))
DEFAULT_DEADLINE_S = 1800


class LabError(Exception):
    """The lab VM can't be booted here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: its exit code, and why there is none of the command's own."""

    exit_code: int
    results: Path
    complaint: str = ""


@dataclass(slots=True)
class Vm:
    """One boot: the command, its deadline, and the directory where everything that it leaves is found."""

    command: Sequence[str]
    results: Path
    deadline_s: float = DEFAULT_DEADLINE_S
    environment: dict[str, str] = field(default_factory=dict)
    # Two emulated CPUs wait for each other more than they work: beside another VM, on two cores, one boots in
    # 23 s, two boot in 65 s. And now and then one of two loses its timer, and what runs on it stands still.
    cpus: int = 1
    # Its clock counts instructions, 4 ns each: what it measures doesn't depend on how busy the machine is.
    counted: bool = False
    # The command takes up where it was when its VM was lost, see resume.py: it is run in another one.
    resumable: bool = False
    # More of the kernel's command line.
    kernel_words: Sequence[str] = ()
    # What the NICs' switch leads to, as QEMU's -netdev without its id.
    cable: str = ""
    tries_s: Sequence[float] = TRIES_S
    # What older.unpack() returns, to run that libvirt.
    older: Path | None = None
    vng: str = f"{sys.prefix}/bin/vng"

    def argv(self, *, shell: str | None = None) -> list[str]:
        """The vng command line; with ``shell``, a program on the terminal instead of the inside script."""
        _check_words(TOP, self.results)
        if hidden := next(filter(TOP.is_relative_to, _HIDDEN), None):
            raise LabError(f"the lab VM doesn't see what is below {hidden}: have the checkout elsewhere")
        console = [] if shell else [
            f"--qemu-opts=-chardev file,id=log,path={self.results}/console.log -serial chardev:log",
            "--append", "console=ttyS1 earlyprintk=serial,ttyS1,115200 loglevel=5",
        ]  # fmt: skip
        script = shlex.join(self._inside)
        inside = ["--shell", shell] if shell else ["--", script]
        return [
            self.vng,
            "--run", str(image.find_kernel()[1]),
            "--name", "vnet-lab",
            # A /dev/kvm that answers may still not run this kernel; TCG always does.
            "--disable-kvm",
            "--cpus", str(self.cpus),
            "--memory", f"{MEMORY_MB}M",
            "--user", "root",
            "--cwd", str(TOP),
            "--overlay-rwdir", "/etc",
            "--overlay-rwdir", "/var",
            "--rwdir", str(self.results),
            "--qemu-opts=-machine q35 -cpu max,+svm -device intel-iommu,intremap=on,caching-mode=on",
            # PCI buses are numbered in this order.
            "--qemu-opts=-device pcie-root-port,id=rp0,chassis=1,slot=1",
            # A NIC without SR-IOV, for a guest that takes a whole one.
            "--qemu-opts=-device pcie-root-port,id=rp1,chassis=2,slot=2",
            f"--qemu-opts=-device e1000e,bus=rp1,netdev=plain -netdev {CABLE},id=plain",
            # A switch outside: on it are the lab's NIC, that of another host in the same VM, and that of a
            # machine without guests (see two_hosts.py).
            "--qemu-opts=-device igb,bus=rp0,netdev=cable -netdev hubport,id=cable,hubid=0",
            "--qemu-opts=-device pcie-root-port,id=rp2,chassis=3,slot=3",
            "--qemu-opts=-device igb,bus=rp2,netdev=second -netdev hubport,id=second,hubid=0",
            "--qemu-opts=-device virtio-net-pci,netdev=third -netdev hubport,id=third,hubid=0",
            *([f"--qemu-opts=-netdev {self.cable},id=far -netdev hubport,id=beyond,hubid=0,netdev=far"]
              if self.cable else []),
            # The root once more, for the inside script to mount with a cache: vng's own has none.
            "--qemu-opts=-fsdev local,id=fast,path=/,security_model=none,readonly=on,multidevs=remap",
            "--qemu-opts=-device virtio-9p-pci,fsdev=fast,mount_tag=fast",
            # An end that nobody asked for, an emulated CPU's triple fault say, is told there only.
            f"--qemu-opts=-D {self.results}/qemu.log -d cpu_reset,{_TRACED}",
            *(["--qemu-opts=-icount shift=2"] if self.counted else []),
            "--append", " ".join(("intel_iommu=on", *self.kernel_words)),
            *console,
            *inside,
        ]  # fmt: skip

    @property
    def _inside(self) -> list[str]:
        return [f"{TOP}/tests/lab/inside", str(self.results), str(self._cache)]

    @property
    def _cache(self) -> Path:
        return self.older or LAB

    def run(self) -> Outcome:
        """Boot, run the command with its output on our stdout, and power off.

        Raises LabError when a prerequisite is missing.
        """
        deadline = time.monotonic() + self.deadline_s
        say(f"results in {self.results}")
        for number, boot_s in enumerate(self.tries_s, 1):
            outcome = self._boot(deadline, min(deadline, time.monotonic() + boot_s))
            is_last = number == len(self.tries_s) or time.monotonic() >= deadline
            # Where nothing of the command has run, nothing is hidden by another try.
            is_again = self.resumable or not self._has_started
            if outcome.exit_code != LOST or is_last or not is_again:
                break
            say(f"{outcome.complaint}; once more")
            self._put_aside(self.results / f"lost-{number}")
        return outcome

    def _put_aside(self, lost: Path) -> None:
        """What a lost VM wrote, before the next one writes there."""
        lost.mkdir(exist_ok=True)
        for log in self.results.glob("*.log"):
            log.replace(lost / log.name)

    def _boot(self, deadline: float, boot_deadline: float) -> Outcome:
        started = time.monotonic()
        self._prepare(deadline - started)
        say("booting")
        with (self.results / "vng.log").open("wb") as complaints:
            process = subprocess.Popen(
                self.argv(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=_environment(),
                cwd=TOP,
                # A group of its own: what we end is what we started, whoever else runs a lab.
                start_new_session=True,
            )
        assert process.stdout
        with _ending(process), process.stdout:
            in_time = self._stream(process, deadline, boot_deadline)
        self._keep_cache()
        return self._judge(in_time, time.monotonic() - started, process.returncode)

    @property
    def _has_started(self) -> bool:
        return (self.results / "started").exists()

    def shell(self) -> int:
        """Give the terminal a root shell in the VM; no deadline, as a person is there to end it."""
        columns, lines = shutil.get_terminal_size()
        self.environment |= {"COLUMNS": str(columns), "LINES": str(lines)}
        self._prepare(self.deadline_s)
        wrapper = self.results / "shell"
        wrapper.write_text(f"#!/bin/sh\nexec {shlex.join(self._inside)}\n")
        wrapper.chmod(0o755)
        argv = self.argv(shell=str(wrapper))
        return subprocess.run(argv, env=_environment(), cwd=TOP, check=False).returncode

    def _prepare(self, left_s: float) -> None:
        built = image.build(LAB)
        # The VM can't write beside the sources, and compiling in an emulated CPU takes seconds at each start.
        compileall.compile_dir(TOP / "vnet_lock", quiet=2)
        self.results.mkdir(parents=True, exist_ok=True)
        for name in ("exit-code", "started"):
            (self.results / name).unlink(missing_ok=True)
        exports = {
            "VNET_LAB_RESULTS": str(self.results),
            "VNET_LAB_KERNEL": str(built.kernel),
            "VNET_LAB_INITRD": str(built.initrd),
            **self.environment,
        }
        lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
        # The command ends before the VM is ended, so that its logs still come out.
        limit_s = max(30, int(left_s - BOOT_S))
        lines += [f"limit_s={limit_s}", f"set -- {shlex.join(self.command)}", ""]
        (self.results / "command").write_text("\n".join(lines))

    def _stream(self, process: subprocess.Popen[bytes], deadline: float, boot_deadline: float) -> bool:
        """Copy the VM's output to ours until it ends; False when a deadline came first."""
        assert process.stdout
        with (self.results / "output.log").open("wb") as log:
            while (left := (deadline if self._has_started else boot_deadline) - time.monotonic()) > 0:
                if not select.select([process.stdout], [], [], left)[0]:
                    continue
                if not (chunk := os.read(process.stdout.fileno(), 65536)):
                    break
                log.write(chunk)
                log.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            try:
                process.wait(max(1.0, left))
            except subprocess.TimeoutExpired:
                return False
        return True

    def _judge(self, in_time: bool, took_s: float, vng_code: int) -> Outcome:
        code = self.results / "exit-code"
        text = code.read_text().strip() if code.exists() else ""
        if text.isdigit():
            complaint = f"the command did not end in time; see {self.results}" if int(text) == HUNG else ""
            return Outcome(int(text), self.results, complaint)
        when = f"after {took_s:.0f} s while {'running its command' if self._has_started else 'booting'}"
        if not in_time:
            hung = f"lab VM hung: ended {when}; see {self.results}"
            return Outcome(HUNG if self._has_started else LOST, self.results, hung)
        # A vng that lacks something on this machine says so last, be it in a traceback.
        said = (self.results / "vng.log").read_text(errors="replace").strip().splitlines()
        why = ", ".join([f"vng's exit code {vng_code}", *said[-1:]])
        return Outcome(LOST, self.results, f"lab VM lost {when} ({why}); see {self.results}")

    def _keep_cache(self) -> None:
        """What libvirt learnt about QEMU (25 to 40 s of probing) is there for the next boot."""
        fresh = self.results / "capabilities"
        if not fresh.is_dir():
            return
        kept, old = self._cache / "capabilities", self._cache / f"capabilities.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            kept.rename(old)
        with contextlib.suppress(OSError):  # another lab's end came first: its cache is as good
            fresh.rename(kept)
        shutil.rmtree(old, ignore_errors=True)


def say(text: str) -> None:
    """A line of progress."""
    print(f"lab: {text}", flush=True)


def new_results() -> Path:
    """A results directory that no other run uses, with ``.lab/last`` pointing to it."""
    path = LAB / "results" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    path.mkdir(parents=True)
    link = LAB / f"last.{os.getpid()}"
    link.symlink_to(path)
    link.replace(LAB / "last")
    return path


def _environment() -> dict[str, str]:
    # vng starts its other half, virtme-run, by name.
    return {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}


def _check_words(*paths: Path) -> None:
    """Paths that travel on a kernel command line and in QEMU's options have no blanks and commas."""
    for path in paths:
        if not re.fullmatch(r"[\w./+@%:~-]+", str(path)):
            raise LabError(f"the lab VM can't have the path {path}: use one without blanks and commas")


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """See that nothing of the VM is left, also when we are interrupted or told to end."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        signal.signal(signal.SIGTERM, previous)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.vm", description=__doc__.splitlines()[0])
    parser.add_argument("--deadline", type=float, default=DEFAULT_DEADLINE_S, metavar="SECONDS")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: a new one below .lab/results")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="more for who has the machine alone")
    parser.add_argument("--counted", action="store_true", help="its clock counts instructions")
    parser.add_argument("--kernel", action="append", default=[], metavar="WORD", help="for its command line")
    parser.add_argument("--cable", default="", help="QEMU's -netdev behind the NICs' switch")
    parser.add_argument("--older", action="store_true", help="with the release's own libvirt, see older.py")
    parser.add_argument(
        "--resumable", action="store_true", help="if the VM is lost, run COMMAND in another one"
    )
    parser.add_argument("--shell", action="store_true", help="an interactive shell in the VM")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    if bool(options.command) == options.shell:
        parser.error("give a command, or --shell")
    environment = dict(word.partition("=")[::2] for word in options.env)
    try:
        vm = Vm(
            options.command or ["bash"],
            (options.results or new_results()).resolve(),
            options.deadline,
            environment,
            cpus=options.cpus,
            counted=options.counted,
            resumable=options.resumable,
            kernel_words=options.kernel,
            cable=options.cable,
            older=older.unpack(LAB) if options.older else None,
        )
        if options.shell:
            return vm.shell()
        outcome = vm.run()
    except (LabError, image.BuildError, older.NoOlder) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 5
    if outcome.complaint:
        print(f"lab: {outcome.complaint}", file=sys.stderr)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
