"""What each verb of vnet-lock does: one function each, named like it. Prints; raises VnetLockError."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from vnet_lock.errors import BadInput, Unsupported, VnetLockError
from vnet_lock.front import report, report_json
from vnet_lock.front.command import printable
from vnet_lock.model import Inventory, Mode, Owner, OwnerKind, Pf
from vnet_lock.request import Intent, Plan, RefusalKind, Request
from vnet_lock.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vnet_lock.audit import Audit
    from vnet_lock.session import Healed

AUDIT_ERROR = 3
REFUSED = 4
# What plan takes in the place of a guest: the keys of -netdev host.
_PLAN_WORDS = ("mode", "dev", "pool", "port", "protocols", "vlan", "mac", "queues", "ip", "dhcp")
_WATCH_S = 1.0
# How often a host is looked at again that changes while we look.
_MOST_LOOKS = 5


def status(settings: Settings, args: Namespace) -> int:
    """PFs, VFs, owners, findings; AUDIT_ERROR where something is an error."""
    devices = args.devices or None
    found = _look(settings, devices)
    if os.geteuid() != 0:
        print("vnet-lock: without root, what other users' processes use is not seen", file=sys.stderr)
    if not args.watch:
        print(_status_output(settings, found, args.json))
        return AUDIT_ERROR if found.has_error else 0
    shown = None
    while True:
        output = _status_output(settings, found, args.json)
        if output != shown:
            home = "\033[H\033[2J" if sys.stdout.isatty() and not args.json else ""
            print(home + output, flush=True)
            shown = output
        time.sleep(_WATCH_S)
        found = _look(settings, devices)


def show(settings: Settings, args: Namespace) -> int:
    """One resource: claims, journal, users, findings."""
    from vnet_lock.situation import device_of, find_resource

    found = _look(settings, [device_of(args.resource)], must_exist=False)
    resource = find_resource(args.resource, found.inventory, lambda one: found.state_of(one).claims)
    known = resource in found.states or any(one.resource == resource.text for one in found.findings)
    if not known:
        raise BadInput(f"there is no {args.resource} here, and nothing claims it; see: vnet-lock status")
    if args.json:
        print(_dumps(report_json.show_json(found, resource)))
    else:
        print(report.show_text(found, resource, _style(sys.stdout)))
    return 0


def plan(settings: Settings, args: Namespace) -> int:
    """What would be done; the exit code is that of a refusal."""
    from vnet_lock.session import Session

    owner, requests, networks = _read_requests(settings, args)
    found = Session(settings).plan(requests, owner)
    if args.json:
        print(_dumps(report_json.plan_json(found)))
    else:
        print(report.plan_text(found, requests, networks))
    if isinstance(found, Plan):
        return 0
    if not args.json:
        print(f"vnet-lock: {found.message}", file=sys.stderr)
    codes = {
        RefusalKind.HELD: REFUSED,
        RefusalKind.IMPOSSIBLE: Unsupported.exit_code,
        RefusalKind.INVALID: BadInput.exit_code,
    }
    return codes[found.kind]


def matrix(settings: Settings, args: Namespace) -> int:
    """Every combination: ready, or why not here."""
    from vnet_lock.matrix import read_matrix

    verdicts = read_matrix(settings, args.dev or ())
    print(_dumps(report_json.matrix_json(verdicts)) if args.json else report.matrix_text(verdicts))
    return 0


def claim(settings: Settings, args: Namespace) -> int:
    """Claim for another process."""
    from vnet_lock.administration import Administration
    from vnet_lock.kernel.processes import read_boot_id, read_command, read_process

    process = read_process(settings, args.pid)
    if process is None:
        raise BadInput(f"there is no process {args.pid}; --pid is the process that uses {args.resource}")
    name = args.name or read_command(settings, args.pid) or "process"
    owner = Owner(OwnerKind.PROCESS, name, read_boot_id(settings), process=process)
    made = Administration(settings).claim(
        owner, args.resource, Mode.SHARED if args.shared else Mode.EXCLUSIVE
    )
    print(printable(f"{made.resource} is claimed ({made.mode}) for {made.owner.text} while it lives"))
    return 0


def release(settings: Settings, args: Namespace) -> int:
    """Give back by hand."""
    from vnet_lock.administration import Administration

    done = Administration(settings).release_resource(args.resource, args.force)
    print(f"{args.resource} is released" if done else f"nothing is claimed on {args.resource}")
    return 0


def gc(settings: Settings, args: Namespace) -> int:
    """Heal what is proven stale; 1 where something can't be undone."""
    from vnet_lock.session import Session

    healed = Session(settings).heal(dry_run=args.dry_run)
    if args.json:
        print(_dumps(report_json.healed_json(healed, args.dry_run)))
    else:
        _print_healed(healed, args.dry_run)
        if not healed:
            print("nothing is stale")
    _require_undone(healed)
    return 0


def doctor(settings: Settings, args: Namespace) -> int:
    """The installation, checked; AUDIT_ERROR where something is an error."""
    from vnet_lock.front.doctor import Health, examine

    checks = [*examine(settings)]
    if args.json:
        print(_dumps(report_json.checks_json(checks)))
    else:
        print(report.checks_text(checks, _style(sys.stdout)))
    return AUDIT_ERROR if any(one.health is Health.ERROR for one in checks) else 0


def reap(settings: Settings, args: Namespace) -> int:
    """Heal once, as gc does; with --follow as soon as an owner is dead, until we are told to end."""

    def heal() -> None:
        from vnet_lock.session import Session

        healed = Session(settings).heal()
        _print_healed(healed, dry_run=False)
        _require_undone(healed)

    if not args.follow:
        heal()
        return 0
    from vnet_lock.front import reaper

    return reaper.follow(settings, heal)


def watch(settings: Settings, args: Namespace) -> int:
    """Claim what libvirt's guests get by a hot-plug, until we are told to end."""
    from vnet_lock.front.watch import follow
    from vnet_lock.session import Session

    return follow(settings, Session(settings), args.connect)


def _require_undone(healed: Sequence[Healed]) -> None:
    """Raise one VnetLockError for all that could not be undone."""
    failures = [failure for one in healed for failure in one.failures]
    if failures:
        raise VnetLockError("; ".join(failures) + "; the claims stay until it can be undone")


def _print_healed(healed: Sequence[Healed], dry_run: bool) -> None:
    for one in healed:
        what = ", ".join(each.resource.text for each in one.claims)
        verb = "would heal" if dry_run else "could not heal" if one.failures else "healed"
        print(printable(f"{verb} {what}: left by {one.claims[0].owner.text}"))


def vfs(settings: Settings, args: Namespace) -> int:
    """Show or change the number of VFs."""
    pf = _require_pf(_look(settings, [args.pf]).inventory, args.pf)
    if args.count is not None:
        from vnet_lock.administration import Administration

        Administration(settings).set_numvfs(pf.pci, args.count)
    found = _look(settings, [args.pf])
    print(report.vfs_text(found, _require_pf(found.inventory, args.pf), _style(sys.stdout)))
    return 0


def hooks(settings: Settings, args: Namespace) -> int:
    """Our files among libvirt's hooks; ``status`` fails where they aren't as they should be."""
    if args.action == "serve":
        from vnet_lock.front.hook_server import follow

        return follow(settings)
    from vnet_lock.front import hooks_install

    if args.action == "status":
        files = hooks_install.read_status(settings)
        for file in files:
            print(f"{file.state:<9}  {file.path}")
        return 0 if all(file.state == "installed" for file in files) else 1
    act = hooks_install.install if args.action == "install" else hooks_install.remove
    for line in act(settings):
        print(line)
    return 0


# --- looking --------------------------------------------------------------------------------------


def _look(settings: Settings, devices: list[str] | None, must_exist: bool = True) -> Audit:
    """Observe and judge; BadInput where one of the devices isn't there.

    A claim that comes or goes between the two readings would look like a stranger's use: look again then.
    """
    from vnet_lock.audit import audit
    from vnet_lock.claims import ClaimTable
    from vnet_lock.kernel.observe import read_inventory

    table = ClaimTable(settings)
    for _ in range(_MOST_LOOKS):
        stamp = _changed_at(settings)
        claims = table.read()
        inventory = read_inventory(settings, devices)
        if _changed_at(settings) == stamp:
            break
    for device in devices or () if must_exist else ():
        _require_pf(inventory, device)
    return audit(settings, inventory, claims, devices)


def _changed_at(settings: Settings) -> int:
    """When a claim was last written or dropped: each does it by a rename or unlink in the directory."""
    try:
        return os.stat(settings.claims_dir).st_mtime_ns
    except OSError:
        return 0


def _require_pf(inventory: Inventory, device: str) -> Pf:
    found = inventory.pf_named(device)
    if found is None:
        raise BadInput(f"{device or repr(device)} is no PF here; see: vnet-lock status")
    return found


def _status_output(settings: Settings, found: Audit, as_json: bool) -> str:
    if not as_json:
        return report.status_text(found, _style(sys.stdout))
    from vnet_lock.kernel.processes import read_boot_id

    return _dumps(report_json.status_json(found, os.uname().nodename, read_boot_id(settings)))


def _style(stream: TextIO) -> report.Style:
    if not stream.isatty():
        return report.PLAIN
    width = os.get_terminal_size(stream.fileno()).columns
    if not width:  # a serial console, or a new pty: it doesn't know
        import shutil  # 5 ms

        width = shutil.get_terminal_size().columns
    return report.Style(
        colour=not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb",
        width=max(width, 40),
    )


def _dumps(value: dict[str, Any]) -> str:
    import json

    # Indented it costs three times as much: only json's Python half can do that.
    return json.dumps(value, indent=2 if sys.stdout.isatty() else None)


# --- what is to be planned ------------------------------------------------------------------------


def _read_requests(
    settings: Settings, args: Namespace
) -> tuple[Owner | None, tuple[Request, ...], dict[str, str]]:
    """Who wants what, and the networks of which libvirt will pick something for its interfaces."""
    words = [getattr(args, word) for word in _PLAN_WORDS]
    if args.guest is not None:
        if any(word is not None for word in words):
            raise BadInput("plan takes a GUEST.xml or --mode and --dev, not both")
        return _read_guest(settings, args.guest)
    if args.mode is None:
        raise BadInput("plan needs a GUEST.xml, or --mode and --dev; see: vnet-lock plan --help")
    return None, (read_words(args),), {}


def read_words(args: Namespace) -> Intent:
    """As ``-netdev host`` takes them, so that both understand the same."""
    from vnet_lock import qemu_argv

    pairs = [
        (key, value)
        for key in _PLAN_WORDS
        if (given := getattr(args, key)) is not None
        for value in (given if isinstance(given, list) else [given])
    ]
    return qemu_argv.read_words(pairs)


def read_file(path: str) -> bytes:
    """A file that the user names, ``-`` for standard input; BadInput where it can't be read."""
    from vnet_lock.domain_document import SIZE_LIMIT_BYTES

    try:
        if path == "-":
            return sys.stdin.buffer.read(SIZE_LIMIT_BYTES + 1)
        with open(path, "rb") as file:
            return file.read(SIZE_LIMIT_BYTES + 1)
    except OSError as error:
        raise BadInput(f"cannot read {path or repr(path)}: {error.strerror}; see: ls -l") from error


@contextmanager
def about_file(path: str) -> Iterator[None]:
    """What makes no sense in a file is said with its name."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def _read_guest(settings: Settings, path: str) -> tuple[Owner | None, tuple[Request, ...], dict[str, str]]:
    from vnet_lock.domain_devices import read_networks
    from vnet_lock.domain_xml import read_guest
    from vnet_lock.kernel.processes import read_boot_id

    xml = read_file(path)
    with about_file(path):
        guest, networks = read_guest(xml), read_networks(xml)
    if not guest.uuid:
        return None, guest.requests, networks
    owner = Owner(OwnerKind.LIBVIRT, guest.name, read_boot_id(settings), uuid=guest.uuid)
    return owner, guest.requests, networks
