"""What is wrong between socket devices is said before anything is served."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.cli import main


def guest(name: str, keys: str) -> str:
    return f'[devices.{name}]\ntype = "vsock"\nsocket = "{name}.sock"\n{keys}\n'


def check(tmp_path: Path, *tables: str) -> int:
    (tmp_path / "c.toml").write_text("".join(tables))
    return main(["check", str(tmp_path / "c.toml")])


def test_guests_of_one_group_have_each_their_own_cid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = 'cid = 5\npath = "one"\ngroup = "lab"', 'cid = 5\npath = "two"\ngroup = "lab"'
    assert check(tmp_path, guest("one", one), guest("two", two)) == 78
    said = capsys.readouterr().err
    assert 'c.toml:10: [devices.two] cid: cid 5 of group "lab" is already device "one" (line 4)' in said
    assert check(tmp_path, guest("one", one), guest("two", two.replace('"lab"', '"office"'))) == 0


def test_guests_that_only_talk_to_the_host_may_have_the_same_cid(tmp_path: Path) -> None:
    assert check(tmp_path, guest("one", 'cid = 5\npath = "one"'), guest("two", 'cid = 5\npath = "two"')) == 0


def test_the_socket_for_messages_is_nobody_elses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, guest("one", 'cid = 5\npath = "v"'), guest("two", 'cid = 6\npath = "v.seqpacket"')) == 78
    assert 'v.seqpacket is already made beside the path of device "one"' in capsys.readouterr().err


@pytest.mark.parametrize("path", ["", "/", "."])
def test_a_path_without_a_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    assert check(tmp_path, guest("one", f'cid = 5\npath = "{path}"')) == 78
    assert "is a folder, and a socket needs a name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other",
    [
        guest("two", 'cid = 6\npath = "v_80"'),  # its guest could be reached as from the host
        guest("v_7", 'cid = 6\npath = "other"').replace('"v_7.sock"', '"v_7"'),
        '[devices.con]\ntype = "console"\nsocket = "con.sock"\nbackend = "socket"\npath = "./x/../v_4294967295"\n',
        '[devices.chip]\ntype = "gpio"\nsocket = "chip.sock"\nbackend = "simulated"\nlines = ["a"]\ncontrol = "v_0"\n',
        '[daemon]\ncontrol = "v_1"\n',
        '[devices.net]\ntype = "net"\nsocket = "n.sock"\nbackend = "socket"\nlocal = "unix:FOLDER/v_2"\n',
    ],
    ids=["guest", "front-end", "console", "lines", "control", "peer"],
)
def test_no_socket_of_ours_is_where_a_guest_reaches_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    assert check(tmp_path, other.replace("FOLDER", str(tmp_path)), guest("one", 'cid = 5\npath = "v"')) == 78
    assert 'is where the guest of device "one" reaches port ' in capsys.readouterr().err


def test_a_guest_does_not_reach_its_own_front_ends_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, '[devices.one]\ntype = "vsock"\nsocket = "v_9"\ncid = 5\npath = "v"\n') == 78
    assert "[devices.one] socket: v_9 is where the guest of device" in capsys.readouterr().err


def test_names_that_no_port_gives_and_files_that_are_no_sockets_are_free(tmp_path: Path) -> None:
    (tmp_path / "v_2").write_bytes(bytes(1 << 20))
    tables = [
        guest(f"g{number}", f'cid = {10 + number}\npath = "{name}"')
        for number, name in enumerate(("v_", "v_01", "v_x", "v_4294967296", "v_-1", "v80", "sub_v_1"))
    ]
    disk = '[devices.disk]\ntype = "blk"\nsocket = "disk.sock"\npath = "v_2"\n'
    assert check(tmp_path, guest("one", 'cid = 5\npath = "v"'), disk, *tables) == 0
