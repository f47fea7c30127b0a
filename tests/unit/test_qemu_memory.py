"""What becomes of memory words where the guest's memory is to be shared."""

from __future__ import annotations

import shlex

import pytest

from vnet_lock.errors import BadInput
from vnet_lock.qemu_memory import share_memory
from vnet_lock.qemu_words import split_options

MEMFD = "-object memory-backend-memfd,id=shared-ram0,size={},share=on -machine memory-backend=shared-ram0"


def shared(line: str) -> str:
    """The whole command line afterwards."""
    options = split_options(shlex.split(line))
    memory = share_memory(options)
    rest = [word for at, one in enumerate(options) for word in memory.changed.get(at, one.words)]
    return shlex.join([*memory.more, *rest])


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("", "128M"),
        ("-M q35", "128M"),
        ("-machine pc-q35-8.2,accel=kvm", "128M"),
        ("-M microvm", "128M"),
        ("-M pseries", "512M"),
        ("-m 512", "512M"),
        ("-m 2G -M raspi4b", "2G"),
        ("-m 1.5G", "1.5G"),
        ("-m size=512M,slots=4,maxmem=8G", "512M"),
        ("-m slots=4,maxmem=8G", "128M"),
        ("-m 512 -m slots=2,maxmem=4G", "512M"),
        ("-m 512 -m 1024", "1024M"),
        ("-m 0", "128M"),
        ("-M q35,memory.size=1G", "1G"),
        ("-object secret,id=shared0,data=x -m 64", "64M"),
        ("-mem-prealloc -m 64", "64M"),
    ],
)
def test_a_guest_without_a_memory_object_gets_one_of_its_size(line, size):
    assert shared(line) == f"{MEMFD.format(size)} {line}".strip()


def test_the_name_of_ours_is_nobody_elses():
    assert "id=shared-ram1" in shared("-object secret,id=shared-ram0,data=x")


def test_a_folder_for_the_memory_is_kept_in_an_object_of_ours():
    assert shared("-m 64 -mem-path /dev/hugepages -S") == (
        "-object memory-backend-file,id=shared-ram0,size=64M,mem-path=/dev/hugepages,share=on"
        " -machine memory-backend=shared-ram0 -m 64 -S"
    )


@pytest.mark.parametrize(
    "line",
    [
        "-object memory-backend-memfd,id=m,size=64M -M q35,memory-backend=m",
        "-object memory-backend-memfd,id=m,size=64M,share=on -M q35,memory-backend=m",
        "-object memory-backend-file,id=m,size=64M,mem-path=/dev/shm,share=on -machine memory-backend=m",
        "-object memory-backend-memfd,id=m,size=64M,share=on -numa node,memdev=m -m 64",
        (
            '-object \'{"qom-type":"memory-backend-memfd","id":"m","size":67108864,"share":true}\''
            " -M memory-backend=m"
        ),
    ],
)
def test_memory_that_is_shared_already_stays_as_it_is(line):
    assert shared(line) == shlex.join(shlex.split(line))


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "-object memory-backend-ram,id=m,size=64M,prealloc=on -M q35,memory-backend=m",
            "-object memory-backend-memfd,id=m,size=64M,prealloc=on,share=on -M q35,memory-backend=m",
        ),
        (
            (
                "-object memory-backend-ram,id=a,size=64M,share=on"
                " -object qom-type=memory-backend-ram,id=b,size=64M"
                " -numa node,memdev=a -numa node,memdev=b -numa dist,src=0,dst=1,val=20"
            ),
            (
                "-object memory-backend-memfd,id=a,size=64M,share=on"
                " -object memory-backend-memfd,id=b,size=64M,share=on"
                " -numa node,memdev=a -numa node,memdev=b -numa dist,src=0,dst=1,val=20"
            ),
        ),
        (
            '-object \'{"qom-type":"memory-backend-ram","id":"m","size":67108864}\' -M memory-backend=m',
            (
                '-object \'{"qom-type":"memory-backend-memfd","id":"m","size":67108864,"share":true}\''
                " -M memory-backend=m"
            ),
        ),
        (
            "-m 64,slots=1,maxmem=1G -object memory-backend-ram,id=d,size=64M -device pc-dimm,memdev=d",
            MEMFD.format("64M") + " -m 64,slots=1,maxmem=1G"
            " -object memory-backend-memfd,id=d,size=64M,share=on -device pc-dimm,memdev=d",
        ),
    ],
)
def test_memory_that_no_other_can_see_becomes_shared(line, wanted):
    assert shared(line) == wanted


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-object memory-backend-memfd,id=m,size=1G,share=off -M memory-backend=m", "write share=on"),
        ("-object memory-backend-ram,id=m,size=1G,share=off -M memory-backend=m", "write share=on"),
        (
            '-object \'{"qom-type":"memory-backend-ram","id":"m","size":1,"share":false}\' -M q35',
            "write share=on",
        ),
        ("-object memory-backend-file,id=m,size=1G,mem-path=/x -M memory-backend=m", "add share=on"),
        ("-numa node,mem=512", "memdev=node0"),
        ("-numa node,nodeid=0,cpus=0", "memdev=node0"),
        ("-M raspi4b", "by -m"),
        ("-M xenpv -m 64", "Xen"),
        ("-machine q35,accel=xen", "Xen"),
        ("-object '{'", "broken JSON"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_to_write(line, said):
    with pytest.raises(BadInput) as caught:
        shared(line)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
