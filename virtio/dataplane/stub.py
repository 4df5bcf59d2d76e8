"""Writes the stubs of the compiled modules from their ``*.cdef.h``: run it after changing a border (``make stub``)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BORDERS = {  # the folder with what Python and C share (``*.cdef.h``): the stub that is made from it
    ROOT / "virtio" / "dataplane" / "border": ROOT / "virtio" / "_dataplane.pyi",
    ROOT / "virtio" / "usernet": ROOT / "virtio" / "_usernet.pyi",
    ROOT / "transports" / "kvm" / "native": ROOT / "transports" / "_vmm.pyi",
}

_HEAD = '''"""Made from {border} by virtio/dataplane/stub.py; a test compares the two."""

from typing import Any

class _Ffi:
    NULL: Any
    def new(self, cdecl: str, init: Any = ..., /) -> Any: ...
    def gc(self, cdata: Any, destructor: Any, /) -> Any: ...
    def from_buffer(self, data: Any, /, require_writable: bool = ...) -> Any: ...
    def buffer(self, cdata: Any, size: int = ..., /) -> Any: ...
    def cast(self, cdecl: str, value: Any, /) -> Any: ...

ffi: _Ffi

class _Lib:
'''

_DEFINE = re.compile(r"^#define (\w+) ", re.MULTILINE)
_FUNCTION = re.compile(r"^([a-z][\w ]*?[ *]+)(\w+)\(([^)]*)\);", re.MULTILINE)
_INTEGER = re.compile(r"^(int|u?int\d+_t)$")


def stub_text(border: Path) -> str:
    """The stub for a folder's cdef headers: constants and functions of ``lib``, integers typed, pointers ``Any``."""
    cdef = "\n".join(path.read_text(encoding="ascii") for path in sorted(border.glob("*.cdef.h")))
    lines = [f"    {name}: int" for name in _DEFINE.findall(cdef)]
    plain = re.sub(r"/\*.*?\*/", "", cdef, flags=re.DOTALL)
    for result, name, arguments in _FUNCTION.findall(plain):
        result = result.strip()
        kind = "None" if result == "void" else "int" if _INTEGER.match(result) else "Any"
        count = 0 if arguments.strip() == "void" else len(arguments.split(","))
        given = "".join(f", a{i}: Any" for i in range(count))
        lines.append(f"    def {name}(self{given}, /) -> {kind}: ...")
    return _HEAD.format(border=border.relative_to(ROOT)) + "\n".join(lines) + "\n\nlib: _Lib\n"


if __name__ == "__main__":
    for source, stub in BORDERS.items():
        stub.write_text(stub_text(source), encoding="ascii")
