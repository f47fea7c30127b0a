"""Finds and runs the distribution's programs that do a part of the work: words in a list, never a shell."""

from __future__ import annotations

import os

from vnet_lock.errors import Unsupported, VnetLockError

# Debian's packages of what we run.
_PACKAGES = {"nft": "nftables", "dnsmasq": "dnsmasq-base", "passt": "passt"}
_TIMEOUT_S = 20.0


def find(name: str) -> str | None:
    """Where a program is, root's folders included; None where it isn't installed."""
    folders = [*os.environ.get("PATH", os.defpath).split(":"), "/usr/sbin", "/sbin"]
    paths = (os.path.join(folder, name) for folder in folders if os.path.isabs(folder))
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)


def require(name: str) -> str:
    """As ``find``; Unsupported where it isn't installed."""
    path = find(name)
    if path is None:
        raise Unsupported(lack(name))
    return path


def lack(name: str) -> str:
    """What to say where a program isn't installed."""
    return f"{name} isn't installed; run: apt install {_PACKAGES[name]}"


def run(name: str, *args: str, text: str = "", kept: tuple[int, ...] = ()) -> None:
    """Run it with ``text`` on its standard input, and the descriptors that it is to have.

    It is not of our terminal's session. VnetLockError, with its own words, where it fails.
    """
    import subprocess  # 15 ms

    program = require(name)
    try:
        done = subprocess.run(
            [program, *args], check=False, input=text, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, errors="replace", pass_fds=kept, start_new_session=True, timeout=_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise VnetLockError(f"cannot run {program}: {error}") from error
    if done.returncode != 0:
        raise VnetLockError(f"{name} failed: {reason_in(done.stderr) or f'exit status {done.returncode}'}")


def reason_in(said: str) -> str:
    """The line that says why a program failed, of all that it said."""
    # passt says so of each line where there is no syslog.
    lines = [line.strip() for line in said.splitlines() if not line.startswith("Failed to send ")]
    found = [line for line in lines if "rror" in line] or lines[-1:]
    return found[0] if found else ""
