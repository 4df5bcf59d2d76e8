"""A compressed Linux kernel (bzImage): found by its boot header, unpacked without running any of it.

The layout is that of the Linux x86 boot protocol (Documentation/arch/x86/boot.rst): after the real-mode part comes the
protected-mode part, in which the payload is the whole compressed vmlinux.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from virtio.errors import HostError

SETUP_SECTS_OFFSET: Final = 0x1F1
HEADER_MAGIC_OFFSET: Final = 0x202
HEADER_MAGIC: Final = b"HdrS"
VERSION_OFFSET: Final = 0x206
PAYLOAD_OFFSET: Final = 0x248  # le32 offset in the protected-mode part, le32 length
PAYLOAD_SINCE: Final = 0x0208  # the first protocol version with these two
SIZE_FIELD: Final = 4
"""The last bytes of the payload: the unpacked size. gzip brings its own there, for the others the kernel adds it."""

UNPACKED_MAX: Final = 512 << 20
"""No kernel is that large: what claims to be is damaged."""

COMMAND_SECONDS: Final = 120


@dataclass(frozen=True, slots=True)
class Compression:
    """One way a payload may be packed, known by its first bytes: unpacked by a function, or by a program."""

    name: str
    magic: bytes
    unpack: Callable[[bytes, int], bytes] | None = None
    command: tuple[str, ...] = ()


# One byte more than there should be is asked for: so the stream's own checksum, which stands behind the data, is read.


def _gunzip(payload: bytes, size: int) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(payload + struct.pack("<I", size), size + 1)


def _unlzma(payload: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor().decompress(payload, size + 1)


def _bunzip(payload: bytes, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload, size + 1)


COMPRESSIONS: Final = (
    Compression("gzip", b"\x1f\x8b", _gunzip),
    Compression("xz", b"\xfd7zXZ\0", _unlzma),
    Compression("lzma", b"\x5d\0\0", _unlzma),
    Compression("bzip2", b"BZh", _bunzip),
    Compression("lz4", b"\x02\x21\x4c\x18", command=("lz4", "-dc")),
    Compression("zstd", b"\x28\xb5\x2f\xfd", command=("zstd", "-dcq")),
    Compression("lzo", b"\x89LZO", command=("lzop", "-dc")),
)


def is_bzimage(image: bytes) -> bool:
    return image[HEADER_MAGIC_OFFSET : HEADER_MAGIC_OFFSET + len(HEADER_MAGIC)] == HEADER_MAGIC


def unpack_bzimage(image: bytes) -> bytes:
    """The ELF kernel (vmlinux) in ``image``. ``HostError`` with what to do; it does not name the file."""
    if len(image) < PAYLOAD_OFFSET + 8:
        raise HostError("is a bzImage that ends in the middle of its header")
    (version,) = struct.unpack_from("<H", image, VERSION_OFFSET)
    if version < PAYLOAD_SINCE:
        raise HostError(
            f"is a bzImage of boot protocol {version >> 8}.{version & 0xFF:02}, too old to say where its kernel lies; "
            "give the vmlinux it was made from"
        )
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    start = ((image[SETUP_SECTS_OFFSET] or 4) + 1) * 512 + offset  # 0 stands for 4, for old boot loaders' sake
    if length <= SIZE_FIELD or start + length > len(image):
        raise HostError("is a bzImage that ends in the middle of its kernel; copy it again")
    (size,) = struct.unpack_from("<I", image, start + length - SIZE_FIELD)
    payload = image[start : start + length - SIZE_FIELD]
    kernel = _unpack(payload, size)
    if len(kernel) != size or not kernel.startswith(b"\x7fELF"):
        raise HostError(f"is a damaged bzImage: {len(kernel)} of its kernel's {size} bytes came out; copy it again")
    return kernel


def _unpack(payload: bytes, size: int) -> bytes:
    for compression in COMPRESSIONS:
        if payload.startswith(compression.magic):
            break
    else:
        raise HostError("is a bzImage packed in a way that is not known here; give the vmlinux it was made from")
    if size > UNPACKED_MAX:
        raise HostError(f"is a damaged bzImage: it claims to hold {size} bytes; copy it again")
    if compression.unpack is None:
        return _unpack_by_command(compression, payload, size)
    try:
        return compression.unpack(payload, size)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
        raise HostError(f"is a damaged bzImage: {compression.name} says: {error}; copy it again") from error


def _unpack_by_command(compression: Compression, payload: bytes, size: int) -> bytes:
    program = compression.command[0]
    try:
        done = subprocess.run(compression.command, input=payload, capture_output=True, timeout=COMMAND_SECONDS)
    except FileNotFoundError as error:
        raise HostError(
            f"is a bzImage packed with {compression.name}; install the package {program!r}, or give the vmlinux "
            "(the kernel's scripts/extract-vmlinux makes it)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"is a bzImage that {program} did not unpack within {COMMAND_SECONDS} seconds") from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "backslashreplace").strip().splitlines()[-1:]
        raise HostError(f"is a damaged bzImage: {program} says: {' '.join(said)}; copy it again")
    return done.stdout[: size + 1]
