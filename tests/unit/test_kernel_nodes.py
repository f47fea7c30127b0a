import os
from pathlib import Path

import pytest

from tests.fake_host import FakeHost, build
from vnet_lock.errors import Unsupported, Vanished
from vnet_lock.kernel import netlink, nodes


def test_without_vhost_net_the_next_step_is_modprobe(tmp_path: Path):
    with pytest.raises(Unsupported, match="modprobe vhost_net"):
        nodes.open_vhost_net(FakeHost(tmp_path).settings)


def test_each_vhost_descriptor_is_one_of_its_own_and_stays_with_us_at_exec(tmp_path: Path):
    build(tmp_path, {"dev/vhost-net": ""})
    descriptors = nodes.open_vhost_net(FakeHost(tmp_path).settings, 3)
    try:
        assert len(set(descriptors)) == 3
        assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.parametrize("open_link", [nodes.open_tap, nodes.open_macvtap])
def test_a_link_of_another_kind_or_none_is_vanished(tmp_path: Path, open_link):
    host = FakeHost(tmp_path)
    host.nic("eth0")
    for name in ("eth0", "nix0"):
        with pytest.raises(Vanished, match=name):
            open_link(host.settings, name, 1)


def test_without_tun_a_tap_cannot_be_made(tmp_path: Path):
    with pytest.raises(Unsupported, match="modprobe tun"):
        netlink.add_tap("t0", "vnet-lock:x", settings=FakeHost(tmp_path).settings)
