"""Build kernel modules for exactly the kernel that guests boot, against headers that are not installed."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from guest.cache import PrepareError, Progress, cache_folder, scratch_folder, store_file
from guest.kernel import Kernel, fetch_package
from guest.tools import run_tool

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "linux"
SOURCE_SUFFIXES = (".c", ".h")
BUILD_FILES = ("Kbuild",)
MODULE = "hyperbell.ko"

# What a bare Debian 12 lacks of what building a module calls: the command, and the package that has it.
TOOLS = {"make": "make", "gcc-12": "gcc-12", "strip": "binutils"}
# The headers' own tools (objtool) are linked with this; Debian's dependency is lost when a package is only unpacked.
LIBELF = "libelf1"


def prepare_module(kernel: Kernel, progress: Progress) -> Path:
    """``hyperbell.ko`` for ``kernel``, from the cache while its sources and the kernel are the same.

    Raises ``PrepareError`` with advice.
    """
    sources = module_sources()
    target = cache_folder() / f"hyperbell-{sources_digest(kernel, sources)}.ko"
    if target.exists():
        return target
    progress(f"compiling the guest's kernel module for {_release(kernel)}")
    (made,) = compile_modules(kernel, sources, (MODULE,), "guest/linux", progress)
    return store_file(target, made)


def compile_modules(
    kernel: Kernel, sources: Mapping[str, bytes], modules: Sequence[str], what: str, progress: Progress
) -> list[bytes]:
    """The ``modules`` that ``sources``, among them a Kbuild, make for ``kernel``. ``what`` says whose they are.

    Raises ``PrepareError`` with advice.
    """
    headers = prepare_headers(kernel, progress)
    for command, package in TOOLS.items():
        if shutil.which(command) is None:
            raise PrepareError(f"'{command}' is not installed; install the Debian package '{package}'")
    with scratch_folder(cache_folder()) as scratch:
        for name, content in sources.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)
        try:
            run_tool(["make", "-C", str(headers), f"M={scratch}", "modules"], f"building {what}")
        except PrepareError as error:
            raise PrepareError(
                f"{error} (with the headers in {headers}; if they are damaged, remove that folder to fetch them anew; "
                f"objtool needs the Debian package '{LIBELF}')"
            ) from error
        for module in modules:
            run_tool(["strip", "--strip-debug", str(scratch / module)], f"stripping {module}")
        return [(scratch / module).read_bytes() for module in modules]


def module_sources() -> Mapping[str, bytes]:
    """What the module is built of, by file name."""
    files = [path for path in SOURCES.iterdir() if path.suffix in SOURCE_SUFFIXES or path.name in BUILD_FILES]
    return {path.name: path.read_bytes() for path in sorted(files) if not path.name.endswith(".mod.c")}


def prepare_headers(kernel: Kernel, progress: Progress) -> Path:
    """The folder that ``make -C`` takes to build modules for ``kernel``: its headers, unpacked into the cache.

    Three packages belong together and find each other by where they lie: the headers of this flavour, what all
    flavours share, and the build tools.
    """
    release = _release(kernel)
    cache = cache_folder()
    target = cache / f"linux-headers-{release}"
    folder = target / "usr" / "src" / f"linux-headers-{release}"
    if target.exists():
        return folder
    common = re.sub(r"-(cloud-)?amd64$", "-common", release)
    series = ".".join(release.split(".")[:2])
    with scratch_folder(cache) as scratch:
        whole = scratch / "whole"
        for package in (f"linux-headers-{release}", f"linux-headers-{common}", f"linux-kbuild-{series}"):
            into = scratch / package
            into.mkdir()
            try:
                archive = fetch_package(package, into, progress)
            except PrepareError as error:
                raise PrepareError(
                    f"{error}; if Debian has a newer kernel by now, remove {cache / kernel.package} to fetch that"
                ) from error
            progress(f"unpacking {archive.name}")
            run_tool(["dpkg", "-x", str(archive), str(whole)], f"unpacking {archive.name}")
        _make_relocatable(whole / "usr" / "src" / folder.name, f"linux-headers-{common}")
        try:
            whole.rename(target)
        except OSError:
            # Another process was faster; its headers are as good as ours.
            if not folder.exists():
                raise
    return folder


def _make_relocatable(headers: Path, common: str) -> None:
    """The package's Makefile includes the common one by its installed path; make it find that beside itself."""
    makefile = headers / "Makefile"
    if not (headers.parent / common / "Makefile").exists() or "/usr/src/" not in makefile.read_text():
        raise PrepareError(f"{headers.name} is not laid out as Debian 12's are: {makefile} is not one include")
    makefile.write_text(f"include $(dir $(realpath $(lastword $(MAKEFILE_LIST))))../{common}/Makefile\n")


def _release(kernel: Kernel) -> str:
    return kernel.package.removeprefix("linux-image-")


def sources_digest(kernel: Kernel, sources: Mapping[str, bytes]) -> str:
    """Another one for every kernel and every change of the sources."""
    digest = hashlib.sha256(kernel.package.encode())
    for name, content in sources.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]
