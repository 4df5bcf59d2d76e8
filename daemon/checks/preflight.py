"""What ``hyperbell check`` can say beyond the configuration itself: about this host and this installation."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterator
from importlib import metadata
from typing import Final

from config.loader import Config, Device
from config.origins import KeyPath
from config.problems import Problem
from daemon.checks.files import ABSENT, file_faults, file_notes, out_of_reach
from daemon.checks.host import host_state
from daemon.checks.images import image_faults, image_notes
from daemon.doorbells.report import load
from virtio.devices.blk.device import BlkOptions
from virtio.devices.net.device import NetOptions
from virtio.errors import HostError
from virtio.native.worker import number_ranges

PACKAGES: Final = ("config", "daemon", "transports", "virtio")
"""Our top-level packages; other distributions use some of these names too."""


def host_notes(config: Config) -> Iterator[Problem]:
    """What of a correct configuration would not work on this host, as it is now."""
    usable = os.sched_getaffinity(0)
    for name, worker in config.workers.items():
        absent = sorted(set(worker.cpus or ()) - usable)
        if absent:
            message = f"this host has no CPU {number_ranges(absent)} for the daemon"
            yield config.problem(("workers", name, "cpus"), message, f"it has: {number_ranges(usable)}")
    yield from file_notes(config)
    yield from _group_notes(config, ("daemon", "hypercall_socket_group"), config.daemon.hypercall_socket_group)
    if config.daemon.doorbell_costs is not None:
        try:
            load(config.daemon.doorbell_costs)
        except HostError as error:
            yield config.problem(("daemon", "doorbell_costs"), str(error))
    for device in config.devices.values():
        yield from _device_notes(config, device)
    yield from image_notes(config)
    yield from host_state(config)


def host_faults(config: Config, *, as_daemon: bool = False) -> list[Problem]:
    """What of a correct configuration ``serve`` would refuse on this host: it is there, but of the wrong kind.

    ``as_daemon``: this process is the daemon's user, so what it may not open counts too.
    """
    return [*image_faults(config, as_daemon=as_daemon), *file_faults(config, as_daemon=as_daemon)]


def _device_notes(config: Config, device: Device) -> Iterator[Problem]:
    path = ("devices", device.name)
    yield from _group_notes(config, (*path, "socket_group"), device.common.socket_group)
    if device.common.inband_notifications:
        message = "QEMU accepts this and does not know its messages; it is for User-mode Linux"
        yield config.problem((*path, "inband_notifications"), message, "leave it out where the front-end is QEMU")
    if isinstance(device.options, BlkOptions) and device.options.path is not None:
        image = device.options.path
        fault = out_of_reach(image)
        if fault:
            hint = f"create it, for instance: truncate -s 10G {image}" if fault == ABSENT else ""
            yield config.problem((*path, "path"), f"{image} {fault}", hint)
    if isinstance(device.options, NetOptions) and device.queues > device.options.pairs_max:
        message = f'with backend = "{device.options.backend}" there is one pair of queues, not {device.queues}'
        yield config.problem((*path, "queues"), message, "leave it out, or set queues = 1")


def _group_notes(config: Config, path: KeyPath, group: str | None) -> Iterator[Problem]:
    if group is not None and not _group_exists(group):
        hint = f"create it (groupadd --system {group}), or name another"
        yield config.problem(path, f'this host has no group "{group}"', hint)


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def foreign_packages() -> dict[str, list[str]]:
    """Which of our package names another installed distribution claims too, and who.

    pip lets one distribution overwrite the files of another without a word.
    """
    owners = metadata.packages_distributions()
    others = {package: sorted(set(owners.get(package, ())) - {"hyperbell"}) for package in PACKAGES}
    return {package: names for package, names in others.items() if names}


def check_inherited_sockets(config: Config) -> None:
    """``HostError`` unless every ``socket_fd`` is an open socket.

    To be called before the daemon opens anything itself: a number nobody passed on could later be its own.
    """
    for device in config.devices.values():
        number = device.common.socket_fd
        if number is None:
            continue
        try:
            is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
        except OSError:
            is_socket = False
        if not is_socket:
            raise HostError(
                f"[devices.{device.name}] socket_fd: {number} is not an open socket; "
                "the program that starts hyperbell must pass it on under this number"
            )
        os.set_inheritable(number, False)
