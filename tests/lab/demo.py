"""The main job, shown: a libvirt guest and plain QEMU guests compete for virtual functions of a real SR-IOV NIC.

Runs in the lab VM (``make demo`` boots it). Shows each command and what it prints, and ends with exit status 0
only if every line of the story held.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab import guest

COUNT = 2
DEADLINE_S = 180.0
PLAIN = "-netdev host,id=net0,mode=veb,port=sriov,dev={dev},protocols=vfio"


class Story:
    """Runs commands in sight of the reader, and remembers whether what was claimed of them held."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def chapter(self, text: str) -> None:
        """A heading."""
        print(f"\n{self._paint('1', '── ' + text + ' ' + '─' * max(2, 100 - len(text)))}", flush=True)

    def run(self, *argv: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command, and show it with its output and exit status."""
        result = subprocess.run(
            argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False, stdin=subprocess.DEVNULL
        )
        if not quiet:
            print(self._paint("36", f"$ {shlex.join(argv)}"))
            text = (result.stdout + result.stderr).rstrip()
            print("".join(f"  {line}\n" for line in text.splitlines() if line), end="")
            if result.returncode:
                print(f"  (exit status {result.returncode})")
            sys.stdout.flush()
        return result

    def start(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start a command that goes on in the background."""
        print(self._paint("36", f"$ {shlex.join(argv)} &"), flush=True)
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL)

    def check(self, holds: bool, what: str) -> None:
        """Say whether something held."""
        print(self._paint("32", f"  ✓ {what}") if holds else self._paint("31;1", f"  ✗ {what}"), flush=True)
        if not holds:
            self.failed.append(what)

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text


class Host:
    """The lab's NIC, as the kernel and not vnet-lock tells of it."""

    def __init__(self, pf: str) -> None:
        self.pf = pf
        self.device = Path(f"/sys/class/net/{pf}/device")

    def vf(self, index: int) -> str:
        """A VF's PCI address."""
        return os.readlink(self.device / f"virtfn{index}").rpartition("/")[2]

    def netdev(self, index: int) -> str | None:
        """A VF's network device here."""
        folder = self.device / f"virtfn{index}" / "net"
        return next(iter(os.listdir(folder)), None) if folder.is_dir() else None

    def driver(self, index: int) -> str:
        """The driver of a VF."""
        link = self.device / f"virtfn{index}" / "driver"
        return os.readlink(link).rpartition("/")[2] if link.exists() else "none"

    def state(self, index: int) -> dict[str, object]:
        """All of a VF that a guest could leave behind."""
        found = subprocess.run(
            ["ip", "-json", "link", "show", "dev", self.pf], capture_output=True, text=True, check=True
        )
        vf = json.loads(found.stdout)[0]["vfinfo_list"][index]
        netdev = self.netdev(index)
        own = Path(f"/sys/class/net/{netdev}/address").read_text().strip() if netdev else None
        keys = ("address", "vlan_list", "spoofchk", "trust", "link_state")
        return {"driver": self.driver(index), "own MAC": own} | {key: vf.get(key) for key in keys}

    def bind(self, index: int, driver: str) -> None:
        """Bind a VF by hand, as a person without vnet-lock would."""
        device = (self.device / f"virtfn{index}").resolve()
        (device / "driver_override").write_text(driver)
        if (device / "driver").exists():
            (device / "driver/unbind").write_text(device.name)
        Path("/sys/bus/pci/drivers_probe").write_text(device.name)
        (device / "driver_override").write_text("\n")


def wait_for(what: str, condition: object, seconds: float = DEADLINE_S) -> bool:
    """Wait until a condition holds; False at the deadline."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            print(f"  (waited {seconds:g} s in vain for {what})", flush=True)
            return False
        time.sleep(0.2)
    return True


def vf_in_status(pci: str) -> dict[str, object]:
    """What ``vnet-lock status --json`` says of one VF."""
    found = subprocess.run(["vnet-lock", "status", "--json"], capture_output=True, text=True, check=False)
    vfs = [vf for pf in json.loads(found.stdout)["pfs"] for vf in pf["vfs"]]
    return next(vf for vf in vfs if vf["pci"] == pci)


def owner_of(pci: str) -> str | None:
    """The owner's name of the claim on a VF."""
    claim = vf_in_status(pci)["claim"]
    return claim["owner"]["name"] if isinstance(claim, dict) else None


def define(story: Story, folder: Path, name: str, pci: str, ip: str) -> Path:
    """Define a libvirt guest with a VF named outright, and nothing of vnet-lock in it."""
    bus, slot, function = pci[5:7], pci[8:10], pci[11]
    address = f"<address type='pci' domain='0' bus='0x{bus}' slot='0x{slot}' function='{function}'/>"
    interface = (
        "<interface type='hostdev' managed='yes'>"
        f"<mac address='52:54:00:10:00:{ip.rpartition('.')[2]:0>2}'/><source>{address}</source></interface>"
    )
    console = folder / f"{name}.log"
    words = guest.kernel_words(ip=f"{ip}/24", ping="10.77.0.1")
    file = folder / f"{name}.xml"
    file.write_text(guest.domain_xml(name, interface, words=words, console=console))
    story.run("virsh", "--quiet", "define", str(file))
    return console


def plain(folder: Path, name: str, dev: str) -> list[str]:
    """The command of a plain QEMU guest that wants a VF."""
    argv = guest.qemu_argv(
        name,
        PLAIN.format(dev=dev).split(),
        words=guest.kernel_words(ip="10.77.0.3/24", ping="10.77.0.1"),
        console=folder / f"{name}.log",
    )
    return ["vnet-qemu", *argv]


def said(console: Path, text: str) -> bool:
    """Whether a guest said something on its console."""
    return console.exists() and text in console.read_text(errors="replace")


@contextlib.contextmanager
def background(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards, whatever happened."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def child_of(pid: int) -> int | None:
    """The first child of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def tell(story: Story, host: Host, folder: Path) -> None:
    """The six lines of the main job."""
    story.chapter("a host with an SR-IOV NIC, and the hook")
    story.run("vnet-lock", "hooks", "install")
    os.kill(int(Path("/run/libvirtd.pid").read_text()), signal.SIGHUP)
    story.run("vnet-lock", "vfs", host.pf, str(COUNT))
    wait_for("the VFs' drivers", lambda: all(host.netdev(index) for index in range(COUNT)))
    story.run("ip", "address", "add", "10.77.0.1/24", "dev", host.pf)
    story.run("vnet-lock", "status")
    before = [host.state(index) for index in range(COUNT)]
    first, second = host.vf(0), host.vf(1)

    story.chapter("1. a libvirt guest with a fixed VF: nothing in its definition knows of vnet-lock")
    web1 = define(story, folder, "web1", first, "10.77.0.2")
    story.check(story.run("virsh", "start", "web1").returncode == 0, "virsh start works")
    story.run("vnet-lock", "status")
    story.check(owner_of(first) == "web1", f"vnet-lock names web1 as the owner of {first}")

    story.chapter("2. a plain QEMU guest asks for any VF of the NIC, and takes the other")
    with background(story.start(*plain(folder, "db1", host.pf))) as wrapper:
        wait_for("db1 to have its VF", lambda: host.driver(1) == "vfio-pci" and owner_of(second) == "db1")
        story.run("vnet-lock", "status")
        story.check(owner_of(second) == "db1", f"vnet-lock names db1 as the owner of {second}")
        both = wait_for("the guests", lambda: said(web1, "ready") and said(folder / "db1.log", "ready"))
        for console in (web1, folder / "db1.log"):
            text = console.read_text(errors="replace") if console.exists() else ""
            line = next((line for line in text.splitlines() if "VNET-GUEST ready" in line), "(nothing)")
            print(f"  {console.stem}'s console: {line.strip()}")
            story.check(both and "ping=3/3" in line, f"{console.stem} pings the NIC through its VF")

        story.chapter("3. a third guest is refused before anything of its VF was touched")
        taken = [host.state(index) for index in range(COUNT)]
        refused = story.run(*plain(folder, "late", host.pf))
        story.check(refused.returncode == 4, "a plain guest is refused with exit status 4")
        story.check("web1" in refused.stderr and "db1" in refused.stderr, "the message names both holders")
        story.check("vnet-lock show" in refused.stderr, "and says what to run")
        for name, pci, holder in (("web2", second, "db1"), ("web3", first, "web1")):
            define(story, folder, name, pci, f"10.77.0.{4 + int(name[-1])}")
            refused = story.run("virsh", "start", name)
            story.check(
                refused.returncode != 0 and holder in refused.stderr, f"libvirt's {name}: so, by {holder}"
            )
        story.check(
            [host.state(i) for i in range(COUNT)] == taken, "MAC, VLAN and driver of both VFs are untouched"
        )

        story.chapter("4. a QEMU that nobody announced is seen, and its VF isn't given out")
        story.run("virsh", "destroy", "web1")
        wait_for("web1's VF to be free", lambda: vf_in_status(first)["state"] == "free", 30)
        print(f"  (binding {first} to vfio-pci by hand)")
        host.bind(0, "vfio-pci")
        rogue = [
            "qemu-system-x86_64",
            "-M",
            "q35",
            "-accel",
            "kvm",
            "-m",
            "64",
            "-display",
            "none",
            "-nodefaults",
            "-S",
        ]
        with background(story.start(*rogue, "-device", f"vfio-pci,host={first}")) as unannounced:
            wait_for("it to be seen", lambda: vf_in_status(first)["state"] == "foreign", 60)
            seen = story.run("vnet-lock", "status")
            users = vf_in_status(first)["users"]
            story.check(vf_in_status(first)["state"] == "foreign", f"{first} is foreign")
            story.check(f'"pid": {unannounced.pid}' in json.dumps(users), f"with its pid, {unannounced.pid}")
            story.check(seen.returncode == 3, "and status ends with 3: an audit found an error")
            for argv in (plain(folder, "late", host.pf), ["virsh", "start", "web3"]):
                refused = story.run(*argv)
                named = str(unannounced.pid) in refused.stderr
                story.check(refused.returncode != 0 and named, f"{argv[0]} doesn't get it")
        host.bind(0, "igbvf")
        wait_for("igbvf", lambda: host.netdev(0) is not None)

        story.chapter(
            "5. kill -9 of the plain guest and its wrapper: the VF goes to the guest that was refused"
        )
        qemu = child_of(wrapper.pid)
        print(f"  (kill -9 {wrapper.pid} {qemu}: vnet-qemu and its QEMU)")
        os.kill(wrapper.pid, signal.SIGKILL)
        os.kill(qemu or 0, signal.SIGKILL) if qemu else None
        wrapper.wait()
        story.run("vnet-lock", "status")
        story.check(vf_in_status(second)["state"] == "stale", f"{second} is stale: nobody lives who owns it")
        story.check(story.run("virsh", "start", "web2").returncode == 0, "virsh start web2 works now")
        story.check(owner_of(second) == "web2", f"{second} is web2's")
        story.run("virsh", "destroy", "web2")

    story.chapter("6. at the end everything is what it was")
    wait_for("the VFs", lambda: all(host.netdev(index) for index in range(COUNT)), 30)
    after = [host.state(index) for index in range(COUNT)]
    for index in range(COUNT):
        for key, value in before[index].items():
            if after[index][key] != value and (index, key) != (0, "own MAC"):
                print(f"  VF {index}: {key} was {value}, is {after[index][key]}")
    # VF 0 was bound by hand: igbvf made up another MAC for it, as it does each time.
    after[0]["own MAC"] = before[0]["own MAC"]
    after[0]["address"] = before[0]["address"]
    story.check(after == before, "MAC, VLAN, trust, spoofchk and driver of the VFs are what they were before")
    final = story.run("vnet-lock", "status")
    story.check(final.returncode == 0, "status finds nothing wrong")
    story.check(all(vf_in_status(pci)["state"] == "free" for pci in (first, second)), "every VF is free")
    story.check(not os.listdir("/run/vnet-lock/claims"), "no record is left")
    links = story.run("ip", "-brief", "link", quiet=True).stdout
    story.check(
        "macvtap" not in links and "vl" not in [line[:2] for line in links.splitlines()], "no device is left"
    )
    story.check(not story.run("ip", "netns", quiet=True).stdout.strip(), "no namespace is left")
    left = story.run("pgrep", "-a", "qemu-system|vnet-qemu", quiet=True).stdout
    story.check(not left, f"no process is left{': ' + left if left else ''}")


def main() -> int:
    """Tell the story; 1 if something in it didn't hold."""
    pf = os.environ.get("VNET_LAB_PF")
    if not pf:
        print("demo: this runs in the lab VM; run: make demo", file=sys.stderr)
        return 2
    folder = Path("/run/demo")
    folder.mkdir(mode=0o755, exist_ok=True)
    story = Story()
    tell(story, Host(pf), folder)
    if story.failed:
        print(f"\nThe main job failed: {len(story.failed)} of its lines did not hold:")
        print("".join(f"  ✗ {what}\n" for what in story.failed), end="")
        return 1
    print("\nThe main job holds: no VF was used twice.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
