"""Moves the network device of hardware into a namespace of its own, for a guest on a packet socket."""

from __future__ import annotations

from vnet_lock.ports import Job, Opened


def open_hardware(job: Job, netdev: str, mac: str) -> Opened:
    """Move the device, and set it up there; the claim's journal has what it was like.

    The host's stack has no part in it then. It returns by itself, with its name, down, when the last
    descriptor and socket of the namespace is gone (default_device_exit_net): to the first namespace.
    """
    from vnet_lock.kernel import netlink
    from vnet_lock.kernel.netns import call_in, make_namespace

    opened = Opened(netdev=netdev, mac=mac, netns=(namespace := make_namespace(job.settings)))
    try:
        netlink.move_link(netdev, namespace)
        # In another namespace a device gets addresses anew.
        call_in(namespace, lambda: netlink.set_link(netdev, allmulticast=True, addrgenmode="none", up=True))
    except BaseException:
        opened.close()
        raise
    return opened
