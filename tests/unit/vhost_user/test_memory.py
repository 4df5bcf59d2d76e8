"""The memory table: SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG and what they refuse."""

from __future__ import annotations

import kit.front_end.vhost_user_wire as wire
import pytest
from kit.front_end.vhost_user_wire import MIB, Dialogue, chunked, reply_to

from transports.vhost_user.requests.memory import SetMemory
from transports.vhost_user.requests.operation import Refuse
from virtio.waist import MemoryRegion

UVA = 0x7F00_0000_0000
SET, ADD, REMOVE = 5, 37, 38


def ready(chunk: int = 0) -> Dialogue:
    d = Dialogue(chunk)
    d.negotiate()
    return d


def regions_of(d: Dialogue) -> tuple[MemoryRegion, ...]:
    return d.session.state.memory.regions


@chunked
def test_a_table_of_eight_regions_pairs_each_with_its_own_descriptor(chunk: int) -> None:
    with wire.no_fd_leaks():
        d = ready(chunk)
        fds = [wire.memfd() for _ in range(8)]
        table = wire.mem_table(*[wire.region(n * MIB, MIB, UVA + n * MIB, n * 4096) for n in range(8)])
        assert d.ask(SET, table, fds, need_reply=True) == reply_to(SET, wire.u64(0))
        assert [(r.gpa, r.size, r.uva, r.offset, r.fd.fileno()) for r in regions_of(d)] == [
            (n * MIB, MIB, UVA + n * MIB, n * 4096, fds[n]) for n in range(8)
        ]
        d.close()


@chunked
def test_added_and_removed_regions_leave_the_others_untouched(chunk: int) -> None:
    with wire.no_fd_leaks():
        d = ready(chunk)
        for n in range(3):
            d.ask(ADD, wire.single_region(n * MIB, MIB, UVA + n * MIB), [wire.memfd()])
        first, second, third = regions_of(d)
        d.ask(REMOVE, wire.single_region(MIB, MIB, UVA + MIB))
        assert regions_of(d) == (first, third)
        second.fd.close()
        d.close()


def test_a_region_is_not_in_the_table_before_the_back_end_has_mapped_it() -> None:
    d = ready()
    operation = d.plan(ADD, wire.single_region(0, MIB, UVA), [wire.memfd()], need_reply=True)
    assert isinstance(operation, SetMemory)
    assert regions_of(d) == ()
    assert d.reject() == reply_to(ADD, wire.u64(1))
    assert regions_of(d) == ()
    operation.regions[0].fd.close()


def test_removal_ignores_the_offset_and_closes_a_descriptor_that_came_along() -> None:
    with wire.no_fd_leaks():
        d = ready()
        d.ask(ADD, wire.single_region(0, MIB, UVA, 4096), [wire.memfd()])
        (kept,) = regions_of(d)
        d.ask(REMOVE, wire.single_region(0, MIB, UVA, 0), [wire.memfd()])
        assert regions_of(d) == ()
        kept.fd.close()


@pytest.mark.parametrize(
    ("gpa", "size", "uva"), [(4096, MIB, UVA), (0, MIB - 1, UVA), (0, MIB, UVA + 4096)], ids=["gpa", "size", "uva"]
)
def test_removal_of_a_region_that_is_not_there_is_refused(gpa: int, size: int, uva: int) -> None:
    with wire.no_fd_leaks():
        d = ready()
        d.share_memory()
        operation = d.plan(REMOVE, wire.single_region(gpa, size, uva), need_reply=True)
        assert isinstance(operation, Refuse)
        assert d.reject() == reply_to(REMOVE, wire.u64(1))
        assert len(regions_of(d)) == 1
        d.close()


def test_509_regions_fit_and_one_more_is_refused_and_closed() -> None:
    with wire.no_fd_leaks():
        d = ready()
        for n in range(509):
            d.ask(ADD, wire.single_region(n * MIB, MIB, UVA + n * MIB), [wire.eventfd()])
        assert isinstance(d.plan(ADD, wire.single_region(509 * MIB, MIB, UVA + 509 * MIB), [wire.memfd()]), Refuse)
        assert len(regions_of(d)) == 509
        d.close()


def test_regions_may_touch_and_reach_almost_to_the_end_of_the_address_space() -> None:
    d = ready()
    last = 2**64 - 1 - MIB
    d.ask(ADD, wire.single_region(0, MIB, UVA), [wire.memfd()])
    d.ask(ADD, wire.single_region(MIB, MIB, UVA - MIB), [wire.memfd()])
    d.ask(ADD, wire.single_region(last, MIB, UVA + MIB, 2**63 - 1 - MIB), [wire.memfd()])
    assert len(regions_of(d)) == 3
    d.close()


BROKEN_REGIONS = {
    "size_0": ((4 * MIB, 0, UVA + 4 * MIB, 0), "has no size"),
    "guest_address_overflow": ((2**64 - MIB, MIB, UVA + 4 * MIB, 0), "guest address .* overflows"),
    "user_address_overflow": ((4 * MIB, MIB, 2**64 - MIB, 0), "user address .* overflows"),
    "offset_overflow": ((4 * MIB, MIB, UVA + 4 * MIB, 2**64 - 4096), "mmap offset .* overflows"),
    "offset_beyond_off_t": ((4 * MIB, MIB, UVA + 4 * MIB, 2**63 - MIB), "mmap offset .* overflows"),
    "enormous_size": ((4 * MIB, 2**64 - 1, UVA + 4 * MIB, 0), "overflows"),
    "same_addresses_elsewhere_in_the_file": ((0, MIB, UVA, 4096), "overlap in guest addresses"),
    "guest_overlap_at_the_end": ((MIB - 1, MIB, UVA + 4 * MIB, 0), "overlap in guest addresses"),
    "guest_overlap_around": ((0, 4 * MIB, UVA + 4 * MIB, 0), "overlap in guest addresses"),
    "user_overlap_at_the_end": ((4 * MIB, MIB, UVA + MIB - 1, 0), "overlap in user addresses"),
    "user_overlap_at_the_start": ((4 * MIB, MIB, UVA - MIB + 1, 0), "overlap in user addresses"),
}


def test_a_region_twice_in_one_table_ends_the_connection() -> None:
    with wire.no_fd_leaks():
        twice = wire.mem_table(wire.region(0, MIB, UVA), wire.region(0, MIB, UVA))
        assert "overlap in guest addresses" in ready().violate(SET, twice, [wire.memfd(), wire.memfd()])


@pytest.mark.parametrize(("shape", "reason"), BROKEN_REGIONS.values(), ids=BROKEN_REGIONS)
def test_a_broken_region_ends_the_connection_and_closes_its_descriptors(
    shape: tuple[int, int, int, int], reason: str
) -> None:
    with wire.no_fd_leaks():
        d = ready()
        d.share_memory()
        assert_matches(reason, d.violate(ADD, wire.single_region(*shape), [wire.memfd()]))
        d.close()
        d = ready()
        table = wire.mem_table(wire.region(0, MIB, UVA), wire.region(*shape))
        assert_matches(reason, d.violate(SET, table, [wire.memfd(), wire.memfd()]))


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


@pytest.mark.parametrize(
    "payload",
    [
        wire.mem_table(*[wire.region(n * MIB, MIB, UVA + n * MIB) for n in range(9)]),
        wire.mem_table(wire.region(0, MIB, UVA), count=8),
        wire.mem_table(wire.region(0, MIB, UVA), count=2**32 - 1),
        wire.mem_table(wire.region(0, MIB, UVA))[:-1],
    ],
    ids=["nine_regions", "count_8", "count_2**32-1", "one_byte_short"],
)
def test_a_table_whose_size_or_count_is_wrong_ends_the_connection(payload: bytes) -> None:
    with wire.no_fd_leaks():
        ready().violate(SET, payload, [wire.memfd()])


@pytest.mark.parametrize("count", [1, 3])
def test_a_table_needs_as_many_descriptors_as_regions(count: int) -> None:
    with wire.no_fd_leaks():
        table = wire.mem_table(wire.region(0, MIB, UVA), wire.region(MIB, MIB, UVA + MIB))
        reason = ready().violate(SET, table, [wire.memfd() for _ in range(count)])
        assert f"{count} file descriptors for 2 regions" in reason
