"""The plain doorbells of a real guest on real KVM: every kick ends in an eventfd inside the kernel.

The guest is shown our platform leaf but no Hyper-V leaves, so its module, loaded at the end, must refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from nested.doorbell_guest import (
    READS,
    Queue,
    by_hypercall,
    disk_of,
    doorbell_guest,
    image_differs,
    load_module,
    module_queues,
    module_totals,
    rings_by_kind,
    use_disk,
    vhost_user_disk,
)
from nested.laboratory import Laboratory

from guest.nested.level import Level, NestedMachine
from guest.nested.tracing import Counts, watch_doorbells

pytestmark = pytest.mark.nested_full

SEEDS = {"mmio": 11, "pio": 12}


@dataclass
class Record:
    """By the name of the disk: what H's KVM saw while it was used, what the daemon counted, where the image differs."""

    seen: dict[str, Counts]
    counted: dict[str, Mapping[str, int]]
    differs: dict[str, str]
    ports: str
    totals: dict[str, str] = field(default_factory=dict)  # the module's
    rung: Queue | None = None
    kicks: dict[int, int] = field(default_factory=dict)  # of the port's disk, with the module
    calls: dict[int, int] = field(default_factory=dict)


async def scenario(host: Level) -> Record:
    """One G1 with a disk on each plain doorbell, used one after the other."""
    devices = [*vhost_user_disk("mmio"), *vhost_user_disk("pio", ",modern-pio-notify=on")]
    record = Record({}, {}, {}, "")
    async with (
        doorbell_guest(host, list(SEEDS), NestedMachine(devices, launcher=by_hypercall())) as (daemon, guest),
        watch_doorbells(host) as trace,
    ):
        for name, seed in SEEDS.items():
            disk = await disk_of(guest, name)
            rings, before = await rings_by_kind(daemon, name), await trace.counts()
            await use_disk(guest, disk, seed)
            record.seen[name] = (await trace.counts()).since(before)
            record.counted[name] = await rings_by_kind(daemon, name, rings)
            record.differs[name] = await image_differs(host, name, seed)
        record.ports = (await guest.run("result ports $(grep -i virtio-pci /proc/ioports)")).results["ports"]
        await load_module(guest)
        record.totals = await module_totals(guest)
        queue, before = (await module_queues(guest))["pio"], await trace.counts()
        await use_disk(guest, await disk_of(guest, "pio"), SEEDS["pio"])
        seen = (await trace.counts()).since(before)
        record.kicks, record.calls = seen.ioeventfds, seen.hypercalls
        record.rung = (await module_queues(guest))["pio"].since(queue)
    return record


@pytest.fixture(scope="module")
def record(laboratory: Laboratory) -> Record:
    return laboratory.play(scenario)


@pytest.mark.parametrize("name", SEEDS)
def test_every_byte_that_the_guest_wrote_is_in_the_image(record: Record, name: str) -> None:
    assert record.differs[name] == ""


@pytest.mark.parametrize("name", SEEDS)
def test_all_kicks_of_a_disk_end_in_an_eventfd_at_one_address(record: Record, name: str) -> None:
    (address,) = record.seen[name].ioeventfds
    assert (address < 0x10000) == (name == "pio")
    # A block at a time; only a daemon that is still awake from the last one can do without a kick.
    assert record.seen[name].ioeventfds[address] >= READS // 4
    assert record.seen[name].hypercalls == {}


def test_pio_doorbell_is_the_port_that_the_guest_found_in_the_devices_bar(record: Record) -> None:
    (address,) = record.seen["pio"].ioeventfds
    begin, _, rest = record.ports.partition("-")
    assert int(begin, 16) <= address <= int(rest.split()[0], 16)


@pytest.mark.parametrize("name", SEEDS)
def test_daemon_counts_exactly_the_kicks_that_kvm_saw(record: Record, name: str) -> None:
    assert record.counted[name] == {"kick": sum(record.seen[name].ioeventfds.values())}


@pytest.mark.parametrize("name", SEEDS)
def test_answers_come_back_as_interrupts_that_kvm_injects(record: Record, name: str) -> None:
    assert sum(record.seen[name].interrupts.values()) >= READS


def test_module_refuses_without_hyperv_leaves_and_the_plain_doorbell_goes_on(record: Record) -> None:
    assert record.totals["available"] == "0"
    assert "no Hyper-V leaves" in record.totals["reason"]
    assert record.rung is not None
    (kicks,) = record.kicks.values()
    assert kicks >= READS // 4
    assert record.calls == {}
    assert (record.rung.hypercall, record.rung.refused) == (0, 0)
