"""The configuration loader: what it accepts, what it merges, and what it makes of relative paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kit.known_types import KnownTypes
from pydantic import BaseModel, ConfigDict

from config.changes import Change, changes
from config.loader import Config, drop_ins, load
from config.origins import Origin
from config.problems import ConfigError
from config.schema import DEFAULT_WORKER, DeviceType
from virtio.claims import Claims
from virtio.device import DeviceOptions


class DiskOptions(DeviceOptions):
    """A disk, for these tests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    read_only: bool = False

    def claims(self, name: str) -> Claims:
        return Claims(read_only=self.read_only)


class PinOptions(BaseModel):
    """One of several inner tables."""

    path: Path


class ChipOptions(BaseModel):
    """A device driven by the event loop, for these tests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pins: tuple[PinOptions, ...] = ()


TYPES = KnownTypes(
    {
        "disk": DeviceType(
            DiskOptions, frozenset({"VIRTIO_F_RING_PACKED", "VIRTIO_BLK_F_DISCARD"}), True, 1, 8, 1, 1024
        ),
        "chip": DeviceType(ChipOptions, frozenset({"VIRTIO_F_RING_PACKED"}), False, 1, 1, 1, 32768),
    }
)
DISK = '[devices.a]\ntype = "disk"\nsocket = "a.sock"\npath = "a.img"\n'


def load_text(folder: Path, text: str, **drop_in_texts: str) -> Config:
    main = folder / "hyperbell.toml"
    main.write_text(text)
    (folder / "hyperbell.toml.d").mkdir(exist_ok=True)
    for name, drop_in in drop_in_texts.items():
        (folder / "hyperbell.toml.d" / f"{name}.toml").write_text(drop_in)
    return load(main, TYPES, {"vhost-user"})


def test_smallest_configuration_has_the_documented_defaults(tmp_path: Path) -> None:
    config = load_text(tmp_path, DISK)
    assert config.daemon.metrics_address == ("127.0.0.1", 9477)
    assert (config.daemon.control, config.daemon.log_level, config.daemon.log_format) == (None, "info", "auto")
    device = config.devices["a"]
    common = device.common
    assert (common.transport, common.mode, common.socket_permissions) == ("vhost-user", "listen", 0o660)
    assert (device.queues, common.queue_size, common.features) == (1, 32768, {})
    assert device.workers == (DEFAULT_WORKER,)
    worker = config.workers[DEFAULT_WORKER]
    assert (worker.cpus, worker.poll_us, worker.reactor) == (None, 32, "auto")


def test_python_devices_need_no_worker_and_bring_none(tmp_path: Path) -> None:
    config = load_text(tmp_path, '[devices.c]\ntype = "chip"\nsocket = "c.sock"\n')
    assert config.devices["c"].workers == ()
    assert dict(config.workers) == {}


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_text(tmp_path, '[daemon]\ncontrol = "ctl.sock"\n' + DISK, extra='[devices.a]\npath = "../b.img"\n')
    device = config.devices["a"]
    assert config.daemon.control == tmp_path / "ctl.sock"
    assert device.common.socket == tmp_path / "a.sock"
    assert isinstance(device.options, DiskOptions)
    assert device.options.path == tmp_path / "../b.img"


def test_relative_paths_of_inner_tables_are_taken_from_there_too(tmp_path: Path) -> None:
    pins = '[[devices.c.pins]]\npath = "x"\n[[devices.c.pins]]\npath = "/y"\n'
    options = load_text(tmp_path, '[devices.c]\ntype = "chip"\nsocket = "c.sock"\n' + pins).devices["c"].options
    assert isinstance(options, ChipOptions)
    assert [pin.path for pin in options.pins] == [tmp_path / "x", Path("/y")]


def test_a_relative_name_of_the_file_itself_still_gives_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.toml").write_text(DISK)
    monkeypatch.chdir(tmp_path)
    assert load(Path("here.toml"), TYPES, {"vhost-user"}).devices["a"].common.socket == tmp_path / "a.sock"


def test_drop_ins_are_merged_table_by_table_in_the_order_of_their_names(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        DISK + "queues = 2\nfeatures = { VIRTIO_F_RING_PACKED = false }\n",
        **{
            "20-later": "[devices.a]\nqueues = 4\n",
            "10-earlier": "[devices.a]\nqueues = 3\nfeatures.VIRTIO_BLK_F_DISCARD = false\n",
            "30-another": '[devices.b]\ntype = "chip"\nsocket = "b.sock"\n',
        },
    )
    assert config.devices["a"].queues == 4
    assert config.devices["a"].common.features == {"VIRTIO_F_RING_PACKED": False, "VIRTIO_BLK_F_DISCARD": False}
    assert set(config.devices) == {"a", "b"}
    assert [file.name for file in config.files] == [
        "hyperbell.toml",
        "10-earlier.toml",
        "20-later.toml",
        "30-another.toml",
    ]


def test_only_toml_files_are_drop_ins(tmp_path: Path) -> None:
    folder = tmp_path / "x.toml.d"
    folder.mkdir()
    for name in ("b.toml", "a.toml", "c.toml.bak", "README"):
        (folder / name).touch()
    assert drop_ins(tmp_path / "x.toml") == (folder / "a.toml", folder / "b.toml")


def test_each_key_remembers_the_file_and_line_it_came_from(tmp_path: Path) -> None:
    text = '# a comment\n[devices.a]\ntype = "disk"\npath = """\nx"""\nsocket = "a.sock"\nqueues = 2\n'
    config = load_text(tmp_path, text, more="\n[devices.a]\nqueues = 3\n")
    main, drop_in = config.files
    assert config.origins.find(("devices", "a")) == Origin(main, 2)
    assert config.origins.find(("devices", "a", "path")) == Origin(main, 4)
    assert config.origins.find(("devices", "a", "socket")) == Origin(main, 6)
    assert config.origins.find(("devices", "a", "queues")) == Origin(drop_in, 3)
    assert config.origins.find(("devices", "a", "not there")) == Origin(main, 2)


@pytest.mark.parametrize(
    ("written", "cpus"),
    [
        ('"0-3,5"', (0, 1, 2, 3, 5)),
        ("[2, 0, 2]", (0, 2)),
        ('["1", "4-5"]', (1, 4, 5)),
        ("7", (7,)),
        ('" 1 - 2 "', (1, 2)),
    ],
)
def test_cpus_are_lists_or_ranges(tmp_path: Path, written: str, cpus: tuple[int, ...]) -> None:
    config = load_text(tmp_path, f"[workers.w]\ncpus = {written}\n" + DISK + 'worker = "w"\n')
    assert config.workers["w"].cpus == cpus


def test_several_workers_share_the_queues_of_a_device(tmp_path: Path) -> None:
    config = load_text(tmp_path, "[workers.w0]\n[workers.w1]\n" + DISK + 'queues = 4\nworkers = ["w1", "w0"]\n')
    assert config.devices["a"].workers == ("w1", "w0")
    assert DEFAULT_WORKER not in config.workers


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("127.1.2.3:80", ("127.1.2.3", 80)),
        ("[::1]:9477", ("::1", 9477)),
        ("localhost:1", ("localhost", 1)),
        ("off", None),
    ],
)
def test_metrics_may_be_any_loopback_address_or_off(
    tmp_path: Path, written: str, address: tuple[str, int] | None
) -> None:
    assert load_text(tmp_path, f'[daemon]\nmetrics = "{written}"\n' + DISK).daemon.metrics_address == address


def test_metrics_may_be_seen_by_others_when_the_operator_says_so(tmp_path: Path) -> None:
    config = load_text(tmp_path, '[daemon]\nmetrics = "0.0.0.0:9477"\nmetrics_allow_remote = true\n' + DISK)
    assert config.daemon.metrics_address == ("0.0.0.0", 9477)


def test_two_readers_may_share_an_image(tmp_path: Path) -> None:
    second = DISK.replace("devices.a", "devices.b").replace("a.sock", "b.sock")
    config = load_text(tmp_path, DISK + "read_only = true\n" + second + "read_only = true\n")
    assert set(config.devices) == {"a", "b"}


def test_nothing_of_a_configuration_can_be_changed_later(tmp_path: Path) -> None:
    config = load_text(tmp_path, DISK)
    attempts: list[tuple[Any, str]] = [
        (config, "path"),
        (config.daemon, "metrics"),
        (config.devices["a"].common, "queues"),
    ]
    for thing, name in attempts:
        with pytest.raises((AttributeError, ValueError)):
            setattr(thing, name, None)


def test_changes_name_every_key_that_differs_and_nothing_else(tmp_path: Path) -> None:
    old = load_text(tmp_path, "[workers.w]\n" + DISK + 'worker = "w"\n')
    new = load_text(
        tmp_path,
        '[daemon]\nlog_level = "debug"\n[workers.w]\npoll_us = 0\n' + DISK + 'worker = "w"\nread_only = true\n',
        more='[devices.b]\ntype = "chip"\nsocket = "b.sock"\n',
    )
    found = changes(old, new)
    assert [(change.table, change.key) for change in found] == [
        ("daemon", "log_level"),
        ("devices.a", "read_only"),
        ("devices.b", ""),
        ("workers.w", "poll_us"),
    ]
    assert found[1] == Change("devices.a", "read_only", False, True)
    assert found[2].old is None
    assert changes(new, new) == ()


def test_a_problem_found_later_still_names_file_and_line(tmp_path: Path) -> None:
    config = load_text(tmp_path, DISK)
    problem = config.problem(("devices", "a", "path"), "does not exist", "create it")
    assert str(problem) == f"{config.path}:4: [devices.a] path: does not exist\n    create it"


def test_windows_line_ends_do_not_shift_lines(tmp_path: Path) -> None:
    (tmp_path / "dos.toml").write_bytes(DISK.replace("\n", "\r\n").encode() + b"queues = 99\r\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "dos.toml", TYPES, {"vhost-user"})
    assert [problem.line for problem in caught.value.problems] == [5]
