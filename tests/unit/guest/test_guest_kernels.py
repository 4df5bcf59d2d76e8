"""Kernels as Debian 12, 13 and its backports lay them out, fetched from a small archive of the test's own."""

from __future__ import annotations

import lzma
import subprocess
from pathlib import Path

import pytest
from kit.host.debian_archive import SUITE, Archive

from guest.boot.initramfs import module_order
from guest.debian import suites
from guest.debian.cache import PrepareError
from guest.debian.headers import _make_relocatable
from guest.debian.kernel import META_PACKAGE, prepare_kernel, read_module

RELEASE = "9.9.1+deb-cloud-amd64"
PACKAGE = f"linux-image-{RELEASE}"
MODULE = b"\x7fELF\0depends=\0name=disk\0"
BUILT_IN = "kernel/drivers/virtio/virtio_pci.ko\n"
FOLDER = f"lib/modules/{RELEASE}"
OLD: dict[str, str | bytes] = {f"boot/vmlinuz-{RELEASE}": "kernel", f"{FOLDER}/kernel/drivers/disk.ko": MODULE}
NEW: dict[str, str | bytes] = {
    f"boot/vmlinuz-{RELEASE}": "kernel",
    f"usr/{FOLDER}/kernel/drivers/disk.ko.xz": lzma.compress(MODULE),
}


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    monkeypatch.setenv("HYPERBELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suites, "_mirror", lambda: f"file:{tmp_path}/archive")
    monkeypatch.setattr(suites, "SOURCE", f"{suites.SOURCE}Trusted: yes\n")
    made = Archive(tmp_path / "archive")
    made.add(META_PACKAGE, "1", {}, depends=f"linux-base-cloud-amd64, {PACKAGE} (= 1)")
    made.add("linux-base-cloud-amd64", "1", {})
    return made


@pytest.mark.parametrize("files", [OLD, NEW], ids=["Debian 12", "Debian 13"])
def test_a_kernel_of_one_package_is_found_whole(archive: Archive, files: dict[str, str | bytes]) -> None:
    archive.add(PACKAGE, "1", files, depends="kmod, linux-initramfs-tool")
    kernel = prepare_kernel(print, suite=SUITE)
    assert (kernel.package, kernel.release, kernel.suite) == (PACKAGE, RELEASE, SUITE)
    assert kernel.image.read_text() == "kernel"
    order = module_order(kernel.modules, ["disk"])
    assert {name: read_module(path) for name, path in order.items()} == {"disk": MODULE}


def test_a_kernel_of_several_packages_is_put_together_and_knows_what_is_built_in(archive: Archive) -> None:
    parts: dict[str, dict[str, str | bytes]] = {
        "base": {f"usr/{FOLDER}/modules.builtin": BUILT_IN},
        "binary": {f"usr/{FOLDER}/vmlinuz": "kernel"},
        "modules": {f"usr/{FOLDER}/kernel/drivers/disk.ko.xz": lzma.compress(MODULE)},
    }
    for part, files in parts.items():
        archive.add(f"linux-{part}-{RELEASE}", "1", files)
    depends = ["dracut | linux-initramfs-tool", *(f"linux-{part}-{RELEASE} (= 1)" for part in parts)]
    archive.add(PACKAGE, "1", {}, depends=", ".join(depends))
    kernel = prepare_kernel(print, suite=SUITE)
    assert kernel.image.read_text() == "kernel"
    assert list(module_order(kernel.modules, ["virtio_pci", "disk"])) == ["disk"]


def test_a_kernel_is_fetched_once(archive: Archive) -> None:
    archive.add(PACKAGE, "1", NEW)
    first = prepare_kernel(print, suite=SUITE)
    said: list[str] = []
    assert prepare_kernel(said.append, suite=SUITE) == first
    assert said == []


def test_the_suite_of_the_kernel_can_be_chosen_for_a_whole_run(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.add(PACKAGE, "1", NEW)
    monkeypatch.setenv("HYPERBELL_KERNEL_SUITE", SUITE)
    assert prepare_kernel(print).suite == SUITE


def test_a_package_without_a_kernel_is_an_error_that_leaves_nothing(archive: Archive, tmp_path: Path) -> None:
    archive.add(PACKAGE, "1", {f"usr/{FOLDER}/kernel/disk.ko": MODULE})
    with pytest.raises(PrepareError, match=f"{PACKAGE[:12]}.* holds 0 kernels and 1 module folders, not one each"):
        prepare_kernel(print, suite=SUITE)
    assert list((tmp_path / "cache" / "suites" / SUITE / "kernels").iterdir()) == []


@pytest.mark.parametrize("output", [False, True], ids=["Debian 12", "since Linux 7"])
def test_unpacked_headers_include_what_lies_beside_them(tmp_path: Path, output: bool) -> None:
    headers = tmp_path / "src" / "linux-headers-9.9-amd64"
    common = tmp_path / "src" / "linux-headers-9.9-common"
    for folder in (headers, common):
        folder.mkdir(parents=True)
    first = f"KBUILD_OUTPUT=/usr/src/{headers.name}\n" if output else ""
    (headers / "Makefile").write_text(f"{first}include /usr/src/{common.name}/Makefile\n")
    (common / "Makefile").write_text("all:\n\t@echo common of $(KBUILD_OUTPUT)\n")
    _make_relocatable(headers, common.name)
    said = subprocess.run(["make", "-sC", headers], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"common of {headers if output else ''}".strip()
