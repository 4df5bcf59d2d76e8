"""Fetch a Debian kernel as a package, without installing it, and unpack what a guest needs of it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from guest.cache import PrepareError, Progress, cache_folder, scratch_folder
from guest.tools import run_tool
from transports.kvm.bzimage import is_bzimage, unpack_bzimage
from virtio.errors import HostError

META_PACKAGE = "linux-image-cloud-amd64"
GENERIC_META_PACKAGE = "linux-image-amd64"  # it has what the cloud kernel leaves out: GPIO, I2C, sensors
APT_ADVICE = "run 'apt-get update' as root and try again (Debian 12's own package sources are enough)"


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: ``image`` is what QEMU's ``-kernel`` takes, ``modules`` the folder of its .ko files."""

    package: str
    image: Path
    modules: Path


def prepare_kernel(progress: Progress, meta_package: str = META_PACKAGE) -> Kernel:
    """The cached kernel, or the one that ``meta_package`` of Debian names now, fetched and unpacked.

    Works as root and as any user who may run apt-get. Raises ``PrepareError`` with advice.
    """
    cache = cache_folder()
    if meta_package != META_PACKAGE:
        cache /= meta_package  # a folder of its own, so that the kernels of one are never taken for those of another
        cache.mkdir(exist_ok=True)
    cached = sorted(cache.glob("linux-image-*/vmlinuz"), key=lambda image: image.stat().st_mtime)
    if cached:
        return _kernel_in(cached[-1].parent)
    if platform.machine() != "x86_64":
        raise PrepareError(f"real guests need an x86_64 host; this one is {platform.machine()}")
    package = _concrete_package(meta_package)
    with scratch_folder(cache) as scratch:
        archive = fetch_package(package, scratch, progress)
        progress(f"unpacking {archive.name}")
        _unpack(archive, scratch / package, progress)
        target = cache / package
        try:
            (scratch / package).rename(target)
        except OSError:
            # Another process was faster; its kernel is as good as ours.
            if not (target / "vmlinuz").exists():
                raise
    return _kernel_in(target)


def _kernel_in(folder: Path) -> Kernel:
    vmlinux = folder / "vmlinux"
    return Kernel(folder.name, vmlinux if vmlinux.exists() else folder / "vmlinuz", folder / "modules")


def _concrete_package(meta_package: str) -> str:
    """The versioned package that the meta package depends on."""
    try:
        text = run_tool(["apt-cache", "depends", "--important", meta_package], "looking for a kernel")
    except PrepareError as error:
        raise PrepareError(f"{error}; {APT_ADVICE}") from error
    found = re.search(r"Depends: (linux-image-\S+)", text)
    if found is None:
        raise PrepareError(f"apt does not know {meta_package}; {APT_ADVICE}")
    return found.group(1)


def fetch_package(package: str, into: Path, progress: Progress) -> Path:
    """The archive of a Debian package, downloaded into the empty folder ``into`` and not installed."""
    progress(f"fetching {package} with apt-get; it is not installed")
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


def _unpack(archive: Path, folder: Path, progress: Progress) -> None:
    whole = folder.with_name("whole")
    run_tool(["dpkg", "-x", str(archive), str(whole)], f"unpacking {archive.name}")
    images = list(whole.glob("boot/vmlinuz-*"))
    modules = list(whole.glob("lib/modules/*/kernel"))
    if len(images) != 1 or len(modules) != 1:
        raise PrepareError(
            f"{archive.name} holds {len(images)} kernels and {len(modules)} module folders, not one each"
        )
    folder.mkdir()
    images[0].rename(folder / "vmlinuz")
    modules[0].rename(folder / "modules")
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
