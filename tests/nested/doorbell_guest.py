"""A G1 with one disk of our daemon's for each kind of doorbell, and what it and H count when it uses them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import trio

from guest.boot.pattern import SECTOR_SIZE, sector_content
from guest.nested.level import GUEST_CPU, Guest, Level, LevelDaemon, NestedMachine

MIB = 1024 * 1024
SIZE = 16 * MIB
SPAN = (1 * MIB, 512 * 1024)
READS = 100
REARM_SECONDS = 120  # a guest that never rings again shall not be waited for
SHOW_SECONDS = 240  # ten times what it takes on an idle machine
HYPERCALL_SOCKET = "/run/hypercall.sock"
CONTROL_SOCKET = "/run/control.sock"
QEMU_KEY = 0x5A17C3
# The Hyper-V leaves, without which KVM takes no SIGNAL_EVENT from the guest.
HYPERV_CPU = f"{GUEST_CPU},hv-relaxed"
# A guest of a guest that is shown SVM as well was not seen to come up.
HYPERV_CPU_OF_G2 = f"{HYPERV_CPU},-svm"


def configuration(disks: Sequence[str], *, iommu: bool = False, **policies: str) -> str:
    """One worker that sleeps at once, so that every request needs its kick, and ``disks`` on it."""
    text = f"""
[daemon]
metrics = "127.0.0.1:9477"
control = "{CONTROL_SOCKET}"
hypercall_socket = "{HYPERCALL_SOCKET}"

[workers.w]
poll_us = 0
"""
    for name in disks:
        text += f"""
[devices.{name}]
type = "blk"
path = "/tmp/{name}.img"
socket = "/run/{name}.sock"
serial = "{name}"
workers = ["w"]
hypercall = "{policies.get(name, "offer")}"
iommu = {str(iommu).lower()}
"""
    return text


def vhost_user_disk(name: str, options: str = "") -> list[str]:
    """QEMU's arguments for the daemon's disk ``name``. ``options`` begin with a comma."""
    return [
        *("-chardev", f"socket,id={name},path=/run/{name}.sock"),
        *("-device", f"vhost-user-blk-pci,chardev={name},num-queues=1,disable-legacy=on{options}"),
    ]


@asynccontextmanager
async def serve_disks(
    level: Level, disks: Sequence[str], *, iommu: bool = False, **policies: str
) -> AsyncIterator[LevelDaemon]:
    """The daemon in ``level`` with fresh ``disks``; ``iommu``: they may be used behind one."""
    await level.run("; ".join(f"rm -f /tmp/{name}.img; truncate -s {SIZE} /tmp/{name}.img" for name in disks))
    async with level.serve(configuration(disks, iommu=iommu, **policies)) as daemon:
        yield daemon


def by_hypercall(key: int = QEMU_KEY) -> str:
    """The words before QEMU that let its guest ring by hypercall."""
    return f"hyperbell qemu --socket {HYPERCALL_SOCKET} --name g1 --key {key:06x} --"


@asynccontextmanager
async def doorbell_guest(
    level: Level, disks: Sequence[str], machine: NestedMachine, **policies: str
) -> AsyncIterator[tuple[LevelDaemon, Guest]]:
    """The daemon with ``disks``, and ``machine`` booted; it is powered off when the block ends well."""
    async with AsyncExitStack() as stack:
        daemon = await stack.enter_async_context(serve_disks(level, disks, iommu=False, **policies))
        guest = await stack.enter_async_context(level.boot(machine))
        yield daemon, guest
        await guest.power_off()
        await daemon.stop()


async def shown(level: Level) -> dict[str, Any]:
    """The one VM that the daemon in ``level`` knows."""
    answer = await level.run(f"hyperbell show --json --control {CONTROL_SOCKET}", timeout_seconds=SHOW_SECONDS)
    (vm,) = json.loads("\n".join(answer.lines))["vms"]
    assert isinstance(vm, dict)
    return vm


async def rings_by_kind(daemon: LevelDaemon, name: str, earlier: Mapping[str, int] | None = None) -> dict[str, int]:
    """How often each kind of doorbell of disk ``name`` rang, as the daemon counts (since ``earlier``)."""
    now = (await daemon.metrics("hyperbell_doorbells")).by("kind", "hyperbell_doorbells_total", device=name)
    since = {kind: int(count) - (earlier or {}).get(kind, 0) for kind, count in now.items()}
    return {kind: count for kind, count in since.items() if count}


SOON = "rearm_ms=200 rearm_max_ms=800"


async def load_module(guest: Level, parameters: str = "") -> None:
    """The guest's kernel module, which rings by hypercall where it may. ``SOON`` makes it try again after moments."""
    await guest.run(
        f"insmod /hyperbell.ko {parameters} &&"
        " { [ -d /sys/kernel/debug/hyperbell ] || mount -t debugfs debugfs /sys/kernel/debug; }"
    )


@dataclass(frozen=True)
class Queue:
    """A row of the module's table."""

    bell: int
    state: str
    hypercall: int
    plain: int
    refused: int

    def since(self, earlier: Queue) -> Queue:
        """The same queue, with what was counted after ``earlier``."""
        return replace(
            self,
            hypercall=self.hypercall - earlier.hypercall,
            plain=self.plain - earlier.plain,
            refused=self.refused - earlier.refused,
        )


async def rung_again(look: Callable[[], Awaitable[Sequence[Queue]]], earlier: Sequence[Queue]) -> None:
    """Until the module, by itself, has armed all of a device's queues and rung more than ``earlier``."""
    with trio.fail_after(REARM_SECONDS):
        while True:
            queues = await look()
            rung = sum(queue.hypercall for queue in queues) - sum(queue.hypercall for queue in earlier)
            if rung > 0 and {queue.state for queue in queues} == {"armed"}:
                return


# To read a disk's serial number is a request of its own and rings its doorbell, so each disk is asked once.
SERIALS = "for b in /sys/block/vd*; do s=/tmp/serial.$(basename $b); [ -e $s ] || cat $b/serial >$s; done"


async def module_queues(guest: Level) -> dict[str, Queue]:
    """The module's table, by the serial number of the disk."""
    answer = await guest.run(
        f"{SERIALS};"
        " for s in /tmp/serial.*; do"
        " result serial.$(basename $(readlink -f /sys/block/${s##*.}/device)) $(cat $s); done;"
        " cat /sys/kernel/debug/hyperbell/queues"
    )
    serials = {key.removeprefix("serial."): value for key, value in answer.results.items()}
    found = {}
    for line in answer.lines:
        words = line.split()
        if words and words[0] in serials:
            bell = int(words[2], 16) if words[2] != "-" else -1
            found[serials[words[0]]] = Queue(bell, words[3], *(int(word) for word in words[4:7]))
    return found


async def module_totals(guest: Level) -> dict[str, str]:
    """What the module says of itself: available, reason, hypercall, plain, refused."""
    names = "available reason hypercall plain refused"
    answer = await guest.run(f"for f in {names}; do result $f $(cat /sys/kernel/hyperbell/$f); done")
    return answer.results


async def disk_of(guest: Level, serial: str) -> str:
    """The device node of the disk with this serial number."""
    answer = await guest.run(
        f'{SERIALS}; for s in /tmp/serial.*; do [ "$(cat $s)" = {serial} ] && result disk /dev/${{s##*.}}; done; true'
    )
    return answer.results["disk"]


async def use_disk(guest: Level, disk: str, seed: int, span: tuple[int, int] = SPAN, reads: int = READS) -> None:
    """Write a pattern, flush, verify every byte of it, and read ``reads`` blocks one by one (each needs a kick)."""
    place = "{} {}".format(*span)
    await guest.run(
        f"diskcheck w write {disk} {place} {seed} && diskcheck f flush {disk}"
        f" && diskcheck v verify {disk} {place} {seed}"
        f" && dd if={disk} of=/dev/null bs=4k count={reads} iflag=direct 2>/dev/null",
        timeout_seconds=120,
    )


async def image_differs(level: Level, name: str, seed: int, span: tuple[int, int] = SPAN, size: int = SIZE) -> str:
    """``""`` if the whole image in ``level`` is the pattern of ``seed`` at ``span`` and zeroes elsewhere."""
    begin, length = span
    expected = hashlib.sha256(bytes(begin))
    for sector in range(begin // SECTOR_SIZE, (begin + length) // SECTOR_SIZE):
        expected.update(sector_content(sector, seed))
    expected.update(bytes(size - begin - length))
    found = (await level.run(f"sha256sum /tmp/{name}.img")).lines[-1].split()[0]
    return "" if found == expected.hexdigest() else f"{name}.img is not what the guest wrote ({found})"
