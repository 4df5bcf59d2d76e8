"""Compressed kernels: unpacked where they can be, else told what to do."""

from __future__ import annotations

import bz2
import lzma
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from kit.kvm.elf_kernel import bzimage, plain_kernel

from transports.kvm.boot import bzimage as bz
from transports.kvm.boot import pvh
from virtio.errors import HostError

VMLINUX = plain_kernel()


def gzip_less_its_size(data: bytes) -> bytes:
    """gzip ends with the size, which is the size that ends the payload."""
    packer = zlib.compressobj(wbits=31)
    return (packer.compress(data) + packer.flush())[:-4]


PACKED = {
    "gzip": gzip_less_its_size(VMLINUX),
    "xz": lzma.compress(VMLINUX, check=lzma.CHECK_CRC32),
    "lzma": lzma.compress(VMLINUX, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress(VMLINUX),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_bzimage_is_unpacked_by_python_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    image = bzimage(PACKED[name], len(VMLINUX))
    assert bz.is_bzimage(image)
    assert bz.unpack_bzimage(image) == VMLINUX
    assert pvh.parse_kernel(image, "k").entry_gpa == 0x100010


def test_lz4_is_unpacked_by_its_command() -> None:
    if shutil.which("lz4") is None:
        pytest.skip("no lz4 command")
    packed = subprocess.run(["lz4", "-lc"], input=VMLINUX, capture_output=True, check=True).stdout
    assert bz.unpack_bzimage(bzimage(packed, len(VMLINUX))) == VMLINUX


def test_without_the_command_the_advice_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    image = bzimage(b"\x02\x21\x4c\x18" + bytes(50), len(VMLINUX))
    with pytest.raises(HostError, match=r"boot/vmlinuz: is a bzImage packed with lz4; install the package 'lz4', or"):
        pvh.parse_kernel(image, "boot/vmlinuz")


def test_a_command_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "lz4"
    program.write_text("#!/bin/sh\necho 'first line' >&2\necho 'no such frame' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(HostError, match="damaged bzImage: lz4 says: no such frame"):
        bz.unpack_bzimage(bzimage(b"\x02\x21\x4c\x18" + bytes(50), 10))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("size", [len(VMLINUX) - 1, len(VMLINUX) + 1])
def test_a_size_that_does_not_agree_is_damage(name: str, size: int) -> None:
    with pytest.raises(HostError, match="damaged bzImage"):
        bz.unpack_bzimage(bzimage(PACKED[name], size))


@pytest.mark.parametrize("name", PACKED)
def test_a_payload_that_was_changed_is_damage(name: str) -> None:
    packed = bytearray(PACKED[name])
    packed[len(packed) // 2] ^= 0x55
    with pytest.raises(HostError, match="damaged bzImage"):
        bz.unpack_bzimage(bzimage(bytes(packed), len(VMLINUX)))


def test_a_small_file_that_claims_to_hold_much_unpacks_no_more_than_that() -> None:
    bomb = lzma.compress(bytes(64 << 20))
    with pytest.raises(HostError, match=r"damaged bzImage: 6 of its kernel's 5 bytes"):
        bz.unpack_bzimage(bzimage(bomb, 5))
    with pytest.raises(HostError, match="claims to hold"):
        bz.unpack_bzimage(bzimage(bomb, 0xFFFFFFFF))


def test_what_is_unpacked_must_be_a_kernel() -> None:
    with pytest.raises(HostError, match="damaged bzImage"):
        bz.unpack_bzimage(bzimage(bz2.compress(b"not an ELF"), 10))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (bzimage(b"", 0)[:0x220], "middle of its header"),
        (bzimage(PACKED["xz"], len(VMLINUX))[:-40], "middle of its kernel"),
        (bzimage(b"", 0), "middle of its kernel"),
        (bzimage(b"what", 9), "not known here"),
        (bzimage(PACKED["xz"], len(VMLINUX), version=0x207), "boot protocol 2.07, too old"),
    ],
)
def test_a_bzimage_that_cannot_be_used_says_why(image: bytes, said: str) -> None:
    with pytest.raises(HostError, match=said):
        bz.unpack_bzimage(image)


def test_no_setup_sectors_stand_for_four() -> None:
    image = bytearray(bzimage(PACKED["xz"], len(VMLINUX), setup_sectors=4))
    image[0x1F1] = 0
    assert bz.unpack_bzimage(bytes(image)) == VMLINUX


def test_an_elf_file_is_no_bzimage_whatever_its_code_says() -> None:
    image = bytearray(VMLINUX + bytes(1024))
    struct.pack_into("<4s", image, 0x202, b"HdrS")
    assert pvh.parse_kernel(bytes(image), "k").entry_gpa == 0x100010
