"""What a file that is given as a raw image looks like. For ``check`` alone: a disk is never served by a guess."""

from __future__ import annotations

from typing import Final

HEAD: Final = 36 << 10
"""So many bytes from the beginning tell."""

_MAGIC: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0x8001, b"CD001", "iso"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
)
_CONVERT: Final = {"qcow2", "qed", "vmdk", "vhdx", "vhd", "vdi"}
_PACKED: Final = {"gzip": "gunzip", "xz": "unxz", "zstd": "unzstd"}


def format_notes(head: bytes, size: int, block_size: int, *, read_only: bool) -> tuple[str, str] | None:
    """What is strange about an image that begins with ``head``, and what would be right; None: nothing."""
    kind = next((name for at, magic, name in _MAGIC if head[at : at + len(magic)] == magic), None)
    if kind in _CONVERT:
        what = f"looks like {kind}, and is served as raw: the guest sees the container, not the disk in it"
        return what, f"convert it: qemu-img convert -f {'vpc' if kind == 'vhd' else kind} -O raw FILE disk.img"
    if kind in _PACKED:
        what = f"is compressed ({kind}), and is served as raw: the guest sees the compressed bytes"
        return what, f"unpack it with {_PACKED[kind]}"
    if kind == "luks":
        return "is encrypted (luks), and is served as raw", "the guest has to open it: cryptsetup open"
    if kind == "iso":
        return None if read_only else ("looks like an ISO image of a CD, and may be written", "set read_only = true")
    return _partition_note(head, size, block_size)


def _partition_note(head: bytes, size: int, block_size: int) -> tuple[str, str] | None:
    """A partition table that counts in other blocks, or that has more disk than there is."""
    for unit in (512, 4096):
        if head[unit : unit + 8] != b"EFI PART":
            continue
        if unit != block_size:
            what = f"has a partition table (GPT) that counts in blocks of {unit} bytes, which the guest will not find"
            return what, f"set block_size = {unit}"
        last = int.from_bytes(head[unit + 32 : unit + 40], "little")  # where its copy is: the disk's last block
        if (last + 1) * unit > size:
            return f"is shorter than its partition table says: {(last + 1) * unit} bytes", "it may have been cut off"
        return None
    if head[510:512] != b"\x55\xaa":
        return None
    for entry in range(446, 510, 16):
        kind, start, count = head[entry + 4], head[entry + 8 : entry + 12], head[entry + 12 : entry + 16]
        end = (int.from_bytes(start, "little") + int.from_bytes(count, "little")) * block_size
        # A boot sector of a file system ends in 55 aa, too: an entry has a status of 0 or 0x80.
        if head[entry] not in (0, 0x80):
            return None
        if kind not in (0, 0xEE) and end > size:
            return f"is shorter than its partition table says: {end} bytes", "it may have been cut off"
    return None
