"""The options of crosvm that attach the configured devices."""

from __future__ import annotations

from typing import Final

from daemon.attach.qemu import pasteable
from daemon.attach.request import Answer, Request, cannot_listen, connects, mebibytes, queue_size, virtio_id

QUEUE_SIZE_MAX: Final = 32768
CONNECT_TIMEOUT_MS: Final = 10_000
TYPES: Final = {1: "net", 2: "block", 3: "console", 4: "rng", 18: "input", 19: "vsock", 25: "sound", 32: "scmi"}
"""Its names of device types by virtio_id, as far as a device here can be of one."""


def attach(request: Request) -> Answer:
    """Memory, and an option for each device whose type crosvm has a name for."""
    answer = Answer()
    options: list[list[str]] = []
    for device in request.devices:
        kind = TYPES.get(virtio_id(device))
        if kind is None:
            answer.refused.append(
                f'device "{device.name}": crosvm has no vhost-user front-end for a {device.common.type} device '
                f"(type number {virtio_id(device)})"
            )
        elif connects(device):
            answer.refused.append(cannot_listen(device, "crosvm"))
        else:
            socket = _quoted(str(device.common.socket))
            size = queue_size(device, QUEUE_SIZE_MAX)
            options.append(["--vhost-user", f"type={kind},socket={socket},max-queue-size={size}"])
    if options:
        timeout = ["--vhost-user-connect-timeout-ms", str(CONNECT_TIMEOUT_MS)]
        answer.text = pasteable([["--mem", str(mebibytes(request.memory))], timeout, *options])
        answer.notes.append("crosvm cannot reconnect: after a restart of the daemon devices are dead until a new guest")
    return answer


def _quoted(text: str) -> str:
    """A value with anything but the plainest characters stands in double quotes, with backslashes inside."""
    if all(character.isalnum() or character in "/._-" for character in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
