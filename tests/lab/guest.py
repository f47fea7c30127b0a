"""The nested guest: a tiny image of the distribution's kernel and busybox, and how libvirt or QEMU start it.

``build`` makes the image on the machine that boots the lab VM; everything else is used inside the VM.
Starts nothing by itself.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
MODULES = ("virtio_pci", "virtio_net", "igbvf", "igb", "e1000e")
MEMORY_MB = 128
# Nothing here is worth its time in an emulated CPU: no self-tests, no mitigations, no probing for hardware.
KERNEL_WORDS = (
    "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t mitigations=off audit=0 apparmor=0 tsc=reliable"
    " no_timer_check cryptomgr.notests 8250.nr_uarts=1 random.trust_cpu=on"
)


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
    modules = _modules(release)
    digest = hashlib.sha256(release.encode())
    for path in (Path(__file__), _INIT, Path(busybox)):
        digest.update(path.read_bytes())
    path = cache / f"guest-{release}-{digest.hexdigest()[:16]}.cpio"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(_archive(busybox, modules))
        draft.replace(path)
    return Image(kernel, path)


@functools.cache
def image() -> Image:
    """The image as the lab VM finds it: built before it was booted."""
    return Image(Path(os.environ["VNET_LAB_KERNEL"]), Path(os.environ["VNET_LAB_INITRD"]))


def kernel_words(*, ip: str = "", ping: str = "", nics: int = 1, more: str = "") -> str:
    """The guest's kernel command line; ``ip`` and ``ping`` are lists with commas, one entry for each NIC."""
    words = [KERNEL_WORDS, f"vl.nics={nics}"]
    words += [f"vl.ip={ip}"] if ip else []
    words += [f"vl.ping={ping}"] if ping else []
    return " ".join([*words, more]).strip()


def domain_xml(
    name: str,
    interfaces: str,
    *,
    words: str,
    console: Path,
    uuid: str = "",
    metadata: str = "",
    memory_mb: int = MEMORY_MB,
) -> str:
    """A libvirt guest: ``interfaces`` is the XML of its devices, ``words`` its kernel command line.

    ``console`` is the log of its serial port; ``console.sock`` beside it takes orders.
    """
    found = image()
    return f"""<domain type='kvm'>
  <name>{name}</name>
  {f"<uuid>{uuid}</uuid>" if uuid else ""}
  {f"<metadata>{metadata}</metadata>" if metadata else ""}
  <memory unit='MiB'>{memory_mb}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{found.kernel}</kernel>
    <initrd>{found.initrd}</initrd>
    <cmdline>{words}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough' migratable='off'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <serial type='unix'>
      <source mode='bind' path='{console.with_suffix(".sock")}'/>
      <log file='{console}' append='on'/>
      <target port='0'/>
    </serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <video><model type='none'/></video>
    {interfaces}
  </devices>
</domain>
"""


def qemu_argv(
    name: str, devices: list[str], *, words: str, console: Path, memory_mb: int = MEMORY_MB
) -> list[str]:
    """A plain QEMU guest: ``devices`` are the arguments that give it its NICs."""
    found, socket = image(), console.with_suffix(".sock")
    return [
        "qemu-system-x86_64",
        "-name", name,
        "-nodefaults",
        "-no-user-config",
        "-display", "none",
        "-machine", "q35",
        "-accel", "kvm",
        "-cpu", "host",
        "-m", str(memory_mb),
        "-no-reboot",
        "-kernel", str(found.kernel),
        "-initrd", str(found.initrd),
        "-append", words,
        "-chardev", f"socket,id=console,path={socket},server=on,wait=off,logfile={console}",
        "-serial", "chardev:console",
        *devices,
    ]  # fmt: skip


_INIT = Path(__file__).with_name("guest-init")


def _modules(release: str) -> list[Path]:
    """The files of the modules and of what they need, in the order of loading; none for what is built in."""
    found: dict[Path, None] = {}
    for name in MODULES:
        argv = ["/sbin/modprobe", "-S", release, "--show-depends", name]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"kernel {release} has no module {name}: {done.stderr.strip()}")
        found |= dict.fromkeys(
            Path(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("insmod ")
        )
    return list(found)


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


def _archive(busybox: str, modules: list[Path]) -> bytes:
    """The initial file system, as the cpio "newc" format that the kernel reads."""
    parts: list[bytes] = []

    def add(name: str, mode: int, data: bytes = b"") -> None:
        fields = (len(parts), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + name.encode() + b"\0"
        parts.append(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

    for directory in ("bin", "dev", "proc", "sys", "modules", "tmp"):
        add(directory, 0o40755)
    add("bin/busybox", 0o100755, Path(busybox).read_bytes())
    add("init", 0o100755, _INIT.read_bytes())
    names = [path.name.partition(".")[0] + ".ko" for path in modules]
    add("modules/order", 0o100644, "".join(f"{name}\n" for name in names).encode())
    for name, path in zip(names, modules, strict=True):
        add(f"modules/{name}", 0o100644, _unpacked(path))
    add("TRAILER!!!", 0)
    return b"".join(parts)
