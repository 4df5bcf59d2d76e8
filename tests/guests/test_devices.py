"""A real Linux guest uses disk and entropy source: with split rings, packed rings, and behind a virtual IOMMU."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from guests import scenario
from guests.scenario import Record, use_devices
from guests.testbed import DISK_SIZE, FROZEN_SIZE, PACKED, SERIAL, SPLIT, VIOMMU, Testbed, Variant

from virtio.spec import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
)

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module", params=[SPLIT, PACKED, VIOMMU], ids=lambda variant: variant.name)
def record(request: pytest.FixtureRequest, testbed: Testbed, module_folder: Path) -> Record:
    variant: Variant = request.param
    folder = module_folder / variant.name
    folder.mkdir()
    return trio.run(use_devices, testbed, folder, variant)


def held(record: Record, *steps: str) -> bool:
    """All these steps ended with status 0 in the guest; says which did not, and why."""
    for step in steps:
        assert record.answers[step].status == 0, record.answers[step].lines
    return True


def has_feature(record: Record, device: str, bit: int) -> bool:
    return record.facts()[f"features.{device}"][bit] == "1"


def test_guest_sees_the_disk_of_the_configuration(record: Record) -> None:
    assert held(record, "info", "sysfs")
    facts = record.facts()
    assert facts["disk.size"] == str(DISK_SIZE)
    assert facts["frozen.size"] == str(FROZEN_SIZE)
    assert facts["serial"] == SERIAL
    assert facts["queues"] == "2"
    assert int(facts["discard_max"]) > 0


def test_every_device_negotiates_the_rings_that_were_asked_for(record: Record) -> None:
    for device in ("vda", "vdb", "rng"):
        assert has_feature(record, device, VIRTIO_F_VERSION_1)
        assert has_feature(record, device, VIRTIO_F_EVENT_IDX)
        assert has_feature(record, device, VIRTIO_F_RING_PACKED) == record.variant.packed
        assert has_feature(record, device, VIRTIO_F_ACCESS_PLATFORM) == record.variant.translated
        assert not has_feature(record, device, VIRTIO_F_RING_RESET)


def test_guest_reads_back_what_it_wrote(record: Record) -> None:
    assert held(record, "write", "flush", "verify")


def test_image_holds_what_the_guest_wrote(record: Record) -> None:
    assert held(record, "write")
    assert record.differs["write"] == ""


def test_cache_is_writeback_and_flushes_arrive(record: Record) -> None:
    assert held(record, "flush")
    assert record.facts()["cache"] == "write back"
    assert record.flushes["write back"] >= 1


def test_guest_sees_its_disk_grow_and_uses_the_new_space(record: Record) -> None:
    assert held(record, "grown")
    assert record.facts()["grown.sectors"] == str(scenario.GROWN // 512)
    assert record.differs["grown"] == ""


def test_discard_frees_blocks_of_the_image(record: Record) -> None:
    assert held(record, "discard")
    assert record.freed >= scenario.DISCARDED[1] * 9 // 10


def test_zeroed_range_is_zero_and_its_neighbours_are_untouched(record: Record) -> None:
    assert held(record, "zeroout", "zeroes")
    assert record.differs["zeroout"] == ""
    assert record.differs["beside"] == ""


def test_read_only_disk_is_read_and_never_written(record: Record) -> None:
    assert held(record, "frozen")
    assert record.facts()["frozen.read_only"] == "1"
    assert record.facts()["disk.read_only"] == "0"
    assert record.frozen_unchanged
    assert record.metrics.total("hyperbell_requests_total", device="frozen", op="write") == 0


def test_driver_switches_to_write_through_and_back(record: Record) -> None:
    assert held(record, "through", "through.write", "back")
    assert record.facts()["through"] == "write through"
    assert record.differs["through"] == ""
    assert record.flushes["write through"] == 0
    assert record.flushes["write back again"] >= 1


def test_entropy_reaches_the_guest(record: Record) -> None:
    assert held(record, "entropy")
    facts = record.facts()
    assert int(facts["one.distinct"]) > 240  # of 256 values, 2048 fair bytes miss 0.08
    assert facts["one.first"] != facts["two.first"]
    assert record.metrics.total("hyperbell_request_bytes_total", device="entropy") >= 2 * 2048


def test_no_block_is_lost_or_torn_under_stress_on_two_queues(record: Record) -> None:
    assert held(record, "stress")
    facts = record.facts()
    assert int(facts["stress.reads"]) + int(facts["stress.writes"]) >= 2 * record.variant.stress_requests
    assert record.image_generations == int(facts["stress.generations"])
    assert record.image_generations > scenario.STRESSED_BLOCKS


def test_both_queues_carry_the_stress(record: Record) -> None:
    requests = record.metrics.by("queue", "hyperbell_requests_total", device="disk")
    assert set(requests) == {"0", "1"}
    assert min(requests.values()) >= record.variant.stress_requests


def test_daemon_counts_no_error_of_an_honest_guest(record: Record) -> None:
    for name in ("hyperbell_request_errors_total", "hyperbell_protocol_errors_total", "hyperbell_inflight_requests"):
        assert record.metrics.total(name) == 0, name
    for device in ("disk", "frozen", "entropy"):
        assert record.metrics.total("hyperbell_frontend_connected", device=device) == 1
