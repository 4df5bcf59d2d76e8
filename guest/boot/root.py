"""Collect the files of a root file system, shared libraries included, and make an ext4 image of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from guest.debian.cache import PrepareError, scratch_folder

SPARE_MIB = 8


class Root:
    """A folder that becomes an image. Files keep their paths and their times, by which Python knows its .pyc."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._examined: set[Path] = set()

    def add(self, source: Path, place: str | Path = "") -> Path:
        """Copy the file ``source`` to ``place`` (default: where it is on this machine), following symbolic links."""
        target = self.folder / str(place or source).lstrip("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        return target

    def write(self, place: str, content: str | bytes, mode: int = 0o755) -> None:
        """Make a file of ``content``."""
        target = self.folder / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
        target.chmod(mode)

    def add_program(self, source: Path, place: str | Path = "") -> None:
        """Copy a program or shared object, and all that the dynamic linker would load for it."""
        self.add(source, place)
        self.add_libraries([source])

    def add_libraries(self, programs: Iterable[Path]) -> None:
        """Copy what the dynamic linker would load for ``programs``."""
        wanted = [path for path in programs if path not in self._examined]
        self._examined.update(wanted)
        if not wanted:
            return
        listed = subprocess.run(["ldd", *map(str, wanted)], capture_output=True, text=True, timeout=120)
        missing = re.findall(r"^\s*(\S+) => not found", listed.stdout, re.MULTILINE)
        if missing:
            raise PrepareError(f"this machine has not the libraries {', '.join(sorted(set(missing)))}")
        for name in re.findall(r"(/\S+) \(0x", listed.stdout):
            self.add(Path(name))
            # glibc loads this one itself when a thread is cancelled, and ends the program where it is not there.
            unwinder = Path(name).with_name("libgcc_s.so.1")
            if Path(name).name == "libc.so.6" and unwinder.exists():
                self.add(unwinder)

    def add_tree(self, source: Path, place: str | Path = "", keep: Callable[[Path], bool] = lambda path: True) -> None:
        """Copy the files under ``source`` that ``keep`` wants, by their path within it; libraries too."""
        place = Path(place or source)
        objects = []
        for parent, folders, names in os.walk(source):
            inside = Path(parent).relative_to(source)
            folders[:] = [name for name in folders if keep(inside / name)]
            for name in names:
                if keep(inside / name):
                    self.add(Path(parent, name), place / inside / name)
                    if ".so" in name:
                        objects.append(Path(parent, name))
        self.add_libraries(objects)

    def make_image(self, target: Path) -> Path:
        """An ext4 image of the folder at ``target``, whole or not at all. ``PrepareError`` with advice."""
        size = sum(path.lstat().st_size + 4096 for path in self.folder.rglob("*"))
        size_mib = size // (1024 * 1024) * 11 // 10 + SPARE_MIB
        with scratch_folder(target.parent) as scratch:
            made = scratch / target.name
            # No journal and no checks by time: it is only ever mounted to be read.
            command = [
                "mke2fs",
                "-q",
                "-t",
                "ext4",
                "-O",
                "^has_journal",
                "-m",
                "0",
                "-i",
                "8192",
                "-d",
                str(self.folder),
            ]
            try:
                done = subprocess.run(
                    [*command, str(made), f"{size_mib}M"],
                    capture_output=True,
                    text=True,
                    timeout=300,
                    env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C"},
                )
            except FileNotFoundError as error:
                raise PrepareError("'mke2fs' is not installed; install the Debian package 'e2fsprogs'") from error
            if done.returncode != 0:
                raise PrepareError(f"mke2fs could not make {target.name}: {done.stderr.strip()}")
            made.rename(target)
        return target
