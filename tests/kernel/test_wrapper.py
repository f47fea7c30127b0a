"""vnet-qemu with a real QEMU, real macvtaps and bridges, in a namespace with its own /run."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.kernel.host import (
    MAC,
    NET,
    NIC,
    QEMU,
    RUN,
    VNET_QEMU,
    Host,
    children_of,
    eventually,
    is_running,
    read_bytes,
)
from tests.lab import guest


def active(host: Host) -> dict | None:
    """The only claim, once it is active and its QEMU is so far that it handles signals itself."""
    claims = [claim for claim in host.claims() if claim["state"] == "active"]
    if len(claims) != 1:
        return None
    return claims[0] if handles_signals(claims[0]["owner"]["process"]["pid"]) else None


def handles_signals(pid: int) -> bool:
    """Whether a process is a QEMU that handles SIGTERM by now."""
    status = read_bytes(Path(f"/proc/{pid}/status")).decode()
    is_qemu = status.startswith("Name:\tqemu-system")
    caught = int(re.search(r"SigCgt:\s+(\w+)", status)[1], 16) if is_qemu else 0
    return bool(caught & 1 << (signal.SIGTERM - 1))


def test_a_guest_runs_on_a_macvtap_of_its_own_and_leaves_nothing_behind(host):
    with host.running(f"{QEMU} -name web1 {NET} {NIC}") as process:
        claim = eventually(lambda: active(host))
        (qemu,) = children_of(process.pid)
        assert (claim["owner"]["name"], claim["owner"]["process"]["pid"]) == ("web1", qemu)
        assert (claim["resource"], claim["combination"]) == ("nic:up0", "vepa-macvlan-tap")
        (link,) = host.macvtaps()
        assert link["linkinfo"]["info_data"]["mode"] == "vepa"
        assert f"mac={link['address']}".encode() in Path(f"/proc/{qemu}/cmdline").read_bytes()
        rdevs = {os.stat(fd.path).st_rdev for fd in os.scandir(f"/proc/{qemu}/fd")}
        (node,) = Path(f"/sys/class/net/{link['ifname']}").glob("tap*/dev")
        assert os.makedev(*map(int, node.read_text().split(":"))) in rdevs
        process.terminate()
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "terminating on signal 15" in err
    assert host.is_clean()


def test_the_parent_is_small_and_sleeps(host):
    with host.running(f"{QEMU} {NET} {NIC}") as process:
        eventually(lambda: active(host))
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) < 25 * 1024
        switches = re.findall(r"ctxt_switches:\s+(\d+)", status)
        time.sleep(1)
        assert (
            re.findall(r"ctxt_switches:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()) == switches
        )
        process.terminate()
        process.wait(timeout=20)


# mov dx, 0x501; mov al, 0x10; out dx, al; hlt: isa-debug-exit ends QEMU with 0x10 * 2 + 1.
EXIT_33 = bytes.fromhex("ba0105b010eef4ebfd")


def test_the_exit_status_that_the_guest_chose_is_ours(host, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(EXIT_33.ljust(510, b"\0") + b"\x55\xaa")
    machine = QEMU.removesuffix(" -S").replace("q35", "pc")
    with host.running(
        f"{machine} -device isa-debug-exit -drive format=raw,file={disk} {NET} {NIC}"
    ) as process:
        process.communicate(timeout=60)
        assert process.returncode == 33
    assert host.is_clean()


def test_a_qemu_that_fails_at_once_leaves_nothing_behind(host):
    result = host.qemu(f"{QEMU} {NET} {NIC} -device no-such-device")
    assert result.returncode == 1
    assert "no-such-device" in result.stderr
    assert host.is_clean()


def test_a_qemu_that_crashes_is_reported_as_the_shell_would(host):
    with host.running(f"{QEMU} {NET} {NIC}") as process:
        claim = eventually(lambda: active(host))
        os.kill(claim["owner"]["process"]["pid"], signal.SIGSEGV)
        process.communicate(timeout=20)
        assert process.returncode == -signal.SIGSEGV
    assert host.is_clean()


def test_ctrl_c_at_the_terminal_ends_the_guest_and_gives_back(host):
    words = [VNET_QEMU, *shlex.split(f"{QEMU} {NET} {NIC}")]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(words[0], words)
    eventually(lambda: active(host))
    os.write(terminal, b"\x03")
    said = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while more := os.read(terminal, 1000):
            said += more
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert said.count(b"terminating on signal 2") == 1
    assert host.is_clean()


JSON_NET = '{"type":"host","id":"net0","mode":"vepa","dev":"up0"}'
JSON_NIC = '{"driver":"virtio-net-pci","netdev":"net0"}'
# What the user writes, and what QEMU's "info network" then says of it.
LINES = [
    (f"{NET} {NIC}", "virtio-net-pci", 1),
    (f"{NET} -device e1000,netdev=net0", "e1000", 1),
    (f"--netdev host,id=net0,mode=private,dev=up0,mac={MAC} {NIC},mac={MAC}", MAC, 1),
    (f"{NET},queues=2 {NIC}", "virtio-net-pci", 2),
    (f"-nic host,mode=bridge,port=macvlan,dev=up0,mac={MAC}", MAC, 1),
    (f"-nic host,mode=veb,dev=up0,model=e1000e,addr=7,mac={MAC}", "e1000e", 1),
    ("-nic host,mode=vepa,dev=up0,queues=2", "virtio-net-pci", 2),
    (f"-net nic,model=virtio,macaddr={MAC} -net host,mode=vepa,dev=up0", MAC, 1),
    ("-net host,mode=vepa,dev=up0 -net nic,model=e1000", "e1000", 1),
    (f"{NET} -net nic,netdev=net0,model=virtio", "virtio-net-pci", 1),
    (f"-netdev '{JSON_NET}' -device '{JSON_NIC}'", "virtio-net-pci", 1),
    (f"-netdev host,id=net0,mode=veb,port=bridge,dev=br0 {NIC}", "virtio-net-pci", 1),
    (f"-netdev host,id=net0,mode=veb,port=bridge,dev=br0,queues=2 {NIC}", "virtio-net-pci", 2),
    (f"-netdev host,id=net0,mode=vepa,dev=nosuch0,dev=up0 {NIC}", "virtio-net-pci", 1),
]


@pytest.mark.parametrize(("line", "wanted", "queues"), LINES)
def test_qemu_takes_the_rewritten_line(host, line, wanted, queues):
    result = host.qemu(f"{QEMU} -monitor stdio {line}", input="info network\nquit\n")
    assert (result.returncode, result.stderr) == (0, "")
    # The monitor echoes with a terminal's control sequences; its answer stands in lines of its own.
    nics = [line for line in result.stdout.splitlines() if "type=nic" in line]
    taps = [line for line in result.stdout.splitlines() if "type=tap" in line]
    assert len(nics) == len(taps) == queues
    assert wanted in nics[0]
    assert host.is_clean()


@pytest.mark.parametrize("has_pidfile", [False, True])
def test_a_daemon_holds_its_claim_until_its_end(host, tmp_path, has_pidfile):
    pidfile = f"-pidfile {tmp_path}/pid" if has_pidfile else ""
    result = host.qemu(f"{QEMU} -daemonize {pidfile} -name web1 {NET} {NIC}")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    (claim,) = host.claims()
    daemon = claim["owner"]["process"]["pid"]
    try:
        assert is_running(daemon)
        assert claim["state"] == "active"
        second = host.qemu(f"{QEMU} {NET},mac={claim['mac']} {NIC}")
        assert second.returncode == 4
        assert '"web1"' in second.stderr
    finally:
        os.kill(daemon, signal.SIGTERM)
    eventually(host.is_clean)


def test_a_daemon_that_cannot_start_leaves_nothing_behind(host):
    assert host.qemu(f"{QEMU} -daemonize {NET} {NIC} -device no-such-device").returncode == 1
    assert host.is_clean()


def test_a_daemon_killed_with_its_keeper_is_healed_by_the_next_command(host):
    name = f"kept-{os.getpid()}"  # /proc shows what other runs of this test have started, too
    assert host.qemu(f"{QEMU} -daemonize -name {name} {NET},mac={MAC} {NIC}").returncode == 0
    (claim,) = host.claims()
    daemon = claim["owner"]["process"]["pid"]
    (keeper,) = [
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if b"vnet-qemu" in read_bytes(path / "cmdline") and name.encode() in read_bytes(path / "cmdline")
    ]
    os.kill(keeper, signal.SIGKILL)
    os.kill(daemon, signal.SIGKILL)
    eventually(lambda: not is_running(daemon))
    assert len(host.claims()) == 1
    result = host.qemu(f"{QEMU} -monitor stdio {NET},mac={MAC} {NIC}", input="quit\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert not host.claims()
    assert not host.macvtaps()


def test_a_killed_wrapper_leaves_the_claim_to_its_qemu_and_the_next_heals(host):
    with host.running(f"{QEMU} -name first {NET},mac={MAC} {NIC}") as process:
        claim = eventually(lambda: active(host))
        qemu = claim["owner"]["process"]["pid"]
        process.kill()
        process.wait(timeout=20)
        try:
            second = host.qemu(f"{QEMU} -name second {NET},mac={MAC} {NIC}")
            assert second.returncode == 4
            assert '"first"' in second.stderr
            assert second.stderr.count("\n") == 1
            assert is_running(qemu)
            assert host.claims() == [claim]
            (link,) = host.macvtaps()
        finally:
            os.kill(qemu, signal.SIGKILL)
        eventually(lambda: not is_running(qemu))
        third = host.qemu(f"{QEMU} -monitor stdio {NET},mac={MAC} {NIC}", input="quit\n")
        assert (third.returncode, third.stderr) == (0, "")
        assert link["ifname"] not in host.links()
    assert host.is_clean()


def test_print_changes_nothing_and_says_what_would_run(host):
    result = host.qemu(f"--print {QEMU} {NET} {NIC}")
    assert result.returncode == 0
    assert "tap,id=net0,fd=<tap:net0>" in result.stdout
    assert not RUN.exists()
    assert host.is_clean()


def test_print_refuses_what_another_holds(host):
    with host.running(f"{QEMU} -name first {NET},mac={MAC} {NIC}") as process:
        eventually(lambda: active(host))
        result = host.qemu(f"--print {QEMU} {NET},mac={MAC} {NIC}")
        assert (result.returncode, result.stdout) == (4, "")
        assert '"first"' in result.stderr
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("-netdev host,id=net0,mode=vepa,dev=nosuch0", 2),
        ("-netdev host,id=net0,mode=veb,port=bridge,dev=up0", 5),
        ("-netdev host,id=net0,mode=private,dev=up0,protocols=vfio", 5),
    ],
)
def test_what_this_host_cannot_do_is_said_in_one_line(host, line, code):
    result = host.qemu(f"{QEMU} {line} {NIC}")
    assert (result.returncode, result.stderr.count("\n")) == (code, 1), result.stderr
    assert host.is_clean()


MACHINE = "qemu-system-x86_64 -accel tcg -cpu max -M q35 -m 128 -nodefaults -display none -no-reboot"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("line", ["mode=veb,port=macvlan,dev=up0", "mode=veb,port=bridge,dev=br0"])
def test_two_guests_exchange_packets(host, tmp_path, line):
    image = guest.build()
    with contextlib.ExitStack() as stack:
        for number in (1, 2):
            words = guest.kernel_words(ip=f"10.9.9.{number}/24")
            path = tmp_path / str(number)
            console = (
                f"-chardev socket,id=c,path={path},server=on,wait=off,logfile={path}.log -serial chardev:c"
            )
            boot = f"-kernel {image.kernel} -initrd {image.initrd} -append '{words}'"
            net = f"-netdev host,id=net0,{line} -device virtio-net-pci,netdev=net0"
            stack.enter_context(host.running(f"{MACHINE} {console} {boot} {net}"))
        for number in (1, 2):
            wait_for_line(tmp_path / f"{number}.log", r"VNET-GUEST ready nics=1 .*link=up")
        order = stack.enter_context(socket.socket(socket.AF_UNIX))
        order.connect(f"{tmp_path}/2")
        order.sendall(b"7 ping 10.9.9.1\n")
        assert wait_for_line(tmp_path / "2.log", r"VNET-GUEST answer id=7 ping=(\d)/3")[1] == "3"


def wait_for_line(path: Path, pattern: str) -> re.Match[str]:
    return eventually(lambda: re.search(pattern, read_bytes(path).decode(errors="replace")), timeout_s=180)
