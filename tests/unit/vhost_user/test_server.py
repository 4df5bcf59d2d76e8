"""The server over real Unix sockets: how front-ends come, leave, and are refused."""

from __future__ import annotations

import itertools
import os
import resource
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
import trio.testing
from kit.front_end.recording_backend import RecordingBackend
from kit.front_end.vhost_user_wire import FrontEnd, serving, u64
from structlog.testing import capture_logs

from transports.vhost_user.serving.endpoint import Connect, Inherit
from transports.vhost_user.serving.server import CONNECT_DELAY_MAX, SILENT_SECONDS, VhostUserServer, serve
from transports.vhost_user.serving.waiting import WAITING_MAX
from virtio.errors import GuestError, HostError
from virtio.fd import OwnedFd
from virtio.socket_file import Listen
from virtio.waist import QueueBroken


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.sock"


@pytest.fixture
def backend() -> RecordingBackend:
    return RecordingBackend(features=wire.DEVICE_FEATURES)


def is_there(path: Path) -> bool:
    return os.path.lexists(path)


async def test_a_front_end_is_served_and_its_wishes_reach_the_back_end_in_order(
    backend: RecordingBackend, path: Path
) -> None:
    with wire.no_fd_leaks():
        async with serving(backend, Listen(path)) as server:
            with await FrontEnd.connect(path) as front_end:
                await front_end.negotiate()
                await front_end.start_ring()
                assert await front_end.ask(17) == u64(2)
                assert backend.verbs() == [
                    "set_driver_features",
                    "set_memory",
                    "set_call",
                    "set_err",
                    "set_kick",
                    "configure_queue",
                    "enable_queue",
                ]
                assert ("set_driver_features", wire.F_VERSION_1) in backend.calls  # without bit 30
                assert server.stats.connected
                assert server.stats.memory_regions == 1
                assert server.stats.messages == 13
            await backend.called("reset")
        backend.close()
        assert not is_there(path)


async def test_when_a_front_end_leaves_nothing_of_it_stays_and_the_next_is_served(
    backend: RecordingBackend, path: Path
) -> None:
    async with serving(backend, Listen(path)) as server:
        with wire.no_fd_leaks():
            for turn in range(1, 4):
                with await FrontEnd.connect(path) as front_end:
                    await front_end.negotiate()
                    await front_end.start_ring()
                    assert (server.stats.connections, server.stats.reconnects) == (turn, turn - 1)
                await backend.called("reset", turn)
                await trio.testing.wait_all_tasks_blocked()
                assert not server.stats.connected
                assert server.stats.memory_regions == 0
                assert not backend.fds


async def test_a_front_end_may_leave_at_every_byte_of_a_conversation(backend: RecordingBackend, path: Path) -> None:
    table = wire.mem_table(wire.region(0, wire.MIB, 0x7F00_0000_0000))
    steps: list[tuple[bytes, int]] = [
        (wire.message(16, u64(wire.ALL_PROTOCOL_FEATURES)) + wire.message(3) + wire.message(2, u64(1 << 32)), 0),
        (wire.message(5, table), 1),
        (wire.message(8, wire.vring_state(0, 64)) + wire.message(9, wire.vring_addr(0)), 0),
        (wire.message(13, u64(0)), 1),
        (wire.message(12, u64(0)), 1),
        (wire.message(11, wire.vring_state(0, 0)), 0),
    ]
    turns = 0
    async with serving(backend, Listen(path)) as server:
        with wire.no_fd_leaks():
            for last, (data, _) in enumerate(steps):
                for cut in range(1, len(data) + 1):
                    with await FrontEnd.connect(path) as front_end:
                        for whole, fd_count in steps[:last]:
                            await front_end.send(whole, wire.eventfds(fd_count))
                        await front_end.send(data[:cut], wire.eventfds(steps[last][1]))
                    turns += 1
                    await backend.called("reset", turns)
            await trio.testing.wait_all_tasks_blocked()
        assert server.stats.connections == turns == sum(len(data) for data, _ in steps)
        assert not server.stats.protocol_errors


async def test_a_second_front_end_is_refused_without_harm_to_the_first(backend: RecordingBackend, path: Path) -> None:
    with capture_logs() as logs:
        async with serving(backend, Listen(path)) as server:
            with await FrontEnd.connect(path) as first:
                await first.negotiate()
                for _ in range(20):
                    with await FrontEnd.connect(path) as second:
                        assert await second.ended()
                assert await first.ask(17) == u64(2)
                assert server.stats.refused == 20
                assert server.stats.connections == 1
    assert [line["log_level"] for line in logs if "second front-end" in line["event"]] == ["warning"]


async def test_a_front_end_that_restarts_is_not_refused_while_its_old_connection_ends(
    backend: RecordingBackend, path: Path
) -> None:
    async with serving(backend, Listen(path)) as server:
        old = await FrontEnd.connect(path)
        await old.negotiate()
        await old.start_ring()
        backend.stopping[0] = trio.Event()
        await old.send(wire.message(11, wire.vring_state(0, 0)))
        await backend.called("stop_queue")  # the device still drains its queue ...
        old.close()
        with await FrontEnd.connect(path) as new:  # ... when the next one comes
            await trio.testing.wait_all_tasks_blocked()
            backend.stopping[0].set()
            await new.negotiate()
            assert server.stats.connections == 2
            assert server.stats.refused == 0


@pytest.mark.parametrize("said", [b"", wire.message(3)[:5]], ids=["nothing", "half a message"])
async def test_a_front_end_that_says_nothing_gives_way_to_one_that_speaks(
    backend: RecordingBackend, path: Path, autojump_clock: trio.testing.MockClock, said: bytes
) -> None:
    with capture_logs() as logs:
        async with serving(backend, Listen(path)) as server:
            with await FrontEnd.connect(path) as silent, await FrontEnd.connect(path) as speaking:
                await silent.send(said)
                with trio.fail_after(10 * SILENT_SECONDS):
                    await speaking.negotiate()
                    assert await silent.ended()
                assert (server.stats.connections, server.stats.refused) == (2, 0)
    assert [line["event"] for line in logs if line["log_level"] == "warning" and "gave way" in line["event"]]


async def test_a_silent_front_end_keeps_its_place_while_nobody_else_speaks(
    backend: RecordingBackend, path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(backend, Listen(path)) as server:
        with await FrontEnd.connect(path) as first, await FrontEnd.connect(path), await FrontEnd.connect(path):
            await trio.sleep(2 * SILENT_SECONDS)
            await first.negotiate()
            assert server.stats.connections == 1


async def test_a_front_end_that_has_spoken_keeps_its_place_however_long_it_is_silent_then(
    backend: RecordingBackend, path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(backend, Listen(path)) as server:
        with await FrontEnd.connect(path) as first, await FrontEnd.connect(path) as early:
            await trio.testing.wait_all_tasks_blocked()
            await first.negotiate()
            assert await early.ended()  # it waited, and is told as soon as the first has spoken
            await trio.sleep(2 * SILENT_SECONDS)
            with await FrontEnd.connect(path) as late:
                assert await late.ended()
            assert await first.ask(17) == u64(2)
            assert (server.stats.connections, server.stats.refused) == (1, 2)


@pytest.mark.parametrize("dead", [1, 2, 3, WAITING_MAX, 4 * WAITING_MAX])
async def test_however_many_dead_connections_wait_the_next_one_is_served(
    backend: RecordingBackend, path: Path, dead: int
) -> None:
    async with serving(backend, Listen(path)) as server:
        old = await FrontEnd.connect(path)
        await old.negotiate()
        await old.start_ring()
        backend.stopping[0] = trio.Event()
        await old.send(wire.message(11, wire.vring_state(0, 0)))
        await backend.called("stop_queue")
        old.close()
        for _ in range(dead):
            with await FrontEnd.connect(path):
                await trio.testing.wait_all_tasks_blocked()
        with await FrontEnd.connect(path) as new:
            await trio.testing.wait_all_tasks_blocked()
            backend.stopping[0].set()
            await new.negotiate()
            assert server.stats.refused == 0


async def test_any_number_of_silent_front_ends_keeps_nobody_out_who_speaks(
    backend: RecordingBackend, path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(backend, Listen(path)), AsyncExitStack() as stack:
        for _ in range(5 * WAITING_MAX):
            stack.enter_context(await FrontEnd.connect(path))
        with await FrontEnd.connect(path) as speaking, trio.fail_after(10 * SILENT_SECONDS):
            await speaking.negotiate()


async def test_a_broken_protocol_ends_one_connection_with_one_line(backend: RecordingBackend, path: Path) -> None:
    with wire.no_fd_leaks(), capture_logs() as logs:
        async with serving(backend, Listen(path)) as server:
            with await FrontEnd.connect(path) as front_end:
                await front_end.negotiate()
                await front_end.send(wire.message(8, wire.vring_state(300, 64)), wire.eventfds(0))
                assert await front_end.ended()
            with await FrontEnd.connect(path) as front_end:
                await front_end.negotiate()
            assert server.stats.protocol_errors == {"VHOST_USER_SET_VRING_NUM": 1}
    (line,) = [line for line in logs if line["log_level"] == "warning"]
    assert line["device"] == "disk0"
    assert line["request"] == "VHOST_USER_SET_VRING_NUM"
    assert "queue 300 does not exist" in line["error"]


async def test_queues_that_the_device_has_not_are_told_once_however_often_they_are_prepared(
    backend: RecordingBackend, path: Path
) -> None:
    """DPDK's virtio-user with more queues than are offered."""
    with wire.no_fd_leaks(), capture_logs() as logs:
        async with serving(backend, Listen(path)) as server:
            with await FrontEnd.connect(path) as front_end:
                await front_end.negotiate()
                for index in (9, 10):
                    await front_end.send(wire.message(13, u64(index)), [wire.eventfd()])
                    await front_end.send(wire.message(8, wire.vring_state(index, 64)))
                    await front_end.send(wire.message(18, wire.vring_state(index, 1)))
                    await front_end.send(wire.message(12, u64(index)), [wire.eventfd()])
                    assert await front_end.do(10, wire.vring_state(index, 0)) == 1
                    assert await front_end.ask(11, wire.vring_state(index, 0)) == wire.vring_state(index, 0)
                await front_end.start_ring()
            assert server.stats.protocol_errors["VHOST_USER_SET_VRING_NUM"] == 2
    (line,) = [line for line in logs if line["log_level"] == "warning"]
    assert "queue 9 does not exist" in line["error"]


async def test_an_error_of_ours_ends_one_connection_and_not_the_server(backend: RecordingBackend, path: Path) -> None:
    backend.failures["set_driver_features"] = RuntimeError("a bug")
    with capture_logs() as logs:
        async with serving(backend, Listen(path)):
            with await FrontEnd.connect(path) as front_end:
                await front_end.send(wire.message(3) + wire.message(2, u64(0)))
                assert await front_end.ended()
            with await FrontEnd.connect(path) as front_end:
                await front_end.negotiate()
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["connection ended: internal error"]


async def test_stopping_the_server_resets_the_back_end_and_removes_the_socket(
    backend: RecordingBackend, path: Path
) -> None:
    with wire.no_fd_leaks():
        async with serving(backend, Listen(path)):
            front_end = await FrontEnd.connect(path)
            await front_end.negotiate()
            await front_end.start_ring()
        assert backend.verbs()[-3:] == ["reset", "set_call", "set_err"]
        assert await front_end.ended()
        assert not is_there(path)
        front_end.close()


async def test_stopping_the_server_waits_for_the_reset_however_long_it_takes(
    backend: RecordingBackend, path: Path, autojump_clock: object
) -> None:
    resets = []

    async def slow(*, keep_memory: bool = False) -> None:
        await trio.sleep(3)  # of the mock clock
        resets.append("done")

    backend.reset = slow  # type: ignore[method-assign]
    async with serving(backend, Listen(path)):
        front_end = await FrontEnd.connect(path)
        await front_end.negotiate()
    assert resets == ["done"]
    assert await front_end.ended()
    front_end.close()


async def test_a_broken_queue_is_logged_with_its_number(backend: RecordingBackend, path: Path) -> None:
    with capture_logs() as logs:
        async with serving(backend, Listen(path)):
            backend.post(QueueBroken(3, GuestError("the chain loops")))
            await trio.testing.wait_all_tasks_blocked()
    (line,) = [line for line in logs if line["log_level"] == "warning"]
    assert (line["queue"], line["error"], line["device"]) == (3, "the chain loops", "disk0")


async def test_a_server_whose_address_is_taken_says_so(backend: RecordingBackend, path: Path) -> None:
    async with serving(backend, Listen(path)):
        with pytest.raises(HostError, match="another process listens there"):
            await serve(RecordingBackend(), Listen(path))
        with await FrontEnd.connect(path) as front_end:
            await front_end.negotiate()


async def test_running_out_of_descriptors_delays_a_front_end_and_ends_nothing(
    backend: RecordingBackend, path: Path, autojump_clock: object
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with capture_logs() as logs:
        async with serving(backend, Listen(path)):
            front_end = FrontEnd(trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            free = os.dup(0)  # the lowest descriptor that is free
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            try:
                await front_end.socket.connect(str(path))
                await trio.sleep(1)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            await front_end.negotiate()
            front_end.close()
    events = [line["event"] for line in logs]
    assert events.count("out of descriptors: a front-end waits") == 1
    assert events.count("descriptors are to be had again: a front-end goes on") == 1


# --- other endpoints ---


async def test_an_inherited_listening_socket_is_served_and_its_file_stays(
    backend: RecordingBackend, path: Path
) -> None:
    with wire.no_fd_leaks():
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        async with serving(backend, Inherit(OwnedFd(listener.detach()))):
            for _ in range(2):
                with await FrontEnd.connect(path) as front_end:
                    await front_end.negotiate()
        assert is_there(path)


async def test_an_inherited_connection_is_served_until_its_front_end_leaves(backend: RecordingBackend) -> None:
    with wire.no_fd_leaks():
        ours, theirs = trio.socket.socketpair()
        async with trio.open_nursery() as nursery:
            await nursery.start(VhostUserServer(backend, Inherit(OwnedFd(ours.detach()))).run)
            with FrontEnd(theirs) as front_end:
                await front_end.negotiate()
                await front_end.start_ring()
        assert backend.verbs()[-3:] == ["reset", "set_call", "set_err"]


def listen_at(path: Path) -> trio.socket.SocketType:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))  # not trio's: that uses a thread, and the mock clock would run on meanwhile
    listener.listen()
    return trio.socket.from_stdlib_socket(listener)


async def test_client_mode_waits_for_a_front_end_and_comes_back_to_it(
    backend: RecordingBackend, path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with wire.no_fd_leaks(), capture_logs() as logs:
        async with serving(backend, Connect(path), limit=100) as server:
            await trio.sleep(3 * CONNECT_DELAY_MAX)  # nobody there
            assert server.stats.connections == 0
            listener = listen_at(path)
            for turn in range(1, 3):
                sock, _ = await listener.accept()
                with FrontEnd(sock) as front_end:
                    await front_end.negotiate()
                await backend.called("reset", turn)
            listener.close()
    waiting = [line["error"] for line in logs if line["event"] == "waiting for a front-end"]
    assert waiting[:1] == ["No such file or directory"]  # said once, not at every attempt
    assert len(waiting) <= 2


async def test_client_mode_does_not_hammer_a_front_end_that_hangs_up(
    backend: RecordingBackend, path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(backend, Connect(path)):
        listener = listen_at(path)
        times = []
        for _ in range(8):
            sock, _ = await listener.accept()
            sock.close()
            times.append(trio.current_time())
        listener.close()
    gaps = [late - early for early, late in itertools.pairwise(times)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == pytest.approx(CONNECT_DELAY_MAX)
