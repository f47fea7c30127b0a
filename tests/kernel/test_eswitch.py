"""The request that sets an embedded switch is what iproute2 sends, and what a refusal becomes."""

import re
import shutil
import socket
import struct
import subprocess
import sys

import pytest

from tests.kernel.conftest import need
from vnet_lock.errors import BadInput, Unsupported, Vanished
from vnet_lock.kernel import eswitch

RTM_SETLINK = 19
OURS = "from vnet_lock.kernel import eswitch; eswitch.set_mode({!r}, {!r})"


def changes_sent(*argv: str) -> list[bytes]:
    """The RTM_SETLINK messages that a command sends, without sequence number and port (the sender's own)."""
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=sendmsg,sendto", "-e", "write=all", *argv],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    messages, current = [], b""
    # A dump's line: " | 00010  07 00 00 00 …  ........ |"; the first one of a message starts at 00000.
    for offset, dump in re.findall(r"^ \| ([0-9a-f]+)  (.{49})", done.stderr, re.MULTILINE):
        if int(offset, 16) == 0:
            messages.append(current)
            current = b""
        current += bytes.fromhex(dump)
    messages.append(current)
    found = [message for message in messages if len(message) > 16 and kind_of(message) == RTM_SETLINK]
    assert found, done.stderr
    return [message[:8] + message[16:] for message in found]


def kind_of(message: bytes) -> int:
    return int(struct.unpack_from("=IH", message)[1])


@pytest.mark.parametrize("mode", ["vepa", "veb"])
def test_the_request_is_what_iproute2_sends(veth: tuple[str, str], mode: str):
    need(shutil.which("strace") and shutil.which("bridge"), "strace and iproute2's bridge")
    theirs = changes_sent("bridge", "link", "set", "dev", veth[0], "hwmode", mode)
    ours = changes_sent(sys.executable, "-c", OURS.format(veth[0], mode))
    assert ours == theirs
    (message,) = ours
    assert struct.unpack_from("=BxHi", message, 8)[::2] == (7, socket.if_nametoindex(veth[0]))


def test_a_device_without_an_embedded_switch_is_refused_as_what_it_is(veth: tuple[str, str]):
    with pytest.raises(Unsupported, match=f"embedded switch of {veth[0]} to vepa failed: its driver has no"):
        eswitch.set_mode(veth[0], "vepa")
    assert eswitch.read_mode(veth[0]) is None
    with pytest.raises(Vanished, match="nix0"):
        eswitch.set_mode("nix0", "veb")
    assert eswitch.read_mode("nix0") is None
    with pytest.raises(BadInput, match="veb, vepa"):
        eswitch.set_mode(veth[0], "bridge")
