"""libvirt as a client sees it: connections, guests, networks, events; its errors as one line of ours each.

The only importer of libvirt-python (50 ms). No hook loads this: libvirt holds the guest's lock while it waits
for the hook, so a call about the guest would wait for itself.
"""

from vnet_lock.errors import Unsupported

try:
    import libvirt  # noqa: F401 - said here once, for all modules of this package
except ImportError as error:  # built for a later libvirt than this host's
    raise Unsupported(
        f"libvirt-python does not load ({error}); build it here: pip install --force-reinstall libvirt-python"
    ) from error
