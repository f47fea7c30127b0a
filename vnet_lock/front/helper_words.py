"""The words of qemu-net-helper: what is asked for, and where it is to go. Never looks at the host."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum

from vnet_lock.combination import Backend, Policy
from vnet_lock.dataclass import dataclass, replace
from vnet_lock.errors import BadInput, Unsupported
from vnet_lock.request import Intent

# What becomes a key of the same name of QEMU's -netdev host, where it is checked.
KEYS = ("mode", "dev", "pool", "protocols", "port", "mac", "queues", "vlan", "ip", "dhcp")
SWITCHES = ("raw", "explain")
HINT = "see: qemu-net-helper --help"
# As many descriptors go beside one message (SCM_MAX_FD, include/net/scm.h).
_MOST_FDS = 253
# What stands for a descriptor or a name in a word of the command; in two pairs of braces it is itself.
_PLACE = re.compile(r"\{(\{)?(fd|fds|fd\d+|vhostfd|vhostfds|vhostfd\d+|ifname|mac|path)\}(?(1)\})", re.ASCII)
_WITH_VHOST = (Backend.TAP_VHOST, Backend.SOCKET_VHOST)


class Target(Enum):
    """Who gets the descriptors, and how."""

    MESSAGE = "socketpair"
    TAP_ONLY = "fd"
    COMMAND = "exec"


@dataclass(frozen=True, slots=True)
class Words:
    """What stands on the command line; ``problem`` is what is wrong with the first odd word."""

    values: dict[str, list[str]]
    command: tuple[str, ...] = ()
    bridge: str | None = None
    use_vnet: bool = False
    problem: str = ""

    @property
    def target(self) -> Target | None:
        """The first of them, None where there is none."""
        return next((target for target in Target if target.value in self.values), None)

    @property
    def is_for_bridge(self) -> bool:
        """Whether it is called as QEMU's own bridge helper is: the bridge is all that is said."""
        return self.bridge is not None and not {"mode", "dev", "pool"} & set(self.values)

    def has(self, switch: str) -> bool:
        """Whether a word without a value is there."""
        return switch in self.values


def read_words(args: Sequence[str]) -> Words:
    """Split them. Where to say what is wrong is among them, so nothing is raised."""
    values: dict[str, list[str]] = {}
    problems: list[str] = []
    bridge = None
    use_vnet = False
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        # QEMU adds these to any helper's arguments.
        if word == "--use-vnet":
            use_vnet = True
        elif word.startswith("--br="):
            bridge = value
        elif word in ("--exec", *(f"--{switch}" for switch in SWITCHES)):
            values.setdefault(name, [])
        elif word == "--" and "exec" in values:
            break
        elif not word.startswith("--") or name not in (*KEYS, "socketpair", "fd"):
            problems.append(f"unknown word {word!r}")
        else:
            if not equals:
                value = rest.pop(0) if rest else ""
            if value:
                values.setdefault(name, []).append(value)
            else:
                problems.append(f"--{name} has no value")
    if sum(len(values.get(name, ())) for name in ("socketpair", "fd")) + ("exec" in values) > 1:
        problems.append("only one of --socketpair=FD, --fd=FD and --exec can be, and once")
    if "exec" in values and not rest:
        problems.append("--exec needs a command: --exec -- COMMAND {fd}")
    return Words(values, tuple(rest), bridge, use_vnet, problems[0] if problems else "")


def read_intent(words: Words) -> Intent:
    """What is asked for; BadInput or Unsupported where it can't be, in the helper's own words."""
    target = words.target
    values = words.values
    if words.is_for_bridge:
        # qemu-bridge-helper's own: a tap in that bridge, with a vnet header where it is asked for.
        values = {**values, "mode": ["veb"], "port": ["bridge"], "dev": [words.bridge or ""]}
    is_raw = words.has("raw") or (words.is_for_bridge and not words.use_vnet)
    is_nat = values.get("mode") == [Policy.NAT]
    protocols = values.get("protocols") or [_usual(target, words.command, is_raw, is_nat)]
    values = {**values, "protocols": [each.replace(",", ":") for each in protocols]}
    pairs = [(name, value) for name in KEYS for value in values.get(name, [])]
    intent = replace(_read_network(pairs), raw=is_raw, datagrams=True)
    if target is Target.TAP_ONLY and intent.queues > 1:
        raise BadInput("--fd takes one descriptor, so there is no --queues; use --socketpair")
    if 2 * intent.queues > _MOST_FDS:
        raise BadInput(f"--queues={intent.queues}: a socket takes those of {_MOST_FDS // 2} queues at once")
    backends = tuple(backend for backend in intent.backends if _fits(backend, target, is_raw))
    if not backends:
        raise Unsupported(f"--protocols={protocols[0]} has no descriptor to hand over; add tap")
    if target is Target.COMMAND:
        backends = _for_command(words.command, backends, intent.queues, protocols[0])
    return replace(intent, backends=backends)


def _usual(target: Target | None, command: Sequence[str], is_raw: bool, is_nat: bool) -> str:
    """The protocols where none are named."""
    if target is Target.MESSAGE and is_nat and not is_raw:
        return "tap:vhost:user"  # whoever reads the message is told what it got
    if target is Target.TAP_ONLY:
        return "tap"
    if target is Target.COMMAND and "path" in _places(command):
        return "socket:vhost"
    return "tap:socket" if is_raw else "tap:vhost"


def _read_network(pairs: Sequence[tuple[str, str]]) -> Intent:
    from vnet_lock import qemu_argv

    return qemu_argv.read_words(pairs)


def _fits(backend: Backend, target: Target | None, is_raw: bool) -> bool:
    """Whether it has what can be handed over there."""
    if target is Target.TAP_ONLY:
        # QEMU opens vhost itself beside a descriptor that it got by --fd.
        return backend is Backend.TAP
    if is_raw and backend in _WITH_VHOST:
        return False  # vhost's rings have a vnet header
    return backend not in (Backend.VFIO, Backend.USER)


def _for_command(
    command: Sequence[str], backends: Sequence[Backend], queues: int, protocols: str
) -> tuple[Backend, ...]:
    """Those that give the command what it has places for."""
    places = _places(command)
    if not places - {"ifname", "mac"}:
        raise BadInput("COMMAND has no {fd}: where is the descriptor's number to stand in it?")
    for place in sorted(places):
        number = place.removeprefix("vhost").removeprefix("fd")
        if number.isdecimal() and number not in map(str, range(queues)):
            raise BadInput(f"COMMAND has {{{place}}}, but the queues are numbered 0 to {queues - 1}")
    has_vhost = any(place.startswith("vhostfd") for place in places)
    has_fd = any(place.startswith("fd") for place in places)
    fit = {
        Backend.TAP_VHOST: has_fd and has_vhost,
        Backend.SOCKET_VHOST: "path" in places and not (has_fd or has_vhost),
    }
    plain = has_fd and not has_vhost and "path" not in places
    found = tuple(backend for backend in backends if fit.get(backend, plain))
    if not found:
        shown = ", ".join(f"{{{place}}}" for place in sorted(places))
        raise BadInput(f"--protocols={protocols} has nothing that fits {shown} in COMMAND")
    return found


def _places(command: Sequence[str]) -> set[str]:
    return {match[2] for word in command for match in _PLACE.finditer(word) if not match[1]}


def fill(command: Sequence[str], value_of: Callable[[str], str]) -> list[str]:
    """The command with each place replaced by its value; ``{{fd}}`` becomes ``{fd}``, all else stays."""

    def put(match: re.Match[str]) -> str:
        return f"{{{match[2]}}}" if match[1] else value_of(match[2])

    return [_PLACE.sub(put, word) for word in command]
