"""The claim table: one JSON record for each claim, below the run directory. Never touches the kernel.

It stores and reads; whether two claims may stand side by side is planning's to say. What it can't trust
(an owner, a mode, a link, a type, a name) it reports as damaged, so that it counts as held.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EDQUOT, ELOOP, ENOSPC

from vnet_lock.errors import Vanished, VnetLockError
from vnet_lock.locks import guard, os_failure
from vnet_lock.model import Claim, Claims, Damaged
from vnet_lock.records import SIZE_LIMIT, decode, encode, file_name, fits, is_name_of, resource_of_name
from vnet_lock.settings import DEFAULT, Settings

# Only who holds the guard writes, so one name does; what stands there at the start a killed writer left.
_TEMPORARY = ".new"
# What is given up where there is no room to write that something is given back: libvirt doesn't ask twice.
_SPARE_BYTES = 4096
_FULL = (ENOSPC, EDQUOT)


class _NoRoom(VnetLockError):
    """The run directory is full."""


def new_token() -> str:
    """16 hexadecimal digits that no other claim has."""
    return os.urandom(8).hex()  # secrets.token_hex does the same, 6 ms of import later


class ClaimTable:
    """The claims of this host."""

    def __init__(self, settings: Settings = DEFAULT) -> None:
        self._settings = settings

    def read(self) -> Claims:
        """All claims, without a lock, for a look: nothing where nothing was ever claimed.

        Raises VnetLockError where the directory itself is not to be trusted. A claim that is being rewritten
        at this moment may be missing in a table of hundreds (readdir(3) promises no more): decide under
        the guard.
        """
        try:
            fd = _open_tree(self._settings, {0, os.geteuid()})
        except FileNotFoundError:
            return Claims()
        try:
            return _read_all(fd, self._settings.claims_dir)
        finally:
            os.close(fd)

    def has_leftover(self) -> bool:
        """Whether a writer is at it, or one that was killed left what the next one removes."""
        return os.path.lexists(f"{self._settings.claims_dir}/{_TEMPORARY}")

    def make_directories(self) -> None:
        """Make what the run directory is to have where it is missing; raises as ``guarded``."""
        with self.guarded():
            pass

    @contextmanager
    def guarded(self) -> Iterator[Writer]:
        """Hold the table: nobody else writes while this is open, and the body must not wait for anything.

        Makes the directories where they are missing. Raises VnetLockError where that fails or the
        guard can't be had.
        """
        settings = self._settings
        ours = {os.geteuid()}
        try:
            fd = _open_tree(settings, ours)
        except FileNotFoundError:
            _make_tree(settings)
            fd = _open_tree(settings, ours)
        try:
            with guard(settings.guard_path, settings.guard_wait_s, "the claim table", settings.proc):
                writer = Writer(settings.claims_dir, fd, settings.spare_path)
                writer.remove_leftover()
                writer.keep_spare()
                try:
                    yield writer
                finally:
                    writer.close()
        finally:
            os.close(fd)


class Writer:
    """The claim table while its guard is held; all that writes records is here."""

    def __init__(self, directory: str, fd: int, spare: str) -> None:
        self._directory = directory
        self._fd = fd
        self._spare = spare

    def read(self) -> Claims:
        """All claims, and nobody changes them meanwhile."""
        return _read_all(self._fd, self._directory)

    def add(self, claims: Iterable[Claim]) -> None:
        """Write the records of new claims: all of them, or none and VnetLockError."""
        with ExitStack() as undo:
            for claim in claims:
                name = file_name(claim)
                if self._has(name):
                    raise VnetLockError(f"there is a claim {self._directory}/{name} already")
                self._write(name, claim)
                undo.callback(self._unlink, name)
            undo.pop_all()

    def replace(self, claim: Claim) -> None:
        """Write a claim's record anew; the claim is known by its resource and token, all else may change.

        The record keeps its file's name (so that a change of owner is one rename, and a crash can't leave
        two records). Raises Vanished where the claim was dropped by somebody else, and writes nothing then.
        """
        name = self._find(claim)
        if name is None:
            raise Vanished(
                f"the claim on {claim.resource} is gone: released by another; see: vnet-lock status"
            )
        if not fits(name, claim):
            raise ValueError(f"{name} cannot become a claim of {claim.owner.text}")
        try:
            self._write(name, claim)
        except _NoRoom:
            # The old record's room is free once this one is written, for the next.
            with suppress(FileNotFoundError):
                os.unlink(self._spare)
            self._write(name, claim)

    def drop(self, claim: Claim) -> None:
        """Remove a claim's record, known by its resource and token; absent is success."""
        name = self._find(claim)
        if name is not None:
            self._unlink(name)

    def remove_leftover(self) -> None:
        """Remove what a writer left that was killed."""
        self._unlink(_TEMPORARY)

    def keep_spare(self) -> None:
        """Keep some room, as long as there is any."""
        with suppress(OSError):
            if os.path.lexists(self._spare) and os.lstat(self._spare).st_size == _SPARE_BYTES:
                return
            fd = os.open(self._spare, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, bytes(_SPARE_BYTES))
            finally:
                os.close(fd)

    def close(self) -> None:
        """Make later use fail: the guard is gone."""
        self._fd = -1

    def _has(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _find(self, claim: Claim) -> str | None:
        name = file_name(claim)
        if self._has(name):
            return name
        return next((name for name in os.listdir(self._fd) if is_name_of(name, claim)), None)

    def _write(self, name: str, claim: Claim) -> None:
        """Write aside and rename: a reader sees the old record or the new one, never half of one."""
        data = encode(claim)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(_TEMPORARY, flags, 0o644, dir_fd=self._fd)
            try:
                os.fchmod(fd, 0o644)  # whatever the umask: everybody may see who has what
                while data:
                    data = data[os.write(fd, data) :]
            finally:
                os.close(fd)
            # No fsync: the run directory is memory, and is to be empty after a reboot.
            os.rename(_TEMPORARY, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            self._unlink(_TEMPORARY)
            failure = os_failure("write the claim", f"{self._directory}/{name}", error)
            raise (_NoRoom(str(failure)) if error.errno in _FULL else failure) from error

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise os_failure("remove", f"{self._directory}/{name}", error) from error


def _open_tree(settings: Settings, owners: set[int]) -> int:
    """A descriptor of the claims' directory; FileNotFoundError where it isn't there yet.

    Raises VnetLockError unless it and the directory above are real, belong to one of ``owners`` and
    nobody else can write them.
    """
    for path in (settings.run, settings.claims_dir):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise os_failure("use the directory", path, error) from error
        found = os.fstat(fd)
        if found.st_uid not in owners:
            os.close(fd)
            hint = "run as root" if found.st_uid == 0 else f"see: ls -ld {path}"
            raise VnetLockError(f"{path} is not ours: it belongs to uid {found.st_uid}; {hint}")
        if found.st_mode & 0o022:
            os.close(fd)
            raise VnetLockError(f"{path} is not ours alone: others can write it; do: chmod go-w {path}")
        if path == settings.run:
            os.close(fd)
    return fd


def _make_tree(settings: Settings) -> None:
    path = os.path.dirname(settings.run)
    try:
        os.makedirs(path, exist_ok=True)
        for path in (settings.run, settings.claims_dir):
            try:
                os.mkdir(path, 0o700)
                os.chmod(path, 0o755)  # noqa: S103  everybody may read, whatever the umask
            except FileExistsError:
                pass  # another was as quick, or it is something else: opening it tells
    except OSError as error:
        raise os_failure("make the directory", path, error) from error


def _read_all(directory: int, path: str) -> Claims:
    trusted = {0, os.geteuid()}
    records: list[Claim] = []
    damaged: list[Damaged] = []
    for name in sorted(os.listdir(directory)):
        if name.startswith("."):
            continue
        try:
            data = _read_file(directory, name, trusted)
            if data is not None:
                records.append(decode(name, data))
        except (OSError, ValueError) as error:
            reason = _reason(error)
            damaged.append(Damaged(f"{path}/{name}", reason, resource_of_name(name)))
    return Claims(tuple(records), tuple(damaged))


def _read_file(directory: int, name: str, owners: set[int]) -> bytes | None:
    """A record's bytes; None if it vanished meanwhile, ValueError or OSError where it isn't to be trusted."""
    try:
        # O_NONBLOCK: a FIFO must not hang us.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no plain file")
        if found.st_uid not in owners:
            raise ValueError(f"it belongs to uid {found.st_uid}")
        if found.st_mode & 0o022:
            raise ValueError("others can write it")
        if found.st_size > SIZE_LIMIT:
            raise ValueError(f"it is larger than {SIZE_LIMIT} bytes")
        return os.read(fd, found.st_size)
    finally:
        os.close(fd)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return "it is a symbolic link" if error.errno == ELOOP else str(error.strerror)
    return str(error)
