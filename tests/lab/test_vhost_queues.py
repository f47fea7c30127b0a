"""socket+vhost with several queues, used by a guest with as many CPUs or fewer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.test_vhost_user import NET, NIC, NO_OFFLOADS, machine
from tests.lab.wire import ADDRESS

pytestmark = pytest.mark.timeout(900)


def test_several_queues_carry_packets_each(tmp_path: Path) -> None:
    with machine(tmp_path, "-smp", "2", net=f"{NET},queues=2") as made:
        made.check_transfers()
        assert made.run("[ -e /sys/class/net/eth0/queues/rx-1 ]") == "0"
        # Flows from many ports spread over both queues, each of which has its interrupt.
        flows = "; ".join(f"nc -w 1 {ADDRESS} {port} </dev/null 2>/dev/null" for port in range(6000, 6024))
        made.run(flows)
        used = "grep -E 'input.{}$' /proc/interrupts | grep -qE ':.* [1-9][0-9]* '"
        assert [made.run(used.format(queue)) for queue in (0, 1)] == ["0", "0"]


def test_a_guest_with_one_cpu_and_no_offloads_uses_one_of_two_queues(tmp_path: Path) -> None:
    with machine(tmp_path, net=f"{NET},queues=2", nic=f"{NIC},{NO_OFFLOADS}") as made:
        made.check_transfers()
        flows = " && ".join(f"ping -q -c 1 -W 2 {ADDRESS} >/dev/null" for _ in range(8))
        assert made.run(flows) == "0"
