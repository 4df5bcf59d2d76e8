"""What ``check`` sees of files beside images: sockets and links that are made, device nodes, folders, EEPROMs.

A path where something else lies can never be served: a mistake. What is missing, in use, or closed to this user is a
note, for the daemon may be somebody else and start later; with ``check --user`` what is closed is a mistake too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from config.loader import Config, Device
from config.made import Made, made_by
from config.origins import KeyPath
from config.problems import Problem
from virtio.devices.i2c.chips import eeprom_fault
from virtio.devices.i2c.options import I2cOptions
from virtio.devices.net.device import NetOptions

_NODES: Final = ("chip", "adapter", "evdev")
"""Options of devices that name a device node of this host."""

ABSENT: Final = "does not exist"


def file_faults(config: Config, *, as_daemon: bool) -> Iterator[Problem]:
    """What ``serve`` would refuse. ``as_daemon``: this process is the daemon's user."""
    for key, made in _made(config):
        try:
            mode = made.path.lstat().st_mode
        except OSError:
            continue
        is_such, what = (stat.S_ISLNK, "link") if made.is_link else (stat.S_ISSOCK, "socket")
        if not is_such(mode):
            yield config.problem(key, f"{made.path} exists and is no {what}", "remove it, or choose another path")
    for key, path, size, writable in _eeproms(config):
        try:
            fault = eeprom_fault(path.stat(), size, writable=writable)
        except OSError:
            continue
        if fault:
            yield config.problem(key, f"{path}: {fault}", "choose another file, or move it away and it is made anew")
    if as_daemon:
        yield from _closed(config)


def file_notes(config: Config) -> Iterator[Problem]:
    """What is missing, in use, or closed to this user, now."""
    yield from _closed(config)
    yield from _missing_folders(config)
    in_use = _paths_in_use()
    for key, made in _made(config):
        if not made.is_link and str(made.path) in in_use:
            yield config.problem(key, f"{made.path} is in use, by a daemon that runs now", "")
    for device in config.devices.values():
        for key, node in _nodes(device):
            yield from _node_notes(config, key, node)
        if isinstance(device.options, NetOptions) and device.options.tftp is not None:
            folder = device.options.tftp
            fault = out_of_reach(folder) or ("" if folder.is_dir() else "is not a folder")
            if fault:
                hint = (
                    f"create it: mkdir -p {folder}" if fault == ABSENT else "a folder with the files that guests boot"
                )
                yield config.problem(("devices", device.name, "tftp"), f"{folder} {fault}", hint)


def out_of_reach(path: Path) -> str:
    """Why whoever runs the check finds nothing at ``path``; "" when something is there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ABSENT
    except OSError as error:
        return f"cannot be looked at by this user: {error.strerror}"
    return ""


# ---- what there is to look at ----


def _made(config: Config) -> Iterator[tuple[KeyPath, Made]]:
    """Sockets and links that the daemon and its devices make."""
    for device in config.devices.values():
        if device.common.mode == "listen" and device.common.socket_fd is None:
            yield ("devices", device.name, "socket"), Made(("socket",), device.common.socket, False)
        for made in made_by(device.options, device.name):
            yield ("devices", device.name, *made.key), made
    for key, path in (("control", config.daemon.control), ("hypercall_socket", config.daemon.hypercall_socket)):
        if path is not None:
            yield ("daemon", key), Made((key,), path, False)


def _folders(config: Config) -> Iterator[tuple[KeyPath, Path]]:
    """Each folder in which something is made, once, with the first key that says so."""
    folders: dict[Path, KeyPath] = {}
    for key, made in _made(config):
        folders.setdefault(made.path.parent, key)
    yield from ((key, folder) for folder, key in folders.items())


def _nodes(device: Device) -> Iterator[tuple[KeyPath, Path]]:
    for key in _NODES:
        node = getattr(device.options, key, None)
        if isinstance(node, Path):
            yield ("devices", device.name, key), node


def _eeproms(config: Config) -> Iterator[tuple[KeyPath, Path, int, bool]]:
    """The key, the file, the bytes that the chip has, and whether it may be written."""
    for device in config.devices.values():
        if not isinstance(device.options, I2cOptions):
            continue
        for number, chip in enumerate(device.options.chips):
            if chip.path is not None:
                key = ("devices", device.name, "chips", str(number), "path")
                yield key, chip.path, chip.size, not chip.read_only


# ---- what may not be used ----


def _closed(config: Config) -> Iterator[Problem]:
    """What is there, and whoever runs the check may not use."""
    for key, folder in _folders(config):
        hint = "give the daemon's user write access to it, or choose another folder"
        fault = out_of_reach(folder)
        if fault and fault != ABSENT:
            yield config.problem(key, f"the folder {folder} {fault}", hint)
        elif stat.S_ISDIR(_mode(folder)) and not os.access(folder, os.W_OK | os.X_OK):
            yield config.problem(key, f"in the folder {folder} this user may make nothing", hint)
    for device in config.devices.values():
        for key, node in _nodes(device):
            if stat.S_ISCHR(_mode(node)) and not os.access(node, os.R_OK | os.W_OK):
                hint = "a udev rule, or its group"
                yield config.problem(key, f"{node} may not be read and written by this user", hint)
        if isinstance(device.options, NetOptions) and device.options.tftp is not None:
            folder = device.options.tftp
            if stat.S_ISDIR(_mode(folder)) and not os.access(folder, os.R_OK | os.X_OK):
                hint = "a folder with the files that guests boot"
                yield config.problem(("devices", device.name, "tftp"), f"{folder} may not be read by this user", hint)
    for key, path, _, writable in _eeproms(config):
        wanted = os.R_OK | (os.W_OK if writable else 0)
        if _mode(path) and not os.access(path, wanted):
            message = f"{path} may not be {'read and written' if writable else 'read'} by this user"
            yield config.problem(key, message, "give the daemon's user access, or set read_only = true")


def _missing_folders(config: Config) -> Iterator[Problem]:
    """Each folder that something is to be made in and that is not there, once."""
    for key, folder in _folders(config):
        if out_of_reach(folder) == ABSENT:
            yield config.problem(key, f"the folder {folder} {ABSENT}", f"create it: mkdir -p {folder}")
        elif _mode(folder) and not folder.is_dir():
            yield config.problem(key, f"{folder} is not a folder", "a socket is made in a folder")


def _node_notes(config: Config, path: KeyPath, node: Path) -> Iterator[Problem]:
    """A device node that is not there, or is something else."""
    fault = out_of_reach(node)
    if fault:
        hint = f"what this host has: {_others(node) or 'none of its kind'}" if fault == ABSENT else ""
        yield config.problem(path, f"{node} {fault}", hint)
    elif not node.is_char_device():
        yield config.problem(path, f"{node} is no character device", f"what this host has: {_others(node) or 'none'}")


def _mode(path: Path) -> int:
    """What kind of file is there, as ``st_mode`` says; 0: nothing that this user can look at."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _others(node: Path) -> str:
    kind = node.name.rstrip("0123456789")
    return ", ".join(sorted(str(other) for other in node.parent.glob(f"{kind}[0-9]*")))


def _paths_in_use() -> set[str]:
    """Where processes listen. Connecting to a vhost-user socket would take its place: the kernel is asked."""
    try:
        lines = Path("/proc/net/unix").read_text().splitlines()
    except OSError:
        return set()
    return {fields[7] for line in lines if len(fields := line.split(maxsplit=7)) == 8}
