"""The control socket: one JSON object a line in, one a line out. ``hyperbell show`` is its client.

Commands: ``{"command": "list"}`` names the devices, ``{"command": "stats"}`` gives every counter,
``{"command": "hypercall", "device": NAME, "policy": "offer"}`` (or withhold, auto) changes who may ring by hypercall,
``{"command": "link", "device": NAME, "state": "down"}`` (or up) pulls a network interface's cable, and
``{"command": "reopen", "device": NAME}`` opens a disk's image again, ``retry`` tries what a stopped disk keeps.
An answer has ``"ok"``; when it is false, ``"error"`` says why. The socket has mode 0600: its user is the daemon's
user (or root).
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from daemon.doorbells.policies import POLICIES, Policies
from daemon.running.disks import COMMANDS as DISK_COMMANDS
from daemon.running.disks import Disks
from daemon.running.links import STATES, Links, guest_is_told
from daemon.state import DaemonState, DeviceState, version
from virtio.clients import Door, Place, Places
from virtio.errors import HostError
from virtio.socket_file import Listen, SocketFile

LINE_MAX: Final = 4096  # bytes of one request
CLIENTS_MAX: Final = 16  # beyond, the one that has been idle for longest gives way
IDLE_SECONDS: Final = 60.0  # a client that says nothing for so long is let go
ANSWER_SECONDS: Final = 5.0  # how long `hyperbell show` waits

_NOT_CONTROL: Final = "this is not a control socket (it may be a device's); the one to ask is [daemon] control"

Answer = dict[str, Any]


async def serve_control(
    path: Path,
    snapshot: Callable[[], DaemonState],
    policies: Policies | None = None,
    links: Links | None = None,
    disks: Disks | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on the Unix socket ``path`` until cancelled, and remove it then; started once it listens.

    Raises ``HostError`` when the socket cannot be made or another daemon answers on it.
    """
    try:
        socket_file = SocketFile(Listen(path, mode=0o600))
    except HostError as error:
        raise HostError(f"[daemon] control: {error}", errno=error.errno) from error
    try:
        listener = trio.socket.from_stdlib_socket(socket_file.socket)
        task_status.started()
        await _accept(listener, partial(_answer, snapshot=snapshot, policies=policies, links=links, disks=disks))
    finally:
        socket_file.close()


async def _answer(
    line: bytes,
    *,
    snapshot: Callable[[], DaemonState],
    policies: Policies | None,
    links: Links | None,
    disks: Disks | None,
) -> Answer:
    if disks is not None:
        request = _request(line)
        if request is not None and (command := request.get("command")) in DISK_COMMANDS:
            return await disks.answer(command, request)
    return respond(line, snapshot(), policies, links, DISK_COMMANDS if disks is not None else ())


async def _accept(listener: trio.socket.SocketType, answer: Callable[[bytes], Awaitable[Answer]]) -> None:
    door, places = Door(listener, "a client of the control socket"), Places(CLIENTS_MAX)
    async with trio.open_nursery() as nursery:
        while True:
            connection, place = await places.accept(door)
            nursery.start_soon(_serve_client, connection, places, place, answer)


async def _serve_client(
    connection: trio.socket.SocketType, places: Places, place: Place, answer: Callable[[bytes], Awaitable[Answer]]
) -> None:
    stream = trio.SocketStream(connection)
    try:
        async with stream:
            with place.scope, contextlib.suppress(trio.BrokenResourceError, trio.TooSlowError):
                async for line in _lines(stream):
                    reply = json.dumps(await answer(line), default=str).encode()
                    places.active(place)
                    with trio.fail_after(IDLE_SECONDS):
                        await stream.send_all(reply + b"\n")
    finally:
        places.leave(place)


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    """Whole lines from ``stream`` until it ends, a line is too long, or nothing comes for too long."""
    buffer = b""
    while len(buffer) <= LINE_MAX:
        line, newline, rest = buffer.partition(b"\n")
        if newline:
            buffer = rest
            yield line
            continue
        with trio.fail_after(IDLE_SECONDS):
            received = await stream.receive_some(LINE_MAX)
        if not received:
            return
        buffer += received
    yield buffer


def _request(line: bytes) -> Mapping[str, Any] | None:
    try:
        request = json.loads(line) if len(line) <= LINE_MAX else None
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, Mapping) else None


def respond(
    line: bytes,
    state: DaemonState,
    policies: Policies | None = None,
    links: Links | None = None,
    others: Collection[str] = (),
) -> Answer:
    """The answer to one request line, which may change ``policies`` or ``links``; no I/O, so it is tested without a
    socket. ``others``: further commands that there are."""
    request = _request(line)
    if request is None:
        return {"ok": False, "error": 'a request is one line of JSON such as {"command": "list"}'}
    command = request.get("command")
    if command == "list":
        devices = [_summary(device) for device in state.devices]
        return {"ok": True, "version": version(), "devices": devices, "failed": [asdict(one) for one in state.failed]}
    if command == "stats":
        return {"ok": True, "version": version(), **asdict(state)}
    if command == "hypercall" and policies is not None:
        return _change_policy(request, state, policies)
    if command == "link" and links is not None:
        return _change_link(request, state, links)
    more = {"hypercall": policies, "link": links}
    commands = ", ".join(["list", "stats", *(name for name, taker in more.items() if taker is not None), *others])
    return {"ok": False, "error": f"there is no command {json.dumps(command)}; there are: {commands}"}


def _change_link(request: Mapping[str, Any], state: DaemonState, links: Links) -> Answer:
    device, wanted = request.get("device"), request.get("state")
    if not isinstance(device, str) or not isinstance(wanted, str) or wanted not in STATES:
        example = '{"command": "link", "device": "lan", "state": "down"}'
        return {"ok": False, "error": f"a link is {' or '.join(STATES)}, for instance: {example}"}
    try:
        changed = links.set(device, STATES[wanted])
    except HostError as error:
        return {"ok": False, "error": str(error)}
    structlog.get_logger().info("link", device=device, state=wanted, changed=changed)
    told = guest_is_told(device, state)
    return {"ok": True, "device": device, "state": wanted, "changed": changed, "guest_is_told": told}


def _change_policy(request: Mapping[str, Any], state: DaemonState, policies: Policies) -> Answer:
    device, wanted = request.get("device"), request.get("policy")
    policy = next((one for one in POLICIES if one == wanted), None)
    if not isinstance(device, str) or policy is None:
        example = '{"command": "hypercall", "device": "disk", "policy": "offer"}'
        return {"ok": False, "error": f"a policy is {', '.join(POLICIES)}, for instance: {example}"}
    try:
        changed = policies.set(device, policy)
    except HostError as error:
        return {"ok": False, "error": str(error)}
    structlog.get_logger().info("who may ring by hypercall", device=device, policy=policy, changed=changed)
    reaches = state.machine is not None or bool(state.vms)
    return {"ok": True, "device": device, "policy": policy, "changed": changed, "reaches_vms": reaches}


def _summary(device: DeviceState) -> Answer:
    return {
        "name": device.backend.device,
        "type": device.backend.type,
        "transport": device.transport,
        "socket": None if device.socket is None else str(device.socket),
        "queues": len(device.backend.queues),
        "connected": device.connected,
    }


def ask(path: Path, command: str, *, wait_seconds: float = ANSWER_SECONDS, **arguments: str) -> Answer:
    """Send one command to the daemon at ``path`` and give its answer; blocks up to ``wait_seconds``.

    Raises ``HostError`` when nothing answers, or when what answers refuses.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(wait_seconds)
            client.connect(str(path))
            client.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            with client.makefile("rb") as reader:
                answer = json.loads(reader.readline())
    except (ConnectionRefusedError, FileNotFoundError) as error:
        raise HostError(f"no daemon answers on {path}; is hyperbell serve running with this control socket?") from error
    except (ConnectionResetError, BrokenPipeError) as error:
        raise HostError(f"{path}: {_NOT_CONTROL}, or the daemon has just ended") from error
    except OSError as error:
        reason = _NOT_CONTROL if error.errno == errno.EPROTOTYPE else error.strerror or error
        raise HostError(f"{path}: {reason}", errno=error.errno or 0) from error
    except ValueError as error:
        raise HostError(f"{path}: what answers there is not hyperbell, or {_NOT_CONTROL}") from error
    if not isinstance(answer, dict) or not answer.get("ok"):
        raise HostError(f"{path}: the daemon refused: {answer.get('error') if isinstance(answer, dict) else answer}")
    return answer
