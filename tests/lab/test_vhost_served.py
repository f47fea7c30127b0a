"""socket+vhost for guests that vnet-qemu doesn't run: a plain QEMU by the helper, libvirt's by its hook."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.kernel.host import STAYING
from tests.lab.machines import READY_S, Guests
from tests.lab.nic import run, wait_until
from tests.lab.test_vhost_user import GUEST, back_ends
from tests.lab.wire import ADDRESS, Wire

pytestmark = pytest.mark.timeout(900)

# What a program does that gets its network from the helper, and then becomes an unmodified QEMU.
GETS_NETWORK = """
import json, os, socket, subprocess, sys
ours, its = socket.socketpair()
words = ["--mode=veb", "--port=macvlan", "--dev=up0", "--protocols=socket,vhost"]
fd = its.fileno()
subprocess.run(["qemu-net-helper", f"--socketpair={fd}", *words], pass_fds=[fd], check=True)
line, fds, *_ = socket.recv_fds(ours, 65536, 16)
for fd in fds:
    os.set_inheritable(fd, True)
answer = json.loads(line)
print(answer["combination"], answer["fds"], flush=True)
argv = sys.argv[1:]
at = argv.index("-m")
memory = argv[at + 1]
argv[at : at + 2] = [word.format(*fds, memory=memory + "M") for word in answer["qemu"]]
argv += ["-device", "virtio-net-pci,netdev=net0,romfile=,mac=" + answer["mac"]]
os.execvp("qemu-system-x86_64", ["qemu-system-x86_64", *argv])
"""


def test_an_unmodified_qemu_gets_it_from_the_helper(guests: Guests) -> None:
    wire = Wire()
    try:
        program = ["python", "-c", GETS_NETWORK]
        made = guests.qemu("helped", [], program=program, ip=f"{GUEST}/24", ping=ADDRESS)
        assert made.console.ready(READY_S * 3)["ping"] == "3/3", made.said
        assert made.said.startswith("veb-macvlan-socket+vhost ['keep']")
        assert len(back_ends()) == 2
        made.kill()
        made.wait()
        wait_until(lambda: not back_ends(), "the back-end is gone")
        assert "nic:up0" in run("vnet-lock", "gc").stdout
        assert not list(Path("/run/vnet-lock/claims").iterdir())
    finally:
        guests.end()
        wire.close()


SERVED = """<interface type='vhostuser'><mac address='52:54:00:00:09:02'/>
  <source type='unix' path='/run/vnet-lock/served-net0.sock' mode='client'>
    <reconnect enabled='yes' timeout='1'/></source>
  <model type='virtio'/><alias name='ua-net0'/></interface>"""
WISH = """<vnet:guest xmlns:vnet="urn:vnet-lock:guest:1">
  <vnet:interface alias="ua-net0" policy="veb" port="macvlan" dev="up0"/></vnet:guest>"""


def test_a_libvirt_guest_has_it_from_its_hook(guests: Guests, hook: None) -> None:
    wire = Wire()
    try:
        made = guests.libvirt(
            "served", SERVED, metadata=WISH, shares_memory=True, ip=f"{GUEST}/24", ping=ADDRESS
        )
        assert made.console.ready(READY_S * 3)["ping"] == "3/3"
        assert "veb-macvlan-socket+vhost" in run("vnet-lock", "show", "nic:up0").stdout
        monitor, worker = back_ends()
        with wire.chatter():
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: len(back_ends()) == 2 and worker not in back_ends(), "there is a new worker")
        # The guest may not have seen yet that its link went down.
        wait_until(lambda: made.console.ask(f"ping {ADDRESS}")["ping"] == "3/3", "QEMU came back")
        assert monitor in back_ends()
        other = SERVED.replace("09:02", "09:03")
        second = guests.libvirt("second", other, metadata=WISH, shares_memory=True, start=False)
        refused = second.start(check=False)
        assert "/run/vnet-lock/served-net0.sock is the socket of" in refused.stderr
        assert made.console.ask(f"ping {ADDRESS}")["ping"] == "3/3"
        made.destroy()
        wait_until(lambda: not back_ends(), "the back-end is gone")
        # Locks stay, and notes that a daemon has looked for hooks.
        left = {
            one.name for one in Path("/run/vnet-lock").rglob("*") if one.suffix not in (".lock", ".hooks")
        }
        assert left <= {*STAYING}, left
    finally:
        guests.end()
        wire.close()
