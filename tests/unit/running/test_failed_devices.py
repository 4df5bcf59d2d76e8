"""Devices that cannot be had: they are named and tried again, and keep no other device from its guest."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs
from unit.command_line.test_serve import Daemon, serving, sockets

from config.loader import Device as Configured
from daemon.commands.command import load_config
from daemon.commands.show_table import render
from daemon.metrics.page import StateCollector
from daemon.running.control import ask
from daemon.running.files import Files
from daemon.running.served import RETRY_SECONDS_MAX, ServedDevice
from daemon.state import DaemonState, FailedDevice
from virtio.backend.backend import Backend
from virtio.capabilities import DiskStorage
from virtio.device import Device
from virtio.devices.rng import Rng
from virtio.errors import HostError
from virtio.native.stats import Storage

MISSING = """
[daemon]
metrics = "127.0.0.1:0"
control = "ctl.sock"
[devices.disk]
type = "blk"
path = "disk.img"
socket = "disk.sock"
[devices.entropy]
type = "rng"
socket = "rng.sock"
"""
OWN_DEVICE = """
[devices.own]
type = "./own.py:Own"
socket = "own.sock"
"""
NEVER_STARTED = """
import trio
from virtio import Chain, Device, Queue


class Own(Device):
    virtio_id = 42
    type_name = "own"

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(b"")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await trio.sleep_forever()
"""


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as front_end:
        try:
            front_end.connect(str(path))
        except OSError:
            return False
        return True


async def stats(folder: Path) -> dict[str, Any]:
    return await trio.to_thread.run_sync(ask, folder / "ctl.sock", "stats")


async def ended(daemon: Daemon) -> list[dict[str, Any]]:
    daemon.process.terminate()
    lines = await daemon.rest()
    assert await daemon.process.wait() == 0
    return lines


async def test_a_missing_image_keeps_no_other_device_from_its_guest_and_is_served_once_it_is_there(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, MISSING) as daemon:
        failed = await daemon.until("device failed")
        assert (failed["device"], failed["level"]) == ("disk", "error")
        assert "disk.img" in failed["reason"]
        line = await daemon.until("serving")
        assert (line["devices"], line["failed"]) == (["entropy"], ["disk"])
        assert connects(tmp_path / "rng.sock")
        assert not connects(tmp_path / "disk.sock")
        shown = await stats(tmp_path)
        assert [one["backend"]["device"] for one in shown["devices"]] == ["entropy"]
        assert [one["device"] for one in shown["failed"]] == ["disk"]
        assert "disk.img" in render(shown)
        (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
        assert (await daemon.until("device is served again"))["device"] == "disk"  # by itself
        assert connects(tmp_path / "disk.sock")
        shown = await stats(tmp_path)
        assert [one["backend"]["device"] for one in shown["devices"]] == ["disk", "entropy"]
        assert shown["failed"] == []
        assert shown["failures"]["disk"] >= 1
        await ended(daemon)
    assert sockets(tmp_path) == set()


async def test_a_reload_takes_a_failed_devices_corrected_table_and_tries_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "other.img").write_bytes(bytes(1 << 20))
    async with serving(tmp_path, MISSING) as daemon:
        await daemon.until("serving")
        (tmp_path / "hyperbell.toml").write_text(MISSING.replace('"disk.img"', '"other.img"'))
        daemon.process.send_signal(signal.SIGHUP)
        while (line := await daemon.next_line()) is not None and line["event"] != "device is served again":
            assert "needs a restart" not in line["event"]
        assert line is not None
        assert connects(tmp_path / "disk.sock")
        await ended(daemon)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, "does not exist"),
        ("class Own(", "cannot be run"),
        ("raise SystemExit", "cannot be run"),
        ("", "no class"),
    ],
    ids=["no file", "no Python", "ends the program", "no class"],
)
async def test_a_bad_device_file_keeps_no_other_device_from_its_guest_and_may_be_mended(
    tmp_path: Path, code: str | None, reason: str
) -> None:
    if code is not None:
        (tmp_path / "own.py").write_text(code)
    text = MISSING.replace('path = "disk.img"', 'backend = "null"\nsize = "1M"') + OWN_DEVICE
    async with serving(tmp_path, text) as daemon:
        failed = await daemon.until("device failed")
        assert failed["device"] == "own"
        assert reason in failed["reason"]
        assert "[devices.own] type" in failed["reason"]
        assert (await daemon.until("serving"))["devices"] == ["disk", "entropy"]
        good = NEVER_STARTED.replace("await trio.sleep_forever()", "task_status.started()")
        (tmp_path / "own.py").write_text(good)
        daemon.process.send_signal(signal.SIGHUP)
        assert (await daemon.until("device is served again"))["device"] == "own"
        assert connects(tmp_path / "own.sock")
        await ended(daemon)


async def test_a_bad_device_file_is_a_mistake_of_the_configuration_when_strict_and_at_check(tmp_path: Path) -> None:
    async with serving(tmp_path, MISSING + OWN_DEVICE, "--strict") as daemon:
        assert daemon.process.stderr is not None
        assert await daemon.process.wait() == 78


async def test_a_device_that_never_reports_its_start_is_named_and_the_others_are_served_meanwhile(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.py").write_text(NEVER_STARTED)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    async with serving(tmp_path, MISSING + OWN_DEVICE) as daemon:
        await daemon.until("listening")
        await daemon.until("listening")
        assert connects(tmp_path / "disk.sock")  # before the third one was given up
        failed = await daemon.until("device failed")
        assert failed["device"] == "own"
        assert "has not reported for 5 seconds" in failed["reason"]
        assert (await daemon.until("serving"))["failed"] == ["own"]
        await ended(daemon)


async def test_a_stop_signal_is_obeyed_while_a_device_has_not_started_yet(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(NEVER_STARTED)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    async with serving(tmp_path, MISSING + OWN_DEVICE) as daemon:
        await daemon.until("listening")
        lines = await ended(daemon)
    assert [line["event"] for line in lines if line["event"] == "serving"] == []


async def test_a_second_stop_signal_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    async with serving(tmp_path, MISSING) as daemon:
        await daemon.until("serving")
        daemon.process.terminate()
        await daemon.until("stopping")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            daemon.process.send_signal(number)
        assert (await daemon.until("stopped"))["status"] == 0
        daemon.process.terminate()  # also after the last line
        assert await daemon.process.wait() == 0
    assert sockets(tmp_path) == set()


async def test_the_service_manager_is_told_which_devices_failed_and_when_they_are_served_again(tmp_path: Path) -> None:
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        await manager.bind(str(tmp_path / "notify"))
        async with serving(tmp_path, MISSING, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as daemon:
            ready = (await manager.recv(4096)).decode()
            assert ready.startswith("READY=1\nSTATUS=serving entropy; failed: disk; metrics at ")
            (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
            message = ready
            while "failed" in message:
                message = (await manager.recv(4096)).decode()
            assert message.startswith("STATUS=serving disk, entropy; metrics at ")
            await ended(daemon)


# --- one device, without a daemon ---


class Scene:
    """What a served device asks for: its file's table, and a back end that may not be had."""

    def __init__(self, folder: Path) -> None:
        file = folder / "c.toml"
        file.write_text('[devices.e]\ntype = "rng"\nsocket = "e.sock"\n')
        self.table = load_config(file).devices["e"]
        self.attempts: list[float] = []
        self.errors: list[Exception] = []
        self.served = trio.Event()
        self.files = Files()

    async def configured(self, name: str) -> Configured:
        self.attempts.append(trio.current_time())
        return self.table

    def share_of(self, name: str) -> int:
        return 50

    def backend_of(self, device: Device, configured: Configured) -> Backend:
        if self.errors:
            raise self.errors.pop(0)
        return Backend(device)

    def came(self, name: str, device: Device, backend: Backend) -> None:
        self.served.set()

    def went(self, name: str) -> None: ...

    def changed(self) -> None: ...


async def log_until_served(scene: Scene, device: ServedDevice) -> list[Any]:
    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.run)
            await scene.served.wait()
            nursery.cancel_scope.cancel()
    return [*logs]


async def test_attempts_grow_rarer_up_to_a_minute_and_each_reason_is_logged_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    scene = Scene(tmp_path)
    scene.errors = [*(HostError("no tap") for _ in range(9)), HostError("no bridge")]
    device = ServedDevice("e", scene, strict=False)
    logs = await log_until_served(scene, device)
    waits = [round(later - earlier) for earlier, later in zip(scene.attempts, scene.attempts[1:], strict=False)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert max(waits) == RETRY_SECONDS_MAX
    assert [line["reason"] for line in logs if line["event"] == "device failed"] == ["no tap", "no bridge"]
    assert device.failures == 10


async def test_a_device_that_is_tried_again_inherits_what_the_storage_had_answered_before(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, inherited = Storage((), "EIO"), []

    class Remembers(DiskStorage):
        def storage(self) -> Storage:
            return lost

        def inherit_storage(self, before: Storage) -> None:
            inherited.append(before)

        def reopening(self) -> Callable[[], None]:
            raise AssertionError("not asked for in this test")

        def retry_storage(self) -> bool:
            return False

    monkeypatch.setattr(Rng, "disk", Remembers())
    scene = Scene(tmp_path)
    scene.errors = [HostError("no bridge")]
    await log_until_served(scene, ServedDevice("e", scene, strict=False))
    assert inherited == [lost]


async def test_a_device_is_given_its_share_of_the_descriptors_before_it_is_served(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(Rng, "limit_descriptors", lambda device, count: given.append(count))
    scene = Scene(tmp_path)
    scene.errors = [HostError("not yet")]
    await log_until_served(scene, ServedDevice("e", scene, strict=False))
    assert given == [50, 50]  # each time that it is opened


async def test_a_mistake_of_ours_in_one_device_is_logged_with_its_traceback_and_tried_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    scene = Scene(tmp_path)
    scene.errors = [ZeroDivisionError("ours")]
    device = ServedDevice("e", scene, strict=False)
    logs = await log_until_served(scene, device)
    assert [line["event"] for line in logs[:2]] == ["device failed by a mistake", "device failed"]
    assert logs[0]["exc_info"].subgroup(ZeroDivisionError) is not None
    assert "ZeroDivisionError: ours" in logs[1]["reason"]


async def test_a_failed_device_with_an_inherited_socket_is_tried_again_only_while_the_socket_is_whole(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    number = theirs.detach()
    scene = Scene(tmp_path)
    scene.table = type(scene.table)(
        "e", scene.table.common.model_copy(update={"socket_fd": number}), scene.table.options, 1, ()
    )
    scene.errors = [HostError("not yet")]
    device = ServedDevice("e", scene, strict=False)
    with capture_logs() as logs:
        await device.run()  # the first attempt fails, the second is served, and its front-end has left
    assert device.failures == 1
    assert "the front-end of an inherited connection left" in logs[-1]["event"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_metrics_and_table_name_a_failed_device() -> None:
    failed = FailedDevice("disk", "blk", "disk.img: No such file or directory", 100.0, 160.0)
    state = DaemonState((), (), failed=(failed,), failures={"disk": 3, "entropy": 0})
    found = {
        (sample.name, sample.labels.get("device")): sample.value
        for family in StateCollector(lambda: state).collect()
        for sample in family.samples
    }
    assert found["hyperbell_device_failed", "disk"] == 1
    assert found["hyperbell_device_failed", "entropy"] == 0
    assert found["hyperbell_device_failures_total", "disk"] == 3
    assert found["hyperbell_devices", None] == 0
    shown = json.loads(
        json.dumps(
            {
                "devices": [],
                "vms": [],
                "machine": None,
                "doorbells": None,
                "failed": [vars_of(failed)],
                "workers": [],
            }
        )
    )
    (row,) = [line for line in render(shown, now=130.0).splitlines() if "disk.img" in line]
    assert row.split()[:6] == ["disk", "blk", "30", "s", "in", "30"]


def vars_of(failed: FailedDevice) -> dict[str, Any]:
    return {name: getattr(failed, name) for name in FailedDevice.__slots__}
