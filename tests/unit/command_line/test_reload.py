"""The daemon inside one event loop: what a reload does, and what a snapshot shows."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from config.loader import Config
from daemon.commands.command import load_config
from daemon.running.app import App, LogChoice
from daemon.running.control import ask
from daemon.running.systemd import Notifier
from transports.stock_qemu.messages import Message, Type
from virtio.fd import OwnedFd
from virtio.waist import AddressSpace, QueueSetup

LIMIT = 30  # seconds; only a failing run gets there
DAEMON = '[daemon]\nmetrics = "off"\nlog_level = "info"\nlog_format = "json"\n'
DISK = '[devices.disk]\ntype = "blk"\npath = "disk.img"\nsocket = "disk.sock"\n'


@pytest.fixture(autouse=True)
def log_afterwards() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@dataclass
class Run:
    """A running daemon with its configuration file, its service manager, and its log."""

    app: App
    file: Path
    manager: trio.socket.SocketType
    capsys: pytest.CaptureFixture[str]

    async def notified(self) -> list[str]:
        return (await self.manager.recv(4096)).decode().split("\n")

    async def reload(self) -> list[dict[str, Any]]:
        """Send SIGHUP, wait until all is done, and give what was logged."""
        self.capsys.readouterr()
        os.kill(os.getpid(), signal.SIGHUP)
        assert (await self.notified())[0] == "RELOADING=1"
        assert (await self.notified())[0] == "READY=1"
        return [json.loads(line) for line in self.capsys.readouterr().err.splitlines()]


@asynccontextmanager
async def running(
    folder: Path, text: str, capsys: pytest.CaptureFixture[str], level: str | None = None
) -> AsyncIterator[Run]:
    file = folder / "hyperbell.toml"
    file.write_text(text)
    choice = LogChoice(level, None)
    config = load_config(file)
    choice.apply(config)
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, trio.fail_after(LIMIT):
        await manager.bind(str(folder / "notify"))
        app = App(config, lambda: load_config(file), choice, Notifier(str(folder / "notify")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app.run)
            run = Run(app, file, manager, capsys)
            assert (await run.notified())[0] == "READY=1"
            yield run
            os.kill(os.getpid(), signal.SIGTERM)  # app.run returns, and so does the nursery


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk.img").touch()
    os.truncate(tmp_path / "disk.img", 1 << 20)
    return tmp_path


def events(lines: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"].startswith(event)]


async def test_a_reload_of_an_unchanged_file_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(folder, DAEMON + DISK, capsys) as run:
        assert [line["event"] for line in await run.reload()] == ["reloaded"]


async def test_a_new_log_level_is_in_effect_after_a_reload(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(folder, DAEMON + DISK, capsys) as run:
        run.file.write_text(DAEMON.replace('"info"', '"debug"') + DISK)
        (changed,) = events(await run.reload(), "changed")
        assert (changed["table"], changed["key"], changed["old"], changed["new"]) == (
            "daemon",
            "log_level",
            "info",
            "debug",
        )
        structlog.get_logger().debug("is logged now")
        assert "is logged now" in capsys.readouterr().err
        assert events(await run.reload(), "changed") == []


async def test_the_level_of_the_command_line_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(folder, DAEMON + DISK, capsys, level="warning") as run:
        run.file.write_text(DAEMON.replace('"info"', '"debug"') + DISK)
        assert await run.reload() == []
        structlog.get_logger().info("is not logged")
        assert capsys.readouterr().err == ""


async def test_each_key_that_needs_a_restart_has_its_own_line_until_the_restart(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(folder, DAEMON + DISK, capsys) as run:
        run.file.write_text(
            DAEMON + DISK + 'read_only = true\nqueues = 2\n[devices.e]\ntype = "rng"\nsocket = "e.sock"\n'
        )
        for _ in range(2):
            lines = events(await run.reload(), "needs a restart")
            assert [(line["table"], line.get("key")) for line in lines] == [
                ("devices.disk", "queues"),
                ("devices.disk", "read_only"),
                ("devices.e", None),
            ]
            assert (lines[1]["running"], lines[1]["configured"]) == (False, True)
            assert lines[2]["event"].endswith("was added")
        assert not (folder / "e.sock").exists()


async def test_a_changed_policy_is_in_effect_after_a_reload_and_one_changed_otherwise_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(folder, DAEMON + 'control = "ctl.sock"\n' + DISK, capsys) as run:
        assert run.app.snapshot().policies == {"disk": "offer"}
        run.file.write_text(DAEMON + 'control = "ctl.sock"\n' + DISK + 'hypercall = "withhold"\n')
        (changed,) = events(await run.reload(), "changed")
        assert (changed["table"], changed["key"], changed["old"], changed["new"]) == (
            *("devices.disk", "hypercall", "offer", "withhold"),
        )
        assert run.app.snapshot().policies == {"disk": "withhold"}
        await trio.to_thread.run_sync(lambda: ask(folder / "ctl.sock", "hypercall", device="disk", policy="auto"))
        assert events(await run.reload(), "changed") == []
        assert run.app.snapshot().policies == {"disk": "auto"}


async def test_the_hypercall_socket_takes_a_qemu_and_matches_its_doorbells(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DAEMON + 'hypercall_socket = "hypercall.sock"\nhypercall_socket_mode = "0620"\n' + DISK
    async with running(folder, text, capsys) as run:
        path = folder / "hypercall.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o620
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as library:
            await library.connect(str(path))
            await library.send(Message(Type.VM, flags=9, name="web1").build())
            await library.recv(100)
            assert [vm.name for vm in run.app.snapshot().vms] == ["web1"]
            with OwnedFd(os.eventfd(0)) as kick:
                await run.app._assembly.backends["disk"].configure_queue(0, QueueSetup(4, 0, 0, 0, 0, AddressSpace.GPA))
                await run.app._assembly.backends["disk"].set_kick(0, kick.duplicate())
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", kick.fileno()))]
                await library.sendmsg([Message(Type.BELL, bell=0x109000, serial=1).build()], rights)
                order = await library.recv(100)
                assert order == Message(Type.REGISTER, bell=0x109000, serial=1).build()
    assert not path.exists()


async def test_a_mistake_is_logged_and_nothing_is_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(folder, DAEMON + DISK, capsys) as run:
        run.file.write_text(DAEMON.replace('"info"', '"debug"') + DISK + "queues = 0\nbogus = 1\n")
        lines = await run.reload()
        assert [line["level"] for line in lines] == ["error", "error"]
        assert "[devices.disk] queues: must be at least 1" in lines[0]["problem"]
        structlog.get_logger().debug("is not logged")
        assert capsys.readouterr().err == ""
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(folder / "disk.sock"))


async def test_a_disk_that_grew_is_told_to_the_driver(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(folder, DAEMON + DISK, capsys) as run:
        os.truncate(folder / "disk.img", 2 << 20)
        lines = await run.reload()
        assert [(line["event"], line.get("device")) for line in lines] == [
            ("changed underneath: the driver is told", "disk"),
            ("reloaded", None),
        ]
        assert [line["event"] for line in await run.reload()] == ["reloaded"]


async def test_a_disk_that_cannot_be_examined_stays_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(folder, DAEMON + DISK, capsys) as run:
        os.truncate(folder / "disk.img", 0)
        (line,) = events(await run.reload(), "cannot be examined anew")
        assert (line["level"], line["device"]) == ("error", "disk")


async def test_a_worker_without_a_device_is_not_started_and_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(folder, DAEMON + "[workers.idle]\n" + DISK, capsys) as run:
        assert [worker.name for worker in run.app.snapshot().workers] == ["default"]
        assert '"worker": "idle"' in capsys.readouterr().err


async def test_a_snapshot_shows_devices_queues_connections_and_workers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[workers.w]\n" + DISK + 'queues = 3\nworker = "w"\n[devices.e]\ntype = "rng"\nsocket = "e.sock"\n'
    async with running(folder, DAEMON + text, capsys) as run:
        state = run.app.snapshot()
        assert [(device.backend.device, device.backend.type) for device in state.devices] == [
            ("disk", "blk"),
            ("e", "rng"),
        ]
        assert [queue.queue for queue in state.devices[0].backend.queues] == [0, 1, 2]
        connections = [device.connection for device in state.devices]
        assert [each is not None and each.connected for each in connections] == [False, False]
        assert state.devices[1].socket == folder / "e.sock"
        assert [worker.name for worker in state.workers] == ["w"]


async def test_a_reload_that_fails_for_another_reason_leaves_the_daemon_serving(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path) -> Config:
        raise RuntimeError(f"somebody's mistake in {file.name}")

    async with running(folder, DAEMON + DISK, capsys) as run:
        with monkeypatch.context() as patch:
            patch.setitem(globals(), "load_config", fail)
            (line,) = await run.reload()
        assert line["event"] == "not reloaded"
        assert "somebody's mistake in hyperbell.toml" in line["exception"]
        assert [line["event"] for line in await run.reload()] == ["reloaded"]


async def test_the_service_manager_is_told_of_a_refused_reload(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(folder, DAEMON + DISK, capsys) as run:
        run.file.write_text(DAEMON + DISK + "nonsense = 1\n")
        os.kill(os.getpid(), signal.SIGHUP)
        assert (await run.notified())[0] == "RELOADING=1"
        ready, status, *_ = await run.notified()
        assert ready == "READY=1"
        assert status.startswith("STATUS=a reload was refused: the configuration has a mistake; serving disk")
