"""Packages of a suite: found, fetched and unpacked from a small archive of the test's own, by the real apt."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit.host.debian_archive import SUITE, Archive

from guest.boot.initramfs import BUSYBOX
from guest.debian import suites
from guest.debian.cache import PrepareError
from guest.debian.elf import with_interpreter
from guest.debian.suites import open_suite
from guest.debian.tree import LIBRARIES, LOADER, Tree, unpack_archives


@pytest.fixture
def unsigned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    monkeypatch.setenv("HYPERBELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suites, "_mirror", lambda: f"file:{tmp_path}/archive")
    return Archive(tmp_path / "archive")


@pytest.fixture
def archive(unsigned: Archive, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """One that apt trusts."""
    monkeypatch.setattr(suites, "SOURCE", f"{suites.SOURCE}Trusted: yes\n")
    return unsigned


def test_a_suite_that_this_machines_keys_did_not_sign_is_refused(unsigned: Archive) -> None:
    unsigned.add("tool", "1.0-1", {})
    with pytest.raises(PrepareError, match=r"Debian trixie: .*not signed.* debian-archive-keyring"):
        open_suite(SUITE, print)


def test_an_unknown_suite_is_named_beside_those_that_are_known() -> None:
    with pytest.raises(PrepareError, match="no suite 'stretch'; known are bookworm, trixie, trixie-backports"):
        open_suite("stretch", print)


def test_a_mirror_that_does_not_answer_is_an_error_with_advice(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "_mirror", lambda: f"file:{tmp_path}/nowhere")
    with pytest.raises(PrepareError, match="see whether 'apt-get update' works on this machine"):
        open_suite(SUITE, print)


def test_version_and_dependencies_are_the_suites_and_not_those_of_what_is_installed(archive: Archive) -> None:
    archive.add("dpkg", "99:7.1", {}, depends="libone (>= 2), first | second, third:any")
    suite = open_suite(SUITE, print)
    assert suite.version("dpkg") == "99:7.1"
    assert suite.depends("dpkg") == ["libone", "first", "third"]


def test_a_package_that_the_suite_does_not_have_is_named(archive: Archive) -> None:
    with pytest.raises(PrepareError, match="Debian trixie has no package tool"):
        open_suite(SUITE, print).version("tool")


def test_a_tree_has_the_package_and_all_it_depends_on_in_one_usr(archive: Archive) -> None:
    archive.add("libone", "1", {"lib/libone.txt": "old layout"})
    archive.add("libtwo", "1", {"usr/lib/libtwo.txt": "new layout"}, depends="libone")
    archive.add("tool", "1:2.0-1", {"usr/bin/tool": "text", "sbin/daemon": "text"}, depends="libtwo")
    archive.add("other", "1", {"usr/bin/other": "not asked for"})
    tree = open_suite(SUITE, print).unpack(["tool"])
    found = sorted(str(path.relative_to(tree.folder)) for path in tree.folder.rglob("*") if path.is_file())
    assert found == ["usr/bin/tool", "usr/lib/libone.txt", "usr/lib/libtwo.txt", "usr/sbin/daemon"]
    assert (tree.folder / "lib" / "libtwo.txt").read_text() == "new layout"


def test_a_tree_is_fetched_once_and_anew_when_its_version_is_another(archive: Archive) -> None:
    archive.add("tool", "1", {"usr/bin/tool": "first"})
    said: list[str] = []
    suite = open_suite(SUITE, said.append)
    first = suite.unpack(["tool"])
    said.clear()
    assert suite.unpack(["tool"]) == first
    assert said == []
    archive.add("tool", "2", {"usr/bin/tool": "second"})
    suite._update()
    assert (suite.unpack(["tool"]).folder / "usr/bin/tool").read_text() == "second"


def test_a_version_that_left_the_mirror_is_replaced_by_the_one_that_followed(archive: Archive, tmp_path: Path) -> None:
    archive.add("tool", "1", {"usr/bin/tool": "first"})
    suite = open_suite(SUITE, print)
    archive.remove("tool")
    archive.add("tool", "2", {"usr/bin/tool": "second"})
    into = tmp_path / "into"
    into.mkdir()
    assert suite.download("tool", into).name == "tool_2_amd64.deb"


def test_two_at_once_get_the_same_whole_tree(archive: Archive) -> None:
    archive.add("tool", "1", {f"usr/share/tool/{number}": "text" for number in range(50)})

    def unpack(_: int) -> Tree:
        return open_suite(SUITE, lambda line: None).unpack(["tool"])

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(unpack, range(2))
    assert one == other
    assert len(list((one.folder / "usr/share/tool").iterdir())) == 50
    assert [path.name for path in one.folder.parent.iterdir()] == [one.folder.name]


def test_nothing_is_left_of_a_tree_that_could_not_be_fetched(archive: Archive) -> None:
    archive.add("tool", "1", {}, depends="missing")
    suite = open_suite(SUITE, print)
    with pytest.raises(PrepareError, match=r"Debian trixie: E: .*broken packages"):
        suite.unpack(["tool"])
    assert not (suite.folder / "trees").exists()
    assert not list(suite.folder.glob(".making-*"))


def test_a_program_of_a_tree_runs_with_the_trees_own_loader_and_its_arguments_first(tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    unpack_archives([], folder)
    (folder / "usr/bin/tool").write_text("")
    (folder / LOADER).parent.mkdir()
    (folder / LOADER).write_text('#!/bin/sh\necho "$SETTING"; printf "%s\\n" "$@"\n')
    (folder / LOADER).chmod(0o755)
    script = Tree(folder).wrapper(tmp_path / "bin" / "tool", "usr/bin/tool", ["-L", "a b"], {"SETTING": "x y"})
    said = subprocess.run([script, "last one"], capture_output=True, text=True, check=True).stdout.splitlines()
    program = str(folder / "usr/bin/tool")
    libraries = str(folder / "usr/lib/x86_64-linux-gnu")
    assert said == ["x y", "--library-path", libraries, "--argv0", program, program, "-L", "a b", "last one"]


def test_a_program_that_starts_itself_again_keeps_the_trees_loader_and_libraries(tmp_path: Path) -> None:
    """The shell of this machine stands for it: it starts what /proc/self/exe is, and looks at what is mapped."""
    tree = Tree(tmp_path / "a tree")
    unpack_archives([], tree.folder)
    (tree.folder / LOADER).parent.mkdir()
    for name in (LOADER, f"{LIBRARIES}/libc.so.6"):
        shutil.copy2(f"/{name}", tree.folder / name)
    shutil.copy2("/bin/dash", tree.folder / "usr/bin/tool")
    script = tree.restarting_wrapper(tmp_path / "bin" / "tool", "usr/bin/tool")
    maps = 'while read -r line; do echo "$line"; done </proc/$$/maps'
    again = 'exec "$(/bin/readlink /proc/$$/exe)" -c "$MAPS"'
    command = ["env", "-i", f"MAPS={maps}", str(script), "-c", again]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    mapped = {line.split(maxsplit=5)[5] for line in said.splitlines() if ".so" in line}
    assert mapped == {str(tree.folder / LOADER), str(tree.folder / LIBRARIES / "libc.so.6")}


def test_a_program_that_needs_no_interpreter_is_not_given_one() -> None:
    with pytest.raises(PrepareError, match="is linked statically"):
        with_interpreter(BUSYBOX.read_bytes(), Path("/lib/loader"))
    with pytest.raises(PrepareError, match="is not a program for x86-64"):
        with_interpreter(b"#!/bin/sh\n", Path("/lib/loader"))


def test_a_program_that_a_tree_does_not_have_is_named(tmp_path: Path) -> None:
    unpack_archives([], tmp_path / "tree")
    with pytest.raises(PrepareError, match=r"unpacked in .*tree have no usr/bin/tool"):
        Tree(tmp_path / "tree").command("usr/bin/tool")
