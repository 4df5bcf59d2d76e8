"""A G2 in a G1 in H: the hypercall doorbell is each level's own, and a level that knows nothing of it hides it.

One G1, which rings a disk of H's daemon by hypercall, and which boots two G2 after one another: one under stock QEMU
alone (a G1 that knows nothing of the doorbell), one with disks of G1's own daemon, on one of which it is withheld.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from nested.doorbell_guest import (
    HYPERV_CPU,
    HYPERV_CPU_OF_G2,
    QEMU_KEY,
    READS,
    SIZE,
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

from guest.nested.level import Level, LevelDaemon, NestedMachine
from guest.nested.tracing import Counts, Trace, watch_doorbells
from transports.hypercall import connection_id

pytestmark = pytest.mark.nested_full

G2_KEY = 0x3C96A1
PIO = ",modern-pio-notify=on"
G2 = NestedMachine(cpu=HYPERV_CPU_OF_G2, memory_mib=128, huge_pages=True, rare_ticks=True)
VMMCALL = 0x81  # AMD's exit code (APM volume 2, appendix C)
SPAN = (1024 * 1024, 64 * 1024)
SEEDS = {"own": 31, "plain": 32, "bell": 33, "held": 34}
"""G1's own disk, of H's daemon; G2's from QEMU alone; G2's from G1's daemon, offered and withheld."""


@dataclass(frozen=True)
class Use:
    """G2 used a disk of its own and G1 its own: what both KVMs saw, and what was counted at each level."""

    by_host: Counts
    by_g1: Counts
    g1: Queue
    g2: Queue
    daemon: Mapping[str, int] = field(default_factory=dict)  # G1's


@dataclass
class Record:
    uses: dict[str, Use] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    totals: dict[str, dict[str, str]] = field(default_factory=dict)  # the modules'


class Scenario:
    def __init__(self, g1: Level, by_host: Trace, by_g1: Trace, record: Record) -> None:
        self.g1 = g1
        self.by_host = by_host
        self.by_g1 = by_g1
        self.record = record

    async def use(self, g2: Level, name: str, daemon: LevelDaemon | None = None) -> None:
        """G2 rings, then G1 does, as the control that H's trace sees what is to be seen."""
        disk, own = await disk_of(g2, name), await disk_of(self.g1, "own")
        rings = await rings_by_kind(daemon, name) if daemon else {}
        g1_queue, g2_queue = (await module_queues(self.g1))["own"], (await module_queues(g2))[name]
        host, g1 = await self.by_host.counts(), await self.by_g1.counts()
        await use_disk(g2, disk, SEEDS[name], SPAN)
        await use_disk(self.g1, own, SEEDS["own"], SPAN)
        by_host, by_g1 = (await self.by_host.counts()).since(host), (await self.by_g1.counts()).since(g1)
        self.record.uses[name] = Use(
            by_host,
            by_g1,
            (await module_queues(self.g1))["own"].since(g1_queue),
            (await module_queues(g2))[name].since(g2_queue),
            await rings_by_kind(daemon, name, rings) if daemon else {},
        )
        self.record.differs[name] = await image_differs(self.g1, name, SEEDS[name], SPAN)

    async def ignorant(self) -> None:
        await self.g1.run(f"truncate -s {SIZE} /tmp/plain.img")
        devices = ["-drive", "if=none,id=plain,file=/tmp/plain.img,format=raw"]
        devices += ["-device", f"virtio-blk-pci,drive=plain,serial=plain,num-queues=1{PIO}"]
        async with self.g1.boot(replace(G2, devices=devices)) as g2:
            await load_module(g2)
            self.record.totals["ignorant"] = await module_totals(g2)
            await self.use(g2, "plain")
            await g2.power_off()

    async def knowing(self) -> None:
        devices = [word for name in ("bell", "held") for word in vhost_user_disk(name, PIO)]
        machine = replace(G2, devices=devices, launcher=by_hypercall(G2_KEY))
        async with doorbell_guest(self.g1, ["bell", "held"], machine, held="withhold") as (daemon, g2):
            await load_module(g2)
            self.record.totals["knowing"] = await module_totals(g2)
            for name in ("bell", "held"):
                await self.use(g2, name, daemon)


async def scenario(host: Level) -> Record:
    record = Record()
    machine = NestedMachine(
        vhost_user_disk("own", PIO),
        cpu=f"{HYPERV_CPU},+svm",
        memory_mib=1024,
        launcher=by_hypercall(),
        with_images=True,
        huge_pages=True,
    )
    async with (
        doorbell_guest(host, ["own"], machine) as (_, g1),
        watch_doorbells(host) as by_host,
        watch_doorbells(g1) as by_g1,
    ):
        await load_module(g1)
        record.totals["g1"] = await module_totals(g1)
        play = Scenario(g1, by_host, by_g1, record)
        await play.ignorant()
        await play.knowing()
        record.differs["own"] = await image_differs(host, "own", SEEDS["own"], SPAN)
    return record


@pytest.fixture(scope="module")
def record(laboratory: Laboratory) -> Record:
    return laboratory.play(scenario)


def only_g1s_own_rings(use: Use) -> None:
    """H saw the hypercalls of G1's own disk, each one, and no other; G2 ran meanwhile."""
    assert use.g1.hypercall >= READS // 4
    assert use.by_host.hypercalls == {connection_id(use.g1.bell, QEMU_KEY): use.g1.hypercall}
    assert use.by_host.nested_exits


@pytest.mark.parametrize("name", SEEDS)
def test_every_byte_that_a_guest_wrote_is_in_the_image(record: Record, name: str) -> None:
    assert record.differs[name] == ""


def test_g1_has_both_keys(record: Record) -> None:
    assert record.totals["g1"]["available"] == "1", record.totals["g1"]["reason"]


def test_g1_that_knows_nothing_of_us_hides_our_leaf_from_its_guest(record: Record) -> None:
    totals = record.totals["ignorant"]
    assert totals["available"] == "0"
    assert "HyperBellVMM" in totals["reason"]  # not Hyper-V's leaves: those are there


def test_guest_of_a_g1_that_knows_nothing_of_us_uses_its_plain_doorbell(record: Record) -> None:
    use = record.uses["plain"]
    (kicks,) = use.by_g1.ioeventfds.values()
    assert kicks >= READS // 4
    assert use.by_g1.hypercalls == {}
    assert use.g2.hypercall == 0
    only_g1s_own_rings(use)


def test_guest_rings_the_daemon_of_its_own_hypervisor_by_hypercall(record: Record) -> None:
    use = record.uses["bell"]
    assert record.totals["knowing"]["available"] == "1", record.totals["knowing"]["reason"]
    assert use.g2.hypercall >= READS // 4
    assert (use.g2.plain, use.g2.refused) == (0, 0)
    assert use.by_g1.hypercalls == {connection_id(use.g2.bell, G2_KEY): use.g2.hypercall}
    assert use.by_g1.ioeventfds == {}
    assert use.daemon == {"kick": use.g2.hypercall}


def test_host_sees_a_nested_guests_hypercalls_as_exits_and_never_as_rings(record: Record) -> None:
    use = record.uses["bell"]
    only_g1s_own_rings(use)
    assert use.by_host.nested_exits[VMMCALL] >= use.g2.hypercall


def test_g1_that_withholds_leaves_its_guest_the_plain_doorbell(record: Record) -> None:
    use = record.uses["held"]
    (kicks,) = use.by_g1.ioeventfds.values()
    assert kicks >= READS // 4
    assert (use.g2.hypercall, use.g2.plain) == (0, kicks)
    assert use.daemon == {"kick": kicks}
    # A ring now and then finds out that the id is unknown, and is none.
    assert sum(use.by_g1.hypercalls.values()) == use.g2.refused
    only_g1s_own_rings(use)
