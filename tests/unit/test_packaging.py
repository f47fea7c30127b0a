"""What is packaged beside the code names what the code has."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vnet_lock.backends import Connection
from vnet_lock.combination import Combination, Policy
from vnet_lock.errors import BadInput, Refused, Unsupported, VnetLockError
from vnet_lock.front import helper, helper_message, helper_words
from vnet_lock.front.cli import main
from vnet_lock.request import Intent
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
    words = (*helper_words.KEYS, *helper_words.TARGETS, *helper_words.SWITCHES)
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
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze, which reads units")
    unit = tmp_path / f"vnet-lock-{service}.service"
    unit.write_text(text.replace(f"={program} ", "=true "))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
