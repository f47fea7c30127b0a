"""The mode of a PF's embedded switch, which the guests on its VFs share."""

from __future__ import annotations

from vnet_lock.journal import EswitchMode
from vnet_lock.model import Pf
from vnet_lock.ports import Job
from vnet_lock.rules import Tenancy


def hold_mode(job: Job, pf: Pf) -> None:
    """Bring the switch into the mode that the guest's policy needs, and keep it there as long as the guest.

    Nothing where any mode will do. Planning has seen that no other guest needs another; the last one's undo
    puts back what was before the first. Unsupported where the driver refuses.
    """
    from vnet_lock.kernel import eswitch

    mode = Tenancy(job.intent.policy).eswitch_mode(pf.eswitch)
    if mode is None or pf.eswitch is None or pf.netdev is None:
        return
    with job.sharing() as share:
        now = eswitch.read_mode(pf.netdev) or pf.eswitch
        share(EswitchMode(pf.pci.text, now, mode))
        if now != mode:
            eswitch.set_mode(pf.netdev, mode)
