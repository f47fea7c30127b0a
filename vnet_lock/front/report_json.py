"""What a person's command answers, as JSON objects. The keys are a contract: scripts read them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vnet_lock.audit import Audit, Finding
from vnet_lock.journal import to_json
from vnet_lock.model import Claim, Resource, ResourceKind, Vf
from vnet_lock.request import Assignment, Intent, Plan, Refusal, Rejection, Request

if TYPE_CHECKING:
    from vnet_lock.front.doctor import Check
    from vnet_lock.matrix import Verdict
    from vnet_lock.session import Healed

VERSION = 1


def status_json(audit: Audit, hostname: str, boot_id: str) -> dict[str, Any]:
    """The whole of ``status --json``."""
    functions = {pf.pci for pf in audit.inventory.pfs} | {vf.pci for vf in audit.inventory.vfs()}
    return {
        "version": VERSION,
        "host": {"hostname": hostname, "boot_id": boot_id},
        "pfs": [
            {
                "pci": pf.pci.text,
                "netdev": pf.netdev,
                "driver": pf.driver,
                "eswitch": pf.eswitch,
                "numvfs": pf.numvfs,
                "totalvfs": pf.totalvfs,
                "state": audit.state_of(pf.resource).standing.value,
                "claims": _claims(audit, pf.resource),
                "users": _users(audit, pf.resource),
                "vfs": [_vf(audit, vf) for vf in pf.vfs],
            }
            for pf in audit.inventory.pfs
        ],
        "nics": [
            {
                "netdev": nic.netdev,
                "pci": nic.pci.text if nic.pci else None,
                "state": audit.state_of(resource).standing.value,
                "claims": _claims(audit, resource),
                "users": _users(audit, resource),
            }
            for nic in audit.inventory.nics
            if nic.pci not in functions
            for resource in (Resource.pf(nic.pci) if nic.pci else Resource.nic(nic.netdev),)
        ],
        "addresses": [
            {"address": resource.name, "claims": _claims(audit, resource)}
            for resource, state in audit.states.items()
            if resource.kind is ResourceKind.IP and state.claims
        ],
        "findings": [finding_json(finding) for finding in audit.findings],
    }


def show_json(audit: Audit, resource: Resource) -> dict[str, Any]:
    """One resource with all that is known of it."""
    state = audit.state_of(resource)
    return {
        "version": VERSION,
        "resource": resource.text,
        "state": state.standing.value,
        "pools": list(audit.pools.get(resource, ())),
        "claims": [
            {
                **claim_json(audit, claim),
                "interface": claim.interface,
                "mac": claim.mac,
                "token": claim.token,
                "journal": [to_json(entry) for entry in claim.journal],
            }
            for claim in state.claims
        ],
        "users": _users(audit, resource),
        "findings": [finding_json(found) for found in audit.findings if found.resource == resource.text],
    }


def plan_json(found: Plan | Refusal) -> dict[str, Any]:
    """What would be done for a guest, or why it gets nothing."""
    if isinstance(found, Plan):
        return {"version": VERSION, "plan": [_assignment(one) for one in found.assignments]}
    return {
        "version": VERSION,
        "refusal": {
            "interface": found.request.interface,
            "asked": asked_text(found.request),
            "kind": found.kind.value,
            "resource": found.resource.text if found.resource else None,
            "holder": found.holder or None,
            "message": found.message,
            "rejected": [_rejection(one) for one in found.rejected],
        },
    }


def matrix_json(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """The whole of ``matrix --json``; ``device`` is null for a user network, ``reason`` where it is ready."""
    return {
        "version": VERSION,
        "combinations": [
            {
                "combination": one.combination.text,
                "ready": one.is_ready,
                "device": one.device or None,
                "reason": one.reason or None,
            }
            for one in verdicts
        ],
    }


def healed_json(healed: Iterable[Healed], dry_run: bool) -> dict[str, Any]:
    """The whole of ``gc --json``: what was healed, or would be, with what could not be undone."""
    return {
        "version": VERSION,
        "dry_run": dry_run,
        "healed": [
            {
                "resources": [claim.resource.text for claim in one.claims],
                "owner": one.claims[0].owner.name,
                "failures": list(one.failures),
            }
            for one in healed
        ],
    }


def checks_json(checks: Iterable[Check]) -> dict[str, Any]:
    """The whole of ``doctor --json``."""
    return {
        "version": VERSION,
        "checks": [{"health": one.health.value, "check": one.kind, "message": one.message} for one in checks],
    }


def claim_json(audit: Audit, claim: Claim) -> dict[str, Any]:
    """One claim; the pid of a libvirt guest is its QEMU's, null while it has none."""
    owner = claim.owner
    return {
        "resource": claim.resource.text,
        "mode": claim.mode.value,
        "state": claim.state.value,
        "owner": {
            "kind": owner.kind.value,
            "name": owner.name,
            "uuid": owner.uuid,
            "pid": audit.pids.get(owner),
        },
        "combination": claim.combination,
        "since": since_iso(claim.since),
    }


def finding_json(finding: Finding) -> dict[str, Any]:
    """One thing that is wrong."""
    return {
        "severity": finding.severity.value,
        "kind": finding.kind,
        "resource": finding.resource,
        "message": finding.message,
    }


def since_iso(since: float) -> str:
    """Seconds of the epoch as local time with its zone: ``2025-11-03T10:02:00+01:00``."""
    local = time.localtime(since)
    sign, minutes = "-" if local.tm_gmtoff < 0 else "+", abs(local.tm_gmtoff) // 60
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}{sign}{minutes // 60:02}:{minutes % 60:02}"


def asked_text(request: Request) -> str:
    """What a request asks for, in a few words."""
    if isinstance(request, Intent):
        return f"{request.policy} {request.place}".rstrip()
    return f"{request.form} of {request.device}"


def _vf(audit: Audit, vf: Vf) -> dict[str, Any]:
    state = audit.state_of(vf.resource)
    return {
        "index": vf.index,
        "pci": vf.pci.text,
        "netdev": vf.netdev,
        "driver": vf.driver,
        "iommu_group": vf.iommu_group,
        "state": state.standing.value,
        "claim": claim_json(audit, state.claims[0]) if state.claims else None,
        "users": _users(audit, vf.resource),
    }


def _claims(audit: Audit, resource: Resource) -> list[dict[str, Any]]:
    return [claim_json(audit, claim) for claim in audit.state_of(resource).claims]


def _users(audit: Audit, resource: Resource) -> list[dict[str, Any]]:
    users = audit.state_of(resource).users
    return [{"pid": user.pid, "command": user.command, "how": user.how} for user in users]


def _assignment(one: Assignment) -> dict[str, Any]:
    return {
        "interface": one.request.interface,
        "asked": asked_text(one.request),
        "combination": one.combination.text if one.combination else None,
        "device": one.device.text if one.wanted else None,
        "claims": [{"resource": item.resource.text, "mode": item.mode.value} for item in one.wanted],
        "rejected": [_rejection(rejected) for rejected in one.rejected],
    }


def _rejection(one: Rejection) -> dict[str, Any]:
    return {"candidate": one.candidate, "reason": one.reason}
