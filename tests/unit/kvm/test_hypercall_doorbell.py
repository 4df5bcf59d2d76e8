"""The hypercall doorbell on our own virtio-mmio: offered, accepted, withheld, and withdrawn while it is used.

KVM_HYPERV_EVENTFD is played by a double here (``kvm_scene.FakeHypercalls``); the real one is rung in the nested tests.
"""

from __future__ import annotations

import select
from typing import Any

import kit.guest.mmio as regs
import pytest
from kit.front_end.recording_backend import RecordingBackend
from kit.front_end.vhost_user_wire import no_fd_leaks, no_further_descriptors
from kit.kvm.scene import KEY, Scene, scene
from kit.ring.driven import Scripted
from structlog.testing import capture_logs

from transports.hypercall import RESERVED_ID, connection_id
from transports.kvm.machine.state import MmioDeviceState, QueueBell
from virtio.backend.backend import Backend
from virtio.device import DeviceOptions
from virtio.devices.rng import Rng
from virtio.errors import HostError, PeerError
from virtio.testing.driver import SplitDriver
from virtio.waist import Doorbell

FEATURES = regs.F_VERSION_1 | regs.F_HYPERCALL_NOTIFY
ID = connection_id(0x100, KEY)


def rng() -> Backend:
    return Backend(Rng("entropy", DeviceOptions(), 1, 64))


async def request(s: Scene, ring: str) -> None:
    s.rings[0].add([], [32])
    if ring == "hypercall":
        assert s.hypercalls.ring(ID) == 0
    else:
        s.ring_mmio(0)
    (used,) = await s.used(0)
    assert used.written == 32


async def accept(s: Scene, index: int = 0) -> None:
    await s.write(regs.QUEUE_SEL, index)
    await s.write(regs.BELL, 1)


async def test_a_driver_that_negotiated_it_rings_by_hypercall_and_is_counted_by_kind() -> None:
    async with rng() as backend, scene(backend) as s:
        await s.start(FEATURES)
        assert await s.ids() == [ID]
        assert s.device.rung_by_hypercall == (0,)
        for _ in range(3):
            await request(s, "hypercall")
        await request(s, "plain")
        await s.rung(hypercall=3, kick=1)


async def test_a_driver_may_accept_it_without_the_feature() -> None:
    async with rng() as backend, scene(backend) as s:
        await s.start()
        await accept(s)
        assert s.device.registers.bells_accepted == (0,)
        await request(s, "hypercall")


async def test_what_is_offered_is_heard_even_before_the_driver_accepts() -> None:
    """Status 0 makes the driver believe that it was heard: an id that exists is listened to."""
    async with rng() as backend, scene(backend) as s:
        assert s.hypercalls.ring(ID) == 0
        await s.start()
        await request(s, "hypercall")
        await s.rung(hypercall=2)


async def test_each_device_and_queue_has_an_id_of_its_own() -> None:
    backend = RecordingBackend(queue_count=2, features=regs.F_VERSION_1)
    async with scene(backend, number=5) as s:
        await s.start(FEATURES)
        assert sorted(s.hypercalls.registered) == sorted([0x600 ^ KEY, 0x601 ^ KEY])
    backend.close()


async def test_a_key_that_makes_the_reserved_id_leaves_that_queue_without_a_bell() -> None:
    backend = RecordingBackend(queue_count=2, features=regs.F_VERSION_1)
    key = 0x100 ^ RESERVED_ID
    async with scene(backend, key=key) as s:
        await s.start(FEATURES)
        assert await s.ids() == [0, 0x101 ^ key]
        assert list(s.hypercalls.registered) == [0x101 ^ key]
        assert s.device.rung_by_hypercall == (1,)
    backend.close()


@pytest.mark.parametrize("policy", ["withhold", "auto"])
async def test_a_policy_that_withholds_shows_nothing_and_registers_nothing(policy: Any) -> None:
    async with rng() as backend, scene(backend, policy=policy) as s:
        if policy == "auto":
            assert await s.read(regs.KEY) == KEY  # this guest is shown neither VMX nor SVM
            return
        assert await s.read(regs.KEY) == 0
        await s.start()
        await accept(s)
        assert await s.ids() == [0]
        assert s.hypercalls.calls == []
        await request(s, "plain")


@pytest.mark.parametrize("lacking", ["key", "capability"])
async def test_without_a_key_or_without_the_capability_nothing_is_offered(lacking: str) -> None:
    async with rng() as backend, scene(backend, key=None if lacking == "key" else KEY, policy="withhold") as s:
        s.hypercalls.why_not = "no KVM_CAP_HYPERV_EVENTFD" if lacking == "capability" else None
        await s.device.set_policy("offer")
        assert await s.read(regs.KEY) == 0
        await s.start()
        await request(s, "plain")
        assert s.hypercalls.calls == []


async def test_an_id_that_is_taken_costs_one_line_and_the_plain_doorbells_go_on() -> None:
    async with rng() as backend, scene(backend) as s:
        await s.device.set_policy("withhold")
        await s.start()
        s.hypercalls.taken.add(ID)
        with capture_logs() as logs:
            await s.device.set_policy("offer")
        lines = [line for line in logs if line["log_level"] == "warning"]
        assert [(line["event"], line["error"]) for line in lines] == [
            ("no hypercall doorbell, the plain ones go on", f"connection id {ID:#x} is already taken")
        ]
        assert s.device.rung_by_hypercall == ()
        assert await s.ids() == [0]  # the driver would be told 0 by somebody else's eventfd
        assert not await s.read(regs.STATUS) & regs.NEEDS_RESET
        await request(s, "plain")


async def test_withdrawn_id_leaves_the_plain_doorbell_working_and_can_come_back() -> None:
    async with rng() as backend, scene(backend) as s:
        await s.start(FEATURES)
        for _ in range(3):
            await request(s, "hypercall")
            await s.device.set_policy("withhold")
            assert await s.ids() == [0]
            assert s.hypercalls.ring(ID) != 0
            await request(s, "plain")
            await s.device.set_policy("offer")
            assert await s.ids() == [ID]
        await request(s, "hypercall")
        await s.rung(hypercall=4, kick=6)  # each withdrawal rings the plain one once


async def test_a_withdrawal_is_done_in_the_order_that_loses_no_ring() -> None:
    """First KVM lets go, then the plain doorbell is rung, only then does the queue stop to look."""
    backend = RecordingBackend(queue_count=1, features=regs.F_VERSION_1)
    async with scene(backend) as s:
        await s.start(FEATURES)
        backend.calls.clear()
        kick = backend.fds["kick", 0]
        seen: list[object] = []
        withdraw, set_doorbell = s.hypercalls.withdraw, backend.set_doorbell

        def withdrawn(connection: int) -> None:
            seen.append(("withdraw", connection, is_rung(kick.fileno())))
            withdraw(connection)

        async def taken_away(index: int, kind: Doorbell, fd: Any) -> None:
            seen.append(("set_doorbell", index, kind, fd, is_rung(kick.fileno())))
            await set_doorbell(index, kind, fd)

        s.hypercalls.withdraw = withdrawn  # type: ignore[method-assign]
        backend.set_doorbell = taken_away  # type: ignore[method-assign]
        await s.device.set_policy("withhold")
        assert seen == [("withdraw", ID, False), ("set_doorbell", 0, Doorbell.HYPERCALL, None, True)]
    backend.close()


def is_rung(eventfd: int) -> bool:
    poll = select.poll()
    poll.register(eventfd, select.POLLIN)
    return bool(poll.poll(0))


async def test_a_ring_just_before_the_withdrawal_is_served() -> None:
    """The driver was told 0, so it will not ring again: the buffer must come back all the same."""
    device = Scripted()
    async with Backend(device) as backend, scene(backend) as s:
        await s.start(FEATURES)
        for number in range(50):
            s.rings[0].add([b"%d" % number], [8])
            assert s.hypercalls.ring(ID) == 0
            await s.device.set_policy("withhold")
            (used,) = await s.used(0)
            assert used.buffers[0][: used.written] == b"%d" % number
            await s.device.set_policy("offer")


async def test_an_id_that_kvm_does_not_let_go_is_listened_to_further_on() -> None:
    async with rng() as backend, scene(backend) as s:
        await s.start(FEATURES)
        s.hypercalls.refuses_to_withdraw = True
        with capture_logs() as logs:
            await s.device.set_policy("withhold")
        assert [line["error"] for line in logs if line["log_level"] == "error"] == ["KVM does not let go"]
        await request(s, "hypercall")


async def test_a_withdrawal_that_failed_is_tried_again_when_the_operator_withholds_again() -> None:
    async with rng() as backend, scene(backend) as s:
        await s.start(FEATURES)
        s.hypercalls.refuses_to_withdraw = True
        for _ in range(3):
            with capture_logs() as logs:
                await s.device.set_policy("withhold")
            assert [line["error"] for line in logs if line["log_level"] == "error"] == ["KVM does not let go"]
            assert s.device.rung_by_hypercall == (0,)
            await request(s, "hypercall")
        s.hypercalls.refuses_to_withdraw = False
        await s.device.set_policy("withhold")
        assert s.device.rung_by_hypercall == ()
        assert s.hypercalls.ring(ID) != 0
        await request(s, "plain")
        await s.rung(hypercall=3, kick=2)  # the withdrawal rings the plain one


# ---- what is shown ----


async def test_its_state_shows_who_may_ring_who_said_so_and_what_was_not_to_be_had() -> None:
    backend = RecordingBackend(queue_count=3, features=regs.F_VERSION_1)
    async with scene(backend, policy="withhold") as s:
        await s.start()
        assert s.device.policy == "withhold"
        assert s.device.state().bells == tuple(QueueBell(index, 0x100 + index, False, False) for index in range(3))
        s.hypercalls.taken.add(0x101 ^ KEY)
        await s.device.set_policy("offer")
        backend.failures["set_doorbell"] = PeerError("no eventfd")
        await s.device.set_policy("withhold")
        await s.device.set_policy("offer")
        await accept(s, 0)
        assert s.device.state() == MmioDeviceState(
            bells=(
                QueueBell(0, 0x100, registered=True, accepted=True),
                QueueBell(1, 0x101, registered=False, accepted=False),
                QueueBell(2, 0x102, registered=True, accepted=False),
            ),
            stray_doorbells=0,
            refusals={"EEXIST": 2},
        )
    backend.close()


# ---- a host that has nothing left ----


async def test_a_lack_of_descriptors_leaves_the_queue_plain_until_it_is_offered_again() -> None:
    async with rng() as backend, scene(backend, policy="withhold") as s:
        await s.start()
        with capture_logs() as logs, no_further_descriptors():
            await s.device.set_policy("offer")
        warnings = [line for line in logs if line["log_level"] == "warning"]
        assert [(line["event"], line["error"]) for line in warnings] == [
            ("no hypercall doorbell, the plain ones go on", "no second descriptor: Too many open files")
        ]
        assert (await s.ids(), s.device.rung_by_hypercall) == ([0], ())
        await request(s, "plain")
        await s.device.set_policy("offer")
        await request(s, "hypercall")


@pytest.mark.parametrize("error", [PeerError("no eventfd"), HostError("none left")], ids=["peer", "host"])
async def test_a_queue_that_cannot_listen_gets_no_id(error: Exception) -> None:
    backend = RecordingBackend(queue_count=2, features=regs.F_VERSION_1)
    async with scene(backend, policy="withhold") as s:
        await s.start()
        backend.failures["set_doorbell"] = error
        with capture_logs() as logs:
            await s.device.set_policy("offer")
        assert [line["queue"] for line in logs if line["log_level"] == "warning"] == [0]
        assert s.device.state().refusals == {"other": 1}
        assert await s.ids() == [0, 0x101 ^ KEY]
        assert list(s.hypercalls.registered) == [0x101 ^ KEY]
    backend.close()


async def test_a_doorbell_that_stays_when_nothing_rings_it_any_more_is_one_line() -> None:
    backend = RecordingBackend(queue_count=2, features=regs.F_VERSION_1)
    async with scene(backend) as s:
        await s.start(FEATURES)
        backend.failures["set_doorbell"] = PeerError("not now")
        with capture_logs() as logs:
            await s.device.set_policy("withhold")
        lines = [(line["queue"], line["error"]) for line in logs if line["log_level"] == "warning"]
        assert lines == [(0, "not now")]
        assert s.hypercalls.registered == {}
    backend.close()


async def test_ids_stay_while_the_driver_resets_its_device_or_stops_its_queue() -> None:
    async with rng() as backend, scene(backend) as s:
        for _ in range(3):
            await s.start(FEATURES)
            await request(s, "hypercall")
            await s.write(regs.QUEUE_SEL, 0)
            await s.write(regs.QUEUE_READY, 0)
            assert s.hypercalls.ring(ID) == 0  # for nothing, but not for a wrong queue either
        assert s.hypercalls.calls == [("register", ID)]


async def test_a_policy_is_changed_while_the_queue_is_stopped() -> None:
    async with rng() as backend, scene(backend) as s:
        await s.start(FEATURES)
        await s.write(regs.QUEUE_SEL, 0)
        await s.write(regs.QUEUE_READY, 0)
        await s.device.set_policy("withhold")
        assert s.hypercalls.registered == {}
        await s.start()
        await request(s, "plain")
        await s.device.set_policy("offer")
        await request(s, "hypercall")


async def test_a_device_withheld_while_its_driver_negotiates_comes_up_with_its_plain_doorbell() -> None:
    async with rng() as backend, scene(backend) as s:
        await s.write(regs.STATUS, 0)
        await s.write(regs.DEVICE_FEATURES_SEL, 1)
        assert (await s.read(regs.DEVICE_FEATURES)) << 32 & regs.F_HYPERCALL_NOTIFY
        await s.device.set_policy("withhold")
        await s.choose(FEATURES)
        s.rings = [SplitDriver(s.memory, 64, event_idx=False)]
        await s.set_up(0, s.rings[0])
        await s.write(regs.STATUS, await s.read(regs.STATUS) | regs.DRIVER_OK)
        await request(s, "plain")


async def test_a_policy_is_changed_while_nobody_drives_the_device() -> None:
    async with rng() as backend, scene(backend) as s:
        for policy in ("withhold", "withhold", "offer", "offer"):
            await s.device.set_policy(policy)
        assert [call for call, _ in s.hypercalls.calls] == ["register", "withdraw", "register"]
        await s.start(FEATURES)
        await request(s, "hypercall")


async def test_no_id_and_no_descriptor_is_left_at_the_end() -> None:
    with no_fd_leaks():
        async with rng() as backend, scene(backend) as s:
            await s.start(FEATURES)
            hypercalls = s.hypercalls
        assert hypercalls.registered == {}
