"""Files and paths that nobody means to write, and folders that are closed: a problem at its place, no traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from config.loader import drop_ins
from daemon.cli import main
from virtio.errors import HostError
from virtio.socket_file import Listen, SocketFile

DISK = '[devices.disk]\ntype = "blk"\npath = "disk.img"\nsocket = "disk.sock"\n'
LONG = "x" * 300  # no file's name can be so long, so looking for it fails otherwise than for one that is not there


def check(folder: Path, text: str, capsys: pytest.CaptureFixture[str], expected: int = 78) -> str:
    (folder / "c.toml").write_text(text)
    assert main(["check", str(folder / "c.toml")]) == expected
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (DISK.replace("disk.sock", r"a\u0000b"), "c.toml:4: [devices.disk] socket: holds a NUL character"),
        (DISK + r'features = { "a" = "b\u0000" }', "c.toml:5: [devices.disk] features: holds a NUL character"),
        (
            '[devices.c]\ntype = "console"\nsocket = "c"\nports = [{ name = "p", backend = "pty", path = "a\\u0000" }]',
            "c.toml:4: [devices.c] ports: holds a NUL character",
        ),
    ],
)
def test_a_nul_character_is_reported_at_its_key_wherever_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    said = check(tmp_path, text, capsys)
    assert complaint in said
    assert "1 mistake in" in said


PEER = '[devices.n]\ntype = "net"\nsocket = "n.sock"\nbackend = "socket"\nlocal = "unix:/a@b"\n'
CONSOLE = '[devices.c]\ntype = "console"\nsocket = "c.sock"\n'


@pytest.mark.parametrize("code", [0x01, 0x0A, 0x1B, 0x7F, 0x85, 0x9B, 0xFFFE], ids=hex)
@pytest.mark.parametrize(
    ("text", "place"),
    [
        (DISK.replace("disk.sock", "a@b.sock"), "c.toml:4: [devices.disk] socket"),
        (DISK.replace("disk.img", "a@b.img"), "c.toml:3: [devices.disk] path"),
        (CONSOLE + 'backend = "pty"\npath = "a@b"\n', "c.toml:5: [devices.c] path"),
        (
            CONSOLE + 'ports = [{ name = "p", backend = "socket", path = "a@b" }]\n',
            "c.toml:4: [devices.c] ports.0.path",
        ),
        (CONSOLE + '[daemon]\ncontrol = "a@b"\n', "c.toml:5: [daemon] control"),
        (CONSOLE + '[daemon]\ndoorbell_costs = "a@b"\n', "c.toml:5: [daemon] doorbell_costs"),
        ('[devices.k]\ntype = "input"\nsocket = "k.sock"\nlabel = "a@b"\n', "c.toml:4: [devices.k] label"),
        (PEER, "c.toml:5: [devices.n] local"),
    ],
    ids=["socket", "image", "pty", "port", "control", "doorbell_costs", "label", "peer"],
)
def test_a_string_with_a_control_character_which_no_xml_can_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, place: str, code: int
) -> None:
    said = check(tmp_path, text.replace("@", f"\\u{code:04x}"), capsys)
    assert f"{place}: has a character that nothing here may have: {chr(code)!r}" in said
    assert "1 mistake in" in said
    assert all(character.isprintable() or character == "\n" for character in said)


def test_a_path_with_any_other_letter_is_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "Größe \u65e5\u672c <&'> \U0001f514.img"
    (tmp_path / name).write_bytes(bytes(1 << 20))
    check(tmp_path, DISK.replace("disk.img", name), capsys, 0)


def test_a_socket_among_symbolic_links_that_go_in_circles_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "disk.img").write_bytes(bytes(512))
    said = check(tmp_path, DISK.replace("disk.sock", "loop/disk.sock"), capsys, 0)
    assert (
        f"[devices.disk] socket: the folder {tmp_path}/loop cannot be looked at by this user: Too many levels" in said
    )
    assert "mkdir" not in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = " + "[" * 5000, ":1"),  # deeper than Python can parse
        ("x = 1\ny = " + "[" * 250 + "]" * 250, ":2"),  # than pydantic can
        ("x = " + "{a = " * 100 + "1" + "}" * 100, ":1"),
        (DISK + "features = " + "[" * 100 + "]" * 100, ":5"),
        ("a." * 3000 + "a = 1", ""),
        ("x = " + "[\n" * 200 + "]\n" * 200, ""),
    ],
)
def test_arrays_and_tables_inside_each_other_without_end_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, line: str
) -> None:
    assert f"c.toml{line}: has more than 64 arrays and tables inside each other" in check(tmp_path, text, capsys)


def test_sixty_four_of_them_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deepest = DISK + "features = { a = " + "[" * 61 + "]" * 61 + " }\n"
    assert "c.toml:5: [devices.disk] features.a: must be true or false" in check(tmp_path, deepest, capsys)


def test_an_array_without_end_on_the_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["microvm", "--kernel", "none", "--device", "i2c,chips=" + "[" * 5000]) == 78
    assert "chips: has too many arrays inside each other" in capsys.readouterr().err


def test_an_image_and_a_folder_that_cannot_be_looked_for_are_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = check(tmp_path, DISK.replace("disk.img", f"{LONG}/disk.img"), capsys, 0)
    assert "[devices.disk] path:" in said
    assert "disk.img cannot be looked at by this user: File name too long" in said
    (tmp_path / "disk.img").write_bytes(bytes(512))
    (tmp_path / "file").touch()
    said = check(tmp_path, DISK.replace("disk.sock", "file/disk.sock"), capsys, 0)
    assert f"[devices.disk] socket: {tmp_path}/file is not a folder" in said


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root goes everywhere, so it is somebody else meanwhile."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that anybody may look into, unlike pytest's."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0)
        yield folder
        (folder / "closed").chmod(0o700)


def check_unprivileged(file: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with unprivileged():
        status = main(["check", str(file)])
    return status, capsys.readouterr().err


def test_a_file_in_a_closed_folder_is_one_problem(open_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = open_folder / "closed/c.toml"
    said = f"{file}: cannot be read: Permission denied\nhyperbell: 1 mistake in the configuration\n"
    assert check_unprivileged(file, capsys) == (78, said)


def test_drop_ins_that_cannot_be_looked_for_are_not_taken_for_none(
    open_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (open_folder / "closed").rename(open_folder / "c.toml.d")
    (open_folder / "c.toml").write_text(DISK)
    try:
        status, said = check_unprivileged(open_folder / "c.toml", capsys)
    finally:
        (open_folder / "c.toml.d").rename(open_folder / "closed")
    assert (status, said.split("\n")[0]) == (78, f"{open_folder}/c.toml.d: cannot be read: Permission denied")


def test_an_image_and_a_socket_below_a_closed_folder_are_notes(
    open_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = open_folder / "closed"
    text = DISK.replace("disk.img", "closed/disk.img").replace("disk.sock", "closed/sockets/disk.sock")
    (open_folder / "c.toml").write_text(text)
    status, said = check_unprivileged(open_folder / "c.toml", capsys)
    assert status == 0
    assert f"[devices.disk] path: {closed}/disk.img cannot be looked at by this user: Permission denied" in said
    assert f"socket: the folder {closed}/sockets cannot be looked at by this user: Permission denied" in said
    assert "create it" not in said  # it may well be there


def test_a_file_with_the_longest_name_has_no_drop_ins(tmp_path: Path) -> None:
    assert drop_ins(tmp_path / ("x" * 250 + ".toml")) == ()


def test_a_class_in_a_closed_folder_is_a_problem_of_its_key(
    open_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (open_folder / "c.toml").write_text('[devices.leds]\ntype = "closed/leds.py:Leds"\nsocket = "leds.sock"\n')
    status, said = check_unprivileged(open_folder / "c.toml", capsys)
    assert status == 78
    assert "c.toml:2: [devices.leds] type:" in said
    assert "Permission denied" in said


# Sockets


GUEST = '[devices.v]\ntype = "vsock"\ncid = 3\nsocket = "v.sock"\n'


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (
            '[devices.c]\ntype = "console"\nsocket = "c"\nbackend = "socket"\npath = "PATH"\n',
            "c.toml:5: [devices.c] path",
        ),
        (
            '[devices.c]\ntype = "console"\nsocket = "c"\n[[devices.c.ports]]\nname = "p"\n'
            'backend = "socket"\npath = "PATH"\n',
            "c.toml:7: [devices.c] ports.0.path",
        ),
        (
            '[devices.g]\ntype = "gpio"\nlines = ["a"]\nsocket = "g"\ncontrol = "PATH"\n',
            "c.toml:5: [devices.g] control",
        ),
        ('[devices.i]\ntype = "i2c"\nsocket = "i"\ncontrol = "PATH"\n', "c.toml:4: [devices.i] control"),
        ('[devices.i]\ntype = "input"\nsocket = "i"\ncontrol = "PATH"\n', "c.toml:4: [devices.i] control"),
    ],
)
def test_every_socket_of_a_device_must_fit_into_an_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, place: str
) -> None:
    longest = "/" + "0" * 106
    assert f"{place}: {longest}0 is 108 bytes long" in check(tmp_path, text.replace("PATH", longest + "0"), capsys)
    check(tmp_path, text.replace("PATH", longest), capsys, 0)


def test_a_link_to_a_pty_may_be_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = '[devices.c]\ntype = "console"\nsocket = "c"\nbackend = "pty"\n'
    check(tmp_path, f'{console}path = "/{"0" * 120}"\n', capsys, 0)


def test_a_vsocks_path_leaves_room_for_the_number_of_every_port(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = "/" + "0" * 95
    said = check(tmp_path, f'{GUEST}path = "{longest}0"\n', capsys)
    assert f"c.toml:5: [devices.v] path: {longest}0_4294967295 is 108 bytes long" in said
    check(tmp_path, f'{GUEST}path = "{longest}"\n', capsys, 0)


@pytest.mark.parametrize(("key", "table"), [("socket", "devices.disk"), ("control", "daemon")])
def test_a_relative_path_of_a_socket_counts_from_the_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, table: str
) -> None:
    name = "s" * (108 - len(f"{tmp_path}/"))
    text = f'[daemon]\ncontrol = "{name}"\n{DISK}' if key == "control" else DISK.replace("disk.sock", name)
    said = check(tmp_path, text, capsys)
    assert f"[{table}] {key}: {tmp_path}/{name} is 108 bytes long, but" in said


def test_a_socket_whose_path_is_too_long_says_so_when_it_is_made() -> None:
    with pytest.raises(HostError, match=r"/0+: a Unix socket's path has at most 107 bytes"):
        SocketFile(Listen(Path("/" + "0" * 199)))


def test_two_users_of_one_file_are_told_of_read_only_only_where_both_have_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = DISK.replace("devices.disk", "devices.other").replace("disk.sock", "other.sock")
    assert "or set read_only = true on all of them" in check(tmp_path, DISK + other, capsys)
    for second in (GUEST, GUEST.replace("devices.v", "devices.w").replace("v.sock", "w.sock")):
        first = DISK if second == GUEST else GUEST + 'path = "disk.img"\n'
        said = check(tmp_path, f'{first}{second}path = "disk.img"\n', capsys)
        assert "give each a file of its own" in said
        assert "read_only" not in said
