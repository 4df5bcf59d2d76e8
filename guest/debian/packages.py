"""Where packages come from: this machine's own Debian, or another suite of it. Nothing is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from guest.debian.cache import PrepareError, Progress
from guest.debian.suites import first_dependencies, open_suite
from guest.debian.tools import run_tool

APT_ADVICE = "run 'apt-get update' as root and try again (Debian's own package sources are enough)"


class Packages(Protocol):
    """One Debian. Both raise ``PrepareError`` with advice."""

    def depends(self, package: str) -> list[str]:
        """The names of the packages that ``package`` depends on; of alternatives the first."""

    def download(self, package: str, into: Path) -> Path:
        """The archive of ``package``, in the empty folder ``into``."""


def packages_of(suite: str, progress: Progress) -> Packages:
    """``suite``'s packages; for ``""`` those of this machine's own Debian."""
    return open_suite(suite, progress) if suite else OwnPackages(progress)


class OwnPackages:
    """The packages that this machine's apt knows."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def depends(self, package: str) -> list[str]:
        try:
            text = run_tool(["apt-cache", "show", "--no-all-versions", package], f"looking for {package}")
        except PrepareError as error:
            raise PrepareError(f"{error}; {APT_ADVICE}") from error
        return first_dependencies(text)

    def download(self, package: str, into: Path) -> Path:
        self._progress(f"fetching {package} with apt-get; it is not installed")
        command = ["apt-get", "download", package]
        if os.geteuid() == 0:
            # apt drops root for a download and then cannot write here; it would say so and go on as root anyway.
            command[1:1] = ["-o", "APT::Sandbox::User=root"]
        try:
            run_tool(command, f"fetching {package}", cwd=into)
        except PrepareError as error:
            raise PrepareError(f"{error}; {APT_ADVICE}") from error
        archives = list(into.glob("*.deb"))
        if len(archives) != 1:
            raise PrepareError(f"apt-get download {package} left {len(archives)} packages instead of one; {APT_ADVICE}")
        return archives[0]
