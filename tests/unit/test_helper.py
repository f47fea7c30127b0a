"""What qemu-net-helper understands and says, without a host: no test here gets as far as a claim."""

from __future__ import annotations

import json
import os
import socket

import pytest

from vnet_lock.backends import Connection
from vnet_lock.combination import Backend, Combination, Policy, Port
from vnet_lock.errors import BadInput, Refused, Unsupported
from vnet_lock.front import helper, helper_message
from vnet_lock.front.helper_words import Target, Words, fill, read_intent, read_words
from vnet_lock.settings import DEFAULT, Settings


def intent_of(line: str, as_json: bool = True):
    words = read_words([*line.split(), "--socketpair=9" if as_json else "--fd=9"])
    assert words.problem == ""
    return read_intent(words)


def test_both_spellings_of_a_word_are_understood():
    assert intent_of("--mode vepa --dev eth0") == intent_of("--mode=vepa --dev=eth0")


def test_all_words_together():
    intent = intent_of(
        "--mode=bridge --dev=eth0 --dev=0:af:06.0 --port=sriov --protocols=tap,vhost"
        " --mac=52-54-00-00-00-0A --vlan=42 --queues=4"
    )
    assert (intent.policy, intent.ports) == (Policy.VEB, (Port.SRIOV,))
    assert intent.devs == ("eth0", "0000:af:06.0")
    assert intent.backends == (Backend.TAP_VHOST, Backend.TAP)
    assert (intent.mac, intent.vlan, intent.queues) == ("52:54:00:00:00:0a", 42, 4)


def test_a_comma_ends_no_value():
    intent = intent_of("--mode=vepa --dev=a,queues=2")  # a name that the kernel takes
    assert (intent.devs, intent.queues) == (("a,queues=2",), 1)


def test_what_qemu_adds_to_a_helpers_words_is_passed_over():
    words = read_words(["--mode=vepa", "--dev=eth0", "--use-vnet", "--fd=3", "--br=br0"])
    assert (sorted(words.values), words.problem) == (["dev", "fd", "mode"], "")
    assert read_intent(words).devs == ("eth0",)


@pytest.mark.parametrize(
    ("protocols", "as_json", "backends"),
    [
        ("", True, (Backend.TAP_VHOST, Backend.TAP)),
        ("", False, (Backend.TAP,)),
        ("--protocols=tap", True, (Backend.TAP,)),
        # What has no descriptor is not even tried: a VF would be bound to VFIO and back.
        ("--protocols=vfio,tap", True, (Backend.TAP,)),
        ("--protocols=user,vhost,tap", True, (Backend.PASST, Backend.TAP_VHOST, Backend.TAP)),
        # QEMU opens vhost-net itself here.
        ("--protocols=tap,vhost", False, (Backend.TAP,)),
        ("--protocols=socket,tap", False, (Backend.TAP,)),
    ],
)
def test_only_what_can_be_handed_over_is_asked_for(protocols, as_json, backends):
    assert intent_of(f"--mode=vepa --dev=eth0 {protocols}", as_json).backends == backends


@pytest.mark.parametrize(
    ("line", "as_json", "error", "words"),
    [
        ("--dev=eth0", True, BadInput, "--mode= is missing"),
        ("--mode=vepa --dev=eth0 --pool=a", True, BadInput, "--dev= and --pool= exclude each other"),
        ("--mode=vepa --mode=veb --dev=eth0", True, BadInput, "--mode= is there twice"),
        ("--mode=vepa --dev=a/b", True, BadInput, '"a/b" is neither'),
        ("--mode=vepa --dev=eth0 --protocols=tap,shiny", True, BadInput, "shiny"),
        ("--mode=vepa --dev=eth0 --queues=0", True, BadInput, '--queues="0" is not a number from 1'),
        ("--mode=vepa --dev=eth0 --queues=127", True, BadInput, "126 queues"),
        ("--mode=vepa --dev=eth0 --queues=2", False, BadInput, "--socketpair"),
        ("--mode=vepa --dev=eth0 --protocols=vfio", True, Unsupported, "add tap"),
        ("--mode=vepa --dev=eth0 --protocols=socket,vhost", False, Unsupported, "add tap"),
    ],
)
def test_what_makes_no_sense_is_named_in_the_helpers_own_words(line, as_json, error, words):
    with pytest.raises(error, match=r"^[^\n]+$") as caught:
        intent_of(line, as_json)
    assert words in str(caught.value)
    assert "-netdev" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--shiny"], "unknown word '--shiny'"),
        (["mode=vepa"], "unknown word 'mode=vepa'"),
        (["br=br0"], "unknown word 'br=br0'"),
        (["-mode=vepa"], "unknown word '-mode=vepa'"),
        (["--use-vnet=1"], "unknown word '--use-vnet=1'"),
        (["--help", "--mode=vepa"], "unknown word '--help'"),
        (["--mode="], "--mode has no value"),
        (["--mode"], "--mode has no value"),
        (["--fd=3", "--socketpair=4"], "only one of"),
        (["--fd=3", "--fd=4"], "only one of"),
    ],
)
def test_the_first_odd_word_is_named(words, problem):
    assert read_words(words).problem.startswith(problem)


def test_without_a_socket_there_is_nothing_to_do(tmp_path):
    with pytest.raises(
        BadInput, match="--socketpair=FD, --fd=FD or --exec is missing; see: qemu-net-helper --help"
    ):
        helper.run(["--mode=vepa", "--dev=eth0"], Settings.under(tmp_path))


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"]])
def test_help_is_given_where_it_is_all_that_is_asked(words, tmp_path, capsys):
    assert helper.run(words, Settings.under(tmp_path)) == 0
    assert "qemu-net-helper" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_beside_a_socket_help_is_no_success(words, tmp_path):
    """QEMU takes 0 for success."""
    ours, theirs = socket.socketpair()
    with ours:
        with pytest.raises(BadInput, match="unknown word"):
            helper.run([*words, f"--fd={theirs.detach()}"], Settings.under(tmp_path))
        assert ours.recv(1) == b""


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "", "٣", "1_0", "9" * 20, "1048575", "9" * 5000])
@pytest.mark.parametrize("target", ["fd", "socketpair"])
def test_what_is_no_descriptor_is_refused(text, target, tmp_path):
    with pytest.raises(BadInput, match=r"has no value|is not the number of an open socket"):
        helper.run([f"--{target}={text}", "--mode=vepa", "--dev=eth0"], Settings.under(tmp_path))


@pytest.mark.parametrize("target", ["fd", "socketpair"])
def test_a_descriptor_that_is_no_socket_is_refused(target, tmp_path):
    with open(os.devnull) as file, pytest.raises(BadInput, match="is not the number of an open socket"):
        helper.run([f"--{target}={file.fileno()}", "--mode=vepa", "--dev=eth0"], Settings.under(tmp_path))


@pytest.mark.parametrize("target", ["fd", "socketpair"])
def test_a_socket_that_takes_no_descriptors_is_refused(target, tmp_path):
    number = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
    with pytest.raises(BadInput, match="is no unix socket"):
        helper.run([f"--{target}={number}", "--mode=vepa", "--dev=eth0"], Settings.under(tmp_path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--mode=vepa --dev=eth0 --shiny", "unknown word '--shiny'"),
        ("--dev=eth0", "mode= is missing"),
        ("--mode=vepa --dev=eth0 --fd=0", "only one of"),
        # Ours are both ends here.
        ("--mode=vepa --dev=eth0", "one of our own"),
    ],
)
def test_a_refusal_is_sent_as_one_line_and_raised(line, words, tmp_path):
    ours, theirs = socket.socketpair()
    with ours:
        with pytest.raises(BadInput) as caught:
            helper.run([*line.split(), f"--socketpair={theirs.detach()}"], Settings.under(tmp_path))
        data = ours.recv(65536)
        assert ours.recv(1) == b""
    assert data.count(b"\n") == 1
    message = json.loads(data)
    assert message == {"version": 1, "error": {"kind": "input", "message": str(caught.value)}}
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (Refused("VF is held"), "held", "VF is held"),
        (Unsupported("no macvtap"), "unsupported", "no macvtap"),
        # A defect of ours: whoever waits for a line gets one.
        (ZeroDivisionError("a\nb"), "failed", "ZeroDivisionError: a\nb"),
    ],
)
def test_each_kind_of_refusal_has_its_word(error, kind, message):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        helper_message.send_error(theirs, error)
        data = ours.recv(65536)
    assert data.count(b"\n") == 1
    assert json.loads(data)["error"] == {"kind": kind, "message": message}


def test_a_message_that_does_not_fit_at_once_is_sent_to_its_end():
    """The descriptors go with its first byte."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        theirs.settimeout(10)
        data = os.urandom(300_000) + b"\n"
        pid = os.fork()
        if pid == 0:
            try:
                helper_message.send(theirs, data, [theirs.fileno()])
            finally:
                os._exit(0)
        theirs.close()
        first, fds, _, _ = socket.recv_fds(ours, 65536, 4)
        got = first
        os.close(fds[0])
        while more := ours.recv(65536):
            got += more
        os.waitpid(pid, 0)
    assert len(first) < len(data)
    assert (got, len(fds)) == (data, 1)


def message_of(connection: Connection, line: str) -> dict:
    return json.loads(helper_message.encode(connection, intent_of(line)))


def test_with_vhost_there_is_one_more_descriptor_for_each_queue():
    connection = Connection(Combination.parse("vepa-macvlan-tap+vhost"), "52:54:00:00:00:01", (7, 8), (9, 10))
    message = message_of(connection, "--mode=vepa --dev=eth0 --queues=2")
    assert message["fds"] == ["tap", "tap", "vhost", "vhost"]
    assert message["features"] == {"vnet_hdr": True, "vhost": True, "queues": 2}
    assert message["qemu"] == ["-netdev", "tap,id=net0,fds={0}:{1},vhost=on,vhostfds={2}:{3}"]


def test_a_packet_socket_has_frames_without_a_header_and_a_link_that_is_elsewhere():
    connection = Connection(
        Combination.parse("vepa-macvlan-socket"), "52:54:00:00:00:01", (7,), netdev="nosuch0"
    )
    message = message_of(connection, "--mode=vepa --dev=eth0 --protocols=socket")
    assert (message["fds"], message["ifname"], message["ifindex"]) == (["socket"], "nosuch0", None)
    assert message["features"] == {"vnet_hdr": False, "vhost": False, "queues": 1}
    assert message["qemu"] == ["-netdev", "dgram,id=net0,local.type=fd,local.str={0}"]


def test_a_user_network_of_passts_is_a_stream():
    connection = Connection(Combination.parse("nat-socket-passt"), None, (7,))
    message = message_of(connection, "--mode=nat --protocols=user")
    assert (message["fds"], message["ifname"], message["ifindex"]) == (["passt"], None, None)
    assert message["features"] == {"vnet_hdr": False, "vhost": False, "queues": 1}
    assert message["qemu"] == ["-netdev", "stream,id=net0,addr.type=fd,addr.str={0}"]


def test_a_vhost_user_network_is_a_path_and_needs_the_guests_memory():
    connection = Connection(
        Combination.parse("vepa-macvlan-socket+vhost"), "52:54:00:00:00:01", netdev="x0", path="p/s"
    )
    message = message_of(connection, "--mode=vepa --dev=eth0 --protocols=socket,vhost")
    assert message["features"] == {"vnet_hdr": False, "vhost": True, "queues": 1}
    assert "-m {memory}" in " ".join(message["qemu"])
    assert message["qemu"][-1] == "vhost-user,id=net0,chardev=net0-vhost"
    assert message["qemu"][-3].startswith("socket,id=net0-vhost,path=p/s")


def test_plain_frames_of_a_tap_are_told():
    connection = Connection(Combination.parse("veb-bridge-tap"), "52:54:00:00:00:01", (7,))
    assert message_of(connection, "--mode=veb --dev=br0 --raw")["features"]["vnet_hdr"] is False


def test_a_route_and_nat_are_asked_for_in_the_words_of_netdev_host():
    assert intent_of("--mode=route --dev=eth0 --ip=192.0.2.7 --ip=2001:db8::7").addresses == (
        "192.0.2.7",
        "2001:db8::7",
    )
    intent = intent_of("--mode=nat --dhcp=on")
    assert (intent.devs, intent.dhcp) == ((), True)
    assert intent.backends == (Backend.TAP_VHOST, Backend.TAP, Backend.PASST)


@pytest.mark.parametrize(
    ("line", "is_raw"), [("--use-vnet --fd=3 --br=br7", False), ("--fd=3 --br=br7", True)]
)
def test_called_as_qemus_own_bridge_helper_it_opens_a_tap_in_that_bridge(line, is_raw):
    intent = read_intent(read_words(line.split()))
    assert (intent.policy, intent.ports, intent.devs) == (Policy.VEB, (Port.BRIDGE,), ("br7",))
    assert (intent.backends, intent.raw) == ((Backend.TAP,), is_raw)


def command_intent(line: str, command: str):
    words = read_words(["--mode=vepa", "--dev=eth0", *line.split(), "--exec", "--", *command.split()])
    assert (words.problem, words.target) == ("", Target.COMMAND)
    return read_intent(words)


@pytest.mark.parametrize(
    ("line", "command", "backends"),
    [
        ("", "x fd={fd}", (Backend.TAP,)),
        ("", "x {fd} {vhostfd}", (Backend.TAP_VHOST,)),
        ("--queues=2", "x {fds} {vhostfd1}", (Backend.TAP_VHOST,)),
        ("--raw", "x {fd}", (Backend.TAP, Backend.SOCKET)),
        ("--raw --protocols=socket,vhost", "x {fd}", (Backend.SOCKET,)),
        ("--protocols=socket,vhost,tap", "x {fd}", (Backend.SOCKET, Backend.TAP)),
        ("", "x {path}", (Backend.SOCKET_VHOST,)),
    ],
)
def test_a_command_gets_what_it_has_places_for(line, command, backends):
    assert command_intent(line, command).backends == backends


@pytest.mark.parametrize(
    ("line", "command", "words"),
    [
        ("", "x", "COMMAND has no {fd}"),
        ("", "x {mac} {ifname}", "COMMAND has no {fd}"),
        ("", "x {{fd}}", "COMMAND has no {fd}"),
        ("--queues=2", "x {fd2}", "COMMAND has {fd2}, but the queues are numbered 0 to 1"),
        ("", "x {fd} {vhostfd1}", "COMMAND has {vhostfd1}"),
        ("", f"x {{fd{'9' * 5000}}}", "but the queues are numbered 0 to 0"),
        ("", "x {fd00}", "COMMAND has {fd00}"),
        ("--protocols=tap", "x {fd} {vhostfd}", "nothing that fits {fd}, {vhostfd}"),
        ("--raw", "x {fd} {vhostfd}", "nothing that fits"),
        ("", "x {fd} {path}", "nothing that fits"),
    ],
)
def test_a_command_that_could_not_be_filled_is_refused_before_anything_is_made(line, command, words):
    with pytest.raises(BadInput) as caught:
        command_intent(line, command)
    assert words in str(caught.value)


def test_a_commands_name_is_claimed_under_as_it_can_be_shown(monkeypatch, tmp_path):
    def refuse(settings, owner, *_):
        raise Refused(owner.name)

    program = tmp_path / "a\udcff\nb"
    program.touch(0o755)
    monkeypatch.setattr(helper, "_connected", refuse)
    monkeypatch.setattr(helper.signal, "signal", lambda *_: None)
    with pytest.raises(Refused, match=r"^a\?\?b$"):
        helper.run(["--mode=vepa", "--dev=eth0", "--exec", "--", str(program), "{fd}"], DEFAULT)


def test_only_known_places_are_filled():
    values = {"fd": "7", "fds": "7:8", "fd1": "8", "vhostfd": "9", "mac": "m"}
    command = ["a={fd},b={fd1}", "{{fd}}{fd}", "{fds}", "{other} {FD} ${x} {}", "{vhostfd}{mac}"]
    assert fill(command, values.__getitem__) == ["a=7,b=8", "{fd}7", "7:8", "{other} {FD} ${x} {}", "9m"]


def test_what_follows_the_two_dashes_is_the_commands_own():
    words = read_words(["--exec", "--raw", "--", "x", "--mode=veb", "--", "{fd}"])
    assert (words.command, words.problem) == (("x", "--mode=veb", "--", "{fd}"), "")
    assert words.has("raw")
    assert not words.has("mode")


@pytest.mark.parametrize("line", ["--exec", "--exec --", "--mode=vepa --exec"])
def test_a_command_is_needed(line):
    assert "--exec needs a command" in read_words(line.split()).problem


def test_a_command_that_is_not_there_is_refused_before_anything_is_made(tmp_path):
    words = ["--mode=vepa", "--dev=eth0", "--exec", "--", "nosuchprogram", "{fd}"]
    with pytest.raises(Unsupported, match='there is no program "nosuchprogram" in PATH'):
        helper.run(words, Settings.under(tmp_path))


def test_the_words_know_their_target():
    assert Words({"fd": ["3"]}).target is Target.TAP_ONLY
    assert Words({"mode": ["veb"]}).target is None
