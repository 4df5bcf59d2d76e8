"""Fetch a Debian kernel as packages, without installing it, and unpack what a guest needs of it."""

from __future__ import annotations

import lzma
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from guest.debian.cache import PrepareError, Progress, cache_folder, scratch_folder
from guest.debian.packages import APT_ADVICE, Packages, packages_of
from guest.debian.tools import run_tool
from transports.kvm.boot.bzimage import is_bzimage, unpack_bzimage
from virtio.errors import HostError

META_PACKAGE = "linux-image-cloud-amd64"
GENERIC_META_PACKAGE = "linux-image-amd64"  # it has what the cloud kernel leaves out: GPIO, I2C, sensors
SUITE_VARIABLE = "HYPERBELL_KERNEL_SUITE"
IMAGES = ("boot/vmlinuz-*", "lib/modules/*/vmlinuz")  # the second since Linux 7
MODULE_FOLDERS = "lib/modules/*/kernel"
BUILT_IN = "modules.builtin"


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: ``image`` is what QEMU's ``-kernel`` takes, ``modules`` the folder of its .ko files.

    ``suite`` is the Debian it is of, "" for this machine's own.
    """

    package: str
    image: Path
    modules: Path
    suite: str = ""

    @property
    def release(self) -> str:
        """What ``uname -r`` says in a guest."""
        return self.package.removeprefix("linux-image-")


def prepare_kernel(progress: Progress, meta_package: str = META_PACKAGE, suite: str | None = None) -> Kernel:
    """The cached kernel, or the one that ``meta_package`` of Debian names now, fetched and unpacked.

    ``suite`` is one of ``guest.debian.suites``, or "" for this machine's own; unless given it is
    ``$HYPERBELL_KERNEL_SUITE``. Works as root and as any user who may run apt-get. Raises ``PrepareError`` with advice.
    """
    if suite is None:
        suite = os.environ.get(SUITE_VARIABLE, "")
    cache = cache_folder()
    if suite:
        cache /= f"suites/{suite}/kernels"
    if meta_package != META_PACKAGE:
        cache /= meta_package  # a folder of its own, so that the kernels of one are never taken for those of another
    cached = sorted(cache.glob("linux-image-*/vmlinuz"), key=lambda image: image.stat().st_mtime)
    if cached:
        return _kernel_in(cached[-1].parent, suite)
    if platform.machine() != "x86_64":
        raise PrepareError(f"real guests need an x86_64 host; this one is {platform.machine()}")
    packages = packages_of(suite, progress)
    cache.mkdir(parents=True, exist_ok=True)
    package = _concrete_package(packages, meta_package)
    with scratch_folder(cache) as scratch:
        _unpack(packages, package, scratch, progress)
        target = cache / package
        try:
            (scratch / package).rename(target)
        except OSError:
            # Another process was faster; its kernel is as good as ours.
            if not (target / "vmlinuz").exists():
                raise
    return _kernel_in(target, suite)


def module_files(folder: Path) -> dict[str, Path]:
    """The modules under ``folder`` by the names of their files, less ``.ko`` or ``.ko.xz``."""
    return {path.name.partition(".ko")[0]: path for path in folder.rglob("*.ko*") if path.suffix in (".ko", ".xz")}


def read_module(path: Path) -> bytes:
    """A module as insmod takes it: unpacked."""
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def built_in_modules(folder: Path) -> frozenset[str]:
    """The names of what could be a module of the kernel whose modules are in ``folder``, and is part of it."""
    listed = folder.parent / BUILT_IN
    lines = listed.read_text().splitlines() if listed.exists() else []
    return frozenset(Path(line).name.partition(".ko")[0] for line in lines)


def _kernel_in(folder: Path, suite: str) -> Kernel:
    vmlinux = folder / "vmlinux"
    return Kernel(folder.name, vmlinux if vmlinux.exists() else folder / "vmlinuz", folder / "modules", suite)


def _concrete_package(packages: Packages, meta_package: str) -> str:
    """The versioned package that the meta package depends on."""
    found = [name for name in packages.depends(meta_package) if re.match(r"linux-image-\d", name)]
    if not found:
        raise PrepareError(f"{meta_package} depends on no kernel; {APT_ADVICE}")
    return found[0]


def _unpack(packages: Packages, package: str, scratch: Path, progress: Progress) -> None:
    """Make ``scratch / package``. Since Linux 7 the kernel and its modules are packages that this one depends on."""
    release = package.removeprefix("linux-image-")
    parts = [f"linux-{part}-{release}" for part in ("base", "binary", "modules")]
    whole = scratch / "whole"
    for name in [package, *(name for name in packages.depends(package) if name in parts)]:
        (scratch / f"fetched-{name}").mkdir()
        archive = packages.download(name, scratch / f"fetched-{name}")
        progress(f"unpacking {archive.name}")
        run_tool(["dpkg", "-x", str(archive), str(whole)], f"unpacking {archive.name}")
    roots = [whole, whole / "usr"]  # modules are under usr/ since Debian 13
    images = [path for root in roots for pattern in IMAGES for path in root.glob(pattern)]
    modules = [path for root in roots for path in root.glob(MODULE_FOLDERS)]
    if len(images) != 1 or len(modules) != 1:
        raise PrepareError(f"{package} holds {len(images)} kernels and {len(modules)} module folders, not one each")
    folder = scratch / package
    folder.mkdir()
    images[0].rename(folder / "vmlinuz")
    built_in = modules[0].parent / BUILT_IN
    modules[0].rename(folder / "modules")
    if built_in.exists():
        built_in.rename(folder / BUILT_IN)
    reason = _extract_vmlinux(folder / "vmlinuz", folder / "vmlinux")
    if reason:
        progress(f"using the compressed kernel, which boots some seconds slower: {reason}")


def _extract_vmlinux(bzimage: Path, target: Path) -> str:
    """Write the uncompressed kernel, which QEMU starts directly through its PVH entry. Returns why not, or ``""``."""
    image = bzimage.read_bytes()
    if not is_bzimage(image):
        return f"{bzimage.name} is not a bzImage"
    try:
        target.write_bytes(unpack_bzimage(image))
    except HostError as error:
        return f"it {error}"
    return ""
