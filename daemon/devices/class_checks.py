"""Whether a class from outside is a device class: each of its attributes, what it overrides, how it is made.

Found at ``hyperbell check``, where it is a line with a name in it, and not when a guest is served, where it would be a
traceback.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from config.schema import DeviceConfig
from virtio.device import Device, DeviceOptions
from virtio.native.stats import OPS_MAX
from virtio.spec import CHAIN_LENGTH_MAX, RING_FEATURES, VIRTQUEUE_SIZE_MAX

QUEUES_MAX: Final = 256
"""Queues of one device: vhost-user names a queue with one byte (VHOST_USER_VRING_IDX_MASK)."""

START_SECONDS_MAX: Final = 600
"""The daemon is not ready before every device has started or failed."""

_ID: Final = "the number of its type in the specification (section 5)"


def fault_of(kind: type[Device]) -> str | None:
    """The first thing wrong with ``kind``, which names the attribute; ``None``: nothing is."""
    for attribute, fault in _FAULTS.items():
        found = fault(getattr(kind, attribute, None))
        if found is not None:
            return found
    if kind.native:
        return "says native, but a device from outside is driven by Python"
    least, most = kind.queue_counts
    if not least <= kind.default_queues <= most:
        return f"has default_queues = {kind.default_queues}, which is not within queue_counts = {kind.queue_counts!r}"
    return _unusable(kind)


def _unusable(kind: type[Device]) -> str | None:
    if kind.handle is Device.handle and kind.run_queue is Device.run_queue:
        return "has neither handle() nor run_queue(): nothing would answer a request"
    for name in _AWAITED:
        fault = _not_awaitable(name, getattr(kind, name))
        if fault is not None:
            return fault
    for name in _CALLED:
        if inspect.iscoroutinefunction(inspect.unwrap(getattr(kind, name))):
            return f"has async def {name}(), which is called and never awaited: write def {name}()"
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
        return f"is abstract: it lacks {missing}"
    try:
        inspect.signature(kind).bind("name", kind.Options, 1, 256)
    except TypeError as error:
        return f"has an __init__ that does not take (self, name, options, queues, queue_size): {error}"
    except ValueError:
        pass  # made in C: its signature is not told
    return None


_AWAITED: Final = ("handle", "run_queue", "queue_stopping", "run")
_CALLED: Final = (
    "features", "set_driver_features", "config_space", "write_config", "queue_running", "reset", "refresh", "close",
    "examine", "limit_descriptors", "use_workers", "worker_of",
)  # fmt: skip


def _not_awaitable(name: str, method: Any) -> str | None:
    """What is wrong with a method that is awaited. One that only says that it returns an awaitable is believed."""
    method = inspect.unwrap(method)
    if inspect.isasyncgenfunction(method):
        return f"has a yield in async def {name}(), which is awaited and answers with nothing"
    if not inspect.isfunction(method) or inspect.iscoroutinefunction(method):
        return None
    if hasattr(method, "__partialmethod__") or hasattr(method, "_partialmethod"):  # Python 3.13, and before
        return None
    returned = str(inspect.get_annotations(method).get("return", ""))
    if "Awaitable" in returned or "Coroutine" in returned:
        return None
    return f"has def {name}(), which is awaited: write async def {name}(), and await what takes long"


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _virtio_id(value: object) -> str | None:
    if value is None:
        return f"has no virtio_id, {_ID}"
    return None if _whole(value, 1, 0xFFFF) else f"has virtio_id = {value!r}, not {_ID}"


def _type_name(value: object) -> str | None:
    if value is None:
        return "has no type_name, which metrics and tables call it by"
    if isinstance(value, str) and value and value.isprintable():
        return None
    return f"has type_name = {value!r}, not a name that metrics and tables could call it by"


def _queue_counts(value: object) -> str | None:
    if isinstance(value, tuple | list) and len(value) == 2 and all(_whole(count, 1, QUEUES_MAX) for count in value):
        least, most = value
        if least <= most:
            return None
    return f"has queue_counts = {value!r}, not two numbers from 1 to {QUEUES_MAX}: the least and the most"


def _default_queues(value: object) -> str | None:
    return None if _whole(value, 1, QUEUES_MAX) else f"has default_queues = {value!r}, not a number of queues"


def _queue_size_limit(value: object) -> str | None:
    if isinstance(value, int) and _whole(value, 2, VIRTQUEUE_SIZE_MAX) and not value & (value - 1):
        return None
    return f"has queue_size_limit = {value!r}, not a power of two from 2 to {VIRTQUEUE_SIZE_MAX}"


def _request_max(value: object) -> str | None:
    if _whole(value, 1, CHAIN_LENGTH_MAX):
        return None
    return f"has request_max = {value!r}, not a number of bytes from 1 to {CHAIN_LENGTH_MAX}"


def _start_seconds(value: object) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= START_SECONDS_MAX:
        return None
    return f"has start_seconds = {value!r}, not a number of seconds above 0 and up to {START_SECONDS_MAX}"


def _ops(value: object) -> str | None:
    names = value if isinstance(value, tuple | list) else ()
    good = [op for op in names if isinstance(op, str) and op and op.isprintable()]
    if 1 <= len(names) <= OPS_MAX and len(set(good)) == len(names):
        return None
    return f"has ops = {value!r}, not a tuple of 1 to {OPS_MAX} different names"


def _options(value: object) -> str | None:
    if not isinstance(value, type) or not issubclass(value, DeviceOptions):
        return f"has Options = {_named(value)}, not a class derived from virtio.DeviceOptions"
    for key in value.model_fields:
        if key in DeviceConfig.model_fields:
            return f"has Options with the key {key}, which every device has already: call it something else"
    return None


def _feature_bits(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return f"has feature_bits = {value!r}, not a dictionary of names and bit numbers"
    names: dict[int, object] = {}
    for name, bit in value.items():
        if not isinstance(name, str) or not name:
            return f"has feature_bits with {name!r}, which is not a feature's name"
        # 2.2: 24 to 41 are the rings' and the transport's, 42 to 49 nobody's yet; 64 bits are what a driver is offered.
        if not _whole(bit, 0, 63) or 24 <= bit <= 49 or name in RING_FEATURES:
            return f"has feature_bits[{name!r}] = {bit!r}: a device's own are 0 to 23 and 50 to 63 (virtio 1.3, 2.2)"
        if bit in names:
            return f"has feature_bits[{name!r}] = {bit}, which is {names[bit]} already"
        names[bit] = name
    return None


def _named(value: object) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)


_FAULTS: Final[Mapping[str, Callable[[Any], str | None]]] = {
    "virtio_id": _virtio_id,
    "type_name": _type_name,
    "queue_counts": _queue_counts,
    "default_queues": _default_queues,
    "queue_size_limit": _queue_size_limit,
    "request_max": _request_max,
    "ops": _ops,
    "start_seconds": _start_seconds,
    "Options": _options,
    "feature_bits": _feature_bits,
}
"""What is wrong with the value of each class attribute, as the rest of a sentence about the class."""
