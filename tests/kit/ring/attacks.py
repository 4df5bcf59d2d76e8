"""HOSTILE's checklist, items 1 to 5: what a malicious driver puts into a ring, and the reason its queue breaks for."""

from __future__ import annotations

from collections.abc import Callable

from kit.guest.blk import T_GET_ID, header

from virtio.testing.driver import Desc, GuestMemory, PackedDriver, SplitDriver, VirtqueueDriver

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
SIZE = 64
ADDRESS = "a buffer lies outside guest memory"
LOOP = "a chain is too long, or loops"
BAD_NEXT = "a descriptor's next is outside its table"
TABLE_SIZE = "an indirect table of impossible size"
SHAPE = "a request without the parts its device needs"

Attack = Callable[[VirtqueueDriver], None]


def put(driver: VirtqueueDriver, *pieces: tuple[int, int, int]) -> None:
    """Make a chain of these (address, length, flags) available as they are; NEXT is added to all but the last."""
    last = len(pieces) - 1
    descs = [Desc(gpa, length, flags | (NEXT if n < last else 0), 0) for n, (gpa, length, flags) in enumerate(pieces)]
    if isinstance(driver, PackedDriver):
        driver.put_descs(descs)
        return
    assert isinstance(driver, SplitDriver)
    for n, desc in enumerate(descs):
        driver.write_desc(n, desc._replace(link=n + 1))
    driver.put_avail(0)


def head_of(driver: VirtqueueDriver) -> tuple[int, int, int]:
    """A good header of a request for the serial number."""
    gpa = driver.memory.allocate(16)
    driver.memory.write(gpa, header(T_GET_ID))
    return gpa, 16, 0


def end_of(memory: GuestMemory) -> int:
    return memory.gpa + memory.size


def table(driver: VirtqueueDriver, *descs: Desc, length: int | None = None, flags: int = 0) -> None:
    gpa = driver.write_table(descs)
    put(driver, (gpa, 16 * len(descs) if length is None else length, INDIRECT | flags))


def piece(driver: VirtqueueDriver, length: int = 32, flags: int = WRITE, link: int = 0) -> Desc:
    return Desc(driver.memory.allocate(max(length, 1)), length, flags, link)


# --- in both formats: buffers (item 4) and indirect tables (item 3) ---


def buffer(gpa_of: Callable[[GuestMemory], int], length: int) -> Attack:
    return lambda d: put(d, head_of(d), (gpa_of(d.memory), length, WRITE))


def readable_after_writable(d: VirtqueueDriver) -> None:
    put(d, head_of(d), (d.memory.allocate(32), 32, WRITE), (d.memory.allocate(32), 32, 0))


def total_of_4_gib(d: VirtqueueDriver) -> None:
    table(d, *(Desc(d.memory.gpa, d.memory.size, WRITE | (NEXT if n < 1023 else 0), n + 1) for n in range(1024)))


def table_at(gpa_of: Callable[[GuestMemory], int], length: int) -> Attack:
    return lambda d: put(d, (gpa_of(d.memory), length, INDIRECT))


BOTH: dict[str, tuple[Attack, str]] = {
    "buffer_at_0": (buffer(lambda m: 0, 32), ADDRESS),
    "buffer_below_memory": (buffer(lambda m: m.gpa - 1, 32), ADDRESS),
    "buffer_at_the_end_of_memory": (buffer(end_of, 32), ADDRESS),
    "buffer_across_the_end_of_memory": (buffer(lambda m: end_of(m) - 31, 32), ADDRESS),
    "buffer_of_2_gib": (buffer(lambda m: m.gpa, 1 << 31), ADDRESS),
    "buffer_that_wraps": (buffer(lambda m: 2**64 - 16, 32), ADDRESS),
    "buffer_at_the_last_byte_of_all": (buffer(lambda m: 2**64 - 1, 1), ADDRESS),
    "buffer_at_the_user_address": (buffer(lambda m: m.uva, 32), ADDRESS),
    "buffer_of_length_0": (buffer(lambda m: m.gpa, 0), "a descriptor of length 0"),
    "header_outside": (lambda d: put(d, (16, 16, 0), (d.memory.gpa, 32, WRITE)), ADDRESS),
    "readable_after_writable": (readable_after_writable, "a device-readable descriptor after a device-writable one"),
    "no_status_byte": (lambda d: put(d, head_of(d)), SHAPE),
    "half_a_header": (lambda d: put(d, (d.memory.gpa, 8, 0), (d.memory.gpa, 1, WRITE)), SHAPE),
    "nothing_but_a_status_byte": (lambda d: put(d, (d.memory.gpa, 1, WRITE)), SHAPE),
    "total_of_4_gib": (total_of_4_gib, "a chain of more than 4 GiB"),
    "table_of_length_0": (lambda d: table(d, piece(d), length=0), TABLE_SIZE),
    "table_a_byte_short": (lambda d: table(d, piece(d), length=15), TABLE_SIZE),
    "table_a_byte_long": (lambda d: table(d, piece(d), length=17), TABLE_SIZE),
    "table_of_1025_entries": (lambda d: table(d, *[piece(d, 1)] * 1025), TABLE_SIZE),
    "table_of_4_gib": (table_at(lambda m: m.gpa, 0xFFFF_FFF0), TABLE_SIZE),
    "table_that_wraps": (table_at(lambda m: 2**64 - 16, 32), TABLE_SIZE),
    "table_outside": (table_at(lambda m: 0x1000, 32), ADDRESS),
    "table_across_the_end_of_memory": (table_at(lambda m: end_of(m) - 8, 32), ADDRESS),
    "table_in_a_table": (lambda d: table(d, piece(d, 16, INDIRECT)), "an indirect descriptor inside an indirect table"),
    "table_with_next": (
        lambda d: put(d, (d.write_table([piece(d)]), 16, INDIRECT | NEXT), (d.memory.gpa, 1, WRITE)),
        "an indirect descriptor that is chained",
    ),
    "table_whose_entry_lies_outside": (lambda d: table(d, Desc(0, 16, 0, 0)), ADDRESS),
    "table_whose_entry_is_empty": (lambda d: table(d, piece(d, 0, 0)), "a descriptor of length 0"),
}


# --- split only (items 1 and 2) ---


def linked(*links: int) -> Attack:
    """A chain of good pieces whose ``next`` fields are these."""

    def attack(d: VirtqueueDriver) -> None:
        assert isinstance(d, SplitDriver)
        for n, link in enumerate(links):
            d.write_desc(n, Desc(d.memory.gpa, 16, NEXT, link))
        d.put_avail(0)

    return attack


def avail_index(change: int) -> Attack:
    def attack(d: VirtqueueDriver) -> None:
        assert isinstance(d, SplitDriver)
        d.set_avail_idx(d.avail_idx + change)

    return attack


def head(number: int) -> Attack:
    def attack(d: VirtqueueDriver) -> None:
        assert isinstance(d, SplitDriver)
        d.put_avail(number)

    return attack


SPLIT: dict[str, tuple[Attack, str]] = {
    "next_is_the_queue_size": (linked(SIZE), BAD_NEXT),
    "next_is_65535": (linked(65535), BAD_NEXT),
    "next_is_32768": (linked(1, 2, 32768), BAD_NEXT),
    "loop_to_itself": (linked(0), LOOP),
    "loop_of_two": (linked(1, 0), LOOP),
    "loop_through_the_whole_table": (linked(*range(1, SIZE), 0), LOOP),
    "loop_back_to_the_middle": (linked(*range(1, SIZE), SIZE // 2), LOOP),
    "head_is_the_queue_size": (head(SIZE), "a chain's head is not a descriptor of the queue"),
    "head_is_65535": (head(65535), "a chain's head is not a descriptor of the queue"),
    "avail_index_jumps": (avail_index(SIZE + 1), "the avail index jumped by more than the queue size"),
    "avail_index_jumps_far": (avail_index(0x8000), "the avail index jumped by more than the queue size"),
    "avail_index_goes_back": (avail_index(-1), "the avail index jumped by more than the queue size"),
    "loop_in_a_table": (lambda d: table(d, piece(d, 16, NEXT, 1), piece(d, 16, NEXT, 0)), LOOP),
    "next_outside_its_table": (lambda d: table(d, piece(d, 16, NEXT, 2), piece(d)), BAD_NEXT),
    "next_far_outside_its_table": (lambda d: table(d, piece(d, 16, NEXT, 65535), piece(d)), BAD_NEXT),
}


# --- packed only (item 5) ---


def endless(d: VirtqueueDriver) -> None:
    """Every descriptor of the ring has NEXT: the chain goes round and round."""
    assert isinstance(d, PackedDriver)
    d.put_descs([Desc(d.memory.gpa, 16, NEXT, 0)] * d.size)


def table_inside_a_chain(d: VirtqueueDriver) -> None:
    put(d, head_of(d), (d.write_table([piece(d)]), 16, INDIRECT))


PACKED: dict[str, tuple[Attack, str]] = {
    "every_descriptor_has_next": (endless, LOOP),
    "table_inside_a_chain": (table_inside_a_chain, "an indirect descriptor that is chained"),
}

ATTACKS = [(ring, name, *BOTH[name]) for ring in ("split", "packed") for name in BOTH]
ATTACKS += [("split", name, *attack) for name, attack in SPLIT.items()]
ATTACKS += [("packed", name, *attack) for name, attack in PACKED.items()]
