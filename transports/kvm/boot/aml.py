"""AML, the byte code of ACPI's DSDT (ACPI 6.5, chapter 20): just the terms a table of devices is made of."""

from __future__ import annotations

import re
from typing import Final

from construct import Const, Int8ul, Int16ul, Int32ul, Struct

# 20.2.3 and 20.2.5: opcodes.
_ZERO: Final = b"\x00"
_ONE: Final = b"\x01"
_NAME: Final = b"\x08"
_BYTE: Final = b"\x0a"
_WORD: Final = b"\x0b"
_DWORD: Final = b"\x0c"
_STRING: Final = b"\x0d"
_SCOPE: Final = b"\x10"
_BUFFER: Final = b"\x11"
_PACKAGE: Final = b"\x12"
_DEVICE: Final = b"\x5b\x82"

# 6.4: resource descriptors.
_END_TAG: Final = b"\x79\x00"  # a checksum of 0 stands for "not computed"
_MEMORY32_FIXED: Final = Struct(
    "tag" / Const(0x86, Int8ul),
    "length" / Const(9, Int16ul),
    "writable" / Const(1, Int8ul),
    "gpa" / Int32ul,
    "size" / Int32ul,
)
_EXTENDED_INTERRUPT: Final = Struct(
    "tag" / Const(0x89, Int8ul),
    "length" / Const(6, Int16ul),
    "flags" / Int8ul,
    "count" / Const(1, Int8ul),
    "gsi" / Int32ul,
)
INTERRUPT_CONSUMER: Final = 1 << 0
INTERRUPT_EDGE: Final = 1 << 1  # else level; active high and exclusive are the bits that stay 0


def integer(value: int) -> bytes:
    """The shortest form of a number of up to 32 bits (20.2.3)."""
    if value in (0, 1):
        return _ONE if value else _ZERO
    if value < 1 << 8:
        return _BYTE + value.to_bytes(1, "little")
    if value < 1 << 16:
        return _WORD + value.to_bytes(2, "little")
    return _DWORD + value.to_bytes(4, "little")


def string(text: str) -> bytes:
    return _STRING + text.encode("ascii") + b"\0"


def name_of(segment: str) -> bytes:
    """A name of one segment, such as ``_HID`` (20.2.2); a shorter one is filled with ``_``."""
    if re.fullmatch(r"[A-Z_][A-Z0-9_]{0,3}", segment) is None:
        raise ValueError(f"not a name of ACPI: {segment!r}")
    return segment.ljust(4, "_").encode("ascii")


def name(segment: str, value: bytes) -> bytes:
    """``Name (segment, value)``"""
    return _NAME + name_of(segment) + value


def package(*elements: bytes) -> bytes:
    """``Package () { ... }``"""
    return _PACKAGE + _with_length(bytes([len(elements)]) + b"".join(elements))


def scope(segment: str, *terms: bytes) -> bytes:
    """``Scope (segment) { ... }``"""
    return _SCOPE + _with_length(name_of(segment) + b"".join(terms))


def device(segment: str, *terms: bytes) -> bytes:
    """``Device (segment) { ... }``"""
    return _DEVICE + _with_length(name_of(segment) + b"".join(terms))


def resources(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () { ... }``, which is a buffer."""
    content = b"".join(descriptors) + _END_TAG
    return _BUFFER + _with_length(integer(len(content)) + content)


def memory32_fixed(gpa: int, size: int) -> bytes:
    """``Memory32Fixed (ReadWrite, gpa, size)`` (6.4.3.4)"""
    return bytes(_MEMORY32_FIXED.build({"gpa": gpa, "size": size}))


def edge_interrupt(gsi: int) -> bytes:
    """``Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { gsi }`` (6.4.3.6)"""
    return bytes(_EXTENDED_INTERRUPT.build({"flags": INTERRUPT_CONSUMER | INTERRUPT_EDGE, "gsi": gsi}))


def _with_length(content: bytes) -> bytes:
    """``content`` behind a PkgLength, which counts itself: 6 bits in one byte, or 4 and then whole bytes (20.2.4)."""
    if len(content) + 1 < 1 << 6:
        return bytes([len(content) + 1]) + content
    for further in (1, 2, 3):
        length = len(content) + 1 + further
        if length < 1 << (4 + 8 * further):
            return bytes([further << 6 | length & 0xF]) + (length >> 4).to_bytes(further, "little") + content
    raise ValueError(f"too long for AML: {len(content)} bytes")
