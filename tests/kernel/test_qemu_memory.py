"""A real QEMU takes the memory words that vhost-user needs, and shares all of the guest's memory then."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest

from tests.kernel.conftest import need
from vnet_lock.backends import Connection
from vnet_lock.combination import Combination
from vnet_lock.front.qemu_features import read_dialect
from vnet_lock.qemu_memory import share_memory
from vnet_lock.qemu_words import split_options

QEMU = "qemu-system-x86_64"
RAM = "-object memory-backend-ram,size=32M,id="

AT_A_SOCKET = Connection(Combination.parse("vepa-macvlan-socket+vhost"), path="/nonexistent")


@pytest.mark.parametrize(
    "line",
    [
        "-M q35",
        "-M pc -m 48",
        "-m 1024k",
        "-M microvm -m 32",
        "-M isapc -m 32",
        "-m size=32M,slots=2,maxmem=256M",
        "-M q35,memory.size=32M",
        "-m 32 -mem-path /dev/shm",
        "-m 32 -mem-prealloc",
        f"-m 32 {RAM}m -M memory-backend=m",
        f"-m 64 {RAM}a {RAM}b -smp 2 -numa node,memdev=a -numa node,memdev=b",
        f"-m 32,slots=1,maxmem=128M {RAM}d -device pc-dimm,memdev=d",
        '-m 32 -object \'{"qom-type":"memory-backend-ram","id":"m","size":33554432}\' -M memory-backend=m',
    ],
)
def test_qemu_takes_the_words_and_shares_the_memory(line: str) -> None:
    need(shutil.which(QEMU), QEMU)
    options = split_options(shlex.split(line))
    memory = share_memory(options)
    words = [word for at, one in enumerate(options) for word in memory.changed.get(at, one.words)]
    argv = [QEMU, "-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]
    done = subprocess.run(
        [*argv, *memory.more, *words], input="info memdev\nquit\n", capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    shares = re.findall(r"share: +(\w+)", done.stdout)
    assert shares
    assert set(shares) == {"true"}


def test_how_to_connect_again_is_asked_of_the_qemu_itself() -> None:
    need(shutil.which(QEMU), QEMU)
    key, value = read_dialect(QEMU, [AT_A_SOCKET]).reconnect
    argv = [QEMU, "-M", "none", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]
    chardev = f"socket,id=c,path=/nonexistent,{key}={value}"
    done = subprocess.run(
        [*argv, "-chardev", chardev], input="info chardev\nquit\n", capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert "c: filename=disconnected" in done.stdout


def test_an_older_qemu_gets_the_older_word(tmp_path) -> None:
    old = tmp_path / "qemu"
    old.write_text('#!/bin/sh\ncase "$*" in *reconnect-ms*) exit 1 ;; esac\n')
    old.chmod(0o755)
    assert read_dialect(str(old), [AT_A_SOCKET]).reconnect == ("reconnect", 1)
