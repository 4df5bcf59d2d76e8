"""Real guests on our own virtio-mmio under the real /dev/kvm: every device, every doorbell, honest and hostile.

Where KVM lacks the hypercall doorbell its cases skip by name; the nested tests run this file on a KVM that has it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from kit.front_end.vhost_user_wire import no_fd_leaks
from kit.guest.toy_machine import (
    DISK_SIZE,
    GUARD,
    KEY,
    REQUESTS,
    ToyMachine,
    need_hypercalls,
    need_toy,
    toy_machine,
    why_no_hypercall,
)
from structlog.testing import capture_logs

from guest.boot.toy import Toy
from transports.hypercall import Policy, connection_id
from transports.kvm.machine.machine import MachineSetup, open_machine
from virtio.errors import HostError
from virtio.fd import OwnedFd

both_kinds = pytest.mark.parametrize("bits", [32, 64], ids=["32-bit", "64-bit"])
STRAYS = "doorbells of queues that do not exist: ignored, the others go on"
KICK = {"mmio": "kick", "pio": "pio"}


@pytest.fixture(scope="module")
def toy() -> Toy:
    return need_toy()


@pytest.fixture(scope="module")
def hypercalls(toy: Toy) -> None:
    need_hypercalls()


with_hypercalls = pytest.mark.usefixtures("hypercalls")


# ---- honest guests ----


@pytest.mark.parametrize("event_idx", [0, 1])
@both_kinds
@pytest.mark.parametrize("doorbell", ["mmio", "pio"])
async def test_every_byte_of_every_device_is_right_and_every_ring_is_counted_by_its_kind(
    toy: Toy, tmp_path: Path, bits: int, doorbell: str, event_idx: int
) -> None:
    with no_fd_leaks():
        async with toy_machine(tmp_path, toy) as m:
            run = await m.run(bits, f"doorbell={doorbell}", f"event_idx={event_idx}")
            run.assert_good()
            m.check_disk()
            assert run.number("net.received") == run.number("net.sent") == REQUESTS
            for name, queue in (("blk", 0), ("blk", 1), ("rng", 0), ("net", 1)):
                told = run.number(f"{name}.queue{queue}.plain")
                assert told > 0
                await m.rung(name, queue, **{KICK[doorbell]: told})
            assert m.machine.vm.stats().stray_notifies == 0
            assert not any(device.registers.refusals for device in m.machine.devices)


@both_kinds
async def test_a_guest_resets_its_devices_and_sets_them_up_again(toy: Toy, tmp_path: Path, bits: int) -> None:
    async with toy_machine(tmp_path, toy) as m:
        run = await m.run(bits, "mode=reset")
        run.assert_good()
        assert run.number("resets") == 3
        m.check_disk()


async def test_a_guest_hears_that_its_disk_has_grown(toy: Toy, tmp_path: Path) -> None:
    async with toy_machine(tmp_path, toy) as m, trio.open_nursery() as nursery:

        async def grow() -> None:
            await m.says("progress=")
            os.truncate(m.image, 2 * DISK_SIZE)
            assert m.disk.refresh()
            rounds = m.says_now("RESULT progress=")
            await m.says(f"RESULT progress={20 * (rounds + 2)}\n")
            m.tell_to_stop()

        nursery.start_soon(grow)
        run = await m.run(64, "mode=loop", "every=20", "requests=100000")
        run.assert_good()
        assert run.results["stopped"] == "1"
        assert run.number("blk.config_changes") == 1


async def test_a_machine_with_too_many_devices_is_refused(toy: Toy) -> None:
    with pytest.raises(HostError, match="17 devices: a VM of ours has interrupts for 16"):
        async with open_machine(MachineSetup(1 << 20), [None] * 17):  # type: ignore[list-item]
            pass


# ---- hostile guests, and one beside them ----


# The toy guest's rings have 16 entries, and its requests are smaller than a disk lets a driver make.
SMALL_RING = "the queue is too small for the requests that its driver may make"


@both_kinds
@pytest.mark.parametrize("mode", ["nonsense", "flood", "outside"])
async def test_a_hostile_guest_harms_only_itself(toy: Toy, tmp_path: Path, mode: str, bits: int) -> None:
    honest_folder = tmp_path / "honest"
    honest_folder.mkdir()
    async with (
        toy_machine(tmp_path, toy) as hostile,
        toy_machine(honest_folder, toy) as honest,
        trio.open_nursery() as nursery,
    ):
        neighbour: list[object] = []

        async def live_on() -> None:
            run = await honest.run(64, "mode=loop", "every=20", "requests=1000000")
            run.assert_good()
            neighbour.append(run)
            assert run.results["stopped"] == "1"

        nursery.start_soon(live_on)
        await honest.says("progress=")
        with capture_logs() as logs:
            run = await hostile.run(bits, f"mode={mode}")
        run.assert_good()  # afterwards it behaves, and its devices serve it as if nothing had been
        hostile.check_disk()
        seen = honest.says_now("RESULT progress=")
        await honest.says(f"progress={20 * (seen + 2)}\n")  # the other one goes on
        honest.tell_to_stop()
        said = [line["event"] for line in logs if line["log_level"] != "debug"]
        await CHECKS[mode](hostile, run.results, [event for event in said if event != SMALL_RING])
    assert len(neighbour) == 1


async def check_nonsense(m: ToyMachine, results: dict[str, str], lines: list[str]) -> None:
    assert int(results["nonsense.accesses"]) > 3000
    refusals = m.machine.devices[0].registers.refusals
    assert sum(refusals.values()) > 1000
    names = {name for name, _ in refusals}
    assert len(names) > 25
    told = [line for line in lines if line.startswith("the guest's access to a register")]
    assert len(told) == len(names)  # each is told once
    assert set(lines) - set(told) == {STRAYS}  # it wrote to QueueNotify too
    assert not any(device.registers.refusals for device in m.machine.devices[1:])


async def check_flood(m: ToyMachine, results: dict[str, str], lines: list[str]) -> None:
    rung = 2 * (int(results["flood.mmio"]) + int(results["flood.pio"]))
    assert m.machine.vm.stats().stray_notifies == m.machine.devices[0].window.stray_notifies == rung == 2000
    await m.rung("blk", 0, kick=int(results["blk.queue0.plain"]))  # they rang no queue that exists
    # The first ones, and at the end how many it were; one line if it was over before anybody looked.
    assert set(lines) == {STRAYS}
    assert len(lines) <= 2
    assert [device.state().stray_doorbells for device in m.machine.devices] == [2000, 0, 0]


async def check_outside(m: ToyMachine, results: dict[str, str], lines: list[str]) -> None:
    outcomes = {key.removeprefix("outside."): value for key, value in results.items() if key.startswith("outside.")}
    refused = {"size_zero", "size_too_large"}  # QueueReady does not become 1
    assert outcomes == {name: "not_ready" if name in refused else "needs_reset" for name in outcomes}
    assert len(outcomes) == 12
    assert lines.count("queue broken") == 6
    assert lines.count("the driver's request failed") == 4
    assert len([line for line in lines if "QueueReady: QueueNum" in line]) == 1
    assert len(lines) == 11


CHECKS = {"nonsense": check_nonsense, "flood": check_flood, "outside": check_outside}


# ---- hypercalls ----


@both_kinds
async def test_a_guest_with_the_platform_key_rings_by_hypercall_where_it_may(
    toy: Toy, tmp_path: Path, bits: int
) -> None:
    """ "auto" is the driver's own choice: without the capability, and in 32 bit, it is the plain doorbell."""
    with capture_logs() as logs:
        async with toy_machine(tmp_path, toy, hypercall_key=KEY) as m:
            run = await m.run(bits, "doorbell=auto", "plain=pio")
            run.assert_good()
            m.check_disk()
            fast = bits == 64 and why_no_hypercall() is None
            for name, queue in (("blk", 0), ("blk", 1), ("rng", 0), ("net", 1)):
                told = run.number(f"{name}.queue{queue}.{'hypercall' if fast else 'plain'}")
                assert told > 0
                await m.rung(name, queue, **{"hypercall" if fast else "pio": told})
    why = [line["why"] for line in logs if "no hypercall doorbells" in line["event"]]
    assert why == ([why_no_hypercall()] if why_no_hypercall() else [])


@with_hypercalls
async def test_hypercalls_carry_every_request_and_the_guest_accepts_nothing_less(toy: Toy, tmp_path: Path) -> None:
    async with toy_machine(tmp_path, toy, hypercall_key=KEY) as m:
        run = await m.run(64, "doorbell=hypercall")
        run.assert_good()
        m.check_disk()
        assert run.results["platform"] == "HyperBellVMM"
        assert run.number("blk.plain") == run.number("net.plain") == run.number("blk.refused") == 0
        assert run.number("blk.hypercall") > 0


@with_hypercalls
async def test_a_device_may_withhold_what_its_neighbours_offer(toy: Toy, tmp_path: Path) -> None:
    async with toy_machine(tmp_path, toy, hypercall_key=KEY, policies=("withhold", "offer", "offer")) as m:
        run = await m.run(64, "doorbell=auto")
        run.assert_good()
        assert (run.number("blk.hypercall"), run.number("rng.plain")) == (0, 0)
        assert run.number("blk.plain") > 0
        assert run.number("rng.hypercall") > 0


@with_hypercalls
async def test_withdrawn_and_offered_again_under_load_no_request_is_lost(toy: Toy, tmp_path: Path) -> None:
    async with toy_machine(tmp_path, toy, hypercall_key=KEY) as m, trio.open_nursery() as nursery:

        async def change() -> None:
            await m.says("progress=")
            policies: tuple[Policy, ...] = ("withhold", "offer")
            for policy in policies * 5:
                for device in m.machine.devices:
                    await device.set_policy(policy)
                rounds = m.says_now("RESULT progress=")
                await m.says(f"progress={20 * (rounds + 2)}\n")
            m.tell_to_stop()

        nursery.start_soon(change)
        run = await m.run(64, "mode=loop", "doorbell=auto", "every=20", "rearm=3", "requests=1000000")
        run.assert_good()
        assert run.results["stopped"] == "1"
        assert run.number("blk.refused") >= 5
        assert run.number("blk.rearmed") >= 4
        assert min(run.number("blk.hypercall"), run.number("blk.plain")) > 0
        for name, queue in (("blk", 0), ("blk", 1), ("rng", 0)):
            # Each withdrawal kicks a queue once by itself, so of the plain kicks there are more than the guest's.
            with trio.fail_after(GUARD):
                while m.kicks(name, queue)["hypercall"] != run.number(f"{name}.queue{queue}.hypercall"):
                    await trio.lowlevel.checkpoint()


@with_hypercalls
async def test_an_id_that_is_taken_leaves_its_queue_with_the_plain_doorbell(toy: Toy, tmp_path: Path) -> None:
    policies: tuple[Policy, ...] = ("offer", "withhold", "offer")
    with capture_logs() as logs, OwnedFd(os.eventfd(0)) as other:
        async with toy_machine(tmp_path, toy, hypercall_key=KEY, policies=policies) as m:
            entropy = m.machine.devices[1]
            taken = connection_id(entropy.slot.bell(0), KEY)
            m.machine.vm.hypercall_id(taken, other)
            await entropy.set_policy("offer")
            run = await m.run(64, "doorbell=auto")
            run.assert_good()
            assert (run.number("rng.hypercall"), run.number("blk.plain")) == (0, 0)
            await m.rung("rng", kick=run.number("rng.plain"))
            assert run.results["rng.queue0.plain_reason"] == "the device has no bell for the queue"
    refused = [line["error"] for line in logs if line["event"].startswith("no hypercall doorbell, ")]
    assert refused == [f"connection id {taken:#x} is already taken"]


async def test_without_a_platform_key_nothing_of_it_is_shown(toy: Toy, tmp_path: Path) -> None:
    async with toy_machine(tmp_path, toy) as m:
        run = await m.run(64, "doorbell=auto")
        run.assert_good()
        assert run.results["platform"] == "no platform leaf"
        assert m.machine.state().reason == "it was given no key"
        assert run.number("blk.hypercall") == 0
        assert not int(run.results["blk.offered"], 16) >> 44 & 1
