"""The calls of Firecracker's API that attach the configured disks. It has no other vhost-user devices."""

from __future__ import annotations

import json
import re
import shlex
from typing import Final

from daemon.attach.request import Answer, Request, cannot_listen, connects

API_SOCKET: Final = "/run/firecracker.socket"  # Firecracker's own default


def attach(request: Request) -> Answer:
    """A call for each disk, to be made before InstanceStart."""
    answer = Answer()
    calls: list[str] = []
    taken: set[str] = set()
    several: list[str] = []
    for device in request.devices:
        if device.common.type != "blk":
            answer.refused.append(
                f'device "{device.name}": Firecracker has vhost-user front-ends for disks only, and this is a '
                f"{device.common.type} device"
            )
        elif connects(device):
            answer.refused.append(cannot_listen(device, "Firecracker"))
        else:
            calls.append(_call(_drive_id(device.name, taken), str(device.common.socket)))
            several += [device.name] if device.queues > 1 else []
    if not calls:
        return answer
    answer.text = "\n".join(calls)
    answer.notes.append(
        f"the calls go to --api-sock {API_SOCKET}, before InstanceStart; Firecracker shares its memory by itself"
    )
    if several:
        answer.notes.append(f"Firecracker drives one queue of {', '.join(several)}, however many there are")
    answer.notes.append("Firecracker cannot reconnect: after a restart of the daemon disks are dead until a new guest")
    return answer


def _call(drive: str, socket: str) -> str:
    # Without Writeback the guest is offered no FLUSH, and what it believes durable is not.
    body = {"drive_id": drive, "socket": socket, "is_root_device": False, "cache_type": "Writeback"}
    words = ["curl", "--fail-with-body", "--unix-socket", API_SOCKET, "-X", "PUT", f"http://localhost/drives/{drive}"]
    return shlex.join([*words, "-H", "Content-Type: application/json", "-d", json.dumps(body)])


def _drive_id(name: str, taken: set[str]) -> str:
    """``name`` in letters, digits and underlines, which is all that Firecracker takes; each once."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    drive, number = plain, 2
    while drive in taken:
        drive, number = f"{plain}_{number}", number + 1
    taken.add(drive)
    return drive
