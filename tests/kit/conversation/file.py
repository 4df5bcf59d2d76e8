"""What a front-end says to a back-end, as a file: its form, and how it becomes steps.

``tests/conversations/README.md`` describes the form. Nothing here knows what a request means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kit.project import ROOT

CONVERSATIONS: Final = ROOT / "tests" / "conversations"
TYPES: Final = ("blk", "console", "gpio", "i2c", "input", "net", "own", "rng", "vsock")
"""The types of the registry, and "own": a device from a file."""
KEYS: Final = (
    "front-end",
    "attaches",
    "device",
    "passes",
    "protocol",
    "need-reply",
    "ring-size",
    "rings",
    "calls",
    "listens",
    "uva",
    "life",
)
VERBS: Final = ("probe", "use", "hangup")
"""What a part of a life may be beside the file's own sections: see the README."""

_EACH_RING: Final = {"each ring": False, "each ring backwards": True}
_KEY: Final = re.compile(r"([a-z-]+)(?: ([a-z0-9 ]+))?: *(.*)")
_STEP: Final = re.compile(r"([A-Z_]+)((?: [^\s!]+)*?)( !)?(?: if (.+))?")


class ConversationError(ValueError):
    """The file is not in the form; names the line."""


@dataclass(frozen=True)
class Step:
    """One message. ``only`` are the types and protocol features it is sent for (empty: always)."""

    line: int
    name: str
    words: tuple[str, ...]
    need_reply: bool
    only: tuple[str, ...]
    unless: bool

    def applies(self, facts: set[str]) -> bool:
        return not self.only or bool(facts & set(self.only)) != self.unless


@dataclass(frozen=True)
class EachRing:
    """These steps for ring 0, then for ring 1, and so on; or from the last to the first."""

    steps: tuple[Step, ...]
    backwards: bool = False

    def order(self, rings: int) -> list[int]:
        return sorted(range(rings), reverse=self.backwards)


@dataclass
class Conversation:
    """A whole file. ``keys`` has (key, type or ``""``)."""

    name: str
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    sections: dict[str, list[Step | EachRing]] = field(default_factory=dict)

    def key(self, name: str, device_type: str, default: str = "") -> str:
        """What the file says of ``name`` for this type, or for all."""
        return self.keys.get((name, device_type), self.keys.get((name, ""), default))

    @property
    def attaches(self) -> list[str]:
        words = self.key("attaches", "").split()
        return list(TYPES) if words == ["all"] else words

    def life(self, device_type: str) -> list[str]:
        return self.key("life", device_type).split()


def load(path: Path) -> Conversation:
    """The conversation in this file; ``ConversationError`` names the file and the line."""
    try:
        return parse(path.stem, path.read_text())
    except ConversationError as error:
        raise ConversationError(f"{path.name}: {error}") from None


def parse(name: str, text: str) -> Conversation:
    found = Conversation(name)
    section: list[Step | EachRing] | None = None
    inner: list[Step] | None = None
    backwards = False
    for number, line in _lines(text):
        stripped = line.strip()
        if not line.startswith(" "):
            if inner is not None and section is not None:
                section.append(EachRing(tuple(inner), backwards))
            inner = None
        if stripped.startswith("["):
            title = stripped.removeprefix("[").removesuffix("]")
            if title in found.sections or title in VERBS:
                raise ConversationError(f"line {number}: there is a section {title} already")
            section = found.sections[title] = []
        elif section is None:
            _add_key(found, number, stripped)
        elif stripped in _EACH_RING:
            inner, backwards = [], _EACH_RING[stripped]
        elif inner is not None:
            inner.append(_step(number, stripped))
        elif line.startswith(" "):
            raise ConversationError(f"line {number}: is indented, but no line above it says each ring")
        else:
            section.append(_step(number, stripped))
    if inner is not None and section is not None:
        section.append(EachRing(tuple(inner), backwards))
    _check(found)
    return found


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that say something, less their comments."""
    for number, line in enumerate(text.splitlines(), 1):
        if said := line.split("#", 1)[0].rstrip():
            yield number, said


def _add_key(found: Conversation, number: int, line: str) -> None:
    match = _KEY.fullmatch(line)
    if match is None or match[1] not in KEYS:
        raise ConversationError(f"line {number}: {line!r} is none of the keys {', '.join(KEYS)}")
    for device_type in (match[2] or "").split() or [""]:
        if device_type not in ("", *TYPES):
            raise ConversationError(f"line {number}: there is no type {device_type}")
        found.keys[match[1], device_type] = match[3]


def _step(number: int, line: str) -> Step:
    match = _STEP.fullmatch(line)
    if match is None:
        raise ConversationError(f"line {number}: {line!r} is no message")
    only = tuple((match[4] or "").split())
    unless = only[:1] == ("not",)
    return Step(number, match[1], tuple(match[2].split()), match[3] is not None, only[unless:], unless)


def _check(found: Conversation) -> None:
    for key in ("front-end", "attaches", "life"):
        if not found.key(key, ""):
            raise ConversationError(f"has no key {key}")
    for (key, _), value in found.keys.items():
        for word in value.split() if key == "life" else []:
            if word not in found.sections and word not in VERBS:
                raise ConversationError(f"the life names {word}, which is no section")
    for word in found.attaches:
        if word not in TYPES:
            raise ConversationError(f"attaches {word}, which is no type")
