"""The benchmark's front-end: what it promises to the figures, and to the tests that drive the daemon with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from guest.boot.pattern import sector_content
from tests.bench.blk_frontend import BlkFrontend, DeviceFaultError, Job, pattern_bytes
from tests.bench.build import load_frontend
from tests.bench.connection import ConnectionFailedError
from tests.bench.results import bucket_upper_ns
from tests.bench.servers import Disk, Server, hyperbell_command

SIZE = 8 << 20
BLOCKS = SIZE // 4096


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk.img"
    path.write_bytes(pattern_bytes(0, SIZE))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    cpu = min(os.sched_getaffinity(0))
    with Server("hyperbell", hyperbell_command(folder, Disk(image, SIZE), 2, cpu), folder, cpu) as server:
        yield server


def test_pattern_is_the_one_of_the_guest_programs() -> None:
    data = pattern_bytes(4096, 1024, seed=7, generation=3)
    assert data == sector_content(8, 7, 3) + sector_content(9, 7, 3)


def test_histogram_buckets_are_ascending_and_at_most_one_sixty_fourth_wide() -> None:
    _, lib = load_frontend()
    bounds = [bucket_upper_ns(bucket, lib.FE_HISTOGRAM_SHIFT) for bucket in range(lib.FE_HISTOGRAM_BUCKETS)]
    assert bounds[:66] == list(range(66))
    assert all(lower < upper for lower, upper in pairwise(bounds))
    assert all((upper - lower) * 64 <= upper for lower, upper in pairwise(bounds[64:]))


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("sleep", [False, True], ids=["polling", "sleeping"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("indirect", [False, True], ids=["chained", "indirect"])
def test_daemon_returns_the_data_that_was_written(
    server: Server, *, packed: bool, sleep: bool, event_idx: bool, indirect: bool
) -> None:
    with BlkFrontend(
        server.socket, queues=2, segment=1024, packed=packed, event_idx=event_idx, indirect=indirect
    ) as frontend:
        assert frontend.capacity == SIZE
        filled = frontend.fill()
        assert (filled.writes, filled.errors, filled.odd_lengths) == (BLOCKS, 0, 0)
        mixed = frontend.run(Job(requests=3000, depth=32, write_percent=40, verify=True, sleep=sleep))
        assert (mixed.requests_of_queue, mixed.errors, mixed.odd_lengths) == ((3000, 3000), 0, 0)
        assert 0 < mixed.writes < mixed.requests
        assert len(frontend.stop()) == 2


def test_verify_finds_the_one_sector_that_was_changed_behind_its_back(server: Server, image: Path) -> None:
    with BlkFrontend(server.socket) as frontend:
        frontend.fill()
        with image.open("r+b") as file:
            file.seek(512 * 1001)
            file.write(bytes(512))
        with pytest.raises(DeviceFaultError, match=f"byte {512 * 1001} ") as caught:
            frontend.run(Job(requests=BLOCKS, depth=8, order="sequential", verify=True))
    assert caught.value.code == load_frontend()[1].FE_E_BAD_DATA


@pytest.mark.parametrize("sleep", [False, True], ids=["polling", "sleeping"])
def test_run_ends_with_the_queue_and_its_indices_when_nothing_comes_back(server: Server, *, sleep: bool) -> None:
    with BlkFrontend(server.socket) as frontend:
        server.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(DeviceFaultError, match=r"queue 0: nothing came back .*in flight 4, avail index 0x4"):
                frontend.run(Job(requests=100, depth=4, sleep=sleep, stall_seconds=0.3))
        finally:
            server.send_signal(signal.SIGCONT)


def test_back_end_with_too_few_queues_is_refused(server: Server) -> None:
    with pytest.raises(ConnectionFailedError, match="has 2 queues, not 3"), BlkFrontend(server.socket, queues=3):
        pass


def test_job_beyond_the_disk_is_refused(server: Server) -> None:
    with BlkFrontend(server.socket) as frontend, pytest.raises(ValueError, match="do not fit the disk"):
        frontend.run(Job(requests=1, blocks=BLOCKS + 1))
