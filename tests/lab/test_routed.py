"""A libvirt guest with an address of its own: libvirt takes the link that the hook made, with vhost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.lab.contenders import HOST, late_xml, vnet_lock
from tests.lab.machines import Guests
from tests.lab.nic import Nic, run, wait_until

pytestmark = pytest.mark.usefixtures("hook")


@pytest.mark.parametrize("port", ["none", "veth+macvlan"])
def test_a_libvirt_guest_is_reached_at_its_own_address(lab: Nic, guests: Guests, port: str) -> None:
    run("ip", "address", "add", f"{HOST}/24", "dev", lab.pf)
    before = sorted(os.listdir("/sys/class/net"))
    late = guests.libvirt(
        "routed", late_xml("routed-net0", "52:54:00:00:06:01"),
        metadata=f"""<vnet:guest xmlns:vnet="urn:vnet-lock:guest:1"><vnet:interface alias="ua-net0"
            policy="route" port="{port}" dev="{lab.pf}" ip="10.7.0.3 2001:db8::3"/></vnet:guest>""",
        ip="10.7.0.3/24", ping=HOST,
    )  # fmt: skip
    assert late.console.ready()["ping"] == "3/3"
    opened = {os.readlink(path) for path in Path(f"/proc/{late.pid}/fd").iterdir() if path.is_symlink()}
    assert "/dev/vhost-net" in opened
    assert "route-" in vnet_lock("show", "ip:10.7.0.3").stdout
    # The guest has no route to what the host would be on its link, 169.254.1.1.
    run("ping", "-c", "3", "-W", "10", "-I", HOST, "10.7.0.3")
    late.destroy()
    wait_until(lambda: not os.listdir("/run/vnet-lock/claims"), "the hook gave all back")
    assert sorted(os.listdir("/sys/class/net")) == before
