"""The nested guest: how libvirt or QEMU start it. Starts nothing by itself.

Its image is built on the machine that boots the lab VM, see image.py; all this is used inside the VM.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from tests.lab.image import Image, build

__all__ = ["Image", "build", "domain_xml", "image", "kernel_words", "qemu_argv"]

MEMORY_MB = 128
# Nothing here is worth its time in an emulated CPU: no self-tests, no mitigations, no probing for hardware.
KERNEL_WORDS = (
    "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t mitigations=off audit=0 apparmor=0 tsc=reliable"
    " no_timer_check cryptomgr.notests 8250.nr_uarts=1 random.trust_cpu=on"
)


@functools.cache
def image() -> Image:
    """The image: built before the lab VM was booted, or now, outside of it."""
    if "VNET_LAB_KERNEL" not in os.environ:
        return build()
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
    shares_memory: bool = False,
) -> str:
    """A libvirt guest: ``interfaces`` is the XML of its devices, ``words`` its kernel command line.

    With ``shares_memory`` another process can have its memory. ``console`` is the log of its serial port;
    ``console.sock`` beside it takes orders.
    """
    found = image()
    return f"""<domain type='kvm'>
  <name>{name}</name>
  {f"<uuid>{uuid}</uuid>" if uuid else ""}
  {f"<metadata>{metadata}</metadata>" if metadata else ""}
  <memory unit='MiB'>{memory_mb}</memory>
  {"<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>" if shares_memory else ""}
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{found.kernel}</kernel>
    <initrd>{found.initrd}</initrd>
    <cmdline>{words}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='host-passthrough' migratable='on'/>
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
    name: str,
    devices: list[str],
    *,
    words: str,
    console: Path,
    memory_mb: int = MEMORY_MB,
    accel: str = "kvm",
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
        "-accel", accel,
        "-cpu", "host" if accel == "kvm" else "max",
        "-m", str(memory_mb),
        "-no-reboot",
        "-kernel", str(found.kernel),
        "-initrd", str(found.initrd),
        "-append", words,
        "-chardev", f"socket,id=console,path={socket},server=on,wait=off,logfile={console}",
        "-serial", "chardev:console",
        *devices,
    ]  # fmt: skip
