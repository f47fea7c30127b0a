"""The PF given away whole: nobody gets one of its VFs meanwhile."""

from __future__ import annotations

import pytest

from tests.lab.contenders import CONTENDERS, appearance, direct_xml, vnet_lock
from tests.lab.machines import Guests
from tests.lab.nic import Nic

pytestmark = pytest.mark.usefixtures("hook")


def test_the_vfs_are_refused_while_the_whole_pf_is_used(lab: Nic, guests: Guests) -> None:
    lab.set_numvfs(2)
    vf, netdev = lab.vfs[0], lab.vfs[0].netdev
    assert netdev
    whole = guests.libvirt("whole", direct_xml(lab.pf, "52:54:00:00:77:03"))
    looks = appearance(lab, 0)
    for kind, start in CONTENDERS.items():
        attempt = start(guests, vf, netdev, f"part-{kind}")
        assert not attempt.runs, kind
        assert "whole" in attempt.message, attempt.message
    assert appearance(lab, 0) == looks
    assert vnet_lock("vfs", lab.pf, "0").returncode == 4
    assert lab.numvfs == 2
    assert whole.state == "running"
