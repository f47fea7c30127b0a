"""The verbs that write a libvirt guest's interfaces: resolve, define, start, attach, detach.

What is chosen is claimed for the guest before libvirt is asked, and lives by this process until there is
something that lives as long as the guest: the hook's prepare takes the claims over, and without hooks they
live by the lock on libvirt's pid file. So nothing is left where libvirt refuses, or we are killed; of a guest
that runs, what it was to get when we were killed is its own until it ends.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from vnet_lock.combination import Backend
from vnet_lock.dataclass import replace
from vnet_lock.domain_devices import Plugged, read_plugged
from vnet_lock.domain_document import ALIAS, read_identity, read_text
from vnet_lock.domain_rewrite import InterfaceForm, with_mac, with_uuid, write_interface
from vnet_lock.domain_xml import read_guest, read_wishes
from vnet_lock.errors import BadInput, Unsupported, Vanished, VnetLockError
from vnet_lock.front.libvirt_guest import find_tokens, is_own_daemon, read_daemon, read_owner
from vnet_lock.front.resolver import Resolved, choose_one, planned_anew
from vnet_lock.front.resolver import resolve as resolve_guest
from vnet_lock.front.verbs import about_file, read_file, read_words
from vnet_lock.model import Owner, name_of
from vnet_lock.ports.macvtap import random_mac
from vnet_lock.request import Fixed, Intent, Refusal, error_of
from vnet_lock.resolving import made_late
from vnet_lock.session import Grant, Session
from vnet_lock.settings import Settings

if TYPE_CHECKING:
    from vnet_lock.front.libvirt_client.connection import Libvirt
    from vnet_lock.front.libvirt_client.domain import Domain

    Connect = Callable[[str | None], Libvirt]


def resolve(settings: Settings, args: Namespace) -> int:
    """Print the guest's XML with its interfaces in another form."""
    xml = _read_domain(args.guest)
    found = resolve_guest(Session(settings), xml, _owner_in(settings, xml), full=args.form == "full")
    _remark(found)
    sys.stdout.buffer.write(found.xml)
    return 0


def define(settings: Settings, args: Namespace, connect: Connect | None = None) -> int:
    """Define the guest as ``resolve`` writes it; a definition claims nothing."""
    xml = _read_domain(args.guest)
    with (connect or _connect)(args.connect) as libvirt:
        found = resolve_guest(Session(settings), xml, _owner_in(settings, xml), full=args.form == "full")
        with _naming(found.forms):
            domain = libvirt.define(read_text(found.xml))
    _remark(found)
    print(f'guest "{domain.name}" is defined{_summary(found.forms)}')
    return 0


def start(settings: Settings, args: Namespace, connect: Connect | None = None) -> int:
    """Start a guest, defined or of a file, with what is free now; its definition stays as it is."""
    is_file = args.guest == "-" or args.guest.endswith(".xml") or "/" in args.guest
    xml = _read_domain(args.guest) if is_file else b""
    with (connect or _connect)(args.connect) as libvirt:
        domain = None if is_file else libvirt.find(args.guest)
        if domain is not None:
            _require_startable(domain)
            xml = domain.read_xml(inactive=True, secrets=True).encode()
        name, uuid = read_identity(xml)
        owner = _owner_of(settings, name, uuid or str(uuid4()))
        session = Session(settings)
        found, grants = _claim(session, xml, owner, full=args.form == "full")
        with _given_back(session, grants), _naming(found.forms):
            _require_hook(settings, found.late)
            if domain is not None and found.xml == xml:
                domain.start(args.paused)
            else:
                domain = libvirt.create(read_text(with_uuid(found.xml, str(owner.uuid))), args.paused)
    _remark(found)
    print(f'guest "{domain.name}" is started{_summary(found.forms)}')
    return 0


def attach(settings: Settings, args: Namespace, connect: Connect | None = None) -> int:
    """Plug an interface into a running guest: one of a file, or one that is chosen."""
    from vnet_lock.front.hooks_install import find_lack

    if args.interface is not None and _has_words(args):
        raise BadInput("attach takes a FILE.xml, or --mode and --dev, not both")
    wanted = _read_intent(args) if args.interface is None else _read_device_file(args.interface)
    with (connect or _connect)(args.connect) as libvirt:
        domain = libvirt.find(args.guest)
        if not domain.is_active:
            raise VnetLockError(
                f'guest "{domain.name}" isn\'t running; start it: vnet-lock start {domain.name}'
            )
        owner = _owner_of(settings, domain.name, domain.uuid)
        session = Session(settings)
        if isinstance(wanted, Intent):
            alias, xml, grants = _claim_words(session, wanted, args, domain, owner)
        else:
            alias, xml = wanted
            grants = session.acquire(owner, _read_device(xml), beside=True)
        with _given_back(session, grants), _about_interface(alias):
            session.activate(grants)
            domain.attach(xml)
        daemon = read_daemon(settings)
        if daemon is not None and not find_lack(settings):
            # From its end until libvirt has given all back the guest lives by its daemon.
            session.hand_over(owner, replace(owner, process=daemon))
            if not domain.is_active:
                # Its `release` left alone what lived by us, and no other comes.
                session.give_back(grants)
    devices = "".join(f": {name_of(grant.assignment.device)}" for grant in grants if grant.token)
    print(f'interface {alias} is attached to guest "{domain.name}"{devices}')
    return 0


def detach(settings: Settings, args: Namespace, connect: Connect | None = None) -> int:
    """Unplug an interface, by its alias or MAC; what it had is given back once the guest has let go of it."""
    if not args.interface:  # a device without a MAC has this one
        raise BadInput(f"'' is no alias and no MAC address of an interface; see: virsh dumpxml {args.guest}")
    with (connect or _connect)(args.connect) as libvirt:
        domain = libvirt.find(args.guest)
        session = Session(settings)
        owner = _owner_of(settings, domain.name, domain.uuid)
        found = _find_plugged(domain, args.interface)
        if found is not None:
            # Before it is gone: its network device may have another name then.
            tokens = _tokens_of(session, owner, found)
            libvirt.listen(domain)
            with _about_interface(args.interface), suppress(Vanished):  # just now
                domain.detach_alias(found.alias)
                _wait_until_gone(libvirt, domain, found.alias, args.timeout)
        else:
            tokens = _tokens_named(session, owner, args.interface)
        if tokens:
            # A claim isn't called as libvirt calls its device, which may be there under another alias.
            tokens -= {token for one in _still_plugged(domain) for token in _tokens_of(session, owner, one)}
        session.release_tokens(owner, sorted(tokens))
    if found is None and not tokens:
        raise BadInput(
            f'guest "{domain.name}" has no interface {args.interface}; see: virsh domiflist {domain.name}'
        )
    print(f'interface {args.interface} is detached from guest "{domain.name}"')
    return 0


# --- what is wanted -------------------------------------------------------------------------------


def _read_domain(path: str) -> bytes:
    """The guest of a file; BadInput where it can't be read, or makes no sense."""
    xml = read_file(path)
    with about_file(path):
        read_wishes(xml)
    return xml


def _read_device_file(path: str) -> tuple[str, str]:
    """The key and the XML of the one device that a file has; BadInput where it has another number of them."""
    xml = read_file(path)
    with about_file(path):
        # By its MAC it is found again when it is unplugged, and libvirt would make up another.
        text = read_text(with_mac(xml, random_mac()))
        if text.lstrip().startswith("<?xml"):
            text = text.partition("?>")[2]
        plugged = read_plugged(_as_guest(text))
        if len(plugged) != 1:
            raise BadInput("it has no single <interface> or <hostdev>; see: virsh help attach-device")
    return plugged[0].key, text


def _read_intent(args: Namespace) -> Intent:
    """What the words of attach ask for; BadInput where they make no sense."""
    if args.mode is None:
        raise BadInput("attach needs a file, or --mode and --dev; see: vnet-lock attach --help")
    intent = read_words(args)
    if args.teaming and (intent.backends != (Backend.VFIO,) or args.form == "late"):
        raise BadInput("--teaming is for a VF that the guest has itself: add --protocols=vfio")
    if args.teaming and intent.mac:
        raise BadInput("teamed with another interface it has the same MAC address; leave --mac out")
    return intent


# --- claims ---------------------------------------------------------------------------------------


def _claim(session: Session, xml: bytes, owner: Owner, *, full: bool) -> tuple[Resolved, tuple[Grant, ...]]:
    """Resolve, and claim what libvirt itself is to open.

    What the hook couldn't have is refused here already: libvirt says only that a hook has failed.
    """

    def take() -> tuple[Resolved, tuple[Grant, ...]]:
        found = resolve_guest(session, xml, owner, full=full)
        requests = read_guest(found.xml).requests
        planned = session.plan(requests, owner)
        if isinstance(planned, Refusal):
            raise error_of(planned)
        fixed = [one for one in requests if isinstance(one, Fixed)]
        grants = session.acquire(owner, fixed, beside=True)
        session.activate(grants)
        return found, grants

    return planned_anew(take)


def _read_device(xml: str) -> list[Fixed]:
    """What a device that is plugged in takes."""
    return [one for one in read_guest(_as_guest(xml)).requests if isinstance(one, Fixed)]


def _as_guest(device: str) -> bytes:
    return f"<domain><name>guest</name><devices>{device}</devices></domain>".encode()


def _claim_words(
    session: Session, intent: Intent, args: Namespace, domain: Domain, owner: Owner
) -> tuple[str, str, tuple[Grant, ...]]:
    """Choose what the words ask for, and claim it; the alias, its XML, and what was claimed."""
    there = {one.alias for one in _plugged(domain)}
    alias = args.alias or next(
        name for number in range(len(there) + 1) if (name := f"ua-net{number}") not in there
    )
    if alias in there:
        raise BadInput(f'guest "{domain.name}" has an interface {alias} already; choose another --alias')
    mac = _mac_of(domain, args.teaming) if args.teaming else intent.mac or random_mac()
    intent = replace(intent, interface=alias, mac=mac, teaming=args.teaming or "")

    def take() -> tuple[str, str, tuple[Grant, ...]]:
        form = "" if args.form == "late" else choose_one(session, intent, owner)
        if isinstance(form, InterfaceForm):
            xml = write_interface(alias, replace(form, mac=intent.mac))
            fixed = [replace(one, policy=intent.policy) for one in _read_device(xml)]
            return alias, xml, session.acquire(owner, fixed, beside=True)
        late, form = made_late(intent, domain.name)
        grants = session.acquire(owner, [late], beside=True)
        return alias, write_interface(alias, form), grants

    return planned_anew(take)


def _tokens_of(session: Session, owner: Owner, plugged: Plugged) -> set[str]:
    """The tokens of what a guest has claimed for an interface: for its device, or under the user's alias.

    libvirt's own alias tells nothing, as it comes after the claim, nor does a MAC, which a team shares.
    """
    tokens: set[str] = set()
    if plugged.opened is not None:
        tokens.update(find_tokens(session.settings, session.table, owner, plugged.opened))
    if ALIAS.fullmatch(plugged.alias):
        claims = session.table.read().of(owner)
        tokens.update(claim.token for claim in claims if claim.interface == plugged.alias)
    return tokens


def _tokens_named(session: Session, owner: Owner, word: str) -> set[str]:
    """The tokens of what a guest has claimed under a name or for a MAC address."""
    claims = session.table.read().of(owner)
    return {claim.token for claim in claims if claim.interface == word or claim.mac == word.lower()}


@contextmanager
def _given_back(session: Session, grants: tuple[Grant, ...]) -> Iterator[None]:
    """Give back what was claimed where libvirt refuses.

    Not where its daemon was lost: it may have done what was asked. The claims live by this process then, and
    by the guest if there is one. What would end us waits until that is decided.
    """
    from vnet_lock.front.libvirt_client.errors import Disconnected

    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    except Disconnected:
        raise
    except VnetLockError as error:
        try:
            session.give_back(grants)
        except VnetLockError as failure:
            raise VnetLockError(f"{error}; {failure}") from error
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


# --- who ------------------------------------------------------------------------------------------


def _owner_in(settings: Settings, xml: bytes) -> Owner | None:
    name, uuid = read_identity(xml)
    return _owner_of(settings, name, uuid) if uuid else None


def _owner_of(settings: Settings, name: str, uuid: str) -> Owner:
    """The guest, which lives by this process as long as it has no QEMU."""
    return read_owner(settings, name, uuid, os.getpid())


def _require_hook(settings: Settings, late: Iterable[str]) -> None:
    from vnet_lock.front.hooks_install import find_lack

    alias = next(iter(late), None)
    if alias is not None and (lack := find_lack(settings)):
        raise Unsupported(f"interface {alias}: libvirt's hook has to make it, which {lack}")


def _require_startable(domain: Domain) -> None:
    if domain.is_active:
        raise VnetLockError(f'guest "{domain.name}" is running already')
    if domain.has_saved_state:
        raise VnetLockError(
            f'guest "{domain.name}" was saved, and goes on with the devices that it had: virsh start'
            f" {domain.name}; or drop what was saved: virsh managedsave-remove {domain.name}"
        )


def _connect(uri: str | None) -> Libvirt:
    """Connect to a system daemon of this host: of others' devices, and of a user's, nothing is known here."""
    from vnet_lock.front.libvirt_client.connection import Libvirt

    libvirt = Libvirt(uri)
    if libvirt.uri.startswith("qemu") and not is_own_daemon(libvirt.uri):
        libvirt.close()
        raise Unsupported(f"{libvirt.uri}: only this host's own system daemon takes what is claimed here")
    return libvirt


# --- words ----------------------------------------------------------------------------------------


def _has_words(args: Namespace) -> bool:
    """Whether attach is told how to choose: all that it takes beside these serves for that."""
    others = ("verb", "guest", "interface", "connect")
    return any(given is not None for word, given in vars(args).items() if word not in others)


def _plugged(domain: Domain) -> tuple[Plugged, ...]:
    return read_plugged(domain.read_xml().encode())


def _still_plugged(domain: Domain) -> tuple[Plugged, ...]:
    """What it has; nothing of one that has ended, whatever its definition says."""
    try:
        return _plugged(domain) if domain.is_active else ()
    except BadInput:  # it was transient, and isn't known any more
        return ()


def _find_plugged(domain: Domain, word: str) -> Plugged | None:
    """The interface with an alias or MAC; None where there is none, BadInput where several are called so."""
    there = _plugged(domain)
    found = [one for one in there if one.alias == word]
    found = found or [one for one in there if word.lower() in (one.alias.lower(), one.mac)]
    if len(found) > 1:
        aliases = ", ".join(one.alias for one in found)
        raise BadInput(
            f'guest "{domain.name}" has several interfaces {word}; name one by its alias: {aliases}'
        )
    return found[0] if found else None


def _mac_of(domain: Domain, alias: str) -> str:
    """The MAC address of an interface, which what is teamed with it has, too."""
    for one in _plugged(domain):
        if one.alias == alias and one.mac:
            return one.mac
    raise BadInput(f'guest "{domain.name}" has no interface {alias}; see: virsh dumpxml {domain.name}')


def _wait_until_gone(libvirt: Libvirt, domain: Domain, alias: str, timeout_s: float) -> None:
    """Until libvirt has taken the device from the guest's XML, which it does after giving it back.

    Or until the guest ends, and so has nothing any more.
    """
    from vnet_lock.front.libvirt_client.events import Happened

    events = libvirt.events(timeout_s)
    while any(one.alias == alias for one in _still_plugged(domain)):
        event = next(events, None)
        if event is None or (event.what is Happened.DEVICE_REMOVAL_FAILED and event.alias == alias):
            raise VnetLockError(
                f'guest "{domain.name}" hasn\'t let go of it in {timeout_s:g} s: it stays claimed; try again'
            )


@contextmanager
def _about_interface(alias: str) -> Iterator[None]:
    """Errors say which interface they are about."""
    try:
        yield
    except VnetLockError as error:
        if alias not in str(error):
            error.args = (f"interface {alias}: {error}",)
        raise


@contextmanager
def _naming(forms: Mapping[str, InterfaceForm | None]) -> Iterator[None]:
    """Errors that name a device say which interface has it."""
    try:
        yield
    except VnetLockError as error:
        for alias, form in forms.items():
            if form and form.device and form.device in str(error) and alias not in str(error):
                error.args = (f"interface {alias}: {error}",)
                break
        raise


def _summary(forms: Mapping[str, InterfaceForm | None]) -> str:
    parts = [f"{alias} {form.kind} {form.device}".rstrip() for alias, form in forms.items() if form]
    return ": " + ", ".join(parts) if parts else ""


def _remark(found: Resolved) -> None:
    for alias, reason in found.late.items():
        if reason:
            print(f"vnet-lock: interface {alias} is left to the hook: {reason}", file=sys.stderr)
