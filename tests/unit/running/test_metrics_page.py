"""The metrics: names, labels and values, and the page that shows them."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from daemon.metrics.page import StateCollector
from daemon.metrics.server import CONNECTIONS_MAX, REQUEST_MAX, REQUEST_SECONDS, serve_metrics
from daemon.state import ConnectionState, DaemonState, DeviceState
from transports.kvm.machine.state import MachineState, MmioDeviceState, QueueBell
from virtio.errors import HostError
from virtio.native.stats import (
    DURATION_BOUNDS,
    HISTOGRAM_BUCKETS,
    BackendStats,
    OpStats,
    QueueStats,
    Storage,
    StorageErrors,
    WorkerStats,
)


def op(requests: int = 0, errors: int = 0, size: int = 0, buckets: dict[int, int] | None = None) -> OpStats:
    counts = tuple((buckets or {}).get(index, 0) for index in range(HISTOGRAM_BUCKETS))
    return OpStats(requests, errors, size, counts, 0.5)


def queue(number: int, ops: dict[str, OpStats], broken: bool = False) -> QueueStats:
    return QueueStats(
        queue=number,
        doorbells={"kick": 6, "pio": 3, "hypercall": 2},
        wakeups=12,
        empty_wakeups=13,
        notifications_sent=14,
        notifications_suppressed=15,
        notifications_lost=3,
        inflight=16,
        oldest_age_seconds=1.5,
        running=True,
        broken=broken,
        ops=ops,
        guest_duration_buckets=(0, 2, *(0,) * (HISTOGRAM_BUCKETS - 3), 4) if number == 0 else (0,) * HISTOGRAM_BUCKETS,
        guest_duration_sum_seconds=7.5,
    )


def state() -> DaemonState:
    reads = op(requests=6, errors=1, size=4096, buckets={0: 1, 3: 2, HISTOGRAM_BUCKETS - 1: 3})
    connection = ConnectionState(
        connected=True,
        connections=3,
        reconnects=2,
        refused=4,
        messages=99,
        memory_regions=5,
        protocol_errors={"VHOST_USER_SET_VRING_NUM": 7},
        since=0.0,
    )
    queues = (queue(0, {"read": reads}), queue(1, {"read": op()}, broken=True))
    disk = DeviceState(BackendStats("disk", "blk", 0, queues), connection, "vhost-user", Path("/run/disk.sock"))
    return DaemonState((disk,), (WorkerStats("fast", "io_uring", 21, 22, 23, 2.5, "available"),))


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def collected(snapshot: DaemonState) -> Samples:
    registry = CollectorRegistry()
    registry.register(StateCollector(lambda: snapshot))
    return samples(generate_latest(registry).decode())


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_a_device_without_a_front_end_has_queues_and_no_figures_of_a_connection() -> None:
    ours = replace(state().devices[0], connection=None, transport="kvm", socket=None)
    found = collected(DaemonState((ours,), ()))
    assert value(found, "hyperbell_doorbells_total", device="disk", queue="0", kind="hypercall") == 2
    assert not [name for name, _ in found if "frontend" in name or "memory_regions" in name]


def test_a_machine_of_our_own_shows_who_can_ring_by_hypercall_and_what_rang_nothing() -> None:
    bells = (QueueBell(0, 0x100, registered=True, accepted=True), QueueBell(1, 0x101, registered=False, accepted=False))
    own = MmioDeviceState(bells, stray_doorbells=12, refusals={})
    ours = replace(state().devices[0], connection=None, transport="kvm", socket=None, own=own)
    machine = MachineState(True, "", refused_hypercalls=3, unknown_memory=5, unknown_ports=6)
    found = collected(DaemonState((ours,), (), refusals={"EEXIST": 1}, machine=machine))
    for index, rings in enumerate((1, 0)):
        labels = {"device": "disk", "queue": str(index)}
        assert value(found, "hyperbell_hypercall_doorbells", **labels) == rings
        assert value(found, "hyperbell_hypercall_doorbells_accepted", **labels) == rings
    assert value(found, "hyperbell_hypercall_refusals_total", reason="EEXIST") == 1
    assert value(found, "hyperbell_stray_doorbells_total", device="disk") == 12
    assert value(found, "hyperbell_machine_refused_hypercalls_total") == 3
    assert value(found, "hyperbell_machine_unknown_accesses_total", space="memory") == 5
    assert value(found, "hyperbell_machine_unknown_accesses_total", space="ports") == 6
    assert not [name for name, _ in collected(state()) if "machine" in name or "stray" in name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hyperbell_requests_total", 6),
        ("hyperbell_request_bytes_total", 4096),
        ("hyperbell_request_errors_total", 1),
        ("hyperbell_request_duration_seconds_count", 6),
        ("hyperbell_request_duration_seconds_sum", 0.5),
    ],
)
def test_requests_are_counted_by_device_queue_and_operation(name: str, expected: float) -> None:
    assert value(collected(state()), name, device="disk", queue="0", op="read") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hyperbell_kicks_total", 11),
        ("hyperbell_wakeups_total", 12),
        ("hyperbell_empty_wakeups_total", 13),
        ("hyperbell_notifications_sent_total", 14),
        ("hyperbell_notifications_suppressed_total", 15),
        ("hyperbell_notifications_lost_total", 3),
        ("hyperbell_inflight_requests", 16),
        ("hyperbell_oldest_request_age_seconds", 1.5),
        ("hyperbell_queue_broken", 1),
    ],
)
def test_queues_are_counted_by_device_and_queue(name: str, expected: float) -> None:
    assert value(collected(state()), name, device="disk", queue="1") == expected


@pytest.mark.parametrize(("kind", "expected"), [("kick", 6), ("pio", 3), ("hypercall", 2)])
def test_rings_are_counted_by_kind_of_doorbell(kind: str, expected: float) -> None:
    assert value(collected(state()), "hyperbell_doorbells_total", device="disk", queue="1", kind=kind) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hyperbell_frontend_connected", 1),
        ("hyperbell_frontend_connections_total", 3),
        ("hyperbell_frontend_reconnects_total", 2),
        ("hyperbell_frontend_refused_total", 4),
        ("hyperbell_frontend_messages_total", 99),
        ("hyperbell_memory_regions", 5),
    ],
)
def test_front_ends_are_counted_by_device(name: str, expected: float) -> None:
    assert value(collected(state()), name, device="disk") == expected


def test_protocol_errors_are_counted_by_device_and_request() -> None:
    found = collected(state())
    assert value(found, "hyperbell_protocol_errors_total", device="disk", request="VHOST_USER_SET_VRING_NUM") == 7


def test_workers_are_counted_by_name() -> None:
    found = collected(state())
    assert value(found, "hyperbell_worker_wakeups_total", worker="fast") == 21
    assert value(found, "hyperbell_worker_poll_hits_total", worker="fast") == 22
    assert value(found, "hyperbell_worker_poll_misses_total", worker="fast") == 23
    assert value(found, "hyperbell_worker_cpu_seconds_total", worker="fast") == 2.5
    assert value(found, "hyperbell_worker_info", worker="fast", reactor="io_uring", reason="available") == 1


def test_build_info_names_version_and_platform() -> None:
    (labels,) = (dict(labels) for name, labels in collected(state()) if name == "hyperbell_build_info")
    assert set(labels) == {"version", "python", "machine"}
    assert all(labels.values())


def test_histogram_buckets_are_cumulative_and_bounded_in_seconds() -> None:
    found = collected(state())
    buckets = {
        float(dict(labels)["le"]): count
        for (name, labels), count in found.items()
        if name == "hyperbell_request_duration_seconds_bucket" and ("queue", "0") in labels
    }
    assert list(buckets) == [*DURATION_BOUNDS, float("inf")]
    counts = list(buckets.values())
    assert counts[:4] == [1, 1, 1, 3]
    assert counts[-2:] == [3, 6]


def test_what_the_guest_feels_is_a_histogram_of_each_queue_that_has_requests() -> None:
    found = collected(state())
    name = "hyperbell_guest_request_duration_seconds"
    labels = {"device": "disk", "queue": "0"}
    assert value(found, f"{name}_count", **labels) == 6
    assert value(found, f"{name}_sum", **labels) == 7.5
    assert value(found, f"{name}_bucket", **labels, le=repr(DURATION_BOUNDS[0])) == 0
    assert value(found, f"{name}_bucket", **labels, le=repr(DURATION_BOUNDS[1])) == 2
    assert {dict(labels)["queue"] for found_name, labels in found if found_name.startswith(name)} == {"0"}


def test_every_metric_has_a_help_text_and_our_prefix() -> None:
    registry = CollectorRegistry()
    registry.register(StateCollector(state))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert len(families) > 20
    assert [
        family.name for family in families if not family.documentation or not family.name.startswith("hyperbell_")
    ] == []


@asynccontextmanager
async def serving(host: str, port: int, snapshot: Callable[[], DaemonState]) -> AsyncIterator[tuple[str, int]]:
    async with trio.open_nursery() as nursery:
        address: tuple[str, int] = await nursery.start(serve_metrics, host, port, snapshot)
        yield address
        nursery.cancel_scope.cancel()


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def fetch(url: str) -> str:
    def get() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    return await trio.to_thread.run_sync(get)


async def test_the_page_shows_a_snapshot_taken_in_the_event_loop_and_what_the_process_uses() -> None:
    tasks: list[object] = []

    def snapshot() -> DaemonState:
        tasks.append(trio.lowlevel.current_trio_token())
        return state()

    async with serving("127.0.0.1", 0, snapshot) as (host, port):
        page = await fetch(f"http://{host}:{port}/metrics")
    found = samples(page)
    assert value(found, "hyperbell_requests_total", device="disk", queue="0", op="read") == 6
    assert value(found, "process_cpu_seconds_total") > 0
    assert any(name == "python_info" for name, _ in found)
    assert any(name == "python_gc_collections_total" for name, _ in found)
    assert tasks == [trio.lowlevel.current_trio_token()]


async def test_any_other_page_says_where_the_metrics_are() -> None:
    async with serving("127.0.0.1", 0, state) as (host, port):
        with pytest.raises(urllib.error.HTTPError) as caught:
            await fetch(f"http://{host}:{port}/")
    with caught.value as answer:
        assert answer.code == 404
        assert answer.read() == b"the metrics are at /metrics\n"


async def test_ipv6_loopback_works_like_any_address() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    async with serving("::1", 0, state) as (_, port):
        assert "hyperbell_build_info" in await fetch(f"http://[::1]:{port}/metrics")


async def test_a_taken_address_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"metrics: cannot listen on 127.0.0.1 port {port}.*another address"):
            await serve_metrics("127.0.0.1", port, state)


async def test_the_address_is_free_again_after_the_end() -> None:
    async with serving("127.0.0.1", 0, state) as (host, port):
        pass
    async with serving(host, port, state) as (_, again):
        assert again == port


async def test_a_client_that_says_nothing_does_not_hold_up_a_scrape_or_the_end() -> None:
    async with serving("127.0.0.1", 0, state) as (host, port):
        with socket.create_connection((host, port)):
            assert "hyperbell_build_info" in await fetch(f"http://{host}:{port}/metrics")


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\nHost: here\r\n"], ids=["silent", "slow"])
async def test_connections_that_do_not_finish_their_request_take_neither_threads_nor_descriptors(said: bytes) -> None:
    async with serving("127.0.0.1", 0, state) as (host, port):
        await fetch(f"http://{host}:{port}/metrics")  # the one thread that formats is there
        threads, before = threading.active_count(), open_descriptors()
        slow = [await trio.open_tcp_stream(host, port) for _ in range(5 * CONNECTIONS_MAX)]
        for stream in slow:
            await stream.send_all(said)
        page = await fetch(f"http://{host}:{port}/metrics")
        assert "hyperbell_build_info" in page
        assert threading.active_count() <= threads + 1  # that one is ours, which fetched
        assert open_descriptors() <= before + len(slow) + CONNECTIONS_MAX
        for stream in slow:
            await stream.aclose()


async def test_a_request_as_a_whole_has_one_deadline_however_steadily_its_bytes_come(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with serving("127.0.0.1", 0, state) as (host, port), await trio.open_tcp_stream(host, port) as client:
        sent = 0
        with trio.fail_after(2 * REQUEST_SECONDS), contextlib.suppress(trio.BrokenResourceError):
            while True:  # a byte each second, and never the end of a request
                await client.send_all(b"x")
                await trio.sleep(1)
                sent += 1
        assert sent > 1


async def test_an_answer_that_is_not_read_ends_at_the_deadline(mock_clock: trio.testing.MockClock) -> None:
    many = replace(state(), devices=state().devices * 2000)  # more than socket buffers hold
    async with serving("127.0.0.1", 0, lambda: many) as (host, port):
        client = trio.socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await client.connect((host, port))
        await client.send(b"GET /metrics HTTP/1.0\r\n\r\n")
        received = len(await client.recv(1))
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(REQUEST_SECONDS)
        with contextlib.suppress(OSError):
            while piece := await client.recv(65536):
                received += len(piece)
        client.close()
        assert 0 < received < 1 << 20


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.0\n\n", 200),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 200),
        (b"GET /metrics?name[]=hyperbell_build_info HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /other HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\xff\x00 \r\n\r\n", 400),
        (b"GET /metrics SIP/2.0\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n:\r\nnonsense\r\n: :\r\n\r\n", 200),
        (b"GET /" + b"x" * 3 * REQUEST_MAX + b"\r\n\r\n", 431),
    ],
)
async def test_whatever_is_said_gets_an_answer_in_http(request_: bytes, status: int) -> None:
    async with serving("127.0.0.1", 0, state) as (host, port), await trio.open_tcp_stream(host, port) as client:
        await client.send_all(request_)
        data = b""
        async for piece in client:
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        assert len(body) == (0 if request_.startswith(b"HEAD") else length)


async def test_a_client_may_ask_for_a_compressed_page() -> None:
    async with serving("127.0.0.1", 0, state) as (host, port), await trio.open_tcp_stream(host, port) as client:
        await client.send_all(
            b"GET /metrics HTTP/1.1\r\nAccept-Encoding: gzip\r\n\r\n",
        )
        data = b""
        async for piece in client:
            data += piece
        found = samples(gzip.decompress(data.partition(b"\r\n\r\n")[2]).decode())
        assert "hyperbell_build_info" in {name for name, _ in found}


async def test_a_failing_snapshot_costs_one_scrape_and_not_the_page() -> None:
    broken: list[Callable[[], DaemonState]] = [lambda: state(), lambda: DaemonState((), 1)]  # type: ignore[arg-type]

    async with serving("127.0.0.1", 0, lambda: broken.pop()()) as (host, port):
        with capture_logs() as logs, pytest.raises(urllib.error.HTTPError) as caught:
            await fetch(f"http://{host}:{port}/metrics")
        with caught.value as answer:
            assert answer.code == 500
        assert [entry["event"] for entry in logs] == ["the metrics cannot be collected"]
        assert "hyperbell_build_info" in await fetch(f"http://{host}:{port}/metrics")


def test_lines_of_the_log_that_were_lost_are_counted_by_reason() -> None:
    values = collected(replace(state(), log_lines_lost={"reader too slow": 4, "too many of a kind": 0}))
    for reason, count in (("reader too slow", 4), ("too many of a kind", 0)):
        assert values["hyperbell_log_lines_lost_total", frozenset({("reason", reason)})] == count


def test_what_a_disks_storage_answers_is_counted_by_errno() -> None:
    errors = (StorageErrors("write", "ENOSPC", 3), StorageErrors("flush", "EIO", 1))
    for failed in (None, "EIO"):
        (disk,) = state().devices
        disk = replace(disk, backend=replace(disk.backend, storage=Storage(errors, failed)))
        found = collected(DaemonState((disk,), ()))
        assert value(found, "hyperbell_storage_errors_total", device="disk", op="write", errno="ENOSPC") == 3
        assert value(found, "hyperbell_storage_errors_total", device="disk", op="flush", errno="EIO") == 1
        assert value(found, "hyperbell_storage_flush_failed", device="disk") == (failed is not None)


def test_shortages_of_descriptors_are_counted_by_who_had_to_wait() -> None:
    values = collected(replace(state(), descriptor_shortages={"a front-end": 2}))
    assert values["hyperbell_descriptor_shortages_total", frozenset({("for", "a front-end")})] == 2
