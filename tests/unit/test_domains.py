"""The verbs that write a libvirt guest's interfaces, on a fake host and libvirt's own driver for tests."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_host import START_TICKS, VFIO, FakeHost, build, locked
from vnet_lock.claims import ClaimTable
from vnet_lock.combination import Backend
from vnet_lock.domain_xml import read_guest
from vnet_lock.errors import BadInput, Unsupported, VnetLockError
from vnet_lock.front import domains
from vnet_lock.front.cli import main, parser
from vnet_lock.front.command import serve
from vnet_lock.front.hooks_install import install
from vnet_lock.front.libvirt_client.connection import Libvirt
from vnet_lock.front.libvirt_client.errors import Disconnected
from vnet_lock.front.libvirt_guest import read_owner
from vnet_lock.front.resolver import resolve_alone
from vnet_lock.model import Claim, Mode, PciAddress, Process, Resource, State
from vnet_lock.request import Fixed, Request
from vnet_lock.resolving import name_link
from vnet_lock.session import Session

PF = PciAddress.parse("0000:01:00.0")
GUEST = """\
<domain type='test'>
  <name>web1</name>
  <metadata>
    <vnet:guest xmlns:vnet="urn:vnet-lock:guest:1">
      {}
    </vnet:guest>
  </metadata>
  <memory unit='MiB'>64</memory>
  <os><type>hvm</type></os>
  <devices>
    <!-- mine -->
    <interface type='ethernet'>
      <mac address='52:54:00:00:00:01'/>
      <target dev='web1-net0' managed='no'/>
      <model type='virtio'/>
      <alias name='ua-net0'/>
    </interface>
  </devices>
</domain>
"""
ON_VF = '<vnet:interface alias="ua-net0" policy="veb" port="sriov" dev="eth0" backends="vfio" vlan="42"/>'
ON_PF = '<vnet:interface alias="ua-net0" policy="vepa" dev="wire0"/>'


@pytest.fixture
def host(tmp_path):
    host = FakeHost(tmp_path / "host")
    host.add_process(os.getpid(), "pytest")
    host.vfs = host.add_pf("0000:01:00.0", "eth0", ["igbvf", VFIO, "igbvf"])
    host.nic("wire0", up=True)
    return host


@pytest.fixture
def run(host, capfdbinary):
    """Run a command; returns its exit code, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words, host.settings)
        captured = capfdbinary.readouterr()
        err = captured.err.decode()
        assert err.count("\n") <= 1 or "usage:" in err, err
        return code, captured.out.decode(), err

    return run


URI = "test:///default"


@pytest.fixture
def libvirt() -> Iterator[Libvirt]:
    """A connection to a host of this process's own, which goes with the last connection."""
    with Libvirt(URI) as connection:
        yield connection


@pytest.fixture
def write(tmp_path):
    def write(*intents: str) -> str:
        path = tmp_path / "web1.xml"
        path.write_text(GUEST.format("\n      ".join(intents)))
        return str(path)

    return write


def claim(host: FakeHost, vf: PciAddress, pid: int, token: str = "a" * 16) -> None:
    host.add_process(pid)
    owner = host.owner(pid, "other")
    host.claim(Claim(Resource.vf(vf), Mode.EXCLUSIVE, State.ACTIVE, owner, token, "net0", 0.0, pf=PF))


def claims(host: FakeHost) -> list[Claim]:
    return list(ClaimTable(host.settings).read().records)


# --- resolve ----------------------------------------------------------------------------------------


def test_resolving_writes_the_vf_that_is_free_and_leaves_all_else(host, run, write):
    claim(host, host.vfs[0], 50)
    path = write(ON_VF)
    code, out, err = run("resolve", path)
    assert (code, err) == (0, "")
    before, after = Path(path).read_text().splitlines(), out.splitlines()
    assert [line for line in before if line not in after] == [
        "    <interface type='ethernet'>",
        "      <target dev='web1-net0' managed='no'/>",
    ]
    assert "    <interface type='hostdev' managed='yes'>" in after
    assert host.vfs[1].text == "0000:01:10.2"
    assert "slot='0x10' function='0x2'" in out
    assert "<tag id='42'/>" in out
    assert claims(host)[0].owner.name == "other"
    assert len(claims(host)) == 1


def test_the_late_form_comes_back_as_it_was(run, write, tmp_path):
    path = write(ON_PF)
    _, out, _ = run("resolve", path)
    assert "<source dev='wire0' mode='vepa'/>" in out
    resolved = tmp_path / "resolved.xml"
    resolved.write_text(out)
    assert run("resolve", "--form", "late", str(resolved)) == (0, Path(path).read_text(), "")
    assert run("resolve", "--form=late", path) == (0, Path(path).read_text(), "")


def test_devices_of_different_guests_have_different_names():
    assert name_link("web-vm", "ua-net0") == "web-vm-net0"
    names = {name_link("web-vm", "ua-net0"), name_link("web", "ua-vm-net0"), name_link("web", "vm-net0")}
    assert len(names) == 3
    odd = [
        ("web", "ua-net0" * 3),
        ("wéb", "ua-net0"),
        ("vnet", "ua-net0"),
        ("w b", "ua-net0"),
        ("w/b", "ua-0"),
    ]
    assert all(re.fullmatch("g[0-9a-f]{14}", name_link(*one)) for one in odd)


def test_what_only_the_hook_can_make_is_left_to_it_with_the_reason(run, write):
    path = write('<vnet:interface alias="ua-net0" policy="route" dev="wire0" ip="192.0.2.7"/>')
    code, out, err = run("resolve", path)
    assert (code, out) == (0, Path(path).read_text())
    assert (
        err == "vnet-lock: interface ua-net0 is left to the hook: libvirt has nothing like route-none-tap\n"
    )


def test_an_interface_that_only_the_metadata_has_is_written(run, write):
    words = '<vnet:interface alias="ua-vf0" policy="veb" dev="eth0" backends="vfio" mac="52:54:00:00:00:02"/>'
    code, out, _ = run("resolve", write(ON_PF, words))
    assert code == 0
    assert out.count("<interface type='hostdev' managed='yes'>") == 1
    assert "<mac address='52:54:00:00:00:02'/>" in out


def test_a_vf_comes_from_the_pool_that_is_asked_for(host, run, write):
    path = Path(host.settings.config_path)
    path.parent.mkdir(parents=True)
    path.write_text('[pools.a]\npf = ["eth0"]\nvfs = "2"\n')
    code, out, err = run("resolve", write(ON_VF.replace('dev="eth0"', 'pool="a"')))
    assert (code, err) == (0, "")
    assert "slot='0x10' function='0x4'" in out
    assert 'pool="a"' in out


def test_two_interfaces_never_get_one_vf(run, write):
    words = '<vnet:interface alias="ua-vf{}" policy="veb" dev="eth0" backends="vfio"/>'
    code, out, _ = run("resolve", write(ON_VF, words.format(1), words.format(2)))
    assert code == 0
    assert sorted(re.findall("slot='0x10' function='(.*?)'", out)) == ["0x0", "0x2", "0x4"]


def test_where_nothing_is_free_the_interface_and_its_holders_are_named(host, run, write):
    for index, vf in enumerate(host.vfs):
        claim(host, vf, 50 + index, f"{index}" * 16)
    code, out, err = run("resolve", write(ON_VF))
    assert (code, out) == (4, "")
    assert err.startswith("vnet-lock: ua-net0: nothing free for veb on eth0: VF 0000:01:10.0 is held by qemu")


@pytest.mark.parametrize(
    ("intent", "code", "said"),
    [
        (
            '<vnet:interface alias="ua-net0" policy="veb" dev="eth0" backends="socket"/>',
            5,
            "no backend socket",
        ),
        ('<vnet:interface alias="ua-net0" policy="veb"/>', 2, "dev"),
        ('<vnet:interface alias="ua-net0" policy="veb" dev="eth9"/>', 2, "'eth9'"),
    ],
)
def test_an_intent_that_cannot_be_had_is_refused(run, write, intent, code, said):
    found = run("resolve", write(intent))
    assert found[:2] == (code, "")
    assert "ua-net0" in found[2]
    assert said in found[2]


def test_a_file_that_is_no_utf_8_is_bad_input(run, tmp_path, libvirt):
    path = tmp_path / "odd.xml"
    path.write_bytes(b"<?xml version='1.0' encoding='latin1'?><domain><name>\xe4</name></domain>")
    code, _, err = run("define", "-c", URI, str(path))
    assert (code, "iconv" in err) == (2, True)


def test_a_file_that_is_no_guest_is_bad_input(run, tmp_path):
    assert run("resolve", str(tmp_path / "none.xml"))[0] == 2
    path = tmp_path / "odd.xml"
    path.write_text("<domain>")
    assert run("resolve", str(path))[0] == 2


# --- define, start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["late", "full"])
@pytest.mark.parametrize("more", ["", ' backends="socket+vhost"'])
def test_an_interface_that_is_served_by_a_socket_stays_as_it_is(host, run, tmp_path, form, more):
    """libvirt takes it late as it takes an ethernet one, and the hook serves it."""
    build(host.root, {"dev/vhost-net": ""})
    path = tmp_path / "web14.xml"
    text = (Path(__file__).parents[2] / "xml/intent-vhostuser.xml").read_text()
    path.write_text(text.replace('dev="enp1s0"', f'dev="wire0"{more}'))
    said = "a process of ours serves its socket"
    remark = f"vnet-lock: interface ua-net0 is left to the hook: {said}\n" if form == "full" else ""
    assert run("resolve", "--form", form, str(path)) == (0, path.read_text(), remark)
    code, _, err = run("start", "-c", URI, str(path))
    assert (code, "interface ua-net0: libvirt's hook has to make it" in err) == (5, True)
    with pytest.raises(Unsupported, match="ua-net0: only libvirt's hook"):
        alone(host, path.read_text())


def test_defining_takes_what_is_resolved_and_claims_nothing(host, run, write, libvirt):
    code, out, err = run("define", "-c", URI, write(ON_VF))
    assert (code, out, err) == (0, 'guest "web1" is defined: ua-net0 hostdev 0000:01:10.0\n', "")
    assert "function='0x0'" in libvirt.find("web1").read_xml()
    assert claims(host) == []


def test_starting_claims_before_libvirt_is_asked_and_leaves_the_definition(host, run, write, libvirt):
    path = write(ON_VF)
    defined = libvirt.define(Path(path).read_text().replace(ON_VF, ON_PF))
    code, out, err = run("start", "-c", URI, "web1")
    assert (code, out, err) == (0, 'guest "web1" is started: ua-net0 direct wire0\n', "")
    assert "<source dev='wire0' mode='vepa'/>" in defined.read_xml()
    assert "type='ethernet'" in defined.read_xml(inactive=True)
    (found,) = claims(host)
    assert (found.interface, found.state, found.owner.uuid) == ("ua-net0", State.ACTIVE, defined.uuid)
    assert found.owner.pid_file == f"{host.settings.libvirt_run}/qemu/web1.pid"
    assert found.combination == "vepa-macvlan-tap"


def test_a_guest_that_runs_already_is_not_touched(host, run, write, libvirt):
    libvirt.define(GUEST.format(ON_PF)).start()
    code, _, err = run("start", "-c", URI, "web1")
    assert (code, err) == (1, 'vnet-lock: guest "web1" is running already\n')
    assert claims(host) == []


def test_a_guest_of_a_file_gets_the_uuid_that_its_claims_have(host, run, write, libvirt):
    assert run("start", "-c", URI, write(ON_PF))[0] == 0
    assert claims(host)[0].owner.uuid == libvirt.find("web1").uuid


def test_where_libvirt_refuses_nothing_stays_claimed(host, run, write, libvirt):
    libvirt.define(GUEST.format(ON_PF))  # another UUID than the file will get
    code, _, err = run("start", "-c", URI, write(ON_PF))
    assert code == 1
    assert "already exists with uuid" in err
    assert claims(host) == []


def test_what_the_hook_is_to_make_takes_the_hook(host, run, write, libvirt):
    code, _, err = run("start", "--form=late", "-c", URI, write(ON_PF))
    assert code == 5
    assert err == (
        "vnet-lock: interface ua-net0: libvirt's hook has to make it, which isn't there; run: vnet-lock"
        " hooks install\n"
    )
    assert claims(host) == []


def test_what_the_hook_could_not_have_is_refused_before_libvirt_is_asked(host, run, write):
    host.add_process(50)
    whole = Claim(
        Resource.nic("wire0"), Mode.EXCLUSIVE, State.ACTIVE, host.owner(50, "other"), "a" * 16, "n", 0.0
    )
    host.claim(whole)
    code, _, err = run("start", "--form=late", "-c", URI, write(ON_PF))
    assert code == 4
    assert err.startswith("vnet-lock: ua-net0: device wire0 is held by qemu")


def test_a_hook_that_the_daemon_does_not_know_makes_nothing_and_ends_no_claim(host, write, plug):
    """It looks for hooks when it starts and when it is told to; nothing would be given back by them."""
    install(host.settings)
    build(host.root, {"proc/stat": f"btime {int(time.time()) - 10_000}\n"})
    with locked(Path(host.settings.libvirt_run) / "qemu/driver.pid") as pid:
        daemon = host.add_process(pid, "libvirtd")
        code, _, err = plug("start", "--form=late", write(ON_PF))
        assert code == 5
        assert err == (
            "vnet-lock: interface ua-net0: libvirt's hook has to make it, which isn't known to libvirtd (pid"
            f" {pid}) yet; run: systemctl reload libvirtd\n"
        )
        assert plug("attach", "web1", *WORDS)[0] == 0
        assert {claim.owner.process for claim in claims(host)} == {Process(os.getpid(), START_TICKS)}
        Path(host.settings.looked_path(pid)).touch()
        assert plug("attach", "web1", *WORDS)[0] == 0
        assert {claim.owner.process for claim in claims(host)} == {daemon}


@pytest.mark.parametrize("uri", ["qemu+ssh://host/system", "qemu:///session"])
def test_a_daemon_that_is_not_this_hosts_own_is_refused(run, monkeypatch, uri):
    class NoConnection:
        def __init__(self, uri: str) -> None:
            self.uri = uri

        def close(self) -> None: ...

    monkeypatch.setattr("vnet_lock.front.libvirt_client.connection.Libvirt", NoConnection)
    code, _, err = run("start", "-c", uri, "web1")
    assert code == 5
    assert uri in err


# --- attach, detach: by hand, as libvirt's driver for tests plugs in no interfaces ------------------

WORDS = ("--mode", "veb", "--port", "sriov", "--dev", "eth0", "--protocols", "vfio")
UUID = "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1aff"


class FakeDomain:
    """A guest that has what was plugged in."""

    name, uuid = "web1", UUID

    def __init__(self) -> None:
        self.is_active = True
        self.refusal: VnetLockError | None = None
        self.devices = ["<interface type='user'><alias name='ua-net0'/></interface>"]
        self.lets_go = True

    def read_xml(self) -> str:
        return f"<domain><name>web1</name><devices>{''.join(self.devices)}</devices></domain>"

    def attach(self, xml: str) -> None:
        if self.refusal:
            raise self.refusal
        self.devices.append(xml)

    def detach_alias(self, alias: str) -> None:
        if self.lets_go:
            self.devices = [one for one in self.devices if f"'{alias}'" not in one]


class FakeLibvirt:
    """A connection to a host with one guest."""

    def __init__(self, domain: FakeDomain) -> None:
        self.domain = domain

    def __enter__(self) -> FakeLibvirt:
        return self

    def __exit__(self, *_: object) -> None: ...

    def find(self, name: str) -> FakeDomain:
        if name not in (self.domain.name, self.domain.uuid):
            raise BadInput(f'guest "{name}": Domain not found')
        return self.domain

    def listen(self, _domain: FakeDomain) -> None: ...

    def events(self, _timeout_s: float) -> Iterator[object]:
        return iter(())


@pytest.fixture
def guest() -> FakeDomain:
    return FakeDomain()


@pytest.fixture
def plug(host, guest, capsys):
    """Run attach or detach; returns its exit code, output and errors."""

    def plug(verb: str, *words: str) -> tuple[int, str, str]:
        args = parser().parse_args([verb, *words])
        perform = getattr(domains, verb)
        code = serve("vnet-lock", lambda: perform(host.settings, args, lambda _: FakeLibvirt(guest)))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return plug


def test_attaching_claims_what_is_free_and_a_second_takes_the_next(host, plug, guest):
    claim(host, host.vfs[0], 50)
    for number, vf in ((1, host.vfs[1]), (2, host.vfs[2])):
        code, out, err = plug("attach", "web1", *WORDS, "--vlan", "7")
        assert (code, err) == (0, "")
        assert out == f'interface ua-net{number} is attached to guest "web1": VF {vf.text}\n'
        (found,) = [each for each in claims(host) if each.resource == Resource.vf(vf)]
        assert (found.interface, found.state, found.vlan) == (f"ua-net{number}", State.ACTIVE, 7)
        assert (found.owner.uuid, found.combination) == (UUID, "veb-sriov-vfio")
        assert found.mac is not None
        assert f"<mac address='{found.mac}'/>" in guest.devices[-1]
    code, out, err = plug("attach", "web1", *WORDS, "--alias", "ua-third")
    assert (code, out) == (4, "")
    assert err.startswith("vnet-lock: ua-third: nothing free for veb on eth0: VF 0000:01:10.0 is held by")
    assert len(claims(host)) == 3


def test_a_private_guest_that_is_plugged_in_stays_private(host, plug):
    assert plug("attach", "web1", "--mode", "private", *WORDS[2:], "--vlan", "7")[0] == 0
    assert claims(host)[0].combination == "private-sriov-vfio"


def test_attaching_a_device_of_a_file_claims_it_before(host, plug, guest, tmp_path):
    claim(host, host.vfs[0], 50)
    path = tmp_path / "device.xml"
    text = (
        "<?xml version='1.0'?><interface type='hostdev' managed='yes'><mac address='52:54:00:00:00:09'/>"
        "<source><address type='pci' bus='1' slot='16' function='{}'/></source></interface>"
    )
    path.write_text(text.format(0))
    code, out, err = plug("attach", "web1", str(path))
    assert (code, out) == (4, "")
    assert "VF 0000:01:10.0 is held by qemu" in err
    assert len(guest.devices) == 1
    path.write_text("\ufeff" + text.format(2))
    assert plug("attach", "web1", str(path))[:2] == (
        0, 'interface 52:54:00:00:00:09 is attached to guest "web1": VF 0000:01:10.2\n',
    )  # fmt: skip
    assert guest.devices[1:] == [text.format(2).partition("?>")[2]]


def test_a_file_without_a_mac_gets_one_by_which_its_claim_is_given_back(host, plug, guest, tmp_path):
    path = tmp_path / "device.xml"
    path.write_text(
        "<!-- a tap -->\n<interface type='direct'>\n  <source dev='wire0' mode='vepa'/>\n</interface>\n"
    )
    for _ in range(2):
        assert plug("attach", "web1", str(path))[0] == 0
    kept, gone = (re.findall("mac address='(.*?)'", device)[0] for device in guest.devices[1:])
    assert {claim.mac for claim in claims(host)} == {kept, gone}
    assert guest.devices[1] == (
        f"<!-- a tap -->\n<interface type='direct'>\n  <mac address='{kept}'/>\n"
        "  <source dev='wire0' mode='vepa'/>\n</interface>\n"
    )
    guest.devices[1:] = [
        one.replace("</interface>", f"<alias name='net{number}'/></interface>")
        for number, one in enumerate(guest.devices[1:])
    ]
    assert plug("detach", "web1", "net1")[0] == 0
    assert [claim.mac for claim in claims(host)] == [kept]


def test_a_vf_is_teamed_with_an_interface_of_the_guest(host, plug, guest):
    guest.devices.append(
        "<interface type='user'><mac address='52:54:00:00:00:AB'/><alias name='ua-s'/></interface>"
    )
    code, _, err = plug("attach", "web1", *WORDS, "--teaming", "ua-s")
    assert (code, err) == (0, "")
    assert "<teaming type='transient' persistent='ua-s'/>" in guest.devices[-1]
    assert "<mac address='52:54:00:00:00:ab'/>" in guest.devices[-1]
    assert claims(host)[0].mac == "52:54:00:00:00:ab"
    assert plug("attach", "web1", *WORDS, "--teaming", "ua-none")[0] == 2
    code, _, err = plug("attach", "web1", *WORDS, "--teaming", "ua-s", "--mac", "52:54:00:00:00:01")
    assert (code, "leave --mac out" in err) == (2, True)
    assert plug("attach", "web1", *WORDS[:-1], "tap", "--teaming", "ua-s")[0] == 2


@pytest.mark.parametrize("text", ["", "<interface/><interface/>", "<disk/>", "<interface"])
def test_a_file_without_one_device_is_refused(plug, tmp_path, text):
    path = tmp_path / "device.xml"
    path.write_text(text)
    assert plug("attach", "web1", str(path))[:2] == (2, "")


def test_where_libvirt_refuses_a_device_nothing_stays_claimed(host, plug, guest):
    guest.refusal = Unsupported('guest "web1": no more available PCI slots')
    code, out, err = plug("attach", "web1", *WORDS)
    assert (code, out) == (5, "")
    assert err == 'vnet-lock: interface ua-net1: guest "web1": no more available PCI slots\n'
    assert claims(host) == []


def test_where_the_daemon_is_lost_the_claim_stays_with_the_guest(host, plug, guest):
    """It may have plugged the device in."""
    guest.refusal = Disconnected("libvirt is gone")
    assert plug("attach", "web1", *WORDS)[0] == 1
    (found,) = claims(host)
    assert (found.state, found.owner.pid_file) == (State.ACTIVE, f"{host.settings.libvirt_run}/qemu/web1.pid")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("nobody", *WORDS), 2, "nobody"),
        (("web1",), 2, "--mode and --dev"),
        (("web1", *WORDS, "--alias", "ua-net0"), 2, "has an interface ua-net0 already"),
        (("web1", *WORDS[:-1], "socket"), 5, "socket"),
    ],
)
def test_what_cannot_be_attached_is_said(host, plug, words, code, said):
    found = plug("attach", *words)
    assert found[:2] == (code, "")
    assert said in found[2]
    assert claims(host) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--mode", "private"), ("--dev", "eth0"), ("--pool", "a"), ("--port", "sriov"), ("--ip", "192.0.2.7"),
        ("--vlan", "42"), ("--mac", "junk"), ("--queues", "2"), ("--protocols", "tap"), ("--dhcp", "on"),
        ("--alias", "ua-mine"), ("--teaming", "ua-net0"), ("--form", "late"), ("--form", "full"),
    ],
)  # fmt: skip
def test_a_file_and_words_beside_it_are_refused(host, plug, guest, tmp_path, words):
    path = tmp_path / "device.xml"
    path.write_text(PLAIN.format(0, ""))
    code, _, err = plug("attach", "web1", str(path), *words)
    assert (code, err) == (2, "vnet-lock: attach takes a FILE.xml, or --mode and --dev, not both\n")
    assert (len(guest.devices), claims(host)) == (1, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("start", "/nonexist.xml"), "cannot read /nonexist.xml: No such file or directory"),
        (("start", "{bad}"), "{bad}: "),
        (("define", "{bad}"), "{bad}: "),
        (("resolve", "{bad}"), "{bad}: "),
        (("attach", "web1", "/nonexist.xml"), "cannot read /nonexist.xml"),
        (("attach", "web1", "{bad}"), "{bad}: "),
        (("attach", "web1"), "attach needs a file, or --mode and --dev"),
        (("attach", "web1", "--mode", "veb", "--port", "foo"), '--mode=veb has no port "foo"'),
        (("attach", "web1", *WORDS[:-1], "tap", "--teaming", "ua-s"), "--teaming is for a VF"),
    ],
)
def test_what_is_said_is_read_before_libvirt_is_asked(host, capsys, tmp_path, words, said):
    bad = tmp_path / "bad.xml"
    bad.write_text("<domain")
    args = parser().parse_args([word.format(bad=bad) for word in words])

    def connect(uri: str | None) -> Libvirt:
        raise Disconnected(f"libvirt at {uri}: Failed to connect socket")

    more = () if args.verb == "resolve" else (connect,)
    perform = getattr(domains, args.verb)
    assert serve("vnet-lock", lambda: perform(host.settings, args, *more)) == 2
    assert capsys.readouterr().err.startswith(f"vnet-lock: {said.format(bad=bad)}")


def test_nothing_is_attached_to_a_guest_that_does_not_run(plug, guest):
    guest.is_active = False
    code, _, err = plug("attach", "web1", *WORDS)
    assert (code, "isn't running" in err) == (1, True)


def test_detaching_gives_back_what_that_interface_had_and_no_more(host, plug, guest):
    for _ in range(2):
        assert plug("attach", "web1", *WORDS)[0] == 0
    assert plug("detach", "web1", "ua-net1") == (
        0, 'interface ua-net1 is detached from guest "web1"\n', "",
    )  # fmt: skip
    assert len(guest.devices) == 2
    assert [each.interface for each in claims(host)] == ["ua-net2"]
    code, _, err = plug("detach", "web1", "ua-net1")
    assert (code, 'guest "web1" has no interface ua-net1' in err) == (2, True)


def test_detaching_what_libvirt_has_lost_gives_back_its_claim(host, plug, guest):
    assert plug("attach", "web1", *WORDS)[0] == 0
    guest.devices.pop()
    assert plug("detach", "web1", "ua-net1")[0] == 0
    assert claims(host) == []


USB = "<hostdev type='usb'><source><vendor id='1'/></source><alias name='hostdev0'/></hostdev>"
PLAIN = (
    "<hostdev mode='subsystem' type='pci' managed='yes'><source><address bus='1' slot='16' function='{}'/>"
    "</source>{}</hostdev>"
)
TEAM = (
    "<interface type='user'><mac address='52:54:00:00:00:09'/><alias name='net0'/></interface>",
    (
        "<interface type='hostdev' managed='yes'><mac address='52:54:00:00:00:09'/><source><address"
        " type='pci' bus='1' slot='16' function='0'/></source><alias name='hostdev0'/></interface>"
    ),
)


def start_by_hook(host: FakeHost, guest: FakeDomain, *devices: str) -> None:
    """The guest runs with these devices, which libvirt's hook has claimed."""
    guest.devices = list(devices)
    host.add_process(60, "libvirtd")
    session, owner = Session(host.settings), read_owner(host.settings, "web1", UUID, 60)
    session.acquire(owner, read_guest(guest.read_xml().encode()).requests)


def test_detaching_a_usb_stick_leaves_the_vf_claimed_whose_claim_has_its_alias(host, plug, guest):
    start_by_hook(host, guest, USB, PLAIN.format(0, "<alias name='hostdev1'/>"))
    assert [each.interface for each in claims(host)] == ["hostdev0"]
    assert plug("detach", "web1", "hostdev0")[0] == 0
    assert len(guest.devices) == 1
    assert [each.state for each in claims(host)] == [State.ACTIVE]
    # The stick is gone, and its alias is still none of the VF's.
    code, _, err = plug("detach", "web1", "hostdev0")
    assert (code, "has no interface hostdev0" in err) == (2, True)
    assert [each.state for each in claims(host)] == [State.ACTIVE]


def test_detaching_a_vf_gives_back_its_claim_whatever_that_is_called(host, plug, guest):
    start_by_hook(host, guest, USB, PLAIN.format(0, "<alias name='hostdev1'/>"))
    assert plug("detach", "web1", "hostdev1")[0] == 0
    assert guest.devices == [USB]
    assert claims(host) == []


@pytest.mark.parametrize(("alias", "left"), [("net0", 1), ("hostdev0", 0)])
def test_of_a_team_with_one_mac_only_the_vf_has_the_vfs_claim(host, plug, guest, alias, left):
    start_by_hook(host, guest, *TEAM)
    assert plug("detach", "web1", alias)[0] == 0
    assert [each.state for each in claims(host)] == [State.ACTIVE] * left


@pytest.mark.parametrize("gone", [0, 1])
def test_of_two_hostdevs_of_files_each_gives_back_its_own(host, plug, guest, tmp_path, gone):
    path = tmp_path / "device.xml"
    for function in (0, 2):
        path.write_text(PLAIN.format(function, ""))
        assert plug("attach", "web1", str(path))[0] == 0
    # As libvirt has them from now on.
    guest.devices = [PLAIN.format(2 * n, f"<alias name='hostdev{n}'/>") for n in (0, 1)]
    assert plug("detach", "web1", f"hostdev{gone}")[0] == 0
    (found,) = claims(host)
    assert (found.resource, found.state) == (Resource.vf(host.vfs[1 - gone]), State.ACTIVE)


def test_a_whole_device_is_given_back_whatever_its_claim_was_made_for(host, plug, guest):
    text = "<interface type='direct'>{}<source dev='wire0' mode='passthrough'/>{}</interface>"
    start_by_hook(host, guest, text.format("", ""))
    guest.devices = [text.format("<mac address='52:54:00:00:00:01'/>", "<alias name='net0'/>")]
    assert plug("detach", "web1", "net0")[0] == 0
    assert claims(host) == []


def test_of_two_macvtaps_on_one_device_each_gives_back_its_own(host, plug, guest):
    text = (
        "<interface type='direct'><mac address='52:54:00:00:00:0{0}'/><source dev='wire0' mode='vepa'/>"
        "<alias name='net{0}'/></interface>"
    )
    start_by_hook(host, guest, text.format(1), text.format(2))
    assert plug("detach", "web1", "net1")[0] == 0
    assert [each.mac for each in claims(host)] == ["52:54:00:00:00:02"]


def test_detaching_a_late_interface_gives_back_what_was_made_for_it(host, plug, guest):
    guest.devices = ["<interface type='ethernet'><alias name='ua-net1'/></interface>", USB]
    host.add_process(60, "libvirtd")
    owner = read_owner(host.settings, "web1", UUID, 60)
    wire0 = Resource.nic("wire0")
    for token, key in (("a" * 16, "ua-net1"), ("b" * 16, "hostdev0")):
        host.claim(Claim(wire0, Mode.SHARED, State.ACTIVE, owner, token, key, 0.0))
    assert plug("detach", "web1", "ua-net1")[0] == 0
    assert [each.interface for each in claims(host)] == ["hostdev0"]


def test_what_libvirt_has_lost_is_given_back_by_its_mac_too(host, plug, guest):
    """Its alias was libvirt's own, and tells nothing any more."""
    start_by_hook(host, guest, *TEAM)
    guest.devices = []
    assert plug("detach", "web1", "52:54:00:00:00:09".upper())[0] == 0
    assert claims(host) == []


def test_what_comes_back_while_it_is_detached_stays_claimed(host, plug, guest):
    start_by_hook(host, guest, PLAIN.format(0, "<alias name='hostdev0'/>"))

    def detach_alias(_alias: str) -> None:
        guest.devices = [PLAIN.format(0, "<alias name='hostdev1'/>")]

    guest.detach_alias = detach_alias
    assert plug("detach", "web1", "hostdev0")[0] == 0
    assert [each.state for each in claims(host)] == [State.ACTIVE]


def test_a_guest_that_ends_right_after_it_was_attached_to_keeps_nothing(host, plug, guest):
    """Its `release` finds a claim that lives by the command still, and leaves it alone."""
    install(host.settings)
    attach = guest.attach
    with locked(Path(host.settings.libvirt_run) / "qemu/driver.pid") as pid:
        host.add_process(pid, "libvirtd")
        Path(host.settings.looked_path(pid)).touch()

        def attach_and_end(xml: str) -> None:
            attach(xml)
            guest.is_active = False
            Session(host.settings).release(read_owner(host.settings, "web1", UUID, pid))

        guest.attach = attach_and_end
        assert plug("attach", "web1", *WORDS)[0] == 0
        assert claims(host) == []


def test_an_empty_word_detaches_nothing(host, plug, guest):
    start_by_hook(host, guest, PLAIN.format(0, "<alias name='hostdev0'/>"))
    code, _, err = plug("detach", "web1", "")
    assert (code, err) == (
        2, "vnet-lock: '' is no alias and no MAC address of an interface; see: virsh dumpxml web1\n",
    )  # fmt: skip
    assert len(guest.devices) == 1
    assert [each.state for each in claims(host)] == [State.ACTIVE]


def test_a_mac_that_several_interfaces_have_detaches_none_and_names_them(host, plug, guest):
    start_by_hook(host, guest, *TEAM)
    code, _, err = plug("detach", "web1", "52:54:00:00:00:09")
    assert code == 2
    assert err == (
        'vnet-lock: guest "web1" has several interfaces 52:54:00:00:00:09; name one by its alias: net0,'
        " hostdev0\n"
    )
    assert guest.devices == list(TEAM)
    assert [each.state for each in claims(host)] == [State.ACTIVE]


def test_of_two_aliases_that_differ_in_case_the_one_that_is_named_is_detached(plug, guest):
    guest.devices = [f"<interface type='user'><alias name='{one}'/></interface>" for one in ("ua-A", "ua-a")]
    left = guest.devices[:1]
    assert plug("detach", "web1", "ua-a")[0] == 0
    assert guest.devices == left


def test_a_guest_that_ends_meanwhile_has_let_go_of_it(host, plug, guest):
    assert plug("attach", "web1", *WORDS)[0] == 0

    def detach_alias(_alias: str) -> None:
        guest.is_active = False  # its definition has the interface still

    guest.detach_alias = detach_alias
    assert plug("detach", "web1", "ua-net1")[0] == 0
    assert claims(host) == []


def test_what_a_guest_does_not_let_go_of_stays_claimed(host, plug, guest):
    assert plug("attach", "web1", *WORDS)[0] == 0
    guest.lets_go = False
    code, _, err = plug("detach", "web1", "ua-net1", "--timeout", "1")
    assert (code, "it stays claimed" in err) == (1, True)
    assert [each.interface for each in claims(host)] == ["ua-net1"]


# --- without libvirt's daemon ---------------------------------------------------------------------


def alone(host: FakeHost, text: str) -> tuple[str, tuple[Request, ...]]:
    """A guest as vnet-qemu GUEST.xml gives it to libvirt, and what it claims for it."""
    xml, requests = resolve_alone(Session(host.settings), text.encode(), host.owner(os.getpid()))
    return xml.decode(), requests


def test_without_a_daemon_a_macvtap_is_ours_and_has_the_guests_mac(host):
    xml, (intent,) = alone(host, GUEST.format(ON_PF))
    assert (intent.ifname, intent.mac) == ("web1-net0", "52:54:00:00:00:01")
    assert "<target dev='web1-net0' managed='no'/>" in xml
    # libvirt would make up another one.
    xml, (intent,) = alone(host, GUEST.format(ON_PF).replace("<mac address='52:54:00:00:00:01'/>", ""))
    assert re.findall("mac address=.([0-9a-f:]*)", xml) == [intent.mac]


def test_without_a_daemon_a_macvtap_has_no_name_that_libvirt_made_up(host):
    running = GUEST.format(ON_PF).replace("type='ethernet'", "type='direct'").replace("web1-net0", "macvtap3")
    xml, (intent,) = alone(host, running.replace("<model", "<source dev='wire0' mode='vepa'/><model"))
    assert intent.ifname == "web1-net0"
    assert "macvtap3" not in xml


def test_without_a_daemon_the_best_of_several_backends_is_had(host):
    mixed = ON_VF.replace('"vfio"', '"vfio tap"').replace(' vlan="42"', "")
    xml, (fixed,) = alone(host, GUEST.format(mixed))
    assert isinstance(fixed, Fixed)
    assert "<interface type='hostdev'" in xml
    on_wire = '<vnet:interface alias="ua-net0" policy="vepa" dev="wire0" backends="vfio tap"/>'
    xml, (intent,) = alone(host, GUEST.format(on_wire))
    assert intent.backends == (Backend.TAP,)
    assert "<target dev='web1-net0' managed='no'/>" in xml
