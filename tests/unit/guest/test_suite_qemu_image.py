"""QEMU of another Debian in the image of a machine that runs guests: apart from this Debian's programs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from guest.boot.machine import QEMU
from guest.boot.root import Root
from guest.debian.cache import PrepareError
from guest.debian.qemu import FOLDER, tree_of_qemu
from guest.debian.tree import LIBRARIES, LOADER, Tree, unpack_archives
from guest.nested.images import _add_qemu_of_suite

LIBC = "libc.so.6"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree whose QEMU is this machine's ``echo``, with the libraries that has."""
    folder = tmp_path / "tree"
    unpack_archives([], folder)
    listed = subprocess.run(["ldd", "/bin/echo"], capture_output=True, text=True, check=True).stdout
    (libc,) = [line.split()[2] for line in listed.splitlines() if LIBC in line]
    for source, place in (("/bin/echo", f"usr/bin/{QEMU}"), (f"/{LOADER}", LOADER), (libc, f"{LIBRARIES}/{LIBC}")):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, folder / place)
    return Tree(folder)


def test_a_program_in_the_folder_for_path_belongs_to_its_tree(tmp_path: Path) -> None:
    assert tree_of_qemu(tmp_path / "tree" / FOLDER / QEMU) == Tree(tmp_path / "tree")
    assert tree_of_qemu(Path("/usr/bin") / QEMU) is None


def test_libraries_of_a_program_are_the_trees_own(tree: Tree) -> None:
    assert tree.libraries(f"usr/bin/{QEMU}") == [tree.folder / LOADER, tree.folder / LIBRARIES / LIBC]


def test_a_library_that_the_tree_lacks_is_named(tree: Tree) -> None:
    (tree.folder / LIBRARIES / LIBC).unlink()
    program = tree.folder / "usr" / "bin" / QEMU
    program.write_bytes(program.read_bytes().replace(b"libc.so.6\0", b"none.so.6\0"))
    with pytest.raises(PrepareError, match=r"none\.so\.6"):
        tree.libraries(f"usr/bin/{QEMU}")


def test_the_image_has_it_with_its_libraries_and_where_its_firmware_is(tree: Tree, tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    _add_qemu_of_suite(root, tree)
    script = (root.folder / "usr" / "bin" / QEMU).read_text().replace("/opt/", f"{root.folder}/opt/")
    said = subprocess.run(["sh", "-c", script, QEMU, "-machine", "pc"], capture_output=True, text=True, check=True)
    assert said.stdout == "-L /usr/share/qemu -machine pc\n"
