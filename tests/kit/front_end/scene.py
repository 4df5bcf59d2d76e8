"""A daemon with an honest guest on one device, and a second device for a guest that is not.

The honest one reads and writes all the time, from a thread of its own, and checks every byte; whatever the other does,
it must never notice. The daemon is either a real process or a trio loop in a thread of this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import structlog
import trio
from kit.front_end.frontend import Guest
from kit.front_end.links import SocketLink
from kit.guest.blk import BlkDriver, VerifiedLoad, pattern

from daemon.running.control import ask
from transports.vhost_user.serving.server import VhostUserServer
from virtio.backend.backend import Backend
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.native.worker import Worker
from virtio.socket_file import Listen
from virtio.testing.queue import GUARD

Entry = Mapping[str, Any]
DISK_SIZE: Final = 4 << 20
VICTIM_QUEUES: Final = 2


class LogBook:
    """The daemon's log as it grows; any thread."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._grown = threading.Condition()

    def add(self, entry: Entry) -> None:
        with self._grown:
            self._entries.append(entry)
            self._grown.notify_all()

    @property
    def mark(self) -> int:
        with self._grown:
            return len(self._entries)

    def since(self, mark: int, event: str = "") -> list[Entry]:
        """What was logged after ``mark``; of those whose event begins with ``event``."""
        with self._grown:
            return [entry for entry in self._entries[mark:] if entry["event"].startswith(event)]

    def wait_for(self, mark: int, event: str, count: int = 1) -> list[Entry]:
        """The entries after ``mark`` whose event begins so, as soon as there are ``count``."""
        with self._grown:
            come = self._grown.wait_for(lambda: len(self.since(mark, event)) >= count, GUARD)
            assert come, f"no {event!r} in the log, but: {self._entries[mark:]}"
        return self.since(mark, event)

    async def expect(self, mark: int, event: str) -> Entry:
        """The first one."""
        return (await self.expect_all(mark, event, 1))[0]

    async def expect_all(self, mark: int, event: str, count: int) -> list[Entry]:
        return await trio.to_thread.run_sync(self.wait_for, mark, event, count)


@dataclass(frozen=True)
class Counters:
    """What the metrics say of one device."""

    broken: tuple[bool, ...]
    protocol_errors: Mapping[str, int]
    refused: int
    connections: int


class Scene(ABC):
    """The daemon. Sockets: ``honest`` and ``victim``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.honest = folder / "honest.sock"
        self.victim = folder / "victim.sock"
        self.log = LogBook()
        self.neighbour = HonestNeighbour(self.honest)
        self._before: Counter[str] | None = None

    @property
    @abstractmethod
    def pid(self) -> int: ...
    @abstractmethod
    def counters(self) -> Counters:
        """The victim's."""

    async def connect(self, ring: str = "split") -> Guest:
        """A guest on the victim device that has done nothing yet."""
        return Guest(await SocketLink.connect(self.victim), ring)

    async def started(self, ring: str = "split", *, without: int = 0, queue_size: int = 64) -> Guest:
        guest = await self.connect(ring)
        await guest.start(without=without, queue_size=queue_size)
        return guest

    async def unoccupied(self) -> None:
        """Wait until the victim has no front-end, and none on its way out."""
        guest = await self.started()
        mark = self.log.mark
        guest.close()
        await self.log.expect(mark, "connection ended")

    async def unharmed(self) -> None:
        """The honest guest's requests go on and go right."""
        await trio.to_thread.run_sync(self.neighbour.progress)

    async def aftermath(self) -> None:
        """A new guest on the victim is served, the honest one was not disturbed, and the daemon holds what it held."""
        guest = await self.started()
        try:
            for queue in guest.queues:
                disk = BlkDriver(queue)
                await disk.write(8 * queue.index, pattern(4096, queue.index))
                assert await disk.read(8 * queue.index, 4096) == pattern(4096, queue.index)
            if self._before is None:
                self._before = self.footprint()
            with trio.move_on_after(GUARD):
                while self.footprint() != self._before:  # the control socket's clients may be on their way out
                    await disk.flush()
            assert self.footprint() == self._before
            assert not any(self.counters().broken)
        finally:
            guest.close()
        await self.unharmed()

    def footprint(self) -> Counter[str]:
        """The daemon's open descriptors, and its mappings of guest memory and rings, by kind."""
        process = Path(f"/proc/{self.pid}")
        found: Counter[str] = Counter()
        for entry in (process / "fd").iterdir():
            try:
                found["fd " + re.sub(r"\[\d+\]", "", str(entry.readlink()))] += 1
            except FileNotFoundError:
                continue
        for line in (process / "maps").read_text().splitlines():
            parts = line.split(maxsplit=5)
            if parts[-1].startswith(("/memfd:", "anon_inode:")):
                found["map " + parts[5]] += 1
        return found


class HonestNeighbour:
    """The guest that must not notice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = threading.Thread(target=self._main, name="honest guest", daemon=True)
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._load: VerifiedLoad
        self._token: trio.lowlevel.TrioToken
        self._stop: trio.Event

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(GUARD)
        self.progress()

    def _main(self) -> None:
        try:
            trio.run(self._live)
        except BaseException as error:
            self._error = error
        finally:
            self._started.set()

    async def _live(self) -> None:
        guest = Guest(await SocketLink.connect(self._path))
        try:
            await guest.start()
            self._load = VerifiedLoad(guest.queues[0])
            self._token = trio.lowlevel.current_trio_token()
            self._stop = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._load.run)
                self._started.set()
                await self._stop.wait()
                nursery.cancel_scope.cancel()
        finally:
            guest.close()

    def progress(self) -> None:
        """Wait until more requests went right; raises what went wrong. Any thread but a trio one."""
        try:
            trio.from_thread.run(self._load.progress, trio_token=self._token)
        except (trio.RunFinishedError, AttributeError) as error:
            raise AssertionError("the honest guest came to harm") from self._error or error

    def stop(self) -> None:
        """Raises what went wrong, if anything did."""
        try:
            self.progress()
        finally:
            with contextlib.suppress(trio.RunFinishedError, AttributeError):
                self._token.run_sync_soon(self._stop.set)
            self._thread.join(GUARD)
        assert not self._thread.is_alive()


# --- a process ---


class DaemonProcess:
    """``hyperbell serve`` on a configuration, its log read as it is written. ``stop`` returns its exit status.

    ``descriptors``: the most that the process may have (0: as many as the tests may).
    """

    def __init__(self, configuration: Path, log: LogBook, *, descriptors: int = 0) -> None:
        self._log = log
        limit = ["prlimit", f"--nofile={descriptors}"] if descriptors else []
        options = ["--log-format", "json", "--log-level", "debug"]  # no line of a kind is left out: tests wait for each
        self._process = subprocess.Popen(
            [*limit, sys.executable, "-m", "daemon.cli", *options, "serve", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), name="log of the daemon")
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = {"event": "not JSON", "level": "error", "line": line}
                if entry["level"] != "debug":
                    self._log.add(entry)

    def alive(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def stop(self) -> int:
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        try:
            status = self._process.wait(GUARD)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._reader.join(GUARD)
        return status


class ProcessScene(Scene):
    """The real daemon."""

    CONFIGURATION: Final = f"""
[daemon]
metrics = "off"
control = "control.sock"

[workers.one]
[workers.two]

[devices.honest]
type = "blk"
backend = "memory"
size = {DISK_SIZE}
socket = "honest.sock"
packed = true
worker = "one"

[devices.victim]
type = "blk"
backend = "memory"
size = {DISK_SIZE}
socket = "victim.sock"
packed = true
iommu = true
queues = {VICTIM_QUEUES}
workers = ["one", "two"]
"""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        file = folder / "daemon.toml"
        file.write_text(self.CONFIGURATION)
        self.daemon = DaemonProcess(file, self.log)
        self.log.wait_for(0, "serving")

    @property
    def pid(self) -> int:
        return self.daemon.pid

    def counters(self) -> Counters:
        stats = ask(self.folder / "control.sock", "stats")
        (victim,) = [device for device in stats["devices"] if device["backend"]["device"] == "victim"]
        connection = victim["connection"]
        broken = tuple(queue["broken"] for queue in victim["backend"]["queues"])
        return Counters(broken, connection["protocol_errors"], connection["refused"], connection["connections"])

    def close(self) -> None:
        assert self.daemon.alive()
        assert self.daemon.stop() == 0


# --- a thread ---


class ThreadScene(Scene):
    """The same devices, workers and servers without the daemon around them, in a trio loop of this process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._thread = threading.Thread(target=trio.run, args=(self._serve,), name="servers")
        self._started = threading.Event()
        self._backend: Backend
        self._server: VhostUserServer
        self._stop: Callable[[], None]
        structlog.configure(processors=[self._record], wrapper_class=structlog.make_filtering_bound_logger(20))
        self._thread.start()
        assert self._started.wait(GUARD)

    def _record(self, _logger: object, level: str, entry: Any) -> Any:
        self.log.add({**entry, "level": level})
        raise structlog.DropEvent

    async def _serve(self) -> None:
        def disk(name: str, queues: int) -> Blk:
            return Blk(name, BlkOptions(backend="memory", size=DISK_SIZE), queues, 64)

        async with Worker("one") as one, Worker("two") as two:
            first, second = disk("honest", 1), disk("victim", VICTIM_QUEUES)
            async with (
                Backend(first, workers=[one]) as honest,
                Backend(second, workers=[one, two]) as self._backend,
                trio.open_nursery() as nursery,
            ):
                await nursery.start(VhostUserServer(honest, Listen(self.honest)).run)
                self._server = VhostUserServer(self._backend, Listen(self.victim))
                await nursery.start(self._server.run)
                token = trio.lowlevel.current_trio_token()
                self._stop = lambda: token.run_sync_soon(nursery.cancel_scope.cancel)
                self._started.set()
            first.close()
            second.close()

    @property
    def pid(self) -> int:
        return os.getpid()

    def counters(self) -> Counters:
        stats = self._server.stats
        broken = tuple(queue.broken for queue in self._backend.stats().queues)
        return Counters(broken, dict(stats.protocol_errors), stats.refused, stats.connections)

    def close(self) -> None:
        self._stop()
        self._thread.join(GUARD)
        assert not self._thread.is_alive()
        structlog.reset_defaults()
