"""vnet-qemu with a session written by hand, a QEMU that is a script, and real processes and signals."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit import fake_vnet_qemu
from tests.unit.fake_vnet_qemu import assignment
from vnet_lock.combination import Policy
from vnet_lock.errors import BadInput, Refused, Unsupported
from vnet_lock.front import wrapper
from vnet_lock.model import PciAddress, Resource
from vnet_lock.request import Intent, Plan, Refusal, RefusalKind
from vnet_lock.settings import DEFAULT, Settings

HOST = ("-netdev", "host,id=net0,mode=vepa,dev=eth0", "-device", "virtio-net-pci,netdev=net0")


@dataclass
class Run:
    """A folder with a program called qemu, and a vnet-qemu to run it with."""

    folder: Path

    def write_qemu(self, body: str, interpreter: str = "/bin/sh") -> Path:
        path = self.folder / "qemu"
        path.write_text(
            f"#!{interpreter}\ncd {self.folder}\n{body}\n" if Path(interpreter).name.endswith("sh") else body
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def command(self, *args: str, behave: str = "") -> list[str]:
        return [sys.executable, fake_vnet_qemu.__file__, str(self.folder), behave, *args]

    def run(self, *args: str, behave: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args, behave=behave), capture_output=True, text=True, timeout=30, check=False
        )

    def start(self, *args: str, behave: str = "") -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*args, behave=behave), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    @property
    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, name: str) -> str:
        """What a file holds, once it is there and has a whole line."""
        return eventually(lambda: (text := read_text(self.folder / name)).endswith("\n") and text.strip())


def read_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def eventually(find, timeout_s: float = 15.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := find():
            return found
        time.sleep(0.01)
    raise AssertionError("it never happened")


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_qemu_gets_the_descriptor_and_its_exit_status_is_ours(run):
    qemu = run.write_qemu('echo "$@" >args; ls -l /proc/self/fd >fds; exit 7')
    assert run.run(str(qemu), "-name", "web1", *HOST, "x y").returncode == 7
    args = read_text(run.folder / "args")
    fd = re.match(
        r"-name web1 -netdev tap,id=net0,fd=(\d+) "
        r"-device virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01 x y\n$",
        args,
    )[1]
    assert f" {fd} -> {run.folder}/tap" in read_text(run.folder / "fds")


def test_the_owner_is_qemu_itself_from_the_first_moment_and_the_end_gives_back_once(run):
    qemu = run.write_qemu('cut -d" " -f1,22 /proc/$$/stat >self')
    assert run.run("--name", "vm2", str(qemu), *HOST).returncode == 0
    identity = read_text(run.folder / "self").strip()
    assert run.log == [f"acquire vm2 {identity}", f"release {identity}"]


def test_qemu_that_dies_by_a_signal_looks_so_to_our_parent(run):
    qemu = run.write_qemu("kill -SEGV $$")
    assert run.run(str(qemu), *HOST).returncode == -signal.SIGSEGV
    qemu = run.write_qemu("kill -KILL $$")
    assert run.run(str(qemu), *HOST).returncode == -signal.SIGKILL
    assert [line.split()[0] for line in run.log] == ["acquire", "release"] * 2


def test_a_refusal_is_said_once_and_qemu_never_runs(run):
    qemu = run.write_qemu("touch ran")
    result = run.run(str(qemu), *HOST, behave="refuse")
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == "vnet-qemu: PF eth0 is held by another\n"
    assert not (run.folder / "ran").exists()
    assert len(run.log) == 1


def test_a_failure_after_the_claim_gives_back(run):
    qemu = run.write_qemu("touch ran")
    result = run.run(str(qemu), *HOST, behave="fail")
    assert (result.returncode, result.stderr) == (1, "vnet-qemu: cannot open vl0\n")
    assert [line.split()[0] for line in run.log] == ["acquire", "release"]
    assert not (run.folder / "ran").exists()


def test_a_program_that_is_not_there_is_found_out_before_anything_is_claimed(run):
    result = run.run("no-such-qemu", *HOST)
    assert result.returncode == 5
    assert 'there is no program "no-such-qemu" in PATH' in result.stderr
    assert run.log == []


def test_a_program_that_cannot_run_gives_back(run):
    qemu = run.write_qemu("", interpreter="/no/such/python")
    qemu.write_text("#!/no/such/interpreter\n")
    result = run.run(str(qemu), *HOST)
    assert result.returncode == 5
    assert "cannot run" in result.stderr
    assert [line.split()[0] for line in run.log] == ["acquire", "release"]


def test_a_failure_to_give_back_is_told_even_where_qemu_ended_well(run):
    qemu = run.write_qemu("exit 0")
    result = run.run(str(qemu), *HOST, behave="stuck")
    assert (result.returncode, result.stderr) == (1, "vnet-qemu: cannot remove vl0\n")


def test_qemus_own_failure_outweighs_one_to_give_back(run):
    qemu = run.write_qemu("exit 3")
    result = run.run(str(qemu), *HOST, behave="stuck")
    assert (result.returncode, result.stderr) == (3, "vnet-qemu: cannot remove vl0\n")


# Ends a little after the first signal, so that a second would be counted.
COUNTING = """
n=0
trap 'n=$((n+1))' {signal}
echo $$ >pid
until [ $n -gt 0 ]; do sleep 0.02; done
sleep 0.1; sleep 0.1; sleep 0.1
exit $((n + 40))
"""


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "WINCH"])
def test_a_signal_sent_to_us_reaches_qemu_and_we_outlive_it(run, name):
    qemu = run.write_qemu(COUNTING.format(signal=name))
    process = run.start(str(qemu), *HOST)
    run.wait_for("pid")
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.communicate(timeout=15)
    assert process.returncode == 41
    assert run.log[-1].startswith("release")


def press(key: bytes, run: Run, qemu: Path) -> int:
    """The exit code of a vnet-qemu at whose terminal a key is pressed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, run.command(str(qemu), *HOST))
    run.wait_for("pid")
    os.write(terminal, key)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize(("key", "name"), [(b"\x03", "INT"), (b"\x1c", "QUIT")])
def test_an_interrupt_at_the_terminal_ends_qemu_and_we_outlive_it(run, key, name):
    assert press(key, run, run.write_qemu(COUNTING.format(signal=name))) == 41
    assert run.log[-1].startswith("release")


def test_what_the_terminal_sends_is_not_sent_again(run):
    # Out of the terminal's reach, this QEMU gets what we pass on; two signals at once would look like one.
    counting = COUNTING.format(signal="INT").replace("until [ $n -gt 0 ]; do sleep 0.02; done", "sleep 0.5")
    qemu = run.write_qemu(f'[ "$INNER" ] || INNER=1 exec setsid "$0"\n{counting}')
    assert press(b"\x03", run, qemu) == 40


def test_a_ctrl_z_at_the_terminal_stops_both_and_fg_goes_on(run):
    qemu = run.write_qemu("echo $$ >pid; read line; exit 5")
    pid, terminal = pty.fork()
    if pid == 0:
        # A shell of its own session: a stop signal does nothing in an orphaned process group.
        job = os.fork()
        if job == 0:
            os.setpgid(0, 0)
            os.execv(sys.executable, run.command(str(qemu), *HOST))
        os.setpgid(job, job)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.tcsetpgrp(0, job)
        _, status = os.waitpid(job, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            os.killpg(job, signal.SIGCONT)
            os.write(1, b"stopped\n")
            _, status = os.waitpid(job, 0)
        os._exit(os.waitstatus_to_exitcode(status))
    qemu_pid = int(run.wait_for("pid"))
    os.write(terminal, b"\x1a")
    seen = b""
    while b"stopped" not in seen:
        seen += os.read(terminal, 100)
    assert Path(f"/proc/{qemu_pid}").exists()
    os.write(terminal, b"go on\n")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 5


def test_a_signal_before_qemu_runs_undoes_what_was_begun(run):
    qemu = run.write_qemu("touch ran")
    process = run.start(str(qemu), *HOST, behave="slow")
    eventually(lambda: run.log)
    process.terminate()
    out, err = process.communicate(timeout=15)
    assert (process.returncode, out, err) == (-signal.SIGTERM, "", "")
    assert [line.split()[0] for line in run.log] == ["acquire", "undone", "release"]
    assert not (run.folder / "ran").exists()


def read_signals(path: Path) -> dict[str, int]:
    """Lines of /proc/PID/status, without signals 32 and 33: the C library's, which make leaves ignored."""
    words = read_text(path).split()
    return {name: int(mask, 16) & ~(0b11 << 31) for name, mask in zip(words[::2], words[1::2], strict=True)}


def test_qemu_starts_with_no_signal_blocked_or_ignored(run):
    qemu = run.write_qemu("grep -E '^Sig(Blk|Ign)' /proc/self/status >signals")
    assert run.run(str(qemu), *HOST).returncode == 0
    assert read_signals(run.folder / "signals") == {"SigBlk:": 0, "SigIgn:": 0}


def test_a_hang_up_that_was_ignored_stays_so(run):
    qemu = run.write_qemu("grep -E '^SigIgn' /proc/self/status >signals")
    subprocess.run(["nohup", *run.command(str(qemu), *HOST)], check=True, timeout=15, capture_output=True)
    assert read_signals(run.folder / "signals") == {"SigIgn:": 1 << (signal.SIGHUP - 1)}


def test_a_starter_that_ignores_its_children_does_not_confuse_us(run):
    qemu = run.write_qemu("exit 6")
    result = subprocess.run(
        run.command(str(qemu), *HOST),
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        check=False,
        timeout=15,
    )
    assert result.returncode == 6


def test_killing_the_wrapper_leaves_qemu_and_its_claim(run):
    qemu = run.write_qemu("echo $$ >pid; exec sleep 60")
    process = run.start(str(qemu), *HOST)
    pid = int(run.wait_for("pid"))
    process.kill()
    process.wait(timeout=15)
    time.sleep(0.3)
    try:
        assert os.path.exists(f"/proc/{pid}")
        assert len(run.log) == 1
    finally:
        os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_a_line_without_host_networks_becomes_qemu(run):
    qemu = run.write_qemu('echo $$ "$@" >pid; exit 9')
    process = run.start(str(qemu), "-netdev", "user,id=a", "-x", "--", "y")
    process.communicate(timeout=15)
    assert process.returncode == 9
    assert run.wait_for("pid") == f"{process.pid} -netdev user,id=a -x -- y"
    assert run.log == []


DAEMON = """#!{python}
import fcntl, os, sys, time
args = sys.argv[1:]
path = args[args.index("-pidfile") + 1] if "-pidfile" in args else None
ready_read, ready_write = os.pipe()
if os.fork():
    os.close(ready_write)
    sys.exit(0 if os.read(ready_read, 1) else 1)
os.setsid()
if os.fork():
    os._exit(0)
file = open(path, "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(os.getpid(), file=file, flush=True)
time.sleep({start_s})
if {fails}:
    os._exit(1)
null = os.open("/dev/null", os.O_RDWR)
for fd in range(3):
    os.dup2(null, fd)
os.write(ready_write, b"!")
time.sleep({life_s})
os.unlink(path)
"""


def write_daemon(run: Run, start_s: float = 0.3, life_s: float = 0.6, fails: bool = False) -> Path:
    text = DAEMON.format(python=sys.executable, start_s=start_s, life_s=life_s, fails=fails)
    return run.write_qemu(text, interpreter=sys.executable)


@pytest.mark.parametrize("has_pidfile", [True, False])
def test_a_daemon_gets_the_claims_and_gives_back_at_its_end(run, has_pidfile):
    qemu = write_daemon(run)
    pidfile = ["-pidfile", str(run.folder / "pid")] if has_pidfile else []
    if has_pidfile:
        (run.folder / "pid").write_text(f"{os.getpid()}\n")  # an earlier QEMU's, and the pid another's by now
    result = run.run(str(qemu), "-daemonize", *pidfile, *HOST)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    acquire, hand_over, *rest = (line.split() for line in run.log)
    foreground, daemon = acquire[2], hand_over[2]
    assert hand_over[:2] == ["hand_over", foreground]
    assert rest == []
    last = eventually(lambda: run.log[2:])[0].split()
    assert last[:2] == ["release", daemon]
    assert not list(run.folder.glob("qemu-*.pid"))


def test_the_claims_go_over_before_the_foreground_qemu_ends(run):
    qemu = write_daemon(run, start_s=1.5, life_s=0.1)
    process = run.start(str(qemu), "-daemonize", *HOST)
    eventually(lambda: any("hand_over" in line for line in run.log))
    assert process.poll() is None
    process.communicate(timeout=15)
    assert process.returncode == 0


def test_a_daemon_that_fails_to_start_gives_back(run):
    qemu = write_daemon(run, fails=True)
    result = run.run(str(qemu), "-daemonize", *HOST)
    assert result.returncode == 1
    acquire, hand_over, release = (line.split() for line in run.log)
    assert release[:2] == ["release", hand_over[2]]
    assert acquire[2] == hand_over[1]


def test_a_daemon_killed_with_its_pid_file_left_gives_back_and_removes_ours(run):
    qemu = write_daemon(run, life_s=60)
    assert run.run(str(qemu), "-daemonize", *HOST).returncode == 0
    (pidfile,) = run.folder.glob("qemu-*.pid")
    os.kill(int(pidfile.read_text()), signal.SIGKILL)
    assert eventually(lambda: run.log[2:])[0].startswith("release")
    eventually(lambda: not pidfile.exists())


def test_a_qemu_that_is_no_daemon_after_all_gives_back(run):
    qemu = run.write_qemu("echo QEMU emulator version 10; exit 0")
    result = run.run(str(qemu), "-daemonize", *HOST)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[0] for line in run.log] == ["acquire", "release"]


# --- our own arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "program", "args", "name", "print_only"),
    [
        ("qemu -m 64", "qemu", "-m 64", None, False),
        ("--print --name a qemu --name b", "qemu", "--name b", "a", True),
        ("--name=a -- qemu --print", "qemu", "--print", "a", False),
        ("-m 64", f"qemu-system-{os.uname().machine}", "-m 64", None, False),
        ("-name web1 -m 64", f"qemu-system-{os.uname().machine}", "-name web1 -m 64", None, False),
        ("-- -m 64", f"qemu-system-{os.uname().machine}", "-m 64", None, False),
        ("--print disk.img", "disk.img", "", None, True),
    ],
)
def test_our_own_words_come_first(line, program, args, name, print_only):
    assert wrapper.parse(line.split()) == wrapper.Command(program, tuple(args.split()), name, print_only)


@pytest.mark.parametrize("line", ["--print", "--name", "--name=", "--", "--name a"])
def test_nothing_to_run_is_bad_usage(line):
    with pytest.raises(BadInput, match="--help"):
        wrapper.parse(line.split())


def test_help_and_version_are_ours_when_they_come_first(run):
    result = run.run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "-netdev host,id=ID" in result.stdout
    assert run.run("--version").stdout.startswith("vnet-qemu ")
    assert run.run().returncode == 2


def test_bad_words_are_refused_before_anything_happens(run):
    qemu = run.write_qemu("touch ran")
    result = run.run(str(qemu), "-netdev", "host,id=net0,moed=vepa,dev=eth0")
    assert result.returncode == 2
    assert result.stderr.startswith(
        'vnet-qemu: -netdev host,id=net0,moed=vepa,dev=eth0: unknown key "moed"; known:'
    )
    assert result.stderr.count("\n") == 1
    assert run.log == []


class Planner:
    """Answers what it was given."""

    def __init__(self, *answers: tuple[str, Resource] | Refusal) -> None:
        self.answers = answers

    def plan(self, requests: tuple[Intent, ...]) -> Plan | Refusal:
        if isinstance(self.answers[0], Refusal):
            return self.answers[0]
        return Plan(
            tuple(assignment(one, *answer) for one, answer in zip(requests, self.answers, strict=True))
        )


def show(planner: Planner, *args: str) -> int:
    return wrapper.run(
        ["--print", "qemu", *args], DEFAULT, lambda: pytest.fail("it was run"), lambda: planner
    )


def test_print_shows_the_command_with_words_for_descriptors(capsys):
    planner = Planner(
        ("vepa-macvlan-tap+vhost", Resource.nic("eth0")),
        ("veb-sriov-vfio", Resource.vf(PciAddress.parse("0000:01:10.0"))),
    )
    assert show(planner, *HOST, "-nic", "host,mode=veb,dev=eth1,protocols=vfio", "-name", "a b") == 0
    assert capsys.readouterr().out == (
        "qemu -netdev 'tap,id=net0,fd=<tap:net0>,vhost=on,vhostfd=<vhost:net0>' "
        "-device 'virtio-net-pci,netdev=net0,mac=<mac:net0>' "
        "-device vfio-pci,host=0000:01:10.0 -name 'a b'\n"
    )


def test_print_of_a_line_without_host_networks_is_the_line(capsys):
    assert show(Planner(), "-m", "64", "a b") == 0
    assert capsys.readouterr().out == "qemu -m 64 'a b'\n"


@pytest.mark.parametrize(
    ("kind", "error"),
    [(RefusalKind.HELD, Refused), (RefusalKind.IMPOSSIBLE, Unsupported), (RefusalKind.INVALID, BadInput)],
)
def test_print_raises_what_running_would(kind, error):
    refusal = Refusal(Intent("net0", Policy.VEPA, ("eth0",)), kind, "no")
    with pytest.raises(error, match="no"):
        show(Planner(refusal), *HOST)


@pytest.mark.parametrize(
    "words", [["guest.xml", "-m", "64"], ["--name", "a", "dir/guest.xml"], ["guest.xml", "--print"]]
)
def test_a_libvirt_guest_stands_alone(words):
    with pytest.raises(BadInput, match="our options stand before it, and no QEMU arguments beside it"):
        wrapper.parse(words)


def test_a_libvirt_guest_is_known_by_its_file():
    assert wrapper.parse(["--print", "guest.xml"]) == wrapper.Command("guest.xml", (), print_only=True)


def test_a_proc_that_does_not_know_our_child_is_an_error_and_no_endless_wait(tmp_path):
    code = (
        "import sys; from vnet_lock.front import supervisor; from vnet_lock.settings import Settings\n"
        "from vnet_lock.errors import VnetLockError; from vnet_lock.qemu_argv import read_argv\n"
        "guest = supervisor.Guest('true', '/bin/true', read_argv([]), 'vm')\n"
        "try:\n    supervisor.run_guest(Settings.under(sys.argv[1]), guest, None)\n"
        "except VnetLockError as error:\n    print(error)\n"
    )
    (tmp_path / "proc/1").mkdir(parents=True)
    argv = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    assert "namespace" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_where_a_stream_is_closed_no_descriptor_of_ours_takes_its_place(run, closed):
    qemu = run.write_qemu('echo "$@" >args; found=$(readlink /proc/$$/fd/[012]); echo "$found" >streams')
    line = f"{shlex.join(run.command(str(qemu), *HOST))} {closed}"
    subprocess.run(["/bin/sh", "-c", line], check=True, timeout=30, capture_output=True)
    assert int(re.search(r"fd=(\d+)", read_text(run.folder / "args"))[1]) > 2
    streams = read_text(run.folder / "streams").splitlines()
    assert len(streams) == 3
    assert streams.count("/dev/null") >= closed.count("&-")


@pytest.mark.parametrize("encoding", ["iso-8859-1", "utf-16"])
@pytest.mark.parametrize("words", [[], ["--print"]])
def test_a_guest_in_another_encoding_is_bad_input_before_anything_is_made(tmp_path, encoding, words):
    path, root = tmp_path / "guest.xml", tmp_path / "host"
    text = f"<?xml version='1.0' encoding='{encoding}'?><domain><name>bär</name></domain>"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(BadInput, match="the XML isn't UTF-8; convert it first: iconv"):
        wrapper.run([*words, str(path)], Settings.under(root), lambda: None, lambda: None)
    assert not root.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from-pid"], "--from-pid takes the pid"),
        (["--from-pid", "9" * 5000], "--from-pid takes the pid"),
        (["--from-pid", "x"], "--from-pid takes the pid"),
        (["--from-pid=1", "-m", "1"], "--from-pid takes the pid"),
        (["--from-pid", str(os.getpid())], "is no QEMU"),
        (["--from-pid", "4194305"], "there is no process 4194305"),
    ],
)
def test_what_is_no_running_qemu_is_bad_input(words, message):
    with pytest.raises(BadInput, match=message):
        wrapper.run(words, DEFAULT, lambda: None, lambda: None)
