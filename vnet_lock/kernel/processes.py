"""Processes as /proc shows them: who lives, who holds a lock, who has a device open.

Says that a process is dead only where that is proven. Never signals or traces anybody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from vnet_lock.errors import VnetLockError
from vnet_lock.model import Owner, OwnerKind, Process, UseKind, User
from vnet_lock.settings import Settings

if TYPE_CHECKING:
    from socket import socket  # 5 ms in a hook

# What reading a process's files gives when the process has just gone.
_GONE = (errno.ENOENT, errno.ESRCH, errno.ENOTDIR)
# What it gives when we may not look (hidepid, another user's process).
_HIDDEN = (errno.EACCES, errno.EPERM)
# struct flock of fcntl(2), as the C compiler lays it out: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi")
# proc(5): Z is a zombie, X and x are dead. All have given their descriptors and locks back, but for a zombie
# that has threads left: only its first one has ended.
_DEAD_STATES = "ZXx"
# The pid namespace that the kernel begins with (PROC_PID_INIT_INO, include/linux/proc_ns.h).
_FIRST_PID_NAMESPACE = "pid:[4026531836]"


def read_boot_id(settings: Settings) -> str:
    """This boot's UUID; VnetLockError where the kernel doesn't tell it."""
    path = f"{settings.proc}/sys/kernel/random/boot_id"
    try:
        return _read(path).decode("ascii").strip()
    except OSError as error:
        raise VnetLockError(f"cannot read the boot id: {error}; is {settings.proc} mounted?") from error


def read_uptime_s() -> float:
    """Seconds since boot, those of a suspended host too; no setting of the time changes it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_process(settings: Settings, pid: int) -> Process | None:
    """The process with a pid; None where there is none, or only its zombie.

    PermissionError where it hides from us; VnetLockError where its stat file makes no sense.
    """
    fields = _read_stat(settings, pid)
    if fields is None or (fields[0] in _DEAD_STATES and int(fields[17]) <= 1):
        return None
    return Process(pid, int(fields[19]))


def this_process(settings: Settings) -> Process:
    """The process that calls."""
    process = read_process(settings, os.getpid())
    if process is None:
        raise VnetLockError(f"{settings.proc} doesn't know pid {os.getpid()}; is it this pid namespace's?")
    return process


def sees_host_pids(settings: Settings) -> bool:
    """Whether pids are the host's own here; in another pid namespace, a container's say, few have one."""
    try:
        return os.readlink(f"{settings.proc}/self/ns/pid") == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def sees_host_network(settings: Settings) -> bool:
    """Whether we are in init's network namespace; who may not look into init is taken to be."""
    try:
        return os.path.samefile(f"{settings.proc}/1/ns/net", f"{settings.proc}/self/ns/net")
    except PermissionError:
        return True
    except OSError:
        return False


def is_alive(settings: Settings, process: Process) -> bool:
    """Whether a process lives; False only on proof: gone, a zombie, or its pid another's by now."""
    try:
        return read_process(settings, process.pid) == process
    except (OSError, VnetLockError):
        return True


def is_owner_alive(settings: Settings, owner: Owner) -> bool:
    """Whether an owner may still use what it claimed; False only on proof of death.

    A guest that libvirt runs lives while anybody holds the lock on its pid file: its QEMU does so for its
    life. Of one that vnet-qemu runs without libvirt's daemon, vnet-qemu gives back what it had, so it lives
    as long as that, too.
    """
    if owner.boot_id != read_boot_id(settings):
        return False
    if owner.pid_file is not None and owner.kind is OwnerKind.LIBVIRT:
        return _is_guest_alive(settings, owner.pid_file, owner.process)
    if owner.process is None or is_alive(settings, owner.process):
        return True
    # Asked last: its QEMU has the lock before vnet-qemu is gone.
    return owner.pid_file is not None and _is_locked(owner.pid_file)


def _is_guest_alive(settings: Settings, pid_file: str, daemon: Process | None) -> bool:
    """Of a guest of libvirt's daemon.

    While nobody has the lock, libvirt may still be giving back what the guest had: that ends with its status
    file, which libvirt writes once QEMU has the lock, replaces by renaming, and removes after it has
    reattached and deleted the devices, just before it calls `release` (qemuProcessLaunch, qemuProcessStop in
    libvirt's qemu_process.c). What a daemon was killed in the middle of, the next one does
    (qemuProcessReconnect).

    A missing file proves nothing by itself, as a guest that is being started has none: it counts as alive as
    long as the daemon that starts it is there. There is no daemon where `stopped` has seen the file.
    """
    if _is_locked(pid_file):
        return True
    has_status_file = _is_there(pid_file.removesuffix(".pid") + ".xml")
    if has_status_file or daemon is None:
        return has_status_file is not False
    return is_alive(settings, daemon)


def _is_locked(path: str) -> bool:
    """Whether anybody holds a lock on a file, or may."""
    try:
        return read_lock_holder(path) is not None
    except OSError:
        return True


def _is_there(path: str) -> bool | None:
    """Whether a file exists; None where its directory can't be seen."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False if os.path.isdir(os.path.dirname(path)) else None
    except OSError:
        return True
    return True


def read_peer(end: socket) -> tuple[int, int]:
    """Pid and uid of who made the other end of a socket, or listens there (unix(7), SO_PEERCRED).

    The pid is 0 where there is nobody, or where it is of another pid namespace.
    """
    from socket import SO_PEERCRED, SOL_SOCKET  # loaded by who has one

    credentials = end.getsockopt(SOL_SOCKET, SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


def read_command(settings: Settings, pid: int) -> str:
    """The name of a process (its comm, 15 bytes at most); empty where it is gone or hides."""
    try:
        return _read(f"{settings.proc}/{pid}/comm").decode("utf-8", "replace").rstrip("\n")
    except OSError:
        return ""


def read_ancestors(settings: Settings, pid: int) -> tuple[int, ...]:
    """The pids of the parent, its parent and so on, as far as they can be seen."""
    found: list[int] = []
    while pid > 1 and pid not in found[:-1]:
        try:
            fields = _read_stat(settings, pid)
        except (OSError, VnetLockError):
            break
        if fields is None:
            break
        pid = int(fields[1])
        if pid:
            found.append(pid)
    return tuple(found)


def read_lock_holder(path: str) -> int | None:
    """Who holds a POSIX lock anywhere on a file; None where nobody does or there is no file.

    The pid is 0 where the holder lives in another pid namespace and -1 where the lock belongs to an open
    file description (fcntl(2)). OSError where the file can't be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        lock_type, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    finally:
        os.close(descriptor)
    return None if lock_type == fcntl.F_UNLCK else int(pid)


def read_holders(settings: Settings, rdevs: Collection[int]) -> dict[int, tuple[User, ...]]:
    """Who has one of these character devices (st_rdev) open: one pass over all descriptors.

    Compares device numbers, not names, so a node in a private /dev is seen too.
    """
    return find_holders(settings, rdevs, ())[0]


def find_holders(
    settings: Settings, rdevs: Collection[int], sockets: Collection[int]
) -> tuple[dict[int, tuple[User, ...]], dict[int, tuple[User, ...]]]:
    """Who has character devices (by st_rdev) and who has sockets (by inode) open, in one pass.

    Whom we may not look into is passed over.
    """
    devices: dict[int, dict[int, User]] = {}
    ends: dict[int, dict[int, User]] = {}
    if not rdevs and not sockets:
        return {}, {}
    socket_names = {f"socket:[{inode}]": inode for inode in sockets}
    for pid in sorted(iterate_pids(settings)):
        for path, target in _iterate_descriptors(settings, pid):
            if target in socket_names:
                found, key = ends, socket_names[target]
                kind, what = UseKind.SOCKET, "a packet socket"
            elif rdevs and target.startswith("/") and (rdev := _read_rdev(path)) in rdevs:
                found, key = devices, rdev
                kind, what = UseKind.VFIO, target.removesuffix(" (deleted)")
            else:
                continue
            holders = found.setdefault(key, {})
            if pid not in holders:
                holders[pid] = User(pid, read_command(settings, pid), f"has {what} open", kind)
    return (
        {key: tuple(holders.values()) for key, holders in devices.items()},
        {key: tuple(holders.values()) for key, holders in ends.items()},
    )


def iterate_pids(settings: Settings) -> Iterator[int]:
    """All processes that can be seen."""
    for name in os.listdir(settings.proc):
        if name.isdecimal():
            yield int(name)


def _iterate_descriptors(settings: Settings, pid: int) -> Iterator[tuple[str, str]]:
    """Paths of a process's descriptors under /proc, with what they point at."""
    folder = f"{settings.proc}/{pid}/fd"
    names = _list_seen(folder)
    # A kernel's thread has none, and a process whose first thread has ended has them by the others.
    for task in () if names else _list_seen(f"{settings.proc}/{pid}/task"):
        folder = f"{settings.proc}/{pid}/task/{task}/fd"
        if names := _list_seen(folder):
            break
    for name in names:
        path = f"{folder}/{name}"
        try:
            yield path, os.readlink(path)
        except OSError as error:
            if error.errno not in (*_GONE, *_HIDDEN):
                raise


def _list_seen(folder: str) -> list[str]:
    """The names in a folder of /proc; none where it is gone, or not ours to see."""
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in (*_GONE, *_HIDDEN):
            return []
        raise


def _read_rdev(path: str) -> int:
    """The device number of a character device; 0 for all else."""
    try:
        found = os.stat(path)
    except OSError:
        # A descriptor of a dead network file system: no character device, whatever the errno.
        return 0
    return found.st_rdev if stat.S_ISCHR(found.st_mode) else 0


def _read_stat(settings: Settings, pid: int) -> list[str] | None:
    """Fields 3 and following of /proc/PID/stat (state first); None where there is no such process.

    The command, field 2, may itself hold blanks and parentheses: it ends at the last one.
    """
    try:
        text = _read(f"{settings.proc}/{pid}/stat")
    except OSError as error:
        if error.errno in _GONE:
            # hidepid=2 hides the whole directory of a process that is there (proc(5)).
            if _is_hidden(settings, pid):
                raise PermissionError(errno.EACCES, f"pid {pid} hides from us") from error
            return None
        raise
    fields = text[text.rfind(b")") + 1 :].decode("ascii", "replace").split()
    if len(fields) < 20 or not fields[1].isdecimal() or not fields[19].isdecimal():
        raise VnetLockError(f"{settings.proc}/{pid}/stat makes no sense: {text[:80]!r}")
    return fields


def _is_hidden(settings: Settings, pid: int) -> bool:
    """Whether a process that /proc doesn't show exists nevertheless; where init shows, nobody is hidden."""
    if os.path.exists(f"{settings.proc}/1"):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return False


def _read(path: str) -> bytes:
    """A small file of /proc in one read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
