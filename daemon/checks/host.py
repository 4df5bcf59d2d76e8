"""What ``check`` sees of the host beside its files: what ``serve`` would find taken, missing, or of another kind."""

from __future__ import annotations

import errno
import os
import pwd
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from config.loader import Config, Device
from config.origins import KeyPath
from config.problems import Problem
from config.schema import METRICS_OFF, split_address
from virtio.devices.blk.device import BlkOptions
from virtio.devices.net.device import NetOptions
from virtio.errors import HostError

_INTERFACES: Final = Path("/sys/class/net")


def become(name: str) -> None:
    """Be this user for the rest of the process, so that all that is looked at is seen as the daemon will see it."""
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise HostError(f'there is no user "{name}" on this host') from None
    if os.geteuid() == user.pw_uid:
        return
    if os.geteuid() != 0:
        raise HostError(f"check --user {name} needs root: sudo hyperbell check --user {name} FILE")
    os.initgroups(name, user.pw_gid)
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)


def socket_faults(config: Config) -> Iterator[Problem]:
    """Paths where a socket is to be made and something else lies."""
    for key, path in _sockets(config):
        try:
            mode = path.lstat().st_mode
        except OSError:
            continue
        if not stat.S_ISSOCK(mode):
            yield config.problem(key, f"{path} exists and is no socket", "remove it, or choose another path")


def host_state(config: Config) -> Iterator[Problem]:
    """What is taken or missing now, and may be otherwise when the daemon starts."""
    yield from _port_notes(config)
    for key, path in _sockets(config):
        if _answers(path):
            yield config.problem(key, f"{path} is in use, by a daemon that runs now", "")
    for device in config.devices.values():
        if isinstance(device.options, NetOptions):
            yield from _interface_notes(config, device, device.options)
        if isinstance(device.options, BlkOptions) and device.options.backend == "memory":
            yield from _memory_notes(config, device, device.options.size or 0)


def _sockets(config: Config) -> Iterator[tuple[KeyPath, Path]]:
    for device in config.devices.values():
        if device.common.mode == "listen" and device.common.socket_fd is None:
            yield ("devices", device.name, "socket"), device.common.socket
    for key, path in (("control", config.daemon.control), ("hypercall_socket", config.daemon.hypercall_socket)):
        if path is not None:
            yield ("daemon", key), path


def _answers(path: Path) -> bool:
    """Whether a process listens there. Connecting to a vhost-user socket would take its place: the kernel is asked."""
    try:
        lines = Path("/proc/net/unix").read_text().splitlines()
    except OSError:
        return False
    return any(line.split(maxsplit=7)[7:] == [str(path)] for line in lines)


def _port_notes(config: Config) -> Iterator[Problem]:
    if config.daemon.metrics == METRICS_OFF:
        return
    host, port = split_address(config.daemon.metrics)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            hints = {
                errno.EADDRINUSE: 'by a daemon that runs now, or choose another port, or metrics = "off"',
                errno.EACCES: "a port below 1024 is root's: choose a higher one",
                errno.EADDRNOTAVAIL: "no interface of this host has that address",
            }
            hint = hints.get(error.errno or 0, "")
            yield config.problem(("daemon", "metrics"), f"{config.daemon.metrics}: {error.strerror}", hint)


def _interface_notes(config: Config, device: Device, options: NetOptions) -> Iterator[Problem]:
    path = ("devices", device.name)
    if options.bridge is not None:
        bridge = _INTERFACES / options.bridge
        if not bridge.exists():
            hint = f"make it: ip link add {options.bridge} type bridge"
            yield config.problem((*path, "bridge"), f'this host has no interface "{options.bridge}"', hint)
        elif not (bridge / "bridge").is_dir():
            hint = f"bridges here: {', '.join(sorted(_bridges())) or 'none'}"
            yield config.problem((*path, "bridge"), f'"{options.bridge}" is an interface, but no bridge', hint)
    tap = None if options.tap is None else _INTERFACES / options.tap
    if tap is not None and tap.exists() and not (tap / "tun_flags").exists():
        message = f'"{options.tap}" is an interface, but no tap'
        yield config.problem((*path, "tap"), message, "choose a name that no interface has, and it is made")


def _bridges() -> Iterator[str]:
    return (interface.name for interface in _INTERFACES.iterdir() if (interface / "bridge").is_dir())


def _memory_notes(config: Config, device: Device, size: int) -> Iterator[Problem]:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > there:
        message = f"is more than the memory of this host, {there >> 20} MiB"
        yield config.problem(("devices", device.name, "size"), message, "a guest that fills the disk ends the daemon")
