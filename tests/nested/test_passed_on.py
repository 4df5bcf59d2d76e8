"""H's disks, passed on by G1 to G2 through VFIO and a virtual IOMMU: G2 cannot ring them by hypercall, and loses none.

G2 has a module and a platform key of its own level, and rings by hypercall what it believes to be bells. They reach its
hypervisor, G1, which knows none of them; so G2 falls back by itself. One disk's plain doorbell is memory, which H
serves without G1; the other's is a port, whose writes G1 repeats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from nested.doorbell_guest import (
    HYPERV_CPU,
    HYPERV_CPU_OF_G2,
    QEMU_KEY,
    Queue,
    by_hypercall,
    disk_of,
    image_differs,
    load_module,
    module_queues,
    module_totals,
    serve_disks,
    use_disk,
)
from nested.laboratory import Laboratory

from guest.nested.level import Guest, Level, NestedMachine
from guest.nested.tracing import Counts, watch_doorbells
from transports.hypercall import connection_id
from virtio.spec import VIRTIO_F_ACCESS_PLATFORM

pytestmark = pytest.mark.nested

SEEDS = {"own": 31, "memory": 32, "port": 33}
"""G1's own disk, offered to it by hypercall; the disks that it passes on, by the plain doorbell they have."""
PASSED = ("memory", "port")
SPAN = (1024 * 1024, 64 * 1024)
READS = 30
KEY_OF_G2 = 0x0C0FFE


def disk(name: str, options: str) -> list[str]:
    """A disk of H's daemon on a root port of its own: a group of its own for VFIO, and ports for its doorbell."""
    number = list(SEEDS).index(name) + 1
    return [
        *("-device", f"pcie-root-port,id=port{number},chassis={number},slot={number},hotplug=off"),
        *("-chardev", f"socket,id={name},path=/run/{name}.sock"),
        *("-device", f"vhost-user-blk-pci,chardev={name},bus=port{number},num-queues=1,disable-legacy=on{options}"),
    ]


# ATS and device-IOTLB: without them QEMU 7.2 does not tell the daemon of all invalidations.
TRANSLATED = ",iommu_platform=on,ats=on"
G1 = NestedMachine(
    [
        *("-device", "intel-iommu,device-iotlb=on"),
        *disk("own", ",modern-pio-notify=on"),
        *disk("memory", TRANSLATED),
        *disk("port", f"{TRANSLATED},modern-pio-notify=on"),
    ],
    cpu=f"{HYPERV_CPU},+svm",
    memory_mib=1024,
    board="q35",
    append=f"intel_iommu=on pci=lastbus={len(SEEDS)}",
    launcher=by_hypercall(),
    with_images=True,
    huge_pages=True,
)


@dataclass
class Record:
    queues: dict[str, Queue] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)
    totals: dict[str, str] = field(default_factory=dict)
    seen: dict[str, Counts] = field(default_factory=dict)  # by H's KVM, while that disk was used
    differs: dict[str, str] = field(default_factory=dict)
    own: Queue | None = None  # of G1's disk, as G1's module counted meanwhile


async def pass_on(guest: Guest, names: tuple[str, ...]) -> list[str]:
    """Give the disks to VFIO; their PCI addresses."""
    # Without interrupt remapping a device could forge interrupts of G1; these are devices of our own.
    await guest.run("modprobe vfio_iommu_type1 allow_unsafe_interrupts=1 && modprobe vfio-pci")
    addresses = []
    for name in names:
        node = await disk_of(guest, name)
        answer = await guest.run(
            f"pci=$(readlink -f /sys/block/{node.removeprefix('/dev/')}/device/..); address=${{pci##*/}};"
            " echo vfio-pci >$pci/driver_override && echo $address >$pci/driver/unbind"
            " && echo $address >/sys/bus/pci/drivers_probe && [ -e /sys/bus/pci/drivers/vfio-pci/$address ]"
            " && result address $address"
        )
        addresses.append(answer.results["address"])
    return addresses


async def scenario(host: Level) -> Record:
    record = Record()
    async with (
        serve_disks(host, list(SEEDS), iommu=True) as daemon,
        host.boot(G1) as g1,
        watch_doorbells(host) as trace,
    ):
        addresses = await pass_on(g1, PASSED)
        devices = [word for address in addresses for word in ("-device", f"vfio-pci,host={address},rombar=0")]
        machine = NestedMachine(
            devices,
            cpu=HYPERV_CPU_OF_G2,
            memory_mib=128,
            bios="bios-256k.bin",
            launcher=by_hypercall(KEY_OF_G2),
            huge_pages=True,
            rare_ticks=True,
        )
        async with g1.boot(machine) as g2:
            await load_module(g1)
            await load_module(g2)
            for name in PASSED:
                node = await disk_of(g2, name)
                answer = await g2.run(f"result features $(cat /sys/block/{node.removeprefix('/dev/')}/device/features)")
                record.features[name] = answer.results["features"]
                before, earlier = await trace.counts(), (await module_queues(g2))[name]
                await use_disk(g2, node, SEEDS[name], SPAN, READS)
                record.seen[name] = (await trace.counts()).since(before)
                record.queues[name] = (await module_queues(g2))[name].since(earlier)
            record.totals = await module_totals(g2)
            node = await disk_of(g1, "own")
            before, earlier = await trace.counts(), (await module_queues(g1))["own"]
            await use_disk(g1, node, SEEDS["own"], SPAN, READS)
            record.seen["own"] = (await trace.counts()).since(before)
            record.own = (await module_queues(g1))["own"].since(earlier)
            await g2.power_off()
        for name, seed in SEEDS.items():
            record.differs[name] = await image_differs(host, name, seed, SPAN)
        await g1.power_off()
        await daemon.stop()
    return record


@pytest.fixture(scope="module")
def record(laboratory: Laboratory) -> Record:
    return laboratory.play(scenario)


@pytest.mark.parametrize("name", SEEDS)
def test_every_byte_that_was_written_is_in_hs_image(record: Record, name: str) -> None:
    assert record.differs[name] == ""


@pytest.mark.parametrize("name", PASSED)
def test_device_that_is_passed_on_is_used_through_the_virtual_iommu(record: Record, name: str) -> None:
    assert record.features[name][VIRTIO_F_ACCESS_PLATFORM] == "1"


def test_guest_of_the_guest_believes_that_it_may_ring_by_hypercall(record: Record) -> None:
    assert record.totals["available"] == "1", record.totals["reason"]


@pytest.mark.parametrize("name", PASSED)
def test_guest_of_the_guest_rings_the_plain_doorbell_alone(record: Record, name: str) -> None:
    queue = record.queues[name]
    assert queue.hypercall == 0
    assert queue.plain >= READS // 4
    assert sum(record.seen[name].ioeventfds.values()) >= queue.plain


def test_port_of_the_passed_disk_was_tried_as_a_bell_and_refused_by_the_hypervisor_in_between(record: Record) -> None:
    assert int(record.totals["refused"]) > 0
    assert record.queues["port"].bell > 0


@pytest.mark.parametrize("name", PASSED)
def test_h_sees_no_hypercall_doorbell_of_the_guest_of_the_guest(record: Record, name: str) -> None:
    assert record.seen[name].nested_exits
    assert record.seen[name].hypercalls == {}


def test_in_the_same_trace_h_sees_those_of_the_guest_itself(record: Record) -> None:
    assert record.own is not None
    assert record.own.hypercall >= READS // 4
    assert record.seen["own"].hypercalls == {connection_id(record.own.bell, QEMU_KEY): record.own.hypercall}
