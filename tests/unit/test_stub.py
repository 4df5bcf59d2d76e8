"""What is generated is up to date, and no file has grown too long to be read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from virtio.dataplane import lib

ROOT = Path(__file__).resolve().parents[2]
DATAPLANE = ROOT / "virtio" / "dataplane"
LINES_MAX = 480  # about 400 is meant
FOLDERS = ("config", "daemon", "guest", "tests", "transports", "virtio")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for pattern in ("*.py", "*.c", "*.h")
    for path in (ROOT / folder).rglob(pattern)
    if "build" not in path.relative_to(ROOT).parts
)


def test_the_stub_is_what_the_border_says() -> None:
    spec = importlib.util.spec_from_file_location("stub", DATAPLANE / "stub.py")
    assert spec is not None
    assert spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    cdef = (DATAPLANE / "dataplane.cdef.h").read_text(encoding="ascii")
    written = (ROOT / "virtio" / "_dataplane.pyi").read_text(encoding="ascii")
    assert written == stub.stub_text(cdef), "run `make stub`"


def test_the_compiled_module_is_that_of_this_tree() -> None:
    """A ``.so`` of yesterday tests nothing: what the header declares is there."""
    stub = (ROOT / "virtio" / "_dataplane.pyi").read_text(encoding="ascii")
    names = {
        line.split()[1].split("(")[0] for line in stub.splitlines() if line.startswith("    def ") and "/)" in line
    }
    methods_of_ffi = {"new", "gc", "from_buffer", "buffer", "cast"}
    assert names - methods_of_ffi <= set(dir(lib))
    assert len(names) > 40


def test_every_source_file_is_short_enough_to_be_read() -> None:
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(lengths) > 100
    assert {path: length for path, length in lengths.items() if length > LINES_MAX} == {}
