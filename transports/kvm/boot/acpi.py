"""ACPI tables of a virtual machine without a PC's old hardware: they tell Linux of its CPUs and its devices.

Debian's kernels take no virtio-mmio device from their command line, but they look for ACPI's LNRO0005. The machine is
"hardware-reduced" (ACPI 6.5, 4.1): no PM timer, no SCI, no 8259; power off and reset are registers of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

from transports.kvm.boot import aml

SLEEP_CONTROL_PORT: Final = 0x600
SLEEP_STATUS_PORT: Final = 0x601
RESET_PORT: Final = 0x602
RESET_VALUE: Final = 1
SLEEP_TYPE_OFF: Final = 5
"""What the guest writes to turn the machine off: this in bits 2-4, and SLP_EN, bit 5 (4.8.3.7)."""

LAPIC_GPA: Final = 0xFEE00000
IOAPIC_GPA: Final = 0xFEC00000
CPUS_MAX: Final = 255  # the APIC ids that a MADT entry of the first kind has room for, less the broadcast

VIRTIO_MMIO_HID: Final = "LNRO0005"  # virtio-mmio's id, which Linux looks for
DEVICES_MAX: Final = 1000

_OEM_ID: Final = b"HYPERB"
_OEM_TABLE_ID: Final = b"HYPERBEL"
_CREATOR_ID: Final = b"HYPB"
_HEADER: Final = Struct(
    "signature" / Bytes(4),
    "length" / Int32ul,
    "revision" / Int8ul,
    "checksum" / Int8ul,
    "oem_id" / Const(_OEM_ID),
    "oem_table_id" / Const(_OEM_TABLE_ID),
    "oem_revision" / Const(1, Int32ul),
    "creator_id" / Const(_CREATOR_ID),
    "creator_revision" / Const(1, Int32ul),
)
CHECKSUM_OFFSET: Final = 9

_RSDP: Final = Struct(  # 5.2.5.3
    "signature" / Const(b"RSD PTR "),
    "checksum" / Int8ul,  # of the first 20 bytes
    "oem_id" / Const(_OEM_ID),
    "revision" / Const(2, Int8ul),
    "rsdt_gpa" / Const(0, Int32ul),
    "length" / Const(36, Int32ul),
    "xsdt_gpa" / Int64ul,
    "extended_checksum" / Int8ul,
    Padding(3),
)
RSDP_OLD_SIZE: Final = 20

_ADDRESS: Final = Struct(  # 5.2.3.2, Generic Address Structure: here one byte of port space
    "space" / Const(1, Int8ul),
    "bit_width" / Const(8, Int8ul),
    "bit_offset" / Const(0, Int8ul),
    "access_size" / Const(1, Int8ul),
    "address" / Int64ul,
)

FADT_RESET_REGISTER: Final = 1 << 10
FADT_HARDWARE_REDUCED: Final = 1 << 20
FADT_WBINVD: Final = 1 << 0
FADT_NO_POWER_BUTTON: Final = 1 << 4
FADT_NO_SLEEP_BUTTON: Final = 1 << 5
BOOT_NO_VGA: Final = 1 << 2
BOOT_NO_RTC: Final = 1 << 5
_FADT: Final = Struct(  # 5.2.9; what is not named belongs to the hardware that is not there
    Padding(4),
    "dsdt_gpa" / Int32ul,
    Padding(65),
    "boot_architecture" / Int16ul,  # at byte 109 of the table
    Padding(1),
    "flags" / Int32ul,
    "reset_register" / _ADDRESS,
    "reset_value" / Int8ul,
    Padding(2),
    "minor_version" / Int8ul,
    Padding(8),
    "x_dsdt_gpa" / Int64ul,
    Padding(96),
    "sleep_control" / _ADDRESS,
    "sleep_status" / _ADDRESS,
    "hypervisor_vendor" / Const(b"HYPERBEL"),
)
_MADT: Final = Struct("lapic_gpa" / Const(LAPIC_GPA, Int32ul), "flags" / Const(0, Int32ul))  # 5.2.12; no 8259
_MADT_LAPIC: Final = Struct(
    *("type" / Const(0, Int8ul), "length" / Const(8, Int8ul), "uid" / Int8ul, "apic_id" / Int8ul),
    "flags" / Const(1, Int32ul),  # enabled
)
_MADT_IOAPIC: Final = Struct(
    *("type" / Const(1, Int8ul), "length" / Const(12, Int8ul), "id" / Const(0, Int8ul), Padding(1)),
    *("gpa" / Const(IOAPIC_GPA, Int32ul), "gsi_base" / Const(0, Int32ul)),
)


class Window(NamedTuple):
    """A virtio-mmio device: its registers and its interrupt."""

    gpa: int
    size: int
    gsi: int


def build_tables(gpa: int, windows: Sequence[Window], cpus: int) -> bytes:
    """Every table, to be placed at ``gpa`` (16-byte aligned, below 4 GiB); the RSDP comes first."""
    if not 1 <= cpus <= CPUS_MAX or len(windows) > DEVICES_MAX or gpa % 16:
        raise ValueError(f"cannot describe {cpus} CPUs and {len(windows)} devices in tables at {gpa:#x}")
    blob = bytearray(_RSDP.sizeof())

    def put(table: bytes) -> int:
        blob.extend(bytes(-len(blob) % 16))
        blob.extend(table)
        return gpa + len(blob) - len(table)

    dsdt_gpa = put(dsdt(windows))
    fadt_gpa = put(fadt(dsdt_gpa))
    madt_gpa = put(madt(cpus))
    xsdt_gpa = put(xsdt([fadt_gpa, madt_gpa]))
    blob[: _RSDP.sizeof()] = rsdp(xsdt_gpa)
    return bytes(blob)


def dsdt(windows: Sequence[Window]) -> bytes:
    """The devices, and how deep the machine can sleep."""
    devices = (
        aml.device(
            f"V{number:03}",
            aml.name("_HID", aml.string(VIRTIO_MMIO_HID)),
            aml.name("_UID", aml.integer(number)),
            aml.name("_CCA", aml.integer(1)),  # DMA is coherent
            aml.name("_CRS", aml.resources(aml.memory32_fixed(w.gpa, w.size), aml.edge_interrupt(w.gsi))),
        )
        for number, w in enumerate(windows)
    )
    off = aml.package(aml.integer(SLEEP_TYPE_OFF), aml.integer(0), aml.integer(0), aml.integer(0))
    return _table(b"DSDT", 2, aml.scope("_SB", *devices) + aml.name("_S5", off))


def fadt(dsdt_gpa: int) -> bytes:
    """FADT of ACPI 6.0: hardware-reduced, with registers to power off and to reset."""
    flags = FADT_WBINVD | FADT_NO_POWER_BUTTON | FADT_NO_SLEEP_BUTTON | FADT_RESET_REGISTER | FADT_HARDWARE_REDUCED
    body = _FADT.build(
        {
            "dsdt_gpa": dsdt_gpa,
            "boot_architecture": BOOT_NO_VGA | BOOT_NO_RTC,
            "flags": flags,
            "reset_register": {"address": RESET_PORT},
            "reset_value": RESET_VALUE,
            "minor_version": 0,
            "x_dsdt_gpa": dsdt_gpa,
            "sleep_control": {"address": SLEEP_CONTROL_PORT},
            "sleep_status": {"address": SLEEP_STATUS_PORT},
        }
    )
    return _table(b"FACP", 6, bytes(body))


def madt(cpus: int) -> bytes:
    """Each CPU's local APIC (its id is the CPU's number), and the one IOAPIC, for GSI 0 to 23."""
    lapics = (_MADT_LAPIC.build({"uid": number, "apic_id": number}) for number in range(cpus))
    return _table(b"APIC", 4, _MADT.build({}) + b"".join(lapics) + _MADT_IOAPIC.build({}))


def xsdt(tables_gpa: Sequence[int]) -> bytes:
    """The addresses of the other tables."""
    return _table(b"XSDT", 1, b"".join(Int64ul.build(address) for address in tables_gpa))


def rsdp(xsdt_gpa: int) -> bytes:
    """Where all begins. Its first checksum is that of ACPI 1.0, the second covers all of it."""
    whole = bytearray(_RSDP.build({"checksum": 0, "xsdt_gpa": xsdt_gpa, "extended_checksum": 0}))
    whole[8] = -sum(whole[:RSDP_OLD_SIZE]) & 0xFF
    whole[32] = -sum(whole) & 0xFF
    return bytes(whole)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """``body`` behind the header that every table has (5.2.6); all bytes of a table add up to 0."""
    length = _HEADER.sizeof() + len(body)
    head = _HEADER.build({"signature": signature, "length": length, "revision": revision, "checksum": 0})
    table = bytearray(head + body)
    table[CHECKSUM_OFFSET] = -sum(table) & 0xFF
    return bytes(table)
