"""The control socket, and the table that ``hyperbell show`` makes of it."""

from __future__ import annotations

import itertools
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from daemon.commands.show_table import duration, render, size
from daemon.running.control import CLIENTS_MAX, LINE_MAX, ask, respond, serve_control
from daemon.state import ConnectionState, DaemonState, DeviceState
from virtio.errors import HostError
from virtio.native.stats import (
    HISTOGRAM_BUCKETS,
    BackendStats,
    OpStats,
    QueueStats,
    Storage,
    StorageErrors,
    WorkerStats,
)


def state() -> DaemonState:
    reads = OpStats(6, 1, 5 << 20, (0,) * HISTOGRAM_BUCKETS, 0.5)
    queue = QueueStats(0, {"kick": 7, "pio": 0, "hypercall": 4}, 12, 13, 1, 3, 2, 1.5, True, False, {"read": reads})
    connection = ConnectionState(True, 3, 2, 4, 99, 5, {"VHOST_USER_SET_VRING_NUM": 7}, 100.0)
    disk = DeviceState(BackendStats("disk", "blk", 0, (queue,)), connection, "vhost-user", Path("/run/disk.sock"))
    return DaemonState((disk,), (WorkerStats("fast", "io_uring", 21, 22, 23, 2.5, "available"),))


def is_there(path: Path) -> bool:
    return path.exists()


def answer(command: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        json.dumps(respond(json.dumps({"command": command}).encode(), state()), default=str)
    )
    return found


def test_list_names_the_devices() -> None:
    (device,) = answer("list")["devices"]
    assert device == {
        "name": "disk",
        "type": "blk",
        "transport": "vhost-user",
        "socket": "/run/disk.sock",
        "queues": 1,
        "connected": True,
    }


def test_a_device_of_a_machine_of_our_own_has_no_front_end() -> None:
    ours = replace(state().devices[0], connection=None, transport="kvm", socket=None)
    stopped = replace(ours, backend=replace(ours.backend, queues=(replace(ours.backend.queues[0], running=False),)))
    for device, driver in ((ours, True), (stopped, False)):
        one = DaemonState((device,), ())
        (listed,) = respond(b'{"command": "list"}', one)["devices"]
        assert (listed["transport"], listed["socket"], listed["connected"]) == ("kvm", None, driver)
        stats = json.loads(json.dumps(respond(b'{"command": "stats"}', one), default=str))
        line = render(stats).splitlines()[1]
        assert ("driver ready" if driver else "no driver") in line


def test_stats_gives_every_counter() -> None:
    stats = answer("stats")
    assert stats["ok"] is True
    (device,) = stats["devices"]
    assert device["backend"]["queues"][0]["ops"]["read"]["requests"] == 6
    assert device["connection"]["protocol_errors"] == {"VHOST_USER_SET_VRING_NUM": 7}
    assert stats["workers"][0]["reactor"] == "io_uring"


@pytest.mark.parametrize(
    "line",
    [b"", b"list", b"[1]", b"{", b"\xff", b"null", b'{"command": "stats"}' + b" " * LINE_MAX, b"[" * 4000],
)
def test_what_is_no_request_is_answered_with_an_example(line: bytes) -> None:
    reply = respond(line, state())
    assert reply["ok"] is False
    assert '{"command": "list"}' in reply["error"]


def test_an_unknown_command_is_answered_with_the_known_ones() -> None:
    reply = respond(b'{"command": "drain"}', state())
    assert reply == {"ok": False, "error": 'there is no command "drain"; there are: list, stats'}


async def test_the_socket_is_for_its_user_only_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "ctl.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, state)
        assert path.stat().st_mode & 0o777 == 0o600
        stats = await trio.to_thread.run_sync(ask, path, "stats")
        assert stats["devices"][0]["backend"]["device"] == "disk"
        nursery.cancel_scope.cancel()
    assert not is_there(path)


async def test_one_client_may_ask_often_also_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "ctl.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, state)
        async with await trio.open_unix_socket(path) as client:
            for byte in b'{"command": "list"}\nnonsense\n':
                await client.send_all(bytes([byte]))
            received = b""
            with trio.fail_after(20):
                while received.count(b"\n") < 2:
                    received += await client.receive_some()
        assert [json.loads(line)["ok"] for line in received.splitlines()] == [True, False]
        nursery.cancel_scope.cancel()


async def test_a_line_without_end_is_answered_once_and_the_client_let_go(tmp_path: Path) -> None:
    path = tmp_path / "ctl.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, state)
        async with await trio.open_unix_socket(path) as client:
            await client.send_all(b"x" * (LINE_MAX + 1))
            received = b""
            with trio.fail_after(20):
                while chunk := await client.receive_some():
                    received += chunk
        assert json.loads(received)["ok"] is False
        assert (await trio.to_thread.run_sync(ask, path, "list"))["ok"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "said", [b"", b'{"command":', b'{"command": "list"}\n'], ids=["silent", "half a line", "asked"]
)
async def test_clients_that_are_idle_keep_nobody_from_asking(tmp_path: Path, said: bytes) -> None:
    path = tmp_path / "ctl.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, state)
        idle = []
        for _ in range(3 * CLIENTS_MAX):
            client = await trio.open_unix_socket(path)
            await client.send_all(said)
            idle.append(client)
        assert (await trio.to_thread.run_sync(ask, path, "list"))["ok"]
        for client in idle:
            await client.aclose()
        nursery.cancel_scope.cancel()


async def test_a_second_daemon_does_not_take_the_socket_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "ctl.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, state)
        with pytest.raises(HostError, match=r"\[daemon\] control: .*ctl.sock"):
            await serve_control(path, state)
        assert (await trio.to_thread.run_sync(ask, path, "list"))["ok"]
        nursery.cancel_scope.cancel()


async def test_the_socket_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "ctl.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, state)
        assert (await trio.to_thread.run_sync(ask, path, "list"))["ok"]
        nursery.cancel_scope.cancel()


def test_nobody_who_answers_is_said_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="is hyperbell serve running"):
        ask(tmp_path / "none.sock", "list")


async def test_a_refusal_reaches_who_asked(tmp_path: Path) -> None:
    path = tmp_path / "ctl.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, state)
        with pytest.raises(HostError, match="there is no command"):
            await trio.to_thread.run_sync(ask, path, "drain")
        nursery.cancel_scope.cancel()


def test_the_table_shows_front_ends_and_queues() -> None:
    devices, queues, workers = render(answer("stats"), now=225.0).split("\n\n")
    assert devices.splitlines()[1].split() == [
        *("disk", "blk", "connected", "2", "min", "5", "s", "3", "4", "7", "/run/disk.sock"),
    ]
    assert queues.splitlines()[1].split() == [
        *("disk", "0", "running", "6", "1", "5.0", "MiB", "2", "11", "75%", "-", "-"),
    ]
    assert workers.splitlines()[1].split() == ["fast", "io_uring", "available"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59.9, "59 s"), (125, "2 min 5 s"), (7260, "2 h 1 min"), (90061, "1 d 1 h")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (2 << 50, "2048.0 TiB"),
    ],
)
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_a_disk_whose_storage_failed_is_shown_with_what_that_means() -> None:
    errors = (StorageErrors("write_zeroes", "ENOSPC", 3), StorageErrors("flush", "EIO", 1))
    for failed, expected in ((None, "answers"), ("EIO", "a flush failed (EIO): all fail until")):
        (disk,) = state().devices
        disk = replace(disk, backend=replace(disk.backend, storage=Storage(errors, failed)))
        text = render(json.loads(json.dumps(respond(b'{"command": "stats"}', DaemonState((disk,), ())), default=str)))
        assert expected in text
        assert "write zeroes ENOSPC 3, flush EIO 1" in text
    assert "STORAGE" not in render(answer("stats"))


@pytest.mark.parametrize(
    ("bucket", "text"), [(0, "<1 us"), (3, "<8 us"), (10, "<1 ms"), (13, "<8 ms"), (21, "<2.1 s"), (24, ">9 s")]
)
def test_a_queue_shows_what_the_device_took_and_what_the_guest_felt(bucket: int, text: str) -> None:
    one = state()
    (queue,) = one.devices[0].backend.queues
    felt = tuple(99 if each == bucket else 0 for each in range(HISTOGRAM_BUCKETS))
    reads = replace(queue.ops["read"], duration_buckets=(99, *(0,) * 12, 1, *(0,) * (HISTOGRAM_BUCKETS - 14)))
    queue = replace(queue, ops={"read": reads, "write": reads}, guest_duration_buckets=felt)
    device = replace(one.devices[0], backend=replace(one.devices[0].backend, queues=(queue,)))
    stats = json.loads(json.dumps(respond(b'{"command": "stats"}', replace(one, devices=(device,))), default=str))
    header, row = next(
        (above, below) for above, below in itertools.pairwise(render(stats).splitlines()) if above.endswith("GUEST P99")
    )
    assert header.split()[-3:] == ["P99", "GUEST", "P99"]
    assert row.endswith(text)
    assert "<1 us" in row


def test_a_queue_without_requests_has_no_time() -> None:
    stats = answer("stats")
    del stats["devices"][0]["backend"]["queues"][0]["guest_duration_buckets"]  # an earlier daemon's
    assert next(line for line in render(stats).splitlines() if "5.0 MiB" in line).split()[-2:] == ["-", "-"]
