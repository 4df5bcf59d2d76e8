"""What the log looks like in each format, and that a change reaches loggers that are bound already."""

from __future__ import annotations

import io
import json
import os
import pty
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from daemon.log import setup as log


@pytest.fixture(autouse=True)
def defaults_afterwards() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def logged(level: str, format_name: str) -> tuple[structlog.typing.FilteringBoundLogger, io.StringIO]:
    stream = io.StringIO()
    log.configure(level, format_name, stream)
    return structlog.get_logger().bind(device="disk", queue=1), stream


def test_json_is_one_object_a_line_with_the_bound_context() -> None:
    logger, stream = logged("info", "json")
    logger.info("front-end connected", path=Path("/x y"))
    logger.warning("two\nlines")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert list(first)[:3] == ["timestamp", "level", "event"]
    assert (first["event"], first["level"], first["device"], first["queue"]) == (
        "front-end connected",
        "info",
        "disk",
        1,
    )
    assert first["path"] == "/x y"
    assert first["timestamp"].endswith("Z")
    assert second["event"] == "two\nlines"


def test_journal_lines_have_a_priority_and_stay_one_line() -> None:
    logger, stream = logged("debug", "journal")
    logger.debug("a")
    logger.info("b", path="/x y", empty="", equals="a=b")
    logger.warning('says "no"\nand goes')
    logger.error("d")
    assert stream.getvalue().splitlines() == [
        "<7>a device=disk queue=1",
        '<6>b device=disk queue=1 path="/x y" empty="" equals="a=b"',
        '<4>says "no"\\nand goes device=disk queue=1',
        "<3>d device=disk queue=1",
    ]


@pytest.mark.parametrize("format_name", ["json", "journal", "human"])
def test_an_exception_is_rendered_once(format_name: str) -> None:
    logger, stream = logged("info", format_name)
    try:
        raise ValueError("the reason")
    except ValueError:
        logger.exception("failed")
    text = stream.getvalue()
    assert text.count("ValueError: the reason") == 1
    assert text.count("Traceback") == 1
    if format_name != "human":
        assert text.count("\n") == 1


def test_only_what_reaches_the_level_is_logged() -> None:
    logger, stream = logged("warning", "journal")
    logger.info("no")
    logger.warning("yes")
    logger.exception("and this", exc_info=False)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["<4>yes", "<3>and"]


def test_a_change_of_level_and_format_reaches_loggers_that_are_bound_already() -> None:
    logger, _ = logged("error", "json")
    _, stream = logged("debug", "journal")
    logger.debug("now")
    assert stream.getvalue() == "<7>now device=disk queue=1\n"


def test_human_lines_have_no_colours_outside_of_a_terminal() -> None:
    logger, stream = logged("info", "human")
    logger.info("hello", n=1)
    assert "\x1b" not in stream.getvalue()
    assert "hello" in stream.getvalue()
    assert "device=disk" in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_has_colours_unless_the_user_does_not_want_them(
    monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = Terminal()
    log.configure("info", "auto", stream)
    structlog.get_logger().info("hello", n=1)
    assert ("\x1b" in stream.getvalue()) is coloured


def test_auto_is_human_on_a_terminal_journal_under_systemd_and_json_elsewhere(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        status = os.fstat(file.fileno())
        journal = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert log.choose_format(file, journal) == "journal"
        assert log.choose_format(file, {"JOURNAL_STREAM": "1:2"}) == "json"
        assert log.choose_format(file, {}) == "json"
        assert log.choose_format(io.StringIO(), journal) == "json"
    controller, terminal = pty.openpty()
    with os.fdopen(controller, "rb"), os.fdopen(terminal, "w") as stream:
        assert log.choose_format(stream, {}) == "human"


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    broken = os.fdopen(writer, "wb", buffering=0)  # unbuffered: nothing is left to write when it is closed
    with broken, io.TextIOWrapper(broken, write_through=True) as text:
        log.configure("info", "json", text)
        structlog.get_logger().info("nobody reads this")
        stream = io.StringIO()
        log.configure("info", "journal", stream)
        structlog.get_logger().info("but this")
    assert stream.getvalue() == "<6>but this\n"


def test_a_log_whose_stream_was_closed_stops_nothing() -> None:
    stream = io.StringIO()
    log.configure("info", "json", stream)
    stream.close()
    structlog.get_logger().info("nobody reads this")
    assert stream.closed
