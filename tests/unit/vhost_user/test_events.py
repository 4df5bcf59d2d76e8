"""What the device has to say, over the back-end channel of a whole connection: config changes and IOTLB misses."""

from __future__ import annotations

import os
import socket

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
import trio.testing
from kit.front_end.recording_backend import RecordingBackend
from kit.front_end.served import IOMMU, UVA, connected, open_channel
from kit.front_end.vhost_user_wire import u64
from structlog.testing import capture_logs

from transports.vhost_user.serving.connection import ACK_TIMEOUT
from virtio.fd import OwnedFd
from virtio.waist import ConfigChanged, IotlbMiss, Permission


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend(features=wire.DEVICE_FEATURES)


async def test_a_changed_config_space_is_announced_and_read_before_it_is_acknowledged(
    backend: RecordingBackend,
) -> None:
    with wire.no_fd_leaks():
        async with connected(backend) as (front_end, _):
            with await open_channel(front_end) as channel:
                await front_end.start_ring()
                for capacity in (7, 8):
                    backend.config[0] = capacity
                    backend.post(ConfigChanged())
                    assert await channel.receive() == (2, b"")
                    assert await front_end.ask(24, wire.config(0, bytes(1))) == wire.config(0, bytes([capacity]))
                    await channel.send(wire.reply_to(2, u64(0)))


async def test_nothing_is_announced_while_the_device_is_suspended(backend: RecordingBackend) -> None:
    async with connected(backend) as (front_end, _):
        with await open_channel(front_end) as channel:
            backend.post(ConfigChanged())
            backend.post(ConfigChanged())
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(BlockingIOError):
                os.read(channel.socket.fileno(), 1)
            await front_end.start_ring()
            assert await channel.receive() == (2, b"")  # one notice for both changes


async def test_a_missing_translation_is_asked_for_and_its_answer_reaches_the_back_end(
    backend: RecordingBackend,
) -> None:
    async with connected(backend, IOMMU) as (front_end, _):
        with await open_channel(front_end) as channel:
            await front_end.start_ring()
            for _ in range(5):
                backend.post(IotlbMiss(0x4000, Permission.READ))
            assert await channel.receive() == (1, wire.iotlb(1, 0x4000, perm=1))
            assert await front_end.ask(22, wire.iotlb(2, 0x4000, 0x1000, UVA, 3)) == u64(0)
            await channel.send(wire.reply_to(1, u64(0)))
            assert ("iotlb_update", 0x4000, 0x1000, UVA, 3) in backend.calls
            assert await front_end.ask(22, wire.iotlb(2, 0x5000, 0x1000, 0, 3)) == u64(1)  # not shared memory
            assert await front_end.ask(22, wire.iotlb(3, 0x4000, 0x1000)) == u64(0)
            assert ("iotlb_invalidate", 0x4000, 0x1000) in backend.calls
            # Those that came after the question was sent may mean a second loss: asked once more, for all of them.
            assert await channel.receive() == (1, wire.iotlb(1, 0x4000, perm=1))
            await channel.send(wire.reply_to(1, u64(1)))
            backend.post(IotlbMiss(0x8000, Permission.WRITE))
            assert await channel.receive() == (1, wire.iotlb(1, 0x8000, perm=2))


async def test_a_miss_is_asked_for_though_it_comes_before_the_rings_start_is_acknowledged(
    backend: RecordingBackend,
) -> None:
    start = backend.set_kick

    async def miss_at_once(index: int, fd: OwnedFd | None) -> None:
        await start(index, fd)
        backend.post(IotlbMiss(0x4000, Permission.READ))
        await trio.testing.wait_all_tasks_blocked()

    backend.set_kick = miss_at_once  # type: ignore[method-assign]
    async with connected(backend, IOMMU) as (front_end, _):
        with await open_channel(front_end) as channel:
            await front_end.start_ring()
            assert await channel.receive() == (1, wire.iotlb(1, 0x4000, perm=1))


async def test_a_miss_that_was_not_asked_for_yet_ends_with_the_last_ring(backend: RecordingBackend) -> None:
    async with connected(backend, IOMMU) as (front_end, _):
        with await open_channel(front_end) as channel:
            await front_end.start_ring()
            for iova in (0x4000, 0x5000):
                backend.post(IotlbMiss(iova, Permission.READ))
            assert await channel.receive() == (1, wire.iotlb(1, 0x4000, perm=1))
            await front_end.ask(11, wire.vring_state(0, 0))
            await channel.send(wire.reply_to(1, u64(0)))
            await front_end.start_ring()
            backend.post(IotlbMiss(0x8000, Permission.READ))
            assert await channel.receive() == (1, wire.iotlb(1, 0x8000, perm=1))


async def test_a_miss_without_a_channel_is_logged_once(backend: RecordingBackend) -> None:
    with capture_logs() as logs:
        async with connected(backend, IOMMU) as (front_end, _):
            await front_end.start_ring()
            for iova in range(3):
                backend.post(IotlbMiss(iova << 12, Permission.READ))
                await trio.testing.wait_all_tasks_blocked()
    assert len([line for line in logs if "no back-end channel" in line["event"]]) == 1


async def test_a_front_end_that_never_acknowledges_is_waited_for_once(
    backend: RecordingBackend, autojump_clock: trio.testing.MockClock
) -> None:
    with capture_logs() as logs:
        async with connected(backend, limit=10 * ACK_TIMEOUT) as (front_end, _):
            with await open_channel(front_end) as channel:
                await front_end.start_ring()
                for _ in range(4):
                    backend.post(ConfigChanged())
                    assert await channel.receive() == (2, b"")
                    assert await front_end.ask(17) == u64(2)  # meanwhile its own requests are served
                    await trio.testing.wait_all_tasks_blocked()
    assert trio.current_time() == pytest.approx(ACK_TIMEOUT, abs=0.1)
    assert len([line for line in logs if "does not answer on the back-end channel" in line["event"]]) == 1


@pytest.mark.parametrize("answer", [wire.reply_to(9, u64(0)), b"nonsense and more"], ids=["wrong_request", "nonsense"])
async def test_a_wrong_acknowledgement_ends_the_channel_and_not_the_connection(
    backend: RecordingBackend, answer: bytes
) -> None:
    with wire.no_fd_leaks():
        async with connected(backend) as (front_end, server):
            with await open_channel(front_end) as channel:
                await front_end.start_ring()
                backend.post(ConfigChanged())
                await channel.receive()
                await channel.send(answer)
                assert await channel.ended()
            assert await front_end.ask(17) == u64(2)
            assert server.stats.protocol_errors == {"VHOST_USER_BACKEND_CONFIG_CHANGE_MSG": 1}


async def test_a_channel_that_is_replaced_is_closed_and_the_question_asked_again(backend: RecordingBackend) -> None:
    with wire.no_fd_leaks():
        async with connected(backend) as (front_end, _):
            with await open_channel(front_end) as first:
                await front_end.start_ring()
                backend.post(ConfigChanged())
                assert await first.receive() == (2, b"")
                with await open_channel(front_end) as second:
                    assert await first.ended()
                    assert await second.receive() == (2, b"")
                    await second.send(wire.reply_to(2, u64(0)))


async def test_a_channel_that_is_no_socket_is_refused(backend: RecordingBackend) -> None:
    with wire.no_fd_leaks():
        async with connected(backend) as (front_end, _):
            assert await front_end.do(21, b"", [wire.eventfd()]) == 1
            assert await front_end.do(21, b"", [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()]) == 1
            assert await front_end.ask(17) == u64(2)
