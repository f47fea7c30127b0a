"""The libvirt of a distribution whose backports gave this machine a newer one, for the lab VM to run instead.

It is unpacked beside the image, and the VM lays it over its own ``/usr``: nothing is installed anywhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
# What has a part in running a QEMU guest, as Debian 12 divides it; all else stays this machine's.
PACKAGES = (
    "libvirt0",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-system",
)
# Libraries that only the older one needs, and Python's module for it; as apt has them.
LIBRARIES = ("libyajl2", "python3-libvirt")


class NoOlder(Exception):
    """There is no older libvirt here; the message says why."""


def unpack(cache: Path = TOP / ".lab") -> Path:
    """The directory with its ``usr``, unpacked where the cache has none of this version yet.

    Raises NoOlder where apt knows of no older one, or can't get it.
    """
    installed, version = _versions()
    folder = cache / ("older-libvirt-" + re.sub(r"[^\w.+-]", "-", version))
    if folder.is_dir():
        return folder
    made = cache / f"{folder.name}.{os.getpid()}"
    (made / "debs").mkdir(parents=True)
    try:
        packages = [f"{package}={version}" for package in PACKAGES]
        _run(["apt-get", "-q", "download", *packages, *LIBRARIES], made / "debs")
        for package in sorted((made / "debs").iterdir()):
            _run(["dpkg-deb", "-x", str(package), str(made)], made)
        shutil.rmtree(made / "debs")
        # They want libraries that a QEMU guest doesn't need, and the daemon ends where one is missing.
        for backend in (made / "usr/lib").glob("*/libvirt/storage-backend/*"):
            if not backend.name.endswith("_fs.so"):
                backend.unlink()
        made.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # unpacked by another at the same time
            raise NoOlder(f"libvirt {version}, older than {installed}, can't be unpacked: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def is_offered() -> bool:
    """Whether there is an older one than the one that is installed."""
    try:
        _versions()
    except (NoOlder, FileNotFoundError):  # no Debian
        return False
    return True


def _versions() -> tuple[str, str]:
    """The version that is installed, and the newest that is older."""
    installed = _run(["dpkg-query", "-W", "-f", "${Version}", "libvirt-daemon"])
    listed = _run(["apt-cache", "madison", "libvirt-daemon"])
    offered = [line.split("|")[1].strip() for line in listed.splitlines()]
    # The upstream version counts: a rebuild of the same one is none.
    for version in offered:
        if _is_older(version.split("-")[0], installed.split("-")[0]):
            return installed, version
    raise NoOlder(f"apt offers no libvirt that is older than {installed}")


def _is_older(one: str, other: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", one, "lt", other], check=False).returncode == 0


def _run(argv: list[str], directory: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise NoOlder(f"{argv[0]} failed: {said[-1]}")
    return done.stdout
