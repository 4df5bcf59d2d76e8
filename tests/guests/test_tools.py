"""The host's half of the guest tests: packing, patterns, metrics, the choice of an accelerator. No guest is booted."""

from __future__ import annotations

import io
import lzma
import os
import stat
import subprocess
from pathlib import Path

import pytest

from guest.boot import accel, initramfs
from guest.boot.console import MachineError, results_of
from guest.boot.initramfs import Entry, module_order, newc, program_files
from guest.boot.pattern import BLOCK_SIZE, SECTOR_SIZE, check_pattern, check_zeroes, sector_content, sum_generations
from guest.boot.service import Metrics
from guest.debian.cache import PrepareError
from guest.debian.kernel import read_module
from guest.demo.report import Report, feature_names, human

HISTOGRAM = """
# TYPE hyperbell_request_duration_seconds histogram
hyperbell_request_duration_seconds_bucket{device="disk",queue="0",op="read",le="0.001"} 0
hyperbell_request_duration_seconds_bucket{device="disk",queue="0",op="read",le="0.002"} 30
hyperbell_request_duration_seconds_bucket{device="disk",queue="0",op="read",le="0.004"} 40
hyperbell_request_duration_seconds_bucket{device="disk",queue="0",op="read",le="+Inf"} 40
hyperbell_request_duration_seconds_bucket{device="disk",queue="1",op="read",le="0.001"} 0
hyperbell_request_duration_seconds_bucket{device="disk",queue="1",op="read",le="0.002"} 30
hyperbell_request_duration_seconds_bucket{device="disk",queue="1",op="read",le="0.004"} 59
hyperbell_request_duration_seconds_bucket{device="disk",queue="1",op="read",le="+Inf"} 60
# TYPE hyperbell_requests counter
hyperbell_requests_total{device="disk",queue="0",op="read"} 40
hyperbell_requests_total{device="disk",queue="1",op="read"} 60
hyperbell_requests_total{device="disk",queue="1",op="write"} 7
"""


def test_metrics_are_summed_over_the_labels_left_open() -> None:
    metrics = Metrics(HISTOGRAM)
    assert metrics.total("hyperbell_requests_total", device="disk") == 107
    assert metrics.by("op", "hyperbell_requests_total", device="disk") == {"read": 100, "write": 7}
    assert metrics.total("hyperbell_requests_total", device="other") == 0


def test_quantile_lies_within_the_bucket_that_holds_it() -> None:
    name = "hyperbell_request_duration_seconds"
    metrics = Metrics(HISTOGRAM)
    assert metrics.quantile(0.30, name, op="read") == pytest.approx(0.0015)
    assert metrics.quantile(0.60, name, op="read") == pytest.approx(0.002)
    assert metrics.quantile(1.0, name, op="read") == pytest.approx(0.004)
    assert metrics.quantile(0.5, name, op="write") is None


def test_image_check_names_the_first_wrong_sector(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SECTOR_SIZE) + b"".join(sector_content(n, 5) for n in range(1, 9)))
    assert check_pattern(image, SECTOR_SIZE, 8 * SECTOR_SIZE, 5) == ""
    assert check_zeroes(image, 0, SECTOR_SIZE) == ""
    assert "sector 1 " in check_pattern(image, SECTOR_SIZE, 8 * SECTOR_SIZE, 6)
    assert f"byte {SECTOR_SIZE} " in check_zeroes(image, 0, 2 * SECTOR_SIZE)
    with pytest.raises(ValueError, match="too short"):
        check_zeroes(image, 0, 10 * SECTOR_SIZE)


def test_torn_block_is_not_counted_as_a_generation(tmp_path: Path) -> None:
    image = tmp_path / "image"
    sectors = [sector_content(n, 5, generation=3) for n in range(2 * BLOCK_SIZE // SECTOR_SIZE)]
    image.write_bytes(b"".join(sectors))
    assert sum_generations(image, 0, 2 * BLOCK_SIZE, 5) == 6
    sectors[9] = sector_content(9, 5, generation=2)
    image.write_bytes(b"".join(sectors))
    with pytest.raises(ValueError, match="sector 9 "):
        sum_generations(image, 0, 2 * BLOCK_SIZE, 5)


def test_guest_and_host_agree_on_the_pattern(tmp_path: Path) -> None:
    program, image = tmp_path / "diskcheck", tmp_path / "image"
    sources = [str(initramfs.PROGRAMS / name) for name in initramfs.DISKCHECK_SOURCES if name.endswith(".c")]
    subprocess.run([*initramfs.COMPILE, "-o", str(program), *sources], check=True)
    image.write_bytes(b"".join(sector_content(n, 0xFFFFFFFF) for n in range(8)) + bytes(8 * BLOCK_SIZE))
    try:
        os.close(os.open(image, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"the file system of {tmp_path} has no O_DIRECT: {error.strerror}")
    verify = [str(program), "t", "verify", str(image), "0", str(BLOCK_SIZE)]
    assert subprocess.run([*verify, str(0xFFFFFFFF)], capture_output=True).returncode == 0
    other = subprocess.run([*verify, "1"], capture_output=True, text=True)
    assert other.returncode == 1
    assert "byte 12 " in results_of(other.stdout.splitlines())["t.error"]


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    archive = newc(
        [
            Entry("bin", stat.S_IFDIR | 0o755),
            Entry("bin/odd", stat.S_IFREG | 0o755, b"12345"),
            Entry("dev-console", stat.S_IFCHR | 0o600, device=(5, 1)),
        ]
    )
    assert len(archive) % 4 == 0
    listed = (
        subprocess.run(["cpio", "-tv"], input=archive, capture_output=True, check=True).stdout.decode().splitlines()
    )
    assert [line.split()[0] for line in listed] == ["drwxr-xr-x", "-rwxr-xr-x", "crw-------"]
    assert listed[1].endswith("bin/odd")
    assert "5,   1" in listed[2]


def test_a_program_in_a_guest_has_what_its_libraries_load_later() -> None:
    names = {Path(path).name for path in program_files("iperf3", "iperf3")}
    assert {"iperf3", "libc.so.6", "libgcc_s.so.1"} <= names


@pytest.mark.parametrize("packed", [False, True], ids=["ko", "ko.xz"])
def test_modules_are_loaded_after_what_they_depend_on(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, depends in (("a-b", "c,d_e,in"), ("c", "d_e"), ("d-e", ""), ("unused", "c")):
        module = b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
        (folder / (f"{name}.ko.xz" if packed else f"{name}.ko")).write_bytes(
            lzma.compress(module) if packed else module
        )
    (tmp_path / "modules.builtin").write_text("kernel/drivers/in.ko\n")
    order = module_order(folder, ["a_b", "in"])
    assert list(order) == ["d-e", "c", "a-b"]
    assert all(read_module(path).startswith(b"\x7fELF") for path in order.values())
    with pytest.raises(PrepareError, match="no module missing"):
        module_order(folder, ["missing"])


@pytest.mark.parametrize("content", [None, b"not kvm"])
def test_guests_run_with_tcg_and_a_reason_where_kvm_does_not_work(tmp_path: Path, content: bytes | None) -> None:
    kvm = tmp_path / "kvm"
    if content is not None:
        kvm.write_bytes(content)
    chosen = accel.choose_acceleration(kvm)
    assert chosen.name == "tcg"
    assert str(kvm) in chosen.why


def test_results_are_told_from_other_console_lines() -> None:
    lines = ["RESULT a.b=1", "noise RESULT c=2", "RESULT d=x=y", "RESULT a.b=3"]
    assert results_of(lines) == {"a.b": "3", "d": "x=y"}


def test_failure_carries_the_end_of_the_console() -> None:
    assert str(MachineError("no answer")) == "no answer"
    assert str(MachineError("no answer", ["one", "two"])).splitlines()[-2:] == ["  | one", "  | two"]


def test_features_are_named_and_unknown_bits_numbered() -> None:
    bits = "01" + "0" * 7 + "1" + "0" * 22 + "11"
    assert feature_names(bits, {"VIRTIO_BLK_F_FLUSH": 9}) == ["bit 1", "FLUSH", "VERSION_1", "ACCESS_PLATFORM"]


def test_report_has_no_colours_when_it_is_not_a_terminal() -> None:
    out = io.StringIO()
    report = Report(out)
    report.done("something", 1.25)
    report.failed("a reason")
    assert "\033" not in out.getvalue()
    assert "something (1.2 s)" in out.getvalue()
    assert human(3 << 20) == "3.0 MiB"
    assert human(0) == ""
