"""The greedy guests of ``tests.bench.neighbour``: what each asks of which device, and how it is set to work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal

from tests.bench.blk_frontend import BlkFrontend, DeviceFaultError, Job
from tests.bench.servers import NULL_DISK
from tests.bench.storage import make_file, warm_cache

MIB: Final = 1 << 20
SIZE: Final = 128 * MIB
STALL_SECONDS: Final = 30.0
TESTS: Final = Path(__file__).parents[1]
FUSE_DISK: Final = TESTS / "kit" / "host" / "fuse_disk.py"
TRANSMIT: Final = 1
"""Queue of a console (5.3.2)."""

Kind = Literal["memory", "tmpfs", "cached", "direct", "fuse", "hanging", "python", "rng", "console"]


class CannotBeHadError(Exception):
    """This machine does not let us have what the greedy guest needs; the text says what."""


@dataclass(frozen=True, slots=True)
class Greed:
    """What the greedy guest does. ``depth`` is for each of ``queues``. The neighbour shares the worker, or, where it
    is a Python device, the event loop.
    """

    title: str
    kind: Kind
    request_bytes: int
    depth: int
    queues: int = 1
    write_percent: int = 0
    reactor: Literal["auto", "epoll"] = "auto"
    neighbour: Literal["memory", "python"] = "memory"


GREEDY: Final = (
    Greed("memory disk, 4 reads of 32 MiB in flight", "memory", 32 * MIB, 4),
    Greed("memory disk, 64 reads of 1 MiB", "memory", MIB, 64),
    Greed("memory disk, 128 reads of 4 KiB", "memory", 4096, 128),
    Greed("tmpfs, 4 reads of 32 MiB", "tmpfs", 32 * MIB, 4),
    Greed("page cache, 4 reads of 32 MiB", "cached", 32 * MIB, 4),
    Greed("page cache, 4 writes of 32 MiB", "cached", 32 * MIB, 4, write_percent=100),
    Greed("disk (O_DIRECT), 4 queues with 128 reads of 16 KiB each", "direct", 16384, 128, queues=4),
    Greed("FUSE that caches nothing, 64 reads of 64 KiB", "fuse", 65536, 64),
    Greed("storage that hangs, 4 queues with 128 reads of 16 KiB each", "hanging", 16384, 128, queues=4),
    Greed("the same with the epoll reactor", "hanging", 16384, 128, queues=4, reactor="epoll"),
    Greed("rng, 64 buffers of 1 MiB", "rng", MIB, 64),
    Greed("console, 64 writes of 1 MiB", "console", MIB, 64),
    Greed("Python device, 64 reads of 1 MiB, the neighbour another one", "python", MIB - 512, 64, neighbour="python"),
    Greed("rng, 64 buffers of 1 MiB, the neighbour a Python device", "rng", MIB, 64, neighbour="python"),
    Greed("console, 64 writes of 1 MiB, the neighbour a Python device", "console", MIB, 64, neighbour="python"),
)


def device_lines(name: str, socket: Path, kind: Kind, image: Path | None, queues: int) -> list[str]:
    """A device of that kind for the configuration; its worker is w0, where it has one."""
    lines = [f"[devices.{name}]", f'socket = "{socket}"']
    if kind in ("rng", "console"):
        return [*lines, f'type = "{kind}"']
    lines.append(f"queues = {queues}")
    if kind == "python":
        return [*lines, f'type = "{NULL_DISK}"', f"size = {SIZE}"]
    lines += ['type = "blk"', 'worker = "w0"']
    if kind == "memory":
        return [*lines, 'backend = "memory"', f"size = {SIZE}"]
    return [*lines, f'path = "{image}"', f"direct = {str(kind == 'direct').lower()}"]


class Storage:
    """Where the greedy guest's disk lies. ``image`` is None for what has no file; ``hang`` is for FUSE."""

    def __init__(self, image: Path | None = None, fuse: subprocess.Popen[str] | None = None) -> None:
        self.image = image
        self._fuse = fuse

    def hang(self, *operations: str) -> None:
        """These operations get no answer any more, all others and those that wait do."""
        assert self._fuse is not None
        assert self._fuse.stdin is not None
        self._fuse.stdin.write(json.dumps({"hang": operations}) + "\n")
        self._fuse.stdin.flush()
        _read_line(self._fuse.stdout)


def _read_line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


@contextmanager
def storage(kind: Kind) -> Iterator[Storage]:
    """What a disk of that kind lies on. Raises ``CannotBeHadError``."""
    with ExitStack() as stack:
        if kind in ("fuse", "hanging"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hyperbell-bench-")))
            yield Storage(folder / "disk.img", stack.enter_context(_fuse(folder)))
        elif kind in ("tmpfs", "cached", "direct"):
            parent = "/dev/shm" if kind == "tmpfs" else "/var/tmp"
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hyperbell-bench-", dir=parent)))
            make_file(folder / "disk.img", SIZE)
            warm_cache(folder / "disk.img")
            yield Storage(folder / "disk.img")
        else:
            yield Storage()


@contextmanager
def _fuse(folder: Path) -> Iterator[subprocess.Popen[str]]:
    if not Path("/dev/fuse").exists():
        raise CannotBeHadError("this machine has no /dev/fuse")
    command = [sys.executable, str(FUSE_DISK), str(folder), str(SIZE), "direct"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        answer = json.loads(_read_line(process.stdout))
        if "error" in answer:
            raise CannotBeHadError(f"this user may not mount a file system: {answer['error']}")
        yield process
    finally:
        process.communicate(timeout=STALL_SECONDS)


@contextmanager
def at_work(greed: Greed, socket: Path, disk: Storage) -> Iterator[None]:
    """The greedy guest is at work from the first answer it got until the end of the block."""
    if greed.kind in ("rng", "console"):
        with _process_at_work(greed, socket):
            yield
    else:
        with _disk_at_work(greed, socket, disk):
            yield


@contextmanager
def _process_at_work(greed: Greed, socket: Path) -> Iterator[None]:
    queue, way = (TRANSMIT, "write") if greed.kind == "console" else (0, "read")
    words = [str(socket), str(queue), way, str(greed.request_bytes), str(greed.depth)]
    process = subprocess.Popen(
        [sys.executable, "-m", "kit.guest.greedy", *words],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if _read_line(process.stdout) != "ready\n":
            raise DeviceFaultError(f"{socket}: the greedy guest of {greed.kind} came to nothing", 0)
        yield
        if process.poll() is not None:
            raise DeviceFaultError(f"{socket}: the greedy guest of {greed.kind} came to harm", 0)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _disk_at_work(greed: Greed, socket: Path, disk: Storage) -> Iterator[None]:
    with BlkFrontend(
        socket, greed.queues, request_max=greed.request_bytes, segment=min(greed.request_bytes, MIB)
    ) as guest:
        job = Job(
            requests=max(greed.depth, 8),
            depth=greed.depth,
            request_bytes=greed.request_bytes,
            write_percent=greed.write_percent,
            sleep=True,
            stall_seconds=STALL_SECONDS,
        )
        ending, failed = threading.Event(), []

        def work() -> None:
            try:
                while not ending.is_set():
                    guest.run(job)
            except DeviceFaultError as error:
                failed.append(error)

        guest.run(job)
        thread = threading.Thread(target=work)
        if greed.kind == "hanging":
            disk.hang("read")
        thread.start()
        try:
            yield
        finally:
            ending.set()
            if greed.kind == "hanging":
                disk.hang()
            thread.join()
        if failed:
            raise failed[0]
