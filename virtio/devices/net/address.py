"""The address of a network interface, as its key says it or as it is made."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Final

MACHINE_IDS: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
"""See machine-id(5): 32 hexadecimal digits, drawn once when the host was installed."""


def parse_mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def mac_from_name(name: str) -> bytes:
    """The address of the interface ``name`` of this host: always the same here, and another one on any other host.

    Bit 1 of the first byte: locally administered, bit 0 clear: of one station. machine-id(5) wants an id not to be
    shown, and 46 bits of its hash do not show it.
    """
    digest = hashlib.sha256(b"hyperbell mac " + host_identity() + b" " + name.encode()).digest()
    return bytes([digest[0] & 0xFC | 2]) + digest[1:6]


@cache
def host_identity() -> bytes:
    """What tells this host from others and outlives a restart: its machine id, or its name where it has none."""
    for file in MACHINE_IDS:
        try:
            text = file.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if len(text) == 32 and text.isalnum():  # and not "uninitialized", as in an image that was never started
            return text.encode()
    return os.uname().nodename.encode()
