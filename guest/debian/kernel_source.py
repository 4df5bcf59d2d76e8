"""Drivers that Debian's kernels are built without: from the kernel's source package, which is not installed."""

from __future__ import annotations

import lzma
import re
import subprocess
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from guest.boot.module import compile_modules, sources_digest
from guest.debian.cache import PrepareError, Progress, cache_folder, scratch_folder, store_file
from guest.debian.kernel import Kernel
from guest.debian.packages import packages_of


@dataclass(frozen=True)
class Driver:
    """``unit`` is the C that its module is compiled from, beside the ``files`` of the kernel's source."""

    unit: str
    files: tuple[str, ...]


DRIVERS: Mapping[str, Driver] = {
    "gpio-virtio": Driver('#include "drivers/gpio/gpio-virtio.c"\n', ("drivers/gpio/gpio-virtio.c",)),
    "i2c-virtio": Driver('#include "drivers/i2c/busses/i2c-virtio.c"\n', ("drivers/i2c/busses/i2c-virtio.c",)),
    # Up to 6.12 CONFIG_IRQ_SIM is off too. What irq_to_desc() does there is for the kernel proper, this is the same for
    # a module.
    "gpio-mockup": Driver(
        """\
#include "drivers/gpio/gpio-mockup.c"
#ifndef CONFIG_IRQ_SIM
#define irq_to_desc(irq) irq_data_to_desc(irq_get_irq_data(irq))
#include "kernel/irq/irq_sim.c"
#endif
""",
        ("drivers/gpio/gpio-mockup.c", "drivers/gpio/gpiolib.h", "kernel/irq/irq_sim.c"),
    ),
}
"""By the names of their modules. None needs anything else that Debian's generic kernel lacks."""

GUEST_DRIVERS = ("gpio-virtio", "i2c-virtio")


def prepare_drivers(kernel: Kernel, progress: Progress, names: Sequence[str] = GUEST_DRIVERS) -> dict[str, bytes]:
    """The modules ``names`` of ``DRIVERS`` for ``kernel``, from the cache while nothing changed.

    Raises ``PrepareError`` with advice.
    """
    sources = {f"{name}.c": DRIVERS[name].unit.encode() for name in names}
    sources |= _sources(kernel, {file for name in names for file in DRIVERS[name].files}, progress)
    objects = " ".join(f"{name}.o" for name in names)
    sources["Kbuild"] = f"obj-m := {objects}\n".encode()
    digest = sources_digest(kernel, sources)
    targets = {name: cache_folder() / f"{name}-{digest}.ko" for name in names}
    if not all(target.exists() for target in targets.values()):
        progress(f"compiling {' and '.join(names)} for {kernel.package}")
        made = compile_modules(kernel, sources, [f"{name}.ko" for name in names], "Debian's drivers", progress)
        for name, content in zip(names, made, strict=True):
            store_file(targets[name], content)
    return {name: target.read_bytes() for name, target in targets.items()}


def _sources(kernel: Kernel, files: Collection[str], progress: Progress) -> dict[str, bytes]:
    """``files`` by their paths in the kernel's source, in a fixed order."""
    found = re.match(r"linux-image-(\d+\.\d+)\.", kernel.package)
    if found is None:
        raise PrepareError(f"{kernel.package} is not called like a kernel of Debian")
    package = f"linux-source-{found.group(1)}"
    folder = cache_folder() / package
    if not all((folder / file).exists() for file in files):
        every = {file for driver in DRIVERS.values() for file in driver.files}  # unpacking takes its time
        folder.mkdir(exist_ok=True)
        with scratch_folder(cache_folder()) as scratch:
            archive = packages_of(kernel.suite, progress).download(package, scratch)
            progress(f"unpacking {len(every)} files of {archive.name}")
            for file, content in _extract(archive, package, every).items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                store_file(folder / file, content)
    return {file: (folder / file).read_bytes() for file in sorted(files)}


def _extract(archive: Path, package: str, files: Collection[str]) -> dict[str, bytes]:
    """The content of ``files`` in a kernel's source package: an archive within an archive."""
    found: dict[str, bytes] = {}
    with _contents(archive) as outer, tarfile.open(fileobj=outer, mode="r|") as package_files:
        for member in package_files:
            if not member.name.endswith(f"/{package}.tar.xz"):
                continue
            packed = package_files.extractfile(member)
            assert packed is not None
            with lzma.open(packed) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as sources:
                for source in sources:
                    name = source.name.removeprefix(f"{package}/")
                    if name in files:
                        content = sources.extractfile(source)
                        assert content is not None
                        found[name] = content.read()
                        if len(found) == len(files):
                            return found
    raise PrepareError(f"{archive.name} has no {', '.join(sorted(set(files) - set(found)))}")


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
