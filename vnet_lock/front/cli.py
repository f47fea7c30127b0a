"""The command vnet-lock: its arguments. What the verbs do is in front/verbs.py."""

from __future__ import annotations

import argparse  # 10 ms; no hook loads this module
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vnet_lock.combination import Policy, Port
from vnet_lock.front.command import serve
from vnet_lock.model import PciAddress, Resource, is_ifname
from vnet_lock.settings import DEFAULT, Settings

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# The verbs that write a libvirt guest's interfaces.
_OF_LIBVIRT = ("resolve", "define", "start", "attach", "detach")


def main(argv: Sequence[str] | None = None, settings: Settings = DEFAULT) -> int:
    """Run one command and return its exit code."""

    def run() -> int:
        args = parser().parse_args(argv)
        module = import_module("vnet_lock.front." + ("domains" if args.verb in _OF_LIBVIRT else "verbs"))
        perform: Callable[[Settings, argparse.Namespace], int] = getattr(module, args.verb)
        return perform(settings, args)

    return serve("vnet-lock", run)


def parser() -> argparse.ArgumentParser:
    """The command's words."""
    parser = _Parser(
        prog="vnet-lock",
        description="Who uses which SR-IOV virtual function, and that no two guests use the same.",
        epilog="Exit status: 0 done, 1 failed, 2 bad usage or input, 3 an audit found an error, "
        "4 refused (held by another), 5 this host can't do it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    add = _Verbs(parser)
    _add_looks(add)
    _add_claims(add)
    _add_healing(add)
    _add_libvirt_verbs(add)
    _add_hooks(add)
    return parser


class _Parser(argparse.ArgumentParser):
    """Tells us when its help could not be written, and a verb's usage to who gave it a word too many.

    argparse itself passes over the one, and shows the whole command's usage in the place of the other.
    """

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        print(self.format_help(), end="", file=file)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


class _Verbs:
    """Adds verbs to the parser; each one's function is verbs.VERB. Which one it is stands in ``dest``."""

    def __init__(self, parser: argparse.ArgumentParser, dest: str = "verb", metavar: str = "COMMAND") -> None:
        self._verbs = parser.add_subparsers(title="commands", dest=dest, required=True, metavar=metavar)

    def __call__(self, name: str, text: str) -> argparse.ArgumentParser:
        return self._verbs.add_parser(name, help=text, description=text, allow_abbrev=False)


class _Version(argparse.Action):
    """Reads the version only when it is asked for: importlib.metadata costs 20 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"vnet-lock {version('vnet-lock')}")
        parser.exit()


def _add_looks(add: _Verbs) -> None:
    verb = add("status", "PFs, VFs, their owners, and what is wrong")
    verb.add_argument("devices", nargs="*", metavar="PF", help="only these (names or PCI addresses)")
    _add_json(verb)
    verb.add_argument("--watch", action="store_true", help="show it again when it changes, until ^C")

    verb = add("show", "one resource: its claim, journal and observed users")
    _add_resource(verb)
    _add_json(verb)

    _add_plan_arguments(add("plan", "what a guest would get, and why not something better; changes nothing"))

    verb = add("matrix", "every combination of policy, port and backend: ready, or why not here")
    verb.add_argument("--dev", action="append", help="only on this device; again for more")
    _add_json(verb)


def _add_claims(add: _Verbs) -> None:
    verb = add("claim", "claim a resource for a process, for as long as it lives")
    _add_resource(verb)
    verb.add_argument("--pid", type=_positive, required=True, help="the process that uses it")
    verb.add_argument("--shared", action="store_true", help="others may share it (a PF or NIC)")
    verb.add_argument("--name", type=_name, help="what to call the owner (default: the process's command)")

    verb = add("release", "give back what is claimed on a resource, and undo what was changed for it")
    _add_resource(verb)
    verb.add_argument(
        "--force",
        action="store_true",
        help="even a guest's that may still live; a claim made by hand needs no --force",
    )


def _add_healing(add: _Verbs) -> None:
    verb = add("gc", "heal claims whose owner is proven dead")
    verb.add_argument("--dry-run", action="store_true", help="only say which")
    _add_json(verb)

    verb = add("doctor", "check the installation: configuration, hooks, daemons, confinement, kernel")
    _add_json(verb)

    verb = add("reap", "heal claims whose owner is dead, once, or as soon as it is")
    verb.add_argument("--follow", action="store_true", help="go on until SIGTERM: one process for a host")

    verb = add("watch", "claim what libvirt's guests get by a hot-plug, and say conflicts, until SIGTERM")
    _add_connect(verb)

    verb = add("vfs", "show or change the number of a PF's VFs; refused while one of them is in use")
    verb.add_argument("pf", metavar="PF", help="its name or PCI address")
    verb.add_argument("count", metavar="N", nargs="?", type=_natural, help="the new number (sriov_numvfs)")


def _add_hooks(add: _Verbs) -> None:
    verb = add("hooks", "libvirt's hooks: put ours there, take them away, look, or be ready to answer them")
    action = _Verbs(verb, "action", "ACTION")
    action("install", "put our files among libvirt's hooks, or this version's in the place of an older one's")
    action("remove", "take our files away again; others' stay")
    action("status", "what stands at each file's place; 1 where one isn't there, or isn't of this version")
    action(
        "serve", "be ready to answer libvirt's calls, which is faster, until SIGTERM: one process for a host"
    )


def _add_libvirt_verbs(add: _Verbs) -> None:
    verb = add("resolve", "print a libvirt guest with its interfaces chosen, or left to the hook")
    verb.add_argument("guest", metavar="GUEST.xml", help="libvirt's domain XML (- for stdin)")
    _add_form(verb)

    verb = add("define", "define a libvirt guest as resolve prints it")
    verb.add_argument("guest", metavar="GUEST.xml", help="libvirt's domain XML (- for stdin)")
    _add_form(verb)
    _add_connect(verb)

    verb = add("start", "start a libvirt guest with what is free now; its definition stays as it is")
    verb.add_argument("guest", metavar="GUEST", help="a name, a UUID, or a file GUEST.xml (- for stdin)")
    _add_form(verb)
    _add_connect(verb)
    verb.add_argument("--paused", action="store_true", help="its CPUs wait for virsh resume")

    verb = add("attach", "plug an interface into a running libvirt guest, claimed before libvirt is asked")
    verb.add_argument("guest", metavar="GUEST", help="its name or UUID")
    verb.add_argument(
        "interface", metavar="FILE.xml", nargs="?", help="<interface> or <hostdev> (- for stdin)"
    )
    _add_words(verb)
    verb.add_argument("--alias", type=_alias, help="what it is called, ua-net1 say (default: the next free)")
    verb.add_argument(
        "--teaming", type=_alias, metavar="ALIAS", help="the interface that stands by for the VF"
    )
    _add_form(verb, default=None)  # a file comes without it
    _add_connect(verb)

    verb = add("detach", "unplug an interface of a running libvirt guest, and give back what it had")
    verb.add_argument("guest", metavar="GUEST", help="its name or UUID")
    verb.add_argument("interface", metavar="ALIAS", help="the interface's alias or MAC address")
    verb.add_argument("--timeout", type=_positive, default=30, metavar="S", help="seconds for the guest")
    _add_connect(verb)


def _add_form(verb: argparse.ArgumentParser, default: str | None = "full") -> None:
    verb.add_argument(
        "--form", choices=("full", "late"), default=default, help="chosen now (default), or at each start"
    )


def _add_connect(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "-c",
        "--connect",
        metavar="URI",
        help="libvirt's daemon (default: that of LIBVIRT_DEFAULT_URI, else qemu:///system)",
    )


def _add_plan_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("guest", metavar="GUEST.xml", nargs="?", help="libvirt's domain XML (- for stdin)")
    _add_words(verb)
    _add_json(verb)


def _add_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--mode", help=f"the policy: {', '.join(Policy)} (bridge is veb)")
    verb.add_argument("--dev", action="append", help="a network device or PCI address; several in order")
    verb.add_argument("--pool", metavar="NAME", help="VFs of this pool, in the place of --dev")
    verb.add_argument("--port", help=f"the kernel implementation: {', '.join(Port)}")
    verb.add_argument("--protocols", metavar="A:B:C", help="of tap, socket, vhost, vfio, user, in order")
    verb.add_argument("--vlan", help="a VLAN, 1 to 4094")
    verb.add_argument("--mac", help="the guest's MAC address")
    verb.add_argument("--queues", help="how many queues")
    verb.add_argument("--ip", action="append", help="the guest's own address, for route; again for more")
    verb.add_argument("--dhcp", choices=("on", "off"), help="a DHCP server, for nat")


def _add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="as JSON")


def _add_resource(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "resource",
        metavar="RESOURCE",
        type=_resource,
        help="vf:0000:af:06.0, pf:0000:af:00.0, nic:bond0 or ip:192.0.2.7; "
        "or just a network device's name or a PCI address",
    )


def _resource(text: str) -> Resource | PciAddress:
    with suppress(ValueError):
        return PciAddress.parse(text)
    # Of digits and dots there are names, too, but it is rather an IP address without its kind.
    if is_ifname(text) and not re.fullmatch("[0-9.]+", text):
        return Resource.nic(text)
    try:
        return Resource.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _name(text: str) -> str:
    if not text.isprintable() or len(text) > 100:
        raise argparse.ArgumentTypeError("a name has at most 100 characters, all of them printable")
    return text


def _alias(text: str) -> str:
    if not re.fullmatch("ua-[A-Za-z0-9_-]+", text):
        raise argparse.ArgumentTypeError("libvirt's user aliases are like ua-net0")
    return text


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    if len(text) > 9:  # as many digits as fit into C's int
        raise argparse.ArgumentTypeError(f"a number of {len(text)} digits is too large")
    return int(text)


def _positive(text: str) -> int:
    number = _natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too few")
    return number


if __name__ == "__main__":
    sys.exit(main())
