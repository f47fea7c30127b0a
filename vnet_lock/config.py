"""What the host's administrator laid down: pools, the VFs left to the host, defaults, timeouts.

One TOML file; where it isn't there nothing of this is loaded. It belongs to root, and what is wrong in it is
said with its line. It never looks at devices: names are compared with what an inventory has.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from vnet_lock.combination import Policy, Port, ports_of
from vnet_lock.dataclass import dataclass, field, replace
from vnet_lock.errors import BadInput, VnetLockError
from vnet_lock.model import Inventory, PciAddress, Pf, Resource, Vf, is_ifname
from vnet_lock.request import Intent, Request
from vnet_lock.settings import Settings

SIZE_LIMIT_BYTES = 256 * 1024
# A PF's numvfs is a 16-bit register (PCI Express SR-IOV, NumVFs).
_MOST_VFS = 65535
_LONGEST_S = 3600

SECTIONS = ("pools", "host", "defaults", "timeouts")
POOL_KEYS = ("pf", "vfs")
HOST_KEYS = ("vfs",)
DEFAULT_KEYS = ("dev", "pool", "port")
# Each with the setting that it replaces.
TIMEOUTS = {
    "busy": "busy_wait_s",
    "free": "free_wait_s",
    "guard": "guard_wait_s",
    "pf": "pf_wait_s",
    "host": "host_wait_s",
    "hook": "hook_s",
}

_POOL_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_RANGE = re.compile(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?")


@dataclass(frozen=True, slots=True)
class Pool:
    """VFs that guests may have: of these PFs (names or PCI addresses) those with these indices, or all."""

    name: str
    pfs: tuple[str, ...]
    vfs: frozenset[int] | None = None

    def has(self, pf: Pf, index: int) -> bool:
        """Whether a PF's VF is in it."""
        return _is_named(pf, self.pfs) and (self.vfs is None or index in self.vfs)


@dataclass(frozen=True, slots=True)
class Default:
    """What a guest's interface gets that names no device: devices or a pool, and perhaps a port."""

    devs: tuple[str, ...] = ()
    pool: str | None = None
    port: Port | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file; ``left`` has the VFs (their indices, by their PF) that are left to the host."""

    path: str
    pools: Mapping[str, Pool] = field(default_factory=dict)
    left: Mapping[str, frozenset[int]] = field(default_factory=dict)
    defaults: Mapping[Policy, Default] = field(default_factory=dict)
    timeouts: Mapping[str, float] = field(default_factory=dict)

    def tune(self, settings: Settings) -> Settings:
        """Settings with the file's timeouts."""
        changed: dict[str, Any] = {TIMEOUTS[key]: seconds for key, seconds in self.timeouts.items()}
        return replace(settings, **changed)

    def resolve(self, request: Request) -> Request:
        """What is asked for, with the devices that a pool or a default stands for; BadInput names neither."""
        if not isinstance(request, Intent):
            return request
        if not request.devs and request.pool is None and (default := self.defaults.get(request.policy)):
            ports = request.ports or ((default.port,) if default.port else ())
            request = replace(request, devs=default.devs, pool=default.pool, ports=ports)
        if request.pool is None:
            return request
        pool = self.pools.get(request.pool)
        what = f"{request.interface}: pool {request.pool!r}"
        if pool is None:
            known = f"it has {', '.join(self.pools)}" if self.pools else "it has none"
            raise BadInput(f"{what} is not in {self.path}; {known}")
        if Port.SRIOV not in (request.ports or ports_of(request.policy)):
            asked = f"port {request.ports[0]}" if request.ports else f"policy {request.policy}"
            raise BadInput(f"{what} has VFs, which {asked} doesn't take; name a device with dev=")
        return replace(request, devs=pool.pfs, ports=(Port.SRIOV,), vfs=pool.vfs)

    def left_to_host(self, inventory: Inventory) -> frozenset[Resource]:
        """The VFs of an inventory that no guest is to have."""
        return frozenset(
            vf.resource
            for pf in inventory.pfs
            for name, indices in self.left.items()
            if _is_named(pf, (name,))
            for vf in pf.vfs
            if vf.index in indices
        )

    def pools_of(self, pf: Pf, vf: Vf) -> tuple[str, ...]:
        """The names of the pools that a VF is in."""
        return tuple(pool.name for pool in self.pools.values() if pool.has(pf, vf.index))


def read_config(settings: Settings) -> Config | None:
    """The host's configuration, None where there is none.

    BadInput, with file and line, where it can't be understood or isn't root's alone to write; VnetLockError
    where it can't be read.
    """
    path = settings.config_path
    text = _read_text(path)
    return None if text is None else _parse(path, text)


def tuned(settings: Settings) -> Settings:
    """Settings with the timeouts of the host's configuration, as they are where that can't be read."""
    with suppress(VnetLockError):
        config = read_config(settings)
        return config.tune(settings) if config else settings
    return settings


def parse_indices(text: str) -> frozenset[int]:
    """VF indices from ``0-3,6``; ValueError where the text is something else."""
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f'{text!r} is no list of VF indices (like "0-3,6")')
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < _MOST_VFS:
            raise ValueError(f"{part.strip()!r} is no range of VF indices")
        found |= {*range(first, last + 1)}
    return frozenset(found)


def format_indices(indices: Iterable[int]) -> str:
    """VF indices as ``parse_indices`` reads them."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ",".join("-".join(map(str, run)) for run in runs)


def _is_named(pf: Pf, names: Collection[str]) -> bool:
    return pf.pci.text in names or (pf.netdev is not None and pf.netdev in names)


# --- the file -------------------------------------------------------------------------------------


def _read_text(path: str) -> str | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise VnetLockError(f"cannot read {path}: {error.strerror}; run: chmod 644 {path}") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):  # before open(), which takes no directory
        os.close(fd)
        raise BadInput(f"{path} is no regular file; put a file there, or remove it")
    with open(fd, "rb") as file:
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            raise BadInput(f"{path} is not root's alone to write; run: chown root {path}; chmod 644 {path}")
        data = file.read(SIZE_LIMIT_BYTES + 1)
    if len(data) > SIZE_LIMIT_BYTES:
        raise BadInput(f"{path} has more than {SIZE_LIMIT_BYTES} bytes")
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: it is not in UTF-8") from error


def _parse(path: str, text: str) -> Config:
    from tomllib import TOMLDecodeError, loads  # 5 ms

    try:
        root = loads(text)
    except RecursionError as error:
        raise BadInput(f"{path}: it is nested too deeply") from error
    except ValueError as error:
        if not isinstance(error, TOMLDecodeError):  # int()'s own
            raise BadInput(f"{path}: a number in it has too many digits") from error
        said = re.fullmatch(r"(.*) \(at (?:line ([0-9]+), column [0-9]+|end of document)\)", str(error), re.S)
        line = said[2] if said and said[2] else str(text.rstrip("\n").count("\n") + 1)
        raise BadInput(f"{path}:{line}: {said[1] if said else error}") from error
    file = _File(path, text, root)
    file.check((), SECTIONS, f"there are [{'], ['.join(SECTIONS)}]")
    pools = {name: _read_pool(file, name) for name in file.table("pools")}
    return Config(
        path,
        pools=pools,
        left=_read_left(file),
        defaults=dict(_read_default(file, name, pools) for name in file.table("defaults")),
        timeouts=_read_timeouts(file),
    )


class _File:
    """A parsed file, which knows the line of each key."""

    def __init__(self, path: str, text: str, root: dict[str, Any]) -> None:
        self._path = path
        self._text = text
        self._root = root

    def value(self, *keys: str) -> Any:
        """What stands there, None where nothing does."""
        return _look_up(self._root, keys)

    def table(self, *keys: str) -> dict[str, Any]:
        """A table, empty where there is none; BadInput where something else stands there."""
        found = self.value(*keys)
        if found is not None and not isinstance(found, dict):
            self.fail(keys, f"{keys[-1]!r} is a table: [{'.'.join(keys)}]")
        return found or {}

    def check(self, keys: tuple[str, ...], known: Iterable[str], hint: str = "") -> None:
        """BadInput where a table has a key that nobody reads."""
        for key in self.table(*keys) if keys else self._root:
            if key not in known:
                where = f"[{'.'.join(keys)}]" if keys else "this file"
                hint = hint or f"it has {', '.join(known)}"
                self.fail((*keys, key), f"unknown key {key!r}: {where} doesn't have it; {hint}")

    def text(self, *keys: str) -> str | None:
        """A string, None where there is none."""
        found = self.value(*keys)
        if found is not None and not isinstance(found, str):
            self.fail(keys, f'{keys[-1]} is a string: {keys[-1]} = "…"')
        return found

    def devices(self, *keys: str) -> tuple[str, ...]:
        """Names and PCI addresses of devices, each once."""
        found = self.value(*keys)
        if found is None:
            return ()
        if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
            self.fail(keys, f'{keys[-1]} is a list of devices: {keys[-1]} = ["enp1s0"]')
        return tuple(dict.fromkeys(self.device(one, keys) for one in found))

    def device(self, text: str, keys: tuple[str, ...]) -> str:
        """One device as an inventory calls it."""
        try:
            return PciAddress.parse(text).text
        except ValueError:
            if not is_ifname(text):
                self.fail(keys, f"{text!r} is neither the name of a network device nor a PCI address")
            return text

    def indices(self, *keys: str) -> frozenset[int] | None:
        """VF indices, None where there are none."""
        text = self.text(*keys)
        try:
            return None if text is None else parse_indices(text)
        except ValueError as error:
            self.fail(keys, f"{keys[-1]}: {error}")

    def fail(self, keys: tuple[str, ...], why: str) -> NoReturn:
        """Say what is wrong with a key, and on which line it stands."""
        raise BadInput(f"{self._path}:{_line_of(self._text, keys)}: {why}")


def _look_up(root: Any, keys: Iterable[str]) -> Any:
    for key in keys:
        root = root.get(key) if isinstance(root, dict) else None
    return root


def _line_of(text: str, keys: tuple[str, ...]) -> int:
    """The line on which the statement begins that defines a key.

    tomllib tells no lines. But of a file that is right each whole beginning is right, too: this finds the
    longest one that doesn't have the key yet.
    """
    from tomllib import loads

    lines = text.split("\n")
    without, end = 0, len(lines)
    while end - without > 1:
        middle = length = (without + end) // 2
        found = None
        while length < end and found is None:
            try:
                found = loads("\n".join(lines[:length]))
            except (ValueError, RecursionError):  # inside a statement of several lines
                length += 1
        if found is not None and _look_up(found, keys) is None:
            without = length
        else:
            end = middle
    rest = enumerate(lines[without:], without + 1)
    return next(number for number, line in rest if line.strip() and not line.lstrip().startswith("#"))


# --- its sections ---------------------------------------------------------------------------------


def _read_pool(file: _File, name: str) -> Pool:
    keys = ("pools", name)
    if not _POOL_NAME.fullmatch(name):
        file.fail(keys, f"{name!r} is no name of a pool: letters, digits, '-', '_' and '.'")
    file.check(keys, POOL_KEYS)
    pfs = file.devices(*keys, "pf")
    if not pfs:
        file.fail(keys, f'pool {name} has no PF; add pf = ["enp1s0"]')
    return Pool(name, pfs, file.indices(*keys, "vfs"))


def _read_left(file: _File) -> dict[str, frozenset[int]]:
    file.check(("host",), HOST_KEYS)
    left: dict[str, frozenset[int]] = {}
    for name in file.table("host", "vfs"):
        keys = ("host", "vfs", name)
        device = file.device(name, keys)
        if device in left:
            file.fail(keys, f"{name} is {device}, whose VFs are named already; write them in one line")
        left[device] = file.indices(*keys) or frozenset()
    return left


def _read_default(file: _File, name: str, pools: Mapping[str, Pool]) -> tuple[Policy, Default]:
    keys = ("defaults", name)
    try:
        policy = Policy(name)
    except ValueError:
        file.fail(keys, f"{name!r} is no policy; there are {', '.join(Policy)}")
    file.check(keys, DEFAULT_KEYS)
    devs, pool, port = file.devices(*keys, "dev"), file.text(*keys, "pool"), file.text(*keys, "port")
    if bool(devs) == bool(pool):
        file.fail(keys, "a default is either dev = […] or pool = …")
    if port is not None and port not in ports_of(policy):
        file.fail((*keys, "port"), f"{policy} has no port {port!r}; it has {', '.join(ports_of(policy))}")
    if pool is not None and pool not in pools:
        file.fail((*keys, "pool"), f"there is no [pools.{pool}]")
    if pool is not None and (port not in (None, Port.SRIOV) or Port.SRIOV not in ports_of(policy)):
        file.fail((*keys, "pool"), f"a pool has VFs, which {port or policy} doesn't take; use dev = […]")
    return policy, Default(devs, pool, Port(port) if port else None)


def _read_timeouts(file: _File) -> dict[str, float]:
    file.check(("timeouts",), TIMEOUTS)
    found: dict[str, float] = {}
    for key, value in file.table("timeouts").items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LONGEST_S:
            file.fail(
                ("timeouts", key), f"{key} is a number of seconds, more than 0 and at most {_LONGEST_S}"
            )
        found[key] = float(value)
    return found
