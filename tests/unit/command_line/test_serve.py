"""The daemon as a process: from its first line of log to its exit status."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from kit.project import ROOT

LIMIT = 60  # seconds; only a failing run gets there
DEVICES = """
[daemon]
metrics = "127.0.0.1:0"
control = "ctl.sock"
[devices.disk]
type = "blk"
backend = "null"
size = "1M"
socket = "disk.sock"
[devices.entropy]
type = "rng"
socket = "rng.sock"
"""


def sockets(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.sock")}


class Daemon:
    """A running ``hyperbell serve``; its log is read line by line."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._buffer = b""

    async def next_line(self) -> dict[str, Any] | None:
        """The next line of the log; ``None`` at its end."""
        assert self.process.stderr is not None
        while b"\n" not in self._buffer:
            received = await self.process.stderr.receive_some()
            if not received:
                assert self._buffer == b""
                return None
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        parsed: dict[str, Any] = json.loads(line)
        return parsed

    async def until(self, event: str) -> dict[str, Any]:
        """Read the log up to a line with ``event``."""
        while (line := await self.next_line()) is not None:
            if line["event"] == event:
                return line
        raise AssertionError(f"the log ended without {event!r}")

    async def rest(self) -> list[dict[str, Any]]:
        lines = []
        while (line := await self.next_line()) is not None:
            lines.append(line)
        return lines


@asynccontextmanager
async def serving(
    folder: Path,
    text: str,
    *options: str,
    pass_fds: tuple[int, ...] = (),
    environment: dict[str, str] | None = None,
) -> AsyncIterator[Daemon]:
    file = folder / "hyperbell.toml"
    file.write_text(text)
    with trio.fail_after(LIMIT):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "daemon.cli", "serve", str(file), "--log-format", "json", *options],
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
            pass_fds=pass_fds,
        )
        try:
            yield Daemon(process)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            assert process.stderr is not None
            await process.stderr.aclose()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_signal_ends_the_daemon_with_0_and_no_socket_left(tmp_path: Path, number: signal.Signals) -> None:
    async with serving(tmp_path, DEVICES) as daemon:
        line = await daemon.until("serving")
        assert line["devices"] == ["disk", "entropy"]
        assert line["metrics"].startswith("http://127.0.0.1:")
        assert sockets(tmp_path) == {"ctl.sock", "disk.sock", "rng.sock"}
        daemon.process.send_signal(number)
        assert (await daemon.until("stopping"))["signal"] == number.name
        assert (await daemon.until("stopped"))["status"] == 0
        assert await daemon.rest() == []
        assert await daemon.process.wait() == 0
        assert sockets(tmp_path) == set()


async def test_a_stop_signal_ends_the_daemon_cleanly_while_front_ends_and_clients_are_connected(tmp_path: Path) -> None:
    async with serving(tmp_path, DEVICES) as daemon:
        await daemon.until("serving")
        with socket.socket(socket.AF_UNIX) as front_end, socket.socket(socket.AF_UNIX) as client:
            front_end.connect(str(tmp_path / "disk.sock"))
            client.connect(str(tmp_path / "ctl.sock"))
            await daemon.until("front-end connected")
            daemon.process.terminate()
            assert await daemon.process.wait() == 0
        assert [line["level"] for line in await daemon.rest() if line["level"] != "info"] == []


async def test_ready_is_said_only_after_every_socket_listens_and_stopping_at_the_end(tmp_path: Path) -> None:
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        await manager.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000000"}
        async with serving(tmp_path, DEVICES, environment=environment) as daemon:
            ready = (await manager.recv(4096)).decode().split("\n")
            assert ready[0] == "READY=1"
            assert ready[1].startswith("STATUS=serving disk, entropy; metrics at http://127.0.0.1:")
            for name in ("disk.sock", "rng.sock", "ctl.sock"):
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(tmp_path / name))
            assert (await manager.recv(4096)).decode() == "WATCHDOG=1"
            daemon.process.terminate()
            assert (await manager.recv(4096)).decode().startswith("STOPPING=1")
            assert await daemon.process.wait() == 0


async def test_every_device_that_cannot_be_had_is_named_and_the_status_is_1_when_strict(tmp_path: Path) -> None:
    text = DEVICES.replace('backend = "null"\nsize = "1M"', 'path = "missing.img"') + (
        '[devices.other]\ntype = "blk"\npath = "also-missing.img"\nsocket = "other.sock"\n'
    )
    async with serving(tmp_path, text, "--strict") as daemon:
        lines = await daemon.rest()
        assert await daemon.process.wait() == 1
    reasons = [line["reason"] for line in lines if line["event"] == "cannot serve"]
    assert [reason.split("]")[0] for reason in reasons] == ["[devices.disk", "[devices.other"]
    assert all("missing.img" in reason for reason in reasons)
    assert sockets(tmp_path) == set()


async def test_a_taken_metrics_port_is_one_clear_line_and_status_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with serving(tmp_path, DEVICES.replace(":0", f":{port}")) as daemon:
            errors = [line for line in await daemon.rest() if line["level"] == "error"]
            assert await daemon.process.wait() == 1
    assert [line["event"] for line in errors] == ["cannot serve"]
    assert f"cannot listen on 127.0.0.1 port {port}" in errors[0]["reason"]
    assert sockets(tmp_path) == set()


async def test_a_second_daemon_leaves_the_sockets_of_the_first_alone(tmp_path: Path) -> None:
    async with serving(tmp_path, DEVICES) as first:
        await first.until("serving")
        async with serving(tmp_path, DEVICES.replace('control = "ctl.sock"\n', ""), "--strict") as second:
            errors = [line["reason"] for line in await second.rest() if line["event"] == "cannot serve"]
            assert await second.process.wait() == 1
        assert [error.split("]")[0] for error in errors] == ["[devices.disk", "[devices.entropy"]
        assert "disk.sock" in errors[0]
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(tmp_path / "disk.sock"))
            await first.until("front-end connected")


async def test_an_inherited_connection_is_served_and_its_end_ends_the_daemon(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            text = f'[devices.e]\ntype = "rng"\nsocket = "unused.sock"\nsocket_fd = {theirs.fileno()}\n'
            manager = serving(tmp_path, '[daemon]\nmetrics = "off"\n' + text, pass_fds=(theirs.fileno(),))
            daemon = await manager.__aenter__()
        try:
            assert (await daemon.until("serving"))["metrics"] == "off"
            ours.close()
            await daemon.until("no device is left to serve")
            assert await daemon.process.wait() == 0
            assert not (tmp_path / "unused.sock").exists()
        finally:
            await manager.__aexit__(None, None, None)


async def test_a_socket_that_was_not_passed_on_is_named(tmp_path: Path) -> None:
    text = '[devices.e]\ntype = "rng"\nsocket = "e.sock"\nsocket_fd = 77\n'
    file = tmp_path / "hyperbell.toml"
    file.write_text(text)
    result = await trio.run_process(
        [sys.executable, "-m", "daemon", "serve", str(file)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_stderr=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith(b"hyperbell: [devices.e] socket_fd: 77 is not an open socket")
