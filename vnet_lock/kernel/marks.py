"""The mark in a link's ifalias that says for which claim we made it. Reads only."""

from __future__ import annotations

import errno

from vnet_lock.settings import Settings

# What the ifalias of a link of ours starts with; the claim's token follows.
PREFIX = "vnet-lock:"
# What the ifalias of a link starts with that guests share; its name follows.
SHARED_PREFIX = PREFIX + "shared:"


def read_mark(settings: Settings, netdev: str) -> str | None:
    """The token in the ifalias of a network device; None where it has none or is gone."""
    try:
        with open(f"{settings.sys}/class/net/{netdev}/ifalias", encoding="utf-8", errors="replace") as file:
            alias = file.read().rstrip("\n")
    except OSError as error:
        # A device on its way out answers ENODEV or EINVAL.
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EINVAL, errno.ENOTDIR, errno.EACCES):
            return None
        raise
    # What several guests share is no claim's alone.
    is_claims = alias.startswith(PREFIX) and not alias.startswith(SHARED_PREFIX)
    return alias.removeprefix(PREFIX) if is_claims else None
