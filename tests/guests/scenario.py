"""What a guest does with its devices, recorded: the tests look at the record, so that one boot serves many of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from guests.testbed import DISK_SIZE, FROZEN_SEED, FROZEN_WRITTEN, MIB, Site, Testbed, Variant

from guest.boot.console import Answer
from guest.boot.machine import Guest
from guest.boot.pattern import BLOCK_SIZE, SECTOR_SIZE, check_pattern, check_zeroes, sum_generations
from guest.boot.service import Daemon, Metrics

SEED = 4242
WRITTEN = (0, 4 * MIB)
DISCARDED = (2 * MIB, 1 * MIB)
ZEROED = (1 * MIB, 512 * 1024)
BESIDE = ((0, 1 * MIB), (1 * MIB + 512 * 1024, 512 * 1024), (3 * MIB, 1 * MIB))
WRITE_THROUGH = (16 * MIB, 256 * 1024)
STRESSED = (32 * MIB, 4 * MIB)
STRESSED_BLOCKS = STRESSED[1] // BLOCK_SIZE
STRESS_SEED = 7
GROWN = DISK_SIZE + 8 * MIB


@dataclass
class Record:
    """What happened. ``answers`` are the guest's, by step; ``differs`` says where the image is wrong ("": nowhere)."""

    variant: Variant
    answers: dict[str, Answer] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    flushes: dict[str, int] = field(default_factory=dict)
    freed: int = 0
    image_generations: int = -1
    frozen_unchanged: bool = False
    metrics: Metrics = field(default_factory=lambda: Metrics(""))

    def facts(self) -> dict[str, str]:
        """The guest's results of all steps."""
        return {key: value for answer in self.answers.values() for key, value in answer.results.items()}


async def use_devices(testbed: Testbed, folder: Path, variant: Variant) -> Record:
    """Boot a guest and let it use everything. A step that goes wrong in the guest is in the record, not raised."""
    site = Site(folder, variant)
    record = Record(variant)
    frozen = site.frozen.read_bytes()
    async with site.serve() as daemon, testbed.boot(folder, variant) as guest:
        scenario = _Scenario(site, daemon, guest, record)
        await scenario.look()
        await scenario.write_and_flush()
        await scenario.discard_and_zero()
        await scenario.switch_cache()
        await scenario.read_entropy()
        await scenario.stress()
        await scenario.grow()
        record.metrics = await daemon.metrics()
        await guest.power_off()
    record.frozen_unchanged = site.frozen.read_bytes() == frozen
    return record


class _Scenario:
    def __init__(self, site: Site, daemon: Daemon, guest: Guest, record: Record) -> None:
        self.site = site
        self.daemon = daemon
        self.guest = guest
        self.record = record

    async def step(self, name: str, command: str, timeout_seconds: float = 60) -> None:
        answer = await self.guest.run(command, status=None, timeout_seconds=timeout_seconds)
        self.record.answers[name] = answer

    async def flush_count(self) -> int:
        return int((await self.daemon.metrics()).total("hyperbell_requests_total", device="disk", op="flush"))

    async def look(self) -> None:
        await self.step("info", "diskcheck disk info /dev/vda && diskcheck frozen info /dev/vdb")
        await self.step(
            "sysfs",
            "result serial $(cat /sys/block/vda/serial); result cache $(cat /sys/block/vda/queue/write_cache);"
            "result queues $(ls /sys/block/vda/mq | wc -l);"
            "result discard_max $(cat /sys/block/vda/queue/discard_max_bytes);"
            "for d in vda vdb; do result features.$d $(cat /sys/block/$d/device/features); done;"
            "for d in /sys/bus/virtio/drivers/virtio_rng/virtio*; do result features.rng $(cat $d/features); done",
        )
        await self.step("frozen", f"diskcheck frozen verify /dev/vdb 0 {FROZEN_WRITTEN} {FROZEN_SEED}")

    async def write_and_flush(self) -> None:
        before = await self.flush_count()
        span = "{} {}".format(*WRITTEN)
        await self.step("write", f"diskcheck write write /dev/vda {span} {SEED}")
        await self.step("flush", "diskcheck flush flush /dev/vda")
        self.record.flushes["write back"] = await self.flush_count() - before
        await self.step("verify", f"diskcheck verify verify /dev/vda {span} {SEED}")
        self.record.differs["write"] = check_pattern(self.site.disk, *WRITTEN, SEED)

    async def discard_and_zero(self) -> None:
        before = self.site.disk.stat().st_blocks
        await self.step("discard", "diskcheck discard discard /dev/vda {} {}".format(*DISCARDED))
        self.record.freed = (before - self.site.disk.stat().st_blocks) * 512
        await self.step("zeroout", "diskcheck zeroout zeroout /dev/vda {} {}".format(*ZEROED))
        await self.step("zeroes", "diskcheck zeroes zeroes /dev/vda {} {}".format(*ZEROED))
        self.record.differs["zeroout"] = check_zeroes(self.site.disk, *ZEROED)
        beside = [check_pattern(self.site.disk, offset, length, SEED) for offset, length in BESIDE]
        self.record.differs["beside"] = "".join(beside)

    async def switch_cache(self) -> None:
        """Write-through by the driver's own wish (VIRTIO_BLK_F_CONFIG_WCE), and back."""
        await self.step("through", "echo 'write through' >/sys/block/vda/cache_type")
        await self.step("through.seen", "result through $(cat /sys/block/vda/queue/write_cache)")
        before = await self.flush_count()
        span = "{} {}".format(*WRITE_THROUGH)
        await self.step(
            "through.write", f"diskcheck through write /dev/vda {span} {SEED} && diskcheck through flush /dev/vda"
        )
        self.record.flushes["write through"] = await self.flush_count() - before
        self.record.differs["through"] = check_pattern(self.site.disk, *WRITE_THROUGH, SEED)
        await self.step("back", "echo 'write back' >/sys/block/vda/cache_type && diskcheck back flush /dev/vda")
        self.record.flushes["write back again"] = await self.flush_count() - before

    async def read_entropy(self) -> None:
        await self.step("entropy", "diskcheck one random /dev/hwrng 2048 && diskcheck two random /dev/hwrng 2048")

    async def stress(self) -> None:
        span = "{} {}".format(*STRESSED)
        command = f"diskcheck stress stress /dev/vda {span} {STRESS_SEED} 2 16 {self.record.variant.stress_requests}"
        await self.step("stress", command, timeout_seconds=120)
        self.record.image_generations = sum_generations(self.site.disk, *STRESSED, STRESS_SEED)

    async def grow(self) -> None:
        """The image grows while it is served; the guest is told and waits for its disk to follow."""
        os.truncate(self.site.disk, GROWN)
        self.daemon.reload()
        sectors = GROWN // SECTOR_SIZE
        await self.step(
            "grown",
            f"for i in $(seq 500); do [ $(cat /sys/block/vda/size) = {sectors} ] && break; usleep 20000; done;"
            "result grown.sectors $(cat /sys/block/vda/size);"
            f"diskcheck grown write /dev/vda {GROWN - MIB} {MIB} {SEED} && diskcheck grown flush /dev/vda",
        )
        self.record.differs["grown"] = check_pattern(self.site.disk, GROWN - MIB, MIB, SEED)
