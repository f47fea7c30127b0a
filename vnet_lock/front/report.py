"""What a person's command answers, as text: a tree of PFs, VFs and owners, and tables. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from vnet_lock.audit import Audit, Finding, ResourceState, Severity, Standing
from vnet_lock.dataclass import dataclass
from vnet_lock.front.command import printable
from vnet_lock.front.report_json import asked_text
from vnet_lock.journal import to_json
from vnet_lock.model import Claim, Mode, Nic, Pf, Resource, ResourceKind, Vf, name_of
from vnet_lock.request import Fixed, Plan, Refusal, Rejection, Request
from vnet_lock.rules import since_text

if TYPE_CHECKING:
    from vnet_lock.front.doctor import Check
    from vnet_lock.matrix import Verdict

_BOLD, _RED, _YELLOW, _OFF = "\033[1m", "\033[31m", "\033[33m", "\033[0m"
_COLOURS = {
    Standing.STALE: _YELLOW,
    Standing.FOREIGN: _BOLD + _RED,
    Standing.CONFLICT: _BOLD + _RED,
}


@dataclass(frozen=True, slots=True)
class Style:
    """How a report looks; ``width`` is the terminal's in columns, None where lines may have any length."""

    colour: bool = False
    width: int | None = None

    def paint(self, text: str, codes: str) -> str:
        """The text in a colour, where there are colours."""
        return f"{codes}{text}{_OFF}" if self.colour and codes and text else text


PLAIN = Style()


def status_text(audit: Audit, style: Style = PLAIN) -> str:
    """The host as a tree, then the findings, each with its next step."""
    blocks = [*(_pf_block(audit, pf) for pf in audit.inventory.pfs), *_claimed_blocks(audit)]
    rows = [row for _, rows in blocks for row in rows]
    widths = _fit(rows, style)
    lines: list[str] = []
    for head, rows in blocks:
        lines.append(style.paint(printable(head), _BOLD))
        lines += [row.line(widths, style) for row in rows]
    if not blocks:
        lines.append("no network device here has SR-IOV, and nothing is claimed")
    return "\n".join(lines + _finding_lines(audit.findings, style, gap=True))


def show_text(audit: Audit, resource: Resource, style: Style = PLAIN) -> str:
    """One resource with all that is known of it."""
    state = audit.state_of(resource)
    standing = style.paint(state.standing.value, _COLOURS.get(state.standing, ""))
    lines = [f"{style.paint(printable(name_of(resource)), _BOLD)}: {standing}"]
    lines += [f"  {line}" for line in _device_lines(audit, resource)]
    for claim in state.claims:
        lines.append(f"  {claim.mode} claim, {claim.state}: {printable(_who(audit, claim))}")
        lines += [f"    {printable(line)}" for line in _claim_lines(claim)]
    lines += [f"  in use: {printable(user.text)}" for user in state.users]
    findings = [finding for finding in audit.findings if finding.resource == resource.text]
    return "\n".join(lines + _finding_lines(findings, style, gap=False))


def plan_text(
    found: Plan | Refusal, requests: Iterable[Request] = (), networks: Mapping[str, str] | None = None
) -> str:
    """What would be done: interface, combination, device; below it each candidate that was passed over.

    Of the ``requests`` and the interfaces in libvirt's ``networks`` those that take no claim now come last.
    """
    if isinstance(found, Refusal):
        lines = [f"{found.request.interface}: {asked_text(found.request)}: refused"]
        return "\n".join(map(printable, [*lines, *_rejected_lines(found.rejected)]))
    later = [*_unclaimed_lines(found, requests), *_network_lines(networks or {})]
    if not found.assignments:
        nothing = "nothing to claim: the guest has no interface that needs a device of ours"
        return "\n".join(map(printable, ["nothing to claim now", *later] if later else [nothing]))
    rows = [
        (
            one.request.interface,
            one.combination.text if one.combination else "as libvirt does it",
            one.device.text if one.wanted else "none",
        )
        for one in found.assignments
    ]
    table = [("interface", "combination", "device"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = []
    for index, row in enumerate(table):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if index > 0:
            one = found.assignments[index - 1]
            lines += [f"  with {item.resource} ({item.mode})" for item in one.wanted[1:]]
            lines += _rejected_lines(one.rejected)
    return "\n".join(map(printable, [*lines, *later]))


def matrix_text(verdicts: Sequence[Verdict]) -> str:
    """A line for each combination: its name, then ``ready`` and the device, or why not here."""
    width = max(len(one.combination.text) for one in verdicts)
    ready = sum(one.is_ready for one in verdicts)
    lines = []
    for one in verdicts:
        said = (
            f"ready{f'  {one.device}' if one.device else ''}" if one.is_ready else f"not here: {one.reason}"
        )
        lines.append(f"{one.combination.text.ljust(width)}  {said}")
    return "\n".join(map(printable, [*lines, f"{ready} of {len(verdicts)} combinations are ready"]))


def checks_text(checks: Sequence[Check], style: Style = PLAIN) -> str:
    """A line for each thing that was checked: how it is, and what to do where it isn't ok."""
    colours = {"warning": _YELLOW, "error": _BOLD + _RED}
    return "\n".join(
        f"{style.paint(one.health.value, colours.get(one.health, ''))}: {one.kind}: {printable(one.message)}"
        for one in checks
    )


def vfs_text(audit: Audit, pf: Pf, style: Style = PLAIN) -> str:
    """One PF with its VFs."""
    head, rows = _pf_block(audit, pf)
    widths = _fit(rows, style)
    return "\n".join([style.paint(printable(head), _BOLD), *(row.line(widths, style) for row in rows)])


# --- the tree -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """A line below a PF: branch, PCI address, driver, netdev, state, owner, combination, since."""

    cells: tuple[str, ...]
    standing: Standing

    @property
    def ends_with_owner(self) -> bool:
        """Whether nothing stands behind the owner, which then needs no column's width."""
        return not any(self.cells[_OWNER + 1 :])

    def line(self, widths: Sequence[int], style: Style) -> str:
        text, length = "", 0
        for index, (cell, width) in enumerate(zip(self.cells, widths, strict=True)):
            if not width:
                continue
            room = width
            if index == _OWNER and self.ends_with_owner:
                room = len(cell) if style.width is None else max(style.width - length, width)
            shown = cell if len(cell) <= room else cell[: room - 1] + "…"
            colour = _COLOURS.get(self.standing, "") if index == _STATE else ""
            text += style.paint(shown, colour) + " " * (width - len(shown)) + "  "
            length += width + 2
        return text.rstrip()


@dataclass(frozen=True, slots=True)
class _Branch:
    """What a row is about: a VF, or one of the claims on a PF or NIC."""

    label: str
    vf: Vf | None
    state: ResourceState
    claim: Claim | None


_NETDEV, _STATE, _OWNER, _COMBINATION, _SINCE = 3, 4, 5, 6, 7
_SHORTEST_OWNER = 8
# What gives way first where a terminal is narrow.
_LESS_IMPORTANT = (_SINCE, _COMBINATION, _NETDEV)


def _fit(rows: Iterable[_Row], style: Style) -> list[int]:
    """The width of each column; 0 for one that is empty or gives way."""
    widths = [0] * 8
    for row in rows:
        cells = [*row.cells]
        if row.ends_with_owner:
            cells[_OWNER] = cells[_OWNER][:_SHORTEST_OWNER]
        widths = [max(width, len(cell)) for width, cell in zip(widths, cells, strict=True)]
    if style.width is None:
        return widths
    for column in _LESS_IMPORTANT:
        if _total(widths) > style.width:
            widths[column] = 0
    excess = _total(widths) - style.width
    if excess > 0:
        widths[_OWNER] = max(widths[_OWNER] - excess, _SHORTEST_OWNER)
    return widths


def _total(widths: Iterable[int]) -> int:
    return sum(width + 2 for width in widths if width) - 2


def _pf_block(audit: Audit, pf: Pf) -> tuple[str, list[_Row]]:
    vfs = f"{pf.numvfs}/{pf.totalvfs} VFs" if pf.totalvfs else "no SR-IOV"
    words = [pf.netdev or "(no netdev here)", pf.pci.text, pf.driver or "(no driver)", vfs]
    state = audit.state_of(pf.resource)
    branches = [_Branch(claim.mode.value, None, state, claim) for claim in state.claims]
    for vf in pf.vfs:
        vf_state = audit.state_of(vf.resource)
        claims = vf_state.claims or (None,)
        branches += [_Branch(f"vf {vf.index}", vf, vf_state, claim) for claim in claims]
    if state.standing in (Standing.FOREIGN, Standing.CONFLICT) and not state.claims:
        words.append(f"{state.standing}: {'; '.join(user.text for user in state.users)}")
    return "  ".join([*words, *([pf.eswitch] if pf.eswitch else [])]), _rows(audit, branches)


def _claimed_blocks(audit: Audit) -> Iterator[tuple[str, list[_Row]]]:
    """Devices without a PCI function, then IP addresses, where they are claimed."""
    for kind in (ResourceKind.NIC, ResourceKind.IP):
        for resource, state in audit.states.items():
            if resource.kind is kind and state.claims:
                branches = [_Branch(_mode_text(claim), None, state, claim) for claim in state.claims]
                yield f"{resource.name}  {_what_it_is(audit, resource)}", _rows(audit, branches)


def _mode_text(claim: Claim) -> str:
    """How a row of it begins; of an address, which is hardly ever shared, in fewer columns."""
    is_plain = claim.resource.kind is ResourceKind.IP and claim.mode is Mode.EXCLUSIVE
    return "held" if is_plain else claim.mode.value


def _what_it_is(audit: Audit, resource: Resource) -> str:
    if resource.kind is ResourceKind.IP:
        return "IP address"
    nic = audit.inventory.nic_named(resource.name)
    return _kind_text(nic) if nic else "(not here)"


def _kind_text(nic: Nic) -> str:
    """What a network device is; of a veth, dummy or wireguard sysfs doesn't tell."""
    return "network device" if nic.kind == "other" else nic.kind


def _rows(audit: Audit, branches: Sequence[_Branch]) -> list[_Row]:
    last = len(branches) - 1
    return [_row(audit, branch, "└─" if at == last else "├─") for at, branch in enumerate(branches)]


def _row(audit: Audit, branch: _Branch, line: str) -> _Row:
    standing, vf, claim = branch.state.standing, branch.vf, branch.claim
    if claim is None:
        who = "; ".join(user.text for user in branch.state.users)
    else:
        who = _who(audit, claim)
        # Of several claims on a shared resource each has a state of its own.
        if vf is None and standing not in (Standing.CONFLICT, Standing.FOREIGN):
            standing = Standing.STALE if claim.token in audit.stale else Standing(claim.state)
    cells = (
        f"{line} {branch.label}",
        vf.pci.text if vf else "",
        (vf.driver or "-") if vf else "",
        (vf.netdev or "") if vf else "",
        standing.value,
        who,
        (claim.combination or "") if claim else "",
        f"since {since_text(claim.since)}" if claim else "",
    )
    return _Row(tuple(map(printable, cells)), standing)


def _who(audit: Audit, claim: Claim) -> str:
    pid = audit.pids.get(claim.owner)
    who = claim.owner.text
    return f"{who} (pid {pid})" if pid and "(pid" not in who else who


# --- one resource, a plan, findings ---------------------------------------------------------------


def _device_lines(audit: Audit, resource: Resource) -> Iterator[str]:
    inventory = audit.inventory
    vf = inventory.vf_at(resource.pci) if resource.pci else None
    pf = inventory.pf_at(vf.pf if vf else resource.pci) if resource.pci else None
    nic = inventory.nic_named(resource.name)
    if vf:
        on = f"{vf.pf} ({pf.netdev})" if pf and pf.netdev else vf.pf.text
        yield f"VF {vf.index} of PF {on}"
    elif pf:
        yield f"{pf.numvfs} of {pf.totalvfs} VFs" + (f", embedded switch: {pf.eswitch}" if pf.eswitch else "")
    function = vf or pf
    if function:
        group = "none" if function.iommu_group is None else function.iommu_group
        yield f"driver {function.driver or 'none'}, netdev {function.netdev or 'none'}, IOMMU group {group}"
        if pools := audit.pools.get(resource):
            yield f"in {'pool' if len(pools) == 1 else 'pools'} {', '.join(pools)}"
        if audit.state_of(resource).standing is Standing.LEFT:
            yield "left to the host by its configuration"
    elif nic:
        yield ", ".join(word for word in (_kind_text(nic), nic.mac, "up" if nic.up else "down") if word)
    elif resource.kind is ResourceKind.IP:
        by_hand = any(claim.is_by_hand for claim in audit.state_of(resource).claims)
        yield "an IP address" if by_hand else "an address of a routed guest"
    else:
        yield "there is no such device here"


def _claim_lines(claim: Claim) -> Iterator[str]:
    if not claim.is_by_hand:
        yield f"for {claim.interface}" + (f" as {claim.combination}" if claim.combination else "")
    if claim.owner.uuid:
        yield f"uuid {claim.owner.uuid}"
    if claim.mac:
        yield f"MAC {claim.mac}"
    yield f"since {since_text(claim.since)}, token {claim.token}"
    for entry in claim.journal:
        known = to_json(entry)
        kind = known.pop("kind")
        words = " ".join(f"{key}={_value(value)}" for key, value in known.items() if value is not None)
        yield f"to undo: {kind} {words}"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _unclaimed_lines(found: Plan, requests: Iterable[Request]) -> list[str]:
    planned = [one.request for one in found.assignments]
    return [
        f"{one.interface}: there is no network device at {one.device} here, so nothing is claimed for it"
        for one in requests
        if isinstance(one, Fixed) and one not in planned
    ]


def _network_lines(networks: Mapping[str, str]) -> list[str]:
    return [
        f"{interface}: what libvirt picks of network {network!r} for it is claimed then"
        for interface, network in networks.items()
    ]


def _rejected_lines(rejected: Iterable[Rejection]) -> list[str]:
    return [f"  {one.text}" for one in rejected]


def _finding_lines(findings: Sequence[Finding], style: Style, gap: bool) -> list[str]:
    lines = [""] if findings and gap else []
    for finding in findings:
        colour = _BOLD + _RED if finding.severity is Severity.ERROR else _YELLOW
        lines.append(f"{style.paint(finding.severity.value, colour)}: {printable(finding.message)}")
    return lines
