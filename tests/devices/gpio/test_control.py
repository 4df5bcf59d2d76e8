"""The socket on which simulated lines are driven and watched; and with it what all such sockets promise."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from kit.front_end.vhost_user_wire import no_fd_leaks, open_fds
from kit.host.line_client import LineTalker, talking

from virtio.devices.gpio.device import VIRTIO_GPIO_MSG_SET_DIRECTION, VIRTIO_GPIO_MSG_SET_IRQ_TYPE, Gpio
from virtio.devices.gpio.options import GpioOptions
from virtio.devices.host.line_server import CLIENTS_MAX, COMMAND_MAX
from virtio.devices.host.outbox import BACKLOG_MAX
from virtio.errors import HostError
from virtio.testing import TestDriver, attach
from virtio.testing.queue import GUARD

NAMES = ("button", "Red LED Vdd", "")


def gpio(path: Path) -> Gpio:
    return Gpio("pins", GpioOptions(lines=NAMES, control=path), 2, 64)


@asynccontextmanager
async def scene(path: Path) -> AsyncIterator[tuple[TestDriver, LineTalker]]:
    async with attach(gpio(path)) as driver, talking(path) as client:
        yield driver, client


async def ask(driver: TestDriver, kind: int, line: int, value: int) -> None:
    assert await driver.request(0, struct.pack("<HHI", kind, line, value), 2) == b"\0\0"


async def test_lines_are_listed_with_all_that_is_known_of_them(tmp_path: Path) -> None:
    async with scene(tmp_path / "c") as (driver, client):
        assert await client.command("list") == [
            "line 0 none 0 none button",
            "line 1 none 0 none Red LED Vdd",
            "line 2 none 0 none",
            "ok",
        ]
        await ask(driver, VIRTIO_GPIO_MSG_SET_DIRECTION, 0, 2)
        await ask(driver, VIRTIO_GPIO_MSG_SET_IRQ_TYPE, 0, 3)
        assert await client.command("get button") == ["line 0 input 0 both button", "ok"]


async def test_a_line_is_driven_by_its_name_or_its_number(tmp_path: Path) -> None:
    async with scene(tmp_path / "c") as (_, client):
        assert await client.command("set Red LED Vdd 1") == ["ok"]
        assert await client.command("set 2 1") == ["ok"]
        assert await client.command("get 1") == ["line 1 none 1 none Red LED Vdd", "ok"]
        assert await client.command("get 2") == ["line 2 none 1 none", "ok"]


async def test_who_watches_is_told_of_every_change_whoever_made_it(tmp_path: Path) -> None:
    async with scene(tmp_path / "c") as (driver, client), talking(tmp_path / "c") as other:
        assert await client.command("watch") == ["ok"]
        await ask(driver, VIRTIO_GPIO_MSG_SET_DIRECTION, 1, 1)
        assert await client.line() == "line 1 output 0 none Red LED Vdd"
        assert await other.command("pulse button") == ["ok"]
        assert [await client.line(), await client.line()] == ["line 0 none 1 none button", "line 0 none 0 none button"]
        await driver.reset()
        assert await client.line() == "line 1 none 0 none Red LED Vdd"


@pytest.mark.parametrize(
    "command",
    ["set button", "set button 2", "set nothing 1", "get 3", "get -1", "get", "lists", "list all", "set  1", "get ²"],
)
async def test_a_wrong_command_is_an_error_that_helps_and_the_next_one_works(tmp_path: Path, command: str) -> None:
    async with scene(tmp_path / "c") as (_, client):
        (answer,) = await client.command(command)
        assert answer.startswith("error ")
        assert await client.command("get 0") == ["line 0 none 0 none button", "ok"]


# --- what all sockets of this kind promise ---


async def test_only_the_owner_may_use_the_socket_and_it_goes_with_the_device(tmp_path: Path) -> None:
    async with scene(tmp_path / "c"):
        assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "c").exists()


def test_a_socket_that_is_taken_is_refused(tmp_path: Path) -> None:
    with no_fd_leaks():
        first = gpio(tmp_path / "c")
        with pytest.raises(HostError, match=f"{tmp_path}/c: another process listens there"):
            gpio(tmp_path / "c")
        first.close()


async def test_whoever_closes_their_half_still_gets_their_answers(tmp_path: Path) -> None:
    async with scene(tmp_path / "c") as (_, client):
        await client.stream.send_all(b"get 0\n\nset 0 1\nget 0\nunfinished")
        await client.stream.send_eof()
        assert await client.rest() == ["line 0 none 0 none button", "ok", "ok", "line 0 none 1 none button", "ok"]


async def test_a_line_without_an_end_is_refused(tmp_path: Path) -> None:
    async with scene(tmp_path / "c") as (_, client):
        await client.stream.send_all(b"x" * (COMMAND_MAX + 1))
        assert await client.rest() == ["error a line is too long"]


async def test_clients_that_watch_keep_their_places_and_others_come_in_when_they_leave(tmp_path: Path) -> None:
    async with scene(tmp_path / "c") as (_, first):
        assert await first.command("watch") == ["ok"]
        streams = [await trio.open_unix_socket(tmp_path / "c") for _ in range(CLIENTS_MAX - 1)]
        for stream in streams:
            await stream.send_all(b"watch\n")
            assert await stream.receive_some() == b"ok\n"
        async with talking(tmp_path / "c") as late:
            assert await late.rest() == ["error there are too many clients that watch"]
        for stream in streams:
            await stream.aclose()
        with trio.fail_after(GUARD):
            while (await new_clients_answer(tmp_path / "c"))[0].startswith("error"):
                pass


async def test_idle_clients_keep_nobody_out(tmp_path: Path) -> None:
    async with scene(tmp_path / "c") as (_, first):
        assert await first.command("watch") == ["ok"]
        idle = [await trio.open_unix_socket(tmp_path / "c") for _ in range(3 * CLIENTS_MAX)]
        with trio.fail_after(GUARD):
            assert (await new_clients_answer(tmp_path / "c"))[-1] == "ok"
            assert await idle[0].receive_some() == b""  # the longest idle one has given way ...
        assert await first.command("get 0")  # ... and the one that watches has not
        for stream in idle:
            await stream.aclose()


async def new_clients_answer(path: Path) -> list[str]:
    async with talking(path) as client:
        return await client.command("get 0")


async def test_a_client_that_does_not_read_is_let_go_and_the_others_notice_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path / "c") as (_, quick):
        async with await trio.open_unix_socket(tmp_path / "c") as slow:
            slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with pytest.raises(trio.BrokenResourceError):
                await slow.send_all(b"list\n" * BACKLOG_MAX)
        assert await quick.command("get 0") == ["line 0 none 0 none button", "ok"]


async def test_a_client_that_vanishes_leaves_nothing_behind(tmp_path: Path) -> None:
    async with scene(tmp_path / "c") as (driver, client):
        await client.command("get 0")  # it is let in by now
        before = open_fds()
        for _ in range(5):
            async with await trio.open_unix_socket(tmp_path / "c") as other:
                await other.send_all(b"watch\nlist")
        await ask(driver, VIRTIO_GPIO_MSG_SET_DIRECTION, 1, 1)
        with trio.fail_after(GUARD):
            while open_fds() != before:  # each turn is a round trip, in which the server looks at its other clients
                await client.command("pulse 0")
