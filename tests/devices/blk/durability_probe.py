"""Run with sync_calls.so preloaded: drives a disk in every cache mode and prints, as JSON, what it cost in syncs.

A process of its own, because the calls are counted by standing in for the C library's. The reactor is epoll's, whose
I/O are plain system calls; io_uring is given the same flags from the same place.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import structlog
import trio
from kit.front_end.frontend import F_VERSION_1, Plugged, Setting, plugged
from kit.guest.blk import CONFIG_WRITEBACK, F_CONFIG_WCE, F_FLUSH, BlkDriver, make_disk

LIBRARY = ctypes.CDLL(None)
COUNTERS = ("plain_writes", "dsync_writes", "syncs")


def counts() -> list[int]:
    return [ctypes.c_uint64.in_dll(LIBRARY, name).value for name in COUNTERS]


class Probe:
    """One disk in one cache mode."""

    def __init__(self, plugged_disk: Plugged) -> None:
        self.plugged = plugged_disk
        self.results: dict[str, list[int]] = {}

    async def measure(self, name: str) -> None:
        """Two writes; what they cost."""
        disk = BlkDriver(self.plugged.guest.queues[0])
        before = counts()
        await disk.write(0, bytes(4096))
        await disk.write(8, bytes(4096))
        self.results[name] = [now - then for now, then in zip(counts(), before, strict=True)]

    async def flush(self, name: str) -> None:
        before = counts()
        await BlkDriver(self.plugged.guest.queues[0]).flush()
        self.results[name] = [now - then for now, then in zip(counts(), before, strict=True)]

    async def zero(self, name: str) -> None:
        before = counts()
        disk = BlkDriver(self.plugged.guest.queues[0])
        await disk.write_zeroes(0, 8)
        await disk.discard(8, 8)
        self.results[name] = [now - then for now, then in zip(counts(), before, strict=True)]


async def probe(path: Path, write_cache: str) -> dict[str, list[int]]:
    setting = Setting("waist", "split", "epoll")
    disk = make_disk("file", path, write_cache=write_cache)
    async with plugged(disk, setting, start=False) as p:
        it = Probe(p)
        guest = p.guest
        for name, without in (
            ("both features", 0),
            ("FLUSH only", F_CONFIG_WCE),
            ("CONFIG_WCE only", F_FLUSH),
            ("neither", F_FLUSH | F_CONFIG_WCE),
            ("a legacy driver that can flush", F_CONFIG_WCE | F_VERSION_1),
            ("a legacy driver that cannot", F_FLUSH | F_CONFIG_WCE | F_VERSION_1),
        ):
            await guest.start(without=without)
            await it.measure(name)
            await it.zero(f"{name}: zeroes")
            await it.flush(f"{name}: flush")
            await guest.link.reset()
            guest.forget_queues()
        await guest.start()
        for value in (0, 1, 0):
            await guest.link.write_config(CONFIG_WRITEBACK, bytes([value]))
            assert (await guest.link.read_config(CONFIG_WRITEBACK, 1))[0] == value
            await it.measure(f"writeback = {value}")
        await guest.link.reset()
        guest.forget_queues()
        await guest.start()
        await it.measure("after a reset")
    return it.results


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    results = {mode: trio.run(probe, Path(sys.argv[1]), mode) for mode in ("writeback", "writethrough")}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
