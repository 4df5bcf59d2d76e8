"""The virtual machine monitors that ``hyperbell attach`` knows: another one is a module and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from daemon.attach import cloud_hypervisor, crosvm, firecracker, libkrun, libvirt, qemu, uml
from daemon.attach.request import Answer, Request

VMMS: Final[Mapping[str, Callable[[Request], Answer]]] = {
    "qemu": qemu.attach,
    "libvirt": libvirt.attach,
    "cloud-hypervisor": cloud_hypervisor.attach,
    "firecracker": firecracker.attach,
    "crosvm": crosvm.attach,
    "libkrun": libkrun.attach,
    "uml": uml.attach,
}
