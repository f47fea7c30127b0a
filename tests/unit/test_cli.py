"""The command vnet-lock: output, exit codes, and one line for each error."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.fake_host import VFIO, FakeHost
from vnet_lock.claims import ClaimTable
from vnet_lock.front.cli import main
from vnet_lock.model import Claim, Mode, PciAddress, Resource, State

XML = Path(__file__).parents[2] / "xml"
PF = PciAddress.parse("0000:01:00.0")
RUN = """
import sys
from vnet_lock.front.cli import main
from vnet_lock.settings import Settings
sys.exit(main(sys.argv[2:], Settings.under(sys.argv[1])))
"""
# What status says beside its report to whom can't see everything.
REMARK = "" if os.geteuid() == 0 else "vnet-lock: without root, what other users' processes use is not seen\n"


@pytest.fixture
def host(tmp_path):
    host = FakeHost(tmp_path)
    host.add_process(os.getpid(), "pytest")
    host.vfs = host.add_pf("0000:01:00.0", "eth0", ["igbvf", VFIO, "igbvf"])
    return host


@pytest.fixture
def run(host, capsys):
    """Run a command; returns its exit code, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words, host.settings)
        captured = capsys.readouterr()
        assert captured.err.count("\n") <= 1 or "usage:" in captured.err, captured.err
        return code, captured.out, captured.err

    return run


def claim(host: FakeHost, vf: PciAddress, pid: int, token: str = "a" * 16) -> None:
    owner = host.owner(pid, "web1")
    host.claim(Claim(Resource.vf(vf), Mode.EXCLUSIVE, State.ACTIVE, owner, token, "net0", time.time(), pf=PF))


def records(host: FakeHost) -> list[str]:
    return [each.resource.text for each in ClaimTable(host.settings).read().records]


# --- status, show ----------------------------------------------------------------------------------


def test_status_of_a_healthy_host_exits_with_0(host, run):
    host.add_process(50)
    claim(host, host.vfs[1], 50)
    code, out, _ = run("status")
    assert code == 0
    assert 'qemu "web1" (pid 50)' in out
    assert out.count("free") == 2


def test_status_exits_with_3_when_a_vf_is_used_by_a_stranger(host, run):
    host.add_process(77)
    host.open_vfio(77, host.vfs[1])
    code, out, _ = run("status", "--json")
    assert code == 3
    found = json.loads(out)
    assert [vf["state"] for vf in found["pfs"][0]["vfs"]] == ["free", "foreign", "free"]
    assert found["pfs"][0]["vfs"][1]["users"][0]["pid"] == 77
    assert found["findings"][0]["kind"] == "foreign"


def test_status_with_only_warnings_exits_with_0(host, run):
    claim(host, host.vfs[0], 50)
    code, out, _ = run("status")
    assert code == 0
    assert "warning: " in out


@pytest.mark.parametrize("name", ["eth0", "0000:01:00.0", "01:00.0"])
def test_status_of_one_pf_takes_its_name_or_address(host, run, name):
    host.add_pf("0000:02:00.0", "eth1")
    code, out, _ = run("status", name)
    assert code == 0
    assert "eth0" in out
    assert "eth1" not in out


@pytest.mark.parametrize("name", ["eth9", "0000:09:00.0", "../../etc", "eth0v0", ""])
def test_status_of_what_is_no_pf_is_bad_input(run, name):
    code, out, err = run("status", name)
    assert code == 2
    assert out == ""
    assert err.startswith("vnet-lock: ")


def test_status_of_a_host_without_network_devices_says_so(tmp_path, capsys):
    assert main(["status"], FakeHost(tmp_path / "empty").settings) == 0
    assert "no network device" in capsys.readouterr().out


def test_status_needs_no_run_directory(host, run):
    os.rmdir(host.settings.claims_dir)
    os.rmdir(host.settings.run)
    assert run("status")[0] == 0
    assert not os.path.exists(host.settings.run)


def test_a_run_directory_that_others_can_write_is_not_trusted(host, run):
    os.chmod(host.settings.claims_dir, 0o777)
    code, _, err = run("status")
    assert code == 1
    assert "others can write it" in err


def test_watch_shows_a_change_and_ends_silently_at_an_interrupt(host):
    command = [sys.executable, "-c", RUN, host.root, "status", "--watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        first = json.loads(watch.stdout.readline())
        host.add_process(50)
        claim(host, host.vfs[0], 50)
        second = json.loads(watch.stdout.readline())
        watch.send_signal(2)
        out, err = watch.communicate()
    assert first["pfs"][0]["vfs"][0]["state"] == "free"
    assert second["pfs"][0]["vfs"][0]["state"] == "active"
    assert (watch.returncode, out, err) == (130, "", REMARK)


def test_a_reader_that_goes_away_is_no_error(host):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", RUN, host.root, "status"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, REMARK)


def test_show_tells_the_claim_and_its_users(host, run):
    host.add_process(50)
    host.open_vfio(50, host.vfs[1])
    claim(host, host.vfs[1], 50)
    code, out, _ = run("show", f"vf:{host.vfs[1]}")
    assert code == 0
    assert 'exclusive claim, active: qemu "web1" (pid 50)' in out
    assert "in use: qemu-system-x86 (pid 50)" in out
    found = json.loads(run("show", f"vf:{host.vfs[1]}", "--json")[1])
    assert found["claims"][0]["token"] == "a" * 16


def test_show_of_a_claimed_vf_that_is_gone_still_tells_its_claim(host, run):
    host.add_process(50)
    claim(host, host.vfs[2], 50)
    host.remove_vf("0000:01:00.0", 2)
    code, out, _ = run("show", f"vf:{host.vfs[2]}")
    assert code == 0
    assert "there is no such device here" in out
    assert "isn't there any more" in out


@pytest.mark.parametrize(
    "resource", ["vf:0000:09:10.0", "pf:0000:09:00.0", "nic:eth9", "eth9", "0000:09:00.0", "pf:0000:01:10.0"]
)
def test_show_of_what_is_not_there_is_bad_input(run, resource):
    code, _, err = run("show", resource)
    assert code == 2
    assert resource in err


@pytest.mark.parametrize(
    "resource", ["192.0.2.7", "", "vf:", "vf:01:10", "nic:a/b", "nic:../x", "disk:sda", "vf:0:0:0.9"]
)
def test_a_word_that_is_no_resource_is_bad_usage(run, resource):
    code, _, err = run("show", resource)
    assert code == 2
    assert "resource" in err.lower()


@pytest.mark.parametrize("word", ["nic:eth0v0", "eth0v0", "01:10.0", "0000:01:10.0"])
def test_a_vf_is_found_by_its_devices_name_or_address_by_all_verbs(host, run, word):
    host.add_process(50)
    vf = f"vf:{host.vfs[0]}"
    assert run("claim", word, "--pid", "50")[1].startswith(f"{vf} is claimed (exclusive) for process")
    code, out, _ = run("show", word)
    assert (code, out.splitlines()[0]) == (0, f"VF {host.vfs[0]}: active")
    assert json.loads(run("show", word, "--json")[1])["resource"] == vf
    assert run("release", word)[0] == 0
    assert records(host) == []
    assert run("show", word)[1].startswith(f"VF {host.vfs[0]}: free\n")


@pytest.mark.parametrize("word", ["nic:eth0", "eth0", "01:00.0"])
def test_a_pf_is_found_by_its_name_or_address(run, word):
    assert run("show", word)[1].startswith(f"PF {PF}: free\n")


def test_a_vf_that_is_gone_is_found_by_its_address_while_it_is_claimed(host, run):
    host.add_process(50)
    claim(host, host.vfs[2], 50)
    host.remove_vf("0000:01:00.0", 2)
    assert run("show", str(host.vfs[2]))[1].startswith(f"VF {host.vfs[2]}: active\n")
    assert run("release", str(host.vfs[2]), "--force")[0] == 0
    assert records(host) == []


def test_an_address_that_is_claimed_is_in_status(host, run):
    host.add_process(50, "vpn")
    assert run("claim", "ip:10.9.9.9", "--pid", "50")[0] == 0
    lines = run("status")[1].splitlines()
    at = lines.index("10.9.9.9  IP address")
    assert 'process "vpn" (pid 50)' in lines[at + 1]
    (found,) = json.loads(run("status", "--json")[1])["addresses"]
    assert found["address"] == "10.9.9.9"
    assert [one["resource"] for one in found["claims"]] == ["ip:10.9.9.9"]
    assert json.loads(run("status", "eth0", "--json")[1])["addresses"] == []


def test_what_is_claimed_by_hand_has_no_interface(host, run):
    host.add_process(50)
    host.nic("up0", up=True)
    for word, what in (("nic:up0", "network device, 52:54:"), ("ip:10.9.9.9", "an IP address")):
        assert run("claim", word, "--pid", "50")[0] == 0
        out = run("show", word)[1]
        assert "for claim" not in out
        assert out.splitlines()[1].startswith(f"  {what}")
        assert json.loads(run("show", word, "--json")[1])["claims"][0]["interface"] == "claim"
    assert "up0  network device" in run("status")[1].splitlines()


# --- claim, release, gc ----------------------------------------------------------------------------


def test_a_claim_is_held_for_its_process_and_released_by_hand(host, run):
    host.add_process(50, "dpdk-app")
    vf = f"vf:{host.vfs[0]}"
    code, out, err = run("claim", vf, "--pid", "50")
    assert (code, err) == (0, "")
    assert 'process "dpdk-app" (pid 50)' in out
    assert records(host) == [vf]
    assert run("release", vf)[0] == 0
    assert records(host) == []
    assert run("release", vf) == (0, f"nothing is claimed on {vf}\n", "")


def test_a_second_process_is_refused_with_4_and_told_the_holder(host, run):
    for pid in (50, 51):
        host.add_process(pid, f"app{pid}")
    vf = f"vf:{host.vfs[0]}"
    assert run("claim", vf, "--pid", "50", "--name", "first")[0] == 0
    code, out, err = run("claim", vf, "--pid", "51")
    assert (code, out) == (4, "")
    assert 'process "first" (pid 50)' in err
    assert f"vnet-lock show {vf}" in err


def test_a_shared_pf_is_claimed_by_two(host, run):
    for pid in (50, 51):
        host.add_process(pid)
        assert run("claim", f"pf:{PF}", "--pid", str(pid), "--shared")[0] == 0
    assert records(host) == [f"pf:{PF}"] * 2


@pytest.mark.parametrize("word", ["vf:0000:01:10.0", "nic:eth0v0"])
def test_a_vf_is_never_shared(host, run, word):
    host.add_process(50)
    code, out, err = run("claim", word, "--pid", "50", "--shared")
    assert (code, out) == (2, "")
    assert err == "vnet-lock: VF 0000:01:10.0: a VF is one guest's alone; leave out --shared\n"
    assert records(host) == []


def test_a_stranger_can_be_given_a_claim_for_what_it_uses(host, run):
    host.add_process(77)
    host.open_vfio(77, host.vfs[1])
    assert run("status")[0] == 3
    assert run("claim", f"vf:{host.vfs[1]}", "--pid", "77")[0] == 0
    assert run("status")[0] == 0


@pytest.mark.parametrize(
    ("number", "said"),
    [("0", "0 is too few"), ("-1", "'-1' is not a number"), ("x", "'x' is not a number"),
     ("9" * 5000, "a number of 5000 digits is too large")],
)  # fmt: skip
def test_a_number_that_no_pid_can_be_is_bad_usage(host, run, number, said):
    code, _, err = run("claim", f"vf:{host.vfs[0]}", "--pid", number)
    assert (code, f"argument --pid: {said}" in err) == (2, True)


def test_a_process_that_is_not_there_cannot_claim(host, run):
    code, _, err = run("claim", f"vf:{host.vfs[0]}", "--pid", "50")
    assert code == 2
    assert "no process 50" in err
    assert records(host) == []


@pytest.mark.parametrize("pid", ["0", "-1", "x", "1.5", "²"])
def test_a_pid_is_a_positive_number(host, run, pid):
    assert run("claim", f"vf:{host.vfs[0]}", f"--pid={pid}")[0] == 2


def test_release_of_a_living_guests_vf_is_refused_with_its_name(host, run):
    host.add_process(50)
    claim(host, host.vfs[0], 50)
    code, _, err = run("release", f"vf:{host.vfs[0]}")
    assert code == 4
    assert 'qemu "web1" (pid 50)' in err
    assert "--force" in err
    assert records(host) == [f"vf:{host.vfs[0]}"]


def test_force_releases_a_living_guests_claim(host, run):
    host.add_process(50)
    claim(host, host.vfs[0], 50)
    assert run("release", f"vf:{host.vfs[0]}", "--force")[0] == 0
    assert records(host) == []


def test_gc_heals_what_is_stale_and_nothing_else(host, run):
    host.add_process(50)
    claim(host, host.vfs[0], 50)
    claim(host, host.vfs[2], 51, "b" * 16)
    code, out, _ = run("gc", "--dry-run")
    assert (code, out) == (0, f'would heal vf:{host.vfs[2]}: left by qemu "web1" (pid 51)\n')
    assert len(records(host)) == 2
    assert run("gc")[:2] == (0, f'healed vf:{host.vfs[2]}: left by qemu "web1" (pid 51)\n')
    assert records(host) == [f"vf:{host.vfs[0]}"]
    assert run("gc")[:2] == (0, "nothing is stale\n")


def test_what_a_process_calls_itself_cannot_touch_the_terminal(host, run):
    host.add_process(50, "\x1b[2J\x1b[31mx\ny")
    resource = f"vf:{host.vfs[1]}"
    outputs = [run("claim", resource, "--pid", "50")[1], run("show", resource)[1]]
    host.remove_process(50)
    outputs += [run("gc", "--dry-run")[1], run("show", resource)[1], run("reap")[1]]
    for output in outputs:
        assert "\x1b" not in output
        assert "?[2J?[31mx?y" in output
    assert [output.count("\n") for output in (outputs[0], outputs[2], outputs[4])] == [1, 1, 1]


def test_gc_as_json(host, run):
    claim(host, host.vfs[0], 51)
    assert json.loads(run("gc", "--json")[1])["healed"][0]["resources"] == [f"vf:{host.vfs[0]}"]


def test_a_matrix_of_a_typo_is_bad_input(run):
    code, out, err = run("matrix", "--dev", "eth00")
    assert (code, out) == (2, "")
    assert err.startswith("vnet-lock: there is no network device 'eth00' here; see:")


# --- plan, vfs -------------------------------------------------------------------------------------

GUEST = """<domain type='kvm'><name>web1</name><uuid>11111111-0000-4000-8000-000000000000</uuid>
<devices><interface type='hostdev' managed='yes'><mac address='52:54:00:00:00:01'/>
<source><address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x{function}'/></source>
</interface></devices></domain>"""


def test_a_plan_names_the_combination_and_the_device_and_changes_nothing(host, run, tmp_path):
    (tmp_path / "guest.xml").write_text(GUEST.format(function=0))
    code, out, err = run("plan", str(tmp_path / "guest.xml"))
    assert (code, err) == (0, "")
    assert "veb-sriov-vfio" in out
    assert f"vf:{host.vfs[0]}" in out
    assert records(host) == []


def test_a_plan_for_a_vf_that_is_held_is_refused_with_4(host, run, tmp_path):
    host.add_process(50)
    claim(host, host.vfs[0], 50)
    (tmp_path / "guest.xml").write_text(GUEST.format(function=0))
    code, _, err = run("plan", str(tmp_path / "guest.xml"))
    assert code == 4
    assert 'qemu "web1" (pid 50)' in err
    code, out, err = run("plan", str(tmp_path / "guest.xml"), "--json")
    assert (code, err) == (4, "")
    assert json.loads(out)["refusal"]["resource"] == f"vf:{host.vfs[0]}"


def test_a_plan_reads_a_guest_from_stdin(host, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GUEST.format(function=4).encode())))
    code, out, _ = run("plan", "-")
    assert code == 0
    assert f"vf:{host.vfs[2]}" in out


def test_a_plan_of_words_takes_a_free_vf_and_says_why_not_the_others(host, run):
    host.add_process(50)
    claim(host, host.vfs[0], 50)
    words = ("plan", "--mode", "veb", "--port", "sriov", "--dev", "eth0", "--protocols", "vfio")
    code, out, err = run(*words, "--json")
    assert err == ""
    found = json.loads(out)
    assert code == 0
    assert found["plan"][0]["combination"] == "veb-sriov-vfio"
    assert found["plan"][0]["device"] in (f"vf:{host.vfs[1]}", f"vf:{host.vfs[2]}")


@pytest.mark.parametrize(
    "words",
    [
        ("--mode", "magic", "--dev", "eth0"),
        ("--mode", "veb", "--dev", "eth0", "--pool", "fabric-a"),
        ("--dev", "eth0"),
        (),
        ("--mode", "veb", "--dev", "eth0", "--vlan", "4095"),
        ("--mode", "veb", "--dev", "eth0", "--mac", "01:00:00:00:00:00"),
        ("--mode", "veb", "--dev", "eth0", "--port", "physdev"),
        ("--mode", "veb", "--dev", "eth0", "--protocols", "tap:pigeon"),
        ("guest.xml", "--mode", "veb"),
        ("/nonexistent/guest.xml",),
    ],
)
def test_a_plan_of_nonsense_is_bad_input(run, words):
    code, out, err = run("plan", *words)
    assert (code, out) == (2, "")
    assert err.startswith("vnet-lock: ")
    assert "-netdev" not in err


def test_a_plan_without_a_device_is_refused_where_the_host_has_no_default(run):
    code, out, err = run("plan", "--mode", "veb")
    assert (code, out) == (2, "net0: veb: refused\n")
    assert err.startswith("vnet-lock: net0: no device is named; name a network device")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mode", "veb", "--port", "foo"), '--mode=veb has no port "foo"; one of'),
        (("--mode", "veb", "--queues", "0"), '--queues="0" is not a number from 1'),
        (("--mode", "veb", "--dev", "eth0", "--pool", "a"), "--dev= and --pool= exclude each other"),
        (("--mode", "route", "--dev", "eth0"), "add --ip=192.0.2.7"),
    ],
)
def test_what_is_wrong_with_an_option_is_said_of_the_option(run, words, said):
    for verb in (("plan",), ("attach", "web1")):
        code, _, err = run(*verb, *words)
        assert (code, err.startswith(f"vnet-lock: {said}") or said in err) == (2, True), err
        assert " port=" not in err


def test_a_plan_names_what_is_claimed_later_or_not_at_all(run):
    code, out, _ = run("plan", f"{XML}/network.xml")
    assert (code, out.splitlines()) == (
        0,
        [
            "nothing to claim now",
            "52:54:00:6b:04:01: what libvirt picks of network 'vfs-of-enp1s0' for it is claimed then",
        ],
    )
    assert run("plan", f"{XML}/no-device.xml")[1].startswith("nothing to claim: the guest has no interface")


def test_a_plan_names_host_devices_that_are_no_network_devices_here(tmp_path, capsys):
    host = FakeHost(tmp_path / "empty")
    host.add_process(os.getpid(), "pytest")
    assert main(["plan", f"{XML}/hostdev-device.xml"], host.settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1] == "hostdev0: there is no network device at 0000:01:10.0 here, so nothing is claimed for it"
    )
    assert lines[2].startswith("hostdev1: ")


def test_malformed_xml_is_bad_input(host, run, tmp_path):
    (tmp_path / "guest.xml").write_text("<domain><name>web1")
    assert run("plan", str(tmp_path / "guest.xml"))[0] == 2


def test_vfs_shows_one_pf(host, run):
    host.add_pf("0000:02:00.0", "eth1")
    code, out, _ = run("vfs", "eth0")
    assert code == 0
    assert out.startswith("eth0  0000:01:00.0  igb  3/7 VFs\n")
    assert "eth1" not in out


def test_numvfs_stays_while_a_vf_is_held(host, run):
    host.add_process(50)
    claim(host, host.vfs[0], 50)
    code, _, err = run("vfs", "eth0", "5")
    assert code == 4
    assert 'qemu "web1" (pid 50)' in err


@pytest.mark.parametrize(("count", "why"), [("8", "0 to 7"), ("-1", ""), ("x", "not a number")])
def test_numvfs_has_its_limits(run, count, why):
    code, _, err = run("vfs", "eth0", count)
    assert code == 2
    assert why in err


def test_a_device_without_sriov_can_have_no_vfs(host, run):
    host.add_pf("0000:02:00.0", "eth1", totalvfs=0)
    code, _, err = run("vfs", "eth1", "2")
    assert (code, "has no SR-IOV" in err, "0 to 0" in err) == (2, True, False)


# --- the command itself ------------------------------------------------------------------------------


def test_no_command_is_bad_usage(run):
    assert run()[0] == 2


def test_the_version_is_printed(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("vnet-lock ")


def test_an_error_is_one_line_whatever_is_in_a_name(host, run):
    code, _, err = run("status", "eth0\n\033[2Jx")
    assert code == 2
    assert err.count("\n") == 1
    assert "\033" not in err


@pytest.mark.as_root  # to become somebody else
def test_without_root_what_can_be_seen_is_shown(capfd):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        os.chmod(folder, 0o755)
        host = FakeHost(folder)
        host.add_process(50)
        (vf,) = host.add_pf("0000:01:00.0", "eth0", [VFIO])
        host.open_vfio(50, vf)
        claim(host, vf, 50)
        os.chmod(f"{host.settings.proc}/50/fd", 0o700)
        assert main(["status"], host.settings) == 0  # loads everything: the modules may be closed to others
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setuid(65534)
            os._exit(main(["status"], host.settings))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    out, err = capfd.readouterr()
    assert out.count('qemu "web1" (pid 50)') == 2
    assert err.count("\n") == 1
    assert "without root" in err


def test_a_device_name_cannot_smuggle_in_other_words(run):
    code, _, err = run("plan", "--mode", "veb", "--dev", "eth0,port=nat")
    assert code in (2, 5)
    assert "eth0,port=nat" in err


# --- hooks -------------------------------------------------------------------------------------------


def test_hooks_are_installed_looked_at_and_removed(host, run):
    assert run("hooks", "status")[0] == 1
    assert run("hooks", "install")[0] == 0
    code, out, _ = run("hooks", "status")
    assert code == 0
    assert "installed" in out
    assert f"{host.settings.etc_libvirt}/hooks/qemu.d/" in out
    assert run("hooks", "remove")[0] == 0
    assert run("hooks", "remove")[0] == 0
    assert run("hooks", "status")[0] == 1


@pytest.mark.parametrize("words", [("serve", "x"), ("x",), ()])
def test_what_hooks_does_not_know_is_told_with_its_own_usage(run, words):
    code, out, err = run("hooks", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"usage: vnet-lock hooks {'serve ' if 'serve' in words else ''}[-h]")


def test_each_word_of_hooks_is_explained(run):
    out = run("hooks", "--help")[1]
    for word in ("install", "remove", "status", "serve"):
        assert re.search(rf"^    {word} +[a-z]", out, re.MULTILINE)


# --- odd surroundings ------------------------------------------------------------------------------


def in_shell(host: FakeHost, words: str, redirection: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell, which can do to its streams what it likes; its output is buffered."""
    line = f'"$0" -c "$1" "$2" {words} {redirection}'
    return subprocess.run(
        ["/bin/bash", "-c", line, sys.executable, RUN, host.root],
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", ["status", "plan --mode veb --dev eth0"])
def test_a_reader_that_has_gone_makes_no_noise(host, words):
    done = in_shell(host, words, '> >(exec true); sleep 0.2; echo "$?"')
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("words", ["status", "status --json", "vfs eth0", "--help", "--version"])
def test_an_output_that_is_full_is_one_line(host, words):
    done = in_shell(host, words, "> /dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "vnet-lock: cannot write the output: No space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("2>&-", 0), ("<&-", 0), (">&- 2>&- <&-", 0)])
def test_streams_that_are_closed_are_no_traceback(host, closed, code):
    done = in_shell(host, "status", closed)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


def test_a_guest_from_a_closed_input_is_bad_input(host):
    done = in_shell(host, "plan -", "<&-")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_guest_that_makes_no_sense_is_named_by_its_file(run, tmp_path):
    (tmp_path / "bad.xml").write_text("<domain")
    code, _, err = run("plan", str(tmp_path / "bad.xml"))
    assert (code, err.startswith(f"vnet-lock: {tmp_path}/bad.xml: ")) == (2, True)


@pytest.mark.parametrize("verb", ["status", "vfs", "plan"])
def test_an_empty_word_is_shown_as_one(run, verb):
    code, _, err = run(verb, "")
    assert (code, "''" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("plan", "--mode", "veb", "--dev", "eth\udcff"), 2),
        (("status", "eth\udcff"), 2),
        (("vfs", "eth\udcff"), 2),
        (("show", "nic:eth\udcff"), 2),
        (("matrix", "--dev", "eth\udcff"), 2),
    ],
)
def test_a_name_that_no_device_can_have_is_told_as_any_other(run, words, status):
    code, out, err = run(*words)
    assert (code, bool(out)) == (status, status == 0)
    assert "eth" in err or not status


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\udcff", "x" * 101])
def test_a_name_that_would_spoil_a_line_is_bad_input(host, run, name):
    code, _, _ = run("claim", f"vf:{host.vfs[0]}", "--pid", str(os.getpid()), "--name", name)
    assert code == 2
    assert records(host) == []
