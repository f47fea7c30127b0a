"""A running guest's command line as one that a person can run: ``vnet-qemu --from-pid``.

libvirt, and vnet-qemu itself, hand QEMU open descriptors. Each becomes what made it: a network is written as
``-netdev host,…`` again, and what only its manager could use is left out, with a remark that says so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping

from vnet_lock.combination import Backend, Combination, Port
from vnet_lock.dataclass import dataclass, field
from vnet_lock.front.command import printable
from vnet_lock.model import Claim, ResourceKind
from vnet_lock.qemu_words import Option, Properties, split_options

# Options that only whoever started this QEMU has a use for, and why a person has none.
_DROPPED = {
    "S": "its manager would have started the CPUs",
    "no-shutdown": "QEMU ends with the guest",
    "daemonize": "it stays in the foreground",
    "pidfile": "",
    "incoming": "it starts afresh, where it was migrated or restored to",
    "sandbox": "its rules are libvirt's; add them again if they are wanted",
    "add-fd": "",
}
# Directories that libvirt removes when the guest ends.
_PASSING = re.compile(
    r"/(?:var/lib|run|var/run)/libvirt/qemu/(?:channel/(?:target/)?)?(?:domain-)?\d*-[^/,]*/"
)
_NUMBER = re.compile("[0-9]{1,10}")
# QEMU's name for a descriptor that it was given by -add-fd.
_FDSET = re.compile(r"/(?:dev)/fdset/(\d+)")
_PROTOCOLS = {
    Backend.TAP: "tap",
    Backend.TAP_VHOST: "tap:vhost",
    Backend.SOCKET: "socket",
    Backend.SOCKET_VHOST: "socket:vhost",
    Backend.USER: "user",
    Backend.PASST: "user",
    Backend.VFIO: "vfio",
}
# What a host network of vnet-qemu takes on -nic of a PCI device's own properties.
_PLACE = ("bus", "addr", "bootindex")


@dataclass(frozen=True, slots=True)
class Origin:
    """What made a network: the keys of ``-netdev host`` that make it again, and in words what it was."""

    keys: tuple[tuple[str, str], ...]
    text: str


@dataclass(frozen=True, slots=True)
class Running:
    """What is known of a running QEMU beside its command line.

    ``tap_at`` tells what made the tap or macvtap behind a descriptor, None where nothing of ours can make
    it; ``file_at`` the path of the file behind one; ``function_at`` what a PCI function for VFIO was, None
    where it is no network function. ``claims`` are the guest's own, by interface.
    """

    pid: int
    name: str
    tap_at: Callable[[int], Origin | None]
    file_at: Callable[[int], str | None]
    function_at: Callable[[str], Origin | None]
    claims: Mapping[str, tuple[Claim, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Script:
    """The command line that a person runs, and what differs from the running one."""

    program: str
    options: list[tuple[str, ...]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def text(self, title: str) -> str:
        """As a shell takes it: remarks, then one option a line."""
        lines = [f"# {title}", *(f"#   {remark}" for remark in self.remarks)]
        # A name in one must not end it: what follows would be a command.
        lines = [printable(line) for line in lines]
        words = [shlex.join(["vnet-qemu", self.program]), *(shlex.join(option) for option in self.options)]
        return "\n".join([*lines, " \\\n    ".join(words)])


def rebuild(argv: list[str], running: Running) -> Script:
    """The same guest, started by hand. Asks ``running`` and nothing else."""
    script = Script(argv[0])
    options = split_options(argv[1:])
    parsed = {at: _parse(option) for at, option in enumerate(options)}
    files = dict(_fdsets(options, parsed, running))
    ours = {f"{name}-vhost" for name, claims in running.claims.items() if claims[0].combination and name}
    for at, option in enumerate(options):
        name, own = option.name, parsed[at]
        if name in _DROPPED:
            if _DROPPED[name]:
                script.remarks.append(f"-{name} is left out: {_DROPPED[name]}")
        elif name == "netdev":
            script.options.append(("-netdev", _network(own, running, script).text))
        elif name == "device" and own.get("driver") == "vfio-pci":
            script.options.append(_function(option, own, running, script))
        elif name == "chardev" and own.get("id") in ours:
            continue  # the way to our own vhost-user back-end, which is made anew
        elif name == "chardev":
            own = _with_own_socket(_with_own_log(own, files, running, script), running, script)
            script.options.append(("-chardev", _with_paths(own.text, files, script)))
        elif name == "object" and own.get("id") == "masterKey0":
            script.remarks.append("-object secret masterKey0 is left out: libvirt removes it with the guest")
        else:
            script.options.append(tuple(_with_paths(word, files, script) for word in option.words))
            _remark_descriptors(option, own, script)
            if name == "object" and own.get("keyid") == "masterKey0":
                script.remarks.append(
                    f"-object {own.get('id')}: its secret is libvirt's; give it by file= instead"
                )
    return script


def _parse(option: Option) -> Properties:
    implied = {"device": "driver", "netdev": "type", "chardev": "backend", "object": "qom-type"}
    try:
        return Properties.parse(option.value, implied.get(option.name, ""))
    except ValueError:
        return Properties(())


# --- networks -------------------------------------------------------------------------------------


def _network(own: Properties, running: Running, script: Script) -> Properties:
    """A network as what makes it again, or as it is where nothing of it was handed over."""
    name = own.get("id") or ""
    numbers = _numbers(own, "fd")
    claims = running.claims.get(name) or running.claims.get(name.removeprefix("host")) or ()
    origin = origin_of(claims)
    if origin is None and own.get("type") == "tap" and numbers:
        origin = running.tap_at(numbers[0])
        if origin and (own.get("vhost") in ("on", "True")):
            origin = Origin((*origin.keys[:-1], ("protocols", "tap:vhost")), origin.text)
    if origin is None:
        if numbers:
            script.remarks.append(
                f"-netdev {name}: nothing here makes what its descriptor was; put a network there"
            )
            return Properties((("type", "user"), ("id", name)))
        return own
    script.remarks.append(f"-netdev {name}: {origin.text}")
    queues = (("queues", str(len(numbers))),) if len(numbers) > 1 else ()
    return Properties((("type", "host"), ("id", name), *origin.keys, *queues))


def origin_of(claims: Iterable[Claim]) -> Origin | None:
    """What an interface's claims say that made it; None where they don't say how."""
    claims = tuple(claims)
    if not claims or not claims[0].combination:
        return None
    combination = Combination.parse(claims[0].combination)
    keys = [("mode", str(combination.policy)), ("port", str(combination.port))]
    # A network that was made on demand is made anew; its uplink is the other claim.
    made = combination.policy == "nat" and combination.port is Port.BRIDGE
    devices = [claim.resource for claim in claims if not (made and claim.resource.name.startswith("vlnat"))]
    whole = [one for one in devices if one.kind is ResourceKind.VF] or devices
    keys += [("dev", whole[0].name)] if whole else []
    keys.append(("protocols", _PROTOCOLS[combination.backend]))
    where = f" on {whole[0]}" if whole else ""
    hint = "; add ip= with the guest's own address" if combination.policy == "route" else ""
    return Origin(tuple(keys), f"was {combination.text}{where}{hint}")


def _function(option: Option, own: Properties, running: Running, script: Script) -> tuple[str, ...]:
    """A device of VFIO: a network function is claimed and bound by vnet-qemu, others stay as they are."""
    host = own.get("host") or ""
    origin = running.function_at(host)
    name = own.get("id") or f"vfio{len(script.options)}"
    if origin is None:
        script.remarks.append(f"-device {name}: {host} is no network function; bind it to vfio-pci before")
        return option.words
    script.remarks.append(f"-device {name}: {origin.text}")
    place = own.only(_PLACE).items
    return ("-nic", Properties((("type", "host"), ("id", name), *origin.keys, *place)).text)


# --- what else a manager hands over ---------------------------------------------------------------


def _with_own_socket(own: Properties, running: Running, script: Script) -> Properties:
    """A socket that was handed over open becomes one with a path in the current directory."""
    if own.get("fd") is None:
        return own
    path = _own_path(running, own, "sock")
    script.remarks.append(f"-chardev {own.get('id')}: its manager had the socket; now it is ./{path}")
    kept = tuple(item for item in own.items if item[0] != "fd")
    return Properties((*kept, ("path", path)), own.is_json)


def _with_own_log(own: Properties, files: Mapping[str, str], running: Running, script: Script) -> Properties:
    """A log that was written through libvirt's virtlogd becomes a file in the current directory."""
    match = _FDSET.fullmatch(own.get("logfile") or "")
    if match is None or match[1] in files:
        return own
    path = _own_path(running, own, "log")
    script.remarks.append(f"-chardev {own.get('id')}: virtlogd had its log; now it is ./{path}")
    return Properties(
        tuple((key, path if key == "logfile" else value) for key, value in own.items), own.is_json
    )


def _own_path(running: Running, own: Properties, suffix: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', running.name)}-{own.get('id')}.{suffix}"


def _fdsets(
    options: Iterable[Option], parsed: Mapping[int, Properties], running: Running
) -> Iterator[tuple[str, str]]:
    """The files behind /dev/fdset/N."""
    for at, option in enumerate(options):
        if option.name == "add-fd":
            own = parsed[at]
            number = own.get("fd") or ""
            path = running.file_at(int(number)) if _NUMBER.fullmatch(number) else None
            if path:
                yield own.get("set") or "", path


def _with_paths(word: str, files: Mapping[str, str], script: Script) -> str:
    """A word with the paths that a person's QEMU can open."""

    def name(match: re.Match[str]) -> str:
        path = files.get(match[1])
        if path is None:
            script.remarks.append(f"{match[0]} was no file: replace it")
        return path or match[0]

    changed = _PASSING.sub("./", _FDSET.sub(name, word))
    for match in _PASSING.finditer(word):
        script.remarks.append(
            f"{match[0]} goes with the guest: what is in it is in the current directory now"
        )
    return changed


def _remark_descriptors(option: Option, own: Properties, script: Script) -> None:
    for key in ("fd", "vhostfd", "fds", "vhostfds"):
        if own.get(key) is not None:
            script.remarks.append(
                f"-{option.name} {own.get('id') or ''}: {key}={own.get(key)} is nobody's any more"
            )


def _numbers(own: Properties, key: str) -> list[int]:
    text = own.get(f"{key}s") or own.get(key) or ""
    return [int(word) for word in text.split(":") if _NUMBER.fullmatch(word)]
