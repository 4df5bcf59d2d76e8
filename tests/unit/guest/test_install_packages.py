"""``install-packages.sh`` on Debians of the test's own: what dpkg and apt say, and what they are told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kit.project import ROOT

LIST = """\
# a comment
[run]
python3     # with a reason

[build]
gcc
libelf1     # gone since Debian 13, where another package provides it

[test]
old-name | new-name
needs-of linux-headers-amd64
"""
SHOWN = {
    "linux-headers-amd64": "linux-headers-9.9-amd64 (= 1)",
    "linux-headers-9.9-amd64": "linux-kbuild-9.9, linux-image-9.9-amd64 | linux-image-unsigned, gcc-14, linux-base",
    "linux-kbuild-9.9": "libelf1t64 (>= 0.1), pahole:any | other",
    "new-name": "",
}


class Debian:
    """Fake commands in ``folder``; what apt-get is told is in its log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        (folder / "bin").mkdir()
        (folder / "shown").mkdir()
        shutil.copy(ROOT / "install-packages.sh", folder)
        (folder / "packages.txt").write_text(LIST)
        for name, depends in SHOWN.items():
            (folder / "shown" / name).write_text(f"Package: {name}\nDepends: {depends}\n")
        self.command("apt-cache", f'for last; do :; done; cat "{folder}/shown/$last"')
        self.command("apt-get", f'echo "apt-get $*" >>{self.log}')
        self.installed("dpkg", "grep")
        self.user(0)

    def command(self, name: str, script: str) -> None:
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def installed(self, *packages: str) -> None:
        """Each "name" or "name|what it provides"."""
        lines = "".join(f"ii |{package.replace('|', ', ')}\n" for package in packages)
        (self.folder / "installed").write_text(f"{lines}rc |removed, libelf1\nun |unknown, \n")
        self.command("dpkg-query", f"cat {self.folder}/installed")

    def user(self, number: int, sudo: bool = False) -> None:
        self.command("id", f"echo {number}")
        if sudo:
            self.command("sudo", f'echo "sudo $1" >>{self.log}; "$@"')

    def run(self, *sections: str) -> subprocess.CompletedProcess[str]:
        tools = self.folder / "tools"  # no other apt, and no sudo of this machine
        tools.mkdir(exist_ok=True)
        for name in ("sh", "sed", "grep", "tr", "sort", "env", "cat", "dirname", "mv"):
            if not (tools / name).exists():
                (tools / name).symlink_to(shutil.which(name) or "")
        return subprocess.run(
            ["sh", self.folder / "install-packages.sh", *sections],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PATH": f"{self.folder}/bin:{tools}"},
        )

    def fetched(self) -> list[str]:
        """The packages that apt-get was told to install."""
        found = re.search(r"^apt-get -qq install -y --no-install-recommends (.*)$", self.log.read_text(), re.MULTILINE)
        return found.group(1).split() if found else []


@pytest.fixture
def debian(tmp_path: Path) -> Debian:
    return Debian(tmp_path)


def test_only_the_sections_that_are_named_are_installed(debian: Debian) -> None:
    assert debian.run("run", "build").returncode == 0
    assert debian.fetched() == ["python3", "gcc", "libelf1"]


def test_nothing_is_done_and_nothing_said_where_all_is_there(debian: Debian) -> None:
    debian.installed("python3", "gcc", "libelf1t64|libelf1 (= 0.192-4), libelf1-any")
    done = debian.run("run", "build")
    assert (done.returncode, done.stdout, done.stderr, debian.log.read_text()) == (0, "", "", "")


def test_a_name_that_an_installed_package_provides_is_there(debian: Debian) -> None:
    debian.installed("python3", "libelf1t64|libelf1 (= 0.192-4)")
    debian.run("build")
    assert debian.fetched() == ["gcc"]


def test_a_removed_package_whose_configuration_is_left_is_not_there(debian: Debian) -> None:
    debian.installed("python3", "gcc")
    debian.run("build")
    assert debian.fetched() == ["libelf1"]


def test_of_alternatives_the_one_that_this_debian_has_is_taken_and_either_is_enough(debian: Debian) -> None:
    headers = ("gcc-14", "libelf1t64", "pahole")
    debian.installed(*headers)
    debian.run("test")
    assert debian.fetched() == ["new-name"]
    debian.installed(*headers, "old-name")
    debian.log.write_text("")
    debian.run("test")
    assert debian.fetched() == []


def test_the_compiler_is_the_one_that_the_kernels_headers_ask_for(debian: Debian) -> None:
    debian.installed("new-name")
    assert debian.run("test").returncode == 0
    assert debian.fetched() == ["gcc-14", "libelf1t64", "pahole"]


def test_lists_are_updated_once_before_headers_are_looked_up_that_apt_does_not_know(debian: Debian) -> None:
    shown = debian.folder / "shown"
    shown.rename(debian.folder / "later")
    debian.command("apt-get", f'echo "apt-get $*" >>{debian.log}; [ -e {shown} ] || mv {debian.folder}/later {shown}')
    assert debian.run("test").returncode == 0
    assert debian.log.read_text().count("apt-get -qq update") == 1
    assert "gcc-14" in debian.fetched()


def test_without_root_and_sudo_the_command_to_run_is_said(debian: Debian) -> None:
    debian.user(1000)
    done = debian.run("run", "build")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "as root, run: apt-get update; apt-get install --no-install-recommends python3 gcc libelf1"
    )
    assert debian.fetched() == []


def test_a_user_with_sudo_installs_by_it(debian: Debian) -> None:
    debian.user(1000, sudo=True)
    assert debian.run("run").returncode == 0
    assert debian.fetched() == ["python3"]
    assert debian.log.read_text().splitlines()[0] == "sudo apt-get"


def test_an_unknown_section_is_an_error(debian: Debian) -> None:
    done = debian.run("tests")
    assert done.returncode != 0
    assert "has no section [tests]" in done.stderr


def test_an_installed_daemon_needs_no_package_of_the_tests() -> None:
    text = (ROOT / "Makefile").read_text()
    install = text[text.index("\ninstall:") : text.index("\nclean:")]
    assert "./install-packages.sh run build\n" in install
    sections = re.split(r"^\[(\w+)\].*$", (ROOT / "packages.txt").read_text(), flags=re.MULTILINE)
    by_name = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(by_name) == ["run", "build", "test"]
    assert not re.search(r"qemu|iperf|busybox|gcc-|-dev", by_name["run"])
