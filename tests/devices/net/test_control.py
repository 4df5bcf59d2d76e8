"""The control queue of the network device (5.1.6.5), the link, the MTU and announcements."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator

import pytest
from kit.front_end.frontend import Guest, Plugged, Setting, every_native_setting, every_reactor, plugged
from kit.front_end.links import SocketLink, WaistLink
from kit.guest.blk import pattern

from virtio.backend.backend import Backend
from virtio.devices.net.device import Net, NetOptions
from virtio.errors import PeerError
from virtio.native.nic import NicCounters
from virtio.native.worker import Worker

RX, MAC, VLAN, ANNOUNCE, MQ = range(5)
OK, ERR = b"\0", b"\1"
RECEIVE, TRANSMIT, CONTROL = 0, 1, 2
PLAIN = bytes(12)
BROADCAST = b"\xff" * 6
GROUP, OTHER_GROUP = bytes.fromhex("01005e000001"), bytes.fromhex("01005e000002")
F_CTRL_VQ, F_CTRL_RX, F_ANNOUNCE, F_MQ, F_MAC_ADDR = 1 << 17, 1 << 18, 1 << 21, 1 << 22, 1 << 23
SEND_RARP, SET_MTU = 19, 20


def net(queues: int = 1, **options: object) -> Net:
    return Net("lan", NetOptions(**options), queues, 256)


async def command(guest: Guest, number: int, what: int, data: bytes = b"", queue: int = CONTROL) -> bytes:
    """The device's acknowledgement."""
    used = await guest.queues[queue].request([bytes([number, what]), *([data] if data else [])], [1])
    assert used.written == 1
    return used.buffers[0]


class Port:
    """A guest on a switch."""

    def __init__(self, guest: Guest, device: Net) -> None:
        self.guest = guest
        self.device = device

    def listen(self, count: int = 8) -> None:
        for _ in range(count):
            self.guest.queues[RECEIVE].driver.add([], [1600])

    async def send(self, to: bytes, payload: bytes) -> None:
        frame = to + self.device.mac + payload
        await self.guest.queues[TRANSMIT].request([PLAIN, frame], [])

    async def heard(self) -> bytes:
        """The payload of the one frame that came since the last time."""
        (used,) = await self.guest.queues[RECEIVE].used()
        return b"".join(used.buffers)[: used.written][12 + 12 :]


@contextlib.asynccontextmanager
async def two_ports(setting: Setting) -> AsyncIterator[tuple[Port, Port]]:
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(Worker("lan", reactor=setting.reactor))
        ports = []
        for name in ("one", "two"):
            device = Net(name, NetOptions(backend="switch", switch="lan"), 1, 256)
            stack.callback(device.close)
            backend = await stack.enter_async_context(Backend(device, workers=[worker]))
            guest = Guest(WaistLink(backend), setting.ring)
            stack.callback(guest.close)
            await guest.start()
            ports.append(Port(guest, device))
        yield ports[0], ports[1]


# ---- what it obeys ----


@every_reactor
async def test_a_driver_hears_only_what_it_asked_for(setting: Setting) -> None:
    async with two_ports(setting) as (one, two):
        two.listen(16)
        await one.send(OTHER_GROUP, b"before it said anything")
        assert await two.heard() == b"before it said anything"
        assert await command(two.guest, RX, 0, b"\0") == OK
        table = struct.pack("<I", 1) + bytes.fromhex("025e10000009") + struct.pack("<I", 1) + GROUP
        assert await command(two.guest, MAC, 0, table) == OK
        for unwanted in (OTHER_GROUP, bytes.fromhex("025e10000008")):
            await one.send(unwanted, b"unwanted")
        for wanted in (BROADCAST, two.device.mac, bytes.fromhex("025e10000009"), GROUP):
            await one.send(wanted, wanted)
            assert await two.heard() == wanted
        assert two.device.native_device.counters() == NicCounters(filtered=2)
        assert await command(two.guest, RX, 1, b"\1") == OK  # all groups
        await one.send(OTHER_GROUP, b"groups")
        assert await two.heard() == b"groups"
        assert await command(two.guest, RX, 1, b"\0") == OK
        assert await command(two.guest, RX, 0, b"\1") == OK
        await one.send(OTHER_GROUP, b"everything")
        assert await two.heard() == b"everything"


@every_reactor
async def test_more_addresses_than_there_is_room_for_let_everything_through(setting: Setting) -> None:
    async with two_ports(setting) as (one, two):
        two.listen()
        assert await command(two.guest, RX, 0, b"\0") == OK
        groups = b"".join(GROUP[:4] + struct.pack(">H", number) for number in range(1000))
        assert await command(two.guest, MAC, 0, struct.pack("<II", 0, 1000) + groups) == OK
        await one.send(bytes.fromhex("025e10000009"), b"who knows")
        assert await two.heard() == b"who knows"


@every_reactor
async def test_too_many_addresses_of_one_driver_let_nothing_through_to_the_next(setting: Setting) -> None:
    async with two_ports(setting) as (one, two):
        assert await command(two.guest, RX, 0, b"\0") == OK
        groups = b"".join(GROUP[:4] + struct.pack(">H", number) for number in range(1000))
        assert await command(two.guest, MAC, 0, struct.pack("<II", 0, 1000) + groups) == OK
        await two.guest.link.reset()
        two.guest.forget_queues()
        await two.guest.start()
        two.listen()
        assert await command(two.guest, RX, 0, b"\0") == OK
        await one.send(bytes.fromhex("025e10000009"), b"unwanted")
        await one.send(two.device.mac, b"wanted")
        assert await two.heard() == b"wanted"
        assert two.device.native_device.counters() == NicCounters(filtered=1)


@every_reactor
async def test_a_driver_may_go_by_another_address_until_it_starts_anew(setting: Setting) -> None:
    mine = bytes.fromhex("025e10000077")
    async with plugged(net(), setting) as p:
        assert isinstance(p.device, Net)
        assert await command(p.guest, MAC, 1, mine) == OK
        assert await p.guest.link.read_config(0, 6) == mine
        await p.guest.link.reset()
        assert await p.guest.link.read_config(0, 6) == p.device.mac


@every_native_setting
async def test_the_driver_says_how_many_pairs_it_uses(setting: Setting) -> None:
    device = net(queues=4)
    async with plugged(device, setting, workers=2) as p:
        assert await p.guest.link.queue_count() == 9
        assert await p.guest.link.read_config(8, 2) == b"\4\0"
        assert device.native_device.active_pairs == 1
        for pairs in (4, 1, 3):
            assert await command(p.guest, MQ, 0, struct.pack("<H", pairs), queue=8) == OK
            assert device.native_device.active_pairs == pairs
        for pairs in (0, 5, 0x8000, 0xFFFF):
            assert await command(p.guest, MQ, 0, struct.pack("<H", pairs), queue=8) == ERR
        assert device.native_device.active_pairs == 3
        await p.guest.link.stop(2)  # and a pair that does not run is not in use, whatever was said
        assert device.native_device.active_pairs == 1


@every_reactor
async def test_without_multiqueue_the_control_queue_comes_after_the_first_pair(setting: Setting) -> None:
    """5.1.2: its place depends on what was negotiated."""
    device = net(queues=4)
    async with plugged(device, setting, start=False) as p:
        await p.guest.negotiate(without=F_MQ)
        await p.guest.link.share(p.guest.memory)
        for index in range(3):
            p.guest.add_queue(64)
            await p.guest.start_queue(index)
        assert await command(p.guest, MAC, 1, bytes.fromhex("025e10000077")) == OK
        assert await command(p.guest, MQ, 0, b"\1\0") == ERR


@every_reactor
async def test_without_a_control_queue_all_pairs_that_run_are_in_use(setting: Setting) -> None:
    """As with QEMU, which obeys its guest itself and enables the rings that are used."""
    device = net(queues=4)
    async with plugged(device, setting, start=False) as p:
        await p.guest.negotiate(without=F_CTRL_VQ)
        await p.guest.link.share(p.guest.memory)
        for index in range(8):
            p.guest.add_queue(64)
            await p.guest.start_queue(index)
        assert device.native_device.active_pairs == 4
        for pair in (3, 2):
            await p.guest.link.enable(2 * pair, False)
            assert device.native_device.active_pairs == pair
        await p.guest.link.enable(4, True)
        assert device.native_device.active_pairs == 3


# ---- what it does not obey ----


@every_native_setting
@pytest.mark.parametrize(
    ("number", "what", "data"),
    [
        (RX, 0, b""),
        (RX, 0, b"\2"),
        (RX, 0, b"\1\1"),
        (RX, 2, b"\1"),  # RX_EXTRA, which is not offered
        (MAC, 0, b""),
        (MAC, 0, struct.pack("<II", 0, 0)[:7]),
        (MAC, 0, struct.pack("<II", 1, 0)),  # an entry that is not there
        (MAC, 0, struct.pack("<II", 0xFFFFFFFF, 0) + bytes(60)),
        (MAC, 0, struct.pack("<II", 0, 0x2AAAAAAB) + bytes(2)),  # 6 times that is 2 in 32 bits
        (MAC, 0, struct.pack("<II", 0, 0) + b"x"),
        (MAC, 1, bytes(5)),
        (MAC, 1, bytes(7)),
        (MAC, 2, bytes(6)),
        (VLAN, 0, b"\1\0"),
        (ANNOUNCE, 0, b"x"),
        (ANNOUNCE, 1, b""),
        (MQ, 0, b"\1\0"),  # MQ was not offered: there is one pair
        (MQ, 1, bytes(100)),
        (6, 0, b""),
        (255, 255, pattern(3000, 1)),
    ],
    ids=str,
)
async def test_a_command_of_the_wrong_kind_or_size_is_refused_and_changes_nothing(
    setting: Setting, number: int, what: int, data: bytes
) -> None:
    async with plugged(net(backend="switch", switch="lan"), setting) as p:
        assert await command(p.guest, number, what, data) == ERR
        assert p.op("control", CONTROL) == (1, 1)
        assert await command(p.guest, RX, 0, b"\1") == OK


@every_reactor
@pytest.mark.parametrize("piece", [b"", b"\4"], ids=len)
async def test_a_command_without_class_or_number_is_refused(setting: Setting, piece: bytes) -> None:
    async with plugged(net(), setting) as p:
        used = await p.guest.queues[CONTROL].request([piece] if piece else [], [5])
        assert (used.written, used.buffers[0][:1]) == (1, ERR)


@every_reactor
async def test_a_command_with_no_room_for_an_answer_breaks_the_control_queue_alone(setting: Setting) -> None:
    async with plugged(net(frames="reflect"), setting) as p:
        p.guest.queues[CONTROL].driver.add([b"\4\0\1\0"], [])
        p.guest.queues[CONTROL].kick()
        await p.guest.queues[CONTROL].broken()
        p.guest.queues[RECEIVE].driver.add([], [100])
        await p.guest.queues[TRANSMIT].request([PLAIN + bytes(60)], [])
        await p.guest.queues[RECEIVE].used()
        assert await p.guest.link.stop(CONTROL) is not None  # nothing of it is left in flight


@pytest.mark.parametrize("feature", [F_CTRL_RX, F_ANNOUNCE, F_MAC_ADDR])
async def test_a_feature_that_was_declined_takes_its_commands_along(feature: int) -> None:
    commands = {F_CTRL_RX: (RX, 0, b"\1"), F_ANNOUNCE: (ANNOUNCE, 0, b""), F_MAC_ADDR: (MAC, 1, bytes(6))}
    setting = Setting("waist", "split", "io_uring")
    async with plugged(net(backend="switch", switch="lan"), setting, without=feature) as p:
        assert await command(p.guest, *commands[feature]) == ERR
        for other in commands.keys() - {feature}:
            assert await command(p.guest, *commands[other]) == OK


@every_reactor
async def test_a_queue_that_means_nothing_is_left_alone(setting: Setting) -> None:
    """A front-end may start the last queue though no control queue was negotiated."""
    async with plugged(net(frames="reflect"), setting, without=F_CTRL_VQ) as p:
        p.guest.queues[CONTROL].driver.add([b"\0\0\1"], [1])
        p.guest.queues[CONTROL].ring()
        p.guest.queues[RECEIVE].driver.add([], [100])
        await p.guest.queues[TRANSMIT].request([PLAIN + bytes(60)], [])
        await p.guest.queues[RECEIVE].used()
        assert not p.guest.queues[CONTROL].driver.has_used()


# ---- link, announcements, MTU ----


async def status(p: Plugged) -> int:
    return int.from_bytes(await p.guest.link.read_config(6, 2), "little")


@every_native_setting
async def test_a_guest_that_is_plugged_in_again_is_asked_to_announce_itself(setting: Setting) -> None:
    async with plugged(net(), setting) as p:
        assert isinstance(p.device, Net)
        if isinstance(p.guest.link, SocketLink):
            await p.guest.link.open_channel()
        p.device.set_link(False)
        await p.guest.link.config_change()
        assert await status(p) == 0
        p.device.set_link(True)
        await p.guest.link.config_change()
        assert await status(p) == 3
        assert await command(p.guest, ANNOUNCE, 0) == OK
        assert await status(p) == 1


async def test_a_driver_that_cannot_announce_itself_is_not_asked() -> None:
    async with plugged(net(), Setting("waist", "split", "epoll"), without=F_ANNOUNCE) as p:
        assert isinstance(p.device, Net)
        p.device.set_link(False)
        p.device.set_link(True)
        assert await status(p) == 1


@every_reactor
async def test_a_guest_that_moved_here_is_announced_to_its_switch(setting: Setting) -> None:
    async with two_ports(setting) as (one, two):
        one.listen()
        assert isinstance(two.guest.link, WaistLink)
        await two.guest.link.backend.announce(two.device.mac)
        (used,) = await one.guest.queues[RECEIVE].used()
        frame = b"".join(used.buffers)[12 : used.written]
        assert len(frame) == 60
        assert frame[:14] == BROADCAST + two.device.mac + b"\x80\x35"
        hardware, protocol, sizes, operation, sender, _, target, _ = struct.unpack_from(">HHHH6s4s6s4s", frame, 14)
        assert (hardware, protocol, sizes, operation) == (1, 0x800, 0x0604, 3)
        assert sender == target == two.device.mac
        # and the switch has learned it
        two.listen()
        await one.send(two.device.mac, b"hello")
        assert await two.heard() == b"hello"
        assert one.device.native_device.counters().flooded == 0


async def test_an_announcement_over_vhost_user_leaves_by_the_back_end() -> None:
    async with plugged(net(), Setting("socket", "split", "io_uring")) as p:
        assert isinstance(p.device, Net)
        assert isinstance(p.guest.link, SocketLink)
        assert await p.guest.link.front_end.do(SEND_RARP, p.device.mac + b"\0\0") == 0
        assert p.device.native_device.counters() == NicCounters(dropped=1)


async def test_an_mtu_is_possible_up_to_the_configured_one() -> None:
    async with plugged(net(mtu=1400), Setting("socket", "split", "io_uring")) as p:
        assert isinstance(p.guest.link, SocketLink)
        for mtu, refused in ((1400, 0), (68, 0), (1401, 1), (67, 1), (1 << 40, 1)):
            assert await p.guest.link.front_end.do(SET_MTU, mtu.to_bytes(8, "little")) == refused
    device = net()
    device.set_mtu(65535)
    with pytest.raises(PeerError, match="68 to 65535"):
        device.set_mtu(65536)
    device.close()
