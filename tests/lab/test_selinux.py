"""SELinux, enforcing: what the doctor says where a hook has a type that libvirt may not run.

The policy is the test's own, the least that there can be: all is of one type, and allowed but to run what is
of another. What a distribution's policy allows libvirt isn't tested here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.contenders import hostdev_xml, owner_of
from tests.lab.machines import Guests
from tests.lab.nic import Nic, run
from tests.lab.test_installation import HOOK, doctor

pytestmark = pytest.mark.long

SELINUX = Path("/sys/fs/selinux")
# In the kernel's order.
SIDS = (
    *("kernel", "security", "unlabeled", "fs", "file", "file_labels", "init", "any_socket", "port", "netif"),
    *("netmsg", "node", "igmp_packet", "icmp_socket", "tcp_socket", "sysctl_modprobe", "sysctl", "sysctl_fs"),
    *("sysctl_kernel", "sysctl_net", "sysctl_net_unix", "sysctl_vm", "sysctl_dev", "kmod", "policy"),
    *("scmp_packet", "devnull"),
)
# What has a label that can be set.
FILES = ("file", "dir", "lnk_file", "chr_file", "blk_file", "sock_file", "fifo_file")
USUAL, HIDDEN = "lab_u:object_r:usual_t", "lab_u:object_r:hidden_t"
POLICY = "\n".join(
    (
        *(f"class {one}" for one in ("process", *FILES)),
        *(f"sid {sid}" for sid in SIDS),
        "class process { transition dyntransition }",  # the kernel wants it
        *(f"class {one} {{ execute }}" for one in FILES),
        "type usual_t; type hidden_t;",
        "role lab_r; role lab_r types { usual_t hidden_t };",
        "allow usual_t usual_t : process { transition dyntransition };",
        *(f"allow usual_t usual_t : {one} execute;" for one in FILES),
        "user lab_u roles { lab_r };",
        *(f"sid {sid} lab_u:lab_r:usual_t" for sid in SIDS),
        *(f"fs_use_{how} lab_u:lab_r:usual_t;" for how in ("xattr overlay", "trans tmpfs", "trans devtmpfs")),
        "",
    )
)


@pytest.fixture
def enforcing(tmp_path: Path) -> Iterator[None]:
    """SELinux enforces the policy, which says that hooks are of the usual type."""
    assert SELINUX.is_dir(), "this kernel has SELinux off: make test-lab-selinux"
    run("mount", "-t", "selinuxfs", "selinuxfs", str(SELINUX))
    source, policy = tmp_path / "policy.conf", tmp_path / "policy"
    source.write_text(POLICY)
    run("checkpolicy", "-U", "allow", "-o", str(policy), str(source))
    contexts = Path("/etc/selinux/lab/contexts/files/file_contexts")
    contexts.parent.mkdir(parents=True, exist_ok=True)
    contexts.write_text(f"/etc/libvirt/hooks(/.*)? {USUAL}\n")
    Path("/etc/selinux/config").write_text("SELINUX=enforcing\nSELINUXTYPE=lab\n")
    (SELINUX / "load").write_bytes(policy.read_bytes())
    (SELINUX / "enforce").write_text("1")
    yield
    (SELINUX / "enforce").write_text("0")


def label(path: Path, context: str) -> None:
    os.setxattr(path, "security.selinux", f"{context}\0".encode())


@pytest.mark.usefixtures("enforcing", "hook")
def test_a_hook_that_libvirt_may_not_run_is_told_with_what_to_do(lab: Nic, guests: Guests) -> None:
    vf = lab.set_numvfs(1)[0]
    made = guests.libvirt("labelled", hostdev_xml(vf, "52:54:00:00:0a:01"), start=False)
    for driver in ("qemu", "network", "daemon"):
        label(HOOK.parents[1] / f"{driver}.d" / HOOK.name, USUAL)
    code, found = doctor()
    right = ("ok", "SELinux enforces, and the hooks have the types that its policy has for them")
    assert found["confinement"] == [right]
    assert code == 0, found
    made.start()
    assert owner_of(vf) == "labelled"
    made.destroy()

    label(HOOK, HIDDEN)
    refused = made.start(check=False)
    assert refused.returncode != 0
    assert f"cannot execute binary {HOOK}: Permission denied" in refused.stderr
    assert owner_of(vf) is None
    code, found = doctor()
    assert code == 3
    assert found["hooks"] == [
        ("error", f"{HOOK} can't be run: permission denied; see what is said of confinement")
    ]
    wrong = f"{HOOK} has the SELinux type hidden_t, and is to have usual_t; do: restorecon {HOOK}"
    assert found["confinement"] == [("error", wrong)]

    label(HOOK, USUAL)
    assert doctor()[0] == 0
    made.start()
    assert owner_of(vf) == "labelled"
