"""What a guest prints into the log: as much as operators read, and never so much that others wait for it."""

from __future__ import annotations

from typing import Any

import trio
from kit.front_end.frontend import Setting, every_ring, plugged
from kit.guest.console import TRANSMIT
from structlog.testing import capture_logs

from virtio.devices.console.device import Console, ConsoleOptions
from virtio.devices.console.port import FLOOD_SECONDS, LINES_A_SECOND, LINES_AT_ONCE, PIECE, LineShare, LogEnd

MIB = 1 << 20


def console() -> Console:
    return Console("console", ConsoleOptions(backend="log"), 1, 64)


def printed(logs: list[Any]) -> tuple[int, int]:
    """Lines that were logged, and how many were left out."""
    entries = [entry for entry in logs if entry["event"] == "guest console"]
    return sum("left_out" not in entry for entry in entries), sum(entry.get("left_out", 0) for entry in entries)


@every_ring
async def test_a_mib_of_lines_in_one_request_leaves_every_other_task_its_turn(ring: str) -> None:
    text = b"line\n" * (MIB // 5)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    with capture_logs() as logs:
        async with (
            plugged(console(), Setting("waist", ring), queue_size=64) as p,
            trio.open_nursery() as nursery,
        ):
            queue = p.guest.queues[TRANSMIT]
            nursery.start_soon(count)
            queue.driver.add([text], [])
            queue.kick()
            await queue.used()
            nursery.cancel_scope.cancel()
    logged, left_out = printed(logs)
    assert logged + left_out == MIB // 5
    assert logged >= LINES_AT_ONCE
    # Up to the limit the lines are logged a piece at a time, and each piece is followed by a turn of the others.
    assert turns >= LINES_AT_ONCE * 5 // PIECE // 2


def ended(share: LineShare, data: bytes, times: int = 1) -> tuple[int, int]:
    with capture_logs() as logs:
        end = LogEnd("console", "console", share)
        for _ in range(times):
            end.send(data)
        end.close()
    return printed(logs)


def test_lines_beyond_the_share_are_counted_however_they_end_and_however_they_come() -> None:
    now = 0.0
    for line in (b"a\n", b"b\r\n", b"c\r"):
        assert ended(LineShare(lambda: now), line * 3000) == (LINES_AT_ONCE, 2000)
        assert ended(LineShare(lambda: now), line, 3000) == (LINES_AT_ONCE, 2000)


def test_lines_without_an_end_count_by_their_length() -> None:
    logged, left_out = ended(LineShare(lambda: 0.0), bytes(b"x" * 4096), 1000)
    assert logged == LINES_AT_ONCE
    assert left_out > 2900


def test_the_share_is_the_devices_and_grows_with_time() -> None:
    now = 0.0
    share = LineShare(lambda: now)
    assert ended(share, b"port one\n" * 600) == (600, 0)
    assert ended(share, b"port two\n" * 600) == (400, 200)
    now = 2.0
    assert ended(share, b"later\n" * 600) == (2 * LINES_A_SECOND, 600 - 2 * LINES_A_SECOND)
    now = 1e6
    assert ended(share, b"much later\n" * 1500) == (LINES_AT_ONCE, 500)


async def test_a_flood_is_reported_while_the_guest_is_silent(autojump_clock: trio.testing.MockClock) -> None:
    with capture_logs() as logs:
        async with plugged(console(), Setting("waist", "split"), queue_size=64) as p:
            queue = p.guest.queues[TRANSMIT]
            queue.driver.add([b"line\n" * 20_000], [])
            queue.kick()
            await queue.used()
            await trio.sleep(2 * FLOOD_SECONDS)
            assert printed(logs)[1] > 0
            assert sum(printed(logs)) == 20_000
