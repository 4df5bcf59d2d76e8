"""What ``check`` sees of the host beside its files: what ``serve`` would find taken, missing, or of another kind."""

from __future__ import annotations

import errno
import os
import pwd
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from config.loader import Config, Device
from config.origins import KeyPath
from config.problems import Problem
from config.schema import METRICS_OFF, split_address
from virtio.devices.blk.device import BlkOptions
from virtio.devices.net.device import NetOptions
from virtio.devices.net.peer_options import parse_address
from virtio.devices.net.user import parse_forward
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


def host_state(config: Config) -> Iterator[Problem]:
    """What is taken or missing now, and may be otherwise when the daemon starts."""
    yield from _port_notes(config)
    for device in config.devices.values():
        if isinstance(device.options, NetOptions):
            yield from _interface_notes(config, device, device.options)
        if isinstance(device.options, BlkOptions) and device.options.backend == "memory":
            yield from _memory_notes(config, device, device.options.size or 0)


def _port_notes(config: Config) -> Iterator[Problem]:
    for key, address, kind, hint in _addresses(config):
        error = _taken(address, kind)
        if error is not None:
            hints = {
                errno.EADDRINUSE: f"by a daemon that runs now, or choose another port{hint}",
                errno.EACCES: "a port below 1024 is root's: choose a higher one",
                errno.EADDRNOTAVAIL: "no interface of this host has that address",
            }
            text = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
            yield config.problem(key, f"{text}: {error.strerror}", hints.get(error.errno or 0, ""))


def _addresses(config: Config) -> Iterator[tuple[KeyPath, tuple[str, int], socket.SocketKind, str]]:
    """Where the daemon is to listen: the key, host and port, the kind of socket, and what else would help."""
    if config.daemon.metrics != METRICS_OFF:
        yield ("daemon", "metrics"), split_address(config.daemon.metrics), socket.SOCK_STREAM, ', or metrics = "off"'
    for device in config.devices.values():
        if not isinstance(device.options, NetOptions):
            continue
        path = ("devices", device.name)
        for number, text in enumerate(device.options.forwards or ()):
            forward = parse_forward(text)
            kind = socket.SOCK_DGRAM if forward.udp else socket.SOCK_STREAM
            yield (*path, "forwards", str(number)), (str(forward.host), forward.host_port), kind, ""
        local = parse_address(device.options.local) if device.options.local is not None else None
        if local is not None and local.host:
            kind = socket.SOCK_STREAM if local.is_stream else socket.SOCK_DGRAM
            yield (*path, "local"), (local.host, local.port), kind, ""


def _taken(address: tuple[str, int], kind: socket.SocketKind) -> OSError | None:
    """Why nobody can listen there now."""
    try:
        found = socket.getaddrinfo(*address, type=kind, flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST)
    except OSError:
        return None  # a name: whoever asks for it may be made to wait
    with socket.socket(found[0][0], kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(found[0][4])
        except OSError as error:
            return error
    return None


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
