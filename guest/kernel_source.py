"""Drivers that Debian's kernels are built without: from the kernel's source package, which is not installed."""

from __future__ import annotations

import lzma
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from guest.cache import PrepareError, Progress, cache_folder, scratch_folder, store_file
from guest.kernel import Kernel, fetch_package
from guest.module import compile_modules, sources_digest

DRIVERS: Mapping[str, str] = {
    "gpio-virtio": "drivers/gpio/gpio-virtio.c",
    "i2c-virtio": "drivers/i2c/busses/i2c-virtio.c",
}
"""Module to source file. Both need nothing that Debian's generic kernel lacks."""


def prepare_drivers(kernel: Kernel, progress: Progress) -> dict[str, bytes]:
    """The modules of ``DRIVERS`` for ``kernel`` by their names, from the cache while nothing changed.

    Raises ``PrepareError`` with advice.
    """
    sources = {f"{module}.c": content for module, content in _sources(kernel, progress).items()}
    objects = " ".join(f"{module}.o" for module in DRIVERS)
    sources["Kbuild"] = f"obj-m := {objects}\n".encode()
    digest = sources_digest(kernel, sources)
    targets = {module: cache_folder() / f"{module}-{digest}.ko" for module in DRIVERS}
    if not all(target.exists() for target in targets.values()):
        progress(f"compiling {' and '.join(DRIVERS)} for {kernel.package}")
        names = [f"{module}.ko" for module in DRIVERS]
        made = compile_modules(kernel, sources, names, "Debian's drivers", progress)
        for module, content in zip(DRIVERS, made, strict=True):
            store_file(targets[module], content)
    return {module: target.read_bytes() for module, target in targets.items()}


def _sources(kernel: Kernel, progress: Progress) -> dict[str, bytes]:
    found = re.match(r"linux-image-(\d+\.\d+)\.", kernel.package)
    if found is None:
        raise PrepareError(f"{kernel.package} is not called like a kernel of Debian 12")
    package = f"linux-source-{found.group(1)}"
    folder = cache_folder() / package
    kept = {module: folder / f"{module}.c" for module in DRIVERS}
    if not all(path.exists() for path in kept.values()):
        folder.mkdir(exist_ok=True)
        with scratch_folder(cache_folder()) as scratch:
            archive = fetch_package(package, scratch, progress)
            progress(f"unpacking two drivers of {archive.name}")
            for module, content in _extract(archive, package).items():
                store_file(kept[module], content)
    return {module: path.read_bytes() for module, path in kept.items()}


def _extract(archive: Path, package: str) -> dict[str, bytes]:
    """The source files of ``DRIVERS`` in a kernel's source package: an archive within an archive."""
    wanted = {f"{package}/{path}": module for module, path in DRIVERS.items()}
    found: dict[str, bytes] = {}
    with _contents(archive) as outer, tarfile.open(fileobj=outer, mode="r|") as package_files:
        for member in package_files:
            if not member.name.endswith(f"/{package}.tar.xz"):
                continue
            packed = package_files.extractfile(member)
            assert packed is not None
            with lzma.open(packed) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as sources:
                for source in sources:
                    if source.name in wanted:
                        content = sources.extractfile(source)
                        assert content is not None
                        found[wanted[source.name]] = content.read()
                        if len(found) == len(DRIVERS):
                            return found
    raise PrepareError(f"{archive.name} has not all of {', '.join(DRIVERS.values())}")


@contextmanager
def _contents(archive: Path) -> Iterator[IO[bytes]]:
    """The files of a Debian package, as a tar archive that can be read once."""
    try:
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    except FileNotFoundError as error:
        raise PrepareError("'dpkg-deb' is not installed: this is no Debian machine") from error
    assert process.stdout is not None
    try:
        with process.stdout as stream:
            yield stream
    finally:
        process.terminate()
        process.wait()
