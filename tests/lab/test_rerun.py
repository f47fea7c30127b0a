"""vnet-qemu --from-pid: a libvirt guest's line, taken while it runs, run by hand after it has ended."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.contenders import direct_xml, hostdev_xml, vnet_lock
from tests.lab.machines import Guests, LibvirtGuest, PlainGuest
from tests.lab.nic import Nic, wait_until

HOST, GUEST, MAC = "10.7.0.1", "10.7.0.2", "52:54:00:00:07:01"


def take_line(guest: LibvirtGuest) -> str:
    """What a person gets to see, and pastes into a file."""
    argv = ["vnet-qemu", "--from-pid", str(guest.pid)]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout


def run_line(guests: Guests, script: str, name: str, folder: Path, console: Path) -> PlainGuest:
    """Run it as a script; its console's log and socket are in the current directory by then."""
    path = folder / f"{name}.sh"
    path.write_text(script)
    return guests.program(name, ["sh", str(path)], console)


@pytest.mark.parametrize("kind", ["hostdev", pytest.param("direct", marks=pytest.mark.long)])
def test_a_libvirt_guests_line_is_run_by_hand_and_the_guest_pings(
    lab: Nic, guests: Guests, tmp_path: Path, hook: None, kind: str
) -> None:
    (vf,) = lab.set_numvfs(1)
    lab.set_address(f"{HOST}/24")
    assert vf.netdev
    interface: Callable[[], str] = {
        "hostdev": lambda: hostdev_xml(vf, MAC),
        "direct": lambda: direct_xml(vf.netdev or "", MAC),
    }[kind]
    guest = guests.libvirt("web1", interface(), ip=f"{GUEST}/24", ping=HOST)
    assert guest.console.ready()["ping"] == "3/3"
    script = take_line(guest)
    print(script)
    assert "host,id=" in script
    assert "masterKey0 is left out" in script
    guest.destroy()
    by_hand = run_line(guests, script, "byhand", tmp_path, tmp_path / "web1-charserial0.log")
    seen = by_hand.console.ready()
    assert (seen["ping"], seen["mac"]) == ("3/3", MAC)
    assert "web1" in vnet_lock("status").stdout
    # The shell's child, as ^C would: the wrapper and QEMU.
    for pid in Path(f"/proc/{by_hand.pid}/task/{by_hand.pid}/children").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    by_hand.wait(120)
    wait_until(lambda: "free" in vnet_lock("status").stdout, "the VF is free again")
    assert shlex.split(script, comments=True)[0] == "vnet-qemu"
