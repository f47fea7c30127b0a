"""Interfaces written anew, and all else as the user wrote it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vnet_lock import domain_rewrite
from vnet_lock.domain_rewrite import InterfaceForm, rewrite
from vnet_lock.domain_xml import read_guest
from vnet_lock.errors import BadInput
from vnet_lock.model import PciAddress
from vnet_lock.request import Fixed

VF = PciAddress.parse("0000:01:10.2")
FORMS = {
    "made": domain_rewrite.made("web-net0"),
    "direct": domain_rewrite.direct("enp1s0", "vepa"),
    "passthrough": domain_rewrite.direct("enp1s0v0", "passthrough", 42),
    "queues": domain_rewrite.direct("enp1s0", "bridge", queues=4),
    "bridge": domain_rewrite.bridge("br0"),
    "user": domain_rewrite.user(passt=False),
    "passt": domain_rewrite.user(passt=True),
    "vf": domain_rewrite.vf(VF, 42),
    "team": domain_rewrite.vf(VF, teaming="ua-net1", mac="52:54:00:00:00:01"),
    "function": domain_rewrite.function(VF),
}
BEFORE = """\
<?xml version='1.0' encoding="utf-8"?>
<!-- ours, not libvirt's -->
<domain type="kvm" xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' >
  <name>web</name>
  <description>a &lt; b, <![CDATA[ <x> ]]> &#228; ä</description>
  <memory unit='MiB'>64</memory>
  <os><type>hvm</type></os>
  <devices   >
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
"""
AFTER = """\
    <x:odd xmlns:x="urn:x"  a = "1"><x:in/></x:odd>
    <console type='pty'></console>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-name'/>
  </qemu:commandline>
</domain>
<!-- the end -->
"""
INTERFACE = """\
    <interface type='ethernet'>
      <!-- the way out -->
      <mac address="52:54:00:aa:00:01" />
      <target dev='web-net0' managed='no'/>
      <model type='virtio'/>
      <boot order = '1'/>
      <odd xmlns="urn:x">kept</odd>
      <alias name='ua-net0'/>
    </interface>
"""
OTHER = INTERFACE.replace("ua-net0", "ua-net1").replace("web-net0", "web-net1")


def write(interfaces: str, **forms: InterfaceForm | None) -> str:
    """Rewrite, and return what is between BEFORE and AFTER, which must have stayed."""
    xml = f"{BEFORE}{interfaces}{AFTER}"
    text = rewrite(xml.encode(), {alias.replace("_", "-"): form for alias, form in forms.items()}).decode()
    assert text.startswith(BEFORE)
    assert text.endswith(AFTER)
    return text[len(BEFORE) : len(text) - len(AFTER)]


def test_an_interface_that_is_right_already_stays_byte_for_byte() -> None:
    assert write(INTERFACE, ua_net0=FORMS["made"]) == INTERFACE


@pytest.mark.parametrize("name", FORMS)
def test_writing_twice_changes_nothing_more(name: str) -> None:
    once = write(INTERFACE + OTHER, ua_net0=FORMS[name])
    assert write(once, ua_net0=FORMS[name]) == once


@pytest.mark.parametrize("name", FORMS)
def test_an_interface_comes_back_from_every_form(name: str) -> None:
    """But for a <hostdev>, which has no MAC address."""
    back = write(write(INTERFACE, ua_net0=FORMS[name]), ua_net0=FORMS["made"])
    if name == "function":
        assert read_guest((BEFORE + back + AFTER).encode()).requests == ()
    lines = [line for line in INTERFACE.splitlines() if name != "function" or "mac" not in line]
    if name == "queues":
        lines.append("      <driver name='vhost' queues='4'/>")
    assert sorted(back.splitlines()) == sorted(lines)


def test_what_a_form_decides_is_replaced_and_all_else_in_the_interface_stays() -> None:
    assert (
        write(INTERFACE, ua_net0=FORMS["passthrough"])
        == """\
    <interface type='direct'>
      <!-- the way out -->
      <mac address="52:54:00:aa:00:01" />
      <source dev='enp1s0v0' mode='passthrough'/>
      <vlan>
        <tag id='42'/>
      </vlan>
      <target dev='web-net0'/>
      <model type='virtio'/>
      <boot order = '1'/>
      <odd xmlns="urn:x">kept</odd>
      <alias name='ua-net0'/>
    </interface>
"""
    )


def test_another_vf_in_the_place_of_the_one_before_changes_its_address_alone() -> None:
    before = write(INTERFACE, ua_net0=FORMS["vf"])
    other = PciAddress.parse("0000:01:10.4")
    after = write(before, ua_net0=domain_rewrite.vf(other, 42))
    assert after == before.replace("function='0x2'", "function='0x4'")


def test_a_vf_is_read_back_as_what_was_written() -> None:
    text = BEFORE + write(INTERFACE, ua_net0=FORMS["team"]) + AFTER
    (fixed,) = read_guest(text.encode()).requests
    assert isinstance(fixed, Fixed)
    assert (fixed.interface, fixed.device, fixed.mac) == ("ua-net0", VF, "52:54:00:aa:00:01")


def test_what_another_type_of_interface_had_goes_and_comments_stay() -> None:
    before = """\
    <interface type='network' trustGuestRxFilters='yes'>
      <source network='default'/>
      <!-- kept -->
      <virtualport type='openvswitch'/>
      <bandwidth><inbound average='1'/></bandwidth>
      <driver name='vhost' queues='2'/>
      <alias name='ua-net0'/>
    </interface>
"""
    assert (
        write(before, ua_net0=domain_rewrite.vf(VF))
        == """\
    <interface type='hostdev' managed='yes'>
      <source>
        <address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/>
      </source>
      <!-- kept -->
      <alias name='ua-net0'/>
    </interface>
"""
    )


def test_only_the_interfaces_that_are_named_change() -> None:
    text = write(INTERFACE + OTHER, ua_net1=FORMS["bridge"])
    assert text.startswith(INTERFACE)
    assert "<source bridge='br0'/>" in text[len(INTERFACE) :]


def test_an_interface_that_is_not_there_is_added_behind_the_others() -> None:
    assert write(INTERFACE, ua_vf0=FORMS["team"]) == (
        INTERFACE
        + """\
    <interface type='hostdev' managed='yes'>
      <mac address='52:54:00:00:00:01'/>
      <source>
        <address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/>
      </source>
      <teaming type='transient' persistent='ua-net1'/>
      <alias name='ua-vf0'/>
    </interface>
"""
    )


def test_an_interface_that_is_to_have_no_form_goes() -> None:
    assert write(INTERFACE + OTHER, ua_net0=None, ua_vf0=None) == OTHER


def test_a_guest_on_one_line_stays_on_one() -> None:
    xml = "<domain><devices><interface type='user'><alias name='ua-n'/></interface></devices></domain>"
    assert rewrite(xml.encode(), {"ua-n": FORMS["direct"]}).decode() == xml.replace(
        "type='user'>", "type='direct'><source dev='enp1s0' mode='vepa'/>"
    )


def test_an_interface_written_as_one_tag_is_opened() -> None:
    xml = "<domain><devices><hostdev/></devices></domain>"
    assert rewrite(xml.encode(), {"ua-n": FORMS["user"]}).decode() == (
        "<domain><devices><interface type='user'><alias name='ua-n'/><model type='virtio'/></interface>"
        "<hostdev/></devices></domain>"
    )


def test_a_name_with_odd_letters_is_written_as_xml_wants_it() -> None:
    text = write(INTERFACE, ua_net0=domain_rewrite.bridge("b'<&ä"))
    assert "<source bridge='b&apos;&lt;&amp;&#228;'/>" in text


@pytest.mark.parametrize(
    ("xml", "said"),
    [
        (b"<domain", "guest XML: "),
        (b"<domain/>", "no <devices>"),
        (b"<domain><devices/></domain>", "no <devices>"),
        (b"<network><devices></devices></network>", "no <devices>"),
        (b"<!DOCTYPE domain><domain><devices></devices></domain>", "DOCTYPE"),
        (b"<?xml version='1.0' encoding='latin1'?><domain><devices></devices></domain>", "iconv"),
        ("<domain><devices></devices></domain>".encode("utf-16"), "iconv"),
    ],
)
def test_a_document_that_cannot_be_edited_in_its_place_is_refused(xml: bytes, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        rewrite(xml, {"ua-net0": FORMS["user"]})


@pytest.mark.parametrize("name", FORMS)
def test_every_form_fits_libvirts_schema(name: str, tmp_path: Path) -> None:
    if not shutil.which("virt-xml-validate"):
        pytest.skip("needs virt-xml-validate, of the package libvirt-clients")
    plain = INTERFACE.replace('      <odd xmlns="urn:x">kept</odd>\n', "")
    before, after = BEFORE.replace(" xmlns:qemu", " xmlns:q"), "  </devices>\n</domain>\n"
    for forms in ({"ua-net0": FORMS[name]}, {"ua-new": FORMS[name]}):
        path = tmp_path / "guest.xml"
        path.write_bytes(rewrite((before + plain + after).encode(), forms))
        argv = ["virt-xml-validate", path, "domain"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stderr}{path.read_text()}"


def test_several_devices_are_read_as_one() -> None:
    one, two = (f"<devices><interface type='user'><alias name='ua-{n}'/></interface></devices>" for n in "ab")
    forms = {"ua-b": domain_rewrite.bridge("br0"), "ua-c": domain_rewrite.bridge("br1")}
    text = rewrite(f"<domain><devices/>{one}{two}</domain>".encode(), forms).decode()
    assert [text.count(f"<interface type='{kind}'>") for kind in ("user", "bridge")] == [1, 2]
    assert text.count("name='ua-b'") == 1
