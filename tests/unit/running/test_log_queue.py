"""A log that is not read, or that somebody floods, stops nothing; what is not written is counted and told."""

from __future__ import annotations

import fcntl
import gc
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from kit.project import ROOT

from daemon.log import setup as log
from daemon.log.floods import KINDS_MAX, OF_A_DEVICE, OF_THE_DAEMON, SPAN_SECONDS, Floods
from daemon.log.queue import FAILED, QUEUE_BYTES, QUEUE_LINES, SLOW, LineQueue

LIMIT = 60.0  # seconds; only a failing run gets there
F_SETPIPE_SZ = 1031


@pytest.fixture(autouse=True)
def defaults_afterwards() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@contextmanager
def small_pipe() -> Iterator[tuple[int, int]]:
    """A pipe of one page that is full. Its writing end blocks, as a process's stderr does."""
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, F_SETPIPE_SZ, 4096)
        os.write(writer, b"x" * 4095 + b"\n")
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def read_lines(reader: int, count: int) -> list[str]:
    data = b""
    while data.count(b"\n") < count:
        data += os.read(reader, 65536)
    return data.decode().splitlines()


def test_putting_a_line_never_waits_and_what_finds_no_room_is_counted_and_told_once_it_drained() -> None:
    told: list[int] = []
    drained = threading.Event()

    def lost(lines: int) -> None:
        told.append(lines)
        drained.set()

    with small_pipe() as (reader, writer), os.fdopen(writer, "w", closefd=False) as stream:
        queue = LineQueue(lambda: stream, lost, lambda: None)
        for number in range(QUEUE_LINES + 11):
            queue.put(f"line {number}")
        # One line may already be on its way: the thread holds that one while it waits for the reader.
        assert queue.dropped[SLOW] in (10, 11)
        kept = QUEUE_LINES + 11 - queue.dropped[SLOW]
        lines = read_lines(reader, 1 + kept)
        assert lines[1:] == [f"line {number}" for number in range(kept)]
        assert drained.wait(LIMIT)
        assert told == [queue.dropped[SLOW]]
        assert queue.close(LIMIT)


def test_the_queue_is_bounded_by_bytes_too() -> None:
    with small_pipe() as (reader, writer), os.fdopen(writer, "w", closefd=False) as stream:
        queue = LineQueue(lambda: stream, lambda lines: None, lambda: None)
        sizes = [len(f"{number:100000}") for number in range(2 + QUEUE_BYTES // 100000)]
        for size in sizes:
            queue.put("y" * size)
        assert queue.dropped[SLOW] in (1, 2)
        read_lines(reader, 1 + len(sizes) - queue.dropped[SLOW])
        assert queue.close(LIMIT)


def test_the_end_writes_the_last_lines_and_does_not_wait_for_a_reader_that_never_comes() -> None:
    with small_pipe() as (reader, writer), os.fdopen(writer, "w", closefd=False) as stream:
        queue = LineQueue(lambda: stream, lambda lines: None, lambda: None)
        queue.put("the last words")
        assert not queue.close(0.01)
        assert read_lines(reader, 2)[1] == "the last words"
        assert queue.close(LIMIT)


def test_lines_that_cannot_be_written_are_counted() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        queue = LineQueue(lambda: stream, lambda lines: None, lambda: None)
        queue.put("nobody will read this")
        assert queue.close(LIMIT)
        assert queue.dropped == {SLOW: 0, FAILED: 1}


def test_a_file_that_another_process_made_non_blocking_gets_every_line() -> None:
    with small_pipe() as (reader, writer), os.fdopen(writer, "w", closefd=False) as stream:
        os.set_blocking(writer, False)
        queue = LineQueue(lambda: stream, lambda lines: None, lambda: None)
        queue.put("z" * 10000)
        assert read_lines(reader, 2)[1] == "z" * 10000
        assert queue.close(LIMIT)


# Floods


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def passed(floods: Floods, count: int, event: str = "front-end connected", **more: Any) -> int:
    """How many of ``count`` such lines are let through."""
    let_through = 0
    for number in range(count):
        try:
            floods(None, "info", {"event": event, "number": number, **more})
        except structlog.DropEvent:
            continue
        let_through += 1
    return let_through


def test_of_a_kind_so_many_lines_pass_and_every_device_and_event_has_its_own_share() -> None:
    floods = Floods(Clock())
    assert passed(floods, 1000, device="a") == OF_A_DEVICE
    assert passed(floods, 1000, device="b") == OF_A_DEVICE
    assert passed(floods, 1000, event="connection ended", device="a") == OF_A_DEVICE
    assert passed(floods, 1000) == OF_THE_DAEMON
    assert floods.left_out == 3 * (1000 - OF_A_DEVICE) + 1000 - OF_THE_DAEMON


def test_a_span_that_is_over_reports_its_count_once_and_a_new_one_begins() -> None:
    clock = Clock()
    floods = Floods(clock)
    passed(floods, OF_A_DEVICE + 5, device="a")
    passed(floods, OF_A_DEVICE, device="b")
    assert floods.take_ended() == {}
    clock.now += SPAN_SECONDS
    assert floods.take_ended() == {("front-end connected", "a"): 5}
    assert floods.take_ended() == {}
    assert passed(floods, 1000, device="a") == OF_A_DEVICE
    assert passed(floods, 1000, device="b") == OF_A_DEVICE


def test_a_quiet_kind_is_never_cut() -> None:
    clock = Clock()
    floods = Floods(clock)
    for _ in range(100):
        assert passed(floods, OF_A_DEVICE, device="a") == OF_A_DEVICE
        clock.now += SPAN_SECONDS


def test_a_guests_console_and_the_counts_themselves_are_not_cut() -> None:
    floods = Floods(Clock())
    assert passed(floods, 1000, event="guest console", device="a") == 1000
    assert passed(floods, 1000, event="too many lines of a kind", device="a", left_out=3) == 1000


def test_an_event_whose_words_always_change_does_not_fill_the_memory() -> None:
    floods = Floods(Clock())
    let_through = sum(passed(floods, 1, event=f"mistake {number}", device="a") for number in range(KINDS_MAX + 100))
    assert let_through == KINDS_MAX


def test_a_flood_is_told_with_its_count_at_the_end_of_the_daemon() -> None:
    stream = io.StringIO()
    log.configure("info", "json", stream)
    with log.in_background():
        logger = structlog.get_logger().bind(device="disk")
        for number in range(OF_A_DEVICE + 7):
            logger.info("front-end connected", number=number)
        assert log.lines_lost()["too many of a kind"] == 7
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["number"] for line in lines[:-1]] == list(range(OF_A_DEVICE))
    assert (lines[-1]["event"], lines[-1]["line"], lines[-1]["device"], lines[-1]["left_out"]) == (
        "too many lines of a kind",
        "front-end connected",
        "disk",
        7,
    )


def test_an_operator_who_asks_for_the_level_debug_gets_every_line() -> None:
    stream = io.StringIO()
    log.configure("debug", "json", stream)
    with log.in_background():
        for _ in range(1000):
            structlog.get_logger().info("front-end connected", device="disk")
    assert len(stream.getvalue().splitlines()) == 1000


# What others would write to stderr


class Fragile:
    def __del__(self) -> None:
        raise ValueError("in __del__")


@pytest.mark.filterwarnings("ignore")
def test_what_python_and_libraries_would_write_to_stderr_becomes_lines_of_the_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    stream = io.StringIO()
    log.configure("info", "json", stream)
    with log.in_background():
        logging.getLogger("a.library").warning("from %s", "a library")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)  # the context has replaced what this one shows
            logging.captureWarnings(True)
            warnings.warn("from a device", stacklevel=1)
        fragile = Fragile()
        del fragile
        gc.collect()

        def fail() -> None:
            raise RuntimeError("in a thread")

        thread = threading.Thread(target=fail, name="a device's")
        thread.start()
        thread.join()
    text = stream.getvalue()
    for words in ("from a library", "from a device", "ValueError: in __del__", "RuntimeError: in a thread"):
        assert words in text
    assert capfd.readouterr().err == ""


# The whole daemon

CONFIG = """
[daemon]
metrics = "off"
control = "ctl.sock"
[devices.disk]
type = "blk"
backend = "null"
size = "1M"
socket = "disk.sock"
"""


def ask(path: Path) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT)
        client.connect(str(path))
        client.sendall(b'{"command": "stats"}\n')
        with client.makefile() as reader:
            answer: dict[str, Any] = json.loads(reader.readline())
    return answer


async def test_a_daemon_whose_log_is_not_read_serves_every_front_end_and_ends(tmp_path: Path) -> None:
    file = tmp_path / "hyperbell.toml"
    file.write_text(CONFIG)
    with small_pipe() as (_, writer), trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        await manager.bind(str(tmp_path / "notify"))
        with trio.fail_after(LIMIT):
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "daemon.cli", "serve", str(file), "--log-format", "json"],
                stderr=writer,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(tmp_path / "notify")},
            )
            try:
                assert b"READY=1" in await manager.recv(4096)
                for _ in range(500):  # each gives two lines and more
                    with socket.socket(socket.AF_UNIX) as front_end:
                        front_end.connect(str(tmp_path / "disk.sock"))
                        front_end.shutdown(socket.SHUT_WR)
                        front_end.setblocking(False)
                        await trio.lowlevel.wait_readable(front_end)
                stats = await trio.to_thread.run_sync(ask, tmp_path / "ctl.sock")
                assert stats["log_lines_lost"]["too many of a kind"] > 0
                process.terminate()
                assert await process.wait() == 0
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()


def test_the_time_of_a_span_is_measured_by_a_clock_that_nobody_sets() -> None:
    assert Floods()._clock is time.monotonic
