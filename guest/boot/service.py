"""Run ``hyperbell serve`` beside a guest: wait until it is ready, read its metrics, end it."""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from guest.debian.cache import PrepareError

READY_SECONDS = 20
STOP_SECONDS = 10
TAIL_LINES = 25


class ServiceError(Exception):
    """The daemon did not do what it should; the text ends with the tail of its log."""


class Metrics:
    """One scrape of the daemon's metrics page."""

    def __init__(self, text: str) -> None:
        self.samples: list[Sample] = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def select(self, name: str, **labels: str) -> list[Sample]:
        """The samples called ``name`` whose labels include ``labels``."""
        return [
            sample
            for sample in self.samples
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
        ]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples selected; 0 when there is none."""
        return sum(sample.value for sample in self.select(name, **labels))

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """The sums of ``name`` for each value of ``label``."""
        sums: dict[str, float] = {}
        for sample in self.select(name, **labels):
            key = sample.labels.get(label, "")
            sums[key] = sums.get(key, 0) + sample.value
        return sums

    def quantile(self, fraction: float, name: str, **labels: str) -> float | None:
        """Estimate a quantile of histogram ``name`` as Prometheus does: linear within the bucket. None when empty.

        In the histogram's unit (seconds). A quantile beyond the last bound is that bound.
        """
        counts = {float(bound): count for bound, count in self.by("le", f"{name}_bucket", **labels).items()}
        bounds = sorted(counts)
        if not bounds or counts[bounds[-1]] == 0:
            return None
        rank = fraction * counts[bounds[-1]]
        below_bound, below_count = 0.0, 0.0
        for bound in bounds:
            if counts[bound] >= rank:
                if bound == float("inf"):
                    return below_bound
                share = (rank - below_count) / (counts[bound] - below_count) if counts[bound] > below_count else 1.0
                return below_bound + (bound - below_bound) * share
            below_bound, below_count = bound, counts[bound]
        return below_bound


def hyperbell_command() -> Path:
    """The ``hyperbell`` of the virtual environment that runs this. ``PrepareError`` when it is not there."""
    command = Path(sys.executable).with_name("hyperbell")
    if not command.exists():
        raise PrepareError(f"{command} does not exist; run 'make setup'")
    return command


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def qemu_arguments(
    config: Path, memory_mib: int, devices: Sequence[str] = (), *, accel: str = "tcg"
) -> list[str]:
    """What ``hyperbell qemu-args`` prints for ``config``: QEMU's options, shared memory included.

    Only ``devices`` where some are named; they stand in the order of the configuration. With ``accel`` "tcg" a guest
    that runs with KVM can have them too.
    """
    command = [str(hyperbell_command()), "qemu-args", str(config), *devices]
    command += ["--memory", f"{memory_mib}M", "--accel", accel]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode != 0:
        raise ServiceError(f"'{shlex.join(command)}' ended with status {done.returncode}: {done.stderr.decode()}")
    return shlex.split(done.stdout.decode().replace("\\\n", ""))


@dataclass
class Daemon:
    """A daemon that is ready. ``metrics_port`` is what its configuration says."""

    process: trio.Process
    log: Path
    metrics_port: int

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def metrics_address(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    async def metrics(self) -> Metrics:
        """Scrape the metrics page. ``ServiceError`` when it does not answer."""
        return Metrics(await trio.to_thread.run_sync(self._scrape))

    def _scrape(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=10)
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            text = answer.read().decode()
        except OSError as error:
            raise self.error(f"{self.metrics_address} does not answer: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise self.error(f"{self.metrics_address} answers with status {answer.status}")
        return text

    async def stop(self) -> None:
        """SIGTERM, and wait. ``ServiceError`` unless it ends in time and with status 0."""
        self.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(STOP_SECONDS):
            status = await self.process.wait()
            if status != 0:
                raise self.error(f"the daemon ended with status {status} after SIGTERM")
            return
        raise self.error(f"the daemon did not end within {STOP_SECONDS} s of SIGTERM")

    async def kill(self) -> None:
        """SIGKILL, as a crash would end it, and wait."""
        self.process.kill()
        await self.process.wait()

    def reload(self) -> None:
        """SIGHUP: it looks at its images again, among other things. Does not wait for it."""
        self.process.send_signal(signal.SIGHUP)

    def error(self, message: str) -> ServiceError:
        return ServiceError("\n  | ".join([f"{message}\nthe end of the daemon's log:", *log_tail(self.log)]))


def log_tail(log: Path) -> list[str]:
    """The last lines of the daemon's log."""
    try:
        return log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError as error:
        return [f"({log}: {error.strerror})"]


@asynccontextmanager
async def serve(config: Path, folder: Path, metrics_port: int) -> AsyncIterator[Daemon]:
    """``hyperbell serve config`` from its READY=1 on; ended when the block is left and it still runs.

    Its log and its notification socket lie in ``folder``. Raises ``ServiceError`` if it does not become ready.
    """
    log = folder / "daemon.log"
    notify = folder / "notify.sock"
    notify.unlink(missing_ok=True)
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        await receiver.bind(str(notify))
        with log.open("ab") as output:
            process = await trio.lowlevel.open_process(
                [str(hyperbell_command()), "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "NOTIFY_SOCKET": str(notify)},
                start_new_session=True,  # a Ctrl-C is for us: we end the guest first
            )
        daemon = Daemon(process, log, metrics_port)
        try:
            await _wait_ready(daemon, receiver)
            yield daemon
        finally:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(STOP_SECONDS):
                    if process.returncode is None:
                        process.terminate()
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()


async def _wait_ready(daemon: Daemon, receiver: trio.socket.SocketType) -> None:
    """Wait for READY=1 (sd_notify(3)), but not for a daemon that has ended."""
    ready = False
    async with trio.open_nursery() as nursery:

        async def until_ended() -> None:
            await daemon.process.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(until_ended)
        with trio.move_on_after(READY_SECONDS):
            while not ready:
                ready = b"READY=1" in (await receiver.recv(4096)).split(b"\n")
        nursery.cancel_scope.cancel()
    if daemon.process.returncode is not None:
        raise daemon.error(f"the daemon ended with status {daemon.process.returncode} before it was ready")
    if not ready:
        raise daemon.error(f"the daemon did not say READY=1 within {READY_SECONDS} s")
