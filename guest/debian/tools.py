"""Run a tool of this machine, and turn its failure into one line of advice."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from guest.debian.cache import PrepareError

TIMEOUT_SECONDS = 600


def run_tool(
    command: list[str],
    what: str,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    seconds: int = TIMEOUT_SECONDS,
) -> str:
    """The standard output of ``command``; ``PrepareError`` when it cannot run or fails. ``what`` begins its text."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
        )
    except FileNotFoundError as error:
        raise PrepareError(f"{what}: '{command[0]}' is not installed on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise PrepareError(f"{what}: '{command[0]}' did not finish within {seconds // 60} minutes") from error
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        errors = [line for line in reason if line.startswith("E:") or re.search(r"\berror\b", line)] or reason[-1:]
        raise PrepareError(f"{what}: {' '.join(errors)}")
    return done.stdout
