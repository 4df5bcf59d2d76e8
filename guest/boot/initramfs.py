"""Pack a guest's root: busybox, the kernel's modules in loading order, ``diskcheck`` and ``guest/programs/init``."""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from guest.boot.compiler import run_compiler
from guest.boot.root import Root
from guest.debian.cache import PrepareError, Progress, cache_folder, scratch_folder, store_file
from guest.debian.kernel import Kernel, built_in_modules, module_files, read_module

MODULES = ("virtio_pci", "virtio_blk", "virtio-rng")
BUSYBOX = Path("/bin/busybox")
PROGRAMS = Path(__file__).resolve().parents[1] / "programs"
DISKCHECK_SOURCES = ("diskcheck.c", "stress.c", "diskcheck.h")
COMPILE = ("gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
FOLDERS = ("bin", "dev", "proc", "sys", "tmp", "modules")


@dataclass(frozen=True)
class Entry:
    """One file of the archive: its content and ``st_mode``; ``device`` is (major, minor) of a device node."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def prepare_initramfs(
    kernel: Kernel, progress: Progress, modules: Sequence[str] = MODULES, extra: Mapping[str, bytes] | None = None
) -> Path:
    """The initramfs for ``kernel``, from the cache when the same content was packed before.

    ``modules`` are kernel modules by file name (their dependencies come along), ``extra`` maps further
    absolute paths in the guest to the content of executable files. Raises ``PrepareError`` with advice.
    """
    extra = extra or {}
    further = {str(parent).lstrip("/") for name in extra for parent in PurePosixPath(name).parents} - {"", *FOLDERS}
    # A folder comes before what it holds, as its name does.
    entries = [Entry(folder, stat.S_IFDIR | 0o755) for folder in (*FOLDERS, *sorted(further))]
    # The kernel opens /dev/console for init before devtmpfs is mounted.
    entries.append(Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(_program("init", (PROGRAMS / "init").read_bytes()))
    entries.append(_program("bin/busybox", _busybox()))
    entries.append(_program("bin/diskcheck", compiled_program("diskcheck", DISKCHECK_SOURCES, progress)))
    order = module_order(kernel.modules, modules)
    entries += [_program(f"modules/{name}.ko", read_module(path)) for name, path in order.items()]
    entries.append(_program("modules/order", "".join(f"{name}\n" for name in order).encode()))
    entries += [_program(name.lstrip("/"), content) for name, content in extra.items()]
    archive = newc(entries)
    target = cache_folder() / f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}.cpio"
    return target if target.exists() else store_file(target, archive)


def program_files(name: str, package: str) -> dict[str, bytes]:
    """The program ``name`` of this machine, for ``extra``, with the shared libraries that it loads.

    ``PrepareError`` names the Debian ``package`` that has it where it is missing.
    """
    found = shutil.which(name)
    if found is None:
        raise PrepareError(f"'{name}' is not installed; install the Debian package '{package}'")
    with scratch_folder(cache_folder()) as scratch:
        root = Root(scratch)
        root.add_program(Path(found), f"/bin/{name}")
        return {f"/{path.relative_to(scratch)}": path.read_bytes() for path in scratch.rglob("*") if path.is_file()}


def module_order(folder: Path, wanted: Sequence[str]) -> dict[str, Path]:
    """The files of ``wanted`` and of all they depend on by their names, dependencies first, as insmod needs them.

    Read from each module's own ``depends=``: an unpacked package has no modules.dep. What is built in is left out.
    """
    files = {_module_name(name): (name, path) for name, path in module_files(folder).items()}
    built_in = {_module_name(name) for name in built_in_modules(folder)}
    order: dict[str, Path] = {}

    def add(wanted_name: str) -> None:
        if _module_name(wanted_name) in built_in:
            return
        if _module_name(wanted_name) not in files:
            raise PrepareError(
                f"the kernel has no module {wanted_name} under {folder}; remove the cache folder to fetch anew"
            )
        name, path = files[_module_name(wanted_name)]
        if name in order:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", b"\0" + read_module(path))
        for dependency in found.group(1).decode().split(",") if found else []:
            if dependency:
                add(dependency)
        order[name] = path

    for each in wanted:
        add(each)
    return order


def newc(entries: Sequence[Entry]) -> bytes:
    """A cpio archive in the "newc" format (the kernel's Documentation/driver-api/early-userspace/buffer-format)."""
    archive = bytearray()
    for inode, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _program(name: str, content: bytes) -> Entry:
    return Entry(name, stat.S_IFREG | 0o755, content)


def _module_name(name: str) -> str:
    return name.replace("-", "_")  # file names use both, "depends=" only the second


def _busybox() -> bytes:
    advice = "install the Debian package 'busybox-static'"
    try:
        content = BUSYBOX.read_bytes()
    except OSError as error:
        raise PrepareError(f"{BUSYBOX}: {error.strerror}; {advice}") from error
    if b"/lib64/ld-linux" in content:
        raise PrepareError(f"{BUSYBOX} needs shared libraries, which the guest has not; {advice}")
    return content


def compiled_program(name: str, files: Sequence[str], progress: Progress) -> bytes:
    """A static program of ours for guests, from the cache while its sources (in guest/programs) are the same."""
    sources = [PROGRAMS / file for file in files]
    digest = hashlib.sha256("\0".join(COMPILE).encode())
    for source in sources:
        digest.update(source.read_bytes())
    cache = cache_folder()
    target = cache / f"{name}-{digest.hexdigest()[:16]}"
    if target.exists():
        return target.read_bytes()
    progress(f"compiling the guest's {name}")
    with scratch_folder(cache) as scratch:
        made = scratch / target.name
        units = [str(source) for source in sources if source.suffix == ".c"]
        failed = f"guest/programs/{name}.c does not compile"
        run_compiler([*COMPILE, "-o", str(made), *units], failed, "packages 'gcc' and 'libc6-dev'")
        made.rename(target)
    return target.read_bytes()
