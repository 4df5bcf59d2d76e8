"""The tables of a configuration file and the values their keys may have.

Every model refuses unknown keys and values of another kind. A device's own options (blk: ``path``, ...) are not
known here: the device class brings a model of its own, see ``DeviceType``.
"""

from __future__ import annotations

import ipaddress
import os
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from config.problems import toml_value, wrong

DEFAULT_WORKER: Final = "default"
"""The worker of a native device that names none; ``[workers.default]`` sets it up, but it need not be there."""

QUEUE_SIZE_MAX: Final = 32768  # virtio 1.3, 2.7: the largest queue size
NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")
NAME_RULE: Final = "a name begins with a letter and has at most 63 letters, digits, '-', '_' and '.'"
OWN_QUEUE_SIZE: Final = 256
"""The largest queue of a machine of our own, where nothing is said: its driver takes the largest that it may."""
SOCKET_PATH_MAX: Final = 107  # struct sockaddr_un: 108 bytes with the terminating zero
SHORTER_FOLDER: Final = "put the socket into a folder with a shorter name, such as /run/hyperbell"
METRICS_OFF: Final = "off"

KEYED_FEATURES: Final[Mapping[str, str]] = {"VIRTIO_F_RING_PACKED": "packed", "VIRTIO_F_ACCESS_PLATFORM": "iommu"}
"""Features that a key of their own offers."""

NOT_OVER_VHOST_USER: Final[Mapping[str, str]] = {
    "VIRTIO_F_RING_RESET": "cannot be offered over vhost-user: no message tells of the reset of one ring"
}
"""Features that only a machine of our own can carry, and why."""

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "human", "json", "journal"]


def _check_path(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value):
        raise wrong(f"must be a path in quotes, not {toml_value(value)}")
    return value


def _check_socket(path: Path) -> Path:
    """A socket's path must fit into struct sockaddr_un."""
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise wrong(socket_path_fault(path), SHORTER_FOLDER)
    return path


def socket_path_fault(path: Path) -> str:
    """What is wrong with a socket's path that is too long."""
    return f"is {len(os.fsencode(path))} bytes long, but the path of a Unix socket has room for {SOCKET_PATH_MAX}"


def _check_mode(value: str, key: str) -> str:
    if re.fullmatch(r"0?[0-7]{3}", value) is None:
        raise wrong(f"must be three octal digits, not {toml_value(value)}", f'for example: {key} = "0660"')
    return value


def _parse_cpus(value: object) -> tuple[int, ...]:
    """CPU numbers from ``[0, 1, 2]`` or ``"0-2,5"``, sorted, each once."""
    cpus: set[int] = set()
    parts: list[object] = list(value) if isinstance(value, list | tuple) else [value]
    if isinstance(value, str):
        parts = list(value.split(","))
    for part in parts:
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part) if isinstance(part, str) else None
        if match is not None:
            first, last = int(match[1]), int(match[2] or match[1])
        elif isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= 9999:
            first = last = part
        else:
            raise wrong(f"{toml_value(part)} is not a CPU number or a range of them")
        if first > last:
            raise wrong(f'the range "{first}-{last}" runs backwards', f'write "{last}-{first}"')
        cpus.update(range(first, last + 1))
    if not cpus:
        raise wrong("names no CPU", "leave the key out to let the kernel choose")
    return tuple(sorted(cpus))


def _parse_names(value: object) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, list | tuple) else (value,)
    for name in names:
        if not isinstance(name, str):
            raise wrong(f"{toml_value(name)} is not the name of a worker")
        if names.count(name) > 1:
            raise wrong(f'names the worker "{name}" twice', "name each worker once")
    if not names:
        raise wrong("names no worker", f'leave the key out to use the worker "{DEFAULT_WORKER}"')
    return names


FilePath = Annotated[Path, BeforeValidator(_check_path, json_schema_input_type=str)]


class Table(BaseModel):
    """A TOML table: nothing unknown, nothing converted behind the operator's back, nothing changed later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DaemonConfig(Table):
    """``[daemon]``: what concerns the process as a whole."""

    metrics_allow_remote: bool = Field(
        default=False,
        description="Allow an address in metrics that other machines reach. The page has no password.",
    )
    metrics: str = Field(
        default="127.0.0.1:9477",
        description='Address and port of the Prometheus page /metrics; "off" for none. Loopback addresses only, '
        "unless metrics_allow_remote is true.",
        examples=["127.0.0.1:9477", "[::1]:9477", "off"],
    )
    stop_seconds: int = Field(
        default=10,
        description="How long the daemon waits at SIGTERM for requests that their storage does not answer; then it "
        "says which, and ends without them.",
        ge=1,
        le=3600,
    )
    control: FilePath | None = Field(
        default=None,
        description="Path of the control socket, which hyperbell show asks (mode 0600: only the daemon's own user "
        "and root may); none when the key is left out.",
        examples=["/run/hyperbell/control.sock"],
    )
    hypercall_socket: FilePath | None = Field(
        default=None,
        description="Path of the socket where QEMUs that hyperbell qemu has started report their doorbells; none when "
        "the key is left out: then no guest of QEMU's rings by hypercall.",
        examples=["/run/hyperbell/hypercall.sock"],
    )
    hypercall_socket_mode: str = Field(
        default="0660", description="Permissions of hypercall_socket in octal.", examples=["0660"]
    )
    hypercall_socket_group: str | None = Field(
        default=None,
        min_length=1,
        description="Group that owns hypercall_socket; the daemon's own when left out.",
        examples=["kvm"],
    )
    doorbell_costs: FilePath | None = Field(
        default=None,
        description="File that hyperbell doorbells --save has written on this host. With it, metrics and hyperbell "
        "show say what share of a CPU the hypercall doorbell saves each device, or could save; none when left out.",
        examples=["/var/lib/hyperbell/doorbells.json"],
    )
    log_level: LogLevel = Field(default="info", description="The least level that is logged.")
    log_format: LogFormat = Field(
        default="auto",
        description="auto: human on a terminal, journal under systemd, else json.",
    )

    @field_validator("control", "hypercall_socket")
    @classmethod
    def _socket_fits(cls, value: Path | None) -> Path | None:
        return None if value is None else _check_socket(value)

    @field_validator("hypercall_socket_mode")
    @classmethod
    def _socket_mode_is_octal(cls, value: str) -> str:
        return _check_mode(value, "hypercall_socket_mode")

    @field_validator("metrics")
    @classmethod
    def _metrics_is_an_address(cls, value: str, info: ValidationInfo) -> str:
        if value == METRICS_OFF:
            return value
        host, _ = split_address(value)
        if not is_loopback(host) and not info.data.get("metrics_allow_remote"):
            raise wrong(
                f"{host} is not a loopback address, and the metrics page has no password",
                'use metrics = "127.0.0.1:9477", or add metrics_allow_remote = true',
            )
        return value

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Host and port of the metrics page; ``None`` when it is off."""
        return None if self.metrics == METRICS_OFF else split_address(self.metrics)


class WorkerConfig(Table):
    """``[workers.NAME]``: one native thread that drives queues of native devices."""

    cpus: Annotated[
        tuple[int, ...] | None,
        BeforeValidator(_parse_cpus, json_schema_input_type=str | list[int | str]),
    ] = Field(
        default=None,
        description='The CPUs the thread may run on, as a list or as "0-3,5"; any when the key is left out.',
        examples=["0-3,5"],
    )
    poll_us: int = Field(
        default=32,
        ge=0,
        le=1000,
        description="For how many microseconds at most the thread looks for new work before it sleeps. "
        "0 sleeps at once. It adapts below this bound and uses no CPU when idle.",
    )
    reactor: Literal["auto", "io_uring", "epoll"] = Field(
        default="auto",
        description="auto: io_uring where the kernel allows it, else epoll (slower, with one warning).",
    )


class DeviceTable(Table):
    """What every device has, however it reaches its guest."""

    type: str = Field(description="What the device is.", examples=["blk"])
    worker: str | None = Field(default=None, description="The worker that drives all queues.", examples=["default"])
    workers: Annotated[tuple[str, ...] | None, BeforeValidator(_parse_names, json_schema_input_type=list[str])] = Field(
        default=None,
        description="The workers that drive the queues in turn: queue 0 the first, queue 1 the second, and so on.",
        examples=[["fast0", "fast1"]],
    )
    queues: int | None = Field(
        default=None,
        ge=1,
        description="Number of virtqueues (of a network interface: of pairs of them); what the type has by itself when "
        "left out (a disk: 1).",
        examples=[1],
    )
    queue_size: int = Field(
        default=OWN_QUEUE_SIZE,
        description="The largest size of a queue the driver may choose, a power of two. Linux chooses the largest.",
    )
    hypercall: Literal["offer", "withhold", "auto"] = Field(
        default="offer",
        description="Whether a guest may ring the device by hypercall, once its VM has the platform key: offer, "
        "withhold, or auto (withhold from a guest that can itself be a hypervisor). Plain doorbells always work.",
    )
    packed: bool = Field(
        default=True,
        description="Offer packed virtqueues (VIRTIO_F_RING_PACKED); a driver that can have both takes them.",
    )
    iommu: bool = Field(
        default=False,
        description="Offer VIRTIO_F_ACCESS_PLATFORM: the driver gives addresses as the platform translates them.",
    )
    features: dict[str, bool] = Field(
        default_factory=dict,
        description="Virtio features by their names in the specification; false turns one off, and with it those "
        "that require it.",
        examples=[{"VIRTIO_F_EVENT_IDX": False}],
    )

    @field_validator("queue_size")
    @classmethod
    def _queue_size_is_a_power_of_two(cls, value: int) -> int:
        if not 2 <= value <= QUEUE_SIZE_MAX or value & (value - 1):
            near = min(QUEUE_SIZE_MAX, max(2, 1 << max(value - 1, 0).bit_length()))
            raise wrong(
                f"must be a power of two from 2 to {QUEUE_SIZE_MAX}, not {value}",
                f"for example: queue_size = {near}",
            )
        return value

    @field_validator("workers")
    @classmethod
    def _one_way_to_name_workers(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if value is not None and info.data.get("worker") is not None:
            raise wrong("stands beside worker, which says the same", 'keep one: worker = "NAME" or workers = [...]')
        return value

    @property
    def worker_names(self) -> tuple[str, ...]:
        """The workers the operator named; empty when none were."""
        if self.workers is not None:
            return self.workers
        return () if self.worker is None else (self.worker,)


class DeviceConfig(DeviceTable):
    """``[devices.NAME]``: the keys every device has; the options of its type stand in the same table."""

    transport: str = Field(default="vhost-user", description="How the device reaches its guest.")
    queue_size: int = Field(
        default=QUEUE_SIZE_MAX,
        description="The largest size of a queue the front-end may choose, a power of two; what the type can do when "
        "left out. A front-end that chooses more is refused.",
    )
    socket: FilePath = Field(
        description="Path of the Unix socket the front-end (QEMU) and the device meet at.",
        examples=["/run/hyperbell/disk.sock"],
    )
    mode: Literal["listen", "connect"] = Field(
        default="listen",
        description="listen: the daemon makes the socket and removes it; connect: the front-end does.",
    )
    socket_mode: str = Field(
        default="0660",
        description="Permissions of the socket in octal (with mode = listen).",
        examples=["0660"],
    )
    socket_group: str | None = Field(
        default=None,
        min_length=1,
        description="Group that owns the socket (with mode = listen); the daemon's own when left out.",
        examples=["kvm"],
    )
    packed: bool = Field(
        default=False,
        description="Offer packed virtqueues (VIRTIO_F_RING_PACKED): for a front-end that was told so too, as QEMU by "
        "packed=on. Others pass on what is offered, also where they cannot carry it.",
    )
    iommu: bool = Field(
        default=False,
        description="Offer VIRTIO_F_ACCESS_PLATFORM: the device may be used behind the front-end's virtual IOMMU "
        "(QEMU: iommu_platform=on).",
    )
    socket_fd: int | None = Field(
        default=None,
        ge=3,
        description="Number of an open socket, listening or connected to a front-end, that the daemon inherits from "
        "the program which starts it. The path in socket is then not opened; it only says where front-ends connect.",
        examples=[3],
    )
    offer_config: bool = Field(
        default=False,
        description="Of a network interface: let every front-end read its config space (VHOST_USER_PROTOCOL_F_CONFIG), "
        "as libkrun and alioth must. QEMU has one of its own and prints a warning, so by itself a front-end may that "
        "becomes the owner before it negotiates, which QEMU does not. Other types offer it in any case.",
    )
    inband_notifications: bool = Field(
        default=False,
        description="Offer the front-end to kick the rings and to be interrupted by messages instead of descriptors "
        "(VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS), as User-mode Linux takes it; it is slower. "
        "Not for QEMU, which accepts the offer and does not know the messages.",
    )

    remote_memory: bool = Field(
        default=False,
        description="Accept guest memory in files that another process or host serves (FUSE, NFS, 9p). While a page "
        "of such a file does not come, the worker that wants it stops, with every device that it drives.",
    )
    guest: str | None = Field(
        default=None,
        description="The guest whose device this is, where one file serves several: hyperbell qemu-args --guest NAME "
        "prints the options of that guest's devices. It changes nothing in the daemon.",
        examples=["web1"],
    )

    @field_validator("guest")
    @classmethod
    def _guest_is_a_name(cls, value: str | None) -> str | None:
        if value is not None and NAME.fullmatch(value) is None:
            raise wrong(f"{toml_value(value)} cannot be a guest's name", NAME_RULE)
        return value

    @field_validator("socket")
    @classmethod
    def _socket_fits(cls, value: Path) -> Path:
        return _check_socket(value)

    @field_validator("socket_mode")
    @classmethod
    def _socket_mode_is_octal(cls, value: str) -> str:
        return _check_mode(value, "socket_mode")

    @field_validator("socket_fd")
    @classmethod
    def _inherits_or_connects(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("mode") == "connect":
            raise wrong('stands beside mode = "connect", which makes a socket of its own', "keep one of the two")
        return value

    @property
    def socket_permissions(self) -> int:
        """``socket_mode`` as a number."""
        return int(self.socket_mode, 8)


@dataclass(frozen=True, slots=True)
class DeviceType:
    """What the loader must know of a device type; the daemon makes these from its registry.

    ``options`` describes the keys of its own, ``features`` the spec names that may be turned off, ``features_kept``
    those that may not, with the reason,
    ``native`` whether worker threads drive its queues; ``queues_min``, ``queues_max`` and ``queues_default`` say how
    many queues it can have and has when nothing is said, ``queue_size_max`` how large they can be.
    """

    options: type[BaseModel]
    features: Collection[str]
    native: bool
    queues_min: int
    queues_max: int
    queues_default: int
    queue_size_max: int
    features_kept: Mapping[str, str] = field(default_factory=dict)


class DeviceTypes(Mapping[str, DeviceType]):
    """The device types by name, and those that are a class in a file. ``ValueError``: why one cannot be had."""

    @abstractmethod
    def from_file(self, type_name: str, folder: Path) -> tuple[str, DeviceType] | None:
        """The type that ``type_name``, ``FILE.py:CLASS``, names, with its name as an absolute path; ``None`` when it
        has another form. A relative path is taken from ``folder``."""


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``; raises what a validator raises."""
    match = re.fullmatch(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[^:\[\]\s]+)):(?P<port>\d{1,5})", text)
    if match is None or int(match["port"]) > 65535:
        raise wrong(
            f"must be an address and a port, not {toml_value(text)}",
            'for example: metrics = "127.0.0.1:9477", or metrics = "off"',
        )
    return match["six"] or match["host"], int(match["port"])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
