"""What there is to configure: the device types and the transports of this daemon."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import trio
from pydantic import BaseModel

from config.schema import KEYED_FEATURES, DeviceConfig, DeviceTable, DeviceType, DeviceTypes
from daemon.devices.classes import DeviceClassError, DeviceClasses, class_from_file, device_class, split_type
from daemon.devices.features import ALWAYS_OFFERED, left_out
from transports import TRANSPORTS
from transports.base import BackendLike
from transports.vhost_user.serving.endpoint import Connect, Endpoint, Inherit
from transports.vhost_user.serving.stats import ConnectionStats
from virtio.backend.device_calls import MISTAKES, one_line
from virtio.device import Device as VirtioDevice
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.socket_file import Listen
from virtio.spec import RING_FEATURES


class Configured(Protocol):
    """One device as the operator wants it, from a file or from the command line."""

    @property
    def common(self) -> DeviceTable: ...
    @property
    def options(self) -> BaseModel: ...
    @property
    def queues(self) -> int: ...
    @property
    def workers(self) -> tuple[str, ...]: ...


class Transport(Protocol):
    """What the module of each transport has."""

    async def serve(
        self,
        backend: BackendLike,
        endpoint: Endpoint,
        *,
        stats: ConnectionStats | None = None,
        inband_notifications: bool = False,
        offers_config: bool = False,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled, or until the front-end of an inherited connection leaves."""


class _Types(DeviceTypes):
    """The device classes as the configuration's loader must know them."""

    def __init__(self) -> None:
        self._classes = DeviceClasses()

    def __getitem__(self, name: str) -> DeviceType:
        try:
            return _device_type(self._classes[name])
        except DeviceClassError as error:
            raise ValueError(str(error)) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def from_file(self, type_name: str, folder: Path) -> tuple[str, DeviceType] | None:
        file, class_name = split_type(type_name)
        if file is None:
            return None
        file = (folder / file).resolve()
        try:
            return f"{file}:{class_name}", _device_type(class_from_file(file, class_name))
        except DeviceClassError as error:
            raise ValueError(str(error)) from error


def device_types() -> DeviceTypes:
    """What the configuration's loader must know of each type."""
    return _Types()


def _device_type(kind: type[VirtioDevice]) -> DeviceType:
    least, most = kind.queue_counts
    features = feature_bits(kind).keys()
    return DeviceType(
        options=kind.Options,
        features=features - ALWAYS_OFFERED.keys(),
        features_kept={name: ALWAYS_OFFERED[name] for name in sorted(features & ALWAYS_OFFERED.keys())},
        native=kind.native,
        queues_min=least,
        queues_max=most,
        queues_default=kind.default_queues,
        queue_size_max=kind.queue_size_limit,
    )


def feature_bits(kind: type[VirtioDevice]) -> dict[str, int]:
    """Bit numbers of the ring's and the device's features by their names in the specification."""
    return dict(RING_FEATURES) | dict(kind.feature_bits)


def features_off(device: Configured) -> frozenset[int]:
    """The bit numbers that ``device`` is not to offer: what the operator turned off, and what requires it."""
    bits = feature_bits(device_class(device.common.type))
    return frozenset(bits[name] for name in turned_off(device) | features_left_out(device))


def turned_off(device: Configured) -> frozenset[str]:
    """The features that the operator turned off, or that are only offered when asked for."""
    unasked = {name for name, key in KEYED_FEATURES.items() if not getattr(device.common, key)}
    return frozenset(unasked | {name for name, on in device.common.features.items() if not on})


def features_left_out(device: Configured) -> frozenset[str]:
    """The features that ``device`` cannot offer because they require what the operator turned off."""
    return left_out(turned_off(device), feature_bits(device_class(device.common.type)))


def files_may_hang(device: Configured) -> bool:
    """Whether ``device`` is to be opened and closed in a thread."""
    return device_class(device.common.type).files_may_hang


def make_device(name: str, device: Configured) -> VirtioDevice:
    """One configured device, opened. ``HostError``: it cannot be had, also by a mistake of its class."""
    kind = device_class(device.common.type)
    try:
        return kind(name, device.options, device.queues, device.common.queue_size)
    except HostError:
        raise
    except MISTAKES as error:
        reason = f"{device.common.type} cannot be made: {one_line(error)}{_line_of(error, kind)}"
        raise HostError(reason) from error


def _line_of(error: BaseException, kind: type[VirtioDevice]) -> str:
    """The last line of the class's file that ``error`` came by."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" (line {lines[-1]} of {file})" if lines else ""


def transport_of(common: DeviceConfig) -> Transport:
    """The module that serves a device's transport."""
    return cast(Transport, import_module(TRANSPORTS[common.transport]))


def endpoint_of(common: DeviceConfig) -> Endpoint:
    """Where the device meets its front-end. An inherited socket belongs to the endpoint from here on."""
    if common.socket_fd is not None:
        return Inherit(OwnedFd(common.socket_fd))
    if common.mode == "connect":
        return Connect(common.socket)
    return Listen(common.socket, common.socket_permissions, common.socket_group)
