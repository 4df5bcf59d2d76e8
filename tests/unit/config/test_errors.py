"""Every mistake in a configuration is reported at once, with its place, what is wrong and what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from kit.known_types import KnownTypes
from pydantic import BaseModel, ConfigDict, Field

from config.loader import load
from config.problems import ConfigError, Problem
from config.schema import DeviceType
from virtio.claims import Claims, Shared, Unique
from virtio.device import DeviceOptions


class DiskOptions(DeviceOptions):
    """A disk, for these tests."""

    path: Path = Field(examples=["disk.img"])
    read_only: bool = False

    def claims(self, name: str) -> Claims:
        return Claims(read_only=self.read_only)


class PinOptions(BaseModel):
    """One of several inner tables."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern="^[a-z]+$", description="Lower-case letters.")
    level: Literal["high", "low"] = "low"
    path: Path | None = None


class ChipOptions(BaseModel):
    """A device driven by the event loop, for these tests."""

    model_config = ConfigDict(extra="forbid")

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
CHIP = '[devices.c]\ntype = "chip"\nsocket = "c.sock"\n'


def problems(folder: Path, text: str | bytes, **drop_ins: str) -> tuple[Problem, ...]:
    main = folder / "hyperbell.toml"
    main.write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "hyperbell.toml.d").mkdir(exist_ok=True)
    for name, drop_in in drop_ins.items():
        (folder / "hyperbell.toml.d" / f"{name}.toml").write_text(drop_in)
    with pytest.raises(ConfigError) as caught:
        load(main, TYPES, {"vhost-user"})
    return caught.value.problems


def the_problem(folder: Path, text: str | bytes) -> Problem:
    found = problems(folder, text)
    assert len(found) == 1, found
    return found[0]


MISTAKES = [
    # text, line, table, key, part of the message, part of the hint
    ('colour = "red"\n' + DISK, 1, "", "colour", "unknown key", "known here: daemon, devices, workers"),
    ("[deamon]\n" + DISK, 1, "", "deamon", "unknown table", 'did you mean "daemon"?'),
    ("daemon = 3\n" + DISK, 1, "daemon", "", "must be a table, not 3", "[daemon]"),
    ("[daemon]\nlog_levl = 1\n" + DISK, 2, "daemon", "log_levl", "unknown key", 'did you mean "log_level"?'),
    ('[daemon]\nlog_level = "wanring"\n' + DISK, 2, "daemon", "log_level", "must be 'debug', ", '"warning"'),
    ('[daemon]\nmetrics = "0.0.0.0:9"\n' + DISK, 2, "daemon", "metrics", "not a loopback", "metrics_allow_remote"),
    ('[daemon]\nmetrics = "example.org:9"\n' + DISK, 2, "daemon", "metrics", "not a loopback", "metrics_allow_remote"),
    ('[daemon]\nmetrics = "9477"\n' + DISK, 2, "daemon", "metrics", "an address and a port", "127.0.0.1:9477"),
    ('[daemon]\nmetrics = "[::]:9477"\n' + DISK, 2, "daemon", "metrics", "not a loopback", "127.0.0.1"),
    ('[daemon]\nmetrics = "127.0.0.1:65536"\n' + DISK, 2, "daemon", "metrics", "an address and a port", "off"),
    ('[daemon]\ncontrol = ""\n' + DISK, 2, "daemon", "control", "must be a path", "/run/hyperbell"),
    ('[daemon]\ncontrol = "a\\u0000b"\n' + DISK, 2, "daemon", "control", "NUL character", "no name"),
    ("[workers]\nw = 1\n" + DISK, 2, "workers.w", "", "must be a table, not 1", "[workers.w]"),
    ('[workers."1st"]\n' + DISK, 1, "workers.1st", "", "name cannot be used", "begins with a letter"),
    ('[workers.w]\ncpus = "3-1"\n' + DISK, 2, "workers.w", "cpus", "runs backwards", '"1-3"'),
    ('[workers.w]\ncpus = "a"\n' + DISK, 2, "workers.w", "cpus", "not a CPU number", "0-3,5"),
    ("[workers.w]\ncpus = [-1]\n" + DISK, 2, "workers.w", "cpus", "not a CPU number", "0-3,5"),
    ("[workers.w]\ncpus = [true]\n" + DISK, 2, "workers.w", "cpus", "true is not a CPU number", "0-3,5"),
    ("[workers.w]\ncpus = []\n" + DISK, 2, "workers.w", "cpus", "names no CPU", "leave the key out"),
    ("[workers.w]\npoll_us = 1001\n" + DISK, 2, "workers.w", "poll_us", "at most 1000, not 1001", "poll_us = 32"),
    ('[workers.w]\nreactor = "uring"\n' + DISK, 2, "workers.w", "reactor", "'io_uring'", '"io_uring"'),
    ("[devices]\na = 1\n", 2, "devices.a", "", "must be a table, not 1", "[devices.a]"),
    ("", 0, "", "", "there is no device to serve", "[devices.disk]"),
    ('[devices.a]\ntype = "disc"\nsocket = "a"\n', 2, "devices.a", "type", 'no device type "disc"', '"disk"'),
    ('[devices.a]\nsocket = "a"\n', 1, "devices.a", "type", "is missing", 'add type = "blk"'),
    ('[devices.a]\ntype = "chip"\n', 1, "devices.a", "socket", "is missing", "add socket = "),
    ('[devices.a]\ntype = "disk"\nsocket = "a"\n', 1, "devices.a", "path", "is missing", 'add path = "disk.img"'),
    ('[devices.a]\ntyp = "disk"\nsocket = "a"\npath = "d"\n', 2, "devices.a", "typ", "unknown key", 'mean "type"?'),
    ('[devices.a]\ntpye = "disk"\nsocket = "a"\n', 2, "devices.a", "tpye", "unknown key", 'mean "type"?'),
    ('[devices.a]\nType = "disk"\nsocket = "a"\n', 2, "devices.a", "Type", "unknown key", 'mean "type"?'),
    ('[devices.c]\ntype = "chip"\nsokcet = "c"\n', 3, "devices.c", "sokcet", "unknown key", 'mean "socket"?'),
    ('[devices.a]\ntype = "disk"\nsocket = "a"\npaht = "d"\n', 4, "devices.a", "paht", "unknown key", '"path"?'),
    (DISK + "queue_sise = 3\n", 5, "devices.a", "queue_sise", "unknown key", '"queue_size"'),
    (DISK + "redonly = true\n", 5, "devices.a", "redonly", "unknown key", '"read_only"'),
    (DISK + 'read_only = "yes"\n', 5, "devices.a", "read_only", 'true or false, not "yes"', "read_only = false"),
    (DISK + 'queues = "4"\n', 5, "devices.a", "queues", 'an integer, not "4"', "queues = 1"),
    (DISK + "queues = nan\n", 5, "devices.a", "queues", "must be", "queues = 1"),
    (DISK + "features = 3\n", 5, "devices.a", "features", "must be a table, not 3", "features = { VIRTIO"),
    ("[devices.a]\ntype = 2026-11-22\nsocket = 'a'\n", 2, "devices.a", "type", "a string in quotes", 'type = "blk"'),
    ("[devices.a]\ntype = []\nsocket = 'a'\n", 2, "devices.a", "type", "a string in quotes", 'type = "blk"'),
    (DISK + "queues = true\n", 5, "devices.a", "queues", "an integer, not true", "queues = 1"),
    (DISK + "queues = 0\n", 5, "devices.a", "queues", "at least 1, not 0", "queues = 1"),
    (DISK + "queues = 9\n", 5, "devices.a", "queues", "from 1 to 8 for a disk device, not 9", "queues = 1"),
    (DISK + "queue_size = 100\n", 5, "devices.a", "queue_size", "power of two", "queue_size = 128"),
    (DISK + "queue_size = 0\n", 5, "devices.a", "queue_size", "power of two", "queue_size = 2"),
    (DISK + "queue_size = 65536\n", 5, "devices.a", "queue_size", "power of two", "queue_size = 32768"),
    (DISK + "queue_size = 2048\n", 5, "devices.a", "queue_size", "at most 1024 for a disk", "queue_size = 1024"),
    (CHIP + "queues = 2\n", 4, "devices.c", "queues", "must be 1 for a chip device, not 2", "queues = 1"),
    (DISK + 'transport = "vhost"\n', 5, "devices.a", "transport", 'no transport "vhost"', '"vhost-user"'),
    (DISK + 'mode = "conect"\n', 5, "devices.a", "mode", "'listen' or 'connect'", '"connect"'),
    (DISK + 'socket_mode = "888"\n', 5, "devices.a", "socket_mode", "octal", '"0660"'),
    (DISK + "socket_mode = 660\n", 5, "devices.a", "socket_mode", "a string in quotes, not 660", '"0660"'),
    (DISK + 'mode = "connect"\nsocket_fd = 3\n', 6, "devices.a", "socket_fd", "stands beside", "keep one"),
    (DISK + 'worker = "fast"\n', 5, "devices.a", "worker", 'no worker "fast"', "[workers.fast]"),
    ("[workers.fast]\n" + DISK + 'worker = "fsat"\n', 6, "devices.a", "worker", 'no worker "fsat"', '"fast"'),
    (DISK + 'workers = ["default", 3]\nqueues = 2\n', 5, "devices.a", "workers", "3 is not the name", "fast0"),
    (DISK + 'workers = ["default", "default"]\nqueues = 2\n', 5, "devices.a", "workers", "twice", "once"),
    (DISK + "workers = []\n", 5, "devices.a", "workers", "names no worker", '"default"'),
    (DISK + 'worker = "default"\nworkers = ["default"]\n', 6, "devices.a", "workers", "beside worker", "keep one"),
    ("[workers.x]\n" + DISK + 'workers = ["default", "x"]\n', 6, "devices.a", "workers", "no work", "queues = 2"),
    (CHIP + 'worker = "default"\n', 4, "devices.c", "worker", "has no worker", "remove the key"),
    (
        DISK + "features = { VIRTIO_BLK_F_DISCRD = false }\n",
        5,
        "devices.a",
        "features.VIRTIO_BLK_F_DISCRD",
        "no such feature",
        '"VIRTIO_BLK_F_DISCARD"',
    ),
    (
        CHIP + "[devices.c.features]\nVIRTIO_F_RING_PACKED = 0\n",
        5,
        "devices.c",
        "features.VIRTIO_F_RING_PACKED",
        "true or false, not 0",
        "features = { VIRTIO_F_EVENT_IDX = false }",
    ),
    (
        DISK + CHIP.replace("c.sock", "./a.sock"),
        7,
        "devices.c",
        "socket",
        'socket of device "a"',
        "a file of its own",
    ),
    (
        DISK + DISK.replace("s.a]", "s.b]").replace("a.sock", "b.sock"),
        8,
        "devices.b",
        "path",
        'a.img is already the path of device "a"',
        "read_only = true on all",
    ),
]


@pytest.mark.parametrize(
    ("text", "line", "table", "key", "message", "hint"),
    MISTAKES,
    ids=[f"{number}-{table or 'top'}-{key}" for number, (_, _, table, key, _, _) in enumerate(MISTAKES)],
)
def test_a_mistake_is_reported_with_its_place_and_its_remedy(
    tmp_path: Path, text: str, line: int, table: str, key: str, message: str, hint: str
) -> None:
    problem = the_problem(tmp_path, text)
    assert (problem.file, problem.line) == (tmp_path / "hyperbell.toml", line)
    assert (problem.table, problem.key) == (table, key)
    assert message in problem.message
    assert hint in problem.hint


PINS = CHIP + "[[devices.c.pins]]\nname = 'one'\n\n[[devices.c.pins]]\n"
INNER_MISTAKES = [
    (PINS + "name = 'Two'\n", 8, "pins.1.name", 'must match ^[a-z]+$, not "Two"', "Lower-case letters."),
    (PINS + "name = 'two'\nlevle = 'low'\n", 9, "pins.1.levle", "unknown key", 'did you mean "level"?'),
    (PINS + "name = 'two'\nlevel = 'hihg'\n", 9, "pins.1.level", "must be 'high' or 'low'", '"high"'),
    (PINS, 7, "pins.1.name", "is missing", "Lower-case letters."),
    (PINS + "name = 'two'\npath = 'c.sock'\n", 9, "pins.1.path", 'the socket of device "c"', "of its own"),
    (CHIP + "pins = [{ name = 3 }]\n", 4, "pins.0.name", "a string in quotes, not 3", "Lower-case letters."),
    (CHIP + "pins = 3\n", 4, "pins", "must be an array, not 3", ""),
]


@pytest.mark.parametrize(("text", "line", "key", "message", "hint"), INNER_MISTAKES)
def test_a_mistake_in_one_of_several_inner_tables_is_reported_at_its_own_line(
    tmp_path: Path, text: str, line: int, key: str, message: str, hint: str
) -> None:
    problem = the_problem(tmp_path, text)
    assert (problem.table, problem.key, problem.line) == ("devices.c", key, line)
    assert message in problem.message
    assert hint in problem.hint


def test_a_socket_path_longer_than_an_address_is_refused_with_its_length(tmp_path: Path) -> None:
    problem = the_problem(tmp_path, DISK.replace('"a.sock"', f'"/{"s" * 107}"'))
    assert problem.key == "socket"
    assert "108 bytes" in problem.message
    assert "shorter" in problem.hint


def test_the_control_socket_must_not_be_the_socket_of_a_device(tmp_path: Path) -> None:
    problem = the_problem(tmp_path, '[daemon]\ncontrol = "a.sock"\n' + DISK)
    assert (problem.table, problem.key) == ("devices.a", "socket")
    assert "control" in problem.message


def test_two_devices_must_not_inherit_the_same_socket(tmp_path: Path) -> None:
    problem = the_problem(tmp_path, DISK + "socket_fd = 3\n" + CHIP + "socket_fd = 3\n")
    assert (problem.table, problem.key, problem.line) == ("devices.c", "socket_fd", 9)


def test_all_mistakes_are_reported_at_once_in_the_order_of_files_and_lines(tmp_path: Path) -> None:
    text = (
        "[deamon]\n[daemon]\nlog_level = 3\n[workers.w]\npoll_us = -1\n"
        + DISK
        + 'queues = "x"\nqueue_size = 3\nworker = "v"\nfeatures = { NO = false, VIRTIO_F_RING_PACKED = 1 }\nbogus = 1\n'
        + CHIP.replace("c.sock", "a.sock")
    )
    found = problems(tmp_path, text, later='[devices.c]\nworker = "w"\n[devices.d]\ntype = "dsk"\n')
    assert [(problem.file.name, problem.line, problem.key) for problem in found] == [
        ("hyperbell.toml", 1, "deamon"),
        ("hyperbell.toml", 3, "log_level"),
        ("hyperbell.toml", 5, "poll_us"),
        ("hyperbell.toml", 10, "queues"),
        ("hyperbell.toml", 11, "queue_size"),
        ("hyperbell.toml", 12, "worker"),
        ("hyperbell.toml", 13, "features.NO"),
        ("hyperbell.toml", 13, "features.VIRTIO_F_RING_PACKED"),
        ("hyperbell.toml", 14, "bogus"),
        ("hyperbell.toml", 17, "socket"),
        ("later.toml", 2, "worker"),
        ("later.toml", 3, "socket"),
        ("later.toml", 4, "type"),
    ]


SYNTAX = [
    (b"[devices.a]\nsize = 64M\n", 2, "size = 64M", "strings stand in quotes"),
    (b"[devices.a]\nx = 1\n[devices.a]\n", 3, "twice", "rename or remove"),
    (b'[devices.a]\nx = """abc\n', 2, "not valid TOML", "key = value"),
    (b"[devices.a]\nx = 1\nx = 2\n", 3, "Cannot overwrite", "rename or remove"),
    (b"[devices.a]\n\nname = '\xff'\n", 3, "not UTF-8", "UTF-8"),
]


@pytest.mark.parametrize(("text", "line", "message", "hint"), SYNTAX)
def test_a_file_that_is_no_toml_is_reported_with_the_line(
    tmp_path: Path, text: bytes, line: int, message: str, hint: str
) -> None:
    problem = the_problem(tmp_path, text)
    assert problem.line == line
    assert message in problem.message
    assert hint in problem.hint


def test_a_file_that_cannot_be_read_is_a_problem_like_any_other(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(ConfigError) as caught:
        load(missing, TYPES, {"vhost-user"})
    assert str(caught.value) == f"{missing}: cannot be read: No such file or directory"


def test_a_drop_in_with_bad_syntax_does_not_hide_mistakes_elsewhere_nor_invent_any(tmp_path: Path) -> None:
    text = '[devices.a]\ntype = "disk"\nworker = "from the drop-in"\nqueues = 0\n'
    found = problems(tmp_path, text, broken="[devices.a\n", other='[daemon]\nlog_level = "no"\n')
    assert [(problem.file.name, problem.key) for problem in found] == [
        ("hyperbell.toml", "queues"),
        ("broken.toml", ""),
        ("other.toml", "log_level"),
    ]


def test_long_values_are_shortened_in_messages(tmp_path: Path) -> None:
    problem = the_problem(tmp_path, DISK + f'queues = "{"x" * 500}"\n')
    assert len(problem.message) < 100


class PortOptions(DeviceOptions):
    """A device that shares something with others, for these tests."""

    switch: str | None = None

    def claims(self, name: str) -> Claims:
        return Claims(shared=Shared(f'the switch "{self.switch}"', "switch", 3) if self.switch else None)


PORTS = KnownTypes({"port": DeviceType(PortOptions, frozenset(), True, 1, 8, 2, 1024)})


def port(name: str, more: str = 'switch = "lan"\n') -> str:
    return f'[devices.{name}]\ntype = "port"\nsocket = "{name}.sock"\n{more}'


def port_problems(folder: Path, text: str) -> list[tuple[int, str, str, str]]:
    file = folder / "ports.toml"
    file.write_text(text + "[workers.w]\n[workers.v]\n")
    try:
        load(file, PORTS, {"vhost-user"})
    except ConfigError as error:
        return [(problem.line, problem.key, problem.message, problem.hint) for problem in error.problems]
    return []


def test_devices_that_share_something_must_be_driven_by_one_worker(tmp_path: Path) -> None:
    assert port_problems(tmp_path, port("a") + port("b") + port("c", 'switch = "wan"\nworker = "w"\n')) == []
    assert port_problems(tmp_path, port("a", 'worker = "w"\n') + port("b", 'worker = "v"\n')) == []
    assert port_problems(tmp_path, port("a", 'switch = "lan"\nworker = "w"\n') + port("b")) == [
        (
            6,
            "worker",
            'the switch "lan" is driven by worker "w", of device "a", not by default',
            'for example: worker = "w"',
        )
    ]
    (found,) = port_problems(tmp_path, port("a", 'switch = "lan"\nworkers = ["w", "v"]\n') + port("b"))
    assert found[:2] == (5, "workers")
    assert found[2] == 'names 2 workers, but all devices on the switch "lan" must be driven by one'
    (found,) = port_problems(tmp_path, "".join(port(name) for name in "abcde"))
    assert found[:2] == (16, "switch")
    assert found[2] == 'the switch "lan" has room for 3 devices'


class GuestOptions(DeviceOptions):
    """A device that is somebody, and makes a second file, for these tests."""

    number: int
    path: Path

    def claims(self, name: str) -> Claims:
        unique = Unique(f"number {self.number}", "number") if self.number else None
        return Claims(unique=unique, derived={"path": self.path.with_name(f"{self.path.name}.more")})


GUESTS = KnownTypes({"guest": DeviceType(GuestOptions, frozenset(), False, 1, 1, 1, 1024)})


def guest_problems(folder: Path, *guests: tuple[str, int, str]) -> list[tuple[str, str, str]]:
    file = folder / "guests.toml"
    tables = (
        f'[devices.{name}]\ntype = "guest"\nsocket = "{name}.sock"\nnumber = {number}\npath = "{path}"\n'
        for name, number, path in guests
    )
    file.write_text("".join(tables))
    try:
        load(file, GUESTS, {"vhost-user"})
    except ConfigError as error:
        return [(problem.table, problem.key, problem.message) for problem in error.problems]
    return []


def test_what_only_one_device_can_be_is_refused_to_the_second(tmp_path: Path) -> None:
    assert guest_problems(tmp_path, ("a", 1, "a"), ("b", 2, "b"), ("c", 0, "c"), ("d", 0, "d")) == []
    assert guest_problems(tmp_path, ("a", 1, "a"), ("b", 2, "b"), ("c", 1, "c"), ("d", 1, "d")) == [
        ("devices.c", "number", 'number 1 is already device "a" (line 4)'),
        ("devices.d", "number", 'number 1 is already device "a" (line 4)'),
    ]


def test_a_file_that_a_device_makes_beside_another_is_nobody_elses(tmp_path: Path) -> None:
    (found,) = guest_problems(tmp_path, ("a", 1, "x"), ("b", 2, "./x.more"))
    assert found == ("devices.b", "path", 'x.more is already made beside the path of device "a"')
    (found,) = guest_problems(tmp_path, ("a", 1, "x.more"), ("b", 2, "x"))
    assert found == ("devices.b", "path", 'x.more is already the path of device "a"')
