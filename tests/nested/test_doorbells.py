"""A real guest on real KVM, its disks served by our daemon, rings by all three kinds of doorbell.

One G1 under stock QEMU with the preload library and the guest's module, and four disks: on each the daemon's policy and
QEMU's options leave another way to ring. What H's KVM saw, what the module and the daemon counted, and the bytes in the
images must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from nested.disk_load import disk_load
from nested.doorbell_guest import (
    CONTROL_SOCKET,
    HYPERV_CPU,
    QEMU_KEY,
    READS,
    SOON,
    Queue,
    by_hypercall,
    disk_of,
    doorbell_guest,
    image_differs,
    load_module,
    module_queues,
    module_totals,
    rings_by_kind,
    rung_again,
    use_disk,
    vhost_user_disk,
)
from nested.laboratory import Laboratory

from guest.nested.level import Guest, Level, LevelDaemon, NestedMachine
from guest.nested.tracing import Counts, Trace, watch_doorbells
from transports.hypercall import connection_id

pytestmark = pytest.mark.nested

SEEDS = {"mmio": 21, "pio": 22, "bell": 23, "held": 24}
"""By memory; by port; by port or hypercall, as offered; the same, but withheld before the start."""
PIO = ",modern-pio-notify=on"
LOAD_SEED = 5


@dataclass(frozen=True)
class Use:
    """One disk used once: what H's KVM saw, what the daemon and the module counted meanwhile."""

    seen: Counts
    counted: Mapping[str, int]
    rung: Queue | None


@dataclass
class Record:
    plain: dict[str, Use] = field(default_factory=dict)  # before the module is loaded
    used: dict[str, Use] = field(default_factory=dict)  # with it
    differs: dict[str, str] = field(default_factory=dict)
    totals: dict[str, str] = field(default_factory=dict)
    ports: str = ""
    bells: dict[str, int] = field(default_factory=dict)
    under_load: list[Use] = field(default_factory=list)  # offered, withdrawn, offered again
    load: dict[str, str] = field(default_factory=dict)
    whole_load: Use | None = None


class Scenario:
    def __init__(self, host: Level, daemon: LevelDaemon, guest: Guest, trace: Trace, record: Record) -> None:
        self.host = host
        self.daemon = daemon
        self.guest = guest
        self.trace = trace
        self.record = record
        self.has_module = False

    async def count(self, name: str) -> tuple[Counts, Mapping[str, int], Queue | None]:
        queue = (await module_queues(self.guest))[name] if self.has_module else None
        return await self.trace.counts(), await rings_by_kind(self.daemon, name), queue

    async def since(self, name: str, earlier: tuple[Counts, Mapping[str, int], Queue | None]) -> Use:
        counts, rings, queue = earlier
        now = (await module_queues(self.guest))[name] if self.has_module else None
        rung = now.since(queue) if now is not None and queue is not None else None
        seen = (await self.trace.counts()).since(counts)
        return Use(seen, await rings_by_kind(self.daemon, name, rings), rung)

    async def use(self, name: str) -> Use:
        disk = await disk_of(self.guest, name)
        before = await self.count(name)
        await use_disk(self.guest, disk, SEEDS[name])
        return await self.since(name, before)

    async def run(self) -> None:
        record = self.record
        record.ports = (await self.guest.run("result ports $(grep -i virtio-pci /proc/ioports)")).results["ports"]
        for name in ("mmio", "pio"):
            record.plain[name] = await self.use(name)
        await load_module(self.guest, SOON)
        self.has_module = True
        for name in SEEDS:
            record.used[name] = await self.use(name)
            record.differs[name] = await image_differs(self.host, name, SEEDS[name])
        record.bells = {name: queue.bell for name, queue in (await module_queues(self.guest)).items()}
        record.totals = await module_totals(self.guest)
        await self.withdraw_under_load()

    async def bell(self) -> list[Queue]:
        return [(await module_queues(self.guest))["bell"]]

    async def withdraw_under_load(self) -> None:
        """The policy changes twice while the disk is busy; the load must not notice."""
        before_all = await self.count("bell")
        async with disk_load(self.guest, await disk_of(self.guest, "bell"), LOAD_SEED) as load:
            for policy in ("", "withhold", "offer"):
                earlier = await self.bell() if policy == "offer" else []
                if policy:
                    await self.host.run(f"hyperbell hypercall bell {policy} --control {CONTROL_SOCKET}")
                if policy == "withhold":
                    # The first ring after it is refused and goes to the plain doorbell.
                    await load.next_round()
                if policy == "offer":
                    await rung_again(self.bell, earlier)
                before = await self.count("bell")
                await load.next_round()
                self.record.under_load.append(await self.since("bell", before))
            self.record.load = await load.end()
        self.record.whole_load = await self.since("bell", before_all)


async def scenario(host: Level) -> Record:
    devices = [
        *vhost_user_disk("mmio"),
        *(word for name in ("pio", "bell", "held") for word in vhost_user_disk(name, PIO)),
    ]
    machine = NestedMachine(devices, cpu=HYPERV_CPU, launcher=by_hypercall())
    record = Record()
    async with (
        doorbell_guest(host, list(SEEDS), machine, pio="withhold", held="withhold") as (daemon, guest),
        watch_doorbells(host) as trace,
    ):
        await Scenario(host, daemon, guest, trace, record).run()
    return record


@pytest.fixture(scope="module")
def record(laboratory: Laboratory) -> Record:
    return laboratory.play(scenario)


def test_module_finds_both_keys(record: Record) -> None:
    assert record.totals["available"] == "1", record.totals["reason"]


@pytest.mark.parametrize("name", SEEDS)
def test_every_byte_that_the_guest_wrote_is_in_the_image(record: Record, name: str) -> None:
    assert record.differs[name] == ""


@pytest.mark.parametrize("name", ["mmio", "pio"])
def test_without_the_module_all_kicks_end_in_an_eventfd_at_one_address(record: Record, name: str) -> None:
    use = record.plain[name]
    (address,) = use.seen.ioeventfds
    assert (address < 0x10000) == (name == "pio")
    # A block at a time; only a daemon that is still awake from the last one can do without a kick.
    assert use.seen.ioeventfds[address] >= READS // 4
    assert use.seen.hypercalls == {}
    assert use.counted == {"kick": use.seen.ioeventfds[address]}
    assert sum(use.seen.interrupts.values()) >= READS


def test_pio_doorbell_is_a_port_that_the_guest_found_in_a_devices_bar(record: Record) -> None:
    (address,) = record.plain["pio"].seen.ioeventfds
    assert f"{address:04x}-" in record.ports


def test_offered_disk_is_rung_by_hypercall_alone_with_its_own_id(record: Record) -> None:
    use = record.used["bell"]
    assert use.seen.ioeventfds == {}
    assert list(use.seen.hypercalls) == [connection_id(record.bells["bell"], QEMU_KEY)]
    assert sum(use.seen.hypercalls.values()) >= READS // 4


def test_kvm_module_and_daemon_count_the_same_hypercalls(record: Record) -> None:
    use = record.used["bell"]
    assert use.rung is not None
    (seen,) = use.seen.hypercalls.values()
    assert (use.rung.hypercall, use.rung.plain, use.rung.refused) == (seen, 0, 0)
    assert use.counted == {"kick": seen}  # the id is a second door to QEMU's own eventfd


@pytest.mark.parametrize("name", ["mmio", "held"])
def test_disk_without_a_bell_or_an_offer_keeps_its_plain_doorbell(record: Record, name: str) -> None:
    use = record.used[name]
    assert use.rung is not None
    (kicks,) = use.seen.ioeventfds.values()
    assert kicks >= READS // 4
    assert use.rung.hypercall == 0
    assert use.rung.plain == kicks
    assert use.counted == {"kick": kicks}
    # An id that is withheld is one that KVM does not know: a ring now and then finds that out, and is not one.
    assert sum(use.seen.hypercalls.values()) == use.rung.refused
    assert use.rung.refused == 0 or name == "held"


def test_withdrawn_id_leaves_the_plain_doorbell_working_and_comes_back_by_itself_when_offered_again(
    record: Record,
) -> None:
    offered, withdrawn, again = record.under_load
    for use in (offered, again):
        assert use.rung is not None
        assert use.rung.hypercall > 0
        assert use.rung.plain == 0
    assert withdrawn.rung is not None
    assert withdrawn.rung.hypercall == 0
    assert withdrawn.rung.plain > 0


def test_no_request_is_lost_or_late_while_the_policy_changes_under_load(record: Record) -> None:
    assert record.load["status"] == "0", record.load["said"]
    assert int(record.load["rounds"]) >= 6
    assert "load.error" not in record.load["said"]


def test_the_daemon_was_woken_as_often_as_the_guest_rang_while_the_policy_changed(record: Record) -> None:
    use = record.whole_load
    assert use is not None
    assert use.rung is not None
    assert use.rung.refused > 0
    (plain,) = use.seen.ioeventfds.values()
    assert plain == use.rung.plain
    assert use.counted == {"kick": use.rung.hypercall + use.rung.plain}
