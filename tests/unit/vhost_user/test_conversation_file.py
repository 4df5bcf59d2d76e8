"""The form of the files in tests/conversations: what is in them, and one clear error for what is not in the form."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.conversation.file import ConversationError, EachRing, Step, load, parse

HEAD = "front-end: some 1\nattaches: blk net\nring-size: 256\nring-size net: 64\nlife: start use hangup\n"
BODY = """[start]
SET_OWNER !  # first
each ring
  SET_VRING_NUM
  SET_VRING_ENABLE 1 ! if blk MQ
GET_STATUS if not net
"""


def test_a_file_is_its_keys_and_its_sections() -> None:
    found = parse("some", HEAD + BODY)
    assert found.attaches == ["blk", "net"]
    assert [found.key("ring-size", each) for each in ("blk", "net")] == ["256", "64"]
    assert found.life("blk") == ["start", "use", "hangup"]
    owner, rings, status = found.sections["start"]
    assert owner == Step(7, "SET_OWNER", (), True, (), False)
    assert isinstance(rings, EachRing)
    assert rings.steps[1] == Step(10, "SET_VRING_ENABLE", ("1",), True, ("blk", "MQ"), False)
    assert isinstance(status, Step)
    assert [status.applies({each}) for each in ("blk", "net")] == [True, False]
    assert [rings.steps[1].applies({each}) for each in ("blk", "MQ", "net")] == [True, True, False]


def test_rings_are_spoken_of_in_order_or_backwards() -> None:
    forth, back = parse(
        "some", f"{HEAD}[start]\neach ring\n  SET_VRING_ERR\neach ring backwards\n  SET_VRING_CALL\n"
    ).sections["start"]
    assert isinstance(forth, EachRing)
    assert isinstance(back, EachRing)
    assert (forth.order(3), back.order(3)) == ([0, 1, 2], [2, 1, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red\n" + HEAD + BODY, "line 1: 'colour: red' is none of the keys"),
        (HEAD.replace("size net", "size tape") + BODY, "line 4: there is no type tape"),
        (HEAD + "[start]\nset_owner\n", "line 7: 'set_owner' is no message"),
        (HEAD + "[start]\n  SET_OWNER\n", "line 7: is indented, but no line above it says each ring"),
        (HEAD + "[start]\n[start]\n", "line 7: there is a section start already"),
        (HEAD + "[use]\n", "line 6: there is a section use already"),
        (HEAD + "[stop]\n", "the life names start, which is no section"),
        (HEAD.replace("blk net", "blk tape") + BODY, "attaches tape, which is no type"),
        ("attaches: all\nlife: use\n", "has no key front-end"),
    ],
)
def test_what_is_not_in_the_form_is_one_error_that_names_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_text(text)
    with pytest.raises(ConversationError) as caught:
        load(file)
    assert str(caught.value).startswith(f"some.txt: {message}")
