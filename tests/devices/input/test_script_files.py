"""The script of an input device: what a file may say, how a mistake in it is told, and when its lines are played."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

import config
from daemon.cli import main
from virtio.devices.input.codes import EV_ABS, EV_KEY
from virtio.devices.input.options import InputOptions
from virtio.devices.input.source import PENDING_MAX, InputEvent
from virtio.devices.input.timed import SCRIPT_MAX, Player, Script, read_script

KEY_A, KEY_B = 30, 48


def device(name: str, script: str) -> str:
    return f'[devices.{name}]\ntype = "input"\nsocket = "{name}.sock"\nscript = "{script}"\n'


def check(folder: Path, text: str | bytes) -> int:
    """What `hyperbell check` answers, of a device with this script."""
    (folder / "keys").write_bytes(text.encode() if isinstance(text, str) else text)
    (folder / "c.toml").write_text(device("d", "keys"))
    return main(["check", str(folder / "c.toml")])


def options(**keys: object) -> InputOptions:
    return InputOptions.model_validate(keys)


def test_a_script_is_reports_and_waits_in_order(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(
        "# begins\n\n  key KEY_A tap # both\r\nwait 1.5\nkey KEY_B press;  place ABS_X 3\nrepeat\n#"
    )
    script = read_script(tmp_path / "keys", options(events=["keyboard", "ABS_X"]).reports())
    assert script == Script(
        (
            [InputEvent(EV_KEY, KEY_A, 1)],
            [InputEvent(EV_KEY, KEY_A, 0)],
            1.5,
            [InputEvent(EV_KEY, KEY_B, 1), InputEvent(EV_ABS, 0, 3)],
        ),
        repeat=True,
    )


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("key KEY_A tap\n\nkey KEY_Q1 tap", 3, "there is no event 'KEY_Q1'"),
        ("key BTN_LEFT tap", 1, "this device has no BTN_LEFT here (events)"),
        ("type hello", 1, "a report is: key KEY_A press|release|tap"),
        ("watch", 1, "or: wait SECONDS, repeat"),
        ("key KEY_A tap; wait 1", 1, "a report is"),
        ("key KEY_A # tap", 1, "a report is"),
        ("#\nwait", 2, "wait takes one number of seconds, for example: wait 0.5"),
        ("wait 1 2", 1, "wait takes one number"),
        ("wait soon", 1, "wait takes one number"),
        ("wait 0", 1, "a wait is from 0.001 to 86400 seconds"),
        ("wait -1", 1, "a wait is from"),
        ("wait nan", 1, "a wait is from"),
        ("wait inf", 1, "a wait is from"),
        ("key KEY_A tap\nrepeat", 2, "what is repeated needs a wait in it"),
        ("wait 1\nrepeat\n\nkey KEY_A tap", 4, "nothing can follow repeat"),
        ("wait 1\nrepeat 3", 2, "a report is"),
        ("key KEY_A tap\n" * 257, 257, "1028 events without a wait: at most 1024"),
    ],
)
def test_a_wrong_line_is_an_error_of_the_configuration_that_names_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, line: int, said: str
) -> None:
    assert check(tmp_path, text) == 78
    error = capsys.readouterr().err
    assert f"c.toml:4: [devices.d] script: {tmp_path}/keys:{line}: " in error
    assert said in error
    assert main(["serve", str(tmp_path / "c.toml")]) == 78
    assert capsys.readouterr().err == error


def test_what_is_no_text_or_has_no_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, b"\xff\xfe") == 78
    assert "keys: is not UTF-8 text" in capsys.readouterr().err
    assert check(tmp_path, b"#" * SCRIPT_MAX) == 0
    capsys.readouterr()
    assert check(tmp_path, b"#" * (SCRIPT_MAX + 1)) == 78
    assert f"keys: is larger than {SCRIPT_MAX} bytes" in capsys.readouterr().err
    for name, make, said in (
        ("pipe", os.mkfifo, "is not a regular file"),
        ("folder", os.mkdir, "is not a regular file"),
        ("none", lambda path: None, "No such file or directory"),
    ):
        make(tmp_path / name)
        (tmp_path / "c.toml").write_text(device("d", name))
        assert main(["check", str(tmp_path / "c.toml")]) == 78
        assert f"{tmp_path}/{name}: {said}" in capsys.readouterr().err


def test_several_devices_may_have_the_same_script_but_nothing_else_may_be_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").write_text("key KEY_A tap")
    (tmp_path / "c.toml").write_text(device("one", "keys") + device("two", "keys"))
    assert main(["check", str(tmp_path / "c.toml")]) == 0
    (tmp_path / "c.toml").write_text(device("one", "keys") + device("two", "keys") + 'control = "keys"\n')
    assert main(["check", str(tmp_path / "c.toml")]) == 78
    assert "keys is already the script of device" in capsys.readouterr().err


def test_a_device_of_the_host_has_no_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(device("d", "keys") + 'backend = "evdev"\nevdev = "e"\n')
    assert main(["check", str(tmp_path / "c.toml")]) == 78
    assert 'backend = "evdev" has no script' in capsys.readouterr().err


def test_the_example_can_be_played() -> None:
    path = Path(config.__file__).parent / "examples" / "keyboard.events"
    script = read_script(path, options(events=["keyboard", "ABS_X"]).reports())
    assert script.repeat
    assert [InputEvent(EV_ABS, 0, 1)] in script.steps


class Played:
    """What a player has sent, and when."""

    def __init__(self, *steps: float | list[InputEvent], repeat: bool = False) -> None:
        self.seen: list[tuple[float, int]] = []
        self.player = Player(Script(steps, repeat), self._emit)

    def _emit(self, report: Sequence[InputEvent]) -> bool:
        self.seen.append((trio.current_time(), report[0].code))
        return True

    async def for_seconds(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.player.play()


def key(code: int) -> list[InputEvent]:
    return [InputEvent(EV_KEY, code, 1)]


async def test_reports_come_when_their_waits_have_passed(autojump_clock: trio.testing.MockClock) -> None:
    played = Played(key(1), 2.0, key(2), 3.5, key(3))
    played.player.rewind()
    await played.player.play()
    assert played.seen == [(0, 1), (2, 2), (5.5, 3)]
    await played.player.play()
    assert len(played.seen) == 3
    played.player.rewind()
    await played.player.play()
    assert played.seen[3:] == [(5.5, 1), (7.5, 2), (11, 3)]


async def test_a_wait_goes_on_while_nothing_is_played(autojump_clock: trio.testing.MockClock) -> None:
    played = Played(key(1), 10.0, key(2), 10.0, key(3))
    played.player.rewind()
    for _ in range(3):  # as where a queue starts anew because an address was missing
        await played.for_seconds(2)
    assert trio.current_time() == 6
    await played.for_seconds(5)
    assert played.seen == [(0, 1), (10, 2)]
    await trio.sleep(100)
    await played.player.play()
    assert played.seen[2:] == [(111, 3)]


async def test_what_was_never_begun_is_silent_unless_it_repeats(autojump_clock: trio.testing.MockClock) -> None:
    once, again = Played(key(1)), Played(1.0, key(2), repeat=True)
    await once.player.play()
    await again.for_seconds(2.5)
    assert once.seen == []
    assert again.seen == [(1, 2), (2, 2)]


def test_as_many_events_as_the_queue_has_room_for_need_no_wait(tmp_path: Path) -> None:
    assert check(tmp_path, "key KEY_A tap\n" * (PENDING_MAX // 4)) == 0
