"""The compiled data plane: ``ffi``, ``lib``, and the one place where its codes become exceptions.

Only ``virtio.native`` imports it.
"""

from __future__ import annotations

import os
from typing import Final

from virtio._dataplane import ffi, lib
from virtio.errors import GuestError, HostError, KeptFullError

__all__ = ["FAULTS", "check", "ffi", "guest_error", "lib"]

_OWN_CODES: Final[dict[int, str]] = {
    lib.DP_E_SHORT_FILE: "the file ends before the region does (or is not a regular file)",
    lib.DP_E_NOT_EVENTFD: "not an eventfd",
    lib.DP_E_KEPT_FULL: "a blocking eventfd that the other side keeps full",
    lib.DP_E_NOT_NOTIFIER: "neither an eventfd nor a pipe's write end nor a Unix socket",
}

FAULTS: Final[dict[int, str]] = {
    lib.VQ_FAULT_AVAIL_INDEX: "the avail index jumped by more than the queue size",
    lib.VQ_FAULT_HEAD: "a chain's head is not a descriptor of the queue",
    lib.VQ_FAULT_HEAD_INFLIGHT: "a chain was made available again while it was in flight",
    lib.VQ_FAULT_NEXT: "a descriptor's next is outside its table",
    lib.VQ_FAULT_CHAIN_LENGTH: "a chain is too long, or loops",
    lib.VQ_FAULT_INDIRECT_FEATURE: "an indirect descriptor without VIRTIO_F_INDIRECT_DESC",
    lib.VQ_FAULT_INDIRECT_NESTED: "an indirect descriptor inside an indirect table",
    lib.VQ_FAULT_INDIRECT_NEXT: "an indirect descriptor that is chained",
    lib.VQ_FAULT_INDIRECT_SIZE: "an indirect table of impossible size",
    lib.VQ_FAULT_ORDER: "a device-readable descriptor after a device-writable one",
    lib.VQ_FAULT_ADDRESS: "a buffer lies outside guest memory",
    lib.VQ_FAULT_PIECES: "a chain lies in too many pieces of guest memory, of regions or of an IOMMU",
    lib.VQ_FAULT_EMPTY_BUFFER: "a descriptor of length 0",
    lib.VQ_FAULT_TOTAL_LENGTH: "a chain of more than 4 GiB",
    lib.VQ_FAULT_RING_ADDRESS: "the ring lies outside guest memory",
    lib.VQ_FAULT_RING_PIECES: "the ring lies in pieces that are smaller than a page of 4 KiB",
    lib.VQ_FAULT_MEMORY_GONE: "the file behind guest memory was truncated",
    lib.VQ_FAULT_SHAPE: "a request without the parts its device needs",
    lib.VQ_FAULT_CALL_FD: "the call eventfd is kept full by the other side",
    lib.VQ_FAULT_KICK_FD: "its kick eventfd counts down by one (EFD_SEMAPHORE) from a number without end",
    lib.VQ_FAULT_KICK_POLL: "the kernel does not watch its kick eventfd",
    lib.VQ_FAULT_REQUEST_MAX: "a request of more bytes than its device takes (request_max)",
    lib.VQ_FAULT_DEVICE: "its device failed, as the log says",
}


def check(code: int, what: str) -> int:
    """Return ``code`` when it is a success (>= 0), else raise ``HostError`` that says ``what`` failed and why."""
    if code >= 0:
        return code
    if code == lib.DP_E_KEPT_FULL:
        raise KeptFullError(f"{what}: {_OWN_CODES[code]}")
    if code in _OWN_CODES:
        raise HostError(f"{what}: {_OWN_CODES[code]}")
    raise HostError(f"{what}: {os.strerror(-code)}", errno=-code)


def guest_error(queue_index: int, fault: int, head: int, gpa: int, length: int) -> GuestError:
    """The ``GuestError`` for a ``VQ_FAULT_*`` code and its details."""
    reason = FAULTS.get(fault, f"fault {fault}")
    where = f" (head {head}, address {gpa:#x}, length {length:#x})"
    if fault == lib.VQ_FAULT_REQUEST_MAX:
        where = f": head {head} has {gpa} bytes to read and room for {length}"
    elif fault == lib.VQ_FAULT_KICK_POLL:
        where = f": {os.strerror(length)}"
    elif fault == lib.VQ_FAULT_DEVICE:
        where = ""
    return GuestError(
        f"queue {queue_index} is broken: {reason}{where}",
        queue_index=queue_index,
        head=head,
        gpa=gpa,
        length=length,
        fault=fault,
    )
