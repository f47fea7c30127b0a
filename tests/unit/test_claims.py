"""The claim table: what is committed stays, what is odd counts as held, and nothing has two owners."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import pytest

from vnet_lock.claims import ClaimTable, new_token
from vnet_lock.errors import Vanished, VnetLockError
from vnet_lock.journal import Driver, Link, MadeLink, VfAdmin
from vnet_lock.model import (
    Claim,
    Claims,
    Damaged,
    Mode,
    Owner,
    OwnerKind,
    PciAddress,
    Process,
    Reservation,
    Resource,
    State,
)
from vnet_lock.settings import Settings

UUID = "5c4dd4ae-1f0e-4b4f-9a53-0a1e5ec8f7a1"
PF = PciAddress.parse("0000:01:00.0")
OWNER = Owner(OwnerKind.LIBVIRT, "web1", "boot", UUID, Process(4711, 99), "/run/libvirt/qemu/web1.pid")
QEMU = Owner(OwnerKind.QEMU, "vm2", "boot", process=Process(77, 5))
FULL = Claim(
    resource=Resource.parse("vf:0000:01:10.0"),
    mode=Mode.SHARED,
    state=State.RELEASING,
    owner=OWNER,
    token="0123456789abcdef",
    interface="ua-net0",
    since=1700000000.25,
    combination="veb-sriov-vfio",
    mac="52:54:00:12:34:56",
    pf=PF,
    worker=Process(4712, 100),
    journal=(
        VfAdmin(PF.text, 3, "00:00:00:00:00:00", 42, 1, True, False, None, 10, 100),
        Link("0000:01:10.0", "52:54:00:00:00:01", 1500, True, True),
        Driver("0000:01:10.0", "igbvf", None),
        MadeLink("vl0123", "ua-net0", "vnet-lock 0123456789abcdef"),
    ),
    vlan=42,
    reservation=Reservation("migrate", 1234.5),
    has_host_pids=True,
    has_host_network=True,
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return replace(Settings.under(tmp_path), proc="/proc")


@pytest.fixture
def table(settings: Settings) -> ClaimTable:
    return ClaimTable(settings)


def a_claim(resource: str = "vf:0000:01:10.0", owner: Owner = OWNER) -> Claim:
    return replace(FULL, resource=Resource.parse(resource), owner=owner, token=new_token(), journal=())


def add(table: ClaimTable, *claims: Claim) -> None:
    with table.guarded() as writer:
        writer.add(claims)


def path_of(settings: Settings, claim: Claim) -> Path:
    (path,) = Path(settings.claims_dir).glob(f"*~{claim.token}.json")
    return path


# --- what is written is read ---------------------------------------------------------------------


def test_a_host_where_nothing_was_claimed_has_no_claims_and_reading_makes_nothing(
    table: ClaimTable, settings: Settings
) -> None:
    assert table.read() == Claims()
    assert not os.path.lexists(settings.run)


def test_every_field_of_a_claim_comes_back(table: ClaimTable) -> None:
    for field in fields(Claim):  # so that a new field can't be forgotten here
        assert getattr(FULL, field.name) != field.default, field.name
    add(table, FULL)
    assert table.read() == Claims((FULL,))
    with table.guarded() as writer:
        assert writer.read() == Claims((FULL,))


def test_a_record_of_an_older_version_that_has_no_vlan_is_read(table: ClaimTable, settings: Settings) -> None:
    add(table, FULL)
    path = path_of(settings, FULL)
    record = json.loads(path.read_text())
    del record["vlan"]
    path.write_text(json.dumps(record))
    assert table.read() == Claims((replace(FULL, vlan=None),))


def test_a_record_is_named_after_resource_guest_and_token(table: ClaimTable, settings: Settings) -> None:
    other = a_claim("nic:br~0", QEMU)
    add(table, FULL, other)
    assert set(os.listdir(settings.claims_dir)) == {
        f"vf:0000:01:10.0~{UUID}~0123456789abcdef.json",
        f"nic:br~0~77~{other.token}.json",
    }
    assert table.read().on(Resource.nic("br~0")) == (other,)


def test_directories_and_records_can_be_read_by_all_and_written_by_us_whatever_the_umask(
    table: ClaimTable, settings: Settings
) -> None:
    for umask in (0, 0o077):
        old = os.umask(umask)
        try:
            add(table, FULL)
        finally:
            os.umask(old)
        modes = [os.stat(path).st_mode & 0o777 for path in (settings.run, settings.claims_dir)]
        assert modes == [0o755, 0o755]
        assert path_of(settings, FULL).stat().st_mode & 0o777 == 0o644
        shutil.rmtree(settings.run)


def test_replace_rewrites_a_claim_in_place(table: ClaimTable) -> None:
    add(table, FULL)
    changed = replace(FULL, state=State.ACTIVE, worker=None, journal=())
    with table.guarded() as writer:
        writer.replace(changed)
        assert writer.read() == Claims((changed,))


def test_a_claim_handed_over_to_another_process_is_one_record_all_the_time(
    table: ClaimTable, settings: Settings
) -> None:
    claim = a_claim(owner=QEMU)
    add(table, claim)
    names = os.listdir(settings.claims_dir)
    handed = replace(claim, owner=replace(QEMU, process=Process(78, 6)))
    with table.guarded() as writer:
        writer.replace(handed)
    assert os.listdir(settings.claims_dir) == names
    assert table.read() == Claims((handed,))
    with table.guarded() as writer:
        writer.drop(handed)
    assert table.read() == Claims()


def test_a_claim_dropped_by_another_is_not_brought_back_by_replace(table: ClaimTable) -> None:
    add(table, FULL)
    with table.guarded() as writer:
        writer.drop(FULL)
        with pytest.raises(Vanished, match="gone"):
            writer.replace(FULL)
    assert table.read() == Claims()


def test_dropping_twice_is_dropping_once(table: ClaimTable) -> None:
    add(table, FULL)
    for _ in range(2):
        with table.guarded() as writer:
            writer.drop(FULL)
    assert table.read() == Claims()


def test_a_late_release_never_touches_the_next_owners_claim(table: ClaimTable) -> None:
    first, second = a_claim(), a_claim(owner=QEMU)
    third = a_claim()  # the same guest, started again
    add(table, first)
    with table.guarded() as writer:
        writer.drop(first)
        writer.add([second])
        writer.drop(first)
        with pytest.raises(Vanished):
            writer.replace(first)
    assert table.read() == Claims((second,))
    with table.guarded() as writer:
        writer.drop(second)
        writer.add([third])
        writer.drop(first)
    assert table.read() == Claims((third,))


def test_a_claim_is_never_added_over_another(table: ClaimTable) -> None:
    add(table, FULL)
    with pytest.raises(VnetLockError, match="already"):
        add(table, a_claim("vf:0000:01:10.1"), replace(FULL, interface="net9"))
    assert table.read() == Claims((FULL,))


@pytest.mark.parametrize(
    "claim",
    [
        replace(FULL, token="../../../../tmp/x"),
        replace(FULL, owner=replace(OWNER, uuid="../x")),
        replace(FULL, owner=replace(OWNER, uuid=None, process=None)),
        replace(FULL, interface="x" * (1 << 20)),
    ],
)
def test_a_claim_that_could_not_be_read_back_is_not_written(
    table: ClaimTable, settings: Settings, claim: Claim
) -> None:
    with pytest.raises(ValueError, match=r"cannot be the name|larger than"):
        add(table, claim)
    assert os.listdir(settings.claims_dir) == []


def test_a_writer_is_of_no_use_once_the_guard_is_gone(table: ClaimTable) -> None:
    with table.guarded() as writer:
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.add([FULL])


def test_tokens_are_16_hexadecimal_digits_and_differ() -> None:
    tokens = {new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(len(token) == 16 and int(token, 16) >= 0 for token in tokens)


# --- what is odd counts as held ------------------------------------------------------------------


def damaged(table: ClaimTable) -> Damaged:
    claims = table.read()
    assert claims.records == ()
    (found,) = claims.damaged
    return found


def without(name: str) -> Callable[[dict[str, object]], object]:
    return lambda record: record.pop(name)


def with_value(name: str, value: object) -> Callable[[dict[str, object]], object]:
    return lambda record: record.update({name: value})


def with_owners(name: str, value: object) -> Callable[[dict[str, object]], object]:
    return lambda record: cast(dict[str, object], record["owner"]).update({name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("version"), "it has no 'version'"),
        (without("owner"), "it has no 'owner'"),
        (with_value("version", 2), "it has version 2, and this program knows 1"),
        (with_value("version", True), "version is bool"),
        (with_value("state", "stale"), "'stale' is not a valid State"),
        (with_value("mode", None), "mode is NoneType"),
        (with_value("since", float("nan")), "since is nan"),
        (with_value("since", "now"), "since is str"),
        (with_value("mac", 7), "mac is int"),
        (with_value("pf", "eth0"), "'eth0' is not a PCI address (like 0000:af:06.0)"),
        (with_value("worker", {"pid": 0, "start_ticks": 1}), "worker is pid 0, start 1"),
        (with_value("worker", {"pid": True, "start_ticks": 1}), "pid is bool"),
        (with_value("worker", {"pid": "1", "start_ticks": 1}), "pid is str"),
        (with_value("owner", {"kind": "libvirt"}), "it has no 'name'"),
        (with_owners("pid_file", "/run/a\0b"), "its owner has '/run/a\\x00b', which is no name"),
        (with_owners("pid_file", "/run/\ud800"), "its owner has '/run/\\ud800', which is no name"),
        (with_owners("name", "web\udcff"), "its owner has 'web\\udcff', which is no name"),
        (with_value("journal", {}), "journal is dict"),
        (with_value("journal", ["x"]), "an entry of the journal is no JSON object"),
        (with_value("journal", [{"kind": "bomb"}]), "it has no 'bomb'"),
        (
            with_value("journal", [{"kind": "driver", "pci": 5, "driver": None}]),
            "pci in the journal is int",
        ),
        (
            with_value("token", "f" * 16),
            f"its name does not fit what it says (vf:0000:01:10.0, token {'f' * 16})",
        ),
        (
            with_value("resource", "vf:0000:01:10.7"),
            "its name does not fit what it says (vf:0000:01:10.7, token 0123456789abcdef)",
        ),
    ],
)
def test_a_record_with_something_wrong_in_it_is_damaged_and_says_what(
    table: ClaimTable, settings: Settings, change: Callable[[dict[str, object]], object], reason: str
) -> None:
    add(table, FULL)
    path = path_of(settings, FULL)
    record = json.loads(path.read_bytes())
    change(record)
    path.write_text(json.dumps(record))
    assert damaged(table) == Damaged(str(path), reason, FULL.resource)


def test_a_pid_files_path_may_have_bytes_that_are_no_text(table: ClaimTable) -> None:
    claim = replace(FULL, owner=replace(FULL.owner, pid_file=os.fsdecode(b"/run/vm\xff.pid")))
    add(table, claim)
    assert table.read().records == (claim,)


def test_a_record_of_another_guest_than_its_name_says_is_damaged(
    table: ClaimTable, settings: Settings
) -> None:
    add(table, FULL)
    path = path_of(settings, FULL)
    path.write_text(path.read_text().replace(UUID, UUID[::-1]))
    assert "its name does not fit" in damaged(table).reason


def test_a_record_cut_short_anywhere_is_damaged_and_keeps_its_resource(
    table: ClaimTable, settings: Settings
) -> None:
    add(table, FULL)
    path = path_of(settings, FULL)
    data = path.read_bytes().rstrip()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        found = damaged(table)
        assert (found.resource, found.reason[:13]) == (FULL.resource, "it is no JSON")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"[" * 100_000, b"1" * 10_000, b"null", b"[]"])
def test_a_record_that_is_no_object_is_damaged(table: ClaimTable, settings: Settings, data: bytes) -> None:
    add(table, FULL)
    path_of(settings, FULL).write_bytes(data)
    assert damaged(table).resource == FULL.resource


def make_link(path: Path) -> None:
    target = path.with_name(".elsewhere")
    path.rename(target)
    path.symlink_to(target)


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o644)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_huge(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate((1 << 20) + 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (make_link, "it is a symbolic link"),
        (make_fifo, "it is no plain file"),
        (make_directory, "it is no plain file"),
        (make_huge, "it is larger than 1048576 bytes"),
        (lambda path: path.chmod(0o646), "others can write it"),
        (lambda path: path.chmod(0o664), "others can write it"),
    ],
)
def test_a_record_that_is_no_file_of_ours_is_damaged(
    table: ClaimTable, settings: Settings, change: Callable[[Path], None], reason: str
) -> None:
    add(table, FULL)
    path = path_of(settings, FULL)
    change(path)
    assert damaged(table) == Damaged(str(path), reason, FULL.resource)


@pytest.mark.as_root
def test_a_record_of_another_user_is_damaged(table: ClaimTable, settings: Settings) -> None:
    add(table, FULL)
    os.chown(path_of(settings, FULL), 65534, -1)
    assert damaged(table).reason == "it belongs to uid 65534"


@pytest.mark.parametrize("name", ["README", "vf:0000:01:10.0", "x~y~z.json", "a\nb~1~2.json", "\udcff~1~2"])
def test_a_file_that_is_no_record_is_damaged_and_is_about_nothing_known(
    table: ClaimTable, settings: Settings, name: str
) -> None:
    add(table, FULL)
    path_of(settings, FULL).rename(f"{settings.claims_dir}/{name}")
    found = damaged(table)
    assert found.resource in (None, FULL.resource)
    assert (found.resource is None) == (not name.startswith("vf:"))


def test_one_damaged_record_hides_no_other(table: ClaimTable, settings: Settings) -> None:
    good = a_claim("vf:0000:01:10.1")
    add(table, FULL, good)
    path_of(settings, FULL).write_text("{")
    claims = table.read()
    assert (claims.records, len(claims.damaged)) == ((good,), 1)


# --- directories and errors ----------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[VnetLockError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("which", ["run", "claims_dir"])
def test_a_directory_that_others_can_write_is_not_used(
    table: ClaimTable, settings: Settings, which: str
) -> None:
    add(table, FULL)
    os.chmod(getattr(settings, which), 0o775)
    for use in (table.read, lambda: add(table, a_claim())):
        with pytest.raises(VnetLockError) as caught:
            use()
        assert f"{getattr(settings, which)} is not ours alone" in one_line(caught)


@pytest.mark.as_root
@pytest.mark.parametrize("which", ["run", "claims_dir"])
def test_a_directory_of_another_user_is_not_used(table: ClaimTable, settings: Settings, which: str) -> None:
    add(table, FULL)
    os.chown(getattr(settings, which), 65534, -1)
    for use in (table.read, lambda: add(table, a_claim())):
        with pytest.raises(VnetLockError) as caught:
            use()
        assert f"{getattr(settings, which)} is not ours: it belongs to uid 65534" in one_line(caught)


@pytest.mark.parametrize("which", ["run", "claims_dir"])
@pytest.mark.parametrize("what", ["link", "file"])
def test_what_is_no_real_directory_is_not_used(
    table: ClaimTable, settings: Settings, tmp_path: Path, which: str, what: str
) -> None:
    path = Path(getattr(settings, which))
    add(table, FULL)
    path.rename(tmp_path / "elsewhere")
    if what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.touch()
    for use in (table.read, lambda: add(table, a_claim())):
        with pytest.raises(VnetLockError) as caught:
            use()
        assert f"cannot use the directory {path}" in one_line(caught)
        assert "move" in one_line(caught)


@pytest.mark.as_root
def test_a_user_reads_roots_claims_and_is_told_to_be_root_for_more() -> None:
    with open_root() as root:
        settings = Settings.under(root)
        add(ClaimTable(settings), FULL)
        assert read_and_guard_as_nobody(settings) == [
            "1",
            f"VnetLockError: {settings.run} is not ours: it belongs to uid 0; run as root",
        ]


@pytest.mark.as_root
def test_a_directory_that_cannot_be_made_is_one_line_that_says_run_as_root() -> None:
    with open_root() as root:
        assert read_and_guard_as_nobody(Settings.under(root)) == [
            "0",
            f"VnetLockError: cannot make the directory {root}/run: Permission denied; run as root",
        ]


@pytest.mark.as_root
def test_a_read_only_run_directory_is_one_clear_line(table: ClaimTable, settings: Settings) -> None:
    add(table, FULL)
    code = (
        "import sys; from vnet_lock.claims import ClaimTable; from vnet_lock.settings import Settings\n"
        "table = ClaimTable(Settings.under(sys.argv[1])); print(len(table.read().records))\n"
        "try:\n    table.guarded().__enter__()\nexcept Exception as error: print(type(error).__name__, error)"
    )
    root = settings.run.removesuffix("/run/vnet-lock")
    mount = f"mount --bind {settings.run} {settings.run} && mount -o remount,bind,ro {settings.run}"
    count, message = run_python(code, root, mount)
    assert count == "1"
    assert message.startswith(
        f"VnetLockError cannot open the lock file {settings.guard_path}: Read-only file system"
    )


@pytest.mark.as_root
def test_where_only_some_of_an_interfaces_claims_find_room_none_is_left(settings: Settings) -> None:
    code = """
import sys
from dataclasses import replace
from tests.unit.test_claims import FULL, ClaimTable, Resource, Settings, VnetLockError, add, new_token
table = ClaimTable(Settings.under(sys.argv[1]))
add(table, FULL)
many = [replace(FULL, resource=Resource.nic(f"n{i}"), token=new_token()) for i in range(20)]
try:
    add(table, *many)
except VnetLockError as error:
    print(str(error).replace(sys.argv[1], "ROOT"))
print(table.read().records == (FULL,), table.read().damaged)
add(table, many[0])
print(len(table.read().records))
"""
    root = settings.run.removesuffix("/run/vnet-lock")
    # The root, run, vnet-lock, claims, guard, .spare, a record: room for four more.
    lines = run_python(code, root, f"mount -t tmpfs -o mode=755,nr_inodes=11 none {root}")
    assert lines[0].startswith("cannot write the claim ROOT/run/vnet-lock/claims/nic:n4~")
    assert "No space left on device; make room" in lines[0]
    assert lines[1:] == ["True ()", "2"]


def test_what_a_killed_writer_left_is_not_read_and_the_next_one_removes_it(
    table: ClaimTable, settings: Settings
) -> None:
    add(table, FULL)
    leftover = Path(settings.claims_dir, ".new")
    leftover.write_text("{")
    assert table.read() == Claims((FULL,))
    with table.guarded():
        assert not leftover.exists()


def test_a_table_of_2000_claims_is_read_in_a_few_tens_of_milliseconds(
    table: ClaimTable, settings: Settings
) -> None:
    claims = [
        replace(
            FULL, resource=Resource.vf(PciAddress(0, 2 + i // 256, i // 8 % 32, i % 8)), token=new_token()
        )
        for i in range(2000)
    ]
    add(table, *claims)
    took_s, floor_s = [], []
    for _ in range(5):
        before = time.process_time()
        read = table.read()
        took_s.append(time.process_time() - before)
        assert len(read.records) == 2000
        # Opening, reading and parsing as JSON is the least that it could cost.
        before = time.process_time()
        for name in os.listdir(settings.claims_dir):
            with open(f"{settings.claims_dir}/{name}", "rb", buffering=0) as file:
                json.loads(file.read())
        floor_s.append(time.process_time() - before)
    assert min(took_s) < 4 * min(floor_s)


def run_python(code: str, root: str, mount: str = "true") -> list[str]:
    """What a program prints, in a mount namespace of its own after the shell command ``mount``."""
    shell = f'mount --make-rprivate / && {mount} && exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell, sys.executable, code, root],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def read_and_guard_as_nobody(settings: Settings) -> list[str]:
    """How many claims another user reads, and the error with which a guard is refused."""
    table = ClaimTable(settings)
    reader, writer = os.pipe()

    def body() -> None:
        os.setgid(65534)
        os.setuid(65534)
        os.write(writer, f"{len(table.read().records)}\n".encode())
        try:
            with table.guarded():
                pass
        except VnetLockError as error:
            os.write(writer, f"{type(error).__name__}: {error}\n".encode())

    pid = start(body)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = pipe.read().splitlines()
    assert os.waitpid(pid, 0)[1] == 0
    return lines


class open_root(tempfile.TemporaryDirectory[str]):  # noqa: N801
    """A directory that everybody may enter, unlike pytest's own."""

    def __enter__(self) -> str:
        os.chmod(self.name, 0o755)
        return super().__enter__()


# --- many processes ------------------------------------------------------------------------------

CONTENDERS = 32
RESOURCES = tuple(Resource.parse(f"vf:0000:01:10.{i}") for i in range(8))
CLAIMS_EACH = 100
RACE_S = 15.0


def start(body: Callable[[], None]) -> int:
    """A process that runs ``body``; its status is 0 unless that raises."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


@pytest.fixture
def children() -> Iterator[list[int]]:
    """Pids of ours; whatever is left of them ends with the test."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def contend(table: ClaimTable, witness: str, seed: int, deadline: float) -> None:
    """Claim and release; each time the witness, a file that only one can make, must agree.

    The witness knows nothing of claims: O_EXCL is the kernel's own promise. What it saw goes into
    one file for each process: a line for each round, whether it brought a claim or not.
    """
    chance = random.Random(seed)
    owner = Owner(OwnerKind.QEMU, f"guest{seed}", "boot", process=Process(os.getpid(), 1))
    with open(f"{witness}/log-{seed}", "w", buffering=1) as log:
        for _ in range(CLAIMS_EACH):
            claim = None
            while claim is None:
                if time.monotonic() > deadline:
                    return
                with table.guarded() as writer:
                    claims = writer.read()
                    assert not claims.damaged, claims.damaged
                    free = [resource for resource in RESOURCES if not claims.on(resource)]
                    if free:
                        resource = chance.choice(free)
                        claim = replace(a_claim(resource.text, owner), state=State.RESERVED)
                        writer.add([claim])
                if claim is None:
                    log.write("refused\n")
                    time.sleep(0.003)
            try:
                os.close(os.open(f"{witness}/{resource.name}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                log.write(f"two owners of {resource}\n")
                return
            log.write(f"{resource}\n")
            if chance.random() < 0.3:
                with table.guarded() as writer:
                    claim = replace(claim, state=State.ACTIVE)
                    writer.replace(claim)
            os.unlink(f"{witness}/{resource.name}")
            with table.guarded() as writer:
                assert writer.read().on(resource) == (claim,)
                writer.drop(claim)


def test_32_processes_race_for_8_resources_and_none_ever_has_two_owners(
    settings: Settings, tmp_path: Path, children: list[int]
) -> None:
    witness = tmp_path / "witness"
    witness.mkdir()
    table = ClaimTable(replace(settings, guard_wait_s=60.0))
    deadline = time.monotonic() + RACE_S
    for seed in range(CONTENDERS):
        children.append(start(lambda seed=seed: contend(table, str(witness), seed, deadline)))
    statuses = [os.waitpid(children.pop(0), 0)[1] for _ in range(CONTENDERS)]
    logs = [(witness / f"log-{seed}").read_text().splitlines() for seed in range(CONTENDERS)]
    lines = [line for log in logs for line in log]
    assert [line for line in lines if line.startswith("two owners")] == []
    assert statuses == [0] * CONTENDERS
    had = [line for line in lines if line != "refused"]
    assert len(lines) >= 2000
    assert len(had) >= 200  # all 3200 on a machine that has nothing else to do
    assert set(had) == {resource.text for resource in RESOURCES}
    assert table.read() == Claims()


def test_a_writer_killed_at_any_moment_loses_nothing_and_blocks_nobody(
    table: ClaimTable, settings: Settings, children: list[int]
) -> None:
    add(table, FULL)
    chance = random.Random(7)
    interrupted = 0
    for round_ in range(60):
        reader, writer = os.pipe()
        children.append(start(lambda fd=writer, seed=round_: write_for_ever(table, fd, seed)))
        os.close(writer)
        os.read(reader, 1)  # it runs
        time.sleep(chance.random() * 0.01)
        pid = children.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read().decode().splitlines()
        kept, doubtful = replay(told)
        interrupted += bool(doubtful)

        before = time.monotonic()
        with table.guarded() as guarded:
            assert time.monotonic() - before < 1
            claims = guarded.read()
            assert claims.damaged == ()
            assert FULL in claims.records
            found = {claim.token: claim.interface for claim in claims.records if claim != FULL}
            assert kept.items() <= found.items()
            assert found.keys() - kept.keys() <= doubtful
            for claim in claims.records:
                if claim != FULL:
                    guarded.drop(claim)
            assert os.listdir(settings.claims_dir) == [path_of(settings, FULL).name]
    assert interrupted > 10


def write_for_ever(table: ClaimTable, fd: int, seed: int) -> None:
    """Add, replace and drop, telling before and after each: one line each, one write(2) each."""
    chance = random.Random(seed)
    claims: list[Claim] = []

    def tell(word: str, claim: Claim) -> None:
        os.write(fd, f"{word} {claim.token} {claim.interface}\n".encode())

    os.write(fd, b".")
    while True:
        action = chance.choice(["add", "replace", "drop"]) if claims else "add"
        if action == "add":
            claim = replace(a_claim(chance.choice(RESOURCES).text), interface="1")
        else:
            claim = claims.pop(chance.randrange(len(claims)))
        if action == "replace":
            claim = replace(claim, interface=str(int(claim.interface) + 1), journal=FULL.journal)
        tell("begin", claim)
        with table.guarded() as writer:
            if action == "add":
                writer.add([claim])
            elif action == "replace":
                writer.replace(claim)
            else:
                writer.drop(claim)
        tell("gone" if action == "drop" else "done", claim)
        if action != "drop":
            claims.append(claim)


def replay(lines: list[str]) -> tuple[dict[str, str], set[str]]:
    """What must be in the table (token to interface), and the token that may be there in any state."""
    kept: dict[str, str] = {}
    doubtful: set[str] = set()
    for line in lines:
        word, token, interface = line.split()
        if word == "begin":
            kept.pop(token, None)
            doubtful = {token}
        else:
            doubtful = set()
            if word == "done":
                kept[token] = interface
    return kept, doubtful
