"""The table that ``hyperbell show`` prints of a running daemon."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Any, Final

from daemon.doorbells.worth_table import render_worth
from daemon.text import table
from virtio.native.stats import DURATION_BOUNDS, quantile_bound

_QUEUE_COLUMNS: Final = (
    *("DEVICE", "QUEUE", "STATE", "REQUESTS", "ERRORS", "BYTES", "IN FLIGHT", "KICKS", "QUIET", "P99", "GUEST P99"),
)
_NET_COLUMNS: Final = ("INTERFACE", "LINK", "DIRECTION", "FRAMES", "BYTES", "LOST", "BECAUSE")
_STORAGE_COLUMNS: Final = ("DISK", "STORAGE", "ERRORS")
_WORKER_COLUMNS: Final = ("WORKER", "REACTOR", "BECAUSE")
_VM_COLUMNS: Final = ("VM", "PID", "FOR", "KEY", "HYPERCALLS", "NO HYPERCALL DOORBELL BECAUSE")
_OWN: Final = "(own)"
"""For the name of a VM, of which ``hyperbell microvm`` has one."""
_STRAY_COLUMNS: Final = ("DOORBELLS THAT RANG NOTHING", "TIMES")
_BELL_COLUMNS: Final = ("DEVICE", "QUEUE", "VM", "BELL", "POLICY", "HYPERCALL")
_FAILED_COLUMNS: Final = ("FAILED DEVICE", "TYPE", "FOR", "NEXT ATTEMPT", "BECAUSE")
_DEVICE_COLUMNS: Final = ("DEVICE", "TYPE", "FRONT-END", "FOR", "CONNECTIONS", "REFUSED", "ERRORS", "SOCKET")


def render(stats: Mapping[str, Any], now: float | None = None) -> str:
    """The answer to the control command ``stats`` as tables: devices with their front-ends, queues, and more.

    QUIET is the share of completions' notifications that the driver wanted suppressed. P99: 99 of 100 requests took
    less, the device's part of it and what the guest felt. ``now``: wall clock seconds.
    """
    now = time.time() if now is None else now
    devices = stats["devices"]
    text = table(_DEVICE_COLUMNS, [_device_row(device, now) for device in devices])
    failed = [_failed_row(device, now) for device in stats.get("failed", ())]  # an earlier daemon has none
    if failed:
        text += "\n\n" + table(_FAILED_COLUMNS, failed)
    queues = [_queue_row(device["backend"]["device"], queue) for device in devices for queue in _queues(device)]
    if queues:
        text += "\n\n" + table(_QUEUE_COLUMNS, queues)
    disks = [row for device in devices for row in _storage_rows(device["backend"])]
    if disks:
        text += "\n\n" + table(_STORAGE_COLUMNS, disks)
    interfaces = [row for device in devices for row in _interface_rows(device["backend"])]
    if interfaces:
        text += "\n\n" + table(_NET_COLUMNS, interfaces)
    machine = stats["machine"]
    if stats["vms"] or (machine is not None and machine["key_shown"]):
        vms = [_vm_row(vm, now) for vm in stats["vms"]]
        if machine is not None:
            vms.append((_OWN, "-", "-", "given", str(_hypercalls(devices)), machine["reason"] or "-"))
        text += "\n\n" + table(_VM_COLUMNS, vms)
        text += "\n\n" + table(_BELL_COLUMNS, _bell_rows(devices, stats["vms"], stats["policies"]))
    strays = _stray_rows(devices, machine)
    if strays:
        text += "\n\n" + table(_STRAY_COLUMNS, strays)
    workers = [(each["name"], each["reactor"], each.get("reason") or "-") for each in stats["workers"]]
    if workers:
        text += "\n\n" + table(_WORKER_COLUMNS, workers)
    if stats["doorbells"] is not None:
        text += "\n\n" + render_worth(stats["doorbells"])
    return text


def _failed_row(device: Mapping[str, Any], now: float) -> Sequence[str]:
    again = device["next_attempt"]
    return (
        device["device"],
        device["type"] or "-",
        duration(now - device["since"]),
        "restart the daemon" if again is None else f"in {duration(again - now)}",
        device["reason"],
    )


def _vm_row(vm: Mapping[str, Any], now: float) -> Sequence[str]:
    key = "none" if not vm["key_shown"] else "stable" if vm["key_stable"] else "drawn"
    return (
        vm["name"],
        str(vm["pid"]),
        duration(now - vm["since"]),
        key,
        str(vm["hypercalls"]),
        vm["reason"] or "-",
    )


def _hypercalls(devices: Iterable[Mapping[str, Any]]) -> int:
    """In a machine of our own those that rang a queue are counted."""
    return sum(queue["doorbells"]["hypercall"] for device in devices for queue in _queues(device))


def _stray_rows(devices: Iterable[Mapping[str, Any]], machine: Mapping[str, Any] | None) -> list[Sequence[str]]:
    """Doorbells of a machine of our own that rang nothing, where there were any."""
    counts = {
        f"{device['backend']['device']}: queues that do not exist": device["own"]["stray_doorbells"]
        for device in devices
        if device["own"] is not None
    }
    if machine is not None:
        counts["hypercalls of unknown connection ids"] = machine["refused_hypercalls"]
    return [(what, str(count)) for what, count in counts.items() if count]


def _bell_rows(
    devices: Iterable[Mapping[str, Any]], vms: Iterable[Mapping[str, Any]], policies: Mapping[str, str]
) -> Iterable[Sequence[str]]:
    """Every doorbell that is a queue's, and a line for each device that has none."""
    rows = [
        (
            bell["device"],
            str(bell["queue"]),
            vm["name"],
            f"{bell['bell']:06x}",
            policies[bell["device"]],
            "registered" if bell["registered"] else f"refused: {bell['error']}" if bell["error"] else "no",
        )
        for vm in vms
        for bell in vm["bells"]
    ]
    rows += [
        (
            device["backend"]["device"],
            str(bell["queue"]),
            _OWN,
            f"{bell['bell']:06x}" if bell["bell"] else "-",
            policies[device["backend"]["device"]],
            "no" if not bell["registered"] else "accepted" if bell["accepted"] else "registered",
        )
        for device in devices
        if device["own"] is not None
        for bell in device["own"]["bells"]
    ]
    known = {row[0] for row in rows}
    rows += [(device, "-", "-", "-", policy, "no") for device, policy in policies.items() if device not in known]
    return sorted(rows)


def _queues(device: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return device["backend"]["queues"]  # type: ignore[no-any-return]


def _device_row(device: Mapping[str, Any], now: float) -> Sequence[str]:
    connection = device["connection"]
    name, type_name = device["backend"]["device"], device["backend"]["type"]
    if connection is None:  # of a virtual machine of our own: the guest's driver is all there is to see
        running = any(queue["running"] for queue in _queues(device))
        return name, type_name, "driver ready" if running else "no driver", *["-"] * 5
    return (
        name,
        type_name,
        "connected" if connection["connected"] else "waiting",
        duration(now - connection["since"]),
        str(connection["connections"]),
        str(connection["refused"]),
        str(sum(connection["protocol_errors"].values())),
        device["socket"],
    )


def _queue_row(device: str, queue: Mapping[str, Any]) -> Sequence[str]:
    ops = queue["ops"].values()
    notifications = queue["notifications_sent"] + queue["notifications_suppressed"]
    taken = [sum(counts) for counts in zip(*(op["duration_buckets"] for op in ops), strict=True)]
    state = "broken" if queue["broken"] else "running" if queue["running"] else "stopped"
    return (
        device,
        str(queue["queue"]),
        state,
        str(sum(op["requests"] for op in ops)),
        str(sum(op["errors"] for op in ops)),
        size(sum(op["bytes"] for op in ops)),
        str(queue["inflight"]),
        str(sum(queue["doorbells"].values())),
        f"{queue['notifications_suppressed'] / notifications:.0%}" if notifications else "-",
        _p99(taken),
        _p99(queue.get("guest_duration_buckets", ())),  # an earlier daemon has none
    )


def _p99(buckets: Sequence[int]) -> str:
    bound = quantile_bound(buckets, 0.99)
    if bound is None:
        return "-"
    if bound == inf:
        return f">{DURATION_BOUNDS[-1]:.0f} s"
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if bound * scale < 1000:
            return f"<{bound * scale:.0f} {unit}"
    return f"<{bound:.1f} s"


def _storage_rows(backend: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """One for a disk whose storage has failed in some way."""
    storage = backend.get("storage")  # an earlier daemon has none
    if storage is None or not (storage["errors"] or storage.get("reopened")):
        return
    yield (
        backend["device"],
        _storage_condition(storage),
        ", ".join(f"{error['op'].replace('_', ' ')} {error['errno']} {error['count']}" for error in storage["errors"]),
    )


def _storage_condition(storage: Mapping[str, Any]) -> str:
    failed, reopened = storage["flush_failed"], storage.get("reopened", 0)
    if storage.get("stopped") is not None:
        waiting = f"stopped ({storage['stopped']}): {storage['kept']} requests wait, tried {storage['retries']} times"
        return waiting if failed is None else f"{waiting}; a flush failed ({failed}): all fail until hyperbell reopen"
    if failed is not None:
        return f"a flush failed ({failed}): all fail until hyperbell reopen"
    return f"answers; opened again {reopened} times" if reopened else "answers"


def _interface_rows(backend: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Two for a network interface, one a direction as the guest sees it."""
    if backend["link_up"] is None:
        return
    for direction in ("transmit", "receive"):
        moved = [queue["ops"][direction] for queue in backend["queues"]]
        lost = {loss["reason"]: loss["frames"] for loss in backend["lost"] if loss["direction"] == direction}
        yield (
            backend["device"],
            "up" if backend["link_up"] else "down",
            direction,
            str(sum(op["requests"] - op["errors"] for op in moved)),
            size(sum(op["bytes"] for op in moved)),
            str(sum(lost.values())),
            ", ".join(f"{reason.replace('_', ' ')} {frames}" for reason, frames in lost.items() if frames) or "-",
        )


def size(count: float) -> str:
    """``count`` bytes for people: 4.0 KiB, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """A time span for people, in its two largest units: 4 s, 2 min 5 s, 3 h 12 min, 9 d 4 h."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
