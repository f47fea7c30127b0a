"""What libvirt's <script> refuses: a device that another has open, or that stands on another's."""

from pathlib import Path

import pytest

from tests.fake_host import FakeHost, rdev_text
from vnet_lock.errors import BadInput, Refused
from vnet_lock.front.ifup import check, main
from vnet_lock.model import Claim, Mode, PciAddress, Resource, State

PF, VF = "0000:01:00.0", "0000:01:10.0"
DAEMON, WEB, OTHER = 4711, 77, 78
TOKEN = "0123456789abcdef"


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A macvtap of a guest's on a VF, one that somebody made on the PF, libvirt's daemon and two guests."""
    host = FakeHost(tmp_path)
    host.add_pf(PF, "enp1s0", ["igbvf"])
    for name, lower, alias in (("late0", "enp1s0v0", f"vnet-lock:{TOKEN}"), ("mine0", "enp1s0", "")):
        host.add_link(name, [lower], uevent="macvtap", alias=alias)
        tap = host.root / f"sys/class/net/{name}/macvtap/tap9"
        tap.mkdir(parents=True)
        (tap / "dev").write_text(rdev_text("/dev/null"))
    host.process(DAEMON, "libvirtd", "/dev/null")
    for pid in (WEB, OTHER):
        host.add_process(pid)
    return host


def claim(host: FakeHost, resource: str, token: str = TOKEN) -> None:
    pf = PciAddress.parse(PF) if resource.startswith("vf:") else None
    made = Claim(
        Resource.parse(resource),
        Mode.EXCLUSIVE,
        State.ACTIVE,
        host.owner(WEB, "web"),
        token,
        "net0",
        1.0,
        pf=pf,
    )
    host.claim(made)


def test_a_device_that_was_made_for_a_living_guest_is_let_through(host: FakeHost) -> None:
    claim(host, f"vf:{VF}")
    check(host.settings, "late0", DAEMON)


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_device_of_a_guest_that_is_gone_is_refused(host: FakeHost, is_dead: bool) -> None:
    if is_dead:
        claim(host, f"vf:{VF}")
        host.remove_process(WEB)
    with pytest.raises(Refused, match="late0 was made for a guest that is gone"):
        check(host.settings, "late0", DAEMON)


def test_what_is_not_ours_is_let_through_where_nobody_has_it(host: FakeHost) -> None:
    host.add_link("tap0", uevent="")
    check(host.settings, "tap0", DAEMON)
    check(host.settings, "mine0", DAEMON)


def test_a_macvtap_that_another_has_open_is_refused(host: FakeHost) -> None:
    """Both would get a part of its packets."""
    claim(host, f"vf:{VF}")
    host.open_file(OTHER, "/dev/null")
    with pytest.raises(Refused, match=rf"late0 is in use by qemu-system-x86 \(pid {OTHER}\)"):
        check(host.settings, "late0", DAEMON)


def test_a_device_on_what_another_holds_is_refused(host: FakeHost) -> None:
    claim(host, f"pf:{PF}", "f" * 16)
    with pytest.raises(Refused, match=rf'mine0 stands on PF {PF}, which is held by qemu "web"'):
        check(host.settings, "mine0", DAEMON)
    host.remove_process(WEB)
    check(host.settings, "mine0", DAEMON)


def test_a_device_on_what_a_damaged_record_is_about_is_refused(host: FakeHost) -> None:
    claims = Path(host.settings.claims_dir)
    (claims / f"pf:{PF}~77~{'f' * 16}.json").write_text("{")
    with pytest.raises(Refused, match="counts as held"):
        check(host.settings, "mine0", DAEMON)


@pytest.mark.parametrize("words", [[], ["a", "b"], ["nosuch0"]])
def test_what_makes_no_sense_is_one_line(
    host: FakeHost, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words, host.settings) == BadInput.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vnet-lock-ifup: ")


@pytest.mark.parametrize(
    ("word", "begin"), [("--help", "usage: vnet-lock-ifup "), ("--version", "vnet-lock-ifup ")]
)
def test_it_says_what_it_is_where_no_device_is_called_so(
    host: FakeHost, word: str, begin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word], host.settings) == 0
    assert capsys.readouterr().out.startswith(begin)
    host.add_link(word, ["enp1s0v0"], uevent="macvtap", alias=f"vnet-lock:{TOKEN}")
    assert main([word], host.settings) == Refused.exit_code
