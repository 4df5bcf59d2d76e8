"""Which processor this is, and which two CPUs of it a measurement takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from transports.kvm.cpu.host import host_loop_cycles, hypervisor_below, processor_name, speaks_vmmcall, two_cpus


def topology(folder: Path, siblings: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        place = folder / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("siblings", "usable", "expected"),
    [
        ({0: "0", 1: "1"}, {0, 1}, (0, 1)),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, {0, 1, 2, 3}, (0, 2)),
        ({0: "0,4", 1: "1,5", 4: "0,4"}, {0, 1, 4}, (0, 1)),
        ({0: "0-1", 1: "0-1"}, {0, 1}, (0, 1)),
        ({2: "2-3", 3: "2-3", 7: "6-7"}, {3, 2, 7}, (2, 7)),
        ({}, {3, 5}, (3, 5)),
        ({0: "0"}, {0}, None),
    ],
)
def test_guest_and_waiter_get_cores_of_their_own_where_there_are_two(
    tmp_path: Path, siblings: dict[int, str], usable: set[int], expected: tuple[int, int] | None
) -> None:
    assert two_cpus(usable, topology(tmp_path, siblings)) == expected


def test_the_vendor_and_the_hypervisor_are_those_that_the_kernel_sees() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    amd = any(name in cpuinfo for name in ("AuthenticAMD", "HygonGenuine"))
    assert speaks_vmmcall() is amd
    flags = next(line for line in cpuinfo.splitlines() if line.startswith("flags")).split()
    assert bool(hypervisor_below()) is ("hypervisor" in flags)


def test_the_processor_has_a_name() -> None:
    assert processor_name()
    assert "\n" not in processor_name()


def test_a_longer_loop_takes_longer() -> None:
    assert 0 < host_loop_cycles(1_000) < host_loop_cycles(100_000)
