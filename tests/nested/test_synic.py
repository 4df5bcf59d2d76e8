"""A G1 whose Hyper-V leaves show SynIC: a known id rings in the kernel, an unknown one goes to QEMU, which refuses it.

Without SynIC (the other files), KVM itself refuses an id that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from nested.doorbell_guest import (
    HYPERV_CPU,
    QEMU_KEY,
    READS,
    Queue,
    by_hypercall,
    disk_of,
    doorbell_guest,
    image_differs,
    load_module,
    module_queues,
    module_totals,
    use_disk,
    vhost_user_disk,
)
from nested.laboratory import Laboratory

from guest.nested.level import Level, NestedMachine
from guest.nested.tracing import Counts, watch_doorbells
from transports.hypercall import connection_id

pytestmark = pytest.mark.nested_full

SEEDS = {"bell": 41, "held": 42}
CPU = f"{HYPERV_CPU},hv-vpindex,hv-synic"


@dataclass
class Record:
    totals: dict[str, str] = field(default_factory=dict)
    seen: dict[str, Counts] = field(default_factory=dict)
    rung: dict[str, Queue] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)


async def scenario(host: Level) -> Record:
    record = Record()
    devices = [word for name in SEEDS for word in vhost_user_disk(name, ",modern-pio-notify=on")]
    machine = NestedMachine(devices, cpu=CPU, launcher=by_hypercall())
    async with (
        doorbell_guest(host, list(SEEDS), machine, held="withhold") as (_, guest),
        watch_doorbells(host) as trace,
    ):
        await load_module(guest)
        record.totals = await module_totals(guest)
        for name, seed in SEEDS.items():
            disk = await disk_of(guest, name)
            await guest.run("echo 1 >/sys/kernel/hyperbell/rearm")
            queue, seen = (await module_queues(guest))[name], await trace.counts()
            await use_disk(guest, disk, seed)
            record.seen[name] = (await trace.counts()).since(seen)
            record.rung[name] = (await module_queues(guest))[name].since(queue)
            record.differs[name] = await image_differs(host, name, seed)
    return record


@pytest.fixture(scope="module")
def record(laboratory: Laboratory) -> Record:
    return laboratory.play(scenario)


def test_module_finds_both_keys(record: Record) -> None:
    assert record.totals["available"] == "1", record.totals["reason"]


@pytest.mark.parametrize("name", SEEDS)
def test_every_byte_that_the_guest_wrote_is_in_the_image(record: Record, name: str) -> None:
    assert record.differs[name] == ""


def test_a_known_id_rings_in_the_kernel_alone(record: Record) -> None:
    seen, rung = record.seen["bell"], record.rung["bell"]
    assert rung.hypercall >= READS // 4
    assert (rung.plain, rung.refused) == (0, 0)
    assert seen.hypercalls == {connection_id(rung.bell, QEMU_KEY): rung.hypercall}
    assert seen.ioeventfds == {}


def test_an_id_that_qemu_refuses_leaves_the_plain_doorbell_ringing(record: Record) -> None:
    seen, rung = record.seen["held"], record.rung["held"]
    (kicks,) = seen.ioeventfds.values()
    assert kicks >= READS // 4
    assert (rung.hypercall, rung.plain) == (0, kicks)
    assert rung.refused >= 1
    assert seen.hypercalls == {connection_id(rung.bell, QEMU_KEY): rung.refused}
