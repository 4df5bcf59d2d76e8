"""Which QEMU the options are for: what the operator says, or what is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Final, NamedTuple

from virtio.errors import HostError

PROGRAM: Final = "qemu-system-x86_64"
_ASK_SECONDS: Final = 20


class QemuVersion(NamedTuple):
    """As QEMU counts: 7.2, 11.1, with the number of the stable update where it is known."""

    major: int
    minor: int
    update: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" + (f".{self.update}" if self.update else "")


OLDEST: Final = QemuVersion(7, 2)
NEWEST: Final = QemuVersion(11, 1)
"""The newest one whose front-ends are known here; later ones are told the same."""


def parse_version(text: str) -> QemuVersion:
    """``ValueError``: no version, or one that is too old."""
    match = re.fullmatch(r"([0-9]{1,3})\.([0-9]{1,3})(?:\.([0-9]{1,3}))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a version of QEMU such as {OLDEST} or {NEWEST}")
    version = QemuVersion(int(match[1]), int(match[2]), int(match[3] or 0))
    if version < OLDEST:
        raise ValueError(f"QEMU {version} is too old; its devices are known from {OLDEST} on")
    return version


def installed_version(program: str = PROGRAM) -> QemuVersion | None:
    """The version of the QEMU of this host; ``None``: there is none. ``HostError``: it does not say, or is too old."""
    path = shutil.which(program)
    if path is None:
        return None
    advice = "say which QEMU it is for: --qemu VERSION"
    try:
        asked = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=_ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{path} --version cannot be asked ({error}); {advice}") from error
    match = re.search(r"version (\d+\.\d+(?:\.\d+)?)", asked.stdout)
    if asked.returncode != 0 or match is None:
        raise HostError(f"{path} --version does not say a version (status {asked.returncode}); {advice}")
    try:
        return parse_version(match[1])
    except ValueError as error:
        raise HostError(f"{path}: {error}; {advice}") from None
