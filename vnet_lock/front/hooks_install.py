"""Our files among libvirt's hooks: put there, taken away, looked at. Touches no file that isn't ours.

They are real files, never links: AppArmor lets libvirt run what is below its own hooks directory only.
"""

from __future__ import annotations

import os
import shlex
import sys
from enum import StrEnum

from vnet_lock.dataclass import dataclass
from vnet_lock.errors import BadInput, VnetLockError
from vnet_lock.kernel import confinement
from vnet_lock.kernel.confinement import Daemon
from vnet_lock.settings import Settings

DRIVERS = ("qemu", "network", "daemon")
NAME = "50-vnet-lock"

# The shims have it in their second line; it tells our files from others'.
_MARKER = "# vnet-lock hook shim"
# What the hook's Python loads; it runs without site, so it is told where they are.
_LIBRARIES = ("vnet_lock", "filelock", "pyroute2", "libvirt")
# Where AppArmor's profile of libvirtd lets a hook run programs.
_CONFINED_TO = ("/usr/bin/", "/usr/sbin/")


class HookState(StrEnum):
    """What stands at the place of a hook file."""

    ABSENT = "absent"
    INSTALLED = "installed"
    OUTDATED = "outdated"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class HookFile:
    """One hook file; ``note`` says what to do where it isn't as it should be.

    ``since`` is when libvirt could first have found it (ns of the epoch), None where it can't: the time of
    the file's last change, which a newer version of ours keeps.
    """

    path: str
    state: HookState
    note: str = ""
    since: int | None = None

    @property
    def text(self) -> str:
        """One line for a person."""
        return f"{self.path}: {self.state}" + (f"; {self.note}" if self.note else "")

    def is_known_to(self, daemon: Daemon) -> bool:
        """Whether a daemon has looked for hooks since one was there.

        libvirt looks for them at its start and at SIGHUP (virHookCall), for whether there is any: of two in
        one folder it runs both, if it found one.
        """
        folder = os.path.dirname(self.path)
        others = (folder.removesuffix(".d"), *(f"{folder}/{name}" for name in os.listdir(folder)))
        times = [
            os.stat(path).st_ctime_ns
            for path in others
            if path != self.path and os.path.isfile(path) and os.access(path, os.X_OK)
        ]
        return min([self.since or 0, *times]) <= max(daemon.started, daemon.looked)


def find_lack(settings: Settings) -> str:
    """Why libvirt would not call us at a guest's start and end, with what to do; "" where it would."""
    hook = _read_file(settings, "qemu")
    if hook.state not in (HookState.INSTALLED, HookState.OUTDATED):
        return "isn't there; run: vnet-lock hooks install"
    for daemon in confinement.read_daemons(settings):
        if "qemu" in confinement.HOOKS_OF[daemon.name] and not hook.is_known_to(daemon):
            return f"isn't known to {daemon.text} yet; run: systemctl reload {daemon.name}"
    return ""


def install(settings: Settings) -> list[str]:
    """Write the files and return lines that say what was done and what is left to do.

    Files of ours are replaced, each in one step. BadInput, before anything is written, where another's
    file is in the way; VnetLockError where writing fails.
    """
    files = {driver: _shim_text(settings, driver) for driver in DRIVERS}
    found = read_status(settings)
    for file in found:
        if file.state is HookState.FOREIGN:
            raise BadInput(f"{file.path} is not ours; move it away and install again")
    lines = []
    for file, (driver, text) in zip(found, files.items(), strict=True):
        if file.state is HookState.INSTALLED:
            lines.append(f"{file.path}: is there already")
            continue
        _write(f"{settings.etc_libvirt}/hooks", f"{driver}.d", text, file.since)
        lines.append(f"{file.path}: {'replaced' if file.state is HookState.OUTDATED else 'installed'}")
    return lines + _notes(settings, is_new=any(file.state is HookState.ABSENT for file in found))


def remove(settings: Settings) -> list[str]:
    """Take the files away and return lines that say so; absent is success, another's file stays."""
    lines = []
    for file in read_status(settings):
        if file.state is HookState.FOREIGN:
            lines.append(f"{file.path}: is not ours, left alone")
        elif file.state is HookState.ABSENT:
            lines.append(f"{file.path}: is not there")
        else:
            try:
                os.unlink(file.path)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise VnetLockError(f"cannot remove {file.path}: {error.strerror}; run as root") from error
            lines.append(f"{file.path}: removed")
    return lines


def read_status(settings: Settings) -> tuple[HookFile, ...]:
    """What there is, compared with what install would write; VnetLockError where that can't be told."""
    return tuple(_read_file(settings, driver) for driver in DRIVERS)


def _read_file(settings: Settings, driver: str) -> HookFile:
    path = f"{settings.etc_libvirt}/hooks/{driver}.d/{NAME}"
    if os.path.islink(path):
        return HookFile(
            path, HookState.FOREIGN, "it is a link, which AppArmor may keep libvirt from following"
        )
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return HookFile(path, HookState.ABSENT, "to put it there: vnet-lock hooks install")
    except IsADirectoryError:
        return HookFile(path, HookState.FOREIGN, "it is a directory")
    except OSError as error:
        raise VnetLockError(f"cannot read {path}: {error.strerror}; run as root") from error
    if not any(line.startswith(_MARKER) for line in text.splitlines()[:3]):
        return HookFile(path, HookState.FOREIGN, "another program or person wrote it")
    found = os.stat(path)
    # By its mode: that SELinux keeps us from it is another matter, which installing it anew doesn't change.
    since = found.st_mtime_ns if found.st_mode & 0o111 else None
    if text != _shim_text(settings, driver) or since is None:
        note = "it is not of this version; do: vnet-lock hooks install"
        return HookFile(path, HookState.OUTDATED, note, since)
    return HookFile(path, HookState.INSTALLED, since=since)


def _notes(settings: Settings, *, is_new: bool) -> list[str]:
    notes = []
    if lack := apparmor_lack(settings):
        notes.append(lack)
    if is_new:
        notes.append(
            "libvirt looks for hooks when its daemon starts or gets SIGHUP; do:"
            " systemctl reload libvirtd (or virtqemud and virtnetworkd); no guest is disturbed"
        )
    return notes


def apparmor_lack(settings: Settings) -> str:
    """Why AppArmor may keep libvirt from running the hooks; empty where it doesn't."""
    interpreter = _interpreter()
    if interpreter.startswith(_CONFINED_TO) or not confinement.has_apparmor(settings):
        return ""
    return (
        f"AppArmor may keep libvirt from running {interpreter}; install with a Python below"
        f" {' or '.join(_CONFINED_TO)}"
    )


def _interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it: it runs without site anyway."""
    return os.path.realpath(sys.executable)


def _shim_text(settings: Settings, driver: str) -> str:
    """The shim with this interpreter, its libraries and the host's root filled in."""
    with open(_find_shim(driver), encoding="utf-8") as file:
        lines = file.read().splitlines(keepends=True)
    values = {
        "python": _interpreter(),
        "path": ":".join(_library_paths()),
        # What stands before every path: empty but for a fake host.
        "root": settings.etc_libvirt.removesuffix(Settings().etc_libvirt),
    }
    for number, line in enumerate(lines):
        name = line.partition("=")[0]
        if name in values:
            lines[number] = f"{name}={shlex.quote(values.pop(name))}\n"
    return "".join(lines)


def _library_paths() -> list[str]:
    """The directories that Python finds our libraries in, beside its own."""
    from importlib.util import find_spec

    paths: dict[str, None] = {}
    for library in _LIBRARIES:
        spec = find_spec(library)
        if spec is None or spec.origin is None:
            raise VnetLockError(f"the Python library {library} is missing here; do: pip install {library}")
        path = os.path.dirname(os.path.abspath(spec.origin))
        if spec.submodule_search_locations is not None:  # a package, not a single file
            path = os.path.dirname(path)
        if ":" in path:
            raise VnetLockError(f"{path} has a colon, which parts paths: install vnet-lock elsewhere")
        paths[path] = None
    return list(paths)


def _find_shim(driver: str) -> str:
    """Beside the package in a source tree, else where the package's own list of files says."""
    import vnet_lock

    top = os.path.dirname(os.path.dirname(os.path.abspath(vnet_lock.__file__)))
    place = f"{top}/hooks/{driver}"
    # An installed package may lie beside somebody else's "hooks".
    if os.path.isfile(f"{top}/setup.cfg") and os.path.isfile(place):
        return place
    from importlib.metadata import PackageNotFoundError, files  # 40 ms

    try:
        listed = files("vnet-lock") or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if str(file).endswith(f"share/vnet-lock/hooks/{driver}"):
            return os.path.normpath(str(file.locate()))
    raise VnetLockError(f"the hook shim hooks/{driver} is nowhere; install vnet-lock anew")


def _write(directory: str, folder: str, text: str, since: int | None) -> None:
    """Write aside and rename. Aside is above the folder: libvirt runs every executable file inside it."""
    path = f"{directory}/{folder}/{NAME}"
    beside = f"{directory}/.{folder}-{NAME}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        for missing in (directory, os.path.dirname(path)):
            if not os.path.isdir(missing):
                os.mkdir(missing)
                os.chmod(missing, 0o755)  # noqa: S103  a user's own daemon runs hooks as that user
        _write_aside(beside, text)
        if since is not None:
            os.utime(beside, ns=(since, since))
        os.rename(beside, path)
    except OSError as error:
        raise VnetLockError(f"cannot write {path}: {error.strerror}; run as root") from error


def _write_aside(path: str, text: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o755)
        except OSError:
            os.unlink(path)
            raise
