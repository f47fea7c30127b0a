"""What the running kernel's modules can do, and which VFIO driver is made for a function. Reads only."""

from __future__ import annotations

import os
import re

from vnet_lock.kernel.sysfs import read_text
from vnet_lock.model import PciAddress
from vnet_lock.settings import Settings

# A line of modules.alias: "alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci". modpost writes
# the fields of struct pci_device_id in this order, each in capitals' hexadecimal or as *.
_FIELDS = "".join(rf"{name}(\*|[0-9A-F]+)" for name in ("v", "d", "sv", "sd", "bc", "sc", "i"))
_VFIO_ALIAS = re.compile(rf"^alias vfio_pci:{_FIELDS}\s+(\S+)$", re.MULTILINE)
_MODALIAS = re.compile(rf"pci:{_FIELDS}")
_PLAIN = "vfio-pci"


def find_vfio_driver(settings: Settings, pci: PciAddress) -> str:
    """The driver that gives this function to user space best: a variant made for it, or vfio-pci.

    As libvirt chooses (virPCIDeviceFindBestVFIOVariant), and the kernel's commit cc6711b0bf36 means it: of
    all vfio_pci aliases that fit the function's modalias, the one with the fewest wildcards.
    """
    own = _MODALIAS.fullmatch(read_text(f"{settings.sys}/bus/pci/devices/{pci.text}/modalias") or "")
    if own is None:
        return _PLAIN
    best = ("", len(own.groups()))
    for match in _VFIO_ALIAS.finditer(_read_aliases(settings)):
        *fields, module = match.groups()
        wildcards = fields.count("*")
        fits = all(field in ("*", value) for field, value in zip(fields, own.groups(), strict=True))
        if fits and wildcards < best[1]:
            best = (module, wildcards)
    # Variants' drivers are called like their modules (KBUILD_MODNAME); vfio_pci's own is not.
    return best[0] or _PLAIN


def lacks_vlans(settings: Settings) -> str:
    """Why this kernel makes no VLAN devices; empty where it does, or where that can't be told."""
    if os.path.exists(f"{settings.proc}/net/vlan"):
        return ""
    aliases = _read_aliases(settings)
    if re.search("^alias rtnl-link-vlan ", aliases, re.MULTILINE):
        return ""
    if not aliases and _may_have(settings, "CONFIG_VLAN_8021Q"):
        return ""
    return "this kernel has no VLAN devices (8021q)"


def lacks_module(settings: Settings, name: str, option: str) -> str:
    """Why this kernel can't have a module; empty where it has it, as a file or built in, or doesn't tell.

    ``option`` is the one that builds it.
    """
    if os.path.exists(f"{settings.sys}/module/{name.replace('-', '_')}"):
        return ""
    folder = f"{settings.lib_modules}/{os.uname().release}"
    known = _read_lines(f"{folder}/modules.dep") + _read_lines(f"{folder}/modules.builtin")
    if re.search(rf"^[^:]*/{re.escape(name)}\.ko", known, re.MULTILINE):
        return ""
    if not known and _may_have(settings, option):
        return ""
    return f"this kernel has no module {name} ({option})"


def _may_have(settings: Settings, option: str) -> bool:
    """Whether the kernel was built with an option, as far as it tells (CONFIG_IKCONFIG_PROC)."""
    import gzip  # 5 ms, and only in a container or on a kernel without modules

    try:
        with gzip.open(f"{settings.proc}/config.gz", "rt", encoding="utf-8") as file:
            return re.search(f"^{option}=", file.read(), re.MULTILINE) is not None
    except (OSError, EOFError):
        return True


def _read_aliases(settings: Settings) -> str:
    """modules.alias of the running kernel; empty where there is none, in a container say."""
    return _read_lines(f"{settings.lib_modules}/{os.uname().release}/modules.alias")


def _read_lines(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
