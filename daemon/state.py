"""What the running daemon shows of itself: one snapshot that the metrics page and the control socket both read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path

from daemon.doorbells.worth import DoorbellState
from transports.hypercall import Policy
from transports.kvm.machine.state import MachineState, MmioDeviceState
from transports.stock_qemu.state import VmState
from transports.vhost_user.serving.stats import ConnectionStats
from virtio.native.stats import BackendStats, WorkerStats


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """A copy of a transport's ``ConnectionStats``, for threads that must not see them change.

    ``since`` is the wall clock time in seconds at which ``connected`` last changed, ``hears_changes`` says whether the
    front-end can be told of changes of the device's configuration.
    """

    connected: bool
    connections: int
    reconnects: int
    refused: int
    messages: int
    memory_regions: int
    protocol_errors: Mapping[str, int]
    since: float
    hears_changes: bool = False

    @classmethod
    def of(cls, counts: ConnectionStats) -> ConnectionState:
        values = {item.name: getattr(counts, item.name) for item in fields(cls)}
        return cls(**values | {"protocol_errors": dict(counts.protocol_errors)})


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One device at this moment.

    ``connection`` and ``socket``, where its front-end connects, are of devices that are reached over a socket. A device
    of a virtual machine of our own has neither, but ``own``.
    """

    backend: BackendStats
    connection: ConnectionState | None
    transport: str
    socket: Path | None
    own: MmioDeviceState | None = None

    @property
    def connected(self) -> bool:
        """Whether somebody uses the device: a front-end is connected, or a driver of our own guest is set up."""
        if self.connection is not None:
            return self.connection.connected
        return any(queue.running for queue in self.backend.queues)


@dataclass(frozen=True, slots=True)
class FailedDevice:
    """A configured device that cannot be had now.

    ``type`` is "" where its class cannot be had. ``since``, ``next_attempt``: wall clock seconds; ``next_attempt`` is
    ``None`` where only a restart helps.
    """

    device: str
    type: str
    reason: str
    since: float
    next_attempt: float | None


@dataclass(frozen=True, slots=True)
class DaemonState:
    """Everything at this moment.

    ``vms`` are those of stock QEMU that report their doorbells; ``policies`` say by device who may ring by hypercall,
    ``refusals`` count by reason what was asked for and not to be had. ``doorbells`` are there where the costs of a ring
    are known, ``machine`` where the guest is one of our own. ``failed`` are the devices that cannot be had now;
    ``failures`` counts by device how often an attempt to serve it failed, ``log_lines_lost`` by reason the lines of the
    log that were not written, ``descriptor_shortages`` by who had to wait how often there was no file descriptor.
    """

    devices: tuple[DeviceState, ...]
    workers: tuple[WorkerStats, ...]
    vms: tuple[VmState, ...] = ()
    policies: Mapping[str, Policy] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)
    doorbells: DoorbellState | None = None
    machine: MachineState | None = None
    failed: tuple[FailedDevice, ...] = ()
    failures: Mapping[str, int] = field(default_factory=dict)
    log_lines_lost: Mapping[str, int] = field(default_factory=dict)
    descriptor_shortages: Mapping[str, int] = field(default_factory=dict)


def version() -> str:
    """The installed version of hyperbell; ``unknown`` when it runs from a source tree that was never installed."""
    try:
        return metadata.version("hyperbell")
    except metadata.PackageNotFoundError:
        return "unknown"
