"""What a decision stands on beside claims: the configuration, the devices, and what this host can do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vnet_lock import backends, ports
from vnet_lock.combination import DEFAULT_BACKENDS, Backend, Port, backends_of, ports_of
from vnet_lock.dataclass import replace
from vnet_lock.errors import VnetLockError
from vnet_lock.kernel import programs
from vnet_lock.kernel.kinship import Kinship
from vnet_lock.kernel.observe import read_inventory
from vnet_lock.kernel.sysfs import real_name
from vnet_lock.model import Claims, Inventory, Owner, Resource
from vnet_lock.request import Fixed, Intent, Request
from vnet_lock.settings import Settings
from vnet_lock.situation import Situation

if TYPE_CHECKING:
    from vnet_lock.config import Config


class Outlook:
    """One host, with its configuration; ``settings`` are tuned by it as it is at first.

    A configuration that can't be read is an error only where one is needed. One that has changed by then, as
    under a process that stays, is read again.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._read()
        if self._config:
            self.settings = self._config.tune(settings)

    def _read(self) -> None:
        self._config: Config | None = None
        self._config_error: VnetLockError | None = None
        self._seen = _identity(self.settings.config_path)
        if self._seen is None:
            return
        from vnet_lock.config import read_config  # 10 ms, for who has a file

        try:
            self._config = read_config(self.settings)
        except VnetLockError as error:
            self._config_error = error

    def resolve(self, requests: Iterable[Request]) -> tuple[Request, ...]:
        """With the devices that the configuration has for them, each by the name that sysfs has for it.

        BadInput where that can't be told.
        """
        config = self._require_config()
        return tuple(map(self._as_known, map(config.resolve, requests) if config else requests))

    def _as_known(self, request: Request) -> Request:
        if isinstance(request, Intent):
            known = tuple(real_name(self.settings, dev) for dev in request.devs)
            return request if known == request.devs else replace(request, devs=known)
        if not isinstance(request.device, str):
            return request
        name = real_name(self.settings, request.device)
        return request if name == request.device else replace(request, device=name)

    def left_to_host(self, inventory: Inventory) -> frozenset[Resource]:
        """VFs that no guest is to have."""
        config = self._require_config()
        return config.left_to_host(inventory) if config else frozenset()

    def _require_config(self) -> Config | None:
        """The configuration, None where there is none; raises what is wrong with it."""
        if _identity(self.settings.config_path) != self._seen:
            self._read()
        if self._config_error:
            raise self._config_error
        return self._config

    def observe(self, requests: tuple[Request, ...], vlans: bool) -> Inventory:
        """The devices that the requests are about; with ``vlans`` also which of them have which."""
        devices: list[str] = []
        for request in requests:
            if isinstance(request, Fixed):
                devices.append(str(request.device))
            else:
                devices += [*request.devs, *request.addresses]
        return read_inventory(self.settings, devices, vlans=vlans)

    def situation(
        self, inventory: Inventory, owner: Owner | None = None, requests: tuple[Request, ...] = ()
    ) -> Situation:
        """All that a decision stands on, but for the claims: those are read under the guard."""
        kinship = Kinship(self.settings)
        lacking: dict[Port | Backend, str] = {}
        sources = {}
        found: set[str] = set()
        if any(isinstance(request, Intent) for request in requests):
            # Only those that are asked for: passt is tried to see whether it can.
            for backend in _backends_for(requests):
                module = backends.find(backend)
                lacking[backend] = module.missing(self.settings) if module else "not built in this version"
            found = {name for name in ("nft", "dnsmasq") if programs.find(name)}
            sources = {port: module.candidates for port in Port if (module := ports.find(port))}
        return Situation(
            inventory,
            Claims(),
            owner,
            kinship.guest_pid,
            kinship.is_own,
            lacking={what: why for what, why in lacking.items() if why},
            sources=sources,
            programs=frozenset(found),
            no_vlans=self._lacks_vlans(requests),
        )

    def _lacks_vlans(self, requests: tuple[Request, ...]) -> str:
        if not any(request.vlan for request in requests if isinstance(request, Intent)):
            return ""
        from vnet_lock.kernel.modules import lacks_vlans  # 2 ms, and a megabyte to read

        return lacks_vlans(self.settings)


def _identity(path: str) -> tuple[int, int, int] | None:
    """What changes with a file's content or rights; None where there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns


def _backends_for(requests: Iterable[Request]) -> set[Backend]:
    """Those that an intent may get."""
    return {
        backend
        for one in requests
        if isinstance(one, Intent)
        for port in one.ports or ports_of(one.policy)
        for backend in backends_of(one.policy, port)
        if backend in (one.backends or DEFAULT_BACKENDS)
    }
