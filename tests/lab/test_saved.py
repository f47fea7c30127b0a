"""Guests that are saved and come back: what they had is given back, and what is free is theirs again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.lab.contenders import CONTENDERS, HOST, appearance, intent_xml, late_xml, owner_of
from tests.lab.machines import Guests, LibvirtGuest, virsh
from tests.lab.nic import Nic

# Taps are saved and restored in the kernel ring.
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("hook")]

LINK = "saved-net0"
# Bound anew a VF is another link; everything else is to be as it was.
OF_THE_LINK = ("ifindex", "operstate", "flags")


def looks(nic: Nic) -> list[dict[str, object]]:
    found = (appearance(nic, index) for index in range(2))
    return [{key: value for key, value in one.items() if key not in OF_THE_LINK} for one in found]


def claims() -> list[str]:
    return os.listdir("/run/vnet-lock/claims")


def start(guests: Guests, nic: Nic, more: str = "") -> LibvirtGuest:
    """A guest with a macvtap on whichever VF is free."""
    made = guests.libvirt(
        "saved", late_xml(LINK, "52:54:00:00:0b:01") + more, metadata=intent_xml(nic.pf), ip="10.7.0.2/24",
        ping=HOST,
    )  # fmt: skip
    assert made.console.ready()["ping"] == "3/3"
    return made


def test_a_saved_guest_gives_its_vf_back_and_has_a_free_one_when_it_is_restored(
    lab: Nic, guests: Guests, tmp_path: Path
) -> None:
    lab.set_numvfs(2)
    lab.set_address(f"{HOST}/24")
    before = looks(lab)
    made, saved = start(guests, lab), str(tmp_path / "saved.state")
    virsh("save", made.uuid, saved)
    assert claims() == []
    assert looks(lab) == before
    first = CONTENDERS["vfio"](guests, lab.vfs[0], "", "first")
    assert first.runs, first.message
    virsh("restore", saved)
    assert [owner_of(vf) for vf in lab.vfs] == ["first", "saved"]
    assert made.console.ask(f"ping {HOST}")["ping"] == "3/3"
    virsh("save", made.uuid, saved)
    second = CONTENDERS["vfio"](guests, lab.vfs[1], "", "second")
    assert second.runs, second.message
    refused = virsh("restore", saved, check=False)
    assert refused.returncode != 0
    assert "held by" in refused.stderr
    assert [owner_of(vf) for vf in lab.vfs] == ["first", "second"]
    second.end()
    # Where libvirt finds no file it asks no hook.
    Path(saved).rename(saved + ".whole")
    assert virsh("restore", saved, check=False).returncode != 0
    virsh("restore", saved + ".whole")
    assert made.console.ask(f"ping {HOST}")["ping"] == "3/3"
    made.destroy()
    first.end()
    assert claims() == []


def test_a_guest_with_a_managed_save_starts_with_what_is_free(lab: Nic, guests: Guests) -> None:
    lab.set_numvfs(2)
    lab.set_address(f"{HOST}/24")
    before = looks(lab)
    made = start(guests, lab)
    virsh("managedsave", made.uuid)
    assert claims() == []
    assert looks(lab) == before
    first = CONTENDERS["vfio"](guests, lab.vfs[0], "", "first")
    made.start()
    assert [owner_of(vf) for vf in lab.vfs] == ["first", "saved"]
    assert made.console.ask(f"ping {HOST}")["ping"] == "3/3"
    made.destroy()
    first.end()


def test_a_guest_that_goes_back_to_a_snapshot_has_a_vf_still(
    lab: Nic, guests: Guests, tmp_path: Path
) -> None:
    """From a running guest, which libvirt ends for that, and from one that is off."""
    lab.set_numvfs(2)
    lab.set_address(f"{HOST}/24")
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True, timeout=60)
    made = start(
        guests, lab,
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>"
        "<target dev='vda' bus='virtio'/></disk>",
    )  # fmt: skip
    virsh("snapshot-create-as", made.uuid, "then", deadline_s=300)
    for off in (False, True):
        if off:
            made.destroy()
            assert claims() == []
        virsh("snapshot-revert", made.uuid, "then", "--running", deadline_s=300)
        assert made.state == "running"
        assert owner_of(lab.vfs[0]) == "saved"
        assert made.console.ask(f"ping {HOST}")["ping"] == "3/3"
    made.destroy()
    assert claims() == []
    virsh("snapshot-delete", made.uuid, "then", "--metadata")
