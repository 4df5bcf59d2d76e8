"""What is generated is up to date, and no file has grown too long to be read."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from kit.project import ROOT

from transports.kvm.native import lib as vmm
from virtio._usernet import lib as usernet
from virtio.dataplane import lib as dataplane

COMPILED = {"virtio/_dataplane.pyi": dataplane, "virtio/_usernet.pyi": usernet, "transports/_vmm.pyi": vmm}
LINES_MAX = 480  # about 400 is meant
FOLDERS = ("config", "daemon", "guest", "tests", "transports", "virtio")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for pattern in ("*.py", "*.c", "*.h")
    for path in (ROOT / folder).rglob(pattern)
    if "build" not in path.relative_to(ROOT).parts
)


def stub_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stub", ROOT / "virtio" / "dataplane" / "stub.py")
    assert spec is not None
    assert spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    return stub


def test_the_stubs_are_what_the_borders_say() -> None:
    stub = stub_maker()
    assert {str(path.relative_to(ROOT)) for path in stub.BORDERS.values()} == set(COMPILED)
    for border, written in stub.BORDERS.items():
        assert written.read_text(encoding="ascii") == stub.stub_text(border), "run `make stub`"


@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_module_is_that_of_this_tree(name: str) -> None:
    """A ``.so`` of yesterday tests nothing: what the header declares is there."""
    stub = (ROOT / name).read_text(encoding="ascii")
    names = {
        line.split()[1].split("(")[0] for line in stub.splitlines() if line.startswith("    def ") and "/)" in line
    }
    methods_of_ffi = {"new", "gc", "from_buffer", "buffer", "cast"}
    assert names - methods_of_ffi <= set(dir(COMPILED[name]))
    assert len(names) > 8


def test_each_code_of_the_data_plane_means_one_thing() -> None:
    codes = [getattr(dataplane, name) for name in dir(dataplane) if name.startswith(("DP_E_", "VQ_MISS", "VQ_BROKEN"))]
    assert len(codes) == len(set(codes)) > 8


def test_every_source_file_is_short_enough_to_be_read() -> None:
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(lengths) > 100
    assert {path: length for path, length in lengths.items() if length > LINES_MAX} == {}
