"""Build kernel modules for exactly the kernel that guests boot, against headers that are not installed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from guest.debian.cache import PrepareError, Progress, cache_folder, scratch_folder, store_file
from guest.debian.headers import prepare_headers
from guest.debian.kernel import Kernel
from guest.debian.tools import run_tool

SOURCES = Path(__file__).resolve().parents[1] / "linux"
SOURCE_SUFFIXES = (".c", ".h")
BUILD_FILES = ("Kbuild",)
MODULE = "hyperbell.ko"


def prepare_module(kernel: Kernel, progress: Progress) -> Path:
    """``hyperbell.ko`` for ``kernel``, from the cache while its sources and the kernel are the same.

    Raises ``PrepareError`` with advice.
    """
    sources = module_sources()
    target = cache_folder() / f"hyperbell-{sources_digest(kernel, sources)}.ko"
    if target.exists():
        return target
    progress(f"compiling the guest's kernel module for {kernel.release}")
    (made,) = compile_modules(kernel, sources, (MODULE,), "guest/linux", progress)
    return store_file(target, made)


def compile_modules(
    kernel: Kernel, sources: Mapping[str, bytes], modules: Sequence[str], what: str, progress: Progress
) -> list[bytes]:
    """The ``modules`` that ``sources``, among them a Kbuild, make for ``kernel``. ``what`` says whose they are.

    Raises ``PrepareError`` with advice.
    """
    headers = prepare_headers(kernel, progress)
    if headers.tree is None:
        for command, package in {"make": "make", headers.compiler: headers.compiler, "strip": "binutils"}.items():
            if shutil.which(command) is None:
                raise PrepareError(f"'{command}' is not installed; install the Debian package '{package}'")
    with scratch_folder(cache_folder()) as scratch:
        for name, content in sources.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)
        try:
            # Without types for BPF: a guest's own programs would need them, and pahole to make them.
            run_tool(headers.make(scratch, "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"), f"building {what}")
        except PrepareError as error:
            raise PrepareError(
                f"{error} (with the headers in {headers.folder}; if they are damaged, remove that folder to fetch them "
                f"anew; objtool needs libelf.so.1, in the Debian packages 'libelf1' or 'libelf1t64')"
            ) from error
        for module in modules:
            run_tool(["strip", "--strip-debug", str(scratch / module)], f"stripping {module}")
        return [(scratch / module).read_bytes() for module in modules]


def module_sources() -> Mapping[str, bytes]:
    """What the module is built of, by file name."""
    files = [path for path in SOURCES.iterdir() if path.suffix in SOURCE_SUFFIXES or path.name in BUILD_FILES]
    return {path.name: path.read_bytes() for path in sorted(files) if not path.name.endswith(".mod.c")}


def sources_digest(kernel: Kernel, sources: Mapping[str, bytes]) -> str:
    """Another one for every kernel and every change of the sources."""
    digest = hashlib.sha256(kernel.package.encode())
    for name, content in sources.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]
