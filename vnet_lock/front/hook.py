"""libvirt's qemu hook: what each step in a guest's life means for its claims, and with which status it ends.

Never calls libvirt (whose lock on the guest is held meanwhile: it would wait for itself), starts no
program but those that a port takes (modprobe, nft, dnsmasq, processes of ours), and fails a guest at
`migrate`, `restore`, `prepare` and `start` only: elsewhere a failure kills it or changes nothing.
Each import that is missing here is time that a guest's start doesn't take.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from vnet_lock.errors import VnetLockError
from vnet_lock.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import FrameType
    from typing import NoReturn

    from vnet_lock.model import Owner
    from vnet_lock.request import Assignment, Plan, Refusal, Request
    from vnet_lock.session import Grant

    # Ends this process with an exit status, whatever it is in the middle of.
    Leave = Callable[[int], NoReturn]

# What isn't undone this long after the hook's deadline is left to the claim's journal.
UNDO_S = 15

# Of the qemu hook and of the network hook.
_FAIL_CLOSED = ("migrate", "restore", "prepare", "start", "port-created")
# Those of the qemu hook's operations that are something to us.
_OPERATIONS = ("migrate", "restore", "prepare", "start", "reconnect", "stopped", "release")


class HookSession(Protocol):
    """What the hook needs of a session."""

    def plan(self, requests: Iterable[Request]) -> Plan | Refusal:
        """Say what a guest would get; change nothing."""

    def acquire(self, owner: Owner, requests: Iterable[Request]) -> Sequence[Grant]:
        """Claim and make what a guest needs before it starts."""

    settings: Settings

    def reserve(self, owner: Owner, requests: Iterable[Request], operation: str) -> tuple[Assignment, ...]:
        """Keep what a guest needs that comes from elsewhere, until its `prepare`."""

    def serve(self, grants: Iterable[Grant]) -> None:
        """Have processes of ours serve a guest where its QEMU looks for sockets."""

    def adopt(self, owner: Owner, requests: Iterable[Request], running: bool = False) -> object:
        """Claim what libvirt has set up for a guest already."""

    def hand_over(self, old: Owner, new: Owner) -> None:
        """Let what a guest has live as long as another owner."""

    def release(self, owner: Owner) -> None:
        """Give back all that a guest had."""


class Report(Protocol):
    """Who is told what went wrong."""

    def say(self, line: str) -> None:
        """Tell the user: libvirt makes it part of its error where the hook fails, and drops it elsewhere."""

    def log(self, text: str) -> None:
        """Tell the system's log."""

    def give(self, xml: bytes) -> None:
        """Give libvirt the guest's XML, where it asks for it."""


class DeadlinePassed(BaseException):
    """The hook has used up its time. No VnetLockError: who collects failures must not carry on."""


class TooLate(VnetLockError):
    """Something is wrong, but the guest has it already: to fail now would only do more harm."""


class Call(NamedTuple):
    """One call of libvirt's; ``daemon_pid`` is the pid of the daemon that makes it.

    A user's own daemon (qemu:///session) calls the same hook, which then is no root, and can claim nothing.
    """

    settings: Settings
    daemon_pid: int
    guest: str
    operation: str
    xml: bytes
    is_root: bool = True


def main(argv: Sequence[str], stdin: BinaryIO, leave: Leave = os._exit) -> int:
    """Serve one call of libvirt's and return the exit status; ``leave`` with it where an undo takes too long.

    ``argv`` is what the shim passes: the host's root ("" but for a fake host), the pid of libvirt's daemon,
    and libvirt's own arguments: the guest's name, the operation, and two more.
    """
    root, daemon_pid, guest, operation = argv[:4]
    is_root = not os.geteuid() or bool(root)
    call = Call(Settings.under(root), int(daemon_pid), guest, operation, stdin.read(), is_root)
    report = Outlets()
    arm_deadline(operation, report, read_deadline_s(call.settings), leave=leave)
    status = answer(call, _open_session, report)
    signal.alarm(0)
    return status


def answer(call: Call, open_session: Callable[[Settings], HookSession], report: Report) -> int:
    """Perform an operation, report what goes wrong, and return the exit status that libvirt is to see."""

    def body() -> None:
        xml = perform(call, open_session)
        if xml:
            report.give(xml)

    return answer_with(body, call.operation, f'guest "{call.guest}"', report)


def answer_with(body: Callable[[], None], operation: str, of: str, report: Report) -> int:
    """As ``answer``, for any hook of libvirt's."""
    status = 1 if operation in _FAIL_CLOSED else 0
    try:
        body()
    except (VnetLockError, DeadlinePassed) as error:
        status = 0 if isinstance(error, TooLate) else status
        text = " ".join(str(error).split())  # a word of the guest's XML may have several lines
        report.say(f"vnet-lock: {text}")
        if not status:
            report.log(f"{operation} of {of}: {text}")
        return status
    except Exception as error:
        import traceback  # 5 ms

        report.log(f"{operation} of {of}: {traceback.format_exc()}")
        report.say(traceback.format_exc())
        report.say(f"vnet-lock: unexpected {type(error).__name__}: {error}; please report it")
        return status
    return 0


def perform(call: Call, open_session: Callable[[Settings], HookSession]) -> bytes:
    """Claim, check or give back; any VnetLockError where that can't be done.

    Returns the guest's XML as it is to be on this host, empty where it stays as it is.

    `migrate` (on the destination) and `restore` come before `prepare`, and reserve for it what the guest is
    to have; `prepare` claims and makes all that the guest asks for; `start` claims what libvirt chose since
    then; `reconnect` claims what a running guest has; `release` gives all back; all else is none of ours.
    `stopped` only prepares for a `release` that is killed: from then on libvirt's status file tells when it
    would come.
    """
    if call.operation not in _OPERATIONS:
        return b""
    if not call.is_root:
        if call.operation == "prepare":
            _check_for_user(call, open_session)
        return b""
    if call.operation in ("stopped", "release"):
        _give_back(call, open_session)
        return b""
    try:
        return _take(call, open_session)
    except BaseException:
        if call.operation == "prepare":
            from vnet_lock.front import libvirt_notes

            with suppress(VnetLockError):
                libvirt_notes.remove_of_others(call.settings, call.xml)
        raise


def _take(call: Call, open_session: Callable[[Settings], HookSession]) -> bytes:
    """What of a guest is claimed, made, reserved or checked; its XML as ``perform`` returns it."""
    from vnet_lock import domain_xml
    from vnet_lock.front.libvirt_guest import read_owner
    from vnet_lock.request import Fixed

    found = domain_xml.read_guest(call.xml)
    requests = found.requests
    if call.operation in ("start", "reconnect"):
        # What an intent got was made and claimed at prepare; here it could only be planned a second time.
        requests = tuple(request for request in requests if isinstance(request, Fixed))
    is_arrival = call.operation in ("migrate", "restore")
    # What of an arriving guest is no request, such as a bridge, may have another name here.
    if not requests and not is_arrival:
        return b""
    owner = read_owner(call.settings, call.guest, found.uuid, call.daemon_pid)
    if owner.process is None:
        raise VnetLockError(f"libvirt's daemon (pid {call.daemon_pid}) is gone; start it and then the guest")
    session = open_session(call.settings)
    if call.operation == "prepare":
        _prepare(session, owner, requests, call.settings)
    elif is_arrival:
        from vnet_lock.front import arrival  # 3 ms

        return arrival.receive(session, call.xml, owner, call.operation)
    else:
        session.adopt(owner, requests, running=call.operation == "reconnect")
    return b""


def _prepare(session: HookSession, owner: Owner, requests: Sequence[Request], settings: Settings) -> None:
    """Claim and make what a guest needs, and have processes of ours do what a hook can't wait for."""
    from vnet_lock.request import Intent

    grants = session.acquire(owner, requests)
    if any(isinstance(one, Intent) and one.socket for one in requests):
        session.serve(grants)
    if any(one.is_unfinished for one in grants):
        from vnet_lock.front import companion  # 1 ms

        companion.start_all(settings, owner, grants)


def _give_back(call: Call, open_session: Callable[[Settings], HookSession]) -> None:
    from vnet_lock.domain_document import read_identity
    from vnet_lock.front.libvirt_guest import read_owner

    # A definition may have changed since the start, even to a wrong one: what counts is in the claims.
    _, uuid = read_identity(call.xml)
    owner = read_owner(call.settings, call.guest, uuid, call.daemon_pid)
    if call.operation == "release":
        open_session(call.settings).release(owner)
    elif os.path.lexists(f"{call.settings.libvirt_run}/qemu/{call.guest}.xml"):
        # Of a guest that never had its QEMU there is no file whose removal could tell anything.
        from vnet_lock.dataclass import replace

        open_session(call.settings).hand_over(owner, replace(owner, process=None))


def _check_for_user(call: Call, open_session: Callable[[Settings], HookSession]) -> None:
    """Refuse a user's own guest what another has, and what takes root to make; it gets no claim.

    A device that root has given to the user by VFIO is his to use, and is seen to be used by who claims.
    """
    from vnet_lock import domain_xml
    from vnet_lock.request import Intent, Refusal

    requests = domain_xml.read_guest(call.xml).requests
    for request in requests:
        if isinstance(request, Intent):
            raise VnetLockError(
                f"{request.interface}: networks of the host are root's to give; have guest"
                f" \"{call.guest}\" in qemu:///system, or give it an <interface type='user'>"
            )
    found = open_session(call.settings).plan(requests)
    if isinstance(found, Refusal):
        from vnet_lock.request import error_of

        raise error_of(found)


def _open_session(settings: Settings) -> HookSession:
    from vnet_lock.session import Session

    return Session(settings)


def read_deadline_s(settings: Settings) -> int:
    """When a hook is to give up, as the host's configuration has it."""
    if os.path.lexists(settings.config_path):
        from vnet_lock.config import tuned  # 10 ms, for who has a file

        settings = tuned(settings)
    return max(1, int(settings.hook_s))


def arm_deadline(
    operation: str, report: Report, deadline_s: int, undo_s: int = UNDO_S, leave: Leave = os._exit
) -> None:
    """Raise DeadlinePassed in whatever runs after ``deadline_s``; ``leave`` ``undo_s`` after that.

    Raising lets the session undo what it began. It is raised once only, so that the undo itself isn't cut
    short, and the hard end also serves where the exception got lost (Python drops one raised in a finalizer).
    """

    def end(_signal: int, _frame: FrameType | None) -> NoReturn:
        text = f"the hook could not undo in {undo_s} s what it gave up; see: vnet-lock status"
        report.say(f"vnet-lock: {text}")
        report.log(f"{operation}: {text}")
        leave(1 if operation in _FAIL_CLOSED else 0)

    def give_up(_signal: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGALRM, end)
        signal.alarm(undo_s)
        raise DeadlinePassed(f"the hook was not done after {deadline_s} s and gave up; see: vnet-lock status")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(deadline_s)


class Outlets:
    """Our standard output and error, and the system's log.

    Descriptors 1 and 2 become /dev/null: libvirt waits until both are closed everywhere, and a process
    that somebody starts below must not hold them.
    """

    def __init__(self) -> None:
        self._stdout, self._stderr = os.dup(1), os.dup(2)  # not inherited by other programs
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)

    def say(self, line: str) -> None:
        """Write to what was our standard error."""
        with suppress(BrokenPipeError):  # nobody listens any more; the status still counts
            os.write(self._stderr, f"{line}\n".encode(errors="replace"))

    def give(self, xml: bytes) -> None:
        """Write all of it to what was our standard output."""
        while xml:
            xml = xml[os.write(self._stdout, xml) :]

    def log(self, text: str) -> None:
        """Write to the system's log; without one it is lost."""
        import syslog

        syslog.openlog("vnet-lock", syslog.LOG_PID, syslog.LOG_DAEMON)
        for line in text.splitlines():
            syslog.syslog(syslog.LOG_ERR, line)
