"""The benchmark: hyperbell in turns with qemu-storage-daemon and with testpmd. ``README.md`` explains it."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.bench.blk_frontend import DeviceFaultError
from tests.bench.connection import ConnectionFailedError
from tests.bench.matrix import (
    BACK_ENDS,
    OURS,
    PACKED,
    QEMU_IO_URING,
    QEMU_THREADS,
    BackEnd,
    check_bars,
    full_matrix,
    quick_matrix,
)
from tests.bench.measure import DISTURBED, Contender, Load, Timing, run_in_turns, watch_idle
from tests.bench.packets import check_packet_bars, measure_packets
from tests.bench.report import Report, render, render_json
from tests.bench.servers import Disk, Server, ServerError, hyperbell_command, qemu_command
from tests.bench.storage import StorageError, check_folder, drop_cache, make_file, warm_cache

MIB: Final = 1 << 20
PARTS: Final = (*BACK_ENDS, "packets")
QUEUES: Final = 2  # of every server; a load may use fewer
FULL: Final = Timing(seconds=1.0, warm_up=0.2, rounds=5, retries=3, idle=5.0)
QUICK: Final = Timing(seconds=0.4, warm_up=0.1, rounds=3, retries=0, idle=5.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 1 when it could not be measured or (``--strict``) a bar is missed."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # servers and files must not stay behind
    try:
        report = Bench(arguments).measure()
    except (ServerError, StorageError, ConnectionFailedError, DeviceFaultError) as error:
        sys.stderr.write(f"\nbench: {error}\n")
        return 1
    if arguments.json is not None:
        arguments.json.write_text(render_json(report), encoding="utf-8")
    sys.stdout.write(render(report, markdown=arguments.markdown))
    missed = not report.bars or any(not bar.passed for bar in report.bars)
    return 1 if arguments.strict and missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a part of the loads and short runs: under two minutes")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--only", metavar="LIST", help=f"what to measure, of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each load is repeated for the median")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of one run")
    parser.add_argument("--size", type=int, metavar="MIB", help="size of the files (1024; --quick: 256)")
    parser.add_argument(
        "--cpus", metavar="A,B", help="the server's CPU and the front-end's (the first and last usable)"
    )
    parser.add_argument("--packed", action="store_true", help="measure hyperbell with packed rings as well")
    parser.add_argument("--poll-us", type=int, metavar="US", help="poll_us of hyperbell's worker (its default)")
    parser.add_argument("--ram-dir", type=Path, default=Path("/dev/shm"), metavar="DIR", help="a folder on tmpfs")
    parser.add_argument("--disk-dir", type=Path, default=Path("/var/tmp"), metavar="DIR", help="a folder on a disk")
    return parser


class Bench:
    """One call of the benchmark."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        quick: bool = arguments.quick
        default = QUICK if quick else FULL
        self._timing = Timing(
            seconds=arguments.seconds or default.seconds,
            warm_up=default.warm_up,
            rounds=arguments.rounds or default.rounds,
            retries=default.retries,
            idle=default.idle,
        )
        self._size = (arguments.size or (256 if quick else 1024)) * MIB
        self._server_cpu, self._frontend_cpu = choose_cpus(arguments.cpus)
        parts = choose_parts(arguments.only)
        back_ends = {name: title for name, title in BACK_ENDS.items() if name in parts}
        self._packets = "packets" in parts
        self._matrix = quick_matrix(back_ends) if quick else full_matrix(back_ends)
        self._disturbed = 0
        self._report = Report(describe_machine(self._server_cpu, self._frontend_cpu), self._timing)

    def measure(self) -> Report:
        """Run the whole matrix; every file and process is gone afterwards."""
        report = self._report
        if self._server_cpu == self._frontend_cpu:
            report.notes.append("server and front-end share one CPU: what a polling front-end measured says nothing")
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._frontend_cpu})
        try:
            for back_end, loads in self._matrix.items():
                self._measure_back_end(back_end, loads)
            if self._packets:
                report.packets = measure_packets(self._server_cpu, self._frontend_cpu, self._timing, self)
        finally:
            os.sched_setaffinity(0, before)
            self.progress("")
        report.notes = list(dict.fromkeys(report.notes))
        if self._disturbed:
            loads_count = sum(len(loads) for loads in self._matrix.values())
            report.notes.append(
                f"other processes took part of the two CPUs in {self._disturbed} of {loads_count} loads: "
                "the figures are rough, measure again on a quiet machine"
            )
        report.bars = check_bars(report.results, report.idle) + check_packet_bars(report.packets)
        return report

    def _measure_back_end(self, back_end: BackEnd, loads: Sequence[Load]) -> None:
        report = self._report
        with ExitStack() as stack:
            disk = self._make_disk(back_end, stack)
            contenders = self._start(back_end, disk, stack)
            report.contenders += [one.name for one in contenders if one.name not in report.contenders]
            results = report.results.setdefault(back_end, {})
            for load in loads:
                samples = run_in_turns(contenders, load, self._timing, self)
                results[load] = samples
                self._disturbed += any(one.disturbed > DISTURBED for one in samples.values())
            servers = list({one.server.name: one.server for one in contenders}.values())
            report.memory[back_end] = {server.name: server.memory_bytes() for server in servers}
            for server in servers:
                if strayed := server.strayed_threads():
                    self.note(f"{server.name}: {', '.join(strayed)} may run beside CPU {self._server_cpu}")
            if not report.idle:
                self.progress("idle")
                report.idle = watch_idle(servers, self._timing.idle)

    def _make_disk(self, back_end: BackEnd, stack: ExitStack) -> Disk:
        if back_end in ("null", "python"):
            return Disk(None, self._size, python=back_end == "python")
        ram = back_end == "ram"
        parent: Path = self._arguments.ram_dir if ram else self._arguments.disk_dir
        check_folder(parent, ram=ram, size=self._size)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hyperbell-bench-", dir=parent)))
        path = folder / "disk.img"
        self.progress(f"{BACK_ENDS[back_end]}: writing {self._size // MIB} MiB")
        make_file(path, self._size)
        if back_end == "disk":
            drop_cache(path)
        else:
            warm_cache(path)
        return Disk(path, self._size, direct=back_end == "disk")

    def _start(self, back_end: BackEnd, disk: Disk, stack: ExitStack) -> list[Contender]:
        """The servers of one back end. qemu-storage-daemon may be missing: then a note says so."""

        def make_folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hyperbell-bench-")))

        folder, cpu = make_folder(), self._server_cpu
        command = hyperbell_command(folder, disk, QUEUES, cpu, self._arguments.poll_us)
        server = stack.enter_context(Server(OURS, command, folder, cpu))
        contenders = [Contender(OURS, server, ours=True)]
        if self._arguments.packed:
            contenders.append(Contender(PACKED, server, ours=True, packed=True))
        kinds = {QEMU_IO_URING: "io_uring"}
        if disk.path is not None:  # null-co has no file to read in one way or the other
            kinds[QEMU_THREADS] = "threads"
        for name, aio in kinds.items():
            folder = make_folder()
            try:
                server = stack.enter_context(Server(name, qemu_command(folder, disk, QUEUES, aio), folder, cpu))
            except ServerError as error:
                self.note(f"{error}; {name} was left out, and bars that need it were not checked")
                continue
            contenders.append(Contender(name, server, ours=False))
        return contenders

    def note(self, text: str) -> None:
        """Keep ``text`` for the report."""
        self._report.notes.append(text)

    def progress(self, text: str) -> None:
        """One line on a terminal, overwritten; nothing elsewhere."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{text[:110]}")
            sys.stderr.flush()


def choose_cpus(text: str | None) -> tuple[int, int]:
    """The server's CPU and the front-end's."""
    usable = sorted(os.sched_getaffinity(0))
    if text is None:
        return usable[0], usable[-1]
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) in usable for part in parts):
        sys.exit(f"bench: --cpus {text}: name two of the CPUs {','.join(map(str, usable))}, for instance --cpus 0,1")
    return int(parts[0]), int(parts[1])


def choose_parts(text: str | None) -> Sequence[str]:
    """The parts named in ``text``, or all."""
    if text is None:
        return PARTS
    if unknown := set(text.split(",")) - set(PARTS):
        sys.exit(f"bench: --only {text}: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    return text.split(",")


def describe_machine(server_cpu: int, frontend_cpu: int) -> dict[str, str]:
    """What the figures were made on."""
    models = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    hyperbell = Path(sys.executable).parent / "hyperbell"
    return {
        "machine": f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}",
        "pinning": f"server on CPU {server_cpu}, front-end on CPU {frontend_cpu}",
        "versions": f"{_first_line(str(hyperbell))}; {_first_line('qemu-storage-daemon')}",
    }


def _first_line(program: str) -> str:
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return f"no {Path(program).name}"
    return answer.stdout.partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
