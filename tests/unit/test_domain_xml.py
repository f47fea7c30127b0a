"""What a libvirt guest's XML says, and which documents are refused."""

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from lxml import etree

from vnet_lock.combination import Backend, Policy, Port, backends_of, ports_of
from vnet_lock.domain_document import NAMESPACE, SIZE_LIMIT_BYTES, read_identity
from vnet_lock.domain_xml import read_guest, read_wishes
from vnet_lock.errors import BadInput, Unsupported, VnetLockError
from vnet_lock.model import PciAddress
from vnet_lock.request import Fixed, Form, Intent

XML = Path(__file__).parents[2] / "xml"
EXAMPLES = sorted(XML.glob("*.xml"))
UUID = "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1aff"
ETHERNET = """<interface type='ethernet'><mac address='52:54:00:AA:00:01'/>
  <target dev='g-net0' managed='no'/><alias name='ua-net0'/></interface>"""
INTENT = '<vnet:interface alias="ua-net0" policy="vepa" dev="eth0"/>'


def domain(devices: str = "", intents: str | None = None, head: str = "") -> bytes:
    metadata = (
        ""
        if intents is None
        else f'<metadata><vnet:guest xmlns:vnet="{NAMESPACE}">{intents}</vnet:guest></metadata>'
    )
    return (
        f"{head}<domain type='kvm'><name>g</name><uuid>{UUID}</uuid>{metadata}"
        f"<devices>{devices}</devices></domain>"
    ).encode()


def hostdev(address: str) -> str:
    return f"<hostdev mode='subsystem' type='pci'><source><address {address}/></source></hostdev>"


def one_line(caught: pytest.ExceptionInfo[VnetLockError]) -> str:
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- the examples -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_fits_our_schema(path: Path) -> None:
    schema = etree.RelaxNG(etree.parse(XML / "vnet-guest.rng"))
    for guest in etree.parse(path).iter(f"{{{NAMESPACE}}}guest"):
        assert schema.validate(guest), schema.error_log


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_fits_libvirts_schema(path: Path) -> None:
    if not shutil.which("virt-xml-validate"):
        pytest.skip("needs virt-xml-validate, of the package libvirt-clients")
    done = subprocess.run(["virt-xml-validate", path, "domain"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tag", ["0", "4095", "x", "9" * 5000])
def test_a_vlan_of_libvirts_own_that_is_none_is_libvirts_to_refuse(tag: str) -> None:
    xml = (XML / "hostdev-interface.xml").read_text()
    assert '<tag id="42"' in xml.replace("'", '"')
    (found,) = read_guest(xml.replace("42", tag).encode()).requests
    assert isinstance(found, Fixed)
    assert found.vlan is None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_read(path: Path) -> None:
    guest = read_guest(path.read_bytes())
    assert guest.name.startswith("web")
    assert bool(guest.requests) == (path.name not in ("network.xml", "no-device.xml"))


def example(name: str) -> list[Fixed | Intent]:
    return list(read_guest((XML / name).read_bytes()).requests)


def test_the_examples_of_fixed_devices_ask_for_just_these() -> None:
    vf0, vf2 = PciAddress.parse("01:10.0"), PciAddress.parse("01:10.2")
    assert example("hostdev-interface.xml") == [
        Fixed("52:54:00:6b:01:01", vf0, Form.HOSTDEV, "52:54:00:6b:01:01", vlan=42)
    ]
    assert example("hostdev-device.xml") == [
        Fixed("hostdev0", vf0, Form.HOSTDEV, is_interface=False),
        Fixed("hostdev1", vf2, Form.HOSTDEV, is_interface=False),
    ]
    assert [(item.device, item.form) for item in example("direct.xml") if isinstance(item, Fixed)] == [
        ("enp1s0", Form.VEPA),
        ("enp1s0", Form.BRIDGE),
        ("enp2s0", Form.PRIVATE),
        ("enp1s0v0", Form.PASSTHRU),
    ]


def test_the_examples_of_intents_ask_for_just_these() -> None:
    taps = (Backend.TAP_VHOST, Backend.TAP)
    assert example("intent-vepa.xml") == [
        Intent("ua-net0", Policy.VEPA, ("enp1s0",), (), taps, "52:54:00:6b:06:01", ifname="web6-net0")
    ]
    first, second, named = example("intent-sriov.xml")
    assert isinstance(first, Intent)
    assert isinstance(second, Intent)
    assert isinstance(named, Intent)
    assert (first.devs, first.ports, first.vlan) == (("enp1s0f0", "enp1s0f1"), (Port.SRIOV,), 42)
    assert second.devs == ("enp1s0f1", "enp1s0f0")
    assert (named.policy, named.devs, named.queues) == (Policy.PRIVATE, ("0000:01:10.4",), 4)
    (routed,) = example("intent-route.xml")
    assert isinstance(routed, Intent)
    assert (routed.policy, routed.devs, routed.backends) == (Policy.ROUTE, ("enp1s0",), taps)
    assert routed.addresses == ("192.0.2.7", "2001:db8::7")
    (served,) = example("intent-vhostuser.xml")
    assert isinstance(served, Intent)
    assert (served.backends, served.socket) == ((Backend.SOCKET_VHOST,), "/run/vnet-lock/web14-net0.sock")
    (nat,) = example("intent-nat.xml")
    assert isinstance(nat, Intent)
    assert (nat.policy, nat.devs, nat.backends, nat.dhcp) == (Policy.NAT, (), taps, True)


# --- what libvirt opens -------------------------------------------------------------------------


def test_the_address_in_the_guest_is_not_the_one_on_the_host() -> None:
    xml = domain(
        "<interface type='hostdev'><source><address bus='0xaf' slot='0x1f' function='0x7'/></source>"
        "<address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/></interface>"
    )
    assert [item.device for item in read_guest(xml).requests] == [PciAddress.parse("af:1f.7")]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("address", "pci"),
    [
        ("domain='0x10000' bus='0x01' slot='0x10' function='0x1'", "10000:01:10.1"),
        ("domain='0' bus='1' slot='16' function='1'", "0000:01:10.1"),
        ("bus='01' slot='020' function='1'", "0000:01:10.1"),
    ],
)
def test_addresses_are_read_as_libvirt_reads_them(address: str, pci: str) -> None:
    (request,) = read_guest(domain(hostdev(address))).requests
    assert isinstance(request, Fixed)
    assert str(request.device) == pci


@pytest.mark.parametrize(
    "devices",
    [
        hostdev("domain='0' bus='0x100' slot='0' function='0'"),
        hostdev("bus='1' slot='0x20' function='0'"),
        hostdev("bus='1' slot='0' function='8'"),
        hostdev("bus='one' slot='0' function='0'"),
        hostdev("bus='-1' slot='0' function='0'"),
        hostdev("slot='0' function='0'"),
        "<hostdev type='pci'><source/></hostdev>",
        "<interface type='hostdev'><source/></interface>",
        "<interface type='hostdev'/>",
        "<interface type='direct'/>",
        "<interface type='direct'><source dev='a/b'/></interface>",
        "<interface type='direct'><source dev='eth0&#10;x'/></interface>",
        "<interface type='direct'><source dev='eth0' mode='hairpin'/></interface>",
    ],
)
def test_a_device_that_cannot_be_read_is_refused(devices: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_guest(domain(devices))
    one_line(caught)


def test_direct_without_a_mode_is_vepa() -> None:
    (request,) = read_guest(domain("<interface type='direct'><source dev='eth0'/></interface>")).requests
    assert isinstance(request, Fixed)
    assert request.form is Form.VEPA


def test_devices_that_are_none_of_ours_ask_for_nothing() -> None:
    xml = domain(
        "<interface type='bridge'><source bridge='br0'/></interface>"
        "<interface type='network'><source network='n'/></interface>"
        "<interface type='ethernet'><target dev='t0'/></interface>"
        "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/></source></hostdev>"
        "<hostdev mode='subsystem' type='mdev'><source><address uuid='x'/></source></hostdev>"
        "<hostdev mode='capabilities' type='misc'><source><char>/dev/x</char></source></hostdev>"
    )
    assert read_guest(xml).requests == ()


def test_an_interface_has_the_same_key_before_and_after_libvirt_gave_it_an_alias() -> None:
    plain = "<interface type='direct'><mac address='52:54:00:00:00:01'/><source dev='eth0'/>{}</interface>"
    keys = {
        read_guest(domain(plain.format(alias))).requests[0].interface
        for alias in ("", "<alias name='net0'/>")
    }
    assert keys == {"52:54:00:00:00:01"}


def test_two_interfaces_with_one_mac_address_have_different_keys() -> None:
    direct = "<interface type='direct'><mac address='52:54:00:00:00:01'/><source dev='eth0'/></interface>"
    requests = read_guest(domain(direct * 3)).requests
    assert len({request.interface for request in requests}) == 3


# --- intents ------------------------------------------------------------------------------------


def test_an_intent_takes_name_and_mac_from_its_interface() -> None:
    (request,) = read_guest(
        domain(
            ETHERNET,
            '<vnet:interface alias="ua-net0" policy="bridge" port="sriov macvlan" dev="eth0 0000:01:00.0"'
            ' backends="tap" vlan="7"/>',
        )
    ).requests
    assert request == Intent(
        interface="ua-net0",
        policy=Policy.VEB,
        devs=("eth0", "0000:01:00.0"),
        ports=(Port.SRIOV, Port.MACVLAN),
        backends=(Backend.TAP,),
        mac="52:54:00:aa:00:01",
        vlan=7,
        ifname="g-net0",
    )


def test_queues_come_from_the_driver_where_the_intent_says_none() -> None:
    ethernet = ETHERNET.replace("<alias", "<driver name='vhost' queues='4'/><alias")
    (request,) = read_guest(domain(ethernet, INTENT)).requests
    assert isinstance(request, Intent)
    assert request.queues == 4


@pytest.mark.parametrize(
    ("policy", "port"),
    [
        (policy, port)
        for policy in Policy
        for port in ports_of(policy)
        if Backend.TAP in backends_of(policy, port)
    ],
)
def test_libvirt_takes_every_policy_and_port_that_has_a_tap(policy: Policy, port: Port) -> None:
    ip = "192.0.2.7" if policy is Policy.ROUTE else ""
    (request,) = read_guest(domain(ETHERNET, intent(policy=policy, port=port, ip=ip))).requests
    assert isinstance(request, Intent)
    assert (request.policy, request.ports) == (policy, (port,))
    assert request.backends == (Backend.TAP_VHOST, Backend.TAP)


def test_addresses_are_read_as_the_kernel_writes_them() -> None:
    words = intent(policy="route", ip="2001:DB8:0::7 192.0.2.7 2001:db8::7", dhcp="off")
    (request,) = read_guest(domain(ETHERNET, words)).requests
    assert isinstance(request, Intent)
    assert request.addresses == ("2001:db8::7", "192.0.2.7")


def intent(**attributes: str) -> str:
    words = {"alias": "ua-net0", "policy": "vepa", "dev": "eth0", **attributes}
    return "<vnet:interface " + " ".join(f'{name}="{value}"' for name, value in words.items() if value) + "/>"


@pytest.mark.parametrize(
    ("intents", "said"),
    [
        (intent(policy="open"), "'open' is none of nat, route, veb, vepa, private"),
        (intent(policy=""), "policy"),
        (intent(port="wire"), "'wire'"),
        (intent(port="bridge"), "policy vepa has no port bridge; it has macvlan, sriov"),
        (intent(backends="tun"), "'tun'"),
        (intent(dev="a/b"), "'a/b'"),
        (intent(policy="route"), 'needs the guest\'s own address: add ip="192.0.2.7"'),
        (intent(ip="192.0.2.7"), "policy vepa takes no ip="),
        (intent(policy="route", ip="192.0.2.300"), "'192.0.2.300' is no IP address"),
        (intent(policy="route", ip="192.0.2.7/24"), "'192.0.2.7/24' is no IP address"),
        (intent(policy="route", ip="169.254.1.1"), "169.254.1.1 is link-local"),
        (intent(policy="route", ip="fe80::7"), "fe80::7 is link-local"),
        (intent(policy="route", ip="::ffff:192.0.2.7"), "is reserved"),
        (intent(policy="nat", dhcp="yes"), "dhcp 'yes' is neither on nor off"),
        (intent(dhcp="on"), "policy vepa has no DHCP server"),
        (intent(pool="fabric-a"), "dev= and pool= exclude each other"),
        (
            intent(backends="vfio"),
            "it is plugged in later, so no <interface> of the definition has its alias",
        ),
        (intent(teaming="ua-net0"), 'no <interface> with <alias name="ua-net0"/> has <teaming'),
        (intent(alias="ua-net1", backends="vfio", ip="192.0.2.7"), "takes no ip="),
        (intent(alias="ua-net1", backends="vfio", queues="2"), "takes no queues="),
        (intent(vlan="0"), "1 to 4094"),
        (intent(vlan="4095"), "1 to 4094"),
        (intent(vlan="x"), "1 to 4094"),
        (intent(queues="0"), "1 to 256"),
        (intent(queues="257"), "1 to 256"),
        (intent(mtu="9000"), "mtu is unknown"),
        ("<interface alias='ua-net0' policy='veb'/>", "it is of no namespace"),
        (intent(**{"vnet:policy": "vepa"}), "unknown"),
        (intent(alias="ua-net9"), "ua-net9: no <interface>"),
        (INTENT + INTENT, "twice"),
    ],
)
def test_a_wrong_intent_is_refused_and_names_its_interface(intents: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_guest(domain(ETHERNET, intents))
    assert said in one_line(caught)
    assert str(caught.value).startswith("interface ua-net")


@pytest.mark.parametrize(
    "intents",
    [
        intent(alias=""),
        intent(alias="net0"),
        intent(alias="ua-&#10;x"),
        "<vnet:bridge/>",
        '<interface alias="ua-net0"/>',
        '<vnet:interface alias="ua-net0" policy="vepa" dev="eth0"><vnet:x/></vnet:interface>',
    ],
)
def test_what_is_no_intent_at_all_is_refused(intents: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_guest(domain(ETHERNET, intents))
    one_line(caught)


@pytest.mark.parametrize(
    ("backends", "said"),
    [
        ("tap vfio", "vfio can't be one of several backends"),
        ("socket+vhost", 'use backends="tap+vhost tap"'),
        ("user", 'use backends="tap+vhost tap"'),
    ],
)
def test_a_backend_that_libvirt_takes_no_late_is_refused_with_what_to_use(backends: str, said: str) -> None:
    with pytest.raises(Unsupported) as caught:
        read_guest(domain(ETHERNET, intent(backends=backends)))
    assert said in one_line(caught)


TEAM = ETHERNET.replace("<alias", "<teaming type='persistent'/><alias")


def test_a_vf_that_is_plugged_in_has_no_interface_and_the_mac_of_its_standby() -> None:
    words = intent(alias="ua-vf0", policy="veb", backends="vfio", teaming="ua-net0", vlan="7")
    standby, vf = read_guest(domain(TEAM, INTENT + words)).requests
    assert isinstance(standby, Intent)
    assert not standby.hotplug
    assert vf == Intent(
        "ua-vf0",
        Policy.VEB,
        ("eth0",),
        (Port.SRIOV,),
        (Backend.VFIO,),
        "52:54:00:aa:00:01",
        7,
        hotplug=True,
        teaming="ua-net0",
    )
    words = intent(policy="veb", backends="vfio", mac="52:54:00:AA:00:02")
    (alone,) = read_guest(domain("", words)).requests
    assert isinstance(alone, Intent)
    assert (alone.mac, alone.hotplug) == ("52:54:00:aa:00:02", True)


PLUGGED = """<interface type='hostdev'><mac address='52:54:00:aa:00:01'/>
  <source><address bus='1' slot='16' function='0'/></source><alias name='ua-vf0'/></interface>"""


def test_a_vf_that_is_plugged_in_already_is_not_asked_for_again() -> None:
    words = intent(alias="ua-vf0", policy="veb", backends="vfio", teaming="ua-net0")
    (fixed,) = read_guest(domain(TEAM + PLUGGED, words)).requests
    assert isinstance(fixed, Fixed)
    assert (fixed.interface, fixed.policy) == ("ua-vf0", Policy.VEB)


RESOLVED = {
    "direct": "<interface type='direct'><source dev='eth0' mode='vepa'/><alias name='ua-net0'/></interface>",
    "hostdev": PLUGGED.replace("ua-vf0", "ua-net0"),
    "bridge": "<interface type='bridge'><source bridge='br0'/><alias name='ua-net0'/></interface>",
    "user": "<interface type='user'><alias name='ua-net0'/></interface>",
    "pci": """<hostdev mode='subsystem' type='pci'><source><address bus='1' slot='0' function='0'/></source>
      <alias name='ua-net0'/></hostdev>""",
}


@pytest.mark.parametrize(
    ("form", "policy"),
    [("direct", "vepa"), ("hostdev", "private"), ("bridge", "veb"), ("user", "nat"), ("pci", "private")],
)
def test_an_interface_that_is_resolved_already_is_libvirts_to_open(form: str, policy: str) -> None:
    requests = read_guest(domain(RESOLVED[form], intent(policy=policy, backends="vfio tap"))).requests
    assert not [one for one in requests if isinstance(one, Intent)]
    assert [one.interface for one in requests] == ([] if form in ("bridge", "user") else ["ua-net0"])


@pytest.mark.parametrize(
    ("form", "policy"), [("bridge", "vepa"), ("user", "veb"), ("direct", "veb"), ("hostdev", "nat")]
)
def test_an_interface_that_is_resolved_to_something_else_than_its_intent_is_refused(form, policy) -> None:
    with pytest.raises(BadInput, match=rf"interface ua-net0: .* no {policy}; .*vnet-lock resolve"):
        read_guest(domain(RESOLVED[form], intent(policy=policy)))


@pytest.mark.parametrize("kind", ["network", "mcast", "ethernet"])
def test_who_writes_interfaces_anew_may_find_any_form_or_none(kind: str) -> None:
    xml = domain(f"<interface type='{kind}'><alias name='ua-net0'/></interface>", INTENT)
    _, (wish,) = read_wishes(xml)
    assert (wish.kind, wish.is_resolved, wish.intent.backends) == (kind, kind != "ethernet", ())
    guest, (wish,) = read_wishes(domain(PLUGGED, INTENT))
    assert [one.interface for one in guest.requests] == ["ua-vf0"]
    assert (wish.kind, wish.is_resolved) == ("", False)


VHOST_USER = """<interface type='vhostuser'><mac address='52:54:00:aa:00:01'/>
  <source type='unix' path='/run/vnet-lock/g.sock' mode='client'/><alias name='ua-net0'/></interface>"""
SHARED = b"<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"


def vhost_user(devices: str = VHOST_USER, wish: str = INTENT, memory: bytes = SHARED) -> bytes:
    return domain(devices, wish).replace(b"<devices>", memory + b"<devices>")


def test_a_vhostuser_interface_takes_a_socket_that_vhost_serves() -> None:
    (found,) = read_guest(vhost_user()).requests
    assert isinstance(found, Intent)
    assert (found.backends, found.socket) == ((Backend.SOCKET_VHOST,), "/run/vnet-lock/g.sock")
    numa = b"<cpu><numa><cell id='0' memAccess='shared'/></numa></cpu>"
    assert read_guest(vhost_user(memory=numa)).requests == (found,)
    assert read_guest(domain(VHOST_USER)).requests == ()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (vhost_user(memory=b""), BadInput, "ua-net0: .* memory shared: add <memoryBacking>"),
        (
            vhost_user(memory=SHARED + b"<cpu><numa><cell id='0' memAccess='private'/></numa></cpu>"),
            BadInput,
            "shared",
        ),
        (
            vhost_user(VHOST_USER.replace("client", "server")),
            BadInput,
            "needs <source type='unix' .* mode='client'/>",
        ),
        (
            vhost_user(wish=intent(backends="tap")),
            Unsupported,
            r'no backend tap late; use backends="socket\+vhost"',
        ),
        (vhost_user(wish=intent(policy="route", ip="192.0.2.7", port="none")), Unsupported, "no combination"),
    ],
)
def test_a_vhostuser_interface_that_can_not_be_served_is_refused(
    given: bytes, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        read_guest(given)


def test_a_port_without_any_tap_is_refused() -> None:
    with pytest.raises(Unsupported):
        read_guest(domain(ETHERNET, intent(policy="private", port="physdev")))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("type='ethernet'", "type='bridge'", "<interface type='ethernet'>"),
        ("managed='no'", "managed='yes'", "managed='no'"),
        (" managed='no'", "", "managed='no'"),
        ("<target dev='g-net0' managed='no'/>", "", "managed='no'"),
        ("g-net0", "vnet7", "libvirt keeps names"),
        ("g-net0", "macvtap0", "libvirt keeps names"),
        ("g-net0", "macvlan0", "libvirt keeps names"),
        ("g-net0", "sixteen-letters-", "15 characters"),
        ("52:54:00:AA:00:01", "52:54:00:AA:00", "no MAC address"),
    ],
)
def test_an_interface_that_cannot_take_a_made_device_is_refused(old: str, new: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_guest(domain(ETHERNET.replace(old, new), INTENT))
    assert said in one_line(caught)
    assert "ua-net0" in str(caught.value)


def test_two_interfaces_cannot_have_one_target() -> None:
    other = ETHERNET.replace("ua-net0", "ua-net1")
    with pytest.raises(BadInput, match=r"ua-net1.*'g-net0'"):
        read_guest(domain(ETHERNET + other, INTENT + intent(alias="ua-net1")))


def test_an_intent_of_a_later_version_is_refused_not_ignored() -> None:
    xml = domain(ETHERNET, INTENT).replace(b"guest:1", b"guest:2")
    with pytest.raises(BadInput, match="guest:1"):
        read_guest(xml)


def test_metadata_of_others_is_left_alone() -> None:
    xml = domain(ETHERNET).replace(
        b"<devices>", b'<metadata><x:y xmlns:x="urn:x"><![CDATA[<!DOCTYPE html>]]></x:y></metadata><devices>'
    )
    assert read_guest(xml).requests == ()


def test_a_name_has_all_its_blanks_as_libvirts_own_files_have_it() -> None:
    assert read_identity(b"<domain><name> web1 </name></domain>")[0] == " web1 "
    for name in ("", " ", "a\n", "a/b"):
        with pytest.raises(BadInput, match="no name of a guest"):
            read_identity(f"<domain><name>{name}</name></domain>".encode())


def test_a_guest_with_a_wrong_intent_still_has_a_name_and_a_uuid() -> None:
    assert read_identity(domain(ETHERNET, intent(policy="open"))) == ("g", UUID)


# --- documents that are refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    "xml",
    [
        b"",
        b" \n",
        b"\0",
        b"\xff\xfe\x00",
        b"hello",
        b"<domain>",
        b"<domain><name>a</domain></name>",
        b"<domain><name>a</name></domain><domain/>",
        b"<domain><name>a&undefined;</name></domain>",
        b"<domain><name>a\xc3</name></domain>",
        b"<network><name>a</name></network>",
        b"<domain/>",
        b"<domain><name/></domain>",
        b"<domain><name>a/b</name></domain>",
        b"<domain><name>a</name><uuid>0</uuid></domain>",
        b"<domain>" + b"<a>" * 5000 + b"</a>" * 5000 + b"</domain>",
    ],
)
def test_a_malformed_document_is_refused_in_one_line(xml: bytes) -> None:
    with pytest.raises(BadInput) as caught:
        read_guest(xml)
    one_line(caught)


def test_any_doctype_is_refused() -> None:
    with pytest.raises(BadInput, match="DOCTYPE"):
        read_guest(domain(head="<!DOCTYPE domain>"))
    with pytest.raises(BadInput, match="DOCTYPE"):
        read_guest(domain(head="<!DOCTYPE domain>").decode().encode("utf-16"))


@pytest.mark.parametrize("place", ["<name>&l9;</name>", "<name a='&l9;'>a</name>"])
def test_an_entity_bomb_costs_neither_time_nor_memory(place: str) -> None:
    entities = '<!ENTITY l0 "lollollollollollollol">' + "".join(
        f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10)
    )
    started = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadInput) as caught:
        read_guest(f"<!DOCTYPE domain [{entities}]><domain>{place}</domain>".encode())
    one_line(caught)
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "document",
    [
        "<!DOCTYPE domain [<!ENTITY x SYSTEM '{}'>]><domain><name>&x;</name></domain>",
        "<!DOCTYPE domain [<!ENTITY % x SYSTEM '{}'> %x;]><domain><name>a</name></domain>",
        "<!DOCTYPE domain SYSTEM '{}'><domain><name>a</name></domain>",
        "<domain xmlns:xi='http://www.w3.org/2001/XInclude'><name><xi:include href='{}'/></name></domain>",
    ],
)
def test_nothing_outside_the_document_is_ever_opened(tmp_path: Path, document: str) -> None:
    # Opening a FIFO that nobody writes to blocks until the deadline.
    os.mkfifo(tmp_path / "outside")
    with pytest.raises(BadInput) as caught:
        read_guest(document.format((tmp_path / "outside").as_uri()).encode())
    one_line(caught)


def test_a_document_that_is_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(BadInput, match=str(SIZE_LIMIT_BYTES)):
        read_guest(b" " * (SIZE_LIMIT_BYTES + 1))


def test_a_large_guest_is_read() -> None:
    disks = "<disk type='file'><source file='/a'/></disk>" * 20000
    assert len(read_guest(domain(disks + hostdev("bus='1' slot='2' function='3'"))).requests) == 1
