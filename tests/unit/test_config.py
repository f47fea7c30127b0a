"""The host's configuration: what it says, what is wrong in it and where, and what a guest gets by it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_host import VFIO, FakeHost
from vnet_lock.administration import Administration
from vnet_lock.audit import Severity, Standing, audit
from vnet_lock.claims import ClaimTable
from vnet_lock.combination import Backend, Policy, Port
from vnet_lock.config import (
    DEFAULT_KEYS,
    HOST_KEYS,
    POOL_KEYS,
    SECTIONS,
    TIMEOUTS,
    Config,
    Default,
    Pool,
    format_indices,
    parse_indices,
    read_config,
    tuned,
)
from vnet_lock.errors import BadInput, Refused, VnetLockError
from vnet_lock.front import hook as hook_module
from vnet_lock.front.cli import main
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, PciAddress, Process, Resource, State
from vnet_lock.request import Fixed, Form, Intent, Plan, Refusal, Request
from vnet_lock.session import Session
from vnet_lock.settings import DEFAULT, Settings

PACKAGING = Path(__file__).parents[2] / "packaging"
PF_A, PF_B = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:02:00.0")
POOL = Intent("net0", Policy.VEB, pool="fabric-a", backends=(Backend.VFIO,))
GUEST = 50


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """Two PFs with four VFs each, that VFIO has; a guest's process and libvirt's daemon."""
    host = FakeHost(tmp_path)
    # The kernel is asked about lo only: what it tells of it is no SR-IOV.
    host.vfs = host.add_pf(PF_A.text, "enp1", [VFIO] * 4) + host.add_pf(PF_B.text, "enp2", [VFIO] * 4)
    for pid, command in ((os.getpid(), "pytest"), (GUEST, "qemu"), (40, "libvirtd")):
        host.add_process(pid, command)
    host.settings = replace(host.settings, busy_wait_s=0.2, free_wait_s=0.1)
    return host


def write(host: FakeHost | Settings, text: str) -> str:
    settings = host if isinstance(host, Settings) else host.settings
    path = Path(settings.config_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o644)
    return str(path)


def planned(host: FakeHost, *requests: Request) -> list[str]:
    found = Session(host.settings).plan(requests, host.owner(GUEST))
    assert isinstance(found, Plan), found
    return [one.device.text for one in found.assignments]


def refused(host: FakeHost, *requests: Request) -> str:
    found = Session(host.settings).plan(requests, host.owner(GUEST))
    assert isinstance(found, Refusal), found
    return found.message


# --- reading it -----------------------------------------------------------------------------------


def test_a_host_without_a_file_has_no_configuration_and_loads_none_of_it(tmp_path: Path) -> None:
    settings = Settings.under(tmp_path)
    assert read_config(settings) is None
    assert tuned(settings) is settings
    code = (
        "import dataclasses, sys\n"
        "from vnet_lock.session import Session; from vnet_lock.settings import Settings\n"
        "Session(dataclasses.replace(Settings.under(sys.argv[1]), proc='/proc'))\n"
        "sys.exit(len({'vnet_lock.config', 'tomllib'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
    write(settings, "")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 2


def test_all_that_a_file_can_say_is_read(tmp_path: Path) -> None:
    settings = Settings.under(tmp_path)
    path = write(
        settings,
        """
        [pools.fabric-a]
        pf = ["enp1s0f0", "82:00.0", "enp1s0f0"]
        vfs = "0-3,6"
        [pools."b.1"]
        pf = ["enp2"]
        [host.vfs]
        enp1s0f0 = "4"
        "0000:82:00.0" = "0, 2 - 3"
        [defaults.veb]
        pool = "fabric-a"
        [defaults.vepa]
        dev = ["enp1s0f0"]
        port = "macvlan"
        [timeouts]
        busy = 1.5
        hook = 60
        """,
    )
    assert read_config(settings) == Config(
        path,
        pools={
            "fabric-a": Pool("fabric-a", ("enp1s0f0", "0000:82:00.0"), frozenset({0, 1, 2, 3, 6})),
            "b.1": Pool("b.1", ("enp2",)),
        },
        left={"enp1s0f0": frozenset({4}), "0000:82:00.0": frozenset({0, 2, 3})},
        defaults={
            Policy.VEB: Default(pool="fabric-a"),
            Policy.VEPA: Default(("enp1s0f0",), port=Port.MACVLAN),
        },
        timeouts={"busy": 1.5, "hook": 60.0},
    )
    assert tuned(settings) == replace(settings, busy_wait_s=1.5, hook_s=60.0)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("\n\n[polls.a]\npf = ['enp1']\n", 3, "unknown key 'polls'"),
        ("[pools.a]\npf = ['enp1']\n\n# more\npfs = ['enp2']", 5, "unknown key 'pfs': [pools.a] doesn't"),
        ("[pools.a]\npf = [\n  'enp1',\n  'a/b',\n]\n", 2, "'a/b' is neither the name of a network device"),
        ("[pools.a]\npf = [\n  'enp1',\n]\nvf = [\n 1\n]", 5, "unknown key 'vf'"),
        ("[pools]\na.pf = ['enp1']\nb.pf = ['enp1']\nb.vfs = '3-1'\n", 4, "'3-1' is no range of VF indices"),
        ("[pools.a]\npf = ['enp1']\nvfs = '0,x'", 3, "'0,x' is no list of VF indices"),
        ("[pools.a]\npf = ['enp1']\nvfs = '0-99999'", 3, "'0-99999' is no range"),
        ("[pools.a]\npf = ['enp1']\nvfs = 3", 3, 'vfs is a string: vfs = "…"'),
        ("[pools.a]\npf = 'enp1'", 2, 'pf is a list of devices: pf = ["enp1s0"]'),
        ("[pools.a]\nvfs = '0'", 1, "pool a has no PF"),
        ("[pools.'a b']\npf = ['enp1']", 1, "'a b' is no name of a pool"),
        ("\npools = 3", 2, "'pools' is a table: [pools]"),
        ("[pools]\n\na = 3", 3, "'a' is a table: [pools.a]"),
        ("[pools.a]\npf = ['enp1']\n[host]\nvf = 3", 4, "unknown key 'vf': [host] doesn't"),
        ("[host.vfs]\nenp1 = '0'\n'a/b' = '1'", 3, "'a/b' is neither"),
        ("[host.vfs]\n'01:00.0' = '0'\n'0000:01:00.0' = '2'", 3, "0000:01:00.0, whose VFs are named already"),
        ("x = '''\n[host]\n'''\n[host]\ny = 1", 1, "unknown key 'x'"),
        ("[defaults.open]\ndev = ['enp1']", 1, "'open' is no policy"),
        ("[defaults.veb]\nport = 'sriov'", 1, "either dev = […] or pool"),
        ("[defaults.veb]\npool = 'a'", 2, "there is no [pools.a]"),
        ("[defaults.vepa]\ndev = ['enp1']\nport = 'bridge'", 3, "vepa has no port 'bridge'"),
        ("[pools.a]\npf=['enp1']\n[defaults.route]\npool = 'a'", 4, "a pool has VFs, which route doesn't"),
        ("[timeouts]\nbusy = 3\nbussy = 3", 3, "unknown key 'bussy'"),
        ("[timeouts]\nbusy = 0", 2, "busy is a number of seconds"),
        ("[timeouts]\nbusy = true", 2, "busy is a number of seconds"),
        ("[timeouts]\nhook = nan", 2, "hook is a number of seconds"),
        ("[pools.a]\npf = ['enp1'\n", 2, "Unclosed array"),
        ("[pools.a]\npf = 'enp1\n", 2, ""),
        ("a = 1\r\n\r\nb = 2\r\n", 1, "unknown key 'a'"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    settings = Settings.under(tmp_path)
    path = write(settings, text)
    with pytest.raises(BadInput, match=r"^[^\n]+$") as caught:
        read_config(settings)
    assert re.match(rf"{re.escape(path)}:(\d+): ", str(caught.value))[1] == str(line)  # type: ignore[index]
    assert said in str(caught.value)


def test_a_file_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    settings = Settings.under(tmp_path)
    path = write(settings, "")
    os.chmod(path, 0o666)
    with pytest.raises(BadInput, match="is not root's alone to write; run: chown root"):
        read_config(settings)


def test_what_is_no_file_of_text_is_bad_input(tmp_path: Path) -> None:
    settings = Settings.under(tmp_path)
    path = write(settings, "")
    Path(path).write_bytes(b"# \n\xff")
    with pytest.raises(BadInput, match=":2: it is not in UTF-8"):
        read_config(settings)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(BadInput, match="is no regular file"):
        read_config(settings)
    os.unlink(path)
    os.mkdir(path)  # as a container's bind mount makes one
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BadInput, match="is no regular file; put a file there, or remove it"):
        read_config(settings)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"a = {'9' * 5000}", "a number in it has too many digits"),
        (f"a = {'[' * 1200}", "it is nested too deeply"),
    ],
)
def test_what_no_parser_bears_is_as_wrong_as_a_syntax_error(host: FakeHost, text: str, said: str) -> None:
    owner = host.owner(GUEST, "web")
    claim = Claim(Resource.vf(host.vfs[0]), Mode.EXCLUSIVE, State.ACTIVE, owner, "a" * 16, "n", 0.0, pf=PF_A)
    host.claim(claim)
    path = write(host, text)
    with pytest.raises(BadInput, match=f"^{path}: {said}$"):
        read_config(host.settings)
    assert tuned(host.settings) is host.settings
    Session(host.settings).release(owner)
    assert not ClaimTable(host.settings).read().records


@pytest.mark.parametrize("text", ["0", "0-3,6", "1,3,5-7", "0-65534"])
def test_indices_are_written_as_they_are_read(text: str) -> None:
    assert format_indices(parse_indices(text)) == text


def test_the_example_and_the_man_page_know_each_key(tmp_path: Path) -> None:
    settings = Settings.under(tmp_path)
    example = (PACKAGING / "config.toml").read_text()
    write(settings, re.sub(r"(?m)^#(?=[\[\"a-z])", "", example))
    config = read_config(settings)
    assert config
    assert tuned(replace(settings, busy_wait_s=1)) == settings, "the example's timeouts are the usual ones"
    assert {*config.timeouts} == {*TIMEOUTS}
    assert config.pools
    assert config.left
    assert config.defaults
    page = (PACKAGING / "man/vnet-lock.toml.5").read_text()
    for section in SECTIONS:
        assert f"[{section}" in page
    for key in (*POOL_KEYS, *DEFAULT_KEYS):
        assert re.search(rf"^\.B {key} = ", page, re.MULTILINE), key
    assert all(f"[host.{key}]" in page for key in HOST_KEYS)
    table = dict(re.findall(r"^([a-z]+)\|([0-9]+)\|", page, re.MULTILINE))
    assert table == {key: f"{getattr(DEFAULT, name):g}" for key, name in TIMEOUTS.items()}
    assert DEFAULT.config_path in page
    assert DEFAULT.config_path in example


# --- pools ----------------------------------------------------------------------------------------


def test_a_vf_is_chosen_within_the_pool(host: FakeHost) -> None:
    write(host, "[pools.fabric-a]\npf = ['enp1']\nvfs = '1,3'\n")
    assert planned(host, POOL, replace(POOL, interface="net1")) == ["vf:0000:01:10.2", "vf:0000:01:10.6"]
    message = refused(host, *(replace(POOL, interface=f"net{number}") for number in range(3)))
    assert message.startswith("net2: veb in pool fabric-a is not possible here: another interface")


def test_of_a_pools_pfs_the_one_with_most_free_vfs_of_the_pool_is_taken(host: FakeHost) -> None:
    write(host, "[pools.fabric-a]\npf = ['enp1', '0000:02:00.0']\nvfs = '0-1'\n[host.vfs]\nenp1 = '0'\n")
    assert planned(host, POOL) == [f"vf:{host.vfs[4]}"]


def test_a_full_pool_is_refused_with_its_holders_though_its_pf_has_free_vfs(host: FakeHost) -> None:
    write(host, "[pools.fabric-a]\npf = ['enp1']\nvfs = '0'\n")
    owner = host.owner(40, "db")
    host.claim(
        Claim(Resource.vf(host.vfs[0]), Mode.EXCLUSIVE, State.ACTIVE, owner, "a" * 16, "n", 0.0, pf=PF_A)
    )
    assert 'VF 0000:01:10.0 is held by qemu "db"' in refused(host, POOL)
    with pytest.raises(Refused):
        Session(host.settings).acquire(host.owner(GUEST), [POOL])


@pytest.mark.parametrize(
    ("text", "request_", "said"),
    [
        ("[pools.b]\npf = ['enp1']", POOL, "pool 'fabric-a' is not in {path}; it has b"),
        ("", POOL, "pool 'fabric-a' is not in {path}; it has none"),
        ("[pools.fabric-a]\npf = ['enp1']", replace(POOL, ports=(Port.MACVLAN,)), "which port macvlan"),
        ("[pools.fabric-a]\npf = ['enp1']", replace(POOL, policy=Policy.NAT), "which policy nat doesn't"),
    ],
)
def test_a_pool_that_fits_nothing_is_bad_input(
    host: FakeHost, text: str, request_: Intent, said: str
) -> None:
    path = write(host, text)
    with pytest.raises(BadInput) as caught:
        Session(host.settings).plan([request_])
    assert str(caught.value).startswith("net0: ")
    assert said.format(path=path) in str(caught.value)


def test_a_pool_is_unknown_to_a_host_without_a_configuration(host: FakeHost) -> None:
    assert "there is no pool 'fabric-a': this host has no configuration" in refused(host, POOL)


@pytest.mark.parametrize(
    ("pf", "vfs", "said"),
    [
        ("enp9", "0", "there is no network device 'enp9' of pool fabric-a here"),
        ("enp1", "5-6", "enp1 has 4 VFs, none of them in pool fabric-a"),
        ("0000:01:10.0", "0", "0000:01:10.0 is a VF, and pool fabric-a is to name PFs"),
    ],
)
def test_a_pool_without_vfs_says_why(host: FakeHost, pf: str, vfs: str, said: str) -> None:
    write(host, f"[pools.fabric-a]\npf = ['{pf}']\nvfs = '{vfs}'\n")
    assert said in refused(host, POOL)


# --- defaults -------------------------------------------------------------------------------------


def test_an_interface_that_names_no_device_gets_the_default_of_its_policy(host: FakeHost) -> None:
    write(
        host,
        "[pools.fabric-a]\npf=['enp2']\n[defaults.veb]\npool='fabric-a'\n"
        "[defaults.private]\ndev=['enp1']\nport='sriov'\n",
    )
    assert planned(host, replace(POOL, pool=None)) == [f"vf:{host.vfs[4]}"]
    assert planned(host, replace(POOL, pool=None, policy=Policy.PRIVATE)) == [f"vf:{host.vfs[0]}"]
    assert "no device is named" in refused(host, replace(POOL, pool=None, policy=Policy.VEPA))
    named = replace(POOL, pool=None, devs=("enp1",), ports=(Port.SRIOV,))
    assert planned(host, named) == [f"vf:{host.vfs[0]}"]


# --- what is left to the host ---------------------------------------------------------------------


def fixed(vf: PciAddress) -> Fixed:
    return Fixed("hostdev0", vf, Form.HOSTDEV)


def libvirt() -> Owner:
    return Owner(OwnerKind.LIBVIRT, "web", "boot", uuid="u" * 8, process=Process(40, 4242))


def test_what_is_left_to_the_host_is_given_to_no_guest(host: FakeHost) -> None:
    write(host, "[host.vfs]\nenp1 = '0-1'\n[pools.fabric-a]\npf = ['enp1']\nvfs = '0-1'")
    sriov = replace(POOL, pool=None, ports=(Port.SRIOV,))
    assert planned(host, replace(sriov, devs=("enp1",))) == [f"vf:{host.vfs[2]}"]
    left = f"VF {host.vfs[0]} is left to the host by its configuration"
    assert left in refused(host, POOL)
    assert left in refused(host, replace(sriov, devs=(host.vfs[0].text,)))
    assert left in refused(host, fixed(host.vfs[0]))
    assert left in refused(host, fixed(PF_A)), "the PF would take its VFs with it"
    session = Session(host.settings)
    with pytest.raises(Refused, match=left) as caught:
        session.acquire(libvirt(), [fixed(host.vfs[0])])
    assert caught.value.holder == "the host"
    assert ClaimTable(host.settings).read().records == ()


def test_what_libvirt_chose_for_a_guest_is_refused_at_its_start_and_claimed_once_it_runs(
    host: FakeHost,
) -> None:
    write(host, "[host.vfs]\nenp1 = '0'")
    with pytest.raises(Refused, match="left to the host"):
        Session(host.settings).adopt(libvirt(), [fixed(host.vfs[0])])
    adopted = Session(host.settings).adopt(libvirt(), [fixed(host.vfs[0])], running=True)
    assert adopted == [f"vf:{host.vfs[0]}"]


def test_the_hosts_own_programs_may_claim_what_is_left_to_it(host: FakeHost) -> None:
    write(host, "[host.vfs]\nenp1 = '0'")
    owner = host.owner(GUEST, "dpdk", OwnerKind.PROCESS)
    Administration(host.settings).claim(owner, Resource.vf(host.vfs[0]), Mode.EXCLUSIVE)
    found = audit(host.settings, read_inventory(host.settings), ClaimTable(host.settings).read())
    assert found.state_of(Resource.vf(host.vfs[0])).standing is Standing.ACTIVE
    assert found.findings == ()


def test_the_hosts_use_of_what_is_left_to_it_is_no_finding_and_a_guests_is(host: FakeHost) -> None:
    host.process(60, "testpmd")
    host.open_vfio(60, host.vfs[0])
    look = lambda: audit(  # noqa: E731
        host.settings, read_inventory(host.settings), ClaimTable(host.settings).read()
    )
    assert [finding.kind for finding in look().findings] == ["foreign"]
    write(host, "[host.vfs]\nenp1 = '0'\n[pools.fabric-a]\npf=['enp1']\n")
    found = look()
    state = found.state_of(Resource.vf(host.vfs[0]))
    assert (state.standing, found.findings) == (Standing.LEFT, ())
    assert [user.pid for user in state.users] == [60]
    assert found.pools[Resource.vf(host.vfs[0])] == ("fabric-a",)
    owner = host.owner(GUEST, "web")
    host.claim(
        Claim(Resource.vf(host.vfs[0]), Mode.EXCLUSIVE, State.ACTIVE, owner, "a" * 16, "n", 0.0, pf=PF_A)
    )
    findings = {finding.kind: finding for finding in look().findings}
    assert findings["left-to-host"].severity is Severity.WARNING
    assert 'is left to the host, but held by qemu "web" (pid 50)' in findings["left-to-host"].message


def test_status_show_and_plan_say_what_is_left_to_the_host(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    write(host, "[host.vfs]\nenp1 = '0'\n[pools.fabric-a]\npf=['enp1']\n")
    assert main(["status"], host.settings) == 0
    rows = re.findall(r"vf \d +(\S+) +vfio-pci +(\S+)", capsys.readouterr().out)
    assert rows[:2] == [(host.vfs[0].text, "host"), (host.vfs[1].text, "free")]
    assert main(["show", f"vf:{host.vfs[0]}"], host.settings) == 0
    shown = capsys.readouterr().out
    assert "VF 0000:01:10.0: host\n" in shown
    assert "\n  in pool fabric-a\n  left to the host by its configuration" in shown
    words = ["plan", "--mode", "veb", "--protocols", "vfio"]
    assert main([*words, "--pool", "fabric-a"], host.settings) == 0
    shown = capsys.readouterr().out
    assert "veb-sriov-vfio  vf:0000:01:10.2" in shown
    assert f"not veb-sriov-vfio on VF {host.vfs[0]}: VF {host.vfs[0]} is left to the host" in shown
    assert main([*words, "--pool", "b"], host.settings) == 2


# --- a file that is wrong -------------------------------------------------------------------------


def test_a_broken_file_keeps_nothing_from_being_given_back_but_gives_nothing_out(host: FakeHost) -> None:
    owner = host.owner(GUEST, "web")
    claim = Claim(Resource.vf(host.vfs[0]), Mode.EXCLUSIVE, State.ACTIVE, owner, "a" * 16, "n", 0.0, pf=PF_A)
    host.claim(claim)
    path = write(host, "\n[polls]\n")
    with pytest.raises(BadInput, match=f"{path}:2: unknown key 'polls'"):
        Session(host.settings).acquire(host.owner(40), [fixed(host.vfs[1])])
    with pytest.raises(BadInput):
        Session(host.settings).adopt(libvirt(), [fixed(host.vfs[1])])
    Session(host.settings).adopt(libvirt(), [fixed(host.vfs[1])], running=True)
    found = audit(host.settings, read_inventory(host.settings), ClaimTable(host.settings).read())
    assert [(one.severity, one.kind) for one in found.findings] == [(Severity.ERROR, "config")]
    Session(host.settings).release(owner)
    assert [one.owner.name for one in ClaimTable(host.settings).read().records] == ["web"]
    assert tuned(host.settings) is host.settings


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(host: FakeHost) -> None:
    path = Path(write(host, ""))
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(VnetLockError, match=f"cannot read {path}: Too many levels"):
        read_config(host.settings)


def test_a_hooks_deadline_is_the_files(host: FakeHost) -> None:
    assert hook_module.read_deadline_s(host.settings) == 40
    write(host, "[timeouts]\nhook = 90\n")
    assert hook_module.read_deadline_s(host.settings) == 90
    assert Session(host.settings).settings.hook_s == 90
