"""The images of a machine that runs guests itself: QEMU, Python and this project, as installed here.

Two images, so that a change of the project costs a second: ``base`` holds what changes with the machine (QEMU, its
firmware, Python, the virtual environment's packages, the guests' kernel and its modules), ``project`` this checkout.
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guest.boot.initramfs import prepare_initramfs
from guest.boot.machine import QEMU
from guest.boot.module import prepare_module
from guest.boot.root import Root
from guest.debian.cache import PrepareError, Progress, cache_folder, scratch_folder
from guest.debian.kernel import Kernel, module_files, read_module
from guest.debian.qemu import FIRMWARE_FOLDERS as TREE_FIRMWARE
from guest.debian.qemu import tree_of_qemu
from guest.debian.tree import LOADER, Tree

PROJECT = Path(__file__).resolve().parents[2]
PROJECT_FOLDERS = ("config", "daemon", "guest", "tests", "transports", "virtio")
SITE_PACKAGES = "/opt/hyperbell/site-packages"
PACKAGES = ("hyperbell", "pytest", "pytest-trio", "pytest-xdist", "hypothesis")
ASSEMBLER = ("as", "ld", "objcopy")  # for the small guests of the tests of our own VM
FIRMWARE_FOLDERS = (Path("/usr/share/qemu"), Path("/usr/share/seabios"))
SUITE_QEMU = "/opt/qemu"
# Its firmware it would look for beside the loader, which is what the kernel runs.
SUITE_WRAPPER = """\
#!/bin/sh
export QEMU_MODULE_DIR={folder}/modules
exec {folder}/lib/{loader} --library-path {folder}/lib --argv0 {qemu} {folder}/{qemu} -L /usr/share/qemu "$@"
"""
FIRMWARE = (
    *("qboot.rom", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin"),
    *("bios.bin", "bios-256k.bin", "bios-microvm.bin"),
)
KERNEL_MODULES = re.compile(
    r"(kvm.*|irqbypass|ccp|virtio.*|vfio.*|vhost.*|net_failover|failover|tun|loop|overlay|rng-core|vsock.*|.*_virtio_.*)"
)
NOT_OF_PYTHON = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "ensurepip", "tkinter", "turtledemo", "pydoc_data", "distutils"}
    | {"dist-packages", "site-packages", "__phello__"}
)
GUEST_MODULES = ("virtio_pci", "virtio_blk", "virtio-rng", "virtio_console")
WRAPPER = """\
#!/bin/sh
# All is compiled already, on read-only disks; Pydantic's search for plug-ins takes a second here.
export PYTHONPATH=/project:{packages} PYTHONDONTWRITEBYTECODE=1 PYDANTIC_DISABLE_PLUGINS=__all__
exec {command} "$@"
"""


@dataclass(frozen=True)
class Images:
    """What a machine that runs guests boots from; ``initramfs`` mounts both images where they belong."""

    kernel: Kernel
    initramfs: Path
    base: Path
    project: Path


def prepare_images(
    kernel: Kernel, progress: Progress, modules: Sequence[str] = (), extra: Mapping[str, bytes] | None = None
) -> Images:
    """The images for ``kernel``, from the cache where nothing changed. Raises ``PrepareError`` with advice.

    ``modules`` and ``extra`` are what its initramfs has beside what every such machine needs (``prepare_initramfs``).
    """
    setup = (PROJECT / "guest" / "nested" / "setup").read_bytes()
    module = prepare_module(kernel, progress).read_bytes()
    extra = {"/setup": setup, "/hyperbell.ko": module, **(extra or {})}
    initramfs = prepare_initramfs(kernel, progress, [*GUEST_MODULES, *modules], extra)
    return Images(kernel, initramfs, _base(kernel, progress), _project(initramfs, progress))


def _base(kernel: Kernel, progress: Progress) -> Path:
    qemu = shutil.which(QEMU)
    if qemu is None:
        raise PrepareError(f"{QEMU} is not installed; install the Debian package 'qemu-system-x86'")
    key = hashlib.sha256(repr((kernel.package, _stamp(Path(qemu)), sys.version)).encode())
    for name in _distributions():
        key.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    for recipe in ("nested/images.py", "boot/root.py"):
        key.update((PROJECT / "guest" / recipe).read_bytes())
    target = cache_folder() / f"base-{key.hexdigest()[:16]}.ext4"
    if target.exists():
        return target
    progress("making the image of a machine that runs guests (QEMU, Python and packages)")
    with scratch_folder(target.parent) as scratch:
        root = Root(scratch / "root")
        root.folder.mkdir()
        tree = tree_of_qemu(Path(qemu))
        if tree is None:
            root.add_program(Path(qemu), f"/usr/bin/{QEMU}")
        else:
            _add_qemu_of_suite(root, tree)
        _add_firmware(root, FIRMWARE_FOLDERS if tree is None else [tree.folder / each for each in TREE_FIRMWARE])
        _add_assembler(root)
        _add_python(root)
        _add_modules(root, kernel)
        root.add(kernel.image, "/boot/vmlinux")
        return root.make_image(target)


def _stamp(path: Path) -> tuple[str, int, float]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime


def _add_qemu_of_suite(root: Root, tree: Tree) -> None:
    """QEMU of another Debian, apart from the programs of this one: its libraries are others of the same names."""
    root.add(tree.folder / "usr" / "bin" / QEMU, f"{SUITE_QEMU}/{QEMU}")
    for library in tree.libraries(f"usr/bin/{QEMU}"):
        root.add(library, f"{SUITE_QEMU}/lib/{library.name}")
    root.write(f"/usr/bin/{QEMU}", SUITE_WRAPPER.format(folder=SUITE_QEMU, loader=Path(LOADER).name, qemu=QEMU))


def _add_firmware(root: Root, folders: Sequence[Path]) -> None:
    for name in FIRMWARE:
        found = [folder / name for folder in folders if (folder / name).exists()]
        if not found:
            raise PrepareError(
                f"QEMU's {name} is not installed; install the Debian packages 'qemu-system-data' and 'seabios'"
            )
        root.add(found[0], f"/usr/share/qemu/{name}")


def _add_assembler(root: Root) -> None:
    for name in ASSEMBLER:
        found = shutil.which(name)
        if found is None:
            raise PrepareError(f"'{name}' is not installed; install the Debian package 'binutils'")
        root.add_program(Path(found), f"/usr/bin/{name}")


def _add_python(root: Root) -> None:
    """The interpreter of the virtual environment, its library, and the packages of the project and its tests."""
    paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
    interpreter = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    root.add_program(interpreter)
    for name in ("stdlib", "platstdlib"):
        root.add_tree(Path(paths[name]), keep=_is_wanted_of_python)
    for name in _distributions():
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            source = Path(str(distribution.locate_file(file)))
            if ".." in file.parts or source.suffix == ".pth" or not source.exists():
                continue  # scripts in bin/, and what makes our own package editable
            place = f"{SITE_PACKAGES}/{file}"
            if ".so" in source.name:
                root.add_program(source, place)
            else:
                root.add(source, place)
    for folder in {paths["stdlib"], paths["platstdlib"], SITE_PACKAGES}:
        _compile(root, folder)
    for command, arguments in (
        ("python3", ""),
        ("hyperbell", "-m daemon.cli"),
        ("pytest", "-m pytest -p no:cacheprovider"),
    ):
        text = WRAPPER.format(packages=SITE_PACKAGES, command=f"{interpreter} {arguments}")
        root.write(f"/opt/bin/{command}", text)


def _is_wanted_of_python(path: Path) -> bool:
    return path.name not in NOT_OF_PYTHON and not path.name.startswith("config-") and path.suffix != ".a"


def _distributions() -> list[str]:
    """The project's installed dependencies and those of its tests, by name, each once."""
    found: dict[str, None] = {}

    def add(name: str) -> None:
        if name in found:
            return
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError as error:
            raise PrepareError(f"the package {name} is not in this Python's environment; run 'make setup'") from error
        found[name] = None
        for requirement in requirements:
            match = re.match(r"([A-Za-z0-9._-]+)\s*([^;]*)(;.*)?", requirement)
            # Markers of extras and of other systems: what they ask for is there only if something else needs it.
            if match is not None and match[3] is None:
                add(match[1].lower())

    for name in PACKAGES:
        add(name)
    return list(found)


def _add_modules(root: Root, kernel: Kernel) -> None:
    for name, path in module_files(kernel.modules).items():
        if KERNEL_MODULES.fullmatch(name):
            place = path.relative_to(kernel.modules).with_name(f"{name}.ko")
            root.write(f"/lib/modules/{kernel.release}/kernel/{place}", read_module(path), 0o644)
    try:
        command = ["depmod", "-b", str(root.folder), kernel.release]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
        )
    except FileNotFoundError as error:
        raise PrepareError("'depmod' is not installed; install the Debian package 'kmod'") from error
    if done.returncode != 0:
        raise PrepareError(f"depmod failed: {done.stderr.strip()}")


def _project(initramfs: Path, progress: Progress) -> Path:
    """The checkout as it is now, compiled, with what its tests have built under it."""
    key = hashlib.sha256(initramfs.name.encode())
    files = sorted(_project_files())
    for path in files:
        key.update(f"{path.relative_to(PROJECT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    target = cache_folder() / f"project-{key.hexdigest()[:16]}.ext4"
    if target.exists():
        return target
    progress("making the image of the project")
    with scratch_folder(target.parent) as scratch:
        root = Root(scratch / "root")
        for path in files:
            root.add(path, path.relative_to(PROJECT))
        root.add(initramfs, "/boot/guest.cpio")
        for folder in PROJECT_FOLDERS:
            _compile(root, f"/{folder}", "/project")
        return root.make_image(target)


def _compile(root: Root, folder: str, mounted: str = "") -> None:
    """Compile what is not compiled yet: an image cannot be written to, and Python without .pyc starts seconds later."""
    compileall.compile_dir(f"{root.folder}{folder}", quiet=2, stripdir=str(root.folder), prependdir=mounted or "/")


def _project_files() -> Iterator[Path]:
    yield PROJECT / "pyproject.toml"
    for folder in PROJECT_FOLDERS:
        for path in (PROJECT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and "seeds" not in path.parts:
                yield path
