"""The guest's kernel module as its README has it installed: by Debian's DKMS, and by the Makefile that DKMS calls.

DKMS is fetched and unpacked like the kernel's headers; nothing is installed. It builds without being root.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from guests.testbed import Testbed

from guest.boot.module import SOURCES
from guest.debian.cache import cache_folder, scratch_folder
from guest.debian.headers import Headers, prepare_headers
from guest.debian.packages import packages_of

pytestmark = pytest.mark.guest

VERSION = tomllib.loads((SOURCES.parents[1] / "pyproject.toml").read_text())["project"]["version"]
TRIED = ("6.1.0-56-cloud-amd64", "6.12.118+deb13-amd64", "7.3.4+deb13-cloud-amd64")
NOT_FOR_THIS_KERNEL = 77  # as DKMS says that BUILD_EXCLUSIVE rules a kernel out


@pytest.fixture(scope="session")
def dkms() -> Path:
    """This machine's Debian's dkms, from the cache. That of another suite is in its kernel's headers' tree."""
    target = cache_folder() / "dkms"
    if not target.exists():
        with scratch_folder(cache_folder()) as scratch:
            archive = packages_of("", print).download("dkms", scratch)
            subprocess.run(["dpkg", "-x", archive, scratch / "whole"], check=True)
            try:
                (scratch / "whole").rename(target)
            except OSError:
                assert target.exists()  # another process was faster
    return target / "usr" / "sbin" / "dkms"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What ``cp -r guest/linux /usr/src/hyperbell-VERSION`` makes of a clean checkout."""
    copy = tmp_path / "src" / f"hyperbell-{VERSION}"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("*.o", "*.ko", "*.mod*", ".*", "Module.symvers"))
    return copy


def modinfo(module: Path) -> dict[str, str]:
    shown = subprocess.run(["modinfo", str(module)], capture_output=True, text=True, check=True).stdout
    return {name: value.strip() for name, _, value in (line.partition(":") for line in shown.splitlines())}


@dataclass(frozen=True)
class Dkms:
    """DKMS with trees of its own; the kernel's headers are where they are said to be."""

    script: Path
    folder: Path
    headers: Headers

    def run(self, action: str, kernel: str) -> subprocess.CompletedProcess[str]:
        trees = {"sourcetree": "src", "dkmstree": "tree", "installtree": "installed"}
        for name in trees.values():
            (self.folder / name).mkdir(exist_ok=True)
        place = self.headers.place(self.folder)
        script = self.script if self.headers.tree is None else Path("/usr/sbin/dkms")
        words = ["bash", str(script), action, f"hyperbell/{VERSION}", "-k", kernel, "-a", "x86_64"]
        words += ["--kernelsourcedir", str(self.headers.inside)]
        for option, name in trees.items():
            words += [f"--{option}", str(place / name)]
        return subprocess.run(
            self.headers.run(self.folder, *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )


@pytest.fixture
def added(dkms: Path, sources: Path, testbed: Testbed, tmp_path: Path) -> Dkms:
    """The module's sources known to DKMS."""
    tool = Dkms(dkms, tmp_path, prepare_headers(testbed.kernel, print))
    done = tool.run("add", release(testbed))
    assert done.returncode == 0, done.stdout
    return tool


def release(testbed: Testbed) -> str:
    return testbed.kernel.release


def test_dkms_builds_the_module_for_the_kernel_that_guests_boot(added: Dkms, testbed: Testbed, tmp_path: Path) -> None:
    kernel = release(testbed)
    done = added.run("build", kernel)
    assert done.returncode == 0, done.stdout
    (module,) = tmp_path.glob(f"tree/hyperbell/{VERSION}/{kernel}/x86_64/module/*.ko*")
    assert module.name == "hyperbell.ko"
    facts = modinfo(module)
    assert (facts["vermagic"].split()[0], facts["version"], facts["name"]) == (kernel, VERSION, "hyperbell")
    status = added.run("status", kernel).stdout
    assert status.strip() == f"hyperbell/{VERSION}, {kernel}, x86_64: built"


@pytest.mark.parametrize("kernel", ["5.10.0-1-amd64", "6.10.0-1-amd64", "6.2.1-amd64", "6.11.9-amd64", "7.30.1-amd64"])
def test_dkms_leaves_a_kernel_alone_that_the_module_was_not_tried_on(added: Dkms, tmp_path: Path, kernel: str) -> None:
    done = added.run("build", kernel)
    assert done.returncode == NOT_FOR_THIS_KERNEL, done.stdout
    assert list(tmp_path.glob("tree/**/*.ko")) == []


def test_dkms_takes_the_kernels_that_the_page_names() -> None:
    (rule,) = re.findall(r'^BUILD_EXCLUSIVE_KERNEL="(.*)"$', (SOURCES / "dkms.conf").read_text(), re.MULTILINE)
    page = (SOURCES / "README.md").read_text()
    for kernel in TRIED:
        assert re.search(rule, kernel), kernel
        assert ".".join(kernel.split(".")[:2]) in page


def test_makefile_builds_the_module_against_the_headers_it_is_given_and_cleans_up(
    sources: Path, testbed: Testbed
) -> None:
    headers = prepare_headers(testbed.kernel, print)
    before = {path.name for path in sources.iterdir()}
    for target in ("modules", "clean"):
        command = headers.run(sources, "make", "-C", str(headers.place(sources)), f"KDIR={headers.inside}", target)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        if target == "modules":
            assert modinfo(sources / "hyperbell.ko")["vermagic"].split()[0] == release(testbed)
    assert {path.name for path in sources.iterdir()} == before
