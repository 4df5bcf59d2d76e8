"""``hyperbell microvm``: a Linux guest of our own, with our devices, in the terminal it is started in."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Final

import structlog
import trio

from config.options import OptionDevice
from config.schema import DeviceTable, WorkerConfig
from daemon.doorbells.policies import Policies
from daemon.log import setup as log
from daemon.metrics.server import metrics_url, serve_metrics
from daemon.microvm.options import MicrovmOptions, read_options
from daemon.microvm.terminal import raw_terminal, restorer, terminal_size
from daemon.running.assembly import Assembly, assemble
from daemon.running.control import serve_control
from daemon.running.descriptors import raise_limit
from daemon.running.disks import Disks
from daemon.running.doorbell_meter import OWN_TRANSPORT, DoorbellMeter, open_meter
from daemon.running.failures import leaves
from daemon.running.files import Files
from daemon.running.hardening import harden
from daemon.running.links import Links
from daemon.running.opening import open_devices
from daemon.running.slow_steps import SlowSteps
from daemon.running.stuck import end_when_stuck
from daemon.state import DaemonState, DeviceState
from transports.hypercall import Policy
from transports.kvm.boot import pvh
from transports.kvm.boot.acpi import Window, build_tables
from transports.kvm.machine.machine import DeviceSetup, Machine, MachineSetup, open_machine
from transports.kvm.machine.slots import DEVICES_MAX, slot
from transports.kvm.machine.state import MachineState
from transports.kvm.vm.ending import VmEnd
from transports.kvm.vm.entry import PvhEntry
from transports.stock_qemu.messages import Reason
from virtio.clients import shortages
from virtio.device import Device
from virtio.devices.console.device import ConsoleOptions
from virtio.devices.console.terminal import Escapes, FdWriter, TerminalConsole
from virtio.errors import HostError
from virtio.mmio.registers import WINDOW_SIZE

TERMINAL: Final = "terminal"
"""The name of the console that is always there."""

QUIET_SECONDS: Final = 20.0
"""After so long without a sign of life from the guest, somebody should say something."""

FLUSH_SECONDS: Final = 2.0
"""How long the guest's last words may take to be written when it has ended."""

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Microvm:
    """One run of one guest. ``boot`` is what the guest begins with."""

    def __init__(self, options: MicrovmOptions, boot: pvh.Boot) -> None:
        self._options = options
        self._boot = boot
        self._log = structlog.get_logger()
        self._configured: dict[str, OptionDevice] = {TERMINAL: _terminal_entry(), **options.devices}
        self._files = Files()
        self._assembly = Assembly({}, {}, {}, self._files)
        self._machine: Machine | None = None
        self._meter: DoorbellMeter | None = None
        self._printed = False
        self._early = FdWriter(STDERR)
        self._stopping = trio.Event()

    async def run(self) -> VmEnd:
        """Until the guest ends, or a signal or the escape ends it. Raises ``HostError`` (in groups)."""
        # While this takes its time the terminal is as it was: Ctrl-C ends the command.
        devices = await open_devices(
            self._files, self._options.devices, lambda name: f"{self._configured[name].option}:"
        )
        restore = restorer(STDIN)
        with raw_terminal(STDIN) as is_terminal:
            try:
                console = self._make_console(Escapes() if is_terminal else None)
            except BaseException:
                for device in devices.values():
                    await self._files.close(device)
                raise
            seconds = self._options.daemon.stop_seconds
            async with trio.open_nursery() as guard:
                guard.start_soon(
                    end_when_stuck,
                    self._stopping,
                    seconds,
                    lambda: self._assembly.backends.values(),
                    self._files,
                    restore,
                )
                end = await self._run_with({TERMINAL: console, **devices}, console)
                guard.cancel_scope.cancel()
            return end

    async def _run_with(self, devices: dict[str, Device], console: TerminalConsole) -> VmEnd:
        options = self._options
        names = {name for device in self._configured.values() for name in device.workers}
        workers = {name: WorkerConfig() for name in names}
        setup = MachineSetup(options.memory_size, options.cpus, options.nested, options.key, options.kvm)
        async with AsyncExitStack() as stack:
            signals = stack.enter_context(trio.open_signal_receiver(*STOP_SIGNALS, signal.SIGWINCH))
            self._assembly = await stack.enter_async_context(assemble(devices, self._configured, workers, self._files))
            setups = [
                DeviceSetup(backend, self._configured[name].common.hypercall)
                for name, backend in self._assembly.backends.items()
            ]
            machine = self._machine = await stack.enter_async_context(open_machine(setup, setups))
            for gpa, data in self._boot.placements:
                machine.ram.write(gpa, bytes(data))
            stack.callback(self._stopping.set)  # from here on the end may have to wait for storage
            nursery = await stack.enter_async_context(trio.open_nursery())
            nursery.start_soon(self._obey, signals, machine, console)
            nursery.start_soon(self._watch, machine)
            nursery.start_soon(self._early.run)
            await self._serve(nursery, machine)
            end = await machine.run(PvhEntry(self._boot.entry_gpa, self._boot.start_info_gpa), self._show_early)
            with trio.move_on_after(FLUSH_SECONDS):
                await console.terminal.flush()
                await self._early.flush()
            nursery.cancel_scope.cancel()
        return end

    def snapshot(self) -> DaemonState:
        """The counters now."""
        assert self._machine is not None
        ours = dict(zip(self._assembly.backends, self._machine.devices, strict=True))
        machine = self._machine.state()
        devices = tuple(
            DeviceState(backend.stats(), connection=None, transport=OWN_TRANSPORT, socket=None, own=ours[name].state())
            for name, backend in self._assembly.backends.items()
        )
        return DaemonState(
            devices,
            self._assembly.worker_stats(),
            policies={name: device.policy for name, device in ours.items()},
            refusals=_refusals(machine, devices),
            doorbells=self._meter.state() if self._meter is not None else None,
            machine=machine,
            log_lines_lost=log.lines_lost(),
            descriptor_shortages=dict(shortages),
        )

    async def _serve(self, nursery: trio.Nursery, machine: Machine) -> None:
        """What others may ask of us while the guest runs."""
        daemon = self._options.daemon
        policies = Policies({name: device.common.hypercall for name, device in self._configured.items()})
        send, receive = trio.open_memory_channel[tuple[str, Policy]](math.inf)
        # The machine was made with what the policies are now. One that is set again is tried again.
        policies.tell_changes(lambda device, policy: send.send_nowait((device, policy)))
        nursery.start_soon(self._change_policies, machine, receive)
        self._meter = open_meter(daemon.doorbell_costs)
        if self._meter is not None:
            nursery.start_soon(self._meter.run, self.snapshot)
        if daemon.control is not None:
            links = Links(self._assembly.devices)
            disks = Disks(self._assembly.devices, self._assembly.files)
            await nursery.start(serve_control, daemon.control, self.snapshot, policies, links, disks)
        if daemon.metrics_address is not None:
            host, port = await nursery.start(serve_metrics, *daemon.metrics_address, self.snapshot)
            self._log.info("metrics", url=metrics_url(host, port))

    async def _change_policies(self, machine: Machine, changes: trio.MemoryReceiveChannel[tuple[str, Policy]]) -> None:
        devices = dict(zip(self._assembly.backends, machine.devices, strict=True))
        async for name, policy in changes:
            await devices[name].set_policy(policy)

    # The terminal

    def _make_console(self, escapes: Escapes | None) -> TerminalConsole:
        columns, rows = terminal_size(STDOUT)
        size = {"columns": columns, "rows": rows} if columns and rows else {}
        return TerminalConsole(
            TERMINAL,
            ConsoleOptions.model_validate(size),
            self._configured[TERMINAL].common.queue_size,
            read_fd=STDIN,
            write_fd=STDOUT,
            escapes=escapes,
            leave=self._leave,
        )

    def _leave(self) -> None:
        if self._machine is not None:
            self._machine.vm.stop()

    def _show_early(self, data: bytes) -> None:
        """What the kernel prints before it has a console, and what a guest without an operating system says."""
        self._printed = True
        if self._options.early_serial:
            self._early.send(data)

    # Signals, and silence

    async def _obey(self, signals: AsyncIterator[int], machine: Machine, console: TerminalConsole) -> None:
        async for number in signals:
            if number == signal.SIGWINCH:
                console.resize(*terminal_size(STDOUT))
            else:
                self._log.info("stopping", signal=signal.Signals(number).name)
                self._stopping.set()
                machine.vm.stop()

    async def _watch(self, machine: Machine) -> None:
        """Say something when the guest does not: a Linux that cannot run here would be silent for good."""
        await trio.sleep(QUIET_SECONDS)
        stats = machine.vm.stats()
        if self._printed or stats.handed_over or stats.served:
            return
        self._log.warning(
            f"no sign of life from the guest for {QUIET_SECONDS:.0f} s: it printed nothing and touched no device. "
            f"Perhaps {self._options.kvm} is not real hardware virtualization: one made in software (PVM) interprets "
            "a kernel's every instruction. --early-serial shows what the kernel says",
            exits=stats.exits,
        )


def run(arguments: argparse.Namespace) -> int:
    """The command: 0 when the guest ended well, 1 when it or we failed. Raises what ``read_options`` raises."""
    options = read_options(arguments)
    # Lines of the log stand between the guest's: only what needs attention, unless more is wanted.
    log.configure(arguments.log_level or "warning", arguments.log_format or "auto")
    boot = prepare(options)
    raise_limit()
    harden()
    end: VmEnd | None = None
    with log.in_background():
        try:
            end = trio.run(Microvm(options, boot).run, instruments=[SlowSteps()])
        except* HostError as group:
            for error in leaves(group):
                _say(str(error))
        except* KeyboardInterrupt:  # before our own signal handling began, or after it ended
            _say("interrupted")
        except* Exception as unforeseen:
            structlog.get_logger().error("stopped by a mistake in hyperbell", exc_info=unforeseen)
    if end is None:
        return 1
    _say(end.reason)
    return 0 if has_ended_well(end) else 1


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"hyperbell: {line}", file=sys.stderr, flush=True)


def prepare(options: MicrovmOptions) -> pvh.Boot:
    """Read kernel and initrd and lay out the guest's memory. Raises ``HostError``."""
    count = 1 + len(options.devices)
    if count > DEVICES_MAX:
        raise HostError(f"--device: beside the terminal there is room for {DEVICES_MAX - 1}, not for {count - 1}")
    kernel = pvh.read_kernel(options.kernel)
    initrd = pvh.read_image(options.initrd, options.memory_size) if options.initrd is not None else b""
    slots = [slot(index) for index in range(count)]
    tables = build_tables(pvh.ACPI_GPA, [Window(s.gpa, WINDOW_SIZE, s.gsi) for s in slots], options.cpus)
    return pvh.lay_out(
        kernel,
        options.memory_size,
        command_line=options.command_line,
        initrd=initrd,
        initrd_name=str(options.initrd),
        acpi_tables=tables,
    )


def has_ended_well(end: VmEnd) -> bool:
    """Whether nothing went wrong: the guest powered off (or a program that is no Linux said so), or was stopped."""
    return end.kind in ("power off", "stopped") or (end.kind == "exit" and end.status == 0)


def _refusals(machine: MachineState, devices: Sequence[DeviceState]) -> Mapping[str, int]:
    """By the names that VMs of stock QEMU have for the same."""
    counts = Counter({Reason.NO_CAPABILITY.name.lower(): 1} if machine.key_shown and machine.reason else {})
    for device in devices:
        if device.own is not None:
            counts.update(device.own.refusals)
    return dict(counts)


def _terminal_entry() -> OptionDevice:
    return OptionDevice("the terminal", TERMINAL, DeviceTable(type="console"), ConsoleOptions(), 1, ())
