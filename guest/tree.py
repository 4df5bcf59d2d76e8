"""An unpacked tree of packages: its programs run here with the tree's own loader and libraries."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guest.cache import PrepareError, store_file
from guest.tools import run_tool

MERGED = ("bin", "sbin", "lib", "lib64")  # links into usr/: some packages still use one name, some the other
LOADER = "usr/lib64/ld-linux-x86-64.so.2"
LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True)
class Tree:
    """The packages unpacked in ``folder``."""

    folder: Path

    def command(self, program: str) -> list[str]:
        """The words that run ``program`` (a path in the tree). Raises ``PrepareError`` where it is not there."""
        path = self.folder / program
        if not path.exists():
            raise PrepareError(f"the packages unpacked in {self.folder} have no {program}")
        libraries = self.folder / LIBRARIES
        folders = [libraries, *(each for each in sorted(libraries.glob("*/")) if any(each.glob("lib*.so*")))]
        return [
            str(self.folder / LOADER),
            "--library-path",
            ":".join(map(str, folders)),
            "--argv0",
            str(path),
            str(path),
        ]

    def libraries(self, program: str) -> list[Path]:
        """What the tree's loader loads for ``program``, itself included. Raises ``PrepareError``."""
        *loader, _, _, path = self.command(program)
        listed = run_tool([*loader, "--list", path], f"the libraries of {program}")
        missing = re.findall(r"^\s*(\S+) => not found", listed, re.MULTILINE)
        if missing:
            raise PrepareError(f"the packages unpacked in {self.folder} have not {', '.join(missing)} for {program}")
        found = [Path(name) for name in re.findall(r"(/\S+) \(0x", listed)]
        return [self.folder / LOADER, *(path for path in found if path.name != Path(LOADER).name)]

    def wrapper(
        self, place: Path, program: str, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Path:
        """A shell script at ``place`` that runs ``program`` of the tree, ``arguments`` before those it is given."""
        settings = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in (environment or {}).items())
        text = f'#!/bin/sh\n{settings}exec {shlex.join([*self.command(program), *arguments])} "$@"\n'
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists() or place.read_text() != text:
            store_file(place, text.encode(), 0o755)
        return place


def unpack_archives(archives: Sequence[Path], folder: Path) -> None:
    """Unpack Debian packages into the new ``folder``, all into one ``usr``."""
    (folder / "usr").mkdir(parents=True)
    for name in MERGED:
        (folder / "usr" / name).mkdir()
        (folder / name).symlink_to(f"usr/{name}")
    for archive in archives:
        # Not dpkg -x: it replaces such a link by a folder of the package's.
        script = 'dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink --no-same-owner -C "$2"'
        command = ["bash", "-o", "pipefail", "-c", script, "unpack", str(archive), str(folder)]
        run_tool(command, f"unpacking {archive.name}")
