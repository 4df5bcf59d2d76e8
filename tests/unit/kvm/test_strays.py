"""What is said of doorbells that ring nothing: a line at the first, then seldom, and never one for each."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs
from structlog.typing import EventDict

from transports.kvm.machine.strays import LOOK_SECONDS, QUIET_SECONDS, Source, StrayWatch

BELLS = "doorbells of queues that do not exist"


class Counters:
    """Of two devices and of the machine."""

    def __init__(self) -> None:
        self.disk = self.lan = self.hypercalls = 0
        self.watch = StrayWatch(
            [
                Source(BELLS, lambda: self.disk, "disk"),
                Source(BELLS, lambda: self.lan, "lan"),
                Source("hypercalls of unknown connection ids", lambda: self.hypercalls),
            ]
        )


def told(logs: list[EventDict]) -> list[tuple[object, object]]:
    assert all(line["log_level"] == "warning" for line in logs)
    return [(line.get("device", line["event"]), line["times"]) for line in logs]


async def test_a_flood_is_one_line_at_its_beginning_and_one_in_a_long_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    counters = Counters()
    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(counters.watch.run)
            await trio.sleep(10 * LOOK_SECONDS)
            assert told(logs) == []
            for _ in range(int(3 * QUIET_SECONDS)):
                counters.disk += 1000
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
    assert 3 <= len(logs) <= 4
    assert logs[0]["event"] == f"{BELLS}: ignored, the others go on"
    assert logs[0]["device"] == "disk"
    assert logs[0]["times"] <= 1000 * (LOOK_SECONDS + 1)
    times = [line["times"] for line in logs]
    assert times == sorted(set(times))


@pytest.mark.usefixtures("autojump_clock")
async def test_each_source_is_told_of_by_itself_and_what_is_left_at_the_end() -> None:
    counters = Counters()
    with capture_logs() as logs:
        counters.disk = 3
        counters.watch.look()
        counters.disk, counters.lan, counters.hypercalls = 5, 7, 9
        counters.watch.look()
        assert told(logs) == [("disk", 3), ("lan", 7), (logs[-1]["event"], 9)]
        assert logs[-1]["event"] == "hypercalls of unknown connection ids: ignored, the others go on"
        for _ in range(2):
            counters.watch.look(last=True)
        assert told(logs)[3:] == [("disk", 5)]
