"""The nested guest's image: kernel, modules, busybox. Built outside of the lab VM."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
MODULES = ("virtio_pci", "virtio_net", "igbvf", "igb", "e1000", "e1000e")
# There, but loaded only by who wants to measure.
MORE_MODULES = ("pktgen",)


class BuildError(Exception):
    """The image can't be built; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel and an initial file system that make a guest."""

    kernel: Path
    initrd: Path


def find_kernel(root: Path = Path("/")) -> tuple[str, Path]:
    """The newest installed kernel that has the lab's drivers: its release and its file."""

    def age(release: str) -> list[tuple[int, str]]:
        return [(int(number or 0), text) for number, text in re.findall(r"(\d+)|(\D+)", release)]

    modules = root / "lib/modules"
    releases = sorted(os.listdir(modules) if modules.is_dir() else [], key=age, reverse=True)
    for release in releases:
        kernel = root / f"boot/vmlinuz-{release}"
        if kernel.exists() and (modules / release / "kernel/drivers/net/ethernet/intel/igbvf").is_dir():
            return release, kernel
    raise BuildError("no kernel with igbvf in /boot and /lib/modules: run tests/setup")


def build(cache: Path = TOP / ".lab") -> Image:
    """The image, built where the cache has none of this kernel and content yet.

    Raises BuildError when busybox, a module or the kernel isn't there.
    """
    release, kernel = find_kernel()
    busybox = shutil.which("busybox", path="/bin:/usr/bin:/sbin:/usr/sbin")
    if not busybox:
        raise BuildError("no busybox: run tests/setup")
    modules, more = _modules(release, MODULES), _modules(release, MORE_MODULES)
    digest = hashlib.sha256(release.encode())
    for path in (Path(__file__), _INIT, Path(busybox)):
        digest.update(path.read_bytes())
    cache.mkdir(parents=True, exist_ok=True)
    initrd = cache / f"guest-{release}-{digest.hexdigest()[:16]}.cpio"
    if not initrd.exists():
        _write(initrd, _archive(busybox, modules, more))
    plain = cache / f"vmlinux-{release}"
    if not plain.exists() or plain.stat().st_mtime < kernel.stat().st_mtime:
        _write(plain, _plain_kernel(release, kernel))
    return Image(plain, initrd)


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, whoever else builds the same."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)


def _plain_kernel(release: str, kernel: Path) -> bytes:
    """The kernel as an ELF file, which QEMU starts at its PVH entry: a quarter of a guest's boot is saved.

    The packed file where this kernel has no such entry or is packed in another way than Debian's
    (Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length).
    """
    packed = kernel.read_bytes()
    config = kernel.with_name(f"config-{release}")
    if not config.exists() or "CONFIG_PVH=y" not in config.read_text().splitlines():
        return packed
    offset, length = struct.unpack_from("<II", packed, 0x248)
    start = ((packed[0x1F1] or 4) + 1) * 512 + offset
    # The last four bytes are the size of what is packed: zstd says so, and fails.
    argv = ["zstd", "-dc"]
    done = subprocess.run(argv, input=packed[start : start + length - 4], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 and done.stdout.startswith(b"\x7fELF") else packed


_INIT = Path(__file__).with_name("guest-init")


def _modules(release: str, wanted: Sequence[str]) -> list[Path]:
    """The files of the modules and of what they need, in the order of loading; none for what is built in."""
    found: dict[Path, None] = {}
    for name in wanted:
        argv = ["/sbin/modprobe", "-S", release, "--show-depends", name]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"kernel {release} has no module {name}: {done.stderr.strip()}")
        found |= dict.fromkeys(
            Path(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("insmod ")
        )
    return list(found)


def _plain_name(path: Path) -> str:
    return path.name.partition(".")[0] + ".ko"


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


def build_initrd(init: Path) -> bytes:
    """An initial file system of busybox and one script, for a kernel that has its drivers built in."""
    busybox = shutil.which("busybox", path="/bin:/usr/bin:/sbin:/usr/sbin")
    if not busybox:
        raise BuildError("no busybox: run tests/setup")
    return _archive(busybox, [], [], init)


def _archive(busybox: str, modules: list[Path], more: list[Path], init: Path = _INIT) -> bytes:
    """The initial file system, as the cpio "newc" format that the kernel reads."""
    parts: list[bytes] = []

    def add(name: str, mode: int, data: bytes = b"") -> None:
        fields = (len(parts), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + name.encode() + b"\0"
        parts.append(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

    for directory in ("bin", "dev", "proc", "sys", "modules", "tmp"):
        add(directory, 0o40755)
    add("bin/busybox", 0o100755, Path(busybox).read_bytes())
    add("init", 0o100755, init.read_bytes())
    add("modules/order", 0o100644, "".join(f"{_plain_name(path)}\n" for path in modules).encode())
    for path in dict.fromkeys((*modules, *more)):
        add(f"modules/{_plain_name(path)}", 0o100644, _unpacked(path))
    add("TRAILER!!!", 0)
    return b"".join(parts)
