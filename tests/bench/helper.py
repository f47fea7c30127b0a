"""How long QEMU waits for its descriptor: our helper beside QEMU's own, which is C and makes no claim.

Each is called as QEMU calls it (net_bridge_run_helper, net/tap.c). Needs root, and QEMU's own helper; has
namespaces of its own, with the bridge.conf that QEMU's wants.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.row import Row
from tests.kernel.conftest import own_namespaces

OURS = str(Path(sys.executable).with_name("qemu-net-helper"))
# Where Debian's, and others' QEMU have it.
OF_QEMU = ("/usr/lib/qemu/qemu-bridge-helper", "/usr/libexec/qemu-bridge-helper")
ACCESS_LIST = Path("/etc/qemu/bridge.conf")
IMPORT = (sys.executable, "-I", "-c", "import pyroute2")
ROUNDS = 15


def rows() -> tuple[Row, ...]:
    """A tap in a bridge, and a macvtap, against QEMU's helper and then the import of pyroute2."""
    theirs = next((path for path in OF_QEMU if os.path.exists(path)), None)
    if theirs is None:
        raise FileNotFoundError("QEMU's own qemu-bridge-helper isn't here: install QEMU")
    with own_namespaces():
        _make_host()
        calls: dict[str, Callable[[], float]] = {
            "theirs": lambda: time_helper(theirs, "--br=br0"),
            "bridge": lambda: time_helper(OURS, "--br=br0"),
            "macvtap": lambda: time_helper(OURS, "--mode=vepa", "--dev=up0", "--mac=52:54:00:00:00:01"),
            "import": time_import,
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(ROUNDS + 1):
            for name, call in calls.items():
                spent_s = call()
                # The first of each reads its files.
                if number:
                    times[name].append(spent_s)
    medians = {name: statistics.median(each) for name, each in times.items()}
    floor_s = medians["theirs"] + medians["import"]
    what = "against QEMU's helper and `import pyroute2`"
    return (
        Row(f"-netdev bridge,helper= to the descriptor, {what}", medians["bridge"], floor_s, 1),
        Row(f"-netdev tap,helper= to a macvtap, {what}", medians["macvtap"], floor_s, 1),
    )


def _make_host() -> None:
    """A bridge, a wire, and a list of bridges that QEMU's helper may use, on top of the host's own."""
    for words in (
        *("link add br0 type bridge", "link set br0 up"),
        *("link add up0 type veth peer name peer0", "link set up0 up", "link set peer0 up"),
    ):
        subprocess.run(["ip", *words.split()], check=True)
    folder = ACCESS_LIST.parent
    above = folder if folder.is_dir() else folder.parent
    upper = Path("/run/upper")
    for path in (upper, Path("/run/work")):
        path.mkdir()
    options = f"lowerdir={above},upperdir={upper},workdir=/run/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", above], check=True)
    folder.mkdir(exist_ok=True)
    ACCESS_LIST.write_text("allow br0\n")
    ACCESS_LIST.chmod(0o644)


def time_helper(program: str, *words: str) -> float:
    """Seconds from the start of a helper to its descriptor and its end: QEMU waits for both."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.set_inheritable(True)
        started = time.monotonic()
        argv = [program, "--use-vnet", f"--fd={theirs.fileno()}", *words]
        pid = os.posix_spawn(program, argv, os.environ)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        status = os.waitpid(pid, 0)[1]
        spent_s = time.monotonic() - started
    if status or len(fds) != 1:
        raise RuntimeError(f"{' '.join(argv)}: status {status}, {len(fds)} descriptors")
    os.close(fds[0])
    if program == OURS:
        # The claim is ours, who live on: the next call would be refused the same MAC.
        release()
    return spent_s


def release() -> None:
    """Give back all that this process has, outside of what is measured."""
    from vnet_lock.kernel.processes import read_boot_id, this_process
    from vnet_lock.model import Owner, OwnerKind
    from vnet_lock.session import Session
    from vnet_lock.settings import DEFAULT

    owner = Owner(OwnerKind.QEMU, "bench", read_boot_id(DEFAULT), process=this_process(DEFAULT))
    Session(DEFAULT).release(owner)


def time_import() -> float:
    """Seconds that an interpreter takes to load pyroute2."""
    started = time.monotonic()
    subprocess.run(IMPORT, check=True)
    return time.monotonic() - started


if __name__ == "__main__":
    for row in rows():
        print(
            f"{row.what:90} {row.measured * 1e3:6.1f} ms  {row.floor * 1e3:6.1f} ms  {row.ratio:.2f}",
            row.is_met,
        )
    sys.exit(os.EX_OK)
