"""The end of a daemon whose storage does not answer: a disk that hangs must not keep SIGTERM from ending it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import structlog
import trio

from daemon.log import setup as log
from daemon.running.files import Files
from virtio.backend.backend import Backend

EXIT_STUCK: Final = 1


async def end_when_stuck(
    stopping: trio.Event,
    seconds: float,
    backends: Callable[[], Iterable[Backend]],
    files: Files,
    last: Callable[[], None] = lambda: None,
) -> None:
    """Once ``stopping`` is set, end the process if it still runs after so many seconds; cancelled when it has ended.

    ``backends`` gives those that are being ended, ``files`` knows which files they wait for; ``last`` is called before
    the end.

    Ending the usual way waits for every request in flight, for its bytes are the guest's memory.
    """
    await stopping.wait()
    await trio.sleep(seconds)
    structlog.get_logger().critical(
        "the daemon ends without waiting any longer: storage has not answered",
        seconds=seconds,
        waiting=[*_waiting(backends()), *files.waiting()],
    )
    log.last_words()
    last()
    os._exit(EXIT_STUCK)  # threads in the kernel would be waited for by any other way


def _waiting(backends: Iterable[Backend]) -> Iterator[str]:
    for backend in backends:
        for queue, requests, age in backend.in_flight():
            yield f"{backend.name} queue {queue}: {requests} in flight, the oldest for {age:.0f} s"
