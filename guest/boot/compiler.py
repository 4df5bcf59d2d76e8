"""Running the C compiler for what guests execute."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from guest.debian.cache import PrepareError


def run_compiler(command: Sequence[str], failed: str, packages: str) -> None:
    """Run ``command``. ``PrepareError`` names the Debian ``packages`` where there is no compiler; when it refuses, it
    begins with ``failed`` and goes on with the compiler's own words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError as error:
        raise PrepareError(f"{command[0]} is not installed; install the Debian {packages}") from error
    if done.returncode != 0:
        raise PrepareError(f"{failed}:\n{done.stderr.strip()}")
