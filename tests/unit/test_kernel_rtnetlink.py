"""Messages are built here by their layout in include/uapi/linux/if_link.h, not by the reader's own code."""

import struct

import pytest

from vnet_lock.errors import VnetLockError
from vnet_lock.kernel.rtnetlink import VfAdminInfo, parse_link, parse_vf_admin


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def link(*attributes: bytes) -> bytes:
    return struct.pack("=BxHiII", 0, 1, 7, 0, 0) + b"".join(attributes)


def vf_info(index: int, **more: bytes) -> bytes:
    mac = attribute(1, struct.pack("=I32s", index, bytes.fromhex("525400a1b2") + bytes([index])))
    return attribute(1 | 0x8000, mac + b"".join(more.values()))


def test_all_settings_of_a_vf_are_read():
    message = link(
        attribute(3, b"enp1s0\0"),
        attribute(
            22 | 0x8000,
            vf_info(
                0,
                vlan=attribute(2, struct.pack("=III", 0, 42, 3)),
                old_rate=attribute(3, struct.pack("=II", 0, 100)),
                spoofchk=attribute(4, struct.pack("=II", 0, 1)),
                link_state=attribute(5, struct.pack("=II", 0, 2)),
                rate=attribute(6, struct.pack("=III", 0, 10, 100)),
                trust=attribute(9, struct.pack("=II", 0, 0)),
            )
            + vf_info(1),
        ),
    )
    assert parse_vf_admin(message) == {
        0: VfAdminInfo("52:54:00:a1:b2:00", 42, 3, True, False, 2, 10, 100),
        1: VfAdminInfo("52:54:00:a1:b2:01"),
    }


def test_what_the_driver_does_not_tell_is_none():
    untold = struct.pack("=II", 0, 0xFFFFFFFF)
    message = link(attribute(22, vf_info(0, spoofchk=attribute(4, untold), trust=attribute(9, untold))))
    assert parse_vf_admin(message) == {0: VfAdminInfo("52:54:00:a1:b2:00")}


def test_the_rate_of_an_old_driver_is_the_maximum():
    message = link(attribute(22, vf_info(0, old=attribute(3, struct.pack("=II", 0, 55)))))
    assert parse_vf_admin(message)[0].max_tx_rate_mbps == 55


def test_a_link_tells_its_kind_alias_parent_and_where_its_lower_device_is():
    info = parse_link(
        link(
            attribute(3, b"mt0\0"),
            attribute(5, struct.pack("=i", 3)),
            attribute(18, attribute(1, b"macvtap\0")),
            attribute(20, b"vnet-lock:0123\0"),
            attribute(37, struct.pack("=i", 0)),
            attribute(56, b"0000:01:10.0\0"),
        )
    )
    assert (info.ifindex, info.name, info.kind, info.alias) == (7, "mt0", "macvtap", "vnet-lock:0123")
    assert (info.parent, info.link, info.link_nsid) == ("0000:01:10.0", 3, 0)


@pytest.mark.parametrize(
    ("kind", "data", "vlan"),
    [
        (b"vlan", attribute(1, struct.pack("=H", 42)) + attribute(5, b"\x81\x00"), 42),
        (b"vlan", attribute(1, struct.pack("=H", 42)) + attribute(5, b"\x88\xa8"), None),
        (b"vlan", b"", None),
        (b"macvlan", attribute(1, struct.pack("=I", 4)), None),
    ],
)
def test_a_vlan_device_tells_its_id_where_its_tags_are_8021qs(kind: bytes, data: bytes, vlan: int | None):
    info = parse_link(
        link(attribute(3, b"v42\0"), attribute(18, attribute(1, kind + b"\0") + attribute(2, data)))
    )
    assert info.vlan == vlan


@pytest.mark.parametrize(
    "message",
    [
        b"",
        link()[:-1],
        link(b"\x01"),
        link(struct.pack("=HH", 3, 22)),
        link(struct.pack("=HH", 100, 22)),
        link(attribute(22, struct.pack("=HH", 100, 1))),
        link(attribute(22, attribute(1, attribute(1, b"short")))),
        link(attribute(22, attribute(1, b""))),
        link(attribute(22, vf_info(0, vlan=attribute(2, b"\0\0\0\0")))),
    ],
)
def test_a_malformed_message_is_an_error_of_ours(message: bytes):
    with pytest.raises(VnetLockError, match="netlink"):
        parse_vf_admin(message)
