"""A kernel's headers, unpacked and not installed, and how make runs against them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from guest.debian.cache import PrepareError, Progress, cache_folder, scratch_folder
from guest.debian.kernel import Kernel
from guest.debian.packages import packages_of
from guest.debian.suites import open_suite
from guest.debian.tools import run_tool
from guest.debian.tree import WORK_PLACE, Tree

# What a build calls beside what Debian's headers depend on, where all of it comes from a suite's tree. DKMS is for its
# tests; it brings perl along, with which Linux 6.12 looks at comments where all warnings are wanted.
BUILD_PACKAGES = (
    "dkms",
    *("make", "binutils", "kmod", "bash", "dash", "coreutils", "dpkg", "findutils", "diffutils"),
    *("grep", "gzip", "mawk", "perl-base", "sed", "tar", "xz-utils"),
)


@dataclass(frozen=True)
class Headers:
    """``folder`` is what ``make -C`` takes. ``tree`` is the suite whose compiler is used, None for this machine."""

    folder: Path
    tree: Tree | None = None

    def make(self, build: Path, *words: str) -> list[str]:
        """The command that makes ``words`` of the modules in the folder ``build``."""
        return self.run(build, "make", "-C", str(self.inside), f"M={self.place(build)}", *words)

    def run(self, build: Path, *command: str) -> list[str]:
        """The command that runs ``command`` where the headers are ``inside`` and the folder ``build`` its ``place``."""
        if self.tree is None:
            return list(command)
        return self.tree.inside(build, *command)

    @property
    def inside(self) -> Path:
        """The headers' folder as ``run`` sees it."""
        return self.folder if self.tree is None else Path("/") / self.folder.relative_to(self.tree.folder)

    def place(self, build: Path) -> Path:
        """The folder ``build`` as ``run`` sees it."""
        return build if self.tree is None else Path(WORK_PLACE)

    @property
    def compiler(self) -> str:
        """The compiler that Debian built the kernel with, and its Makefile calls."""
        variables = (self.folder / ".kernelvariables").read_text()
        found = re.search(r"^CC = .*\b(gcc-\d+)$", variables, re.MULTILINE)
        if found is None:
            raise PrepareError(f"{self.folder}/.kernelvariables names no compiler")
        return found.group(1)


def prepare_headers(kernel: Kernel, progress: Progress) -> Headers:
    """The headers of ``kernel``, from the cache or fetched.

    Those of another suite come with that suite's compiler and tools, because theirs may not run here.
    """
    return _suite_headers(kernel, progress) if kernel.suite else _own_headers(kernel, progress)


def _suite_headers(kernel: Kernel, progress: Progress) -> Headers:
    tree = open_suite(kernel.suite, progress).unpack([f"linux-headers-{kernel.release}", *BUILD_PACKAGES])
    tree.become_root()
    return Headers(tree.folder / "usr" / "src" / f"linux-headers-{kernel.release}", tree)


def _own_headers(kernel: Kernel, progress: Progress) -> Headers:
    """Three packages belong together and find each other by where they lie: the headers of this flavour, what all
    flavours share, and the build tools.
    """
    cache = cache_folder()
    target = cache / f"linux-headers-{kernel.release}"
    folder = target / "usr" / "src" / f"linux-headers-{kernel.release}"
    if target.exists():
        return Headers(folder)
    packages = packages_of("", progress)
    common = re.sub(r"-(cloud-)?amd64$", "-common", kernel.release)
    with scratch_folder(cache) as scratch:
        whole = scratch / "whole"
        advice = f"if Debian has a newer kernel by now, remove {cache / kernel.package} to fetch that"
        try:
            wanted = [name for name in packages.depends(f"linux-headers-{kernel.release}") if name.startswith("linux-")]
            parts = [name for name in wanted if name.startswith(("linux-headers-", "linux-kbuild-"))]
            for package in (f"linux-headers-{kernel.release}", *parts):
                into = scratch / package
                into.mkdir()
                archive = packages.download(package, into)
                progress(f"unpacking {archive.name}")
                run_tool(["dpkg", "-x", str(archive), str(whole)], f"unpacking {archive.name}")
        except PrepareError as error:
            raise PrepareError(f"{error}; {advice}") from error
        _make_relocatable(whole / "usr" / "src" / folder.name, f"linux-headers-{common}")
        try:
            whole.rename(target)
        except OSError:
            # Another process was faster; its headers are as good as ours.
            if not folder.exists():
                raise
    return Headers(folder)


def _make_relocatable(headers: Path, common: str) -> None:
    """The package's Makefile names its folder and the common one by installed paths; make it find both where it is."""
    makefile = headers / "Makefile"
    text = makefile.read_text() if makefile.exists() else ""
    if not (headers.parent / common / "Makefile").exists() or f"include /usr/src/{common}/Makefile" not in text:
        raise PrepareError(f"{headers.name} is not laid out as Debian's are: {makefile} does not include {common}'s")
    here = "$(dir $(realpath $(lastword $(MAKEFILE_LIST))))"
    makefile.write_text(
        f"hyperbell_headers := {here}\n"
        + text.replace(f"/usr/src/{headers.name}", "$(patsubst %/,%,$(hyperbell_headers))").replace(
            f"include /usr/src/{common}/", f"include $(hyperbell_headers)../{common}/"
        )
    )
