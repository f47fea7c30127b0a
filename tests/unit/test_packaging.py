"""What is packaged beside the code names what the code has."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.fake_host import FakeHost
from vnet_lock import audit
from vnet_lock.audit import Severity, Standing
from vnet_lock.backends import Connection
from vnet_lock.combination import COMBINATIONS, Combination, Policy
from vnet_lock.errors import BadInput, Refused, Unsupported, VnetLockError
from vnet_lock.front import doctor, helper, helper_message, helper_words, ifup, wrapper
from vnet_lock.front.cli import main
from vnet_lock.front.doctor import Health
from vnet_lock.front.report_json import matrix_json
from vnet_lock.matrix import Verdict
from vnet_lock.model import Claim, Mode, OwnerKind, Resource, State
from vnet_lock.request import Intent, RefusalKind
from vnet_lock.settings import DEFAULT

PACKAGING = Path(__file__).parents[2] / "packaging"
PAGES = sorted(path.name for path in (PACKAGING / "man").iterdir())
VERBS = (
    *("status", "show", "plan", "matrix", "claim", "release", "gc", "doctor", "reap", "watch", "vfs"),
    *("resolve", "define", "start", "attach", "detach", "hooks"),
)


def options(verb: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    main([verb, "--help"])
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}


def complete(line: str, tmp_path: Path) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    program = words[0]
    script = f"""
        cd {tmp_path}
        . {PACKAGING}/completions/bash/{program}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
        _{program.replace("-", "_")} {program}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_all_verbs_are_known_to_man_page_and_completion(tmp_path, capsys):
    main(["--help"])
    shown = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert tuple(shown) == VERBS
    assert set(complete("vnet-lock ", tmp_path)) == {*VERBS, "--version", "--help"}
    page = (PACKAGING / "man/vnet-lock.8").read_text()
    assert all(re.search(rf'^\.(BR|BI|TQ\n\.BR) "{verb} ', page, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_all_options_of_a_verb_are_known_to_man_page_and_completion(verb, tmp_path, capsys):
    known = options(verb, capsys)
    assert {word for word in complete(f"vnet-lock {verb} --", tmp_path) if word != "--help"} == known
    page = (PACKAGING / "man/vnet-lock.8").read_text().replace("\\-", "-")
    assert all(option in page for option in known)


def test_all_words_of_the_helper_are_known_to_its_help_man_page_and_completion(tmp_path, capsys):
    targets = (target.value for target in helper_words.Target)
    words = (*helper_words.KEYS, *targets, *helper_words.SWITCHES)
    known = {f"--{name}" for name in words} | {"--help", "--version"}
    assert helper.main(["--help"]) == 0
    assert set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--br"} == known
    assert {word.rstrip("=") for word in complete("qemu-net-helper --", tmp_path)} == known
    page = (PACKAGING / "man/qemu-net-helper.8").read_text().replace("\\-", "-")
    options = page.partition(".SH OPTIONS")[2].partition("\n.SH ")[0]
    assert set(re.findall(r"^\.B[IR]? (--[a-z-]+)", options, re.MULTILINE)) | {"--version"} == known


def test_the_helpers_man_page_has_each_key_and_kind_of_its_messages():
    page = (PACKAGING / "man/qemu-net-helper.8").read_text().partition(".SH THE MESSAGE")[2]
    connection = Connection(Combination.parse("vepa-macvlan-tap"), "52:54:00:00:00:01", (3,))
    table = {word for row in re.findall(r"^([a-z, ]+)\|", page, re.MULTILINE) for word in row.split(", ")}
    assert json.loads(helper_message.encode(connection, Intent("net0", Policy.VEPA))).keys() == table
    kinds = {helper_message.kind_of(error("")) for error in (VnetLockError, Refused, BadInput, Unsupported)}
    assert all(re.search(rf"^\.BR? {kind}\b", page, re.MULTILINE) for kind in kinds)
    codes = re.findall(r"^([0-9])\|", page, re.MULTILINE)
    assert codes == [
        "0",
        *sorted(str(error.exit_code) for error in (VnetLockError, Refused, BadInput, Unsupported)),
    ]


def read_tables(page: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Of each object in the section JSON, the type of each key and what is said of it."""
    section = page.partition(".SH JSON")[2].partition("\n.SH ")[0].replace("\\-", "-")
    tables = {}
    for part in section.split("\n.SS ")[1:]:
        name, _, body = part.partition("\n.PP\n")[0].partition("\n")
        rows = re.findall(r"^([\w.]+)\|([^|\n]+)\|(.*(?:\n\|\|.*)*)", body, re.MULTILINE)
        tables[name] = {key: (kind, text) for key, kind, text in rows}
    return tables


def check_object(value: dict[str, Any], name: str, tables: dict[str, dict[str, tuple[str, str]]]) -> None:
    """Each key is in the table of that name, with its type, and so is what is inside."""
    plain = {"text": str, "number": int, "boolean": bool, "object": dict}
    for key, item in value.items():
        if key not in tables[name] and isinstance(item, dict):
            check_object({f"{key}.{inner}": part for inner, part in item.items()}, name, tables)
            continue
        assert key in tables[name], f"{name}: {key}"
        kind, _ = tables[name][key]
        if item is None:
            assert kind.endswith("?"), f"{name}: {key}"
            continue
        inner = kind.strip("[]?")
        for each in item if kind.startswith("[") else [item]:
            if inner in tables:
                check_object(each, inner, tables)
            else:
                assert type(each) is plain[inner], f"{name}: {key}"


def test_the_man_page_has_each_key_of_what_is_printed_as_json_with_its_type(tmp_path, capsys):
    tables = read_tables((PACKAGING / "man/vnet-lock.8").read_text())
    for name, file in (("status", "status"), ("show", "show"), ("plan", "plan"), ("plan", "refusal")):
        golden = Path(__file__).parent / f"golden/{file}.json"
        check_object(json.loads(golden.read_text()), name, tables)
    verdicts = [Verdict(one, "nic:eth0", reason) for one in COMBINATIONS for reason in ("", "why")]
    check_object(matrix_json([*verdicts, Verdict(COMBINATIONS[0])]), "matrix", tables)
    host = FakeHost(tmp_path)
    host.add_process(os.getpid(), "pytest")
    (vf,) = host.add_pf("0000:01:00.0", "enp1s0", ["igbvf"])
    host.claim(Claim(Resource.vf(vf), Mode.EXCLUSIVE, State.ACTIVE, host.owner(99), "0" * 16, "net0", 1e9))
    for name, *words in (("gc", "--dry-run"), ("doctor",)):
        main([name, "--json", *words], host.settings)
        found = json.loads(capsys.readouterr().out)
        assert all(found.values())
        check_object(found, name, tables)


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("VF", "state", Standing),
        ("CLAIM", "mode", Mode),
        ("CLAIM", "state", State),
        ("CLAIM", "owner.kind", OwnerKind),
        ("FINDING", "severity", Severity),
        ("REFUSAL", "kind", RefusalKind),
        ("CHECK", "health", Health),
        ("CHECK", "check", ("root", *doctor._LOOKS)),
    ],
)
def test_the_man_page_has_each_word_that_a_key_in_json_may_have(name, key, words):
    tables = read_tables((PACKAGING / "man/vnet-lock.8").read_text())
    assert {*map(str, words)} <= {*re.findall(r"[a-z]+", tables[name][key][1])}


def test_the_man_page_has_each_kind_of_finding_with_its_severity():
    page = (PACKAGING / "man/vnet-lock.8").read_text().replace("\\-", "-")
    told = re.findall(r"^(error|warning)\|([a-z-]+)\|", page, re.MULTILINE)
    made = re.findall(r'self\._(error|warn)\(\s*"([a-z-]+)"', Path(audit.__file__).read_text())
    assert {(severity[:4], kind) for severity, kind in told} == {(how[:4], kind) for how, kind in made}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vnet-lock hooks ", "install"),
        ("vnet-lock plan --mode v", "vepa"),
        ("vnet-qemu --", "--print"),
        ("vnet-qemu -nic h", "host,mode=veb"),
        ("qemu-net-helper --m", "--mode="),
        ("qemu-net-helper --mode v", "vepa"),
        # As bash splits "--mode=v" and "--mode=".
        ("qemu-net-helper --mode = v", "vepa"),
        ("qemu-net-helper --mode =", "private"),
        ("qemu-net-helper --dhcp=", "on"),
        ("qemu-net-helper --exec -- tr", "true"),
        ("qemu-net-helper --dev=l", "lo"),
    ],
)
def test_completion_offers(line, offered, tmp_path):
    assert offered in complete(line, tmp_path)


def test_completion_offers_the_pids_of_qemus_where_one_is_to_be_named(tmp_path):
    program = tmp_path / "qemu-system-test"
    shutil.copy(shutil.which("sleep") or "", program)
    with subprocess.Popen([program, "60"]) as qemu:
        found = complete("vnet-qemu --from-pid ", tmp_path)
        qemu.kill()
    assert str(qemu.pid) in found
    assert all(pid.isdecimal() for pid in found)


@pytest.mark.parametrize("page", PAGES)
def test_a_man_page_is_formatted_without_a_complaint(page, tmp_path):
    if shutil.which("groff") is None:
        pytest.skip("needs groff, which formats man pages")
    for name in PAGES:  # as they are installed: one page may be another's
        place = tmp_path / f"man{name[-1]}" / name
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(PACKAGING / "man" / name)
    command = ["groff", f"-I{tmp_path}", "-s", "-t", "-man", "-Tutf8", "-ww", PACKAGING / "man" / page]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_each_program_has_a_man_page_and_what_is_beside_the_code_is_installed_where_its_readers_look():
    config = configparser.ConfigParser()
    config.read(PACKAGING.parent / "setup.cfg")
    programs = re.findall(r"^([a-z-]+) =", config["options.entry_points"]["console_scripts"], re.MULTILINE)
    assert {*programs} <= {page.rpartition(".")[0] for page in PAGES}
    listed = {place: names.split() for place, names in config["options.data_files"].items()}
    pages = {f"packaging/man/{page}" for page in PAGES}
    assert {name for at in "158" for name in listed[f"share/man/man{at}"] if name.endswith(at)} == pages
    bash = "packaging/completions/bash"
    completions = {f"{bash}/{path.name}" for path in (PACKAGING.parent / bash).iterdir()}
    assert {*listed["share/bash-completion/completions"]} == completions


@pytest.mark.parametrize("of", ["<name>(.*)</name>", "<uuid>(.*)</uuid>", "<mac address='(.*)'/>"])
def test_the_example_guests_can_be_defined_on_one_host(of):
    examples = sorted((PACKAGING.parent / "xml").glob("*.xml"))
    found = [{*re.findall(of, path.read_text())} for path in examples]
    assert sum(map(len, found)) == len(set.union(*found)) >= len(examples)


def test_tmpfiles_makes_the_directories_that_claims_live_in():
    text = (PACKAGING / "tmpfiles.d/vnet-lock.conf").read_text()
    made = [line.split()[1:4] for line in text.splitlines() if line.startswith("d ")]
    assert made == [[DEFAULT.run, "0755", "root"], [DEFAULT.claims_dir, "0755", "root"]]


@pytest.mark.parametrize("service", ["hooks", "reap", "watch"])
def test_a_service_is_one_that_systemd_understands_and_runs_a_command_of_ours(service, tmp_path, capsys):
    text = (PACKAGING / f"systemd/vnet-lock-{service}.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    program, verb, *words = command.split()
    # A name alone: systemd looks for it in /usr/local/bin, where README puts it, and in /usr/bin.
    assert (program, verb) == ("vnet-lock", service)
    assert {*words} <= options(verb, capsys) | {"serve"}
    # Each is one for a host, and Refused where another runs: to try again would go on for ever.
    assert f"RestartPreventExitStatus={Refused.exit_code}\n" in text
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze, which reads units")
    unit = tmp_path / f"vnet-lock-{service}.service"
    unit.write_text(text.replace(f"={program} ", "=true "))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_each_program_says_of_itself_is_whole(capsys):
    for show in (helper.main, wrapper.main, ifup.main):
        assert show(["--help"]) == 0
        assert "Exit status: " in capsys.readouterr().out
    wrapper.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{key}=" in shown for key in helper_words.KEYS)
