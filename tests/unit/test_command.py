"""What our three commands have in common: streams that are closed, full or left; one line for an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vnet_lock.errors import Refused
from vnet_lock.front.command import serve

MODULES = {"vnet-lock": "cli", "vnet-qemu": "wrapper", "qemu-net-helper": "helper"}


@pytest.fixture(params=list(MODULES))
def program(request) -> str:
    return request.param


def in_shell(program: str, words: str, redirection: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell, which can do to its streams what it likes."""
    return python(f"from vnet_lock.front.{MODULES[program]} import main", "main()", f"{words} {redirection}")


def python(imports: str, call: str, rest: str) -> subprocess.CompletedProcess[str]:
    line = f'"$0" $buffering -c "import sys; {imports}; sys.exit({call})" {rest}'
    # Output in whole blocks, as a user has it, but for who sets buffering=-u.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    argv = ["/bin/bash", "-c", line, sys.executable]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("buffering", ["", "-u"])
@pytest.mark.parametrize("word", ["--help", "--version"])
def test_an_output_that_is_full_is_one_line(program, word, buffering, monkeypatch):
    monkeypatch.setenv("buffering", buffering)
    done = in_shell(program, word, ">/dev/full")
    assert done.returncode == 1
    assert done.stderr == f"{program}: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_a_reader_that_has_gone_makes_no_noise(program, word):
    done = in_shell(program, word, '> >(exec true); sleep 0.2; echo "$?"')
    assert done.stderr == ""


@pytest.mark.parametrize("word", ["--help", "--version"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_streams_that_are_closed_are_no_error(program, word, closed):
    done = in_shell(program, word, closed)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("stream", ["2>/dev/full", "2>&-"])
def test_an_error_that_cannot_be_said_keeps_its_status(program, stream):
    assert in_shell(program, "--name=", stream).returncode == 2


def refuse() -> int:
    print("half")
    raise Refused("VF \x1b[1m is\nheld")


def test_an_error_is_one_line_whatever_is_in_it(capsys):
    assert serve("vnet-lock", refuse) == 4
    assert capsys.readouterr().err == "vnet-lock: VF ?[1m is held\n"


def test_an_error_is_said_even_where_the_output_is_full():
    done = python("from tests.unit.test_command import refuse, serve", "serve('x', refuse)", ">/dev/full")
    assert (done.returncode, done.stderr) == (4, "x: VF ?[1m is held\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/run/x"), "/run/x: Permission denied; run as root"),
        (PermissionError(1, "Operation not permitted"), "the kernel: Operation not permitted; run as root"),
    ],
)
def test_who_may_not_is_told_to_be_root(capsys, error, said):
    def run() -> int:
        raise error

    assert serve("vnet-qemu", run) == 1
    assert capsys.readouterr().err == f"vnet-qemu: {said}\n"


def test_a_bug_keeps_its_traceback():
    def run() -> int:
        raise FileNotFoundError(2, "No such file or directory", "/x")

    with pytest.raises(FileNotFoundError):
        serve("vnet-lock", run)


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [("iso-8859-1", "├─ eth0 ä", "?? eth0 ä"), ("utf-8", r"├─ \\udcff", "├─ ?")],
)
def test_what_the_output_cannot_have_is_replaced(encoding, text, shown, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", f"{encoding}:strict")
    call = f"serve('vnet-lock', lambda: print('{text}') or 0)"
    done = python("from vnet_lock.front.command import serve", call, f"| iconv -f {encoding} -t utf-8")
    assert (done.stdout, done.stderr) == (f"{shown}\n", "")


def test_a_command_is_shown_with_the_bytes_that_were_given(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    words = "--print qemu-system-x86_64 -drive file=/tmp/b$'\\xe4'r.img"
    done = in_shell("vnet-qemu", words, "| iconv -f latin1 -t utf-8")
    assert (done.stdout, done.stderr) == ("qemu-system-x86_64 -drive 'file=/tmp/bär.img'\n", "")
