"""One connection over a real socket: refusals, descriptors of the wrong kind, order."""

from __future__ import annotations

import os

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
import trio.testing
from kit.front_end.recording_backend import RecordingBackend
from kit.front_end.served import IOMMU, UVA, connected
from kit.front_end.vhost_user_wire import FrontEnd, u64
from structlog.testing import capture_logs

from transports.vhost_user.serving.connection import WRITE_TIMEOUT
from virtio.errors import GuestError, HostError, PeerError
from virtio.waist import AddressSpace, QueueSetup


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend(features=wire.DEVICE_FEATURES)


# --- what fails and goes on, and what ends the connection ---


@pytest.mark.parametrize(
    "error", [HostError("out of memory"), PeerError("file too short"), GuestError("no such thing")], ids=repr
)
async def test_a_failed_operation_is_told_and_the_conversation_goes_on(
    backend: RecordingBackend, error: Exception
) -> None:
    with wire.no_fd_leaks(), capture_logs() as logs:
        async with connected(backend) as (front_end, server):
            table = wire.mem_table(wire.region(0, wire.MIB, UVA))
            for _ in range(3):
                backend.failures["set_memory"] = error
                assert await front_end.do(5, table, [wire.memfd()]) == 1
            assert server.stats.memory_regions == 0
            assert await front_end.do(5, table, [wire.memfd()]) == 0
            assert server.stats.memory_regions == 1
    refusals = [line for line in logs if line["event"] == "request refused"]
    assert [line["request"] for line in refusals] == ["VHOST_USER_SET_MEM_TABLE"]  # once, however often it happens


async def test_a_failed_operation_that_cannot_be_told_ends_the_connection(backend: RecordingBackend) -> None:
    with wire.no_fd_leaks(), capture_logs() as logs:
        async with connected(backend) as (front_end, server):
            backend.failures["set_memory"] = HostError("out of memory")
            await front_end.send(wire.message(5, wire.mem_table(wire.region(0, wire.MIB, UVA))), [wire.memfd()])
            assert await front_end.ended()
    (line,) = [line for line in logs if line["log_level"] == "error"]
    assert (line["request"], line["error"]) == ("VHOST_USER_SET_MEM_TABLE", "out of memory")
    assert not server.stats.protocol_errors  # it was not the front-end's fault


async def test_config_errors_are_told_by_an_empty_payload(backend: RecordingBackend) -> None:
    async with connected(backend) as (front_end, _):
        assert await front_end.ask(24, wire.config(0, bytes(8))) == wire.config(0, bytes(range(8)))
        assert await front_end.ask(24, wire.config(250, bytes(8))) == b""
        assert await front_end.ask(24, wire.config(0, b"")) == b""
        assert await front_end.ask(24, wire.config(4, bytes(4))) == wire.config(4, bytes(range(4, 8)))


async def test_a_write_to_a_read_only_field_is_told(backend: RecordingBackend) -> None:
    async with connected(backend) as (front_end, _):
        assert await front_end.do(25, wire.config(32, b"\x00")) == 0
        backend.failures["write_config"] = PeerError("capacity is read-only")
        assert await front_end.do(25, wire.config(0, bytes(8))) == 1


async def test_a_ring_the_driver_set_up_wrongly_does_not_end_the_connection(backend: RecordingBackend) -> None:
    with wire.no_fd_leaks(), capture_logs() as logs:
        async with connected(backend) as (front_end, _):
            backend.failures["configure_queue"] = GuestError("the used ring lies outside memory")
            await front_end.start_ring()
            assert backend.verbs().count("configure_queue") == 1  # it is not tried again at every message
            assert await front_end.ask(11, wire.vring_state(0, 0)) == wire.vring_state(0, 0)
            assert ("kick", 0) not in backend.fds
            await front_end.start_ring()
            assert backend.verbs().count("configure_queue") == 2
    assert [line["queue"] for line in logs if "driver set it up wrongly" in line["event"]] == [0]


async def test_one_eventfd_may_serve_several_queues(backend: RecordingBackend) -> None:
    with wire.no_fd_leaks():
        async with connected(backend) as (front_end, _):
            shared = wire.eventfd()
            for index in range(2):
                assert await front_end.do(13, u64(index), [os.dup(shared)]) == 0
            os.close(shared)


@pytest.mark.parametrize("count", [9, 16, 17, 60, 253])
async def test_a_flood_of_descriptors_ends_the_connection_and_all_are_closed(
    backend: RecordingBackend, count: int
) -> None:
    with wire.no_fd_leaks(), capture_logs() as logs:
        async with connected(backend) as (front_end, server):
            await front_end.send(wire.message(5, wire.mem_table(wire.region(0, wire.MIB, UVA))), wire.eventfds(count))
            assert await front_end.ended()
            assert sum(server.stats.protocol_errors.values()) == 1
    (line,) = [line for line in logs if line["log_level"] == "warning"]
    assert ("at most 8" if count <= 16 else "than could be received") in line["error"]


async def test_messages_sent_at_once_keep_their_own_descriptors(backend: RecordingBackend) -> None:
    with wire.no_fd_leaks():
        async with connected(backend) as (front_end, _):
            await front_end.send(wire.message(1) + wire.message(17))
            await front_end.send(wire.message(13, u64(0)), [wire.eventfd()])
            await front_end.send(wire.message(14, u64(1)), [wire.eventfd()])
            await front_end.send(wire.message(13, u64(1 | 1 << 8)))
            assert (await front_end.receive())[0] == 1
            assert (await front_end.receive())[0] == 17
            assert await front_end.ask(40) == u64(0)
            assert set(backend.fds) == {("call", 0), ("err", 1)}


async def test_while_a_queue_drains_no_later_message_is_looked_at(backend: RecordingBackend) -> None:
    async with connected(backend) as (front_end, _):
        await front_end.start_ring()
        backend.stopping[0] = trio.Event()
        backend.bases[0] = 77
        await front_end.send(wire.message(11, wire.vring_state(0, 0)) + wire.message(25, wire.config(32, b"\x00")))
        await backend.called("stop_queue")
        await trio.testing.wait_all_tasks_blocked()
        assert "write_config" not in backend.verbs()
        backend.stopping[0].set()
        assert await front_end.receive() == (11, wire.vring_state(0, 77))
        await backend.called("write_config")


@pytest.mark.parametrize("slots", [False, True], ids=["SET_MEM_TABLE", "ADD_MEM_REG"])
async def test_memory_survives_every_reset_for_it_belongs_to_the_connection(
    backend: RecordingBackend, slots: bool
) -> None:
    with wire.no_fd_leaks():
        async with connected(backend) as (front_end, server):
            if slots:
                assert await front_end.do(37, wire.single_region(0, wire.MIB, UVA), [wire.memfd()]) == 0
            else:
                assert await front_end.do(5, wire.mem_table(wire.region(0, wire.MIB, UVA)), [wire.memfd()]) == 0
            for resets in ([34], [34, 34, 34], [39, 34, 34], [39], [4], [4, 39, 34]):
                before = backend.regions
                backend.calls.clear()
                assert await front_end.do(2, u64(wire.F_VERSION_1)) == 0
                await front_end.start_ring(share=False)
                assert "configure_queue" in backend.verbs()
                for request in resets:
                    assert await front_end.do(request, u64(0) if request == 39 else b"") == 0
                assert "set_memory" not in backend.verbs()
                assert backend.regions == before
                assert os.fstat(before[0].fd.fileno()).st_size == wire.MIB
                assert server.stats.memory_regions == 1
                await front_end.ask(11, wire.vring_state(0, 0))


async def test_a_paused_machine_goes_on_with_the_bases_it_was_told(backend: RecordingBackend) -> None:
    async with connected(backend, IOMMU) as (front_end, _):
        await front_end.start_ring()
        assert await front_end.do(39, u64(15)) == 0
        backend.bases[0] = 5
        backend.calls.clear()
        assert await front_end.do(39, u64(0)) == 0
        assert await front_end.ask(11, wire.vring_state(0, 0)) == wire.vring_state(0, 5)
        assert backend.calls == [("stop_queue", 0), ("iotlb_invalidate", 0, 2**64 - 1), ("set_status", 0)]
        assert await front_end.do(2, u64(IOMMU)) == 0
        assert await front_end.do(12, u64(0), [wire.eventfd()]) == 0
        (setup,) = [call[2] for call in backend.calls if call[0] == "configure_queue"]
        assert setup == QueueSetup(128, UVA + 0x1000, UVA + 0x2000, UVA + 0x3000, 5, AddressSpace.IOVA)
        backend.calls.clear()
        assert await front_end.ask(11, wire.vring_state(0, 0)) == wire.vring_state(0, 5)
        assert backend.calls == [("stop_queue", 0), ("iotlb_invalidate", 0, 2**64 - 1)]


async def test_reset_owner_disables_every_queue(backend: RecordingBackend) -> None:
    async with connected(backend) as (front_end, _):
        assert await front_end.do(4) == 0
        assert backend.calls[-2:] == [("enable_queue", 0, False), ("enable_queue", 1, False)]


async def test_without_protocol_features_every_queue_is_enabled_at_once(backend: RecordingBackend) -> None:
    async with connected(backend, wire.F_VERSION_1):
        assert backend.calls[-2:] == [("enable_queue", 0, True), ("enable_queue", 1, True)]


async def talk_without_listening(front_end: FrontEnd) -> None:
    while True:
        await front_end.send(wire.message(1) * 64)


async def test_a_front_end_that_never_reads_its_replies_loses_the_connection(
    backend: RecordingBackend, autojump_clock: trio.testing.MockClock
) -> None:
    with wire.no_fd_leaks(), capture_logs() as logs:
        async with connected(backend, limit=10 * WRITE_TIMEOUT) as (front_end, server):
            with pytest.raises(BrokenPipeError):
                await talk_without_listening(front_end)
    assert trio.current_time() >= WRITE_TIMEOUT
    assert [line["request"] for line in logs if line["log_level"] == "warning"] == ["VHOST_USER_GET_FEATURES"]
    assert server.stats.protocol_errors == {"VHOST_USER_GET_FEATURES": 1}
