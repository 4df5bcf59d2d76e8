"""The network device's back end ``user``: the host's own connections for a guest, with no privileges, by libslirp.

libslirp runs in a process of its own (``virtio.usernet``), one a device; frames go between it and the data plane over a
socket pair, past this process. Should it end, it is started anew: connections are lost then, nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Final

import structlog
import trio
from pydantic import BeforeValidator, Field, field_validator

from virtio.device import DeviceOptions
from virtio.errors import HostError
from virtio.fd import OwnedFd

MTU_MIN: Final = 220
MTU_MAX: Final = 65521
"""What libslirp can do."""

START_MAX: Final = 20.0
STOP_MAX: Final = 5.0
"""Seconds that the process may take."""

RESTART_MIN: Final = 0.5
RESTART_MAX: Final = 30.0
"""Seconds before a process that ended is started anew, doubled each time that it does not last."""

WORDS_MAX: Final = 10
"""Lines of a process's that are logged; what a guest makes it say must not fill the log."""

_NETWORK: Final = IPv4Network("10.0.2.0/24")


@dataclass(frozen=True, slots=True)
class Forward:
    """What comes to a port of the host goes to a port of the guest. ``guest`` is None for the address DHCP gives."""

    udp: bool
    host: IPv4Address
    host_port: int
    guest: IPv4Address | None
    guest_port: int


def parse_forward(text: str) -> Forward:
    """``ValueError`` says what is wrong with ``text``."""
    form = "write tcp:HOST_ADDRESS:HOST_PORT:GUEST_PORT, or tcp:HOST_ADDRESS:HOST_PORT:GUEST_ADDRESS:GUEST_PORT"
    kind, *parts = text.split(":")
    if kind not in ("tcp", "udp") or len(parts) not in (3, 4):
        raise ValueError(f"{text}: {form}")
    host, host_port, *guest, guest_port = parts
    try:
        host_address = IPv4Address(host)
        guest_address = IPv4Address(guest[0]) if guest else None
    except ValueError as error:
        raise ValueError(f"{text}: {error}; {form}") from None
    for port in (host_port, guest_port):
        if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"{text}: {port!r} is no port from 1 to 65535; {form}")
    return Forward(kind == "udp", host_address, int(host_port), guest_address, int(guest_port))


def _listed(value: object) -> object:
    """The command line has one text for all of them."""
    if isinstance(value, str):
        value = value.split(",")
    return tuple(value) if isinstance(value, list) else value


class UserOptions(DeviceOptions):
    """Options of ``backend = "user"``. All are None where they are left out."""

    network: IPv4Network | None = Field(
        None, description='With backend = "user", the guest\'s network. Default: 10.0.2.0/24.', examples=["10.0.2.0/24"]
    )
    host: IPv4Address | None = Field(
        None, description="The host's address in it, which is the router too. Default: the network's second."
    )
    dns: IPv4Address | None = Field(
        None, description="The name server's address in it, behind which is the host's own. Default: the third."
    )
    dhcp_start: IPv4Address | None = Field(
        None, description="The first address that DHCP gives, and the one forwards go to. Default: the fifteenth."
    )
    hostname: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,31}$",
        description="The name that DHCP tells the guest. Default: none.",
    )
    restrict: bool | None = Field(
        None, description="true: nothing of the guest's goes out; forwards still work. Default: false."
    )
    host_loopback: bool | None = Field(
        None, description="true: at the host's address the guest reaches what listens on 127.0.0.1. Default: false."
    )
    ipv6: bool | None = Field(None, description="Whether there is IPv6 (fec0::/64) too. Default: true.")
    forwards: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = Field(
        None,
        description="Ports of the host that are the guest's: tcp:HOST_ADDRESS:HOST_PORT:GUEST_PORT. Default: none.",
        examples=[["tcp:127.0.0.1:2222:22"]],
    )

    bootfile: str | None = Field(
        None,
        pattern=r"^[\x21-\x7e]{1,127}$",
        description="The file that DHCP tells a guest to boot from the network: a name below tftp, or a URL for iPXE. "
        "Default: none.",
        examples=["pxelinux.0"],
    )
    tftp: Path | None = Field(
        None, description="The folder whose files the guest may read by TFTP at the host's address. Default: none."
    )

    @field_validator("forwards")
    @classmethod
    def _are_forwards(cls, forwards: tuple[str, ...] | None) -> tuple[str, ...] | None:
        seen = set()
        for text in forwards or ():
            forward = parse_forward(text)
            place = (forward.udp, forward.host, forward.host_port)
            if place in seen:
                raise ValueError(f"{text}: another one is at that address and port")
            seen.add(place)
        return forwards

    def user_setup(self, mtu: int | None) -> dict[str, Any]:
        """All that the process is told, with what was left out; ``ValueError`` where it does not go together."""
        network = self.network or _NETWORK
        if network.num_addresses < 8:
            raise ValueError(f"the network {network} is too small: it has a router, a name server and a guest")
        places: dict[str, IPv4Address] = {}
        for key, given, offset in (("host", self.host, 2), ("dns", self.dns, 3), ("dhcp_start", self.dhcp_start, 15)):
            address = given if given is not None else network.network_address + offset
            if address not in network or address in (network.network_address, network.broadcast_address):
                raise ValueError(
                    f"{key} = {address} lies outside the network {network}; set {key}, or a larger network"
                )
            if address in places.values():
                raise ValueError(f"{key} = {address} is taken already, by the network's host or dns")
            places[key] = address
        if mtu is not None and not MTU_MIN <= mtu <= MTU_MAX:
            raise ValueError(f'with backend = "user" the mtu is from {MTU_MIN} to {MTU_MAX}, not {mtu}')
        forwards = []
        for text in self.forwards or ():
            forward = parse_forward(text)
            guest = forward.guest or places["dhcp_start"]
            if guest not in network:
                raise ValueError(f"forwards: {text}: {guest} lies outside the network {network}")
            forwards.append((forward.udp, str(forward.host), forward.host_port, str(guest), forward.guest_port))
        return {
            "network": str(network),
            **{key: str(address) for key, address in places.items()},
            "hostname": self.hostname or "",
            "bootfile": self.bootfile or "",
            "tftp": "" if self.tftp is None else os.fspath(self.tftp.absolute()),
            "restricted": bool(self.restrict),
            "host_loopback": bool(self.host_loopback),
            "ipv6": self.ipv6 is not False,
            "mtu": mtu or 0,
            "forwards": forwards,
        }


class UserPeer:
    """A user network. ``fd`` is where its frames are, one a message."""

    def __init__(self, device: str, setup: dict[str, Any]) -> None:
        """``HostError`` says why it cannot be had: the library is missing, a forwarded port is taken."""
        self._log = structlog.get_logger().bind(device=device)
        self._setup = setup
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.fd = OwnedFd(ours.detach())
        # Kept, so that frames wait here for the next process.
        self._theirs = OwnedFd(theirs.detach())
        try:
            self._process = self._start()
        except BaseException:
            self._close_fds()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        number = self._theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "virtio.usernet", str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(number,),
            start_new_session=True,  # a Ctrl-C in the daemon's terminal is the daemon's
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(self._setup).encode() + b"\n")
                process.stdin.flush()
            readable, _, _ = select.select([process.stdout], [], [], START_MAX)
            answer = process.stdout.readline().decode(errors="replace").strip() if readable else "it does not start"
            if answer != "ready":
                raise HostError(answer or f"the user network ended at its start: {_words(process)}")
        except BaseException:
            _stop(process)
            raise
        return process

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Watch over the process."""
        task_status.started()
        delay = RESTART_MIN
        while True:
            since = trio.current_time()
            await self._watch(self._process)
            if trio.current_time() - since > RESTART_MAX:
                delay = RESTART_MIN
            while True:
                await trio.sleep(delay)
                delay = min(2 * delay, RESTART_MAX)
                try:
                    self._process = await trio.to_thread.run_sync(self._start)
                except HostError as error:
                    self._log.error("user network cannot be started", error=str(error))
                else:
                    break
            self._log.info("user network started anew")

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Returns when the process has ended, with its end told."""
        assert process.stderr is not None
        with OwnedFd(os.pidfd_open(process.pid)) as pidfd:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, process.stderr.fileno())
                await trio.lowlevel.wait_readable(pidfd.fileno())
                nursery.cancel_scope.cancel()
        code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        self._log.error("user network ended: the guest's connections are lost", how=how)
        _stop(process)

    async def _listen(self, fd: int) -> None:
        """Log the first lines of what the process says."""
        told = 0
        async with trio.lowlevel.FdStream(os.dup(fd)) as stream:
            async for chunk in stream:
                for line in chunk.decode(errors="backslashreplace").splitlines():
                    told += 1
                    if told <= WORDS_MAX:
                        self._log.warning("user network says", line="".join(c for c in line if c.isprintable()))

    def close(self) -> None:
        _stop(self._process)
        self._close_fds()

    def _close_fds(self) -> None:
        self.fd.close()
        self._theirs.close()


def _words(process: subprocess.Popen[bytes]) -> str:
    """The last line of what a process that has ended said."""
    assert process.stderr is not None
    process.kill()
    lines = process.stderr.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it, by ending its input, and wait."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(STOP_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
