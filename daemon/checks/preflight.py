"""What ``hyperbell check`` can say beyond the configuration itself: about this host and this installation."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from config.loader import Config, Device
from config.origins import KeyPath
from config.problems import Problem
from daemon.checks.host import host_state, socket_faults
from daemon.checks.images import image_faults, image_notes
from daemon.doorbells.report import load
from virtio.devices.blk.device import BlkOptions
from virtio.devices.net.device import NetOptions
from virtio.errors import HostError
from virtio.native.worker import number_ranges

PACKAGES: Final = ("config", "daemon", "transports", "virtio")
"""Our top-level packages; other distributions use some of these names too."""

_NODES: Final = ("chip", "adapter", "evdev")
"""Options of devices that name a device node of this host."""

_ABSENT: Final = "does not exist"


def host_notes(config: Config) -> Iterator[Problem]:
    """What of a correct configuration would not work on this host, as it is now."""
    usable = os.sched_getaffinity(0)
    for name, worker in config.workers.items():
        absent = sorted(set(worker.cpus or ()) - usable)
        if absent:
            message = f"this host has no CPU {number_ranges(absent)} for the daemon"
            yield config.problem(("workers", name, "cpus"), message, f"it has: {number_ranges(usable)}")
    yield from _folder_notes(config)
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
    return [*image_faults(config, as_daemon=as_daemon), *socket_faults(config)]


def _device_notes(config: Config, device: Device) -> Iterator[Problem]:
    path = ("devices", device.name)
    yield from _group_notes(config, (*path, "socket_group"), device.common.socket_group)
    if device.common.inband_notifications:
        message = "QEMU accepts this and does not know its messages; it is for User-mode Linux"
        yield config.problem((*path, "inband_notifications"), message, "leave it out where the front-end is QEMU")
    for key in _NODES:
        node = getattr(device.options, key, None)
        if isinstance(node, Path):
            yield from _node_notes(config, (*path, key), node)
    if isinstance(device.options, BlkOptions) and device.options.path is not None:
        image = device.options.path
        fault = _out_of_reach(image)
        if fault:
            hint = f"create it, for instance: truncate -s 10G {image}" if fault == _ABSENT else ""
            yield config.problem((*path, "path"), f"{image} {fault}", hint)
    if isinstance(device.options, NetOptions) and device.options.tftp is not None:
        folder = device.options.tftp
        fault = _out_of_reach(folder) or ("" if folder.is_dir() else "is not a folder")
        if not fault and not os.access(folder, os.R_OK | os.X_OK):
            fault = "may not be read by this user"
        if fault:
            hint = f"create it: mkdir -p {folder}" if fault == _ABSENT else "a folder with the files that guests boot"
            yield config.problem((*path, "tftp"), f"{folder} {fault}", hint)
    if isinstance(device.options, NetOptions) and device.queues > device.options.pairs_max:
        message = f'with backend = "{device.options.backend}" there is one pair of queues, not {device.queues}'
        yield config.problem((*path, "queues"), message, "leave it out, or set queues = 1")


def _node_notes(config: Config, path: KeyPath, node: Path) -> Iterator[Problem]:
    """What keeps whoever runs the check from using a device node; the daemon may well be somebody else."""
    fault = _out_of_reach(node)
    if fault:
        hint = f"what this host has: {_others(node) or 'none of its kind'}" if fault == _ABSENT else ""
        yield config.problem(path, f"{node} {fault}", hint)
    elif not node.is_char_device():
        yield config.problem(path, f"{node} is no character device", f"what this host has: {_others(node) or 'none'}")
    elif not os.access(node, os.R_OK | os.W_OK):
        yield config.problem(path, f"{node} may not be read and written by this user", "a udev rule, or its group")


def _out_of_reach(path: Path) -> str:
    """Why whoever runs the check finds nothing at ``path``; "" when something is there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return _ABSENT
    except OSError as error:
        return f"cannot be looked at by this user: {error.strerror}"
    return ""


def _others(node: Path) -> str:
    kind = node.name.rstrip("0123456789")
    return ", ".join(sorted(str(other) for other in node.parent.glob(f"{kind}[0-9]*")))


def _group_notes(config: Config, path: KeyPath, group: str | None) -> Iterator[Problem]:
    if group is not None and not _group_exists(group):
        hint = f"create it (groupadd --system {group}), or name another"
        yield config.problem(path, f'this host has no group "{group}"', hint)


def _folder_notes(config: Config) -> Iterator[Problem]:
    """Each folder a socket is to be made in that is not there, once."""
    sockets: dict[KeyPath, Path] = {
        ("devices", name, "socket"): device.common.socket for name, device in config.devices.items()
    }
    for key, socket in (("control", config.daemon.control), ("hypercall_socket", config.daemon.hypercall_socket)):
        if socket is not None:
            sockets["daemon", key] = socket
    for folder, path in {socket.parent: path for path, socket in reversed(sockets.items())}.items():
        fault = _out_of_reach(folder)
        if fault:
            hint = f"create it: mkdir -p {folder}" if fault == _ABSENT else ""
            yield config.problem(path, f"the folder {folder} {fault}", hint)
        elif not folder.is_dir():
            yield config.problem(path, f"{folder} is not a folder", "a socket is made in a folder")


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
