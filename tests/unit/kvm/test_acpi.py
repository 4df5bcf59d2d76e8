"""ACPI tables: read back byte by byte here, and by ACPICA's own compiler."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from transports.kvm.boot import acpi, aml

GPA = 0xE0000
WINDOWS = [acpi.Window(0xD0000000 + n * 0x1000, 0x1000, 16 + n) for n in range(8)]


class Memory:
    """The tables where the guest sees them."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def table(self, gpa: int, signature: bytes) -> bytes:
        at = gpa - GPA
        length = struct.unpack_from("<I", self.blob, at + 4)[0]
        table = self.blob[at : at + length]
        assert table[:4] == signature
        assert len(table) == length
        assert sum(table) % 256 == 0
        return table

    def root(self) -> list[int]:
        """The addresses in the XSDT, by way of the RSDP."""
        rsdp = self.blob[:36]
        assert rsdp[:8] == b"RSD PTR "
        assert sum(rsdp[:20]) % 256 == 0
        assert sum(rsdp) % 256 == 0
        revision, rsdt, length, xsdt = struct.unpack_from("<BIIQ", rsdp, 15)
        assert (revision, rsdt, length) == (2, 0, 36)
        table = self.table(xsdt, b"XSDT")
        return [entry for (entry,) in struct.iter_unpack("<Q", table[36:])]


def register(table: bytes, offset: int) -> tuple[int, ...]:
    return struct.unpack_from("<BBBBQ", table, offset)


@pytest.mark.parametrize("count", [0, 1, 8, 32, 200])
@pytest.mark.parametrize("cpus", [1, 2, 255])
def test_every_table_is_reached_from_the_rsdp_and_adds_up(count: int, cpus: int) -> None:
    memory = Memory(
        acpi.build_tables(GPA, [acpi.Window(0xD0000000 + n * 0x1000, 0x200, n) for n in range(count)], cpus)
    )
    fadt_gpa, madt_gpa = memory.root()
    fadt = memory.table(fadt_gpa, b"FACP")
    memory.table(madt_gpa, b"APIC")
    (dsdt_gpa,) = struct.unpack_from("<Q", fadt, 140)
    assert struct.unpack_from("<I", fadt, 40)[0] == dsdt_gpa
    dsdt = memory.table(dsdt_gpa, b"DSDT")
    assert dsdt.count(b"LNRO0005\0") == count


def test_the_machine_is_hardware_reduced_and_has_registers_to_end_it() -> None:
    fadt = acpi.fadt(0xE0040)
    assert len(fadt) == 276
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert flags >> 20 & 1
    assert flags >> 10 & 1
    assert register(fadt, 116) == (1, 8, 0, 1, 0x602)
    assert fadt[128] == 1
    assert register(fadt, 244) == (1, 8, 0, 1, 0x600)
    assert register(fadt, 256) == (1, 8, 0, 1, 0x601)
    assert not any(fadt[44:109])  # no SCI, no SMI, none of the old register blocks
    assert not any(fadt[148:244])


def test_the_madt_has_every_cpu_and_the_ioapic() -> None:
    madt = acpi.madt(3)
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 0)
    assert [struct.unpack_from("<BBBBI", madt, 44 + 8 * n) for n in range(3)] == [(0, 8, n, n, 1) for n in range(3)]
    assert struct.unpack_from("<BBBBII", madt, 68) == (1, 12, 0, 0, 0xFEC00000, 0)


def test_a_device_says_where_its_registers_are_and_which_interrupt_it_raises() -> None:
    dsdt = acpi.dsdt([acpi.Window(0xD0003000, 0x1000, 21)])
    memory32 = struct.pack("<BHBII", 0x86, 9, 1, 0xD0003000, 0x1000)
    interrupt = struct.pack("<BHBBI", 0x89, 6, 0b0011, 1, 21)  # edge, active high, exclusive
    assert memory32 + interrupt + b"\x79\x00" in dsdt
    assert b"_S5_\x12\x07\x04\x0a\x05\x00\x00\x00" in dsdt


def test_what_cannot_be_described_is_refused() -> None:
    for windows, cpus, gpa in (([], 0, GPA), ([], 256, GPA), ([], 1, GPA + 1), (WINDOWS * 126, 1, GPA)):
        with pytest.raises(ValueError, match="cannot describe"):
            acpi.build_tables(gpa, windows, cpus)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, "00"), (1, "01"), (2, "0a02"), (255, "0aff"), (256, "0b0001"), (65535, "0bffff"), (65536, "0c00000100")],
)
def test_a_number_takes_its_shortest_form(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("size", [1, 57, 58, 59, 4088, 4089, 4090, 70_000])
def test_a_package_length_counts_itself(size: int) -> None:
    term = aml.scope("_SB", bytes(size))
    lead = term[1]
    further = lead >> 6
    length = lead & 0x3F if not further else lead & 0xF | int.from_bytes(term[2 : 2 + further], "little") << 4
    assert length == len(term) - 1
    assert term[2 + further :] == b"_SB_" + bytes(size)


def test_a_package_too_long_for_its_length_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        aml.scope("_SB", bytes(1 << 28))


@pytest.mark.parametrize("path", ["", "ABCDE", "abc", "1AB", "\\_SB", "A.B"])
def test_what_is_no_name_of_acpi_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        aml.name_of(path)


def test_acpica_disassembles_the_tables_and_compiles_them_again_to_the_same_devices(tmp_path: Path) -> None:
    """iasl (Debian's acpica-tools) is the kernel's own interpreter as a compiler: an independent reader."""
    original = acpi.dsdt(WINDOWS)
    for name, table in (("dsdt", original), ("facp", acpi.fadt(0xE0040)), ("apic", acpi.madt(2))):
        (tmp_path / f"{name}.dat").write_bytes(table)
        done = subprocess.run(["iasl", "-d", f"{name}.dat"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert not re.search("warning|error|incorrect|invalid", said, re.IGNORECASE), said
    text = (tmp_path / "dsdt.dsl").read_text()
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )" in text
    assert text.count("Memory32Fixed (ReadWrite") == len(WINDOWS)
    assert re.search(r"Name \(_S5, Package \(0x04\)", text)
    assert re.search(r"Hardware Reduced \(V5\) : 1", (tmp_path / "facp.dsl").read_text())
    done = subprocess.run(["iasl", "-p", "again", "dsdt.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert " 0 Errors, 0 Warnings" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "again.aml").read_bytes()[36:] == original[36:]
