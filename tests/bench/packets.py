"""Packets: DPDK's testpmd drives our reflecting network device, and in turns testpmd's own vhost device.

The driver is ``net_virtio_user``, a virtio driver in user space that we did not write. It sends some
bursts once and from then on sends back whatever it gets; so do the servers, and the same frames go round for ever.
What has gone by is read from testpmd's telemetry socket, while nothing is stopped.
"""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from tests.bench.matrix import IDLE_BAR_SECONDS, OURS, Bar, ratio
from tests.bench.measure import DISTURBED, SETTLE_SECONDS, Log, Timing, busy_seconds
from tests.bench.servers import (
    SOCKET_NAME,
    STOP_SECONDS,
    Server,
    ServerError,
    pinned,
    process_cpu_seconds,
    serve_command,
)

DPDK: Final = "DPDK net_vhost"
RATE_BAR: Final = 0.5
POLL_US: Final = 1000  # the most that the daemon allows; DPDK never stops looking
QUEUE_SIZE: Final = 1024
BURST: Final = 32  # testpmd's default
BURSTS: Final = 8  # that are on their way round
FRAME_BYTES: Final = 64  # testpmd's default
MBUFS: Final = 16384  # more do not fit into MEMORY_MIB
MEMORY_MIB: Final = 512
RECONNECTED: Final = "server mode virtio-user reconnection succeeds"
START_SECONDS: Final = 30.0
LOOK_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class PacketSample:
    """What one run, or the median of several, says about a server."""

    packets_per_second: float
    """That came back to the driver."""
    cpu_s_per_million: float
    """CPU seconds of the server for a million of them."""
    sleeps_per_second: float
    """How often a thread of the server went to sleep: next to never while it polls."""
    disturbed: float
    """The larger share of either CPU's time that other processes took."""


@dataclass(frozen=True, slots=True)
class PacketResult:
    """One server's line of the table."""

    run: PacketSample
    idle_seconds: float
    idle_cpu_seconds: float
    """Over ``idle_seconds``, with a connected driver that sends nothing."""


@dataclass(frozen=True, slots=True)
class PacketServer:
    """How a server is started: it polls without end or nearly so, and each round therefore starts it anew."""

    name: str
    cpu: int
    driver_cpu: int

    @contextmanager
    def drive(self) -> Iterator[tuple[Server, Driver]]:
        """The server with frames going round between it and a driver."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hyperbell-bench-")))
            server = stack.enter_context(Server(self.name, self._command(folder), folder, self.cpu))
            driver = stack.enter_context(Driver(server.socket, folder, self.driver_cpu))
            driver.start()
            yield server, driver

    def _command(self, folder: Path) -> list[str]:
        path = folder / SOCKET_NAME
        if self.name == DPDK:
            # Without --interactive it forwards at once; a period for statistics keeps it from reading stdin.
            options = ("--forward-mode=macswap", "--stats-period=1000000")
            return testpmd_command(folder, "vhost", self.cpu, f"net_vhost0,iface={path},queues=1", *options)
        lines = ["[daemon]", 'metrics = "off"', "[workers.w0]", f"cpus = [{self.cpu}]", f"poll_us = {POLL_US}"]
        lines += ["[devices.net]", f'socket = "{path}"', 'type = "net"', 'worker = "w0"', 'backend = "null"']
        lines += ['frames = "reflect"', f"queue_size = {QUEUE_SIZE}"]
        return serve_command(folder, lines)


def testpmd_command(folder: Path, prefix: str, cpu: int, device: str, *options: str) -> list[str]:
    """testpmd with one port, all on ``cpu``; what it leaves lying about is in ``folder``.

    No hugepages, so that it needs no preparing of the host; one memory file, as vhost-user hands over few of them.
    """
    program = shutil.which("dpdk-testpmd")
    if program is None:
        raise ServerError("dpdk-testpmd is missing: apt-get install dpdk-dev")
    command = ["env", f"RUNTIME_DIRECTORY={folder}", program, "--no-huge", "--single-file-segments", "--no-pci"]
    command += ["-m", str(MEMORY_MIB), "--file-prefix", prefix, "--lcores", f"0@{cpu},1@{cpu}", "--vdev", device]
    return [*command, "--", f"--total-num-mbufs={MBUFS}", "--disable-link-check", *options]


class Driver:
    """testpmd as the driver of the device at ``path``; ``with`` ends it."""

    def __init__(self, path: Path, folder: Path, cpu: int, *, options: str = "") -> None:
        device = f"net_virtio_user0,path={path},queues=1,queue_size={QUEUE_SIZE}{options}"
        command = testpmd_command(folder, "driver", cpu, device, "--forward-mode=io", "--interactive")
        self.cpu = cpu
        self._telemetry_path = folder / "dpdk" / "driver" / "dpdk_telemetry.v2"
        self._telemetry: socket.socket | None = None
        self._log: IO[bytes] = (folder / "driver.log").open("w+b")
        with pinned(cpu):
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT)
        assert self._process.stdin is not None
        self._stdin: IO[bytes] = self._process.stdin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        with suppress(OSError):  # it has ended
            self.say("quit")
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(OSError):
            self._stdin.close()
        if self._telemetry is not None:
            self._telemetry.close()
        self._log.close()

    def say(self, command: str) -> None:
        """Give testpmd a command, which it reads when it is ready to."""
        self._stdin.write(command.encode() + b"\n")
        self._stdin.flush()

    def start(self) -> None:
        """Send the bursts; returns when the first frame has come back."""
        self.say(f"start tx_first {BURSTS}")
        self.wait_for(1)

    def wait_for(self, frames: int) -> None:
        """Until so many have come back since the start."""
        end = time.monotonic() + START_SECONDS
        while not self._connect() or self.received() < frames:
            if self._process.poll() is not None:
                raise ServerError(f"testpmd ended with status {self._process.returncode}: {self._last_words()}")
            if time.monotonic() > end:
                raise ServerError(f"testpmd got less than {frames} frames in {START_SECONDS:g} s: {self._last_words()}")
            time.sleep(LOOK_SECONDS)

    def go_round_again(self, frames: int) -> None:
        """Until so many more have come back, of bursts that are sent anew whenever none comes.

        DPDK 22.11 loses frames of its own after it reconnected a packed ring, whoever the back-end is: it drops what
        was under way, and sends buffers later on whose length it has already set to 0.
        """
        end = time.monotonic() + START_SECONDS
        goal = self.received() + frames
        before = None
        while (now := self.received()) < goal:
            if time.monotonic() > end:
                raise ServerError(f"testpmd got {goal - now} frames too few: {self._last_words()}")
            if before in (None, now):
                self.say("stop")
                self.say(f"start tx_first {BURSTS}")
            before = now
            time.sleep(SETTLE_SECONDS)

    def wait_for_reconnection(self, times: int) -> None:
        """Of a driver that listens (``server=1``): until its back-end has come back so often."""
        end = time.monotonic() + START_SECONDS
        while self._read_log().count(RECONNECTED) < times:
            if time.monotonic() > end:
                raise ServerError(f"testpmd's back-end has not come back in {START_SECONDS:g} s: {self._last_words()}")
            time.sleep(LOOK_SECONDS)

    def stop(self) -> None:
        """Send nothing more; returns when that is so, and when a server that polled for a while has ended it."""
        self.say("stop")
        end = time.monotonic() + START_SECONDS
        before, now = -1, self.received()
        while before != now:
            if time.monotonic() > end:
                raise ServerError(f"testpmd went on for {START_SECONDS:g} s after it was told to stop")
            time.sleep(SETTLE_SECONDS)
            before, now = now, self.received()

    def _connect(self) -> bool:
        """Whether testpmd is far enough to be asked."""
        if self._telemetry is not None:
            return True
        telemetry = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        telemetry.settimeout(START_SECONDS)
        try:
            telemetry.connect(str(self._telemetry_path))
            telemetry.recv(65536)  # it introduces itself
        except (FileNotFoundError, ConnectionRefusedError):
            telemetry.close()
            return False
        self._telemetry = telemetry
        return True

    def received(self) -> int:
        """How many frames have come back."""
        return self._count("ipackets")

    def sent(self) -> int:
        """How many frames have left."""
        return self._count("opackets")

    def _count(self, name: str) -> int:
        assert self._telemetry is not None
        try:
            self._telemetry.send(b"/ethdev/stats,0")
            answer: dict[str, Any] = json.loads(self._telemetry.recv(65536) or b"{}")
        except OSError as error:
            raise ServerError(f"testpmd does not answer ({error}): {self._last_words()}") from error
        port = answer.get("/ethdev/stats") or {}  # none while there is no port yet
        return int(port.get(name, 0))

    def cpu_seconds(self) -> float:
        """Of all threads so far."""
        return process_cpu_seconds(self._process.pid)

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _last_words(self) -> str:
        return self._read_log().strip()[-1000:]


def measure_packets(server_cpu: int, driver_cpu: int, timing: Timing, log: Log) -> dict[str, PacketResult]:
    """Medians by server, in turns; every round begins with another one. Without testpmd none, and a note."""
    if shutil.which("dpdk-testpmd") is None:
        log.note("dpdk-testpmd is missing: apt-get install dpdk-dev; packets were not measured, nor their bars checked")
        return {}
    servers = [PacketServer(name, server_cpu, driver_cpu) for name in (OURS, DPDK)]
    samples: dict[str, list[PacketSample]] = {one.name: [] for one in servers}
    for turn in range(timing.rounds):
        for one in servers if turn % 2 == 0 else reversed(servers):
            sample = _run_undisturbed(one, timing)
            samples[one.name].append(sample)
            log.progress(f"packets: {one.name} {sample.packets_per_second:,.0f} packets a second")
    results = {}
    for one in servers:
        log.progress(f"packets: {one.name} idle")
        results[one.name] = PacketResult(_take_medians(samples[one.name]), timing.idle, _watch_idle(one, timing.idle))
    if any(result.run.disturbed > DISTURBED for result in results.values()):
        log.note("packets: other processes took part of the two CPUs: the figures are rough")
    return results


def _run_undisturbed(one: PacketServer, timing: Timing) -> PacketSample:
    """One connection. A run that others disturbed is repeated; the least disturbed one counts."""
    with one.drive() as (server, driver):
        time.sleep(timing.warm_up)
        best, left = _run_once(server, driver, timing.seconds), timing.retries
        while best.disturbed > DISTURBED and left:
            left -= 1
            best = min(best, _run_once(server, driver, timing.seconds), key=lambda sample: sample.disturbed)
        return best


def _run_once(server: Server, driver: Driver, seconds: float) -> PacketSample:
    def look() -> tuple[float, ...]:
        used = server.cpu_seconds(), driver.cpu_seconds()
        busy = busy_seconds(server.cpu), busy_seconds(driver.cpu)
        return time.monotonic(), driver.received(), server.wakeups(), *used, *busy

    before = look()
    time.sleep(seconds)
    after = look()
    server.check()
    passed = (now - then for now, then in zip(after, before, strict=True))
    elapsed, received, sleeps, used, driver_used, busy, driver_busy = passed
    if not received:
        raise ServerError(f"packets: nothing came back from {server.name} in {elapsed:.1f} s: the frames got lost")
    return PacketSample(
        packets_per_second=received / elapsed,
        cpu_s_per_million=used / received * 1e6,
        sleeps_per_second=sleeps / elapsed,
        disturbed=max(busy - used, driver_busy - driver_used, 0.0) / elapsed,
    )


def _watch_idle(one: PacketServer, seconds: float) -> float:
    """CPU seconds of a server whose driver has just had some work done and sends nothing more."""
    with one.drive() as (server, driver):
        driver.stop()
        before = server.cpu_seconds()
        time.sleep(seconds)
        server.check()
        return server.cpu_seconds() - before


def _take_medians(samples: Sequence[PacketSample]) -> PacketSample:
    figures = [asdict(sample) for sample in samples]
    return PacketSample(**{name: statistics.median(one[name] for one in figures) for name in figures[0]})


def check_packet_bars(results: dict[str, PacketResult]) -> list[Bar]:
    """Our rate beside DPDK's, and what an idle driver costs."""
    if not results:
        return []
    ours, theirs = results[OURS], results[DPDK]
    rate = ratio(ours.run.packets_per_second, theirs.run.packets_per_second)
    used = f"{ours.idle_cpu_seconds * 1000:.3f} ms of CPU in {ours.idle_seconds:g} s"
    return [
        Bar(f"packets, both polling: {rate:.2f} times the rate of {DPDK} (bar {RATE_BAR:g})", rate >= RATE_BAR),
        Bar(f"packets, nothing is sent: {used} (bar: none)", ours.idle_cpu_seconds <= IDLE_BAR_SECONDS),
    ]
