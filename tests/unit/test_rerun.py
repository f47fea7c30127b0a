"""A running QEMU's command line, rebuilt: networks are made again, a manager's own words are left out."""

from __future__ import annotations

import json
import shlex

import pytest

from vnet_lock.front.rerun import Origin, Running, origin_of, rebuild
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, Process, Resource, State
from vnet_lock.qemu_argv import read_argv

VFIO = Origin(
    (("mode", "veb"), ("port", "sriov"), ("dev", "0000:01:10.0"), ("protocols", "vfio")), "was a VF"
)
TAP = Origin((("mode", "vepa"), ("port", "macvlan"), ("dev", "eth0"), ("protocols", "tap")), "was a macvtap")


def claim(resource: str, combination: str | None, interface: str = "ua-net0") -> Claim:
    owner = Owner(OwnerKind.QEMU, "web1", "b", process=Process(7, 1))
    where = Resource.parse(resource)
    return Claim(where, Mode.SHARED, State.ACTIVE, owner, "0" * 16, interface, 0.0, combination)


def rebuilt(line: str, **more: object) -> tuple[str, str]:
    """The options of the script, and its remarks."""
    known: dict[str, object] = {
        "tap_at": {33: TAP}.get,
        "file_at": {30: "/var/log/web1.log"}.get,
        "function_at": {"0000:01:10.0": VFIO}.get,
    }
    running = Running(7, "web1", **{**known, **more})  # type: ignore[arg-type]
    script = rebuild(["/usr/bin/qemu-system-x86_64", *shlex.split(line)], running)
    return " ".join(word for option in script.options for word in option), "\n".join(script.remarks)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # As libvirt writes it, and as vnet-qemu does.
        (
            """-netdev '{"type":"tap","fd":"33","vhost":true,"vhostfd":"35","id":"hostnet0"}'""",
            "-netdev host,id=hostnet0,mode=vepa,port=macvlan,dev=eth0,protocols=tap:vhost",
        ),
        (
            "-netdev tap,id=net0,fds=33:34",
            "-netdev host,id=net0,mode=vepa,port=macvlan,dev=eth0,protocols=tap,queues=2",
        ),
        ("-netdev user,id=net0", "-netdev user,id=net0"),
        (
            """-netdev '{"type":"user","id":"n0","hostfwd":[{"str":"tcp::22-:22"},{"str":"tcp::80-:80"}]}'""",
            '-netdev {"type":"user","id":"n0","hostfwd":[{"str":"tcp::22-:22"},{"str":"tcp::80-:80"}]}',
        ),
        (f"-netdev tap,id=n0,fd={'9' * 5000}", f"-netdev tap,id=n0,fd={'9' * 5000}"),
        (f"-add-fd set=0,fd={'9' * 5000}", ""),
        (f"-device '{{\"driver\":{'[' * 2000}'", f'-device {{"driver":{"[" * 2000}'),
        ("-netdev tap,id=net0,ifname=t0", "-netdev tap,id=net0,ifname=t0"),
        (
            """-device '{"driver":"vfio-pci","host":"0000:01:10.0","id":"hostdev0","bus":"pci.1"}'""",
            "-nic host,id=hostdev0,mode=veb,port=sriov,dev=0000:01:10.0,protocols=vfio,bus=pci.1",
        ),
        ("-device vfio-pci,host=0000:05:00.0,id=gpu", "-device vfio-pci,host=0000:05:00.0,id=gpu"),
        ("-S -no-shutdown -sandbox on,spawn=deny -incoming defer -m 128", "-m 128"),
        (
            "-chardev socket,id=charmonitor,fd=34,server=on,wait=off",
            "-chardev socket,id=charmonitor,server=on,wait=off,path=web1-charmonitor.sock",
        ),
        (
            "-add-fd set=0,fd=30,opaque=log -chardev socket,id=c,path=/x,logfile=/dev/fdset/0,logappend=on",
            "-chardev socket,id=c,path=/x,logfile=/var/log/web1.log,logappend=on",
        ),
        (
            "-add-fd set=0,fd=31 -chardev socket,id=c,path=/x,logfile=/dev/fdset/0,logappend=on",
            "-chardev socket,id=c,path=/x,logfile=web1-c.log,logappend=on",
        ),
        (
            """-object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/v/master-key.aes"}'""",
            "",
        ),
        (
            "-chardev socket,id=a,path=/var/lib/libvirt/qemu/channel/target/domain-3-web1/org.qemu.0",
            "-chardev socket,id=a,path=./org.qemu.0",
        ),
        ("-blockdev driver=file,filename=/var/lib/libvirt/qemu/nvram/web1.fd,node-name=n", None),
    ],
)
def test_each_word_becomes_what_a_person_can_run(line: str, expected: str | None) -> None:
    options, remarks = rebuilt(line)
    assert options == (line if expected is None else expected)
    # Whatever is not as it was is said; what a person needn't know of isn't.
    silent = options == line or "-add-fd" in line or options.replace("'", "") == line.replace("'", "")
    assert bool(remarks) or silent


def test_what_comes_out_is_understood_by_vnet_qemu() -> None:
    options, _ = rebuilt(
        "-nodefaults -netdev tap,id=net0,fd=33 -device virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01"
        " -device vfio-pci,host=0000:01:10.0,id=hostdev0"
    )
    intents = read_argv(shlex.split(options)).intents
    assert [(one.interface, one.mac, one.devs) for one in intents] == [
        ("net0", "52:54:00:00:00:01", ("eth0",)),
        ("hostdev0", None, ("0000:01:10.0",)),
    ]


def test_a_name_cannot_end_a_remark() -> None:
    device = json.dumps({"driver": "vfio-pci", "host": "0000:05:00.0", "id": "x\nreboot\x1b[2J"})
    running = Running(7, "w\nreboot", lambda _: None, lambda _: None, lambda _: None)
    script = rebuild(["qemu", "-device", device], running).text("w\nreboot")
    assert script.splitlines()[:2] == [
        "# w?reboot",
        "#   -device x?reboot?[2J: 0000:05:00.0 is no network function; bind it to vfio-pci before",
    ]


def test_a_claim_says_better_than_a_descriptor_what_a_network_was() -> None:
    claims = {"ua-net0": (claim("nic:br0", "veb-bridge-tap+vhost"),)}
    options, remarks = rebuilt("-netdev tap,id=hostua-net0,fd=33", claims=claims)
    assert options == "-netdev host,id=hostua-net0,mode=veb,port=bridge,dev=br0,protocols=tap:vhost"
    assert "was veb-bridge-tap+vhost on nic:br0" in remarks


@pytest.mark.parametrize(
    ("claims", "keys"),
    [
        ([claim("nic:vlnat3", "nat-bridge-tap"), claim("nic:eth0", "nat-bridge-tap")], "nat bridge eth0 tap"),
        ([claim("nic:vlnat0", "nat-bridge-tap")], "nat bridge tap"),
        ([claim("nic:virbr0", "nat-bridge-tap")], "nat bridge virbr0 tap"),
        ([claim("vf:0000:01:10.0", "veb-sriov-socket+vhost")], "veb sriov 0000:01:10.0 socket:vhost"),
        ([claim("pf:0000:01:00.0", None)], None),
    ],
)
def test_the_keys_of_a_network_come_from_its_claims(claims: list[Claim], keys: str | None) -> None:
    origin = origin_of(claims)
    assert (" ".join(value for _, value in origin.keys) if origin else None) == keys


def test_what_cannot_be_made_again_is_said() -> None:
    options, remarks = rebuilt("-netdev tap,id=n,fd=40 -device vhost-vsock-pci,vhostfd=50,id=v")
    assert options.startswith("-netdev user,id=n")
    assert "-netdev n: nothing here makes what its descriptor was" in remarks
    assert "-device v: vhostfd=50 is nobody's any more" in remarks


def test_the_script_is_one_command_with_its_remarks_before_it() -> None:
    script = rebuild(["/usr/bin/qemu", "-name", "a b", "-S"], Running(7, "a b", {}.get, {}.get, {}.get))
    assert script.text("guest") == (
        "# guest\n#   -S is left out: its manager would have started the CPUs\n"
        "vnet-qemu /usr/bin/qemu \\\n    -name 'a b'"
    )
