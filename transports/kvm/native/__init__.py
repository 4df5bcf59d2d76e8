"""The compiled machine: ``ffi``, ``lib``, and the one place where its codes become exceptions."""

from __future__ import annotations

import os
from typing import Final

from transports._vmm import ffi, lib
from virtio.errors import HostError

__all__ = ["check", "ffi", "lib"]

_OWN_CODES: Final[dict[int, str]] = {
    lib.VMM_E_WINDOWS: f"a VM has room for {lib.VMM_WINDOWS_MAX} devices",
    lib.VMM_E_OVERLAP: "the addresses or the port are taken already",
    lib.VMM_E_RUNNING: "not while the VM runs",
}


def check(code: int, what: str) -> int:
    """Return ``code`` when it is a success (>= 0), else raise ``HostError`` that says ``what`` failed and why."""
    if code >= 0:
        return code
    if code in _OWN_CODES:
        raise HostError(f"{what}: {_OWN_CODES[code]}")
    raise HostError(f"{what}: {os.strerror(-code)}", errno=-code)
