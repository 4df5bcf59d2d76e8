"""A guest that keeps one queue of any device full: ``python -m kit.guest.greedy SOCKET QUEUE write|read BYTES DEPTH``.

Run as a process of its own, so that what it computes holds up nobody. It says "ready" once the device has answered it,
and goes on until it is killed. What it writes are lines of text, as a console gets them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import trio
from kit.front_end.frontend import Guest
from kit.front_end.links import SocketLink

from virtio.testing.virtqueue_driver import Element

LINE: Final = b"what a guest says when it has too much to say, and says it again and again ...\r\n"


async def be_greedy(socket: Path, index: int, *, writable: bool, size: int, depth: int) -> None:
    """Keep ``depth`` buffers of ``size`` bytes in queue ``index``; ``writable``: the device fills them."""
    guest = Guest(await SocketLink.connect(socket), memory_size=size + (4 << 20))
    await guest.start(queue_size=depth)
    place = guest.memory.allocate(size)
    if not writable:
        guest.memory.write(place, (LINE * (size // len(LINE) + 1))[:size])
    queue, missing, said = guest.queues[index], depth, False
    while True:
        for _ in range(missing):  # all of them in the same place: what is there is of no interest
            queue.driver.add_elements([Element(place, size, writable)], publish=False)
        queue.driver.publish()
        queue.kick()
        missing = len(await queue.used())
        if not said:
            print("ready", flush=True)
            said = True


if __name__ == "__main__":
    _, path, number, direction, length, count = sys.argv
    trio.run(
        lambda: be_greedy(Path(path), int(number), writable=direction == "read", size=int(length), depth=int(count))
    )
