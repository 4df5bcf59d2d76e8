"""What no option of QEMU says about the hypercall doorbell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Final

from config.loader import Config

NO_HYPERCALL_SOCKET: Final = (
    'there is no socket where QEMU could report; add to [daemon]: hypercall_socket = "/run/hyperbell/hypercall.sock"'
)


def hypercall_notes(config: Config, *, q35: bool, vm: Sequence[str] = (), stable: bool = False) -> Iterator[str]:
    """``vm``: what hyperbell qemu must be given too. ``stable``: a key is among it."""
    if config.daemon.hypercall_socket is None:
        yield NO_HYPERCALL_SOCKET
    start = shlex.join(["hyperbell", "qemu", "--config", str(config.path), *vm])
    yield f"start QEMU through: {start} -- qemu-system-x86_64 -accel kvm ..."
    if not stable:
        yield "a VM that migrates or is saved needs a stable key there: --secret FILE --uuid UUID, or --key"
    yield "the guest loses KVM's paravirtual spinlocks, IPIs and yield, and ptp_kvm: their hypercalls would go astray"
    if q35:
        yield (
            "on q35 every PCI Express root port takes 4096 of the 65536 I/O ports: some 10 to 15 devices get a port "
            "doorbell and with it the hypercall, the others ring by memory write only"
        )
