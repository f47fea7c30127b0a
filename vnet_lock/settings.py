"""Where things are: every path outside the package derives from one frozen value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnet_lock.dataclass import dataclass

if TYPE_CHECKING:
    from pathlib import Path  # 8 ms in a hook


@dataclass(frozen=True, slots=True)
class Settings:
    """Roots of what is read and written; ``Settings.under(root)`` serves a fake host to a test."""

    sys: str = "/sys"
    proc: str = "/proc"
    dev: str = "/dev"
    run: str = "/run/vnet-lock"
    libvirt_run: str = "/run/libvirt"
    etc: str = "/etc/vnet-lock"
    etc_libvirt: str = "/etc/libvirt"
    lib_modules: str = "/lib/modules"
    # What guests that are run without libvirt's daemon keep.
    lib: str = "/var/lib/vnet-lock"

    # How long a claim that is being released by another process is waited for, at most.
    busy_wait_s: float = 5.0
    # How long a device may take to become free (a VF's reset is seen up to 2 s late).
    free_wait_s: float = 5.0
    # How long the guard, a PF's lock and the host's are waited for.
    guard_wait_s: float = 5.0
    pf_wait_s: float = 60.0
    host_wait_s: float = 60.0
    # What a hook hasn't done by then is given up and undone: libvirt waits for it without any limit, with the
    # guest locked. A prepare takes a tenth of a second; under full emulation and load 30 s were seen.
    hook_s: float = 40.0
    # How long what was chosen for a guest that comes from elsewhere is kept for its start.
    reservation_s: float = 60.0

    @classmethod
    def under(cls, root: Path | str) -> Settings:
        """All paths below ``root``."""
        root = str(root).rstrip("/")
        plain = cls()
        return cls(
            sys=root + plain.sys,
            proc=root + plain.proc,
            dev=root + plain.dev,
            run=root + plain.run,
            libvirt_run=root + plain.libvirt_run,
            etc=root + plain.etc,
            etc_libvirt=root + plain.etc_libvirt,
            lib_modules=root + plain.lib_modules,
            lib=root + plain.lib,
        )

    @property
    def config_path(self) -> str:
        """The host's configuration, which need not be there."""
        return self.etc + "/config.toml"

    @property
    def claims_dir(self) -> str:
        """One JSON record for each claim."""
        return self.run + "/claims"

    @property
    def host_lock_path(self) -> str:
        """The lock under which what several guests share on this host is changed."""
        return self.run + "/host.lock"

    @property
    def reap_lock_path(self) -> str:
        """The lock of the one process that follows the claims of this host."""
        return self.run + "/reap.lock"

    @property
    def watch_lock_path(self) -> str:
        """The lock of the one process that watches libvirt's guests on this host."""
        return self.run + "/watch.lock"

    @property
    def hooks_lock_path(self) -> str:
        """The lock of the one process that serves the hooks of this host."""
        return self.run + "/hooks.lock"

    @property
    def hooks_socket_path(self) -> str:
        """Where it is called; the hook, which doesn't load this, says it in hook_call.SOCKET."""
        return self.run + "/hooks.sock"

    @property
    def spare_path(self) -> str:
        """Room for a claim's record where there is no other any more."""
        return self.run + "/.spare"

    def looked_path(self, pid: int) -> str:
        """The note of libvirt's daemon with this pid that it has looked for hooks; hooks/daemon writes it."""
        return f"{self.run}/{pid}.hooks"

    @property
    def guard_path(self) -> str:
        """The lock under which the claim table is read and written."""
        return self.run + "/guard"

    def socket_path(self, token: str) -> str:
        """Where a guest's QEMU finds the network of a claim."""
        return f"{self.run}/vhost-{token}.sock"

    def pf_lock_path(self, pci: str) -> str:
        """The lock under which a PF, and its VFs through it, are written."""
        return f"{self.run}/pf-{pci}.lock"


DEFAULT = Settings()
