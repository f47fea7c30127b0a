"""vnet-qemu: a QEMU command line with ``host`` networks, run with what they stand for."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

from vnet_lock.combination import Backend, Combination
from vnet_lock.dataclass import dataclass
from vnet_lock.errors import BadInput
from vnet_lock.front.command import printable, serve
from vnet_lock.front.program import become, find_program
from vnet_lock.front.qemu_features import read_dialect
from vnet_lock.front.supervisor import PROGRAM, Guest, Lifecycle, run_guest
from vnet_lock.model import PciAddress
from vnet_lock.qemu_argv import QemuArgv, read_argv
from vnet_lock.qemu_rewrite import rewrite
from vnet_lock.request import Assignment, Intent, Plan, Refusal, Request, error_of
from vnet_lock.settings import DEFAULT, Settings

if TYPE_CHECKING:
    from vnet_lock.session import Session

_USAGE = """\
usage: vnet-qemu [--print] [--name NAME] [--] [PROGRAM] QEMU-ARGUMENTS...
       vnet-qemu [--print] GUEST.xml
       vnet-qemu --from-pid PID

Runs QEMU with its host networks opened, and claimed for as long as it runs:

  -netdev host,id=ID,KEY=VALUE,...   with a -device MODEL,netdev=ID
  -nic host,KEY=VALUE,...            with model=, addr=, bus=, bootindex=, vectors= of the device
  -net host,KEY=VALUE,...            with a -net nic

  mode=veb|vepa|private|nat|route    who may talk to whom (bridge is another word for veb)
  dev=DEVICE                         a network device or a PCI address; several dev= are tried in their order
  pool=NAME                          in the place of dev=: VFs of this pool of vnet-lock.toml(5)
  port=sriov|macvlan|bridge|...      what the guest's port is; the best of what mode allows, if not given
  protocols=A:B:...                  how QEMU is connected: tap, socket (both also with vhost), vfio, user
  ip=ADDRESS                         for mode=route: the guest's own address; several ip= for several of them
  mac=MAC  vlan=ID  queues=N  dhcp=on|off (a server on a NAT bridge)

PROGRAM is QEMU's name or path; without it, it is this machine's qemu-system.

GUEST.xml is a libvirt guest, with what its interfaces want in its metadata. It runs without libvirt's
daemon, until it is shut down or vnet-qemu gets a signal.

  --print         show the resulting command and change nothing
  --name NAME     the guest's name in vnet-lock status; without it, that of QEMU's -name
  --from-pid PID  show a running guest's command line as one that a person can run, libvirt's guests too
  --help, --version

Exit status: QEMU's own; before it runs, 1 failed, 2 bad usage or input, 4 refused: held by another,
5 this host can't do it.
"""
_INSTALL = "install QEMU, or name the program first"
# What QEMU calls the machines whose kernel has another name for them.
_TARGETS = {"i386": "i386", "i486": "i386", "i586": "i386", "i686": "i386", "arm64": "aarch64"}
_TARGETS |= {"armv6l": "arm", "armv7l": "arm", "armv8l": "arm", "ppc64le": "ppc64", "loong64": "loongarch64"}
# What a printed command line calls the descriptors of a backend that has some.
_DESCRIPTORS = {
    Backend.TAP: "tap",
    Backend.TAP_VHOST: "tap",
    Backend.SOCKET: "socket",
    Backend.PASST: "passt",
}


class PlanSession(Protocol):
    """What showing a command takes of a session."""

    def plan(self, requests: Sequence[Request]) -> Plan | Refusal: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Command:
    """Our own arguments, and QEMU's."""

    program: str
    args: tuple[str, ...]
    name: str | None = None
    print_only: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """A connection that is not there: what stands for it on a printed command line."""

    combination: Combination
    mac: str | None
    fds: tuple[str, ...]
    vhost_fds: tuple[str, ...]
    pci: PciAddress | None
    path: str | None
    iommufd: bool = False

    @classmethod
    def of(cls, assignment: Assignment) -> Shown:
        """What an assignment will be."""
        combination, intent = assignment.combination, assignment.request
        assert combination is not None  # noqa: S101 - an Intent's assignment has one
        assert isinstance(intent, Intent)  # noqa: S101 - a command line asks for nothing else
        name = intent.interface
        marks = [name] if intent.queues == 1 else [f"{name}.{queue}" for queue in range(intent.queues)]
        backend = combination.backend
        noun = _DESCRIPTORS.get(backend)
        return cls(
            combination,
            intent.mac or f"<mac:{name}>",
            tuple(f"<{noun}:{mark}>" for mark in marks) if noun else (),
            tuple(f"<vhost:{mark}>" for mark in marks) if backend is Backend.TAP_VHOST else (),
            assignment.device.pci if backend is Backend.VFIO else None,
            f"<vhost-user:{name}>" if backend is Backend.SOCKET_VHOST else None,
            backend is Backend.VFIO,
        )


def main(args: Sequence[str] | None = None) -> int:
    """Run or show a command line; the exit status of the usage, or QEMU's own."""

    def open_session() -> Session:
        from vnet_lock.session import Session  # pyroute2 where links are made: 0.3 s, 25 MB

        return Session(DEFAULT)

    words = sys.argv[1:] if args is None else args
    # A command that is shown has the bytes that were given, text or not.
    return serve(PROGRAM, lambda: run(words, DEFAULT, open_session, open_session), "surrogateescape")


def run(
    args: Sequence[str],
    settings: Settings,
    open_session: Callable[[], Lifecycle],
    open_planner: Callable[[], PlanSession],
) -> int:
    """As ``main``, with errors raised."""
    if not args or args[0] in ("--help", "-h"):
        if not args:
            raise BadInput("what is to be run? See: vnet-qemu --help")
        print(_USAGE, end="")
        return 0
    if args[0] == "--version":
        from importlib.metadata import version  # 40 ms

        print(f"vnet-qemu {version('vnet-lock')}")
        return 0
    if args[0].partition("=")[0] == "--from-pid":
        from vnet_lock.front.running import rerun  # what it takes to read a process, and pyroute2

        print(rerun(settings, _read_pid(args)))
        return 0
    command = parse(args)
    if command.program.endswith(".xml"):
        from vnet_lock.front import embedded  # libvirt, 50 ms

        return embedded.run(settings, command.program, command.print_only)
    argv = read_argv(command.args)
    if command.print_only:
        show(command, argv, open_planner)
        return 0
    # A name is part of one-line messages.
    name = printable(command.name or argv.name or os.path.basename(command.program))
    guest = Guest(command.program, find_program(command.program, _INSTALL), argv, name)
    if not argv.hosts:
        _become_plain(guest)
    return run_guest(settings, guest, open_session)


def _read_pid(args: Sequence[str]) -> int:
    """The PID of ``--from-pid PID`` or ``--from-pid=PID``, which stands alone."""
    words = args[0].split("=", 1)[1:] + list(args[1:])
    if len(words) != 1 or not re.fullmatch("[0-9]{1,10}", words[0]):
        raise BadInput("--from-pid takes the pid of a running QEMU, and nothing else; see: vnet-qemu --help")
    return int(words[0])


def _become_plain(guest: Guest) -> NoReturn:
    """Nothing is ours in it: QEMU takes our place."""
    words = [word for option in guest.argv.options for word in option.words]
    become(guest.path, [guest.program, *words])


def parse(args: Sequence[str]) -> Command:
    """Our own words come first; the first that is none of them begins QEMU's."""
    rest = list(args)
    name: str | None = None
    print_only = False
    while rest:
        word = rest.pop(0)
        if word == "--print":
            print_only = True
        elif word == "--name" or word.startswith("--name="):
            name = word.partition("=")[2] if "=" in word else (rest.pop(0) if rest else "")
            if not name:
                raise BadInput("--name needs a name; see: vnet-qemu --help")
        else:
            if word != "--":
                rest.insert(0, word)
            break
    if not rest:
        raise BadInput("what is to be run? See: vnet-qemu --help")
    if rest[0].endswith(".xml") and (name or rest[1:]):
        raise BadInput(
            f"{rest[0]} says all of its guest, its name too: our options stand before it, and no QEMU"
            " arguments beside it; see: vnet-qemu --help"
        )
    program = _default_program() if rest[0].startswith("-") else rest.pop(0)
    return Command(program, tuple(rest), name, print_only)


def _default_program() -> str:
    machine = os.uname().machine
    return f"qemu-system-{_TARGETS.get(machine, machine)}"


def show(command: Command, argv: QemuArgv, open_planner: Callable[[], PlanSession]) -> None:
    """Print the command that would run; raises what running it would raise."""
    import shlex  # 3 ms

    connections: dict[str, Shown] = {}
    if argv.hosts:
        result = open_planner().plan(argv.intents)
        if isinstance(result, Refusal):
            raise error_of(result)
        connections = {one.request.interface: Shown.of(one) for one in result.assignments}
    dialect = read_dialect(command.program, connections.values())
    print(shlex.join([command.program, *rewrite(argv, connections, dialect)]))
