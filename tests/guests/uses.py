"""What a Linux guest does with its devices, and what the host then finds. Its init is ``guest/programs/init``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import trio
from guests.web import PAGE, web_server

from guest.boot.console import Console
from guest.boot.pattern import check_pattern

MIB = 1024 * 1024
LEASE = b"""#!/bin/sh
[ "$1" != bound ] || ip addr add "$ip/$mask" dev "$interface"
"""
"""For /bin/lease: what udhcpc runs."""

FOUR_TYPES = {"disk": 2, "outside": 1, "ann": 19, "terminal": 3}
"""The devices of ``FOUR_DEVICES`` and their types' numbers."""
FOUR_DEVICES = """
[daemon]
metrics = "127.0.0.1:PORT"

[devices.disk]
type = "blk"
path = "disk.img"
socket = "disk.sock"

[devices.outside]
type = "net"
backend = "user"
host_loopback = true
socket = "outside.sock"

[devices.ann]
type = "vsock"
cid = 3
path = "ann.vsock"
socket = "ann.sock"

[devices.terminal]
type = "console"
backend = "socket"
path = "terminal"
socket = "terminal.sock"
"""


async def disk_keeps(guest: Console, disk: str, image: Path, seed: int) -> None:
    """What is written to the guest's ``disk`` is read there, and is in the host's ``image``."""
    span = f"/dev/{disk} 0 {4 * MIB} {seed}"
    await guest.run(f"diskcheck w write {span} && diskcheck f flush /dev/{disk} && diskcheck v verify {span}")
    assert check_pattern(image, 0, 4 * MIB, seed) == ""


async def page_comes_from_the_host(guest: Console, folder: Path) -> None:
    """By an address from DHCP, and from a server on the host's own 127.0.0.1."""
    (folder / "web").mkdir(exist_ok=True)
    (folder / "web" / "page").write_bytes(PAGE)
    await guest.run("ip link set eth0 up && udhcpc -i eth0 -n -q -s /bin/lease && ping -c 2 -W 5 10.0.2.2")
    with web_server(folder / "web") as port:
        await guest.run(f"wget -q -O /tmp/page http://10.0.2.2:{port}/page", timeout_seconds=60)
    answer = await guest.run("result page $(sha256sum </tmp/page)")
    assert answer.results["page"].split()[0] == hashlib.sha256(PAGE).hexdigest()


async def terminal_speaks_both_ways(guest: Console, folder: Path) -> None:
    """The console's socket is called ``terminal``."""
    async with await trio.open_unix_socket(folder / "terminal") as host:
        await guest.run("exec 3<>/dev/hvc0; stty raw -echo <&3; head -n 1 <&3 >/tmp/typed & echo ready >&3")
        assert await host.receive_some() == b"ready\n"
        await host.send_all(b"hello, guest\n")
        assert (await guest.run("wait $!; exec 3<&-; cat /tmp/typed")).lines == ["hello, guest"]


async def random_bytes_and_sixes_come(guest: Console) -> None:
    """Of two sources of entropy, the guest's kernel uses the one it is told; what it has of the other goes first."""
    source = "/sys/class/misc/hw_random/rng_current"
    drawn = []
    for number in (0, 1):
        await guest.run(f"echo virtio_rng.{number} >{source} && head -c 512 /dev/hwrng >/dev/null")
        answer = await guest.run("head -c 256 /dev/hwrng | hexdump -v -e '1/1 \"%u \"'")
        drawn.append({int(word) for word in " ".join(answer.lines).split()})
    sixes, random = sorted(drawn, key=len)
    assert sixes == {6}
    assert len(random) > 100


SIXES = '''
from virtio import Chain, Device, Queue


class Sixes(Device):
    """An entropy device (virtio 1.3, section 5.4) that throws nothing but sixes."""

    virtio_id = 4
    type_name = "sixes"

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(bytes([6] * min(chain.writable_length, 64)))
'''


async def chips_are_found(guest: Console) -> None:
    """Those of ``PINS_AND_BUS``, by their bus's own name: the board may have another bus."""
    answer = await guest.run(
        "bus=$(grep -l -i virtio /sys/bus/i2c/devices/i2c-*/name) && bus=${bus%/name} && bus=${bus##*-} &&"
        " result found $(i2cdetect -y -r $bus | grep -o -E ' (48|50)') && i2cset -y $bus 0x50 3 0x5a b &&"
        " result byte $(i2cget -y $bus 0x50 3 b)"
    )
    assert answer.results == {"found": "48 50", "byte": "0x5a"}
