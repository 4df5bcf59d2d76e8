"""The console with several ports (5.3.6): the handshake over the control queues, and each port's own bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import trio
import trio.testing
from kit.front_end.frontend import Guest, Setting, every_python_setting, plugged
from kit.guest.blk import pattern

from virtio.devices.console.device import Console, ConsoleOptions, PortOptions
from virtio.testing.queue import GUARD

DEVICE_READY, DEVICE_ADD, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 0, 1, 3, 4, 5, 6, 7
F_SIZE, F_MULTIPORT = 1, 2
CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3
PORT_1_RECEIVE, PORT_1_TRANSMIT, PORT_2_TRANSMIT = 4, 5, 7


def three_ports(folder: Path, *, columns: int = 80, rows: int = 25) -> Console:
    """A console on a socket, "agent" on another socket, "notes" in the log."""
    ports = (PortOptions(name="agent", backend="socket", path=folder / "agent"), PortOptions(name="notes"))
    options = ConsoleOptions(backend="socket", path=folder / "tty", columns=columns, rows=rows, ports=ports)
    return Console("console", options, 1, 64)


class Control:
    """The guest's side of the control queues."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        for _ in range(32):
            guest.queues[CONTROL_RECEIVE].driver.add([], [64])
        guest.queues[CONTROL_RECEIVE].kick()
        self._heard: list[tuple[int, int, int, bytes]] = []

    async def say(self, port: int, event: int, value: int) -> None:
        await self.say_raw(struct.pack("<IHH", port, event, value))

    async def say_raw(self, message: bytes) -> None:
        assert (await self._guest.queues[CONTROL_TRANSMIT].request([message], [])).written == 0

    async def hear(self, count: int) -> list[tuple[int, int, int, bytes]]:
        """The next ``count`` messages: port, event, value and what follows."""
        while len(self._heard) < count:
            for used in await self._guest.queues[CONTROL_RECEIVE].used():
                message = used.buffers[0][: used.written]
                self._heard.append((*struct.unpack("<IHH", message[:8]), message[8:]))
        heard, self._heard = self._heard[:count], self._heard[count:]
        return heard

    async def introduce(self) -> None:
        """The whole handshake, with nobody connected."""
        await self.say(0, DEVICE_READY, 1)
        assert await self.hear(3) == [(n, DEVICE_ADD, 1, b"") for n in range(3)]
        for port in range(3):
            await self.say(port, PORT_READY, 1)
        await self.hear(7)


@every_python_setting
async def test_the_handshake_is_that_of_the_specification(setting: Setting, tmp_path: Path) -> None:
    async with plugged(three_ports(tmp_path), setting) as p:
        assert p.guest.features & (F_SIZE | F_MULTIPORT) == F_SIZE | F_MULTIPORT
        assert await p.guest.link.queue_count() == 8
        assert struct.unpack("<HHI", await p.guest.link.read_config(0, 8)) == (80, 25, 3)
        control = Control(p.guest)
        await control.say(0, DEVICE_READY, 1)
        added = await control.hear(3)
        assert [(port, event) for port, event, _, _ in added] == [(0, DEVICE_ADD), (1, DEVICE_ADD), (2, DEVICE_ADD)]
        await control.say(0, PORT_READY, 1)
        assert await control.hear(3) == [
            (0, CONSOLE_PORT, 1, b""),
            (0, RESIZE, 0, struct.pack("<HH", 80, 25)),
            (0, PORT_OPEN, 0, b""),  # nobody is at the socket yet
        ]
        await control.say(0, PORT_OPEN, 1)  # the driver's duty after CONSOLE_PORT
        await control.say(1, PORT_READY, 1)
        assert await control.hear(2) == [(1, PORT_NAME, 1, b"agent"), (1, PORT_OPEN, 0, b"")]
        await control.say(2, PORT_READY, 1)
        assert await control.hear(2) == [(2, PORT_NAME, 1, b"notes"), (2, PORT_OPEN, 1, b"")]


@every_python_setting
async def test_the_guest_is_told_when_somebody_opens_a_port_and_when_they_leave(
    setting: Setting, tmp_path: Path
) -> None:
    async with plugged(three_ports(tmp_path), setting) as p:
        control = Control(p.guest)
        await control.introduce()
        with trio.fail_after(GUARD):
            for _ in range(3):
                stream = await trio.open_unix_socket(tmp_path / "agent")
                assert await control.hear(1) == [(1, PORT_OPEN, 1, b"")]
                await stream.aclose()
                assert await control.hear(1) == [(1, PORT_OPEN, 0, b"")]
            async with await trio.open_unix_socket(tmp_path / "tty"):
                assert await control.hear(1) == [(0, PORT_OPEN, 1, b"")]


@every_python_setting
async def test_every_port_has_bytes_of_its_own(setting: Setting, tmp_path: Path) -> None:
    async with plugged(three_ports(tmp_path), setting) as p:
        control = Control(p.guest)
        await control.introduce()
        with trio.fail_after(GUARD):
            async with (
                await trio.open_unix_socket(tmp_path / "tty") as tty,
                await trio.open_unix_socket(tmp_path / "agent") as agent,
            ):
                await p.guest.queues[1].request([b"to the console"], [])
                await p.guest.queues[PORT_1_TRANSMIT].request([b"to the agent"], [])
                await p.guest.queues[PORT_2_TRANSMIT].request([b"to the log\n"], [])
                assert await tty.receive_some() == b"to the console"
                assert await agent.receive_some() == b"to the agent"
                await agent.send_all(pattern(1000, 1))
                await tty.send_all(pattern(900, 2))
                from_agent = await p.guest.queues[PORT_1_RECEIVE].request([], [2000])
                assert from_agent.buffers[0][: from_agent.written] == pattern(1000, 1)
                from_tty = await p.guest.queues[0].request([], [2000])
                assert from_tty.buffers[0][: from_tty.written] == pattern(900, 2)


@every_python_setting
async def test_without_multiport_the_console_works_and_the_control_queues_are_silent(
    setting: Setting, tmp_path: Path
) -> None:
    async with plugged(three_ports(tmp_path), setting, without=F_MULTIPORT) as p:
        control = Control(p.guest)
        await control.say(0, DEVICE_READY, 1)
        await control.say(0, PORT_READY, 1)
        with trio.fail_after(GUARD):
            async with await trio.open_unix_socket(tmp_path / "tty") as tty:
                await p.guest.queues[1].request([b"plain"], [])
                assert await tty.receive_some() == b"plain"
        await trio.testing.wait_all_tasks_blocked()
        assert p.guest.queues[CONTROL_RECEIVE].driver.used() == []


@every_python_setting
async def test_without_the_size_feature_no_size_is_sent(setting: Setting, tmp_path: Path) -> None:
    async with plugged(three_ports(tmp_path), setting, without=F_SIZE) as p:
        control = Control(p.guest)
        await control.say(0, DEVICE_READY, 1)
        await control.hear(3)
        await control.say(0, PORT_READY, 1)
        assert await control.hear(2) == [(0, CONSOLE_PORT, 1, b""), (0, PORT_OPEN, 0, b"")]


HOSTILE_MESSAGES = {
    "empty_but_a_byte": b"\0",
    "a_byte_short": bytes(7),
    "unknown_event": struct.pack("<IHH", 0, 99, 1),
    "event_of_the_device": struct.pack("<IHH", 0, DEVICE_ADD, 1),
    "removal": struct.pack("<IHH", 0, 2, 1),
    "port_3_of_3": struct.pack("<IHH", 3, PORT_READY, 1),
    "last_port_number": struct.pack("<IHH", 0xFFFF_FFFF, PORT_READY, 1),
    "negative_port_open": struct.pack("<IHH", 0x8000_0000, PORT_OPEN, 1),
    "driver_not_ready": struct.pack("<IHH", 0, DEVICE_READY, 0),
    "port_not_ready": struct.pack("<IHH", 1, PORT_READY, 0),
    "long": struct.pack("<IHH", 77, PORT_READY, 1) + bytes(60_000),
}


@every_python_setting
async def test_control_messages_that_make_no_sense_are_ignored(setting: Setting, tmp_path: Path) -> None:
    async with plugged(three_ports(tmp_path), setting) as p:
        control = Control(p.guest)
        for message in HOSTILE_MESSAGES.values():
            await control.say_raw(message)
        await trio.testing.wait_all_tasks_blocked()
        assert p.guest.queues[CONTROL_RECEIVE].driver.used() == []
        await control.introduce()
        assert not any(queue.broken for queue in p.backend.stats().queues)


@every_python_setting
async def test_a_driver_that_asks_without_end_is_answered_within_bounds(setting: Setting, tmp_path: Path) -> None:
    async with plugged(three_ports(tmp_path), setting) as p:
        transmit = p.guest.queues[CONTROL_TRANSMIT]
        for _ in range(100):
            for _ in range(60):
                transmit.driver.add([struct.pack("<IHH", 0, DEVICE_READY, 1)], [])
            transmit.kick()
            await transmit.used(60)
        assert len(p.device._control) <= 4096  # type: ignore[attr-defined]
        control = Control(p.guest)
        assert {event for _, event, _, _ in await control.hear(32)} == {DEVICE_ADD}


@every_python_setting
async def test_a_reset_forgets_the_handshake(setting: Setting, tmp_path: Path) -> None:
    async with plugged(three_ports(tmp_path), setting) as p:
        control = Control(p.guest)
        await control.introduce()
        await p.guest.link.reset()
        p.guest.forget_queues()
        await p.guest.start()
        control = Control(p.guest)
        with trio.fail_after(GUARD):
            async with await trio.open_unix_socket(tmp_path / "agent"):
                await trio.testing.wait_all_tasks_blocked()
                assert p.guest.queues[CONTROL_RECEIVE].driver.used() == []  # no port is ready yet
                await control.say(0, DEVICE_READY, 1)
                await control.hear(3)
                await control.say(1, PORT_READY, 1)
                assert await control.hear(2) == [(1, PORT_NAME, 1, b"agent"), (1, PORT_OPEN, 1, b"")]


@pytest.mark.parametrize("count", [1, 30])
def test_the_number_of_queues_follows_from_the_ports(count: int) -> None:
    ports = tuple(PortOptions(name=f"p{n}") for n in range(count))
    device = Console("console", ConsoleOptions(ports=ports), 1, 64)
    assert device.queue_count == 4 + 2 * count
    device.close()
