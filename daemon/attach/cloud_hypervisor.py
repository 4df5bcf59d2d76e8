"""The options of cloud-hypervisor (53) that attach the configured devices."""

from __future__ import annotations

from typing import Final

from config.loader import Device
from daemon.attach.qemu import pasteable
from daemon.attach.request import (
    Answer,
    Request,
    cannot_listen,
    connects,
    mac,
    net_options,
    queue_size,
    virtio_id,
    virtqueues,
)

QUEUE_SIZE_MAX: Final = 32768
BLOCK_QUEUE_SIZE_MIN: Final = 4  # it wants more than 2 entries
RECONNECT_SECONDS: Final = 60
UNSUPPORTED_IDS: Final = {23: "iommu", 35: "watchdog"}  # its generic device refuses these


def attach(request: Request) -> Answer:
    """Memory, and an option for each device: --disk, --net, and --generic-vhost-user for every other type."""
    answer = Answer()
    options = [["--memory", f"size={request.memory},shared=on"]]
    most_queues = 1
    for device in request.devices:
        fault = _why_not(device)
        if fault:
            answer.refused.append(fault)
            continue
        options.append(_option(device))
        if device.common.type in ("blk", "net"):
            most_queues = max(most_queues, device.queues)
    if len(options) == 1:
        return answer
    if most_queues > 1:
        options.insert(0, ["--cpus", f"boot={most_queues}"])
        answer.notes.append(f"a disk's queues and a network's pairs of queues need {most_queues} CPUs or more")
    answer.notes.append(
        f"cloud-hypervisor waits {RECONNECT_SECONDS} s for a daemon that restarts; a device that stays away longer is "
        "dead until the guest is started again"
    )
    answer.text = pasteable(options)
    return answer


def _why_not(device: Device) -> str:
    """Why it cannot have ``device``; "" when it can."""
    if connects(device) and device.common.type != "net":
        return cannot_listen(device, "cloud-hypervisor (but for its network interfaces)")
    if device.common.type == "blk" and device.common.queue_size < BLOCK_QUEUE_SIZE_MIN:
        return (
            f'device "{device.name}": the queues of a disk have {BLOCK_QUEUE_SIZE_MIN} entries or more under '
            "cloud-hypervisor; set queue_size accordingly, or leave it out"
        )
    kind = UNSUPPORTED_IDS.get(virtio_id(device))
    if kind is not None:
        return f'device "{device.name}": cloud-hypervisor refuses {kind} devices over vhost-user'
    return ""


def _option(device: Device) -> list[str]:
    size = queue_size(device, QUEUE_SIZE_MAX)
    socket = _quoted(str(device.common.socket))
    if device.common.type == "blk":
        queues = f"num_queues={device.queues},queue_size={size}"
        return ["--disk", f"vhost_user=on,socket={socket},{queues},id={device.name}"]
    if device.common.type == "net":
        mode = "server" if connects(device) else "client"  # the role of cloud-hypervisor
        mtu = net_options(device).mtu
        more = "" if mtu is None else f",mtu={mtu}"
        return [
            "--net",
            f"vhost_user=on,socket={socket},vhost_mode={mode},mac={mac(device)},num_queues={2 * device.queues},"
            f"queue_size={size},id={device.name}{more}",
        ]
    sizes = ",".join([str(size)] * virtqueues(device))
    return [
        "--generic-vhost-user",
        f"socket={socket},device_type={virtio_id(device)},queue_sizes=[{sizes}],id={device.name}",
    ]


def _quoted(text: str) -> str:
    """Commas and brackets stand for themselves between double quotes; a double quote is written twice."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set(' ,[]"') else text
