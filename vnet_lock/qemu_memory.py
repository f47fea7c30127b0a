"""What of a QEMU command line must change so that the guest's memory is shared with a vhost-user back-end.

Pure: never looks at the host. What the user shares already stays as it is; what would begin to write into a
file of his, or can't be shared, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vnet_lock.dataclass import dataclass
from vnet_lock.errors import BadInput
from vnet_lock.qemu_words import Option, Properties

_BACKEND = "memory-backend-"
# Memory of these is no part of what a device reads and writes.
_NOT_RAM = ("memory-backend-epc",)
# Xen has the memory, not QEMU.
_OF_XEN = ("xenpv", "xenpvh", "xenfv")
# MachineClass.default_ram_size: 128 MiB unless the machine says otherwise (hw/core/machine.c).
_DEFAULT_SIZES = {"": "128M", "pseries": "512M"}
_KNOWN_MACHINES = ("pc", "q35", "isapc", "microvm", "virt", "pseries", "s390-ccw-virtio")

_INSTEAD = "leave vhost, or socket, out of its protocols="
_IMPLIED = {
    "object": "qom-type",
    "machine": "type",
    "M": "type",
    "numa": "type",
    "m": "size",
    "mem-path": "path",
}


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """``more`` words go before the others; ``changed`` has the new words of some options, by their place."""

    more: tuple[str, ...]
    changed: Mapping[int, tuple[str, ...]]


def share_memory(options: Sequence[Option]) -> SharedMemory:
    """What makes all memory of the guest shared, descriptors that vhost-user can pass behind it.

    Raises BadInput, which names the word that is in the way and what to write.
    """
    parsed = {at: _parse(option) for at, option in enumerate(options) if option.name in _IMPLIED}
    machine = _merge(options, parsed, ("machine", "M"))
    if machine.get("type") in _OF_XEN or machine.get("accel") == "xen":
        raise BadInput(f"the memory of a Xen guest can't be shared; {_INSTEAD}")
    objects = {at: one for at, one in parsed.items() if _is_memory(options[at], one)}
    changed: dict[int, tuple[str, ...]] = {
        at: ("-object", made.text) for at, one in objects.items() if (made := _shared(options[at], one))
    }
    nodes = [at for at, one in parsed.items() if options[at].name == "numa" and one.get("type") == "node"]
    for at in nodes:
        if parsed[at].get("mem") is not None or parsed[at].get("memdev") is None:
            raise BadInput(
                f"{options[at].text}: give the node memory that can be shared: "
                "-object memory-backend-memfd,id=node0,size=… and memdev=node0"
            )
    if nodes or machine.get("memory-backend") is not None:
        return SharedMemory((), changed)
    return _with_default(options, parsed, machine, changed)


def _parse(option: Option) -> Properties:
    try:
        return Properties.parse(option.value, _IMPLIED[option.name])
    except ValueError as error:
        raise BadInput(f"{option.text}: broken JSON: {error}") from error


def _merge(options: Sequence[Option], parsed: Mapping[int, Properties], names: Sequence[str]) -> Properties:
    """What several options of a kind say together: QEMU takes the last."""
    return Properties(tuple(i for at, one in parsed.items() if options[at].name in names for i in one.items))


def _is_memory(option: Option, properties: Properties) -> bool:
    kind = properties.get("qom-type") or ""
    return option.name == "object" and kind.startswith(_BACKEND) and kind not in _NOT_RAM


def _shared(option: Option, properties: Properties) -> Properties | None:
    """A memory object that is shared; None where it is so already."""
    kind = (properties.get("qom-type") or "").removeprefix(_BACKEND)
    share = properties.get("share")
    if share is not None and share.lower() not in ("on", "yes", "true", "y"):
        raise BadInput(f"{option.text}: its memory must be shared: write share=on, or {_INSTEAD}")
    if kind == "ram":
        # Before QEMU 9.2 there is no descriptor behind it, shared or not.
        items = ((key, value) for key, value in properties.items if key not in ("qom-type", "share"))
        made = Properties((("qom-type", f"{_BACKEND}memfd"), *items), properties.is_json)
        return made.having("share", True)
    if kind == "file" and share is None:
        if properties.get("readonly") is not None:
            return None
        raise BadInput(
            f"{option.text}: its memory must be shared, which writes it to the file if that is one: "
            f"add share=on, or {_INSTEAD}"
        )
    return None  # memfd and shm are shared unless they say otherwise


def _with_default(
    options: Sequence[Option],
    parsed: Mapping[int, Properties],
    machine: Properties,
    changed: dict[int, tuple[str, ...]],
) -> SharedMemory:
    """With a memory object in the place of what QEMU makes by itself."""
    ids = {one.get("id") for at, one in parsed.items() if options[at].name == "object"}
    name = next(word for n in range(len(ids) + 1) if (word := f"shared-ram{n}") not in ids)
    items: tuple[tuple[str, object], ...] = (("id", name), ("size", _size(options, parsed, machine)))
    paths = [at for at in parsed if options[at].name == "mem-path"]
    if paths:
        # A folder of huge pages, mostly; QEMU doesn't take it beside a memory object.
        kind = "file"
        items = (*items, ("mem-path", options[paths[-1]].value))
        changed = {**changed, **dict.fromkeys(paths, ())}
    else:
        kind = "memfd"
    made = Properties((("qom-type", _BACKEND + kind), *items, ("share", True)))
    return SharedMemory(("-object", made.text, "-machine", f"memory-backend={name}"), changed)


def _size(options: Sequence[Option], parsed: Mapping[int, Properties], machine: Properties) -> str:
    """How much the machine has, as a memory object's size."""
    size = _merge(options, parsed, ("m",)).get("size")
    if size is None or not size.strip("0"):
        size = machine.get("memory.size")
        if size is not None:
            return size
        kind = machine.get("type") or "pc"
        family = next((one for one in _KNOWN_MACHINES if kind == one or kind.startswith(f"{one}-")), None)
        if family is None:
            raise BadInput(f"-machine {kind}: say how much memory it has, by -m, so that it can be shared")
        return _DEFAULT_SIZES.get(family, _DEFAULT_SIZES[""])
    # A number alone is MiB to -m, and bytes to an object.
    return size + "M" if size[-1:].isdigit() else size
