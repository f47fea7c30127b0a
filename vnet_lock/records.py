"""The JSON form of a claim and the name of its file. Reads strictly: what is odd in any way is no claim."""

from __future__ import annotations

import json  # 4 ms, and here: in a function it would be imported while the guard is held
import re
from functools import lru_cache
from typing import Any, get_args

from vnet_lock import journal
from vnet_lock.dataclass import fields
from vnet_lock.model import Claim, Mode, Owner, OwnerKind, PciAddress, Process, Reservation, Resource, State

VERSION = 1
SIZE_LIMIT = 1 << 20

_NAME = re.compile(r"(.+)~([0-9A-Za-z-]{1,64})~([0-9a-f]{16})\.json", re.DOTALL)
# What JSON can say, and no name can be; bytes of a path that are no UTF-8 are U+DC80 to U+DCFF (PEP 383).
_NO_NAME = re.compile("[\0\ud800-\udfff]")
_NO_PATH = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")

# The annotations that a journal's values have, as they are written there. type() is compared, not
# isinstance(): True is no index.
_TYPES: dict[object, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "bool | None": (bool, type(None)),
}
_ENTRIES = {
    cls: tuple((field.name, _TYPES[field.type]) for field in fields(cls)) for cls in get_args(journal.Entry)
}

# What stands in a record only where it is so.
_FLAGS = ("has_host_pids", "has_host_network")

# A PF stands in the claims on all its VFs.
_pci = lru_cache(maxsize=256)(PciAddress.parse)


def file_name(claim: Claim) -> str:
    """The name of a new claim's record: ``RESOURCE~GUEST~TOKEN.json``, the guest being its UUID or pid.

    ValueError where the claim can't have a record: an owner with neither, a token that is none.
    """
    guest = claim.owner.uuid or (str(claim.owner.process.pid) if claim.owner.process else "")
    name = f"{claim.resource.text}~{guest}~{claim.token}.json"
    if "/" in name or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of a claim's record")
    return name


def is_name_of(name: str, claim: Claim) -> bool:
    """Whether this is the name of the record with the claim's resource and token, whoever the owner."""
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == claim.resource.text and match[3] == claim.token


def fits(name: str, claim: Claim) -> bool:
    """Whether a record with this name may say what the claim says.

    A UUID stands for its guest for ever; a pid is the owner's at the time of the claim, which may have
    been handed over since.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] != claim.resource.text or match[3] != claim.token:
        return False
    return match[2] == claim.owner.uuid if claim.owner.uuid else match[2].isdecimal()


def resource_of_name(name: str) -> Resource | None:
    """What a record is about as far as its name tells."""
    try:
        return Resource.parse(name.rsplit("~", 2)[0])  # a nic's name may have a ~ in it
    except ValueError:
        return None


def encode(claim: Claim) -> bytes:
    """A claim as the bytes of its record."""
    owner = claim.owner
    record = {
        "version": VERSION,
        "resource": claim.resource.text,
        "mode": claim.mode,
        "state": claim.state,
        "owner": {
            "kind": owner.kind,
            "name": owner.name,
            "boot_id": owner.boot_id,
            "uuid": owner.uuid,
            "process": _process_record(owner.process),
            "pid_file": owner.pid_file,
        },
        "token": claim.token,
        "interface": claim.interface,
        "since": claim.since,
        "combination": claim.combination,
        "mac": claim.mac,
        "vlan": claim.vlan,
        "pf": claim.pf.text if claim.pf else None,
        "worker": _process_record(claim.worker),
        "journal": [journal.to_json(entry) for entry in claim.journal],
    }
    if claim.reservation:
        record["reservation"] = {
            "operation": claim.reservation.operation,
            "until_s": claim.reservation.until_s,
        }
    record |= {name: True for name in _FLAGS if getattr(claim, name)}
    data = json.dumps(record).encode() + b"\n"
    if len(data) > SIZE_LIMIT:
        raise ValueError(f"the record of {claim.resource} would be larger than {SIZE_LIMIT} bytes")
    return data


def decode(name: str, data: bytes) -> Claim:
    """The claim in the record called ``name``; ValueError, with the reason, where it is none."""
    try:
        record = json.loads(data)
    except RecursionError:
        raise ValueError("it is no JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    try:
        claim = _claim(record)
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    except TypeError as error:
        raise ValueError(str(error)) from error
    if not fits(name, claim):
        raise ValueError(f"its name does not fit what it says ({claim.resource}, token {claim.token})")
    return claim


def _claim(record: Any) -> Claim:
    if type(record) is not dict:
        raise TypeError("it is no JSON object")
    version = _take(record, "version", int)
    if version != VERSION:
        raise ValueError(f"it has version {version}, and this program knows {VERSION}")
    since = _take(record, "since", int, float)
    if not 0 <= since < 1e12:  # NaN and Infinity too
        raise ValueError(f"since is {since}")
    pf = _take(record, "pf", str, type(None))
    return Claim(
        resource=Resource.parse(_take(record, "resource", str)),
        mode=Mode(_take(record, "mode", str)),
        state=State(_take(record, "state", str)),
        owner=_owner(_take(record, "owner", dict)),
        token=_take(record, "token", str),
        interface=_take(record, "interface", str),
        since=float(since),
        combination=_take(record, "combination", str, type(None)),
        mac=_take(record, "mac", str, type(None)),
        pf=_pci(pf) if pf is not None else None,
        worker=_process(record, "worker"),
        # Records of version 1 had none at first.
        vlan=_take(record, "vlan", int, type(None)) if "vlan" in record else None,
        reservation=_reservation(_take(record, "reservation", dict)) if "reservation" in record else None,
        journal=tuple(_entry(entry) for entry in _take(record, "journal", list)),
        **{name: _take(record, name, bool) for name in _FLAGS if name in record},
    )


def _owner(record: dict[str, Any]) -> Owner:
    owner = Owner(
        kind=OwnerKind(_take(record, "kind", str)),
        name=_take(record, "name", str),
        boot_id=_take(record, "boot_id", str),
        uuid=_take(record, "uuid", str, type(None)),
        process=_process(record, "process"),
        pid_file=_take(record, "pid_file", str, type(None)),
    )
    for pattern, text in ((_NO_NAME, owner.name), (_NO_PATH, owner.pid_file or "")):
        if pattern.search(text):
            raise ValueError(f"its owner has {text!r}, which is no name")
    return owner


def _reservation(record: dict[str, Any]) -> Reservation:
    until_s = _take(record, "until_s", int, float)
    if not 0 <= until_s < 1e12:  # NaN and Infinity too
        raise ValueError(f"its reservation ends at {until_s}")
    return Reservation(_take(record, "operation", str), float(until_s))


def _process(record: dict[str, Any], name: str) -> Process | None:
    value = _take(record, name, dict, type(None))
    if value is None:
        return None
    pid, start_ticks = _take(value, "pid", int), _take(value, "start_ticks", int)
    if pid <= 0 or start_ticks < 0:
        raise ValueError(f"{name} is pid {pid}, start {start_ticks}")
    return Process(pid, start_ticks)


def _process_record(process: Process | None) -> dict[str, int] | None:
    return {"pid": process.pid, "start_ticks": process.start_ticks} if process else None


def _entry(record: Any) -> journal.Entry:
    if type(record) is not dict:
        raise TypeError("an entry of the journal is no JSON object")
    entry = journal.from_json(record)
    for name, types in _ENTRIES[type(entry)]:
        value = getattr(entry, name)
        if type(value) not in types:
            raise TypeError(f"{name} in the journal is {type(value).__name__}")
    return entry


def _take(record: dict[str, Any], name: str, *types: type) -> Any:
    value = record[name]
    if type(value) not in types:
        raise TypeError(f"{name} is {type(value).__name__}")
    return value
