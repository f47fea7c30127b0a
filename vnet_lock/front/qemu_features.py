"""Asks a QEMU what words it knows, by a run of it that ends at once (50 ms). Compares no versions."""

from __future__ import annotations

from vnet_lock.qemu_rewrite import RECONNECT_MS, RECONNECT_S


def reconnect_words(path: str) -> tuple[str, int]:
    """How this QEMU is told to connect to a socket again; it ends at an option that it doesn't know."""
    import subprocess  # 10 ms, and only for vhost-user

    key, value = RECONNECT_MS
    argv = [path, "-chardev", f"null,id=probe,{key}={value}", "-version"]
    null = subprocess.DEVNULL
    try:
        done = subprocess.run(argv, stdin=null, stdout=null, stderr=null, check=False)
    except OSError:
        return RECONNECT_MS  # who can't be run gets no words
    return RECONNECT_MS if done.returncode == 0 else RECONNECT_S
