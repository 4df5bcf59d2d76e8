"""Devices from elsewhere: a class in a file, or another distribution's entry point, and every way to get it wrong."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
from kit.ring.driven import Scripted

from config.loader import load
from config.problems import ConfigError
from daemon.cli import main
from daemon.commands.command import EXIT_CONFIG
from daemon.devices.catalogue import device_types, features_off, make_device
from daemon.devices.class_checks import fault_of
from daemon.devices.classes import DeviceClasses, device_class
from daemon.running.failures import leaves
from transports import TRANSPORTS
from virtio.backend.backend import Backend
from virtio.device import Device
from virtio.devices import REGISTRY
from virtio.errors import HostError
from virtio.spec import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED

UNASKED = {VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED}  # what keys of their own offer
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
    assert features_off(mine) == {3, *UNASKED}
    device = make_device("mine", config.devices["mine"])
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
        ("import sys\nsys.exit()\n", "Echo", "cannot be run: line 2: SystemExit"),
        ("raise BaseException('mine')\n", "Echo", "cannot be run: line 1: BaseException: mine"),
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


ATTRIBUTES = {
    "virtio_id": ["0", "65536", "True", "'42'", "4.0"],
    "type_name": ["7", "''", "'two\\nlines'"],
    "queue_counts": ["2", "(2, 1)", "(0, 1)", "(1,)", "(1, 100000)", "('1', '2')", "None"],
    "default_queues": ["3", "None", "'1'"],
    "queue_size_limit": ["1000", "65536", "0", "'256'", "256.0"],
    "request_max": ["0", "1 << 32", "1e6", "None"],
    "ops": ["'abc'", "()", "('a', 'a')", "(1,)", "None", "tuple('abcdefghi')"],
    "Options": ["dict", "{}", "None", "EchoOptions()"],
    "feature_bits": ["['X']", "{3: 3}", "{'X': '3'}", "{'X': 1, 'Y': 1}", "{'VIRTIO_F_RING_PACKED': 1}", "None"],
    "feature_bits['X']": ["-1", "24", "29", "49", "70", "True"],
    "start_seconds": ["0", "-1", "601", "True", "'5'", "None", "float('nan')"],
    "native": ["True"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ATTRIBUTES.items() for value in values])
def test_a_class_attribute_that_is_wrong_is_one_line_that_names_file_class_and_attribute(
    tmp_path: Path, name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "echo.py", ECHO + f"\n    feature_bits = {{}}\n    {name} = {value}\n")
    path = configured(tmp_path, "./echo.py:Echo")
    found = problem(path)
    assert f"Echo in {tmp_path}/echo.py " in found
    assert name in found.partition("echo.py has")[2] or name == "native"
    assert main(["check", str(path)]) == EXIT_CONFIG
    assert "1 mistake in the configuration" in capsys.readouterr().err


@pytest.mark.parametrize("bit", [0, 23, 50, 63])
def test_the_bits_that_the_specification_gives_to_devices_are_a_devices_own(tmp_path: Path, bit: int) -> None:
    write(tmp_path / "echo.py", ECHO + f"\n    feature_bits = {{'X': {bit}}}\n")
    mine = load(configured(tmp_path, "./echo.py:Echo", "features = { X = false }\n"), device_types(), TRANSPORTS)
    assert features_off(mine.devices["mine"]) == {bit, *UNASKED}


CALLED = sorted(
    name
    for name, method in vars(Device).items()
    if inspect.isfunction(method) and not inspect.iscoroutinefunction(method) and not name.startswith("_")
)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def __init__(self): pass", "__init__ that does not take (self, name, options, queues, queue_size): too many"),
        ("def __init__(self, name, options, queues, queue_size, more): pass", "missing a required argument: 'more'"),
        ("def __init__(self, *, name, options, queues, queue_size): pass", "too many positional arguments"),
        ("handle = Device.handle", "has neither handle() nor run_queue()"),
        ("def handle(self, queue, chain): pass", "has def handle(), which is awaited: write async def handle()"),
        ("async def handle(self, queue, chain): yield", "has a yield in async def handle()"),
        ("def run_queue(self, queue): pass", "has def run_queue(), which is awaited: write async def run_queue()"),
        ("def run(self, *, task_status): task_status.started()", "has def run(), which is awaited"),
        ("def queue_stopping(self, queue): pass", "has def queue_stopping(), which is awaited"),
        *(
            (f"async def {name}(self, *given): ...", f"has async def {name}(), which is called and never awaited")
            for name in CALLED
        ),
    ],
)
def test_a_class_that_could_not_serve_is_found_before_it_serves(tmp_path: Path, body: str, reason: str) -> None:
    write(tmp_path / "echo.py", ECHO + f"\n    {body}\n")
    assert reason in problem(configured(tmp_path, "./echo.py:Echo"))


@pytest.mark.parametrize(
    "body",
    [
        "def handle(self, queue, chain) -> 'Awaitable[None]': return Device.handle(self, queue, chain)",
        "handle = functools.partialmethod(Device.run_queue)",
        "handle = functools.wraps(Device.handle)(lambda self, queue, chain: Device.handle(self, queue, chain))",
        "run = functools.lru_cache(Device.run)",
    ],
)
def test_a_method_that_gives_something_to_await_in_another_way_is_believed(tmp_path: Path, body: str) -> None:
    write(tmp_path / "echo.py", f"import functools\n{ECHO}\n    {body}\n")
    assert load(configured(tmp_path, "./echo.py:Echo"), device_types(), TRANSPORTS).devices


class Late(Scripted):
    """Reports that it started when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self.ready.wait()
        task_status.started()


async def test_a_device_says_how_long_its_start_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Late, "start_seconds", 0.01)
    with pytest.raises(ExceptionGroup) as caught:
        async with Backend(Late()):
            pass
    (error,) = leaves(caught.value)
    assert isinstance(error, HostError)
    assert "has not reported for 0.01 seconds" in str(error)
    monkeypatch.setattr(Late, "start_seconds", 60.0)
    device = Late()

    async def when_all_wait() -> None:
        await trio.testing.wait_all_tasks_blocked()
        device.ready.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(when_all_wait)
        async with Backend(device) as backend:
            assert backend.name == "scripted"


def test_an_abstract_class_is_no_device(tmp_path: Path) -> None:
    text = ECHO.replace("class Echo(Device)", "class Echo(Device, abc.ABC)") + "\n    @abc.abstractmethod\n"
    write(tmp_path / "echo.py", f"import abc\n{text}    def blink(self): ...\n")
    assert "is abstract: it lacks blink" in problem(configured(tmp_path, "./echo.py:Echo"))


def test_an_option_that_hides_behind_a_key_of_every_device_is_found(tmp_path: Path) -> None:
    write(tmp_path / "echo.py", ECHO.replace("prefix: str", "queue_size: int = 3\n    prefix: str"))
    assert "has Options with the key queue_size" in problem(configured(tmp_path, "./echo.py:Echo"))


def test_an_init_of_ones_own_may_take_whatever_it_is_given(tmp_path: Path) -> None:
    write(tmp_path / "echo.py", ECHO + "\n    def __init__(self, *given, more=1): super().__init__(*given)\n")
    config = load(configured(tmp_path, "./echo.py:Echo"), device_types(), TRANSPORTS)
    assert make_device("mine", config.devices["mine"]).name == "mine"


def test_an_interrupt_of_the_operators_passes(tmp_path: Path) -> None:
    write(tmp_path / "echo.py", "raise KeyboardInterrupt\n")
    path = configured(tmp_path, "./echo.py:Echo")
    for _ in range(2):  # and no half-made module stays behind
        with pytest.raises(KeyboardInterrupt):
            load(path, device_types(), TRANSPORTS)


def test_our_own_classes_are_held_to_the_same() -> None:
    for name, kind in REGISTRY.items():
        expected = "says native, but a device from outside is driven by Python" if kind.native else None
        assert fault_of(kind) == expected, name


def test_a_syntax_error_in_a_file_that_is_imported_names_that_file(tmp_path: Path) -> None:
    write(tmp_path / "other_of_a_test.py", "x = 1\nclass (\n")
    text = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport other_of_a_test\n"
    write(tmp_path / "echo.py", text)
    try:
        found = problem(configured(tmp_path, "./echo.py:Echo"))
    finally:
        sys.path.remove(str(tmp_path))
    assert f"echo.py cannot be run: {tmp_path}/other_of_a_test.py line 2: " in found


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
        "[hyperbell.devices]\necho = echoes_of_a_test:Echo\nbroken = echoes_of_a_test:Nothing\n"
        "ends = ends_of_a_test:Echo\nblk = os:path\n",
    )
    write(tmp_path / "site" / "echoes_of_a_test.py", ECHO)
    write(tmp_path / "site" / "ends_of_a_test.py", "raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "echoes_of_a_test", raising=False)
    return tmp_path


def test_an_entry_point_of_another_distribution_is_a_type(distribution: Path) -> None:
    config = load(configured(distribution, "echo", 'prefix = "!"\n'), device_types(), TRANSPORTS)
    device = make_device("mine", config.devices["mine"])
    assert device.options.prefix == "!"
    assert "echo" in set(DeviceClasses())


def test_an_entry_point_that_does_not_work_is_one_error(distribution: Path) -> None:
    found = problem(configured(distribution, "broken"))
    assert "the entry point echoes_of_a_test:Nothing cannot be loaded: AttributeError" in found


def test_an_entry_point_whose_module_ends_the_program_is_one_error(distribution: Path) -> None:
    found = problem(configured(distribution, "ends"))
    assert "the entry point ends_of_a_test:Echo cannot be loaded: SystemExit: 0" in found


def test_a_name_of_ours_is_nobody_elses(distribution: Path) -> None:
    assert DeviceClasses()["blk"] is REGISTRY["blk"]


def test_what_an_author_needs_is_in_one_place() -> None:
    import virtio

    assert virtio.Device is Device
    for name in virtio.__all__:
        assert getattr(virtio, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        virtio.Nothing  # noqa: B018
