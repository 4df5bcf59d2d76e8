"""What a Python device raises outside its queues is its own affair: told once, and everybody else goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from kit.front_end.frontend import Guest, Setting, every_python_setting, plugged
from kit.front_end.vhost_user_wire import FrontEnd
from kit.kvm.scene import scene
from kit.ring.driven import Scripted
from structlog.testing import capture_logs

from config.loader import load
from daemon.devices.catalogue import device_types
from daemon.devices.classes import device_class
from daemon.running.assembly import Assembly
from daemon.running.files import Files
from daemon.running.links import Links
from daemon.running.opening import open_devices
from transports import TRANSPORTS
from virtio.backend.backend import Backend
from virtio.backend.device_calls import close_all
from virtio.capabilities import NetworkPort
from virtio.device import Chain, Queue
from virtio.errors import HostError
from virtio.native.stats import Lost
from virtio.testing.queue import GUARD

every_error = pytest.mark.parametrize("error", [ValueError, SystemExit])


class Faulty(Scripted):
    """Raises ``error`` in the methods named in ``faults``."""

    def __init__(self, error: type[BaseException] = ValueError) -> None:
        super().__init__()
        self.error = error
        self.faults: set[str] = set()
        self.closed = False

    def _at(self, method: str) -> None:
        if method in self.faults:
            raise self.error("mine")

    def features(self) -> int:
        self._at("features")
        return super().features()

    def set_driver_features(self, bits: int) -> None:
        self._at("set_driver_features" if bits else "forgetting features")
        super().set_driver_features(bits)

    def config_space(self) -> bytes:
        self._at("config_space")
        return b"fine"

    def write_config(self, offset: int, data: bytes) -> None:
        self._at("write_config")

    def queue_running(self, queue_index: int, running: bool) -> None:
        self._at("queue runs" if running else "queue stopped")

    async def queue_stopping(self, queue: Queue) -> None:
        if "queue_stopping in a task" in self.faults:
            async with trio.open_nursery():
                raise self.error("mine")
        self._at("queue_stopping")

    def reset(self) -> None:
        self._at("reset")

    def refresh(self) -> bool:
        self._at("refresh")
        return False

    @property
    def port(self) -> NetworkPort:
        return Plug(self)

    def close(self) -> None:
        self.closed = True
        self._at("close")


class Plug(NetworkPort):
    """The cable of a faulty device, and nothing else."""

    link_up = True

    def __init__(self, device: Faulty) -> None:
        self._device = device

    def set_link(self, up: bool) -> bool:
        self._device._at("set_link")
        return True

    def set_mtu(self, mtu: int) -> None:
        raise AssertionError("not asked for in this test")

    def prepare_announcement(self, address: bytes) -> None:
        raise AssertionError("not asked for in this test")

    def mute(self, queue_index: int, on: bool) -> bool:
        return False

    def lost(self) -> tuple[Lost, ...]:
        return ()


async def works(guest: Guest) -> None:
    used = await guest.queues[0].request([b"a word"], [64])
    assert used.buffers[0][: used.written] == b"A WORD"


def tracebacks(logs: Any) -> list[str]:
    """Where the device failed, as the log has it."""
    failures = [entry for entry in logs if entry["event"] == "device failed"]
    assert all(entry["exc_info"] and entry["device"] == "scripted" for entry in failures)
    return [entry["where"] for entry in failures]


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("reset", "reset"),
        ("forgetting features", "set_driver_features"),
        ("queue stopped", "queue_running"),
        ("queue_stopping", "queue_stopping"),
        ("queue_stopping in a task", "queue_stopping"),
    ],
)
@every_error
@every_python_setting
async def test_a_device_that_raises_at_the_end_is_told_of_once_and_serves_the_next(
    setting: Setting, fault: str, where: str, error: type[BaseException]
) -> None:
    device = Faulty(error)
    device.faults.add(fault)
    with capture_logs() as logs:
        async with plugged(device, setting) as p:
            for _ in range(3):
                await works(p.guest)
                if setting.way == "waist":
                    await p.backend.reset()
                p.guest.close()
                guest = await p.connect()
                await guest.start()
            await works(p.guest)
    assert tracebacks(logs) == [where]


@every_error
@every_python_setting
async def test_a_device_that_raises_when_its_queue_begins_has_a_broken_queue(
    setting: Setting, error: type[BaseException]
) -> None:
    device = Faulty(error)
    device.faults.add("queue runs")
    with capture_logs() as logs:
        async with plugged(device, setting) as p:
            await p.guest.queues[0].broken()
            device.faults.clear()
            await p.guest.link.reset()
            p.guest.forget_queues()
            await p.guest.start()
            await works(p.guest)
    assert tracebacks(logs) == ["queue_running"]


@pytest.mark.parametrize("method", ["config_space", "features"])
@every_error
async def test_a_front_end_is_refused_in_one_line_while_the_device_cannot_say_what_it_is(
    method: str, error: type[BaseException]
) -> None:
    device = Faulty(error)
    device.faults.add(method)
    with capture_logs() as logs:
        async with plugged(device, Setting("socket", "split"), start=False) as p:
            assert p.path is not None
            for _ in range(3):
                with await FrontEnd.connect(p.path) as front_end, trio.fail_after(GUARD):
                    assert await front_end.ended()
            device.faults.clear()
            p.guest.close()
            await (await p.connect()).start()
            await works(p.guest)
    assert tracebacks(logs) == [method]
    refusals = [entry for entry in logs if entry["event"].startswith("front-end refused")]
    assert len(refusals) == 4  # the guest's own was the first
    assert f"the device's {method}() failed: {error.__name__}" in refusals[0]["error"]


@every_error
@every_python_setting
async def test_a_device_that_raises_at_a_write_to_its_config_space_keeps_its_front_end(
    setting: Setting, error: type[BaseException]
) -> None:
    device = Faulty(error)
    device.faults.add("write_config")
    with capture_logs() as logs:
        async with plugged(device, setting) as p:
            await works(p.guest)
            await p.guest.link.write_config(0, b"x")
            await p.guest.link.write_config(0, b"x")
            await p.guest.queues[0].broken()
            assert await p.guest.link.read_config(0, 4) == b"fine"
            await p.guest.link.reset()
            p.guest.forget_queues()
            await p.guest.start()
            await works(p.guest)
    assert tracebacks(logs) == ["write_config"]


@every_error
async def test_features_that_a_device_fails_to_take_are_refused(error: type[BaseException]) -> None:
    device = Faulty(error)
    async with plugged(device, Setting("waist", "split")) as p:
        await p.backend.reset()
        device.faults.add("set_driver_features")
        with pytest.raises(HostError, match=r"set_driver_features\(\) failed"):
            p.backend.set_driver_features(1 << 32)
        assert p.backend.stats().driver_features == 0


@every_python_setting
async def test_a_device_that_ends_the_program_only_breaks_its_queue(setting: Setting) -> None:
    device = Faulty()

    async def leave(queue: Queue, chain: Chain) -> None:
        raise SystemExit(0)

    async def leave_beside(queue: Queue, chain: Chain) -> None:
        queue.spawn(leave, chain)

    with capture_logs() as logs:
        async with plugged(device, setting) as p:
            for script in (leave, leave_beside):
                device.script = script
                p.guest.queues[0].driver.add([b"x"], [8])
                p.guest.queues[0].kick()
                await p.guest.queues[0].broken()
                await p.guest.link.reset()
                p.guest.forget_queues()
                await p.guest.start()
            device.script = device.answer
            await works(p.guest)
    assert [entry["log_level"] for entry in logs if entry["event"] == "device failed"] == ["error"] * 2


class Running(Scripted):
    """Ends the program in ``run``: before it began, or when told to."""

    def __init__(self, *, at_once: bool) -> None:
        super().__init__()
        self.at_once = at_once
        self.leave = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        if not self.at_once:
            task_status.started()
            await self.leave.wait()
        raise SystemExit(0)


async def test_a_device_that_ends_the_program_beside_its_queues_only_breaks_them() -> None:
    device = Running(at_once=False)
    async with plugged(device, Setting("waist", "split")) as p:
        device.leave.set()
        await p.guest.queues[0].broken()


async def test_a_device_that_ends_the_program_at_its_start_cannot_be_had() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with Backend(Running(at_once=True)):
            raise AssertionError("unreachable")
    assert caught.group_contains(HostError, match="run.. ended the program")


async def test_only_the_interrupt_of_an_operator_passes_through_a_device() -> None:
    device = Faulty(KeyboardInterrupt)
    async with plugged(device, Setting("waist", "split")) as p:
        device.faults.add("reset")
        with pytest.raises(KeyboardInterrupt):
            await p.backend.reset()
        device.faults.clear()


# ---- whatever else calls a device ----


async def test_a_machine_of_our_own_reads_zeroes_from_a_config_space_that_fails() -> None:
    device = Faulty()
    device.faults.add("config_space")
    async with Backend(device) as backend, scene(backend) as s:
        assert await s.read(0x100) == 0
        device.faults.clear()
        assert await s.read(0x100) == int.from_bytes(b"fine", "little")


async def test_a_device_that_cannot_be_examined_plugged_or_closed_is_one_line_and_the_others_go_on() -> None:
    faulty, fine = Faulty(), Faulty()
    faulty.faults = {"refresh", "set_link", "close"}
    devices = {"faulty": faulty, "fine": fine}
    with capture_logs() as logs:
        await Assembly({}, devices, {}, Files()).refresh_devices()
        with pytest.raises(HostError, match=r"set_link\(\) failed: ValueError: mine"):
            Links(devices).set("faulty", False)
        assert Links(devices).set("fine", False)
        close_all(devices.values())
    assert fine.closed
    assert {entry["where"] for entry in logs} == {"refresh", "set_link", "close"}


DEVICES = """
from virtio import Device, HostError
closed = []

class Fine(Device):
    virtio_id, type_name = 42, "fine"
    async def handle(self, queue, chain): ...
    def close(self): closed.append(self.name)

class Faulty(Fine):
    def __init__(self, name, options, queues, queue_size):
        super().__init__(name, options, queues, queue_size)
        {statement}
"""


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("open('/nowhere')", "FileNotFoundError: .* \\(line 13 of {file}\\)"),
        ("raise SystemExit('no more')", "SystemExit: no more \\(line 13 of {file}\\)"),
        ("raise HostError('no such chip')", "no such chip"),
    ],
)
async def test_a_class_that_fails_to_make_its_device_is_one_clear_error_and_the_others_are_closed(
    tmp_path: Path, statement: str, reason: str
) -> None:
    file = tmp_path / "both.py"
    file.write_text(DEVICES.replace("{statement}", statement))
    table = '[devices.{}]\ntype = "./both.py:{}"\nsocket = "{}.sock"\n'
    conf = tmp_path / "c.toml"
    conf.write_text(table.format("a", "Fine", "a") + table.format("b", "Faulty", "b") + table.format("c", "Fine", "c"))
    devices = load(conf, device_types(), TRANSPORTS).devices
    with pytest.raises(ExceptionGroup) as caught:
        await open_devices(Files(), devices)
    reason = reason.format(file=file)
    if "line" in reason:
        reason = f"{file}:Faulty cannot be made: {reason}"
    assert caught.group_contains(HostError, match=rf"^\[devices\.b\] {reason}$")
    assert sys.modules[device_class(devices["a"].common.type).__module__].closed == ["a", "c"]
