"""hooks/qemu as libvirt runs it: when it starts Python, and how it ends, whatever breaks."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
XML = TOP / "xml"
UUID = "2f6c9a52-3f5e-4a0e-9d0b-6f4f0c5d1aff"
OPERATIONS = ("prepare", "start", "started", "stopped", "release", "reconnect", "migrate", "restore", "new")
REFUSING = ("migrate", "restore", "prepare", "start")
# libvirt takes the guest's XML from what the hook says there, where it ends with 0.
XML_WANTED = ("migrate", "restore")

HOSTDEV = """<interface type='hostdev' managed='yes'>
      <mac address='52:54:00:00:00:01'/>
      <source>
        <address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/>
      </source>
      <address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/>
    </interface>"""
# As libvirt writes an interface of a direct network once it is resolved.
DIRECT_OF_NETWORK = """<interface type='direct'>
      <mac address='52:54:00:00:00:02'/>
      <source network='direct-net' portid='5f3e0c8e-0000-4000-8000-000000000000' dev='enp1s0' mode='bridge'/>
      <target dev='macvtap0'/>
    </interface>"""
DIRECT = "<interface type='direct'><source dev='enp1s0' mode='bridge'/><target dev='macvtap0'/></interface>"
NETWORK = "<interface type='network'><source network='vfs'/></interface>"
PLAIN_HOSTDEV = """<hostdev mode='subsystem' type='pci' managed='yes'>
      <source>
        <address domain='0x0000' bus='0x01' slot='0x10' function='0x4'/>
      </source>
    </hostdev>"""
INTENT = '<metadata><vnet:guest xmlns:vnet="urn:vnet-lock:guest:1"/></metadata>'


def guest(devices: str = "", head: str = "") -> bytes:
    return (
        f"<domain type='kvm'>\n  <name>g</name>\n  <uuid>{UUID}</uuid>\n  {head}\n"
        f"  <devices>\n    {devices}\n  </devices>\n</domain>\n"
    ).encode()


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


class Shim:
    """The shim in a directory of its own, with a Python that only writes down how it was called."""

    driver = "qemu"
    unread: Sequence[str] = ("started", "new")

    def __init__(self, root: Path, shell: list[str]) -> None:
        self.root = root
        self.shell = shell
        self.path = root / "50-vnet-lock"
        self.python = root / "a python"
        self.claims = root / "run/vnet-lock/claims"
        self.fill_in(python=str(self.python), path="/nowhere", root=str(root))
        self.python_does("cat >stdin; exit 0")

    def fill_in(self, **values: str) -> None:
        text = (TOP / "hooks" / self.driver).read_text()
        for name, value in values.items():
            before = next(line for line in text.splitlines() if line.startswith(f"{name}="))
            text = text.replace(before, f"{name}='{value}'", 1)
        self.path.write_text(text)
        self.path.chmod(0o755)

    def python_does(self, script: str) -> None:
        self.python.write_text(f'#!/bin/sh\ncd "{self.root}"\nprintf "%s\\n" "$@" >argv\n{script}\n')
        self.python.chmod(0o755)

    def claim(self, resource: str, uuid: str = UUID) -> None:
        self.claims.mkdir(parents=True, exist_ok=True)
        (self.claims / f"{resource}~{uuid}~0123456789abcdef.json").write_text("{}")

    def run(self, operation: str, xml: bytes) -> Ended:
        """Write all of the XML; where the shim may go early, the broken pipe is ignored, as libvirt does."""
        argv = [*self.shell, str(self.path), "g", operation, "begin", "-"]
        out, err = self.root / "out", self.root / "err"
        with (
            out.open("wb") as stdout,
            err.open("wb") as stderr,
            subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr) as process,
        ):
            assert process.stdin
            unread = suppress(BrokenPipeError) if operation in self.unread else nullcontext()
            with unread, process.stdin as stdin:
                stdin.write(xml)
            status = process.wait(20)
        return Ended(status, out.read_text(), err.read_text())

    @property
    def started_python(self) -> bool:
        return (self.root / "argv").exists()

    @property
    def argv(self) -> list[str]:
        return (self.root / "argv").read_text().split("\n")[:-1]


SHELLS = {"sh": ["/bin/sh"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}


@pytest.fixture(params=SHELLS)
def shim(request: pytest.FixtureRequest, tmp_path: Path) -> Shim:
    shell = SHELLS[request.param]
    if not shutil.which(shell[0]):
        pytest.skip(f"needs {shell[0]}; on Debian: apt-get install {shell[0]}")
    return Shim(tmp_path, shell)


# --- when Python starts -------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_guest_without_a_device_of_ours_never_starts_python(shim: Shim, operation: str) -> None:
    xml = guest("<interface type='bridge'><source bridge='br0'/></interface>" + NETWORK)
    assert shim.run(operation, xml) == Ended(0, "", "")
    assert not shim.started_python


@pytest.mark.parametrize("operation", ["started", "new"])
def test_an_operation_with_nothing_to_do_never_starts_python(shim: Shim, operation: str) -> None:
    shim.claim("vf:0000:01:10.2")
    assert shim.run(operation, guest(HOSTDEV, INTENT)) == Ended(0, "", "")
    assert not shim.started_python


@pytest.mark.parametrize("operation", ["migrate", "restore", "prepare", "reconnect"])
@pytest.mark.parametrize("xml", [guest(HOSTDEV), guest(PLAIN_HOSTDEV), guest(DIRECT), guest(head=INTENT)])
def test_a_guest_with_a_device_of_ours_starts_python(shim: Shim, operation: str, xml: bytes) -> None:
    assert shim.run(operation, xml) == Ended(0, "", "")
    assert shim.started_python


@pytest.mark.parametrize("path", sorted(XML.glob("*.xml")), ids=lambda path: path.name)
def test_prepare_of_an_example_starts_python_where_the_example_has_a_device(shim: Shim, path: Path) -> None:
    # Without its comment, which libvirt doesn't pass on.
    xml = path.read_bytes().partition(b"-->")[2]
    shim.run("prepare", xml)
    assert shim.started_python == (path.name not in ("network.xml", "no-device.xml"))


def test_python_gets_the_same_xml_and_the_pid_of_libvirts_daemon(shim: Shim) -> None:
    xml = guest(HOSTDEV + "<description>$HOME `id` \\n é 'a' \"b\"</description>")
    assert shim.run("prepare", xml).status == 0
    assert (shim.root / "stdin").read_bytes() == xml
    assert shim.argv[:4] == ["-I", "-S", "-c", ""]
    assert shim.argv[-7:] == ["/nowhere", str(shim.root), str(os.getpid()), "g", "prepare", "begin", "-"]


@pytest.mark.parametrize("devices", [PLAIN_HOSTDEV, DIRECT, HOSTDEV, HOSTDEV + PLAIN_HOSTDEV + DIRECT])
def test_start_needs_no_python_where_all_was_claimed_at_prepare(shim: Shim, devices: str) -> None:
    shim.claim("vf:0000:01:10.2")
    assert shim.run("start", guest(devices)) == Ended(0, "", "")
    assert not shim.started_python


@pytest.mark.parametrize(
    "devices",
    [
        HOSTDEV,
        HOSTDEV.replace("0x2", "0x4") + HOSTDEV,
        HOSTDEV + HOSTDEV.replace("0x2", "0x4"),
        HOSTDEV.replace("0x0000", "0x10000"),
        HOSTDEV.replace("'", '"'),
        HOSTDEV.replace("<source>", "<source x='y'>"),
        DIRECT_OF_NETWORK,
        DIRECT + DIRECT_OF_NETWORK,
        PLAIN_HOSTDEV + HOSTDEV,
    ],
)
def test_start_starts_python_for_what_libvirt_resolved_since(shim: Shim, devices: str) -> None:
    shim.claim("vf:0000:01:10.4")
    # Neither another guest's claim nor one for another domain of PCI addresses makes it ours.
    shim.claim("vf:0000:01:10.2", uuid=UUID.replace("2f6c", "ffff"))
    assert shim.run("start", guest(devices)) == Ended(0, "", "")
    assert shim.started_python


@pytest.mark.parametrize(
    "words", ["interface type='direct'", 'interface type="hostdev"', "interface", "source"]
)
def test_what_stands_in_the_metadata_hides_no_interface(shim: Shim, words: str) -> None:
    head = f"<metadata><x:a xmlns:x='urn:x'><{words}/></x:a></metadata>"
    assert shim.run("start", guest(HOSTDEV, head)) == Ended(0, "", "")
    assert shim.started_python


@pytest.mark.parametrize("operation", ["stopped", "release"])
def test_an_end_starts_python_only_for_a_guest_with_claims(shim: Shim, operation: str) -> None:
    assert shim.run(operation, guest(HOSTDEV)) == Ended(0, "", "")
    shim.claim("vf:0000:01:10.2", uuid=UUID.replace("2f6c", "ffff"))
    assert shim.run(operation, guest(HOSTDEV)) == Ended(0, "", "")
    assert not shim.started_python
    shim.claim("vf:0000:01:10.2")
    # The definition may have lost its device since the start.
    assert shim.run(operation, guest()) == Ended(0, "", "")
    assert shim.started_python


# --- stdin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("size", "does"),
    [(100_000, "exec <&-; exit 0"), (100_000, "exit 3"), (1_000_000, "cat >/dev/null")],
)
def test_a_large_guest_is_read_to_its_end_whatever_python_does(
    shim: Shim, operation: str, size: int, does: str
) -> None:
    shim.claim("nic:bond0")
    shim.python_does(does)
    disks = "<disk type='file'><source file='/var/lib/libvirt/images/a.qcow2'/></disk>\n" * (size // 70)
    ended = shim.run(operation, guest(disks + DIRECT_OF_NETWORK))
    assert ended.status == (1 if does == "exit 3" and operation in REFUSING else 0)
    assert ended.stdout == ""


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_xml_at_all_refuses_a_start_and_nothing_else(shim: Shim, operation: str) -> None:
    ended = shim.run(operation, b"")
    assert ended.status == (1 if operation in REFUSING else 0)
    assert not shim.started_python


@pytest.mark.timeout(20)
@pytest.mark.parametrize("operation", ["start", "stopped", "release"])
def test_a_large_document_without_a_uuid_takes_no_time_of_note(shim: Shim, operation: str) -> None:
    xml = b"<domain>" + b"<a>hostdev</a>" * 70_000 + b"</domain>"
    assert shim.run(operation, xml).status == 0


# --- what breaks --------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [*REFUSING, "stopped", "release", "reconnect"])
@pytest.mark.parametrize("how", ["missing", "not executable", "status 3", "killed", "no interpreter"])
def test_a_broken_python_refuses_a_start_in_one_line_and_nothing_else(
    shim: Shim, operation: str, how: str
) -> None:
    shim.claim("nic:bond0")
    match how:
        case "missing":
            shim.python.unlink()
        case "not executable":
            shim.python.chmod(0o644)
        case "status 3":
            shim.python_does("exit 3")
        case "killed":
            shim.python_does("kill -9 $$")
        case "no interpreter":
            shim.python.write_text("#!/nowhere/python\n")
    ended = shim.run(operation, guest(DIRECT_OF_NETWORK))
    assert ended.status == (1 if operation in REFUSING else 0)
    assert ended.stdout == ""
    ours = [line for line in ended.stderr.splitlines() if line.startswith("vnet-lock: ")]
    assert len(ours) == 1
    assert 'guest "g"' in ours[0]
    if how in ("missing", "not executable", "status 3"):
        assert ended.stderr.splitlines() == ours


@pytest.mark.parametrize("operation", [*REFUSING, "stopped", "release", "reconnect"])
def test_a_refusal_by_python_is_its_own_words_alone(shim: Shim, operation: str) -> None:
    shim.claim("nic:bond0")
    shim.python_does("cat >/dev/null; echo 'vnet-lock: it is held' >&2; echo noise; exit 1")
    ended = shim.run(operation, guest(DIRECT_OF_NETWORK))
    said = "noise\n" if operation in XML_WANTED else ""
    assert ended.stdout == said
    assert ended.stderr.splitlines()[0] == "vnet-lock: it is held"
    if operation in REFUSING:
        assert ended == Ended(1, said, "vnet-lock: it is held\n")
    else:
        assert ended.status == 0


def test_a_package_that_does_not_load_is_said_in_one_line(shim: Shim) -> None:
    shim.fill_in(python=sys.executable, path=str(shim.root), root=str(shim.root))
    (shim.root / "vnet_lock").mkdir()
    (shim.root / "vnet_lock/__init__.py").write_text("raise RuntimeError('half\\nof it')\n")
    ended = shim.run("prepare", guest(HOSTDEV))
    assert ended == Ended(
        1,
        "",
        "vnet-lock: its Python package does not load (half of it); run: vnet-lock hooks install\n",
    )
    assert shim.run("prepare", guest()) == Ended(0, "", "")
    assert shim.run("reconnect", guest(HOSTDEV)).status == 0


def test_nothing_in_the_current_directory_or_the_environment_becomes_our_python_code(
    shim: Shim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim.fill_in(python=sys.executable, path=str(TOP), root=str(shim.root))
    for name in ("signal.py", "vnet_lock.py", "sitecustomize.py"):
        (tmp_path / name).write_text("open('taken', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert shim.run("prepare", guest("<hostdev type='usb'/>")) == Ended(0, "", "")
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("operation", ["started", "network-created", "port-created", "plugged"])
def test_the_network_hook_reads_all_and_lets_everything_pass(operation: str) -> None:
    done = subprocess.run(
        [TOP / "hooks/network", "net", operation, "begin", "-"],
        input=b"<hookData/>" * 100_000,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
