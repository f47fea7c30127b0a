from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

import pytest

from vnet_lock.combination import Backend, Combination, Policy, Port
from vnet_lock.errors import BadInput
from vnet_lock.model import PciAddress
from vnet_lock.qemu_argv import read_argv, read_protocols
from vnet_lock.qemu_rewrite import Dialect, rewrite
from vnet_lock.qemu_words import Properties, split_options
from vnet_lock.request import Intent

FDS = "-netdev tap,id=net0,fds=3:4,vhost=on,vhostfds=5:6"
MAC = "52:54:00:aa:bb:cc"


@dataclass(frozen=True)
class Connection:
    combination: Combination
    mac: str | None = None
    fds: tuple[int | str, ...] = ()
    vhost_fds: tuple[int | str, ...] = ()
    pci: PciAddress | None = None
    path: str | None = None
    iommufd: bool = False


TAP = Connection(Combination.parse("vepa-macvlan-tap"), MAC, (3,))
VHOST = Connection(Combination.parse("vepa-macvlan-tap+vhost"), MAC, (3,), (4,))
QUEUES = Connection(Combination.parse("vepa-macvlan-tap+vhost"), MAC, (3, 4), (5, 6))
VFIO = Connection(Combination.parse("veb-sriov-vfio"), MAC, pci=PciAddress.parse("0000:01:10.0"))
VHOST_USER = Connection(Combination.parse("vepa-macvlan-socket+vhost"), MAC, path="/run/a,b")
SHOWN = Connection(TAP.combination, MAC, ("<tap:net0>",))

HOST = "-netdev host,id=net0,mode=vepa,dev=eth0"
DEVICE = "-device virtio-net-pci,netdev=net0,id=n0,bus=pci.1,addr=3"
J = '{"driver":"virtio-net-pci","netdev":"net0","id":"n0","bus":"pci.1"}'
JSON = '{"type":"host","id":"net0","mode":"vepa","dev":["eth0","eth1"],"queues":2}'
SHARED = "-object memory-backend-memfd,id=shared-ram0,size=64M,share=on -machine memory-backend=shared-ram0"
CHARDEV = "-chardev socket,id=net0-vhost,path=/run/a,,b,reconnect-ms=500"

GOLDEN = [
    # what the user wrote, the connection, what QEMU gets
    (
        f"-m 64 {HOST} {DEVICE} disk.img",
        TAP,
        f"-m 64 -netdev tap,id=net0,fd=3 {DEVICE},mac={MAC} disk.img",
    ),
    (f"{HOST} {DEVICE}", SHOWN, f"-netdev 'tap,id=net0,fd=<tap:net0>' {DEVICE},mac={MAC}"),
    (f"{DEVICE} {HOST}", VHOST, f"{DEVICE},mac={MAC} -netdev tap,id=net0,fd=3,vhost=on,vhostfd=4"),
    (
        f"-{HOST} -{DEVICE}",
        TAP,
        f"--netdev tap,id=net0,fd=3 -{DEVICE},mac={MAC}",
    ),
    (
        f"{HOST},mac=52:54:00:00:00:01 {DEVICE}",
        TAP,
        f"-netdev tap,id=net0,fd=3 {DEVICE},mac=52:54:00:00:00:01",
    ),
    (
        f"{HOST} {DEVICE},mac=52:54:00:00:00:01",
        TAP,
        f"-netdev tap,id=net0,fd=3 {DEVICE},mac=52:54:00:00:00:01",
    ),
    (
        f"{HOST},queues=2 {DEVICE}",
        QUEUES,
        f"-netdev tap,id=net0,fds=3:4,vhost=on,vhostfds=5:6 {DEVICE},mac={MAC},mq=on,vectors=6",
    ),
    (
        f"{HOST},queues=2 {DEVICE},mq=on,vectors=9",
        QUEUES,
        f"-netdev tap,id=net0,fds=3:4,vhost=on,vhostfds=5:6 {DEVICE},mq=on,vectors=9,mac={MAC}",
    ),
    (
        f"{HOST},queues=2 -device virtio-net-device,netdev=net0",
        QUEUES,
        f"{FDS} -device virtio-net-device,netdev=net0,mac={MAC},mq=on",
    ),
    (HOST, TAP, "-netdev tap,id=net0,fd=3"),
    (
        "-netdev id=net0,type=host,mode=vepa,dev=eth0 -device netdev=net0,driver=e1000",
        TAP,
        f"-netdev tap,id=net0,fd=3 -device netdev=net0,driver=e1000,mac={MAC}",
    ),
    (
        f"{HOST} -device 'virtio-net-pci,netdev=net0,romfile=/a,,b'",
        TAP,
        f"-netdev tap,id=net0,fd=3 -device 'virtio-net-pci,netdev=net0,romfile=/a,,b,mac={MAC}'",
    ),
    (
        f"-netdev '{JSON}' -device '{J}'",
        QUEUES,
        f"""{FDS} -device '{J[:-1]},"mac":"{MAC}","mq":true,"vectors":6}}'""",
    ),
    # vfio: the device itself
    (
        f"{HOST} {DEVICE},mac=52:54:00:00:00:01,mrg_rxbuf=off,vectors=4,bootindex=1",
        VFIO,
        "-nic none -device vfio-pci,host=0000:01:10.0,id=n0,bus=pci.1,addr=3,bootindex=1",
    ),
    (
        f"-nodefaults {HOST} -device e1000,netdev=net0,addr=5.0,multifunction=on",
        VFIO,
        "-nodefaults -device vfio-pci,host=0000:01:10.0,addr=5.0,multifunction=on",
    ),
    (
        f"{HOST} -netdev user,id=u -device e1000,netdev=u",
        VFIO,
        "-device vfio-pci,host=0000:01:10.0 -netdev user,id=u -device e1000,netdev=u",
    ),
    (HOST, VFIO, "-nic none -device vfio-pci,host=0000:01:10.0"),
    (
        f"-nodefaults {HOST} -device '{J}'",
        VFIO,
        """-nodefaults -device '{"driver":"vfio-pci","host":"0000:01:10.0","id":"n0","bus":"pci.1"}'""",
    ),
    # -nic
    (
        "-nic host,id=net0,mode=vepa,dev=eth0",
        TAP,
        f"-netdev tap,id=net0,fd=3 -device virtio-net-pci,netdev=net0,mac={MAC}",
    ),
    (
        "-nic host,id=net0,mode=vepa,dev=eth0,model=e1000,addr=4,bootindex=1,mac=52:54:00:00:00:01",
        TAP,
        "-netdev tap,id=net0,fd=3 -device e1000,netdev=net0,addr=4,bootindex=1,mac=52:54:00:00:00:01",
    ),
    (
        "-nic host,id=net0,mode=vepa,dev=eth0,queues=2,model=virtio",
        QUEUES,
        f"{FDS} -device virtio-net-pci,netdev=net0,mac={MAC},mq=on,vectors=6",
    ),
    (
        "-nic host,id=net0,mode=veb,dev=eth0,addr=4",
        VFIO,
        "-nic none -device vfio-pci,host=0000:01:10.0,addr=4",
    ),
    # -net, the hub
    (
        "-net nic,model=virtio,addr=4 -net host,id=net0,mode=vepa,dev=eth0",
        TAP,
        f"-net nic,model=virtio,addr=4,macaddr={MAC} -net tap,id=net0,fd=3",
    ),
    (
        "-net host,id=net0,mode=vepa,dev=eth0 -net nic,macaddr=52:54:00:00:00:01",
        TAP,
        "-net tap,id=net0,fd=3 -net nic,macaddr=52:54:00:00:00:01",
    ),
    (
        "-net nic,model=virtio,addr=4 -net host,id=net0,mode=veb,dev=eth0",
        VFIO,
        "-device vfio-pci,host=0000:01:10.0,addr=4 -nic none",
    ),
    (
        f"{HOST} -net nic,netdev=net0,model=virtio",
        TAP,
        f"-netdev tap,id=net0,fd=3 -net nic,netdev=net0,model=virtio,macaddr={MAC}",
    ),
    # vhost-user: the guest's memory is shared
    (
        f"-M q35 -m 64 {HOST},queues=2 {DEVICE}",
        VHOST_USER,
        (
            f"{SHARED} -M q35 -m 64 {CHARDEV} -netdev vhost-user,id=net0,chardev=net0-vhost,queues=2"
            f" {DEVICE},mac={MAC},mq=on,vectors=6"
        ),
    ),
    (
        f"-object memory-backend-ram,id=m,size=64M {HOST} -M memory-backend=m",
        VHOST_USER,
        (
            f"-object memory-backend-memfd,id=m,size=64M,share=on {CHARDEV}"
            " -netdev vhost-user,id=net0,chardev=net0-vhost -M memory-backend=m"
        ),
    ),
    # words that only look like ours
    ("-append host,mode=vepa -netdev user,id=host -name host", TAP, None),
    ("-snapshot -drive file=-netdev,,host -kernel -x", TAP, None),
    ("-netdev", TAP, None),
]


@pytest.mark.parametrize(("given", "connection", "wanted"), GOLDEN)
def test_qemu_gets_what_it_knows_in_place_of_host_words(given, connection, wanted):
    argv = read_argv(shlex.split(given))
    made = rewrite(argv, {intent.interface: connection for intent in argv.intents})
    assert made == shlex.split(given if wanted is None else wanted)
    assert not read_argv(made).hosts


def test_several_networks_each_get_their_own():
    line = f"{HOST} {DEVICE} -nic host,mode=veb,dev=eth1 -nic host,mode=veb,dev=eth2 -netdev user,id=host0"
    argv = read_argv(shlex.split(line))
    assert [intent.interface for intent in argv.intents] == ["net0", "host1", "host2"]
    made = rewrite(argv, {"net0": VHOST, "host1": VFIO, "host2": TAP})
    assert made == shlex.split(
        f"-netdev tap,id=net0,fd=3,vhost=on,vhostfd=4 {DEVICE},mac={MAC} -device vfio-pci,host=0000:01:10.0 "
        f"-netdev tap,id=host2,fd=3 -device virtio-net-pci,netdev=host2,mac={MAC} -netdev user,id=host0"
    )


def test_functions_share_one_iommufd_where_kernel_and_qemu_have_it():
    line = "-nic host,mode=veb,dev=eth1 -nic host,mode=veb,dev=eth2,addr=5 -nic host,mode=veb,dev=eth3"
    modern, old = replace(VFIO, iommufd=True), replace(VFIO, pci=PciAddress.parse("0000:01:10.2"))
    argv = read_argv(line.split())
    connections = {"host0": modern, "host1": modern, "host2": old}
    assert rewrite(argv, connections, Dialect(iommufd=True)) == shlex.split(
        "-object iommufd,id=vnet-iommufd -nic none -device vfio-pci,host=0000:01:10.0,iommufd=vnet-iommufd "
        "-device vfio-pci,host=0000:01:10.0,addr=5,iommufd=vnet-iommufd -device vfio-pci,host=0000:01:10.2"
    )
    assert "iommufd" not in " ".join(rewrite(argv, connections))
    assert "iommufd" not in " ".join(rewrite(argv, dict.fromkeys(connections, old), Dialect(iommufd=True)))


def test_every_key_reaches_the_intent():
    line = (
        "-netdev host,id=net0,mode=bridge,dev=eth0,dev=af:06.2,port=sriov,protocols=vfio:tap:vhost,"
        "mac=52-54-00-AA-BB-CC,vlan=42,queues=4"
    )
    assert read_argv(line.split()).intents == (
        Intent(
            interface="net0",
            policy=Policy.VEB,
            devs=("eth0", "0000:af:06.2"),
            ports=(Port.SRIOV,),
            backends=(Backend.VFIO, Backend.TAP_VHOST, Backend.TAP),
            mac=MAC,
            vlan=42,
            queues=4,
        ),
    )


def test_what_is_not_said_is_left_to_us():
    (intent,) = read_argv(HOST.split()).intents
    assert intent == Intent(interface="net0", policy=Policy.VEPA, devs=("eth0",))


@pytest.mark.parametrize(
    ("text", "backends"),
    [
        ("tap", "tap"),
        ("tap:vhost", "tap+vhost tap"),
        ("vhost:tap", "tap+vhost tap"),
        ("vfio", "vfio"),
        ("vfio:tap:vhost", "vfio tap+vhost tap"),
        ("tap:socket:vhost", "tap+vhost tap socket+vhost socket"),
        ("user", "passt user"),
        ("tap:tap", "tap"),
    ],
)
def test_protocols_are_backends_in_their_order(text, backends):
    assert read_protocols(text, "here") == tuple(Backend(word) for word in backends.split())


def test_vhost_is_not_tried_for_a_device_that_is_no_virtio():
    (intent,) = read_argv([*HOST.split(), "-device", "e1000,netdev=net0"]).intents
    assert intent.backends == (Backend.TAP, Backend.SOCKET, Backend.PASST, Backend.USER)
    hub = ["-net", "nic,model=virtio", "-net", "host,mode=vepa,dev=eth0,protocols=tap:vhost"]
    (intent,) = read_argv(hub).intents
    assert intent.backends == (Backend.TAP,)


def test_vfio_is_not_tried_for_a_device_that_is_not_on_pci():
    line = [*f"{HOST},protocols=vfio:tap".split(), "-device", "virtio-net-device,netdev=net0"]
    assert read_argv(line).intents[0].backends == (Backend.TAP,)


BAD = [
    ("-netdev host,id=net0,moed=vepa,dev=eth0", 'unknown key "moed"; known: id, mode, dev, pool, port'),
    ("-netdev host,id=net0,dev=eth0", "mode= is missing"),
    ("-netdev host,mode=vepa,dev=eth0", "id= is missing"),
    ("-netdev host", "id= is missing"),
    ("-netdev host,id=0net,mode=vepa,dev=eth0", '"0net" is no id'),
    (
        "-netdev host,id=net0,mode=vebpa,dev=eth0",
        'unknown mode "vebpa"; one of nat, route, veb, vepa, private',
    ),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,port=bridge", 'mode=vepa has no port "bridge"'),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,protocols=tab", 'unknown protocol "tab"'),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,protocols=tap::vhost", 'unknown protocol ""'),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,protocols=vhost", "write tap:vhost or socket:vhost"),
    ("-netdev host,id=net0,mode=vepa,dev=eth0/1", '"eth0/1" is neither the name of a network device nor'),
    ("-netdev host,id=net0,mode=vepa,dev=0000:af:06.9", "nor a PCI address"),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,mac=1:2:3", "is not the MAC address of one device"),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,mac=01:00:5e:00:00:01", "is not the MAC address of one device"),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,mac=00:00:00:00:00:00", "is not the MAC address of one device"),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,vlan=0", 'vlan="0" is not a number from 1 to 4094'),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,vlan=4095", "is not a number from 1 to 4094"),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,queues=many", 'queues="many" is not a number from 1 to 256'),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,queues=²", "is not a number from 1 to 256"),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,vlan=1,vlan=2", "vlan= is there twice"),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,queues", "queues has no value"),
    ("-netdev host,id=net0,mode=vepa,dev=", "dev has no value"),
    (f"{HOST},pool=fabric-a", "dev= and pool= exclude each other; leave one"),
    ("-netdev host,id=net0,mode=vepa,dev=eth0,model=e1000", 'unknown key "model"'),
    ("-nic host,mode=vepa,dev=eth0,mdoel=e1000", 'unknown key "mdoel"'),
    ("-net host,mode=vepa,dev=eth0,queues=2", "queues=2 needs a virtio-net device"),
    ("-nic host,mode=vepa,dev=eth0,queues=2,model=e1000", "queues=2 needs a virtio-net device"),
    (f"{HOST} -netdev user,id=net0", 'the network id "net0" is there twice'),
    (f"{HOST} {DEVICE} -device e1000,netdev=net0", "2 devices are on it"),
    ("-net nic -net nic -net host,mode=vepa,dev=eth0", "2 devices are on it"),
    ("-net host,mode=vepa,dev=eth0 -net host,mode=vepa,dev=eth1", "only one host network fits the hub"),
    (f"{HOST},mac=52:54:00:00:00:01 {DEVICE},mac=52:54:00:00:00:02", "leave one of them"),
    (f"{HOST},protocols=vfio -device usb-net,netdev=net0", "none of its protocols goes with usb-net"),
    ("""-netdev '{"type":"host",'""", "broken JSON"),
    (f"-netdev '{JSON[:-1]},\"vlan\":[1,2]}}'", "vlan takes one value"),
    (f"-netdev '{JSON[:-1]},\"mac\":{{}}}}'", "mac takes one value"),
    ("""-netdev '{"type":"host","id":["net0"],"mode":"vepa"}'""", "id takes one value"),
    ("""-netdev '{"type":["host"],"id":"net0","mode":"vepa"}'""", "type takes one value"),
    ("""-netdev '{"type":"host","id":"net0","mode":"vepa","dev":[["a"]]}'""", "one value or a list of them"),
    ("""-netdev '{"type":"host","id":"net0","mode":"vepa","dev":["a",null]}'""", "dev has no value"),
    ("""-netdev '{"type":"host","id":"net0","mode":"vepa","dev":[]}'""", "dev has no value"),
    (f'{HOST} -device \'{{"netdev":"net0","driver":{"[" * 2000}\'', "broken JSON: nested too deeply"),
    (f'{HOST} -device \'{{"netdev":"net0","x":{"9" * 5000}}}\'', "broken JSON: a number has too"),
    ("-netdev host,id=net0,mode=route,dev=eth0", "mode=route needs the guest's own address: add ip="),
    (f"{HOST},ip=192.0.2.7", "mode=vepa takes no ip="),
    ("-netdev host,id=net0,mode=route,dev=eth0,ip=192.0.2.7/24", "'192.0.2.7/24' is no IP address"),
    ("-netdev host,id=net0,mode=route,dev=eth0,ip=fe80::7", "fe80::7 is link-local: no address that can be"),
    ("-netdev host,id=net0,mode=nat,dhcp=yes", 'dhcp="yes" is neither on nor off'),
    (f"{HOST},dhcp=on", "mode=vepa has no DHCP server of ours"),
]


def test_a_routed_guests_addresses_are_as_the_kernel_writes_them():
    line = "-netdev host,id=net0,mode=route,dev=eth0,ip=2001:DB8:0::7,ip=192.0.2.7,ip=2001:db8::7"
    assert read_argv(line.split()).intents[0].addresses == ("2001:db8::7", "192.0.2.7")


@pytest.mark.parametrize(
    ("words", "dhcp"),
    [
        ("-nic host,mode=nat,dhcp=on", True),
        ("-nic host,mode=nat,dhcp=off", False),
        ("-nic host,mode=nat", False),
    ],
)
def test_a_nat_guest_needs_no_device_and_may_have_a_dhcp_server(words, dhcp):
    (intent,) = read_argv(words.split()).intents
    assert (intent.devs, intent.dhcp) == ((), dhcp)


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_word_is_named_with_its_reason(line, reason):
    with pytest.raises(BadInput) as caught:
        read_argv(shlex.split(line))
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert "host" in message or "net0" in message


def test_one_mac_said_twice_is_one_mac():
    line = f"{HOST},mac={MAC.upper()} {DEVICE},mac={MAC}"
    assert read_argv(line.split()).intents[0].mac == MAC


@pytest.mark.parametrize(
    ("line", "name", "daemonize", "pidfile"),
    [
        ("-name web1", "web1", False, None),
        ("-name web1,process=qemu-web1", "web1", False, None),
        ("-name debug-threads=on,guest=web1 --daemonize -pidfile /x", "web1", True, "/x"),
        ("-name debug-threads=on -pidfile /x --pidfile /y", None, False, "/y"),
        ("-append -daemonize -m 64", None, False, None),
        ("-name {a}", "{a}", False, None),  # QEMU takes no JSON there
        ("-name {a -run-with {b", "{a", False, None),
    ],
)
def test_what_the_wrapper_must_know_is_found(line, name, daemonize, pidfile):
    argv = read_argv(line.split())
    assert (argv.name, argv.daemonize, argv.pidfile) == (name, daemonize, pidfile)


def test_a_network_after_an_option_without_value_that_we_do_not_know_is_found():
    assert len(read_argv(["-brand-new", *HOST.split()]).hosts) == 1


@pytest.mark.parametrize("line", [given for given, _, _ in GOLDEN])
def test_splitting_a_line_loses_no_word(line):
    words = shlex.split(line)
    assert [word for option in split_options(words) for word in option.words] == words


@pytest.mark.parametrize(
    "text",
    ["", "virtio-net-pci", "e1000,netdev=n0", "a,,b,c=d,,e", "id=x,flag", '{"driver":"e1000","mq":true}'],
)
def test_properties_are_written_as_they_were_read(text):
    assert Properties.parse(text, "driver").text == text


HOSTFWD = '{"type":"user","id":"n1","hostfwd":[{"str":"tcp::2222-:22"},{"str":"tcp::8080-:80"}]}'
FDS_OF_RSS = '{"driver":"virtio-net-pci","netdev":"net0","ebpf-rss-fds":["5"],"mac":"52:54:00:aa:bb:cc"}'


def test_lists_in_json_stay_lists():
    for text in (HOSTFWD, FDS_OF_RSS, '{"driver":"x","empty":[]}'):
        assert Properties.parse(text, "driver").text == text
    argv = read_argv([*HOST.split(), "-netdev", HOSTFWD, "-device", FDS_OF_RSS])
    assert rewrite(argv, {"net0": TAP})[2:] == ["-netdev", HOSTFWD, "-device", FDS_OF_RSS]


def test_an_older_qemu_is_told_to_connect_again_in_its_own_words():
    argv = read_argv(shlex.split(f"-m 64 {HOST}"))
    made = rewrite(argv, {"net0": VHOST_USER}, Dialect(("reconnect", 1)))
    assert "socket,id=net0-vhost,path=/run/a,,b,reconnect=1" in made


def test_memory_that_cannot_be_shared_is_refused_only_where_it_has_to_be():
    argv = read_argv(shlex.split(f"-numa node,mem=64 {HOST}"))
    assert rewrite(argv, {"net0": TAP})
    with pytest.raises(BadInput, match="memdev=node0"):
        rewrite(argv, {"net0": VHOST_USER})


@pytest.mark.parametrize(
    ("line", "user"),
    [
        ("-S", None),
        ("-runas qemu", "qemu"),
        ("-run-with user=64055:106", "64055:106"),
        ("-run-with async-teardown=on", None),
        ("-run-with chroot=/x,user=qemu", "qemu"),
    ],
)
def test_the_user_that_qemu_becomes_is_known(line, user):
    assert read_argv(line.split()).run_as == user


def test_a_device_beside_json_devices_is_json_and_is_made_after_their_buses():
    bus = '{"driver":"pcie-root-port","id":"pci.1"}'
    argv = read_argv(["-device", bus, "-nic", "host,mode=veb,dev=eth0,bus=pci.1,addr=0x0,bootindex=1"])
    (intent,) = argv.intents
    made = rewrite(argv, {intent.interface: VFIO})
    assert made[-1] == (
        '{"driver":"vfio-pci","host":"0000:01:10.0","bus":"pci.1","addr":"0x0","bootindex":1}'
    )
    assert '"netdev":"host0","addr":"0x0","bus":"pci.1","bootindex":1' in rewrite(
        argv, {intent.interface: TAP}
    )[-1].replace('"bus":"pci.1","addr":"0x0"', '"addr":"0x0","bus":"pci.1"')


@pytest.mark.parametrize("text", ["first", "9" * 5000])
def test_what_is_no_number_beside_json_devices_is_qemus_to_refuse(text):
    bus = '{"driver":"pcie-root-port","id":"pci.1"}'
    argv = read_argv(["-device", bus, "-nic", f"host,mode=veb,dev=eth0,bus=pci.1,bootindex={text}"])
    assert f'"bootindex":"{text}"' in rewrite(argv, {argv.intents[0].interface: VFIO})[-1]
