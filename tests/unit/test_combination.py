"""The combinations: the list of 2009 and our own, no more and no less."""

from __future__ import annotations

import pytest

from vnet_lock.combination import (
    COMBINATIONS,
    DEFAULT_BACKENDS,
    Backend,
    Combination,
    Policy,
    Port,
    backends_of,
    ports_of,
)

TAPS = "tap tap+vhost"
SOCKETS = "socket socket+vhost"
# The table of combination.py, written a second time by hand.
LIST = {
    "nat-socket": "user passt",
    "nat-bridge": TAPS,
    "route-none": TAPS,
    "route-veth+macvlan": f"{TAPS} {SOCKETS}",
    "veb-bridge": TAPS,
    "veb-macvlan": f"{TAPS} {SOCKETS}",
    "veb-sriov": f"{TAPS} {SOCKETS} vfio",
    "vepa-macvlan": f"{TAPS} {SOCKETS}",
    "vepa-sriov": f"{TAPS} {SOCKETS} vfio",
    "private-macvlan": f"{TAPS} {SOCKETS}",
    "private-sriov": f"{TAPS} {SOCKETS} vfio",
    "private-physdev": f"{SOCKETS} vfio",
}
TEXTS = {f"{front}-{backend}" for front, backends in LIST.items() for backend in backends.split()}


def test_all_combinations_of_the_list_exist_and_no_others() -> None:
    assert {combination.text for combination in COMBINATIONS} == TEXTS
    assert len(COMBINATIONS) == len(TEXTS) == 42  # 37 of 2009, passt, vfio four times


@pytest.mark.parametrize("text", sorted(TEXTS))
def test_a_combination_is_read_as_it_is_written(text: str) -> None:
    assert Combination.parse(text).text == text
    assert Combination.parse(text) in COMBINATIONS


def test_each_pair_of_policy_and_port_outside_the_list_has_no_backends() -> None:
    for policy in Policy:
        for port in Port:
            expected = set(LIST.get(f"{policy}-{port}", "").split())
            assert {str(backend) for backend in backends_of(policy, port)} == expected
            assert (port in ports_of(policy)) == bool(expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vepa",
        "vepa-macvlan",
        "vepa-macvlan-tap-vhost",
        "vepa-macvlan-vfio",
        "nat-sriov-tap",
        "vepa-bridge-tap",
        "VEPA-macvlan-tap",
        "vepa-macvlan-tap ",
        "x-macvlan-tap",
    ],
)
def test_what_is_no_combination_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Combination.parse(text)


def test_bridge_is_another_word_for_veb() -> None:
    assert Combination.parse("bridge-bridge-tap").text == "veb-bridge-tap"
    assert Policy.parse("bridge") is Policy.VEB


def test_backends_are_preferred_in_the_order_of_2009_and_vfio_only_when_asked_for() -> None:
    assert DEFAULT_BACKENDS[:4] == (Backend.TAP_VHOST, Backend.TAP, Backend.SOCKET_VHOST, Backend.SOCKET)
    assert set(Backend) - set(DEFAULT_BACKENDS) == {Backend.VFIO}


def test_every_combination_is_shown_with_guests_in_one_ring_or_the_other() -> None:
    from tests.policies import IN_LAB, IN_NAMESPACES

    assert {*IN_LAB, *IN_NAMESPACES} == set(COMBINATIONS)
    assert not {*IN_LAB} & {*IN_NAMESPACES}
