"""Work with files in threads with a limit (``daemon.running.files``)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio

from daemon.running.files import Files, NoAnswerError
from virtio.testing.queue import GUARD


class Hanging:
    """Work that is done when ``answer`` is called; ``late`` takes what came too late."""

    def __init__(self) -> None:
        self._answer = threading.Event()
        self.begun = threading.Event()
        self.closed = threading.Event()
        self.answer: Callable[[], None] = self._answer.set

    def work(self) -> str:
        self.begun.set()
        assert self._answer.wait(GUARD)
        return "descriptor"

    def late(self, result: str) -> None:
        assert result == "descriptor"
        self.closed.set()


async def test_a_result_that_comes_after_the_limit_is_closed() -> None:
    hanging = Hanging()
    with pytest.raises(NoAnswerError):
        await Files(seconds=0.01).run("disk", hanging.work, hanging.late)
    assert not hanging.closed.is_set()
    hanging.answer()
    assert await trio.to_thread.run_sync(hanging.closed.wait, GUARD)


async def test_a_result_that_comes_after_a_cancellation_is_closed() -> None:
    hanging = Hanging()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Files().run, "disk", hanging.work, hanging.late)
        assert await trio.to_thread.run_sync(hanging.begun.wait, GUARD)
        nursery.cancel_scope.cancel()
    hanging.answer()
    assert await trio.to_thread.run_sync(hanging.closed.wait, GUARD)


async def test_a_file_system_that_hangs_keeps_one_thread_of_its_device_and_none_of_another() -> None:
    files, hanging, second = Files(seconds=0.01), Hanging(), Hanging()
    for each in (hanging, second, second):
        with pytest.raises(NoAnswerError):
            await files.run("disk", each.work, each.late)
    assert not second.begun.is_set()
    assert await files.run("other", lambda: 1, seconds=GUARD) == 1
    hanging.answer()
    assert await files.run("disk", lambda: 2, seconds=GUARD) == 2


async def test_what_the_work_raises_is_raised_also_when_it_is_a_timeout_of_the_host() -> None:
    def work() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await Files().run("disk", work)
