"""A guest's disk kept busy while something changes beneath it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from guest.nested.level import Guest, Job

SPAN = (4 * 1024 * 1024, 512 * 1024)
REQUESTS = 20  # of each round; the load goes round until it is told to end


class DiskLoad:
    """Reads and writes that check what they read, round after round."""

    def __init__(self, guest: Guest, job: Job) -> None:
        self._guest = guest
        self._job = job

    async def next_round(self) -> None:
        """Until it has gone round once more from its beginning, or has failed."""
        await self._guest.run(
            "n=$(cat /tmp/rounds 2>/dev/null | wc -l);"
            "while [ $(cat /tmp/rounds 2>/dev/null | wc -l) -lt $((n + 2)) ];"
            f"do kill -0 {self._job.pid} || break; usleep 100000; done",
            timeout_seconds=120,
        )

    async def end(self) -> dict[str, str]:
        """Let it end; its exit ``status``, the ``rounds`` it went, and what it ``said`` of the last."""
        await self._guest.run("touch /tmp/enough")
        status = await self._job.wait()
        answer = await self._guest.run("result rounds $(wc -l </tmp/rounds)")
        return {"status": str(status), "rounds": answer.results["rounds"], "said": await self._job.log()}


@asynccontextmanager
async def disk_load(guest: Guest, disk: str, seed: int) -> AsyncIterator[DiskLoad]:
    """Load on the device node ``disk``, once in the life of ``guest``.

    One request at a time: a lost notification has no later one to make up for it, and each needs its own.
    """
    span = "{} {}".format(*SPAN)
    stress = f"diskcheck load stress {disk} {span} {seed} 1 1 {REQUESTS} >/tmp/said || exit 1"
    command = f"sh -c 'while [ ! -e /tmp/enough ]; do {stress}; echo >>/tmp/rounds; done; cat /tmp/said'"
    async with guest.job("load", command) as job:
        yield DiskLoad(guest, job)
