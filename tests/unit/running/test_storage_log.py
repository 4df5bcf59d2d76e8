"""How often a disk's errors are logged."""

from __future__ import annotations

import math

from virtio.devices.blk.storage_log import QUIET_SECONDS, StorageLog


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_the_first_error_of_a_kind_is_reported_at_once_and_the_next_ones_with_their_number_later() -> None:
    clock = Clock()
    book = StorageLog(clock)
    assert book.due() == math.inf
    assert [*book.lines({("write", "ENOSPC"): 1})] == [
        {"op": "write", "errno": "ENOSPC", "error": "No space left on device", "times": 1}
    ]
    assert book.due() == math.inf
    clock.seconds = 1
    assert [*book.lines({("write", "ENOSPC"): 500})] == []
    assert book.due() == QUIET_SECONDS - 1
    clock.seconds = QUIET_SECONDS
    assert book.due() == 0
    assert [line["times"] for line in book.lines({("write", "ENOSPC"): 740})] == [739]
    assert book.due() == math.inf
    assert [*book.lines({("write", "ENOSPC"): 740})] == []


def test_each_kind_of_error_has_a_line_of_its_own() -> None:
    book = StorageLog(Clock())
    counts = {("write", "ENOSPC"): 2, ("read", "EIO"): 1, ("read", "ENDED"): 1}
    assert [(line["op"], line["errno"]) for line in book.lines(counts)] == [*counts]
    assert [*book.lines(dict.fromkeys(counts, 9))] == []
    assert [line["op"] for line in book.lines({**dict.fromkeys(counts, 9), ("flush", "EIO"): 1})] == ["flush"]
