"""The PVH loader: what it puts where, and what it says of files that are no kernels."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.kvm.elf_kernel import CODE, PT_LOAD, PT_NOTE, Part, elf, plain_kernel, pvh_note

from transports.kvm.boot import pvh
from virtio.errors import HostError

MIB = 1 << 20


def memory_of(boot: pvh.Boot, size: int) -> bytearray:
    memory = bytearray(size)
    for gpa, data in boot.placements:
        memory[gpa : gpa + len(data)] = data
    assert len(memory) == size
    return memory


@pytest.mark.parametrize("bits", [32, 64])
def test_a_kernel_of_either_width_is_loaded_and_entered_where_its_note_says(bits: int) -> None:
    kernel = pvh.parse_kernel(plain_kernel(bits), "k")
    assert kernel.entry_gpa == 0x100010
    assert [(segment.gpa, segment.size, bytes(segment.data)) for segment in kernel.segments] == [
        (0x100000, 0x3000, CODE)
    ]


@pytest.mark.parametrize("align", [4, 8])
def test_the_note_is_found_behind_others_of_either_alignment(align: int) -> None:
    def padded(note: bytes) -> bytes:
        return note + bytes(-len(note) % align)

    others = padded(pvh_note(0x666, name=b"Xen\0", kind=1)) + padded(pvh_note(0x777, 4, name=b"GNU\0"))
    notes = Part(PT_NOTE, 0, others + pvh_note(0x100020), align=align)
    kernel = pvh.parse_kernel(elf([Part(PT_LOAD, 0x100000, CODE), notes]), "k")
    assert kernel.entry_gpa == 0x100020


def test_the_start_info_leads_to_command_line_initrd_acpi_and_memory() -> None:
    kernel = pvh.parse_kernel(plain_kernel(), "k")
    initrd = bytes(range(256)) * 17
    boot = pvh.lay_out(kernel, 8 * MIB, command_line="console=hvc0 ä", initrd=initrd, acpi_tables=b"RSD PTR rest")
    memory = memory_of(boot, 8 * MIB)
    assert boot.entry_gpa == 0x100010
    magic, version, flags, modules, module_list, line, rsdp, memory_map, entries, _ = struct.unpack_from(
        "<IIIIQQQQII", memory, boot.start_info_gpa
    )
    assert (magic, version, flags, modules, entries) == (0x336EC578, 1, 0, 1, 3)
    text = "console=hvc0 ä".encode()
    assert memory[line : line + len(text) + 1] == text + b"\0"
    gpa, size, module_line, _ = struct.unpack_from("<QQQQ", memory, module_list)
    assert gpa % 4096 == 0
    assert (size, module_line) == (len(initrd), 0)
    assert memory[gpa : gpa + size] == initrd
    assert memory[rsdp : rsdp + 12] == b"RSD PTR rest"
    ranges = [struct.unpack_from("<QQII", memory, memory_map + 24 * n) for n in range(entries)]
    assert ranges == [(0, 0xA0000, 1, 0), (0xA0000, 0x60000, 2, 0), (0x100000, 7 * MIB, 1, 0)]
    assert 0xA0000 <= rsdp < 0x100000  # the guest does not take it for RAM
    assert memory[0xFFFF0:0xFFFF9].hex() == "ba0206b001eef4ebfd"  # where Linux jumps to restart
    assert memory[0x100000 : 0x100000 + len(CODE)] == CODE


def test_without_initrd_and_acpi_the_start_info_names_none() -> None:
    boot = pvh.lay_out(pvh.parse_kernel(plain_kernel(32), "k"), 2 * MIB)
    memory = memory_of(boot, 2 * MIB)
    _, _, _, modules, module_list, line, rsdp, *_ = struct.unpack_from("<IIIIQQQQII", memory, boot.start_info_gpa)
    assert (modules, module_list, rsdp) == (0, 0, 0)
    assert memory[line] == 0


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "neither an ELF file"),
        (b"MZ" + bytes(2000), "neither an ELF file"),
        (b"\x7fELF", "ends early"),
        (plain_kernel()[:80], "ends early"),
        (plain_kernel()[:-1], "ends early"),
        (elf([Part(PT_LOAD, 0x100000, CODE)], encoding=2), "not for x86"),
        (elf([Part(PT_LOAD, 0x100000, CODE)], machine=183), "another machine (number 183)"),
        (elf([]), "nothing to load"),
        (elf([Part(PT_NOTE, 0, pvh_note(0x100000))]), "nothing to load"),
        (elf([Part(PT_LOAD, 0x100000, CODE)]), "no PVH entry"),
        (elf([Part(PT_LOAD, 0x100000, CODE), Part(PT_NOTE, 0, pvh_note(1, name=b"Ken\0"))]), "no PVH entry"),
        (elf([Part(PT_LOAD, 0x100000, CODE), Part(PT_NOTE, 0, pvh_note(0x1000, 2))]), "no PVH entry"),
        (elf([Part(PT_LOAD, 0x100000, CODE), Part(PT_NOTE, 0, pvh_note(0x200000))]), "in none of its segments"),
        (elf([Part(PT_LOAD, 0x100000, CODE), Part(PT_NOTE, 0, pvh_note(0x100000)[:-1])]), "longer than its segment"),
        (elf([Part(PT_LOAD, 0x100000, CODE, memsz=3), Part(PT_NOTE, 0, pvh_note(0x100000))]), "larger in the file"),
    ],
)
def test_what_is_no_kernel_is_refused_by_name(image: bytes, said: str) -> None:
    with pytest.raises(HostError, match=r"^boot/vmlinux: ") as raised:
        pvh.parse_kernel(image, "boot/vmlinux")
    assert said in str(raised.value)


def test_segments_that_lie_over_each_other_are_refused() -> None:
    parts = [Part(PT_LOAD, 0x100000, CODE), Part(PT_LOAD, 0x100020, CODE), Part(PT_NOTE, 0, pvh_note(0x100000))]
    with pytest.raises(HostError, match="k: two of its segments overlap at 0x100020"):
        pvh.lay_out(pvh.parse_kernel(elf(parts), "k"), 2 * MIB)


@pytest.mark.parametrize("gpa", [2 * MIB - 16, 3 * MIB, (1 << 64) - 32])
def test_a_kernel_outside_memory_is_refused_with_the_memory_it_has(gpa: int) -> None:
    kernel = pvh.parse_kernel(elf([Part(PT_LOAD, gpa, CODE), Part(PT_NOTE, 0, pvh_note(gpa))]), "k")
    with pytest.raises(HostError, match="k: does not fit into the guest's memory of 2 MiB"):
        pvh.lay_out(kernel, 2 * MIB)


@pytest.mark.parametrize(("gpa", "over"), [(0x6000, "start info"), (0x20000, "command line"), (0xFFFF0, "without RAM")])
def test_a_kernel_over_what_the_loader_places_is_refused(gpa: int, over: str) -> None:
    kernel = pvh.parse_kernel(elf([Part(PT_LOAD, gpa, CODE), Part(PT_NOTE, 0, pvh_note(gpa))]), "k")
    with pytest.raises(HostError, match=over):
        pvh.lay_out(kernel, 2 * MIB, command_line="x")


def test_an_initrd_that_leaves_no_room_for_the_kernel_asks_for_more_memory() -> None:
    kernel = pvh.parse_kernel(plain_kernel(), "k")
    with pytest.raises(HostError, match=r"overlap.*give the guest more memory"):
        pvh.lay_out(kernel, 2 * MIB, initrd=bytes(MIB), initrd_name="root.cpio")
    with pytest.raises(HostError, match=r"root.cpio: does not fit.*give the guest more memory"):
        pvh.lay_out(kernel, 2 * MIB, initrd=bytes(3 * MIB), initrd_name="root.cpio")
    pvh.lay_out(kernel, 3 * MIB, initrd=bytes(MIB), initrd_name="root.cpio")


def test_a_command_line_that_linux_would_cut_is_refused() -> None:
    kernel = pvh.parse_kernel(plain_kernel(), "k")
    pvh.lay_out(kernel, 2 * MIB, command_line="x" * 2047)
    with pytest.raises(HostError, match="command line has 2048 bytes"):
        pvh.lay_out(kernel, 2 * MIB, command_line="x" * 2048)
    with pytest.raises(HostError, match="NUL"):
        pvh.lay_out(kernel, 2 * MIB, command_line="a\0b")


@pytest.mark.parametrize("size", [0, MIB, 2 * MIB + 1])
def test_memory_must_be_whole_pages_and_enough(size: int) -> None:
    with pytest.raises(HostError, match="2 MiB, in whole pages"):
        pvh.lay_out(pvh.parse_kernel(plain_kernel(), "k"), size)


def test_tables_without_room_are_refused() -> None:
    with pytest.raises(HostError, match="ACPI"):
        pvh.lay_out(pvh.parse_kernel(plain_kernel(), "k"), 2 * MIB, acpi_tables=bytes(0x1FFF1))


def test_a_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    with pytest.raises(HostError, match=r"vmlinux: No such file"):
        pvh.read_kernel(path)
    path.write_bytes(plain_kernel())
    assert pvh.read_kernel(path).entry_gpa == 0x100010
    with pytest.raises(HostError, match="is not a regular file"):
        pvh.read_image(Path("/dev/zero"))
    with pytest.raises(HostError, match="more than the 10 there is room for"):
        pvh.read_image(path, 10)


@given(
    st.binary(max_size=200) | st.tuples(st.integers(0, 199), st.binary(min_size=1, max_size=8)),
)
def test_no_damage_to_a_kernel_does_anything_but_an_error(change: bytes | tuple[int, bytes]) -> None:
    whole = plain_kernel()
    if isinstance(change, tuple):
        at, new = change
        image = whole[:at] + new + whole[at + len(new) :]
    else:
        image = whole[:16] + change
    try:
        kernel = pvh.parse_kernel(image, "k")
        boot = pvh.lay_out(kernel, 4 * MIB)
    except HostError:
        return
    memory_of(boot, 4 * MIB)
