"""Stock QEMU with the preload library on real KVM: its sandbox, its vCPUs, the daemon's end and return, its reboot.

One G1 goes through it all, step by step, with a disk whose every request needs its kick (its first steps alone are the
short form); then QEMUs that wait for a migration, and the library's own tests on H's KVM.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from nested.doorbell_guest import (
    HYPERCALL_SOCKET,
    HYPERV_CPU,
    QEMU_KEY,
    READS,
    by_hypercall,
    configuration,
    disk_of,
    image_differs,
    load_module,
    module_queues,
    module_totals,
    serve_disks,
    shown,
    use_disk,
)
from nested.laboratory import Laboratory
from nested.qmp import prepare_qmp, qmp

from guest.boot.machine import reconnecting
from guest.nested.level import Guest, Level, LevelDaemon, NestedMachine
from guest.nested.tracing import Counts, Trace, watch_doorbells
from transports.hypercall import connection_id

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
QMP = "/run/qmp.sock"
SEED = 31
WAIT_SECONDS = 240.0  # ten times what it takes on an idle machine


@dataclass(frozen=True)
class Use:
    """The disk used once: what H's KVM saw, and what the guest's module counted."""

    seen: Counts
    hypercall: int
    plain: int
    refused: int


@dataclass
class Record:
    uses: dict[str, Use] = field(default_factory=dict)
    vms: dict[str, Any] = field(default_factory=dict)  # what `hyperbell show` says, by the step before it
    available: dict[str, str] = field(default_factory=dict)
    bell: dict[str, int] = field(default_factory=dict)
    cpus: str = ""
    differs: str = "not compared"
    counted: int = -1  # hypercalls by KVM's own count, while
    traced: int = -1  # KVM was seen to take so many


async def hypercalls(daemon: LevelDaemon) -> float:
    """KVM's own count for the VM, as the metrics have it."""
    return (await daemon.metrics()).by("vm", "hyperbell_vm_hypercalls_total")["g1"]


async def appears(level: Level, line: str) -> None:
    """Wait until the metrics have a line that matches ``line``."""
    await level.run(
        f"until wget -q -O - http://127.0.0.1:9477/metrics | grep -q '^{line}$'; do usleep 100000; done",
        timeout_seconds=WAIT_SECONDS,
    )


async def registered(level: Level) -> None:
    """Wait until KVM has the id of the disk's queue."""
    await appears(level, 'hyperbell_hypercall_doorbells{device="disk",queue="0"} 1.0')


class Scenario:
    def __init__(self, host: Level, guest: Guest, trace: Trace, record: Record) -> None:
        self.host = host
        self.guest = guest
        self.trace = trace
        self.record = record
        self.refused = 0

    async def use(self, step: str, cpu: int = 0) -> None:
        """Use the disk from CPU ``cpu`` alone."""
        disk = await disk_of(self.guest, "disk")
        await self.guest.run(f"taskset -p {1 << cpu:x} $$ >/dev/null")
        queue, seen = (await module_queues(self.guest))["disk"], await self.trace.counts()
        await use_disk(self.guest, disk, SEED)
        now = (await module_queues(self.guest))["disk"]
        self.record.bell[step] = now.bell
        self.record.uses[step] = Use(
            (await self.trace.counts()).since(seen),
            now.hypercall - queue.hypercall,
            now.plain - queue.plain,
            now.refused - self.refused,  # since the step before: to ask for a serial number rings as well
        )
        self.refused = now.refused

    async def load_module(self, step: str) -> None:
        await load_module(self.guest)
        self.refused = 0
        self.record.available[step] = (await module_totals(self.guest))["available"]

    async def plug_vcpu(self) -> None:
        arguments = {"driver": "host-x86_64-cpu", "id": "later", "socket-id": 0, "core-id": 2, "thread-id": 0}
        await qmp(self.host, QMP, {"execute": "device_add", "arguments": arguments})
        cpu = "/sys/devices/system/cpu/cpu2"
        await self.guest.run(f"while [ ! -e {cpu} ]; do usleep 50000; done")
        await self.guest.run(f"[ $(cat {cpu}/online) = 1 ] || echo 1 >{cpu}/online")
        self.record.cpus = (await self.guest.run("result cpus $(cat /sys/devices/system/cpu/online)")).results["cpus"]

    async def see(self, step: str) -> None:
        self.record.vms[step] = await shown(self.host)

    async def rearm(self) -> None:
        """Let the module try what it has given up, now and not in its own time."""
        await self.guest.run("echo 1 >/sys/kernel/hyperbell/rearm")

    async def finish(self, daemon: LevelDaemon) -> None:
        self.record.differs = await image_differs(self.host, "disk", SEED)
        await self.guest.power_off()
        await daemon.stop()

    async def reboot(self) -> None:
        """The machine is reset, and the same QEMU boots the guest again."""
        await qmp(
            self.host, QMP, {"execute": "set-action", "arguments": {"reboot": "reset"}}, {"execute": "system_reset"}
        )
        await self.guest.expect_userspace(WAIT_SECONDS)
        await self.guest.expect_ready()


async def begin(host: Level, stack: AsyncExitStack) -> tuple[Scenario, LevelDaemon]:
    """The daemon and a G1 of two vCPUs in the sandbox, which has used its disk from either."""
    devices = [
        *("-smp", "cpus=2,maxcpus=3", "-sandbox", SANDBOX, "-qmp", f"unix:{QMP},server=on,wait=off"),
        *("-chardev", f"socket,id=disk,path=/run/disk.sock{reconnecting()}"),
        *("-device", "vhost-user-blk-pci,chardev=disk,num-queues=1,modern-pio-notify=on"),
    ]
    machine = NestedMachine(devices, cpu=HYPERV_CPU, launcher=by_hypercall())
    daemon = await stack.enter_async_context(serve_disks(host, ["disk"]))
    guest = await stack.enter_async_context(host.boot(machine))
    trace = await stack.enter_async_context(watch_doorbells(host))
    steps = Scenario(host, guest, trace, Record())
    await steps.load_module("booted")
    counted, seen = await hypercalls(daemon), await trace.counts()
    await steps.use("booted")
    await steps.use("on the other vCPU", 1)
    steps.record.counted = int(await hypercalls(daemon) - counted)
    steps.record.traced = sum((await trace.counts()).since(seen).hypercalls.values())
    return steps, daemon


async def short_scenario(host: Level) -> Record:
    async with AsyncExitStack() as stack:
        steps, daemon = await begin(host, stack)
        await steps.finish(daemon)
    return steps.record


async def scenario(host: Level) -> Record:
    await prepare_qmp(host)
    async with AsyncExitStack() as stack:
        steps, daemon = await begin(host, stack)
        await steps.plug_vcpu()
        await steps.use("on the vCPU plugged in", 2)
        await steps.see("on the vCPU plugged in")
        await daemon.job.stop(signal="KILL")
        deaf = configuration(["disk"]).replace(f'hypercall_socket = "{HYPERCALL_SOCKET}"', "")
        async with host.serve(deaf, "deaf") as daemon:
            await steps.use("with nobody to ask")
            await daemon.stop()
        async with host.serve(configuration(["disk"]), "again") as daemon:
            await registered(host)
            await steps.rearm()
            await steps.use("with the daemon back")
            await steps.reboot()
            await steps.load_module("after a reboot")
            await registered(host)
            await steps.use("after a reboot")
            await steps.see("after a reboot")
            await steps.finish(daemon)
    return steps.record


@pytest.fixture(scope="module")
def begun(laboratory: Laboratory) -> Record:
    return laboratory.play(short_scenario)


@pytest.fixture(scope="module")
def record(laboratory: Laboratory) -> Record:
    return laboratory.play(scenario)


FIRST = ("booted", "on the other vCPU")
BY_HYPERCALL = (*FIRST, "on the vCPU plugged in", "with the daemon back", "after a reboot")


def check_that_all_rang_by_hypercall(record: Record, step: str) -> None:
    use = record.uses[step]
    (kicks,) = use.seen.hypercalls.values()
    assert list(use.seen.hypercalls) == [connection_id(record.bell[step], QEMU_KEY)]
    assert kicks >= READS // 4
    assert use.seen.ioeventfds == {}
    assert (use.hypercall, use.plain, use.refused) == (kicks, 0, 0)


@pytest.mark.nested
@pytest.mark.parametrize("step", FIRST)
def test_in_a_sandbox_with_every_denial_the_guest_rings_by_hypercall_alone(begun: Record, step: str) -> None:
    assert begun.available == {"booted": "1"}
    check_that_all_rang_by_hypercall(begun, step)


@pytest.mark.nested
def test_kvms_own_count_of_hypercalls_in_the_metrics_is_what_kvm_was_seen_to_take(begun: Record) -> None:
    assert begun.counted == begun.traced
    assert begun.counted >= sum(begun.uses[step].hypercall for step in FIRST) > 0


@pytest.mark.nested
def test_every_byte_of_the_disk_is_as_the_guest_wrote_it(begun: Record) -> None:
    assert begun.differs == ""


@pytest.mark.nested_full
@pytest.mark.parametrize("step", BY_HYPERCALL)
def test_guest_rings_by_hypercall_alone(record: Record, step: str) -> None:
    check_that_all_rang_by_hypercall(record, step)


@pytest.mark.nested_full
def test_driver_finds_the_platform_key_at_each_boot_of_one_qemu(record: Record) -> None:
    assert record.available == {"booted": "1", "after a reboot": "1"}


@pytest.mark.nested_full
def test_a_vcpu_that_is_plugged_in_is_one_of_the_vm(record: Record) -> None:
    assert record.cpus == "0-2"
    vm = record.vms["on the vCPU plugged in"]
    assert (vm["name"], vm["vcpus"], vm["key_shown"], vm["key_stable"], vm["reason"]) == ("g1", 3, True, True, "")


@pytest.mark.nested_full
def test_kvms_own_count_of_hypercalls_is_shown(record: Record) -> None:
    rung = sum(record.uses[step].hypercall for step in (*FIRST, "on the vCPU plugged in"))
    assert record.vms["on the vCPU plugged in"]["hypercalls"] >= rung > 0


@pytest.mark.nested_full
def test_without_a_daemon_to_ask_the_plain_doorbell_serves(record: Record) -> None:
    use = record.uses["with nobody to ask"]
    assert (use.hypercall, use.refused) == (0, 1)  # one ring finds out
    assert use.plain >= READS // 4
    assert sum(use.seen.ioeventfds.values()) == use.plain


@pytest.mark.nested_full
def test_the_bell_is_the_queues_port_also_after_a_reboot(record: Record) -> None:
    assert len({record.bell[step] for step in BY_HYPERCALL}) == 1
    bells = record.vms["after a reboot"]["bells"]  # a transitional device has a port for each of its two interfaces
    assert record.bell["after a reboot"] in [bell["bell"] for bell in bells]
    assert {(bell["device"], bell["queue"], bell["registered"]) for bell in bells} == {("disk", 0, True)}


@pytest.mark.nested_full
def test_every_byte_that_the_guest_wrote_is_in_the_image(record: Record) -> None:
    assert record.differs == ""


@pytest.mark.nested_full
@pytest.mark.parametrize(("key", "allowed"), [("", False), ("--key 5a17c3", True)], ids=["without a key", "with a key"])
async def test_a_vm_that_waits_for_a_migration_has_the_leaf_only_with_a_stable_key(
    host: Level, key: str, allowed: bool
) -> None:
    qemu = f"qemu-system-x86_64 -nodefaults -display none -accel kvm -cpu {HYPERV_CPU} -S -incoming defer"
    command = f"hyperbell qemu --socket {HYPERCALL_SOCKET} --name waiting {key} -- {qemu}"
    async with serve_disks(host, ["disk"]) as daemon, host.job("waiting", command):
        await appears(host, 'hyperbell_vm_hypercalls_total{vm="waiting"} .*')
        vm = await shown(host)
        while allowed and not vm["key_shown"]:  # its vCPU is being made
            vm = await shown(host)
        assert (vm["key_shown"], vm["key_stable"]) == (allowed, allowed)
        assert ("needs the key it had there" in vm["reason"]) == (not allowed)
        await daemon.stop()


@pytest.mark.nested_full
async def test_the_librarys_own_tests_pass_on_the_kvm_of_the_host(host: Level) -> None:
    """Where KVM_HYPERV_EVENTFD, its errors and its ids are the kernel's own."""
    answer = await host.run(
        "cd /project && pytest -q -rs --confcutdir=tests/stock_qemu tests/stock_qemu/test_real_kvm.py 2>&1 | tail -40",
        timeout_seconds=WAIT_SECONDS,
    )
    assert answer.lines[-1].startswith("5 passed"), "\n".join(answer.lines)
