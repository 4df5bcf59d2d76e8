"""How many file descriptors the process may have, and how many a configuration may come to need."""

from __future__ import annotations

import resource
from typing import Final

from config.loader import Config, Device
from daemon.metrics.server import CONNECTIONS_MAX
from daemon.running.control import CLIENTS_MAX
from transports.stock_qemu.server import VMS_MAX
from transports.vhost_user.serving.waiting import WAITING_MAX
from transports.vhost_user.wire.numbers import VHOST_MEMORY_MAX_NREGIONS, VHOST_USER_MAX_RAM_SLOTS
from virtio.clients import ROOM
from virtio.device import DESCRIPTORS_MIN, DeviceOptions
from virtio.waist import Doorbell

OF_THE_PROCESS: Final = 64
"""Standard streams, epoll, signals, the log, the journal, files that are read for a moment."""

OF_A_WORKER: Final = 8
OF_A_QUEUE: Final = len(Doorbell) + 2
"""Each kind of doorbell, and the call and error descriptors."""

OF_A_CONNECTION: Final = 2 + WAITING_MAX + 1 + VHOST_USER_MAX_RAM_SLOTS
"""The front-end's socket and its back-end channel, those that wait, the listening socket, a file for each region."""


def raise_limit() -> int:
    """Raise the soft limit to the hard one, which is what an operator sets; what it is now.

    Programs that we start get the same limit. None of them, and nothing here, uses select(2), which the low soft limit
    is there for.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return limit()


def limit() -> int:
    """The most descriptors that this process could have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 2**31 - 1 if hard == resource.RLIM_INFINITY else hard


def worst_case(config: Config) -> int:
    """Descriptors in use when every front-end, client and guest takes all that it may."""
    daemon = config.daemon
    count = OF_THE_PROCESS + ROOM + OF_A_WORKER * len(config.workers)
    count += (CONNECTIONS_MAX + 1) if daemon.metrics_address is not None else 0
    count += (CLIENTS_MAX + 1) if daemon.control is not None else 0
    count += (VMS_MAX + 1) if daemon.hypercall_socket is not None else 0
    return count + sum(_of_device(device) for device in config.devices.values())


def _of_device(device: Device) -> int:
    return OF_A_CONNECTION + OF_A_QUEUE * (device.queues + 1) + _own(device)


def _own(device: Device) -> int:
    return device.options.descriptors_max if isinstance(device.options, DeviceOptions) else 0


def shares(config: Config, allowed: int) -> dict[str, int]:
    """How many of ``allowed`` descriptors each device may have of its own: what it wants where that is there for all.

    Else what is left without them is shared out: who wants little has it, all others have the same. Front-ends are
    counted with as many regions of memory as one message may bring.
    """
    wanted = {name: _own(device) for name, device in config.devices.items()}
    needed = worst_case(config)
    if needed <= allowed:
        return wanted
    rare = len(wanted) * (VHOST_USER_MAX_RAM_SLOTS - VHOST_MEMORY_MAX_NREGIONS)
    left = allowed - (needed - sum(wanted.values()) - rare)
    found = {}
    for number, name in enumerate(sorted(wanted, key=wanted.__getitem__)):
        found[name] = max(DESCRIPTORS_MIN, min(wanted[name], left // (len(wanted) - number)))
        left -= found[name]
    return found


def too_few(config: Config) -> str:
    """What to say where the limit is below what the configuration may need; "" where it is not."""
    needed, allowed = worst_case(config), limit()
    if needed <= allowed:
        return ""
    return (
        f"this configuration may need {needed} file descriptors, and the process may have {allowed}: "
        f"set LimitNOFILE={needed} in the unit (ulimit -Hn {needed} in a shell)"
    )
