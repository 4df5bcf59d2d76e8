"""A suite's QEMU, with its own libraries, as a ``qemu-system-x86_64`` in a folder for PATH."""

from __future__ import annotations

from pathlib import Path

from guest.debian.cache import PrepareError, store_file
from guest.debian.suites import Suite, open_suite
from guest.debian.tree import Tree

PACKAGES = ("qemu-system-x86", "qemu-system-data", "seabios", "ipxe-qemu")
PROGRAM = "qemu-system-x86_64"
FIRMWARE_FOLDERS = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
FOLDER = "hyperbell-bin"  # in the tree: the folder for PATH
MODULES = "/usr/lib/x86_64-linux-gnu/qemu"
QBOOT = "qboot.rom"
QBOOT_SUITE = "bookworm"  # QEMU 11's packages have it no more


def prepare_qemu(suite: Suite) -> Path:
    """The folder that holds the program. Raises ``PrepareError`` with advice."""
    tree = suite.unpack(PACKAGES)
    folders = [tree.folder / folder for folder in FIRMWARE_FOLDERS if (tree.folder / folder).exists()]
    if not any((folder / QBOOT).exists() for folder in folders):
        older = open_suite(QBOOT_SUITE, suite.progress).unpack(["qemu-system-data"])
        # After the suite's own, so that only what is missing comes from the older one.
        folders.append(older.folder / "usr/share/qemu")
        if not (folders[-1] / QBOOT).exists():
            raise PrepareError(f"Debian {QBOOT_SUITE}'s qemu-system-data has no {QBOOT}")
    words = [word for folder in folders for word in ("-L", str(folder))]
    place = tree.folder / FOLDER
    _keep_from_installed_modules(tree.folder / "usr" / "bin" / PROGRAM)
    tree.wrapper(place / PROGRAM, f"usr/bin/{PROGRAM}", words, {"QEMU_MODULE_DIR": f"{tree.folder}{MODULES}"})
    return place


def tree_of_qemu(program: Path) -> Tree | None:
    """The tree that ``program`` belongs to if ``prepare_qemu`` has made it."""
    return Tree(program.parent.parent) if program.parent.name == FOLDER else None


def _keep_from_installed_modules(program: Path) -> None:
    """Let it look for modules in ``QEMU_MODULE_DIR`` only.

    What is not there it would load from where QEMU is installed, and end because that is of another build.
    """
    content = program.read_bytes()
    compiled = f"{MODULES}\0".encode()
    if compiled in content:
        store_file(program, content.replace(compiled, compiled.replace(b"/qemu", b"/none")), 0o755)
