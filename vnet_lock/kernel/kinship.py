"""Which processes are an owner's: itself, what it started, the QEMU that libvirt runs for it. Reads only."""

from __future__ import annotations

from vnet_lock.kernel.processes import is_alive, read_ancestors, read_boot_id, read_lock_holder
from vnet_lock.model import Owner, OwnerKind
from vnet_lock.settings import Settings


class Kinship:
    """Remembers what it read: make one for each pass over the host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ancestors: dict[int, frozenset[int]] = {}
        self._guests: dict[Owner, int | None] = {}
        self._roots: dict[Owner, tuple[int | None, int | None]] = {}

    def is_own(self, owner: Owner, pid: int) -> bool:
        """Whether the process is the owner's own; False where its line of ancestors can't be read."""
        alone, head = self._root_pids(owner)
        if pid in (alone, head):
            return True
        if head is None:
            return False
        if pid not in self._ancestors:
            self._ancestors[pid] = frozenset(read_ancestors(self._settings, pid))
        return head in self._ancestors[pid]

    def guest_pid(self, owner: Owner) -> int | None:
        """The pid of the guest itself: the QEMU that libvirt runs for it, None while it has none."""
        pid = self._qemu_pid(owner)
        if pid is None and owner.kind is not OwnerKind.LIBVIRT and owner.process:
            pid = owner.process.pid
        return pid

    def _qemu_pid(self, owner: Owner) -> int | None:
        if owner.pid_file is None:
            return None
        if owner not in self._guests:
            self._guests[owner] = _read_qemu(owner.pid_file)
        return self._guests[owner]

    def _root_pids(self, owner: Owner) -> tuple[int | None, int | None]:
        """The pid that counts alone, and the pid that counts with all its descendants."""
        if owner not in self._roots:
            self._roots[owner] = self._read_root_pids(owner)
        return self._roots[owner]

    def _read_root_pids(self, owner: Owner) -> tuple[int | None, int | None]:
        if owner.boot_id != read_boot_id(self._settings):
            return None, None
        process = None
        if owner.process is not None and is_alive(self._settings, owner.process):
            process = owner.process.pid
        if owner.kind is OwnerKind.LIBVIRT or owner.pid_file is not None:
            # What the daemon started may be another guest's.
            return process, self._qemu_pid(owner)
        return None, process


def _read_qemu(pid_file: str) -> int | None:
    """Who holds the lock on libvirt's pid file; None where nobody does, or we may not look."""
    try:
        pid = read_lock_holder(pid_file)
    except OSError:
        return None
    # 0 and -1 tell that it is held, but not by whom.
    return pid if pid is not None and pid > 0 else None
