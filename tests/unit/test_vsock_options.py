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
    assert 'c.toml:10: [devices.two] cid: cid 5 of group "lab" is already device "one"' in said
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
