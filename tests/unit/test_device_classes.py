"""Devices from elsewhere: a class in a file, or another distribution's entry point, and every way to get it wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from config.loader import load
from config.problems import ConfigError
from daemon.catalogue import device_types, features_off, make_devices
from daemon.cli import EXIT_CONFIG, main
from daemon.device_classes import DeviceClasses, device_class
from transports import TRANSPORTS
from virtio.device import Device
from virtio.devices import REGISTRY

ECHO = """
from typing import ClassVar

from virtio import Chain, Device, DeviceOptions, Queue


class EchoOptions(DeviceOptions):
    prefix: str = ""


class Echo(Device):
    virtio_id: ClassVar[int] = 42
    type_name = "echo"
    feature_bits = {"ECHO_F_LOUD": 3}
    queue_counts = (1, 2)
    Options = EchoOptions

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(self.options.prefix.encode() + chain.read())
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def configured(folder: Path, type_name: str, more: str = "") -> Path:
    text = f'[devices.mine]\ntype = "{type_name}"\nsocket = "mine.sock"\n{more}'
    return write(folder / "mine.toml", text)


def problem(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, device_types(), TRANSPORTS)
    (only,) = caught.value.problems
    return str(only)


def test_a_class_in_a_file_is_a_device_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "conf" / "parts" / "echo.py", ECHO)
    path = configured(
        tmp_path / "conf", "./parts/echo.py:Echo", 'prefix = ">"\nqueues = 2\nfeatures = { ECHO_F_LOUD = false }\n'
    )
    monkeypatch.chdir(tmp_path)  # the path is the configuration's, not the caller's
    config = load(path, device_types(), TRANSPORTS)
    mine = config.devices["mine"]
    assert mine.common.type == f"{tmp_path}/conf/parts/echo.py:Echo"
    assert features_off(mine) == {3}
    device = make_devices(config.devices)["mine"]
    assert (device.name, device.type_name, device.queue_count) == ("mine", "echo", 2)
    assert device.options.prefix == ">"
    assert type(device) is device_class(mine.common.type)


@pytest.mark.parametrize(
    ("text", "class_name", "reason"),
    [
        (None, "Echo", "does not exist"),
        ("class Echo(\n", "Echo", "cannot be run: line 1: '(' was never closed"),
        ("x = 1\n\nimport nothing_of_this_name\n", "Echo", "cannot be run: line 3: ModuleNotFoundError: No module"),
        ("x = 1\ny = 1 / 0\n", "Echo", "cannot be run: line 2: ZeroDivisionError: division by zero"),
        (ECHO, "Ecco", "has no class Ecco"),
        (ECHO, "EchoOptions", "EchoOptions in {file} is not a class derived from virtio.Device"),
        (ECHO.replace("virtio_id: ClassVar[int] = 42", ""), "Echo", "Echo in {file} has no virtio_id"),
        (ECHO.replace('type_name = "echo"', ""), "Echo", "Echo in {file} has no type_name"),
        (ECHO.replace("(1, 2)", "(2, 1)"), "Echo", "default_queues = 1 is not within (2, 1)"),
        (ECHO.replace('"echo"', '"echo"\n    native = True'), "Echo", "a device from outside is driven by Python"),
    ],
)
def test_a_file_that_does_not_work_is_one_error_that_names_the_place(
    tmp_path: Path, text: str | None, class_name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "echo.py"
    if text is not None:
        write(file, text)
    path = configured(tmp_path, f"./echo.py:{class_name}")
    found = problem(path)
    assert f"{path}:2: [devices.mine] type: " in found
    assert reason.format(file=file) in found
    assert main(["check", str(path)]) == EXIT_CONFIG
    assert "1 mistake in the configuration" in capsys.readouterr().err


def test_a_wrong_option_of_a_class_in_a_file_is_found_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "echo.py", ECHO)
    assert "[devices.mine] prefixx" in problem(configured(tmp_path, "./echo.py:Echo", 'prefixx = ">"\n'))


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path like site-packages, with one distribution in it."""
    info = tmp_path / "site" / "echoes-1.0.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: echoes\nVersion: 1.0\n")
    write(
        info / "entry_points.txt",
        "[hyperbell.devices]\necho = echoes_of_a_test:Echo\nbroken = echoes_of_a_test:Nothing\nblk = os:path\n",
    )
    write(tmp_path / "site" / "echoes_of_a_test.py", ECHO)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "echoes_of_a_test", raising=False)
    return tmp_path


def test_an_entry_point_of_another_distribution_is_a_type(distribution: Path) -> None:
    config = load(configured(distribution, "echo", 'prefix = "!"\n'), device_types(), TRANSPORTS)
    device = make_devices(config.devices)["mine"]
    assert device.options.prefix == "!"
    assert "echo" in set(DeviceClasses())


def test_an_entry_point_that_does_not_work_is_one_error(distribution: Path) -> None:
    found = problem(configured(distribution, "broken"))
    assert "the entry point echoes_of_a_test:Nothing cannot be loaded: AttributeError" in found


def test_a_name_of_ours_is_nobody_elses(distribution: Path) -> None:
    assert DeviceClasses()["blk"] is REGISTRY["blk"]


def test_what_an_author_needs_is_in_one_place() -> None:
    import virtio

    assert virtio.Device is Device
    for name in virtio.__all__:
        assert getattr(virtio, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        virtio.Nothing  # noqa: B018
