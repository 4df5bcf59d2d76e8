"""The calls of libkrun's C interface that attach the configured devices."""

from __future__ import annotations

import os
from typing import Final

from config.loader import Device
from daemon.attach.request import Answer, Request, cannot_listen, connects, queue_size, virtio_id, virtqueues
from virtio import spec

QUEUE_SIZE_MAX: Final = 32768
TYPES: Final = {3: "CONSOLE", 4: "RNG", 17: "RTC", 18: "INPUT", 19: "VSOCK", 25: "SND", 36: "CAN"}
"""KRUN_VIRTIO_DEVICE_...: the types that libkrun.h has a name for. Others are given by number."""


def attach(request: Request) -> Answer:
    """A call for each device, before krun_start_enter()."""
    answer = Answer()
    calls = []
    for device in request.devices:
        if connects(device):
            answer.refused.append(cannot_listen(device, "libkrun"))
        else:
            calls.append(_call(device))
            if virtio_id(device) == spec.VIRTIO_ID_NET and not device.common.offer_config:
                answer.notes.append(
                    f'device "{device.name}": libkrun reads its address from the device; set offer_config = true'
                )
    if calls:
        answer.text = "\n".join(calls)
        answer.notes.append("ctx is of krun_create_ctx(); a call gives 0, or -ENOTSUP where vhost-user is not built in")
        answer.notes.append(
            "libkrun cannot reconnect: after a restart of the daemon devices are dead until a new guest"
        )
    return answer


def _call(device: Device) -> str:
    number = virtio_id(device)
    kind = f"KRUN_VIRTIO_DEVICE_{TYPES[number]}" if number in TYPES else str(number)
    count = virtqueues(device)
    sizes = ", ".join([str(queue_size(device, QUEUE_SIZE_MAX))] * count)
    return (
        f"krun_add_vhost_user_device(ctx, {kind}, {_c_string(os.fsencode(device.common.socket))},\n"
        f'                           "{device.name}", {count}, (uint16_t[]){{{sizes}}});'
    )


def _c_string(text: bytes) -> str:
    """A literal of C; three octal digits are complete whatever follows them."""
    plain = (chr(byte) if 0x20 <= byte < 0x7F and byte not in b'"\\?' else f"\\{byte:03o}" for byte in text)
    return '"' + "".join(plain) + '"'
