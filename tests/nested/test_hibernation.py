"""A guest that is hibernated and resumed under another key rings with that one, and never with the old.

G1 has one disk of H's daemon, which it rings by hypercall, and one to be hibernated on. It is resumed in another QEMU,
as on another host: the platform's key is another one there, and its kernel, module and all, is the one that slept.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from nested.doorbell_guest import (
    HYPERV_CPU,
    QEMU_KEY,
    READS,
    SOON,
    Queue,
    by_hypercall,
    disk_of,
    image_differs,
    load_module,
    module_queues,
    module_totals,
    rung_again,
    serve_disks,
    use_disk,
    vhost_user_disk,
)
from nested.laboratory import Laboratory

from guest.nested.level import Guest, Level, NestedMachine
from guest.nested.tracing import Counts, watch_doorbells
from transports.hypercall import connection_id

pytestmark = pytest.mark.nested_full

OTHER_KEY = 0x3C96A1
SEED = 51
SWAP = "/tmp/swap.img"
SLEEP_SECONDS = 90
# In the background, for whoever asks for it is not answered by the machine that he asked.
HIBERNATE = (
    "mkswap {0} >/dev/null && swapon {0} && echo 0 >/sys/power/image_size && echo shutdown >/sys/power/disk;"
    " {{ sleep 1; echo disk >/sys/power/state; echo GUEST resumed $?; }} &"
)
RESUME = "{{ sleep 1; cat /sys/class/block/{0}/dev >/sys/power/resume; echo GUEST stays awake; }} &"


@dataclass(frozen=True)
class Record:
    before: Counts  # what H's KVM saw of the disk's use under the first key
    resumed: Counts  # and from the start of the second QEMU on
    used: Queue  # the disk's use under the other key
    bells: tuple[int, int]  # under either key
    totals: Mapping[str, str]
    said: list[str]  # the module, in the kernel's log
    differs: str


@asynccontextmanager
async def machine(host: Level, key: int) -> AsyncIterator[Guest]:
    devices = [*vhost_user_disk("bell", ",modern-pio-notify=on"), "-drive", f"if=none,id=swap,file={SWAP},format=raw"]
    devices += ["-device", "virtio-blk-pci,drive=swap,serial=swap,num-queues=1,disable-legacy=on"]
    async with host.boot(NestedMachine(devices, cpu=HYPERV_CPU, launcher=by_hypercall(key))) as guest:
        yield guest


async def scenario(host: Level) -> Record:
    await host.run(f"rm -f {SWAP}; truncate -s 192M {SWAP}")
    async with serve_disks(host, ["bell"]), watch_doorbells(host) as trace:
        async with machine(host, QEMU_KEY) as guest:
            disk, swap = await disk_of(guest, "bell"), await disk_of(guest, "swap")
            await load_module(guest, SOON)
            seen = await trace.counts()
            await use_disk(guest, disk, SEED)
            before = (await trace.counts()).since(seen)
            bell = (await module_queues(guest))["bell"].bell
            await guest.run(HIBERNATE.format(swap))
            assert await guest.expect("GUEST ended ", SLEEP_SECONDS) == "GUEST ended 0"
        seen = await trace.counts()
        async with machine(host, OTHER_KEY) as guest:
            await guest.run(RESUME.format(swap.removeprefix("/dev/")))
            assert await guest.expect("GUEST resumed ", SLEEP_SECONDS) == "GUEST resumed 0"

            async def look() -> list[Queue]:
                await guest.run(f"dd if={disk} of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null")
                return [(await module_queues(guest))["bell"]]

            await rung_again(look, [])
            queue = (await module_queues(guest))["bell"]
            await use_disk(guest, disk, SEED + 1)
            now = (await module_queues(guest))["bell"]
            record = Record(
                before,
                (await trace.counts()).since(seen),
                now.since(queue),
                (bell, now.bell),
                await module_totals(guest),
                (await guest.run("dmesg | grep -o 'hyperbell: hypercall doorbell.*'")).lines,
                await image_differs(host, "bell", SEED + 1),
            )
            await guest.power_off()
    await host.run(f"rm {SWAP}")
    return record


@pytest.fixture(scope="module")
def record(laboratory: Laboratory) -> Record:
    return laboratory.play(scenario)


def test_resumed_guest_rings_with_the_key_of_the_host_it_is_on(record: Record) -> None:
    assert set(record.before.hypercalls) == {connection_id(record.bells[0], QEMU_KEY)}
    assert (record.used.plain, record.used.refused) == (0, 0)
    assert record.used.hypercall >= READS // 4
    assert record.resumed.hypercalls[connection_id(record.bells[1], OTHER_KEY)] >= record.used.hypercall


def test_no_ring_with_the_old_key_leaves_the_resumed_guest(record: Record) -> None:
    assert set(record.resumed.hypercalls) == {connection_id(record.bells[1], OTHER_KEY)}


def test_module_says_once_that_the_key_is_another_one(record: Record) -> None:
    assert record.totals["available"] == "1", record.totals["reason"]
    said = "hyperbell: hypercall doorbell available"
    assert record.said == [said, f"{said}, with another key"]


def test_every_byte_that_the_resumed_guest_wrote_is_in_the_image(record: Record) -> None:
    assert record.differs == ""
