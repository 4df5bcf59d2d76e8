"""Linux in a machine of our own under mainline KVM: ``hyperbell microvm``, without QEMU, its console as the terminal.

Debian's kernel boots on our virtio-mmio devices, with the guest's module. What H's KVM saw, what the module and the
metrics counted, and the bytes in the images must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from nested.disk_load import DiskLoad, disk_load
from nested.doorbell_guest import (
    READS,
    SIZE,
    SOON,
    Queue,
    image_differs,
    load_module,
    module_totals,
    rung_again,
    use_disk,
)
from nested.laboratory import Laboratory
from nested.microvm import ON_TERMINAL, Microvm

from guest.boot.initramfs import prepare_initramfs
from guest.boot.module import prepare_module
from guest.boot.service import Metrics
from guest.nested.level import Guest, Level
from guest.nested.tracing import Counts, Trace, watch_doorbells
from transports.hypercall import connection_id
from transports.kvm.machine.slots import slot

pytestmark = pytest.mark.nested

KEY = 0x5A5A5A
INITRD = "/tmp/microvm.cpio"
CONTROL = "/run/microvm.sock"
METRICS = "127.0.0.1:9478"
MODULES = ("virtio_mmio", "virtio_console", "virtio_blk", "virtio-rng", "virtio_net", "msr")
GUEST_OS_ID = "dd if=/dev/cpu/0/msr bs=8 count=1 skip=$((0x40000000 / 8)) 2>/dev/null | hexdump -e '8/1 \"%02x\"'"
NO_ID = "00" * 8
# What `hyperbell hypercall disk POLICY` and `hyperbell link net STATE` say; the commands themselves take many seconds
# to start beside a load.
CHANGE = """
import json, socket, sys
command, device, key, value = sys.argv[2:]
sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1]); lines = sock.makefile("rw")
lines.write(json.dumps({"command": command, "device": device, key: value}) + "\\n"); lines.flush()
answer = json.loads(lines.readline())
assert answer["ok"], answer
"""
DISKS = {"disk": 1, "held": 2}
"""By their slots; the terminal is in slot 0. Linux names them in this order, and the virtio devices too."""
QUEUE_NOTIFY = 0x050
NODES = {"disk": "/dev/vda", "held": "/dev/vdb"}
SEEDS = {"disk": 41, "held": 42}
LOAD_SEED = 6


@dataclass(frozen=True)
class Use:
    """A disk used once: what H's KVM saw, what the metrics counted, and the module's table by device and queue."""

    seen: Counts
    counted: Mapping[str, int]
    rung: Mapping[tuple[str, int], Queue]

    def queues(self, name: str) -> list[Queue]:
        return [queue for (device, _), queue in self.rung.items() if device == f"virtio{DISKS[name]}"]


@dataclass
class Record:
    found: dict[str, str] = field(default_factory=dict)
    carrier: dict[str, str] = field(default_factory=dict)  # by what was said of the network's cable
    plain: Use | None = None  # of "held", before the module is loaded
    used: dict[str, Use] = field(default_factory=dict)  # with it
    differs: dict[str, str] = field(default_factory=dict)
    totals: dict[str, str] = field(default_factory=dict)
    under_load: list[Use] = field(default_factory=list)  # offered, withdrawn, offered again
    unloaded: Counts | None = None  # under the same load, without the module
    reloaded: Counts | None = None  # and with it again
    ids: list[str] = field(default_factory=list)  # GUEST_OS_ID before the module, with it, without, and with it again
    load: dict[str, str] = field(default_factory=dict)


class Scenario:
    def __init__(self, host: Level, guest: Guest, trace: Trace) -> None:
        self.host = host
        self.guest = guest
        self.trace = trace
        self.record = Record()
        self.has_module = False

    async def count(self, name: str) -> Use:
        """All until now."""
        rung = await self.table() if self.has_module else {}
        page = await self.host.run(f"wget -q -O - http://{METRICS}/metrics | grep ^hyperbell_doorbells")
        counted = Metrics("\n".join([*page.lines, ""])).by("kind", "hyperbell_doorbells_total", device=name)
        return Use(await self.trace.counts(), {kind: int(count) for kind, count in counted.items()}, rung)

    async def since(self, name: str, earlier: Use) -> Use:
        now = await self.count(name)
        counted = {kind: count - earlier.counted.get(kind, 0) for kind, count in now.counted.items()}
        return Use(
            now.seen.since(earlier.seen),
            {kind: count for kind, count in counted.items() if count},
            {key: queue.since(earlier.rung[key]) for key, queue in now.rung.items()},
        )

    async def table(self) -> dict[tuple[str, int], Queue]:
        """The module's table."""
        found = {}
        for line in (await self.guest.run("tail -n +2 /sys/kernel/debug/hyperbell/queues")).lines:
            words = line.split()
            if words[0].startswith("virtio"):
                bell = int(words[2], 16) if words[2] != "-" else -1
                found[words[0], int(words[1])] = Queue(bell, words[3], *(int(word) for word in words[4:7]))
        return found

    async def use(self, name: str) -> Use:
        before = await self.count(name)
        # From either CPU, each of which has a queue of its own.
        for cpu in (1, 2):
            await self.guest.run(f"taskset -p {cpu} $$ >/dev/null")
            await use_disk(self.guest, NODES[name], SEEDS[name], reads=READS // 2)
        await self.guest.run("taskset -p 3 $$ >/dev/null")
        return await self.since(name, before)

    async def identity(self) -> None:
        self.record.ids.append((await self.guest.run(f"result id $({GUEST_OS_ID})")).results["id"])

    async def load_module(self) -> None:
        await load_module(self.guest, SOON)
        self.has_module = True
        await self.identity()

    async def run(self) -> None:
        record = self.record
        record.found = (
            await self.guest.run(
                "result cpus $(cat /sys/devices/system/cpu/online); result network $(ls /sys/class/net);"
                "result entropy $(cat /sys/class/misc/hw_random/rng_current);"
                "result devices $(ls /sys/bus/virtio/devices); result queues $(ls /sys/block/vda/mq);"
                "result drawn $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)"
            )
        ).results
        await self.plug()
        record.plain = await self.use("held")
        await self.identity()
        await self.load_module()
        record.totals = await module_totals(self.guest)
        for name in DISKS:
            record.used[name] = await self.use(name)
            record.differs[name] = await image_differs(self.host, name, SEEDS[name])
        await self.withdraw_under_load()

    async def change(self, what: str, value: str) -> None:
        await self.host.run(f"python3 -S /tmp/change.py {CONTROL} {what} {value}", timeout_seconds=120)

    async def plug(self) -> None:
        """The network's cable is pulled and plugged in again: what the guest's driver says of it, after some time."""
        await self.guest.run("ip link set eth0 up")
        for state, carrier in (("down", "0"), ("up", "1")):
            await self.change("link net state", state)
            answer = await self.guest.run(
                f"seen() {{ cat /sys/class/net/eth0/carrier; }};"
                f"for i in $(seq 100); do [ $(seen) = {carrier} ] && break; usleep 50000; done; result carrier $(seen)"
            )
            self.record.carrier[state] = answer.results["carrier"]

    async def withdraw_under_load(self) -> None:
        """The policy changes twice while the disk is busy; the load must not notice."""
        async with disk_load(self.guest, NODES["disk"], LOAD_SEED) as load:
            for policy in ("", "withhold", "offer"):
                earlier = await self.disk() if policy == "offer" else []
                if policy:
                    await self.change("hypercall disk policy", policy)
                if policy == "withhold":
                    # The first ring of each queue after it is refused and goes to the plain doorbell.
                    await load.next_round()
                if policy == "offer":
                    await rung_again(self.disk, earlier)
                before = await self.count("disk")
                await load.next_round()
                self.record.under_load.append(await self.since("disk", before))
            await self.reload(load)
            self.record.load = await load.end()

    async def disk(self) -> list[Queue]:
        return [queue for (device, _), queue in (await self.table()).items() if device == f"virtio{DISKS['disk']}"]

    async def reload(self, load: DiskLoad) -> None:
        """The module goes while the disk's queues are armed and busy, and comes back."""
        await self.guest.run("rmmod hyperbell", timeout_seconds=120)
        self.has_module = False
        await self.identity()
        unloaded = await self.trace.counts()
        await load.next_round()
        self.record.unloaded = (await self.trace.counts()).since(unloaded)
        await self.load_module()
        loaded = await self.trace.counts()
        await load.next_round()
        self.record.reloaded = (await self.trace.counts()).since(loaded)


async def scenario(host: Level, initrd: bytes) -> Record:
    await host.write(INITRD, initrd)
    await host.write("/tmp/change.py", CHANGE)
    await host.run("; ".join(f"rm -f /tmp/{name}.img; truncate -s {SIZE} /tmp/{name}.img" for name in DISKS))
    devices = [
        *("--key", f"{KEY:06x}", "--metrics", METRICS, "--control", CONTROL),
        *("--device", "blk,path=/tmp/disk.img,queues=2,name=disk"),
        *("--device", "blk,path=/tmp/held.img,queues=1,name=held,hypercall=withhold"),
        *("--device", "rng", "--device", "net"),
    ]
    async with host.boot(Microvm(devices, initrd=INITRD, cpus=2)) as guest:
        async with watch_doorbells(host) as trace:
            steps = Scenario(host, guest, trace)
            await steps.run()
        await guest.power_off()  # raises unless the command ends with status 0
    return steps.record


@pytest.fixture(scope="module")
def record(laboratory: Laboratory) -> Record:
    kernel = laboratory.images.kernel
    extra = {"/on-terminal": ON_TERMINAL, "/hyperbell.ko": prepare_module(kernel, print).read_bytes()}
    initrd = prepare_initramfs(kernel, print, MODULES, extra).read_bytes()
    return laboratory.play(lambda host: scenario(host, initrd))


def bell_ids(use: Use, name: str) -> dict[int, int]:
    """How often the module rang each queue's id."""
    return {connection_id(queue.bell, KEY): queue.hypercall for queue in use.queues(name)}


def kicks_seen(seen: Counts, name: str) -> int:
    """How often KVM asked an eventfd at the disk's QueueNotify: once for each kick if it has one queue.

    With two queues there are two eventfds at the address, and KVM may ask both which of them is meant.
    """
    return seen.ioeventfds.get(slot(DISKS[name]).gpa + QUEUE_NOTIFY, 0)


def test_debians_kernel_finds_all_devices_two_cpus_and_two_queues(record: Record) -> None:
    assert record.found["cpus"] == "0-1"
    assert record.found["devices"].split() == [f"virtio{number}" for number in range(5)]
    assert record.found["queues"].split() == ["0", "1"]
    assert "eth0" in record.found["network"].split()
    assert record.found["entropy"].startswith("virtio_rng")
    assert record.found["drawn"] == "64"


def test_module_finds_the_key_of_the_platform(record: Record) -> None:
    assert record.totals["available"] == "1", record.totals["reason"]


def test_a_guest_sees_its_networks_cable_pulled_and_plugged_in_again(record: Record) -> None:
    assert record.carrier == {"down": "0", "up": "1"}


@pytest.mark.parametrize("name", DISKS)
def test_every_byte_that_the_guest_wrote_is_in_the_image(record: Record, name: str) -> None:
    assert record.differs[name] == ""


def test_without_the_module_queue_notify_is_the_only_doorbell(record: Record) -> None:
    assert record.plain is not None
    kicks = kicks_seen(record.plain.seen, "held")
    assert kicks >= READS // 4
    assert record.plain.seen.hypercalls == {}
    assert record.plain.counted == {"kick": kicks}


def test_each_queue_is_rung_by_hypercall_alone_with_its_own_id(record: Record) -> None:
    use = record.used["disk"]
    ids = bell_ids(use, "disk")
    assert set(ids) == {connection_id(slot(DISKS["disk"]).bell(queue), KEY) for queue in range(2)}
    assert min(ids.values()) > 0
    assert sum(ids.values()) >= READS // 4
    assert kicks_seen(use.seen, "disk") == 0


def test_kvm_module_and_metrics_count_the_same_hypercalls(record: Record) -> None:
    use = record.used["disk"]
    ids = bell_ids(use, "disk")
    assert {number: use.seen.hypercalls.get(number, 0) for number in ids} == ids
    assert [(queue.plain, queue.refused) for queue in use.queues("disk")] == [(0, 0)] * 2
    assert use.counted == {"hypercall": sum(ids.values())}


def test_the_terminal_itself_is_rung_by_hypercall(record: Record) -> None:
    """Its commands and answers go through all the while."""
    use = record.used["disk"]
    terminal = {connection_id(slot(0).bell(queue), KEY) for queue in range(2)}
    assert sum(count for number, count in use.seen.hypercalls.items() if number in terminal) > 0
    assert use.seen.ioeventfds == {}


def test_withheld_disk_keeps_its_plain_doorbell(record: Record) -> None:
    use = record.used["held"]
    kicks = kicks_seen(use.seen, "held")
    assert kicks >= READS // 4
    assert sum(queue.plain for queue in use.queues("held")) == kicks
    assert [(queue.bell, queue.hypercall, queue.refused) for queue in use.queues("held")] == [(-1, 0, 0)]
    assert use.counted == {"kick": kicks}


def test_withdrawn_ids_leave_the_plain_doorbell_working_and_come_back_by_themselves_when_offered_again(
    record: Record,
) -> None:
    offered, withdrawn, again = record.under_load
    for use in (offered, again):
        assert set(use.counted) == {"hypercall"}
        assert sum(queue.hypercall for queue in use.queues("disk")) > 0
        assert kicks_seen(use.seen, "disk") == 0
    assert set(withdrawn.counted) == {"kick"}
    # Looked at again and again, but a device that shows no bell is not rung.
    assert {(queue.state, queue.bell) for queue in withdrawn.queues("disk")} == {("waiting", -1)}
    assert sum(queue.hypercall + queue.refused for queue in withdrawn.queues("disk")) == 0
    assert kicks_seen(withdrawn.seen, "disk") > 0


def test_module_unloaded_with_armed_queues_leaves_a_busy_disk_its_plain_doorbell(record: Record) -> None:
    assert record.unloaded is not None
    assert kicks_seen(record.unloaded, "disk") > 0
    assert record.unloaded.hypercalls == {}


def test_module_loaded_again_beside_a_busy_disk_rings_by_hypercall(record: Record) -> None:
    assert record.reloaded is not None
    ids = {connection_id(slot(DISKS["disk"]).bell(queue), KEY) for queue in range(2)}
    assert sum(record.reloaded.hypercalls.get(number, 0) for number in ids) > 0
    assert kicks_seen(record.reloaded, "disk") == 0


def test_guest_says_who_it_is_only_while_the_module_is_loaded(record: Record) -> None:
    before, loaded, unloaded, again = record.ids
    assert before == unloaded == NO_ID
    assert loaded == again != NO_ID


def test_no_request_is_lost_or_late_while_the_policy_changes_and_the_module_goes_and_comes_under_load(
    record: Record,
) -> None:
    assert record.load["status"] == "0", record.load["said"]
    assert int(record.load["rounds"]) >= 6
    assert "load.error" not in record.load["said"]
