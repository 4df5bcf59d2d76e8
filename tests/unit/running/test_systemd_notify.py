"""What systemd is told, over a real datagram socket."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from daemon.running.systemd import Notifier, feed_watchdog, watchdog_interval


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's side."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        yield receiver


def notifier(manager: socket.socket) -> Notifier:
    return Notifier.from_environment({"NOTIFY_SOCKET": manager.getsockname()})


def received(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_ready_comes_with_the_status(manager: socket.socket) -> None:
    notifier(manager).ready("serving disk")
    assert received(manager) == ["READY=1", "STATUS=serving disk"]


def test_a_status_stays_one_line(manager: socket.socket) -> None:
    notifier(manager).ready("a\nREADY=0")
    assert received(manager) == ["READY=1", "STATUS=a READY=0"]


def test_reloading_comes_with_the_monotonic_clock(manager: socket.socket) -> None:
    before = time.monotonic_ns() // 1000
    notifier(manager).reloading()
    name, clock = received(manager)
    assert name == "RELOADING=1"
    assert before <= int(clock.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_stopping_and_alive_are_what_systemd_knows(manager: socket.socket) -> None:
    notifier(manager).stopping()
    assert received(manager)[0] == "STOPPING=1"
    notifier(manager).alive()
    assert received(manager) == ["WATCHDOG=1"]


def test_an_address_with_an_at_sign_is_abstract() -> None:
    name = f"hyperbell-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + name)
        receiver.setblocking(False)
        Notifier(f"@{name}").alive()
        assert received(receiver) == ["WATCHDOG=1"]


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_a_socket_nothing_is_sent_and_nothing_logged(environment: dict[str, str]) -> None:
    silent = Notifier.from_environment(environment)
    with capture_logs() as logs:
        silent.ready("x")
    assert not silent.active
    assert logs == []


def test_a_manager_that_is_gone_costs_a_line_of_log_and_nothing_else(tmp_path: Path) -> None:
    with capture_logs() as logs:
        Notifier(str(tmp_path / "gone")).ready("x")
    assert [entry["notification"] for entry in logs] == ["READY=1"]


def test_a_manager_that_does_not_read_never_holds_the_daemon_up(manager: socket.socket) -> None:
    with capture_logs() as logs:
        for _ in range(10_000):
            notifier(manager).alive()
            if logs:
                break
    assert "temporarily unavailable" in logs[0]["error"]


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, math.inf),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, math.inf),
        ({"WATCHDOG_USEC": "0"}, math.inf),
        ({"WATCHDOG_USEC": "soon"}, math.inf),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time_and_only_by_the_process_it_watches(
    environment: dict[str, str], seconds: float
) -> None:
    assert watchdog_interval(environment) == seconds


async def test_the_watchdog_is_fed_by_the_event_loop(
    manager: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(40):
        await feed_watchdog(notifier(manager), 15.0)
    fed = [received(manager) for _ in range(3)]  # at 0, 15 and 30 seconds
    assert fed == [["WATCHDOG=1"]] * 3
    with pytest.raises(BlockingIOError):
        received(manager)
