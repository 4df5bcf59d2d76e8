"""What firmware boots: a disk with GRUB for BIOS and for UEFI on it, and the files of a boot server."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

from guest.debian.cache import PrepareError

MIB = 1 << 20
SECTOR = 512
PARTITION_START = MIB
MBR_CODE = 440  # bytes before the disk's signature and its partition table
PARTITION_TABLE = 446
GRUB_BIOS = Path("/usr/lib/grub/i386-pc")
GRUB_EFI = Path("/usr/lib/grub/x86_64-efi")
PACKAGES = {
    "grub-mkimage": "grub-common",
    "mcopy": "mtools",
    str(GRUB_BIOS / "boot.img"): "grub-pc-bin",
    str(GRUB_EFI / "moddep.lst"): "grub-efi-amd64-bin",
}

# GRUB clears the screen before it runs a script, so the first line is another one's end.
SERIAL = """serial --unit=0 --speed=115200
terminal_output serial
echo ""
echo "GRUB runs: $grub_platform"
"""
SERIAL_MODULES = ("serial", "terminal", "echo")
PAYLOAD_SIZE = 400_000
"""Of a file that GRUB sums: several hundred packets, or several requests of a disk."""


def need(tool: str | Path, package: str) -> None:
    """``PrepareError`` names the Debian ``package`` of a program or a file that is missing."""
    if not (Path(tool).exists() if "/" in str(tool) else shutil.which(tool)):
        raise PrepareError(f"{tool} is not installed; install the Debian package '{package}'")


def check_tools() -> None:
    for tool, package in PACKAGES.items():
        need(tool, package)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (command, done.stdout, done.stderr)


def grub_image(target: Path, platform: str, prefix: str, script: str, modules: Sequence[str]) -> Path:
    """A GRUB for ``platform`` in ``target`` that runs ``script``."""
    config = target.with_name(f"{target.name}.cfg")
    config.write_text(SERIAL + script)
    _run("grub-mkimage", "-O", platform, "-p", prefix, "-c", config, "-o", target, *SERIAL_MODULES, *modules)
    return target


def payload(folder: Path) -> None:
    """A file ``payload`` in ``folder``, and its sum in ``sums``."""
    data = random.Random(5).randbytes(PAYLOAD_SIZE)
    (folder / "payload").write_bytes(data)
    (folder / "sums").write_text(f"{hashlib.sha256(data).hexdigest()}  payload\n")


def _check_payload(folder: str) -> str:
    return f'hashsum --hash sha256 --check {folder}/sums --prefix {folder}\necho "GRUB is done"\n'


CHECK_MODULES = ("hashsum", "gcry_sha256")
CHECKED = "payload: OK"
"""What GRUB says then."""


def boot_server_files(folder: Path) -> None:
    """``grub.0`` for BIOS and ``grub.efi``, which get the payload from where they came from."""
    payload(folder)
    modules = (*CHECK_MODULES, "net", "tftp")
    grub_image(folder / "grub.0", "i386-pc-pxe", "(pxe)/", _check_payload("(tftp)"), (*modules, "pxe"))
    grub_image(folder / "grub.efi", "x86_64-efi", "(tftp)/", _check_payload("(tftp)"), (*modules, "efinet"))
    folder.chmod(0o755)  # a user network that root started serves it as somebody else


def u_boot_script(lines: Sequence[str]) -> bytes:
    """A script as U-Boot reads it: its "legacy image" of one file."""
    text = "".join(f"{line}\n" for line in lines).encode()
    data = struct.pack(">II", len(text), 0) + text
    linux, x86, script, uncompressed = 5, 3, 6, 0
    rest = struct.pack(">IIIIIBBBB32s", 0, len(data), 0, 0, zlib.crc32(data), linux, x86, script, uncompressed, b"test")
    magic = struct.pack(">I", 0x27051956)
    sum_of_head = zlib.crc32(magic + bytes(4) + rest)
    return magic + struct.pack(">I", sum_of_head) + rest + data


U_BOOT_ADDRESS = "1000000"  # where it puts a file, in hexadecimal
U_BOOT_STARTED = "U-Boot runs a script"
U_BOOT_CHECK = f"crc32 {U_BOOT_ADDRESS} ${{filesize}}"


def u_boot_checked(data: bytes) -> str:
    """The beginning of what U-Boot says when it has read ``data``."""
    last = int(U_BOOT_ADDRESS, 16) + len(data) - 1
    return f"crc32 for {int(U_BOOT_ADDRESS, 16):08x} ... {last:08x} ==> {zlib.crc32(data):08x}"


def boot_disk(folder: Path, kernel: Path, initramfs: Path) -> Path:
    """A disk with one FAT partition. GRUB checks a file there and loads the kernel, started by BIOS or by UEFI."""
    disk = folder / "boot.img"
    payload(folder)
    load = f"load ${{devtype}} ${{devnum}}:${{distro_bootpart}} {U_BOOT_ADDRESS} payload"
    (folder / "boot.scr").write_bytes(u_boot_script([f"echo {U_BOOT_STARTED}", load, U_BOOT_CHECK]))
    script = f"set root=(hd0,msdos1)\n{_check_payload('(hd0,msdos1)')}"
    script += "linux /vmlinuz console=ttyS0 quiet panic=-1\ninitrd /initrd\nboot\n"
    modules = (*CHECK_MODULES, "part_msdos", "fat", "linux", "boot")
    core = grub_image(folder / "core.img", "i386-pc", "/", script, (*modules, "biosdisk")).read_bytes()
    efi = grub_image(folder / "bootx64.efi", "x86_64-efi", "/", script, modules)
    assert SECTOR + len(core) <= PARTITION_START
    files = {
        "vmlinuz": kernel,
        "initrd": initramfs,
        "EFI/BOOT/BOOTX64.EFI": efi,
        "payload": folder / "payload",
        "sums": folder / "sums",
        "boot.scr": folder / "boot.scr",  # U-Boot's
    }
    sectors = (sum(file.stat().st_size for file in files.values()) // MIB + 8) * MIB // SECTOR
    disk.touch()
    os.truncate(disk, PARTITION_START + sectors * SECTOR)
    partition = f"{disk}@@{PARTITION_START}"
    _run("mformat", "-i", partition, "-T", str(sectors), "-h", "16", "-s", "63", "::")
    _run("mmd", "-i", partition, "::/EFI", "::/EFI/BOOT")
    for name, file in files.items():
        _run("mcopy", "-i", partition, file, f"::/{name}")
    with disk.open("r+b") as image:
        # The boot sector reads the core's first sector from sector 1, and that one the others behind it.
        image.write((GRUB_BIOS / "boot.img").read_bytes()[:MBR_CODE])
        image.seek(PARTITION_TABLE)
        # One partition, active for BIOS and of the EFI system's type for UEFI; cylinders as where they do not count.
        image.write(b"\x80\xfe\xff\xff\xef\xfe\xff\xff")
        image.write((PARTITION_START // SECTOR).to_bytes(4, "little") + sectors.to_bytes(4, "little"))
        image.seek(SECTOR - 2)
        image.write(b"\x55\xaa" + core)
    return disk
