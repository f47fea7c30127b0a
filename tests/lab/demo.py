"""The main job, shown: libvirt and plain QEMU guests compete for the VFs of a real SR-IOV NIC.

Runs in the lab VM (``make demo`` boots it). Shows each command and what it prints, and ends with exit
status 0 only if every line of the story held.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.lab import guest
from tests.lab.machines import Console
from tests.lab.nic import Function, Nic, settle, wait_until

COUNT = 2
HOST = "10.77.0.1"
DEADLINE_S = 180.0
PLAIN = "-netdev host,id=net0,mode=veb,port=sriov,dev={dev},protocols=vfio"


class Story:
    """Runs commands in sight of the reader, and remembers whether what was claimed of them held."""

    def __init__(self) -> None:
        # (chapter, what was claimed, whether it held)
        self.lines: list[tuple[str, str, bool]] = []
        self._chapter = ""
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def chapter(self, text: str) -> None:
        """A heading."""
        self._chapter = text
        print(f"\n{self._paint('1', '── ' + text + ' ' + '─' * max(2, 100 - len(text)))}", flush=True)

    def run(self, *argv: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command, and show it with its output and exit status."""
        result = subprocess.run(
            argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False, stdin=subprocess.DEVNULL
        )
        if not quiet:
            print(self._paint("36", f"$ {shown(argv)}"))
            text = (result.stdout + result.stderr).rstrip()
            print("".join(f"  {line}\n" for line in text.splitlines() if line), end="")
            if result.returncode:
                print(f"  (exit status {result.returncode})")
            sys.stdout.flush()
        return result

    def start(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start a command that goes on in the background."""
        print(self._paint("36", f"$ {shown(argv)} &"), flush=True)
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL)

    def check(self, holds: bool, what: str) -> None:
        """Say whether something held."""
        print(self._paint("32", f"  ✓ {what}") if holds else self._paint("31;1", f"  ✗ {what}"), flush=True)
        self.lines.append((self._chapter, what, holds))

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text


def shown(argv: Sequence[str]) -> str:
    """A command as it is shown: a guest's machine, kernel and console are of no interest here."""
    words = list(argv)
    if "-nodefaults" in words and "-netdev" in words:
        words[words.index("-nodefaults") : words.index("-netdev")] = ["…"]
    return shlex.join(words).replace("'…'", "…")


def state(nic: Nic, index: int) -> dict[str, object]:
    """All of a VF that a guest could leave behind, as the kernel and not vnet-lock tells it."""
    return {"driver": nic.vfs[index].driver, "own MAC": nic.vfs[index].mac} | nic.admin(index)


def wait_for(what: str, condition: Callable[[], object], seconds: float = DEADLINE_S) -> bool:
    """Wait until a condition holds; False at the deadline."""
    try:
        wait_until(condition, what, seconds)
    except AssertionError as error:
        print(f"  ({error})", flush=True)
        return False
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


def define(story: Story, folder: Path, name: str, vf: Function, ip: str) -> Console:
    """Define a libvirt guest with a VF named outright, and nothing of vnet-lock in it."""
    mac = f"52:54:00:10:00:{int(ip.rpartition('.')[2]):02x}"
    interface = (
        f"<interface type='hostdev' managed='yes'><mac address='{mac}'/>"
        f"<source>{vf.xml_address}</source></interface>"
    )
    console = Console(folder / f"{name}.log")
    words = guest.kernel_words(ip=f"{ip}/24", ping=HOST)
    file = folder / f"{name}.xml"
    file.write_text(guest.domain_xml(name, interface, words=words, console=console.log))
    story.run("virsh", "--quiet", "define", str(file))
    return console


def plain(folder: Path, name: str, dev: str) -> list[str]:
    """The command of a plain QEMU guest that wants a VF."""
    argv = guest.qemu_argv(
        name,
        PLAIN.format(dev=dev).split(),
        words=guest.kernel_words(ip="10.77.0.3/24", ping=HOST),
        console=folder / f"{name}.log",
    )
    return ["vnet-qemu", *argv]


def hear(story: Story, console: Console) -> None:
    """Wait for what a guest says of its NIC when it has booted."""
    try:
        seen = console.ready(DEADLINE_S)
    except AssertionError as error:
        print(f"  ({error})")
        seen = {}
    print(f"  {console.log.stem}'s console: {seen}", flush=True)
    story.check(seen.get("ping") == "3/3", f"{console.log.stem} pings the NIC through its VF")


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


def prepare(story: Story, nic: Nic) -> None:
    """The hook, and two VFs."""
    story.chapter("a host with an SR-IOV NIC, and the hook")
    story.run("vnet-lock", "hooks", "install")
    os.kill(int(Path("/run/libvirtd.pid").read_text()), signal.SIGHUP)
    story.run("vnet-lock", "vfs", nic.pf, str(COUNT))
    wait_for("the VFs have their drivers", lambda: all(vf.netdev for vf in nic.vfs))
    settle()
    nic.set_address(f"{HOST}/24")
    story.run("vnet-lock", "status")


def use_both(story: Story, nic: Nic, folder: Path) -> None:
    """Lines 1 to 3: two guests have the VFs, and a third gets none. Then line 5: one of them dies."""
    first, second = nic.vfs
    story.chapter("1. a libvirt guest with a fixed VF: nothing in its definition knows of vnet-lock")
    web1 = define(story, folder, "web1", first, "10.77.0.2")
    story.check(story.run("virsh", "start", "web1").returncode == 0, "virsh start works")
    story.run("vnet-lock", "status")
    story.check(owner_of(first.pci) == "web1", f"vnet-lock names web1 as the owner of {first.pci}")

    story.chapter("2. a plain QEMU guest asks for any VF of the NIC, and takes the other")
    with background(story.start(*plain(folder, "db1", nic.pf))) as wrapper:
        taken = lambda: second.driver == "vfio-pci" and owner_of(second.pci) == "db1"  # noqa: E731
        story.check(wait_for("db1 has its VF", taken), f"vnet-lock names db1 as the owner of {second.pci}")
        story.run("vnet-lock", "status")
        hear(story, web1)
        hear(story, Console(folder / "db1.log"))
        refuse_a_third(story, nic, folder)
        see_the_unannounced(story, nic, folder)
        kill_the_plain_guest(story, nic, wrapper)


def refuse_a_third(story: Story, nic: Nic, folder: Path) -> None:
    """Line 3."""
    story.chapter("3. a third guest is refused before anything of its VF was touched")
    taken = [state(nic, index) for index in range(COUNT)]
    refused = story.run(*plain(folder, "late", nic.pf))
    story.check(refused.returncode == 4, "a plain guest is refused with exit status 4")
    story.check("web1" in refused.stderr and "db1" in refused.stderr, "the message names both holders")
    story.check("vnet-lock show" in refused.stderr, "and says what to run")
    for name, vf, ip, holder in (
        ("web2", nic.vfs[1], "10.77.0.4", "db1"),
        ("web3", nic.vfs[0], "10.77.0.5", "web1"),
    ):
        define(story, folder, name, vf, ip)
        refused = story.run("virsh", "start", name)
        named = holder in refused.stderr and "vnet-lock show" in refused.stderr
        story.check(refused.returncode != 0 and named, f"libvirt's {name} is refused, and {holder} named")
    untouched = [state(nic, index) for index in range(COUNT)] == taken
    story.check(untouched, "MAC, VLAN and driver of both VFs are untouched")


def see_the_unannounced(story: Story, nic: Nic, folder: Path) -> None:
    """Line 4."""
    first = nic.vfs[0]
    story.chapter("4. a QEMU that nobody announced is seen, and its VF isn't given out")
    story.run("virsh", "destroy", "web1")
    wait_for("web1's VF is free", lambda: vf_in_status(first.pci)["state"] == "free", 60)
    print(f"  (binding {first.pci} to vfio-pci by hand)")
    first.bind("vfio-pci")
    rogue = "qemu-system-x86_64 -M q35 -accel kvm -m 64 -display none -nodefaults -S -device"
    with background(story.start(*rogue.split(), f"vfio-pci,host={first.pci}")) as unannounced:
        wait_for("it is seen", lambda: vf_in_status(first.pci)["state"] == "foreign", 60)
        seen = story.run("vnet-lock", "status")
        found = vf_in_status(first.pci)
        story.check(found["state"] == "foreign", f"{first.pci} is foreign")
        story.check(
            f'"pid": {unannounced.pid}' in json.dumps(found["users"]), f"with its pid, {unannounced.pid}"
        )
        story.check(seen.returncode == 3, "status ends with exit status 3: the audit found an error")
        for argv in (plain(folder, "late", nic.pf), ["virsh", "start", "web3"]):
            refused = story.run(*argv)
            named = str(unannounced.pid) in refused.stderr
            story.check(refused.returncode != 0 and named, f"{argv[0]} doesn't get it, and says why")
    first.bind("igbvf")
    wait_for("igbvf has it again", lambda: first.netdev)


def kill_the_plain_guest(story: Story, nic: Nic, wrapper: subprocess.Popen[bytes]) -> None:
    """Line 5."""
    second = nic.vfs[1]
    story.chapter("5. kill -9 of the plain guest and its wrapper: the VF goes to the guest that was refused")
    qemu = child_of(wrapper.pid)
    print(f"  (kill -9 {wrapper.pid} {qemu}: vnet-qemu and its QEMU)")
    os.kill(wrapper.pid, signal.SIGKILL)
    if qemu:
        os.kill(qemu, signal.SIGKILL)
    wrapper.wait()
    wait_for("both are gone", lambda: not Path(f"/proc/{qemu}").exists(), 30)
    story.run("vnet-lock", "status")
    story.check(vf_in_status(second.pci)["state"] == "stale", f"{second.pci} is stale: its owner is dead")
    story.check(story.run("virsh", "start", "web2").returncode == 0, "virsh start web2 works now")
    story.check(owner_of(second.pci) == "web2", f"{second.pci} is web2's")
    story.run("virsh", "destroy", "web2")


def look_back(story: Story, nic: Nic, before: list[dict[str, object]]) -> None:
    """Line 6."""
    story.chapter("6. at the end everything is what it was")
    wait_for("the VFs have their drivers", lambda: all(vf.netdev for vf in nic.vfs), 30)
    after = [state(nic, index) for index in range(COUNT)]
    # VF 0 was bound by hand, and igbvf makes up another MAC each time that it is bound.
    for of_vf0 in (after[0], before[0]):
        del of_vf0["own MAC"], of_vf0["mac"]
    for index, (was, now) in enumerate(zip(before, after, strict=True)):
        for key in was:
            print(f"  VF {index} {key:10} {was[key]}" + ("" if now[key] == was[key] else f" -> {now[key]}"))
    story.check(after == before, "MAC, VLAN, trust, spoofchk and driver of the VFs are what they were before")
    final = story.run("vnet-lock", "status")
    story.check(final.returncode == 0, "status finds nothing wrong")
    free = all(vf_in_status(vf.pci)["state"] == "free" for vf in nic.vfs)
    story.check(free, "every VF is free")
    story.check(not os.listdir("/run/vnet-lock/claims"), "no record is left")
    links = [line.split()[0] for line in story.run("ip", "-brief", "link", quiet=True).stdout.splitlines()]
    story.check(not [link for link in links if link.startswith(("vl", "macvtap"))], "no device is left")
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
    story, nic = Story(), Nic(pf)
    try:
        prepare(story, nic)
        before = [state(nic, index) for index in range(COUNT)]
        use_both(story, nic, folder)
        look_back(story, nic, before)
    finally:
        for name in ("web1", "web2", "web3"):
            story.run("virsh", "undefine", name, quiet=True)
        if "VNET_LAB_RESULTS" in os.environ:
            Path(os.environ["VNET_LAB_RESULTS"], "demo.json").write_text(json.dumps(story.lines))
    failed = [what for _, what, held in story.lines if not held]
    if failed:
        print(f"\nThe main job failed: {len(failed)} of its {len(story.lines)} lines did not hold:")
        print("".join(f"  ✗ {what}\n" for what in failed), end="")
        return 1
    print(f"\nThe main job holds, in all its {len(story.lines)} lines: no VF was used twice.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
