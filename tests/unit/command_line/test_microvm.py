"""What ``hyperbell microvm`` does around the machine: what it begins with, and what it says of its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from kit.host.failing_storage import failing_image
from kit.kvm.elf_kernel import plain_kernel
from structlog.testing import capture_logs

from daemon.cli import _parser
from daemon.doorbells.policies import Policies
from daemon.microvm.options import MicrovmOptions, read_options
from daemon.microvm.run import QUIET_SECONDS, Microvm, has_ended_well, prepare
from daemon.running.assembly import Assembly
from daemon.running.failures import leaves
from daemon.running.files import Files
from transports.kvm.boot import pvh
from transports.kvm.machine.slots import DEVICES_MAX, slot
from transports.kvm.vm.ending import VmEnd
from virtio.errors import HostError


def options(folder: Path, *words: str) -> MicrovmOptions:
    kernel = folder / "vmlinux"
    kernel.write_bytes(plain_kernel())
    return read_options(_parser().parse_args(["microvm", "--kernel", str(kernel), *words]))


def placed(boot: pvh.Boot, gpa: int) -> bytes:
    return b"".join(bytes(data) for at, data in boot.placements if at == gpa)


def test_the_guest_is_told_of_the_terminal_and_of_every_device(tmp_path: Path) -> None:
    initrd = tmp_path / "root.cpio"
    initrd.write_bytes(b"070701")
    words = ("--device", "rng", "--device", "rng", "--initrd", str(initrd), "--append", "quiet", "--memory", "8M")
    boot = prepare(options(tmp_path, *words))
    tables = placed(boot, pvh.ACPI_GPA)
    assert tables.count(b"LNRO0005\0") == 3
    for index in range(3):
        assert slot(index).gpa.to_bytes(4, "little") + (0x200).to_bytes(4, "little") in tables
        assert b"\x01" + slot(index).gsi.to_bytes(4, "little") in tables
    assert placed(boot, pvh.COMMAND_LINE_GPA) == b"console=hvc0 panic=-1 quiet\0"
    assert placed(boot, (8 << 20) - 4096) == b"070701"


def test_more_devices_than_places_are_refused(tmp_path: Path) -> None:
    words = ["--device", "rng"] * DEVICES_MAX
    with pytest.raises(HostError, match=f"there is room for {DEVICES_MAX - 1}, not for {DEVICES_MAX}"):
        prepare(options(tmp_path, *words))


def test_an_initrd_larger_than_memory_is_refused_by_name(tmp_path: Path) -> None:
    initrd = tmp_path / "huge.cpio"
    with initrd.open("wb") as file:
        file.truncate(9 << 20)
    with pytest.raises(HostError, match=r"huge.cpio: has 9437184 bytes, more than"):
        prepare(options(tmp_path, "--initrd", str(initrd), "--memory", "8M"))


@pytest.mark.parametrize(
    ("end", "well"),
    [
        (VmEnd("power off"), True),
        (VmEnd("stopped"), True),
        (VmEnd("exit", 0), True),
        (VmEnd("exit", 3), False),
        (VmEnd("reset"), False),
        (VmEnd("failed"), False),
    ],
)
def test_only_an_end_that_was_wanted_is_a_success(end: VmEnd, well: bool) -> None:
    assert has_ended_well(end) == well


async def test_the_same_policy_again_is_another_attempt_and_the_first_ones_are_none(tmp_path: Path) -> None:
    """What the machine was made with needs no attempt; a withdrawal that KVM refused does."""
    made = options(tmp_path, "--device", "rng,name=entropy", "--control", str(tmp_path / "ctl"))
    microvm = Microvm(made, prepare(made))
    tried: list[tuple[str, str]] = []

    def device(name: str) -> Any:
        async def set_policy(policy: str) -> None:
            await trio.lowlevel.checkpoint()
            tried.append((name, policy))
            one.policy = policy

        one = SimpleNamespace(set_policy=set_policy, policy="offer")
        return one

    names = ("terminal", "entropy")
    microvm._assembly = Assembly({}, {}, dict.fromkeys(names), Files())  # type: ignore[arg-type]
    machine: Any = SimpleNamespace(devices=tuple(map(device, names)))
    given: list[Policies] = []

    async def serve_control(*arguments: Any, task_status: trio.TaskStatus[None]) -> None:
        given.append(arguments[2])
        task_status.started()

    async with trio.open_nursery() as nursery:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("daemon.microvm.run.serve_control", serve_control)
            await microvm._serve(nursery, machine)
        (policies,) = given
        await trio.testing.wait_all_tasks_blocked()
        assert tried == []
        for _ in range(2):
            policies.set("entropy", "withhold")
        await trio.testing.wait_all_tasks_blocked()
        assert tried == [("entropy", "withhold")] * 2
        nursery.cancel_scope.cancel()


def machine(**counted: int) -> Any:
    stats = SimpleNamespace(exits=7, handed_over=0, served=0)
    vars(stats).update(counted)
    return SimpleNamespace(vm=SimpleNamespace(stats=lambda: stats))


@pytest.mark.parametrize(
    ("counted", "printed", "told"),
    [({}, b"", True), ({"handed_over": 1}, b"", False), ({"served": 1}, b"", False), ({}, b"L", False)],
)
async def test_a_guest_without_a_sign_of_life_is_told_of(
    counted: dict[str, int], printed: bytes, told: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    made = options(tmp_path)
    microvm = Microvm(made, prepare(made))
    if printed:
        microvm._show_early(printed)
    with capture_logs() as logs:
        await microvm._watch(machine(**counted))
    assert trio.current_time() >= QUIET_SECONDS
    assert [entry["event"].startswith("no sign of life") for entry in logs] == [True] * told
    assert not told or "/dev/kvm" in logs[0]["event"]


async def test_an_image_that_hangs_when_it_is_opened_is_named_and_holds_up_nobody(tmp_path: Path) -> None:
    async with failing_image(1 << 20) as image:
        microvm = Microvm((chosen := options(tmp_path, "--device", f"blk,path={image.path}")), prepare(chosen))
        microvm._files = Files(seconds=0.2)
        await image.hang("open")
        try:
            with pytest.RaisesGroup(HostError) as caught:
                await microvm.run()  # in the event loop it would hang until the next line
        finally:
            await image.hang()
    (error,) = leaves(caught.value)
    assert str(error).startswith(f"--device blk,path={image.path}: {image.path}: the file system has not answered for")
