"""An unpacked tree of packages: its programs run here with the tree's own loader and libraries."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guest.debian.cache import PrepareError, store_file
from guest.debian.elf import with_interpreter
from guest.debian.tools import run_tool

MERGED = ("bin", "sbin", "lib", "lib64")  # links into usr/: some packages still use one name, some the other
LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"  # by its own name: Debian 12 links lib64/ to the machine's
LIBRARIES = "usr/lib/x86_64-linux-gnu"
ROOT_LINKS = {"usr/bin/awk": "mawk", "usr/bin/sh": "dash"}  # made by scripts of packages, which do not run in a tree
ROOT_FOLDERS = ("dev", "mnt", "proc", "tmp")
WORK_PLACE = "/mnt"
# A mount namespace of its own: nothing of it is left afterwards, however it ends. Linux 7.3's objtool reads /proc.
ENTER = """\
mount --rbind /dev "$1/dev" && mount --rbind /proc "$1/proc" && mount --bind "$2" "$1$3" || exit
cd / && tree=$1 && shift 3 && exec chroot "$tree" "$@"
"""


@dataclass(frozen=True)
class Tree:
    """The packages unpacked in ``folder``."""

    folder: Path

    def command(self, program: str) -> list[str]:
        """The words that run ``program`` (a path in the tree). Raises ``PrepareError`` where it is not there."""
        path = self.folder / program
        if not path.exists():
            raise PrepareError(f"the packages unpacked in {self.folder} have no {program}")
        return [
            str(self.folder / LOADER),
            "--library-path",
            self._library_path(),
            "--argv0",
            str(path),
            str(path),
        ]

    def _library_path(self) -> str:
        libraries = self.folder / LIBRARIES
        folders = [libraries, *(each for each in sorted(libraries.glob("*/")) if any(each.glob("lib*.so*")))]
        return ":".join(map(str, folders))

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
        return stored_program(place, text.encode())

    def restarting_wrapper(self, place: Path, program: str) -> Path:
        """As ``wrapper``, for a program that starts /proc/self/exe again, which would be the loader.

        A copy of it, beside ``place``, has the tree's loader as its interpreter. Programs that it starts get the
        tree's libraries too.
        """
        content = with_interpreter((self.folder / program).read_bytes(), self.folder / LOADER)
        copy = stored_program(place.with_name(f"{place.name}-own"), content)
        words = f'LD_LIBRARY_PATH={shlex.quote(self._library_path())} exec {shlex.quote(str(copy))} "$@"'
        return stored_program(place, f"#!/bin/sh\n{words}\n".encode())

    def become_root(self) -> None:
        """Make the tree what ``inside`` needs. Its packages must have mawk and dash."""
        for name, target in ROOT_LINKS.items():
            if not (self.folder / name).exists():
                (self.folder / name).symlink_to(target)
        for name in ROOT_FOLDERS:
            (self.folder / name).mkdir(exist_ok=True)

    def inside(self, work: Path, *command: str) -> list[str]:
        """The words that run ``command`` with the tree as its root, and the folder ``work`` as ``WORK_PLACE``."""
        space = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() != 0 else [])]
        words = ["env", "PATH=/usr/sbin:/usr/bin", *command]
        return [*space, "sh", "-c", ENTER, "enter", str(self.folder), str(work), WORK_PLACE, *words]


def stored_program(place: Path, content: bytes) -> Path:
    """The program ``content`` at ``place``, which is not touched where it has that content: it may be running."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists() or place.read_bytes() != content:
        store_file(place, content, 0o755)
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
