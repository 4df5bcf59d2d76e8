"""``python -m guest.demo``: a real Linux guest uses a disk and an entropy source that hyperbell serves.

Exits with 0 only if everything held, on both sides of the wire; with 1 and the reason otherwise, and with 2
if the machine lacks something.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import trio

from guest.boot.console import ConsoleLine, MachineError
from guest.boot.initramfs import prepare_initramfs
from guest.boot.machine import Guest, Hypervisor, Machine
from guest.boot.pattern import check_pattern, check_zeroes, sum_generations
from guest.boot.service import Daemon, Metrics, ServiceError, free_port, qemu_arguments, serve
from guest.debian.cache import PrepareError
from guest.debian.kernel import Kernel, prepare_kernel
from guest.demo.report import Report

EXAMPLE = Path(__file__).resolve().parents[2] / "config" / "examples" / "demo.toml"
MIB = 1024 * 1024
IMAGE_SIZE = 64 * MIB
MEMORY_MIB = 256
SEED = 20_113
# What the guest does with its disk, in bytes from its start.
WRITTEN = (0, 16 * MIB)
DISCARDED = (8 * MIB, 4 * MIB)
ZEROED = (4 * MIB, 1 * MIB)
UNTOUCHED = ((0, 4 * MIB), (5 * MIB, 3 * MIB), (12 * MIB, 4 * MIB))
STRESSED = (32 * MIB, 4 * MIB)
STRESS = "2 16 1000"  # threads, requests in flight for each, requests of each
ENTROPY_BYTES = 4096


class DemoFailedError(Exception):
    """A promise did not hold; the text says which."""


def promise(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DemoFailedError(otherwise)


class Demo:
    """One run, in ``folder``: the steps in their order, each with what it promises."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder = folder
        self.report = report
        self.config = folder / "demo.toml"
        self.image = folder / "disk.img"
        self.metrics_port = 0
        self.serial = ""

    def prepare(self) -> None:
        """The configuration and the image it names."""
        text = EXAMPLE.read_text()
        tables = tomllib.loads(text)
        port = int(tables["daemon"]["metrics"].rpartition(":")[2])
        self.metrics_port = port if port_is_free(port) else free_port()
        self.serial = tables["devices"]["disk"]["serial"]
        self.config.write_text(text.replace(f":{port}", f":{self.metrics_port}"))
        with self.image.open("wb") as image:
            image.truncate(IMAGE_SIZE)

    async def run(self, hypervisor: Hypervisor, kernel: Kernel, initramfs: Path, stay: bool) -> None:
        """Serve, boot, use, look; raises the first thing that is wrong."""
        begin = time.monotonic()
        async with serve(self.config, self.folder, self.metrics_port) as daemon:
            self.report.done("hyperbell serves disk and entropy", time.monotonic() - begin)
            devices = await qemu_arguments(self.config, MEMORY_MIB)
            machine = Machine(kernel.image, initramfs, devices, memory_mib=MEMORY_MIB, cpus=2)
            try:
                facts, metrics = await self.guest_part(hypervisor, machine, daemon)
            except MachineError as error:
                if daemon.process.returncode is None:
                    raise
                raise daemon.error(
                    f"the daemon ended with status {daemon.process.returncode} under the guest"
                ) from error
            self.report.summary(facts, metrics, daemon.metrics_address, stay)
            if stay:
                await trio.sleep_forever()
            await daemon.stop()
            left = [path.name for path in self.folder.glob("*.sock") if path.name != "notify.sock"]
            promise(not left, f"the daemon left its sockets behind: {', '.join(left)}")
            self.report.done("guest and daemon ended cleanly")

    async def guest_part(
        self, hypervisor: Hypervisor, machine: Machine, daemon: Daemon
    ) -> tuple[dict[str, str], Metrics]:
        """All that needs the guest; answers its results and the last metrics before it left."""
        begin = time.monotonic()
        async with hypervisor.boot(machine) as guest:
            self.report.done("a Linux guest is up", time.monotonic() - begin)
            facts = await self.use_disk(guest, daemon)
            await self.stress_disk(guest)
            facts |= await self.use_entropy(guest)
            metrics = await daemon.metrics()
            self.check_metrics(metrics)
            await guest.power_off()
        return facts, metrics

    async def use_disk(self, guest: Guest, daemon: Daemon) -> dict[str, str]:
        """Write, flush, read, discard and zero in the guest; look at the image file after each."""
        facts = await self.disk_facts(guest)
        span = "{} {}".format(*WRITTEN)
        await guest.run(f"diskcheck write write /dev/vda {span} {SEED}")
        flushes = (await daemon.metrics()).total("hyperbell_requests_total", device="disk", op="flush")
        await guest.run("diskcheck flush flush /dev/vda")
        flushed = (await daemon.metrics()).total("hyperbell_requests_total", device="disk", op="flush")
        promise(flushed > flushes, f"the guest called fsync, but no flush arrived ({flushed:.0f} before and after)")
        await guest.run("echo 3 >/proc/sys/vm/drop_caches")
        await guest.run(f"diskcheck verify verify /dev/vda {span} {SEED}")
        differs = check_pattern(self.image, *WRITTEN, SEED)
        promise(not differs, differs)
        self.report.done(f"{size(WRITTEN[1])} written, flushed, read back and compared; the image holds these bytes")

        before = self.image.stat().st_blocks * 512
        await guest.run("diskcheck discard discard /dev/vda {} {}".format(*DISCARDED))
        freed = before - self.image.stat().st_blocks * 512
        # A file system may keep a block at each end.
        promise(
            freed >= DISCARDED[1] * 9 // 10,
            f"the guest discarded {size(DISCARDED[1])}, but the image shrank by {freed} bytes only "
            f"(does the file system of {self.folder} know holes? set TMPDIR to another)",
        )
        self.report.done(f"{size(DISCARDED[1])} discarded; the image freed {size(freed)}")

        await guest.run("diskcheck zeroout zeroout /dev/vda {} {}".format(*ZEROED))
        await guest.run("diskcheck zeroes zeroes /dev/vda {} {}".format(*ZEROED))
        wrong = check_zeroes(self.image, *ZEROED)
        for offset, length in UNTOUCHED:
            await guest.run(f"diskcheck untouched verify /dev/vda {offset} {length} {SEED}")
            wrong = wrong or check_pattern(self.image, offset, length, SEED)
        promise(not wrong, wrong)
        self.report.done(f"{size(ZEROED[1])} zeroed (BLKZEROOUT); what lies beside it is untouched")
        return facts

    async def stress_disk(self, guest: Guest) -> None:
        """Random reads and writes at depth on both queues; every block is checked, by the guest and here."""
        answer = await guest.run("diskcheck stress stress /dev/vda {} {} {} {}".format(*STRESSED, SEED, STRESS))
        facts = answer.results
        try:
            found = sum_generations(self.image, *STRESSED, SEED)
        except ValueError as error:
            raise DemoFailedError(str(error)) from error
        promise(
            found == int(facts["stress.generations"]),
            f"the image holds {found} writes of the {facts['stress.generations']} the guest did at random",
        )
        self.report.done(
            f"{facts['stress.reads']} reads and {facts['stress.writes']} writes at random, 16 at a time on each of "
            "2 queues; each block checked"
        )

    async def disk_facts(self, guest: Guest) -> dict[str, str]:
        """What the guest sees of its disk, which must be what the configuration says."""
        answer = await guest.run(
            "diskcheck info info /dev/vda && result serial $(cat /sys/block/vda/serial);"
            "result cache $(cat /sys/block/vda/queue/write_cache); result queues $(ls /sys/block/vda/mq | wc -l);"
            "result disk_features $(cat /sys/block/vda/device/features); result kernel $(uname -r)"
        )
        facts = answer.results
        promise(facts["info.size"] == str(IMAGE_SIZE), f"the guest sees a disk of {facts['info.size']} bytes")
        promise(facts["serial"] == self.serial, f"the guest reads the serial '{facts['serial']}', not '{self.serial}'")
        promise(facts["cache"] == "write back", f"the guest sees a '{facts['cache']}' cache, so it would not flush")
        return facts

    async def use_entropy(self, guest: Guest) -> dict[str, str]:
        """Two reads of the entropy device: all there, not constant, and not the same."""
        answer = await guest.run(
            f"diskcheck one random /dev/hwrng {ENTROPY_BYTES} && diskcheck two random /dev/hwrng {ENTROPY_BYTES} &&"
            " result rng $(cat /sys/class/misc/hw_random/rng_current) &&"
            " for d in /sys/bus/virtio/drivers/virtio_rng/virtio*; do result entropy_features $(cat $d/features); done"
        )
        facts = answer.results
        for read in ("one", "two"):
            # 4096 fair bytes miss about 0.00003 of the 256 values.
            promise(
                int(facts[f"{read}.distinct"]) > 240, f"{facts[f'{read}.distinct']} values in {ENTROPY_BYTES} bytes"
            )
        promise(facts["one.first"] != facts["two.first"], "the entropy device gave the same bytes twice")
        promise(facts["rng"].startswith("virtio"), f"the guest's entropy comes from '{facts['rng']}'")
        self.report.done(f"{size(2 * ENTROPY_BYTES)} of entropy read")
        return facts

    def check_metrics(self, metrics: Metrics) -> None:
        """The daemon counted what the guest did, and no error."""
        requests = metrics.by("op", "hyperbell_requests_total", device="disk")
        for op in ("read", "write", "flush", "discard", "write_zeroes", "get_id"):
            promise(requests.get(op, 0) > 0, f"the metrics know no '{op}' request (only {', '.join(sorted(requests))})")
        given = metrics.total("hyperbell_request_bytes_total", device="entropy")
        promise(given >= 2 * ENTROPY_BYTES, f"the metrics say the entropy device gave {given:.0f} bytes")
        for name in ("hyperbell_request_errors_total", "hyperbell_protocol_errors_total", "hyperbell_queue_broken"):
            promise(metrics.total(name) == 0, f"{name} is {metrics.total(name):.0f}")
        for device in ("disk", "entropy"):
            connected = metrics.total("hyperbell_frontend_connected", device=device)
            promise(connected == 1, f"hyperbell_frontend_connected of {device} is {connected:.0f}")


def size(count: int) -> str:
    """A number of bytes for people."""
    for unit, factor in (("MiB", MIB), ("KiB", 1024)):
        if count >= factor:
            return f"{count / factor:g} {unit}" if count % factor == 0 else f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server would bind it
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


async def watched(demo: Demo, hypervisor: Hypervisor, kernel: Kernel, initramfs: Path, stay: bool) -> bool:
    """Run the demo; True if SIGTERM or SIGINT ended it before its time (guest and daemon are ended then too)."""
    stopped = False
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def watch_signals() -> None:
            nonlocal stopped
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    stopped = True
                    nursery.cancel_scope.cancel()

        nursery.start_soon(watch_signals)
        try:
            await demo.run(hypervisor, kernel, initramfs, stay)
        except (MachineError, ServiceError, DemoFailedError) as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return stopped


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m guest.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stay", action="store_true", help="let the daemon run on after the demo, until Ctrl-C")
    parser.add_argument("--console", action="store_true", help="show the guest's console")
    options = parser.parse_args(arguments)
    report = Report(sys.stdout)
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="hyperbell-demo-"))

    def listen(line: ConsoleLine) -> None:
        if options.console:
            report.console(line)

    try:
        kernel = prepare_kernel(report.say)
        initramfs = prepare_initramfs(kernel, report.say)
        hypervisor = Hypervisor(report.say, listen)
        demo = Demo(folder, report)
        demo.prepare()
        report.done(f"{kernel.package}, initramfs and a {size(IMAGE_SIZE)} image", time.monotonic() - begin)
        stopped = trio.run(watched, demo, hypervisor, kernel, initramfs, options.stay)
    except PrepareError as error:
        report.failed(str(error))
        return 2
    except (MachineError, ServiceError, DemoFailedError) as error:
        report.failed(str(error), folder / "daemon.log")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if stopped and not options.stay:
        report.failed("stopped before the end")
        return 1
    if not options.stay:
        report.say(f"all of it in {time.monotonic() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
