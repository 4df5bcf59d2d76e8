"""A real VM ends in one way or another: by its guest, by its own fault, from outside; and no thread is left behind."""

from __future__ import annotations

import pytest
import trio
from kit.kvm.guest import DEVICE_GPA, DEVICE_SIZE, machine, no_vcpu_thread_is_left, vcpu_threads

from transports.kvm.vm.vmm import Access
from virtio.errors import HostError

EXIT = "mov $0, %al; out %al, $0xf4"

# ---- ends ----


async def test_the_guest_ends_with_the_status_it_writes() -> None:
    with machine() as m:
        end = await m.run("mov $0x2a, %al; out %al, $0xf4; hlt")
        assert (end.kind, end.status) == ("exit", 42)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("mov $0x600, %dx; mov $0x34, %al; out %al, %dx", "power off"),
        ("mov $0x602, %dx; mov $1, %al; out %al, %dx", "reset"),
        ("lidt 0x4000; ud2", "reset"),
    ],
    ids=["acpi-sleep", "acpi-reset", "triple-fault"],
)
async def test_a_guest_that_goes_off_or_breaks_down_says_so(code: str, kind: str) -> None:
    with machine() as m:
        end = await m.run(f"{code}; 1: hlt; jmp 1b")
        assert end.kind == kind
        assert ("triple fault" in end.reason) == ("ud2" in code)


async def test_other_sleep_and_reset_values_end_nothing() -> None:
    with machine() as m:
        end = await m.run(
            f"""
            mov $0x600, %dx; mov $0x14, %al; out %al, %dx   # S5 without the enable bit
            mov $0x600, %dx; mov $0x2c, %al; out %al, %dx   # S3
            mov $0x602, %dx; mov $2, %al; out %al, %dx
            {EXIT}
            """
        )
        assert end.kind == "exit"


async def test_a_guest_that_cannot_run_on_fails_with_a_reason_and_numbers() -> None:
    with machine() as m:
        end = await m.run(f"mov ${DEVICE_GPA}, %eax; jmp *%eax")  # nothing there to execute
        assert end.kind == "failed"
        assert "vCPU 0" in end.reason
        assert f"RIP {DEVICE_GPA:#x}" in end.reason


# ---- stopping ----


async def test_a_vcpu_that_waits_for_an_answer_is_stopped() -> None:
    asked = trio.Event()

    async def never(_access: Access) -> int:
        asked.set()
        await trio.sleep_forever()

    with machine() as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        async with trio.open_nursery() as nursery:

            async def stop_it() -> None:
                await asked.wait()
                assert vcpu_threads() == 1
                m.vm.stop()

            nursery.start_soon(stop_it)
            end = await m.run(f"mov {DEVICE_GPA}, %eax; {EXIT}", on_access=never)
        assert (end.kind, bytes(m.output)) == ("stopped", b"")


@pytest.mark.parametrize("idle", ["1: jmp 1b", "cli; 1: hlt; jmp 1b"], ids=["spinning", "halted"])
async def test_a_vcpu_that_goes_its_own_way_is_stopped_every_time(idle: str) -> None:
    with machine() as m:
        m.place(f"mov $'R', %al; out %al, $0xe9; {idle}")
        for _ in range(20):
            end = await m.run(on_output=lambda _chunk: m.vm.stop())
            assert end.kind == "stopped"
            assert no_vcpu_thread_is_left()
        assert bytes(m.output) == b"R" * 20


async def test_a_cancelled_run_leaves_no_thread_behind() -> None:
    with machine(vcpus=3) as m, trio.CancelScope() as scope:
        await m.run("mov $'R', %al; out %al, $0xe9; 1: jmp 1b", on_output=lambda _chunk: scope.cancel())
    assert scope.cancelled_caught
    assert no_vcpu_thread_is_left()


async def test_an_error_of_the_device_ends_the_run_and_comes_out() -> None:
    async def broken(_access: Access) -> int:
        raise HostError("the device is on fire")

    with machine() as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        with pytest.raises(ExceptionGroup) as caught:
            await m.run(f"mov {DEVICE_GPA}, %eax; {EXIT}", on_access=broken)
        assert caught.group_contains(HostError, match="on fire")
        assert no_vcpu_thread_is_left()


async def test_a_machine_runs_again_after_it_ended_and_after_it_was_stopped() -> None:
    async def stopping(_access: Access) -> int:
        m.vm.stop()
        await trio.sleep_forever()

    with machine() as m:
        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        for status in (1, 2):
            assert (await m.run(f"mov ${status}, %al; out %al, $0xf4")).status == status
        assert (await m.run(f"mov {DEVICE_GPA}, %eax; {EXIT}", on_access=stopping)).kind == "stopped"
        assert (await m.run("mov $0x33, %al; out %al, $0xf4", bits=64)).status == 0x33


async def test_a_machine_does_not_run_twice_at_once() -> None:
    with machine() as m:

        async def again(_access: Access) -> int:
            with pytest.raises(RuntimeError):
                await m.run()
            with pytest.raises(RuntimeError):
                m.vm.close()
            with pytest.raises(HostError, match="not while the VM runs"):
                m.vm.add_window(DEVICE_GPA + 0x1000, DEVICE_SIZE)
            return 0

        m.vm.add_window(DEVICE_GPA, DEVICE_SIZE)
        assert (await m.run(f"mov {DEVICE_GPA}, %eax; {EXIT}", on_access=again)).kind == "exit"
