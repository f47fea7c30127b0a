"""vnet-qemu GUEST.xml: a libvirt guest without libvirt's daemon, by the driver that libvirt has to embed.

No hook runs there (qemu:///embed calls none), so all that the guest wants is claimed and made here, before
libvirt is asked, and given back here at its end. libvirt makes QEMU a daemon of its own, by whose lock on its
pid file the claims live, too: kill -9 of this process takes nothing from the guest. (Before its vCPUs run, it
leaves a QEMU that has to be killed, too.)
"""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING

from vnet_lock.domain_document import read_text
from vnet_lock.domain_xml import Guest, read_wishes
from vnet_lock.errors import Unsupported, VnetLockError
from vnet_lock.front.program import ENDING
from vnet_lock.front.resolver import planned_anew, resolve_alone
from vnet_lock.front.verbs import read_file
from vnet_lock.kernel import processes
from vnet_lock.model import Owner, OwnerKind
from vnet_lock.request import Fixed, Form
from vnet_lock.session import Session
from vnet_lock.settings import Settings

if TYPE_CHECKING:
    from vnet_lock.front.libvirt_client.connection import Libvirt
    from vnet_lock.front.libvirt_client.domain import Domain

_PLAIN = re.compile("[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,23}")
# How long a signal may wait.
_TICK_S = 1.0


def run(settings: Settings, path: str, print_only: bool) -> int:
    """Run the guest of a file until its end, or print it as libvirt would get it.

    0 where it was shut down, or ended by a signal to us; VnetLockError where it couldn't be started, or ended
    otherwise.
    """
    xml = read_file(path)
    guest, _ = read_wishes(xml)
    read_text(xml)  # libvirt would be asked only when all is claimed
    _refuse_macvtaps(guest)
    name = guest.name
    root = f"{settings.lib}/embed/{_folder(name)}"
    me, boot = processes.this_process(settings), processes.read_boot_id(settings)
    owner = Owner(OwnerKind.QEMU, name, boot, process=me, pid_file=_pid_file(root, name))
    session = Session(settings)
    if print_only:
        sys.stdout.buffer.write(resolve_alone(session, xml, owner)[0])
        return 0
    # None of them raises anything: within a callback of libvirt's that would be lost.
    ended: list[int] = []
    for number in ENDING:
        signal.signal(number, lambda number, _: ended.append(number))
    _require_alone(root, name)

    def acquire() -> bytes:
        resolved, requests = resolve_alone(session, xml, owner)
        for grant in session.acquire(owner, requests):
            grant.close()
        return resolved

    with _open(settings, root) as libvirt:
        # With the pid file locked again, what an earlier start has left would count as a guest's.
        session.heal()
        try:
            resolved = planned_anew(acquire)
            if not ended:
                _wait(libvirt, _create(libvirt, resolved), ended, f"{root}/log/qemu/{name}.log")
        finally:
            session.release(owner)
    return 0


def _refuse_macvtaps(guest: Guest) -> None:
    """Refuse what libvirt would make a macvtap for.

    Taking one away, it looks for a client of its netlink service, which only its daemons start, and dies by
    SIGSEGV (virNetlinkEventRemoveClient; seen with 11.3). Those of intents are ours.
    """
    for request in guest.requests:
        if isinstance(request, Fixed) and request.form is not Form.HOSTDEV:
            raise Unsupported(
                f"interface {request.interface}: without its daemon, libvirt can't take away its macvtap on"
                f" {request.device}; let vnet-lock make that: write an intent in its place, see vnet-qemu(1)"
            )


def _folder(name: str) -> str:
    """The name of a guest's own directory, as a URI, a setting and the path of a socket can have it.

    Read as another's it would be opened as another's, and that guest ended.
    """
    return name if _PLAIN.fullmatch(name) else "~" + sha256(name.encode()).hexdigest()[:16]


def _require_alone(root: str, name: str) -> None:
    """See that the guest doesn't run already: the driver, once opened, would end one that was left behind.

    One that is dead is none of the driver's either: libvirt would take back the devices that it had, whoever
    has them by now. What they were before is in our journals.
    """
    status = f"{root}/run/qemu/{name}.xml"
    # Looked at before the locks: what another writes who starts it at this moment is another file.
    left = _identity(status)
    words = {"driver": "is run by another vnet-qemu", name: "is running already, without vnet-qemu"}
    for file, what in words.items():
        try:
            pid = processes.read_lock_holder(_pid_file(root, file))
        except OSError as error:
            raise VnetLockError(f"cannot look into {root}: {error.strerror}; run as root") from error
        if pid is not None:
            raise VnetLockError(f'guest "{name}" {what} (pid {pid}); to end it: kill {pid}')
    if left and left == _identity(status):
        with suppress(FileNotFoundError):  # who starts it at this moment was quicker
            os.unlink(status)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _open(settings: Settings, root: str) -> Libvirt:
    """The driver, with a directory of its own: one process at a time has it."""
    try:
        os.makedirs(f"{root}/etc", 0o700, exist_ok=True)
        with open(f"{root}/etc/qemu.conf", "wb") as file:
            file.write(_configuration(f"{settings.etc_libvirt}/qemu.conf"))
    except OSError as error:
        raise VnetLockError(f"cannot write below {root}: {error.strerror}; run as root") from error
    # libvirt reads it when it is loaded; its warnings aren't about what the user typed.
    os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", f"3:file:{root}/libvirt.log")
    from vnet_lock.front.libvirt_client.connection import Libvirt

    return Libvirt(f"qemu:///embed?root={root}")


def _configuration(path: str) -> bytes:
    """As the host has configured its QEMUs, but with logs that libvirt writes without a daemon's help."""
    try:
        with open(path, "rb") as file:
            lines = [line for line in file if not line.lstrip().startswith(b"stdio_handler")]
    except FileNotFoundError:
        lines = []
    return b"".join(lines) + b'\nstdio_handler = "file"\n'


def _create(libvirt: Libvirt, xml: bytes) -> Domain:
    libvirt.listen()
    return libvirt.create(read_text(xml))


def _wait(libvirt: Libvirt, domain: Domain, ended: list[int], log: str) -> None:
    """Until the guest's end, or a signal to us."""
    from vnet_lock.front.libvirt_client.events import Happened

    try:
        while not ended:
            for event in libvirt.events(_TICK_S):
                if event.what is Happened.STOPPED:
                    if event.is_failure:
                        raise VnetLockError(f'guest "{domain.name}" didn\'t end by itself; see: {log}')
                    return
    finally:
        domain.destroy()


def _pid_file(root: str, name: str) -> str:
    """libvirt's, whose lock QEMU holds for its life."""
    return f"{root}/run/qemu/{name}.pid"
