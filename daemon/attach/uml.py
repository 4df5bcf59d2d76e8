"""The command line of User-mode Linux that attaches the configured devices."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from typing import Final, NoReturn

from config.loader import Device
from daemon.attach.request import Answer, Request, cannot_listen, connects, virtio_id
from virtio.errors import HostError

DEBIANS: Final = frozenset({1, 2, 3, 19})
"""Types that the kernel of Debian's user-mode-linux (6.1, 7.2) has drivers for."""


def attach(request: Request) -> Answer:
    """The words to put behind ``linux``."""
    words, answer = kernel_words(request)
    answer.text = shlex.join(words) if words else ""
    return answer


def kernel_words(request: Request) -> tuple[list[str], Answer]:
    """Words of the kernel's command line, which is that of the process; and what is to be said."""
    answer, words, strange = Answer(), [], []
    for device in request.devices:
        fault = _why_not(device)
        if fault:
            answer.refused.append(fault)
            continue
        words.append(f"virtio_uml.device={device.common.socket}:{virtio_id(device)}")
        strange += [f"{device.name} ({device.common.type})"] if virtio_id(device) not in DEBIANS else []
    if not words:
        return [], answer
    if strange:
        answer.notes.append(
            f"the kernel of Debian's user-mode-linux has no driver for {', '.join(strange)}: build one "
            "with ARCH=um and that driver"
        )
    answer.notes.append("User-mode Linux cannot reconnect: when the daemon ends, the guest loses its devices")
    return [f"mem={request.memory}", *words], answer


def _why_not(device: Device) -> str:
    """Why it cannot have ``device``; "" when it can."""
    if connects(device):
        return cannot_listen(device, "User-mode Linux")
    # The kernel ends the path at the first colon, and its command line is split at spaces, and at quotes.
    path = str(device.common.socket)
    if not path.isprintable() or set(path) & set(" :\"'"):
        return (
            f'device "{device.name}": User-mode Linux takes no path with a colon, a space or a quote, as in {path}; '
            "give it another socket"
        )
    return ""


def run(command: Sequence[str], words: Sequence[str]) -> NoReturn:
    """Become ``command`` with ``words`` behind it. ``HostError``: it cannot be started."""
    program = shutil.which(command[0])
    if program is None:
        raise HostError(
            f"there is no program {command[0]}; install it (Debian: user-mode-linux, whose program is linux.uml), "
            "or give its path"
        )
    try:
        os.execv(program, [*command, *words])
    except OSError as error:
        raise HostError(f"{program} cannot be started: {error.strerror}", errno=error.errno or 0) from error
