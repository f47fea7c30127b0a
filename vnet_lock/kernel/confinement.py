"""libvirt's system daemons as they run, and what AppArmor and SELinux say of them. Reads only."""

from __future__ import annotations

import os
from contextlib import suppress

from vnet_lock.dataclass import dataclass
from vnet_lock.kernel import programs
from vnet_lock.kernel.processes import iterate_pids, read_command, read_process
from vnet_lock.kernel.sysfs import read_text
from vnet_lock.settings import Settings

# The daemons that run hooks of ours, and which; as /proc/PID/comm has them.
HOOKS_OF = {
    "libvirtd": ("qemu", "network"),
    "virtqemud": ("qemu",),
    "virtnetworkd": ("network",),
}


@dataclass(frozen=True, slots=True)
class Daemon:
    """One of libvirt's daemons; ``started`` is in ns of the epoch.

    ``label`` is its confinement, like ``libvirtd (enforce)`` or an SELinux context, empty for none.
    ``looked`` is when it last looked for hooks, as our own hook has noted it, 0 where nobody has.
    """

    name: str
    pid: int
    started: int
    label: str
    looked: int

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.name} (pid {self.pid})"

    @property
    def is_enforced(self) -> bool:
        """Whether AppArmor confines it."""
        return self.label.endswith(" (enforce)")


def read_daemons(settings: Settings) -> tuple[Daemon, ...]:
    """Those of the system that run; users' own are left out."""
    found = []
    for pid in iterate_pids(settings):
        name = read_command(settings, pid)
        if name not in HOOKS_OF:
            continue
        with suppress(FileNotFoundError, ProcessLookupError):
            owner = os.stat(f"{settings.proc}/{pid}").st_uid
            process = read_process(settings, pid)
            if process is None or owner not in (0, os.geteuid()):
                continue
            started = _boot_ns(settings) + process.start_ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
            looked = _read_looked(settings.looked_path(pid))
            found.append(Daemon(name, pid, started, _read_label(settings, pid), looked))
    return tuple(found)


def has_apparmor(settings: Settings) -> bool:
    """Whether AppArmor is in this kernel and turned on."""
    return (read_text(f"{settings.sys}/module/apparmor/parameters/enabled") or "").startswith("Y")


def enforces_selinux(settings: Settings) -> bool:
    """Whether SELinux refuses what its policy doesn't allow."""
    return read_text(f"{settings.sys}/fs/selinux/enforce") == "1"


def read_selinux_type(path: str) -> str:
    """The type in a file's SELinux label, empty where it has none."""
    try:
        label = os.getxattr(path, "security.selinux", follow_symlinks=False)
    except OSError:
        return ""
    return _type_in(label.rstrip(b"\0").decode(errors="replace"))


def find_selinux_type(path: str) -> str:
    """The type that the policy has for a file there, empty where it has none."""
    import subprocess  # 15 ms

    words = [programs.require("matchpathcon"), "-n", path]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    return _type_in(done.stdout.strip())


def _type_in(label: str) -> str:
    fields = label.split(":")
    return fields[2] if len(fields) > 2 else ""


def _boot_ns(settings: Settings) -> int:
    """When the kernel was started, to the second (``btime`` of proc(5))."""
    with open(f"{settings.proc}/stat", encoding="ascii") as file:
        times = [line.split()[1] for line in file if line.startswith("btime ")]
    return int(times[0]) * 1_000_000_000


def _read_label(settings: Settings, pid: int) -> str:
    for name in ("apparmor/current", "current"):
        with suppress(OSError):
            label = (read_text(f"{settings.proc}/{pid}/attr/{name}") or "").strip("\0")
            if label and label != "unconfined":
                return label
    return ""


def _read_looked(path: str) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return 0
