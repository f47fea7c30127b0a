"""The installation, checked: configuration, claims, hooks, daemons, confinement, kernel. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum

from vnet_lock.backends import tap_vhost, vfio
from vnet_lock.claims import ClaimTable
from vnet_lock.config import Config, format_indices, read_config
from vnet_lock.dataclass import dataclass
from vnet_lock.errors import VnetLockError
from vnet_lock.front import hook_call, hook_server, hooks_install
from vnet_lock.front.hooks_install import HookFile, HookState
from vnet_lock.kernel import confinement, programs
from vnet_lock.kernel.confinement import HOOKS_OF
from vnet_lock.kernel.modules import lacks_module
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.kernel.sysfs import read_text
from vnet_lock.model import Inventory, Pf
from vnet_lock.settings import Settings

# A guest that wants nothing: the hook starts its Python for it, and ends with 0 without a word.
_NOBODY = """<domain type='kvm'><name>vnet-lock-doctor</name><uuid>00000000-0000-4000-8000-000000000000</uuid>
<metadata><vnet:guest xmlns:vnet="urn:vnet-lock:guest:1"/></metadata></domain>
"""
_HOOK_S = 30
# What libvirt asks the hooks of its drivers about; the daemon's own is told, and asked nothing.
_ASKED = {"qemu": "guests", "network": "networks"}
# A claim's record takes a page.
_LEAST_FREE_BYTES = 1 << 20


class Health(StrEnum):
    """How something is."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; ``message`` says what to do where it isn't ok."""

    health: Health
    kind: str
    message: str


def examine(settings: Settings) -> Iterator[Check]:
    """Check everything; what can't be looked at is an error of its own."""
    if os.geteuid() != 0:
        yield Check(Health.WARNING, "root", "without root not everything is seen; run as root")
    for kind, look in _LOOKS.items():
        try:
            for health, message in look(settings):
                yield Check(health, kind, message)
        except VnetLockError as error:
            yield Check(Health.ERROR, kind, str(error))
        except OSError as error:
            why = f"{error.filename or 'the kernel'}: {error.strerror}; run as root"
            yield Check(Health.ERROR, kind, why)


Found = Iterator[tuple[Health, str]]


# --- what is ours ---------------------------------------------------------------------------------


def _look_at_configuration(settings: Settings) -> Found:
    config = read_config(settings)
    if config is None:
        yield Health.OK, f"there is no {settings.config_path}: no pools, nothing left to the host"
        return
    inventory = read_inventory(settings)
    odd = [*_odd_pools(config, inventory), *_odd_left(config, inventory)]
    for message in odd:
        yield Health.WARNING, f"{config.path}: {message}"
    if not odd:
        yield Health.OK, f"{config.path}: {_counted(len(config.pools), 'pool')}"


def _odd_pools(config: Config, inventory: Inventory) -> Iterator[str]:
    left = config.left_to_host(inventory)
    for pool in config.pools.values():
        pfs = [inventory.pf_named(name) for name in pool.pfs]
        for name, pf in zip(pool.pfs, pfs, strict=True):
            if pf is None:
                yield f"pool {pool.name}: there is no PF {name} here; see: vnet-lock status"
            else:
                yield from _odd_indices(f"pool {pool.name}", name, pf, pool.vfs)
        vfs = [vf for pf in pfs if pf for vf in pf.vfs if pool.has(pf, vf.index)]
        if vfs and all(vf.resource in left for vf in vfs):
            yield f"pool {pool.name}: all of its VFs are left to the host by [host.vfs]"


def _odd_left(config: Config, inventory: Inventory) -> Iterator[str]:
    for name, indices in config.left.items():
        pf = inventory.pf_named(name)
        if pf is None:
            yield f"[host.vfs]: there is no PF {name} here; see: vnet-lock status"
        else:
            yield from _odd_indices("[host.vfs]", name, pf, indices)


def _odd_indices(what: str, name: str, pf: Pf, indices: frozenset[int] | None) -> Iterator[str]:
    missing = {index for index in indices or () if index >= len(pf.vfs)}
    if missing:
        more = f"run: vnet-lock vfs {name} {max(missing) + 1}"
        step = more if max(missing) < pf.totalvfs else f"it can have {pf.totalvfs}"
        count = _counted(len(pf.vfs), "VF")
        yield f"{what}: {name} has {count} now, so there is no VF {format_indices(missing)}; {step}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _look_at_claims(settings: Settings) -> Found:
    if not os.path.lexists(settings.run):
        yield Health.OK, f"{settings.run} isn't there yet: the first claim makes it"
        return
    claims = ClaimTable(settings).read()
    room = os.statvfs(settings.run)
    if room.f_bavail * room.f_frsize < _LEAST_FREE_BYTES:
        yield Health.ERROR, f"the file system of {settings.run} is full: nothing can be claimed; see: df"
    if claims.damaged:
        records = _counted(len(claims.damaged), "claim record")
        yield Health.ERROR, f"{records} can't be trusted; see: vnet-lock status"
    if room.f_bavail and not claims.damaged:
        yield Health.OK, f"{settings.run} is ours, with {_counted(len(claims.records), 'claim')}"


# --- libvirt --------------------------------------------------------------------------------------


def _look_at_hooks(settings: Settings) -> Found:
    if not os.path.isdir(settings.etc_libvirt):
        yield Health.OK, "libvirt isn't installed here"
        return
    files = hooks_install.read_status(settings)
    yield from _look_for_absent(files)
    for file in files:
        if file.state in (HookState.FOREIGN, HookState.OUTDATED):
            yield Health.ERROR, file.text
    if all(file.state is HookState.INSTALLED for file in files):
        yield _try_hook(files[0].path)
    yield from _look_at_server(settings)


def _look_for_absent(files: Sequence[HookFile]) -> Found:
    named = zip(hooks_install.DRIVERS, files, strict=True)
    absent = {driver: file.path for driver, file in named if file.state is HookState.ABSENT}
    if not absent:
        return
    nobody = [what for driver, what in _ASKED.items() if driver in absent]
    message = f"there is no {', '.join(absent.values())}"
    if nobody:
        message = f"libvirt asks nobody about {' and '.join(nobody)}: {message}"
    else:
        message += ", so nobody sees whether libvirt's daemon looked for hooks when it was reloaded"
    yield Health.ERROR if nobody else Health.WARNING, f"{message}; do: vnet-lock hooks install"


def _try_hook(path: str) -> tuple[Health, str]:
    """Run the hook as libvirt does, for a guest that wants nothing, at a step that refuses nobody."""
    import subprocess  # 15 ms

    words = [path, "vnet-lock-doctor", "reconnect", "begin", "-"]
    try:
        done = subprocess.run(
            words, input=_NOBODY, capture_output=True, text=True, errors="replace", check=False,
            timeout=_HOOK_S, cwd="/", env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )  # fmt: skip
    except PermissionError:
        return Health.ERROR, f"{path} can't be run: permission denied; see what is said of confinement"
    except (OSError, subprocess.TimeoutExpired) as error:
        return Health.ERROR, f"{path} can't be run: {error}; do: vnet-lock hooks install"
    said = done.stderr.strip().splitlines()
    if done.returncode or said:
        return Health.ERROR, f"{path} fails: {said[-1] if said else f'exit status {done.returncode}'}"
    return Health.OK, "the hooks are in place, and run"


def _look_at_server(settings: Settings) -> Found:
    """Whether the hooks ask the one that serves them."""
    package, own = hook_server.find_package(settings), hook_call.PACKAGE.decode()
    if package == own:
        yield Health.OK, "vnet-lock hooks serve is ready for libvirt's calls"
    elif package:
        yield (
            Health.WARNING,
            f"vnet-lock hooks serve is of {package}, and not asked by hooks of {own}; end it, and begin ours",
        )
    elif package == "":
        yield Health.WARNING, "vnet-lock hooks serve is not ready; end it, and begin it again"


def _look_at_daemons(settings: Settings) -> Found:
    daemons = confinement.read_daemons(settings)
    if not daemons and os.path.isdir(settings.etc_libvirt):
        yield Health.OK, "no libvirt daemon runs now"
    files = dict(zip(hooks_install.DRIVERS, hooks_install.read_status(settings), strict=True))
    for daemon in daemons:
        there = [driver for driver in HOOKS_OF[daemon.name] if files[driver].since is not None]
        unseen = [driver for driver in there if not files[driver].is_known_to(daemon)]
        if unseen:
            message = (
                f"{daemon.text} hasn't looked for hooks since that for {' and '.join(unseen)} was put there, "
                f"and asks nobody; no guest is disturbed by: systemctl reload {daemon.name}"
            )
            yield Health.ERROR, message
        elif there:
            yield Health.OK, f"{daemon.text} knows its hooks"


def _look_at_confinement(settings: Settings) -> Found:
    if confinement.has_apparmor(settings):
        yield from _look_at_apparmor(settings)
    if confinement.enforces_selinux(settings):
        yield from _look_at_selinux(settings)


def _look_at_apparmor(settings: Settings) -> Found:
    lack = hooks_install.apparmor_lack(settings)
    confined = [daemon for daemon in confinement.read_daemons(settings) if daemon.is_enforced]
    for daemon in confined:
        if lack:
            yield Health.ERROR, f"AppArmor confines {daemon.text} as {daemon.label}: {lack}"
        else:
            yield Health.OK, f"AppArmor confines {daemon.text} as {daemon.label}, which may run the hooks"
    if not confined:
        yield (
            (Health.WARNING, lack) if lack else (Health.OK, "AppArmor is on, and confines no libvirt daemon")
        )


def _look_at_selinux(settings: Settings) -> Found:
    """Our files have the types that the policy has for them, as matchpathcon(8) tells."""
    if programs.find("matchpathcon") is None:
        yield (
            Health.OK,
            "SELinux enforces; with matchpathcon (libselinux-utils) the hooks' types were checked",
        )
        return
    odd = False
    for file in hooks_install.read_status(settings):
        own, usual = confinement.read_selinux_type(file.path), confinement.find_selinux_type(file.path)
        if file.state is HookState.INSTALLED and own != usual:
            odd = True
            yield (
                Health.ERROR,
                (
                    f"{file.path} has the SELinux type {own or '(none)'}, and is to have {usual or '(none)'};"
                    f" do: restorecon {file.path}"
                ),
            )
    if not odd:
        yield Health.OK, "SELinux enforces, and the hooks have the types that its policy has for them"


# --- the kernel -----------------------------------------------------------------------------------


def _look_at_kernel(settings: Settings) -> Found:
    lacks = {
        "VFIO": vfio.missing(settings) or lacks_module(settings, "vfio-pci", "CONFIG_VFIO_PCI"),
        "macvtaps": lacks_module(settings, "macvtap", "CONFIG_MACVTAP"),
        "taps": "" if os.path.exists(f"{settings.dev}/net/tun") else "there is no tun; run: modprobe tun",
        "vhost": tap_vhost.missing(settings),
    }
    for what, why in lacks.items():
        if why:
            yield Health.WARNING, f"no {what}: {why}"
    if not any(lacks.values()):
        yield Health.OK, f"this kernel has all of it: {', '.join(lacks)}"


def _look_at_vfs(settings: Settings) -> Found:
    pfs = [pf for pf in read_inventory(settings).pfs if pf.totalvfs]
    if not pfs:
        yield Health.OK, "no network device here has SR-IOV"
    for pf in pfs:
        name = pf.netdev or pf.pci.text
        bare = [vf.index for vf in pf.vfs if vf.driver is None]
        if not pf.vfs:
            yield Health.WARNING, f"{name} has no VFs; run: vnet-lock vfs {name} {pf.totalvfs}"
        elif pf.netdev is None:
            yield Health.WARNING, f"{name} has no network device here, so nothing can be set on its VFs"
        elif bare and _read_autoprobe(settings, pf) == "0":
            why = "sriov_drivers_autoprobe is 0"
            yield Health.WARNING, f"{name}: VF {format_indices(bare)} without a driver ({why}) fit vfio only"
        else:
            yield Health.OK, f"{name} has {pf.numvfs} of {pf.totalvfs} VFs"


def _read_autoprobe(settings: Settings, pf: Pf) -> str | None:
    return read_text(f"{settings.sys}/bus/pci/devices/{pf.pci.text}/sriov_drivers_autoprobe")


_LOOKS: dict[str, Callable[[Settings], Iterable[tuple[Health, str]]]] = {
    "configuration": _look_at_configuration,
    "claims": _look_at_claims,
    "hooks": _look_at_hooks,
    "daemon": _look_at_daemons,
    "confinement": _look_at_confinement,
    "kernel": _look_at_kernel,
    "vfs": _look_at_vfs,
}
