"""Which file and line a key of the merged configuration came from.

``tomllib`` keeps no positions, so the text is cut into statements (a table header, or one ``key = value``, which may
span lines): a statement is complete as soon as it parses alone. What it parses to names the keys it sets.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

KeyPath = tuple[str, ...]
"""A key's full path in the configuration, say ``("devices", "disk", "queues")`` or ``(..., "ports", "0", "name")``."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A place in a configuration file. ``line`` counts from 1; 0 when it is not known."""

    file: Path
    line: int


@dataclass
class Origins:
    """The places of all keys of a merged configuration; a later file's key replaces an earlier one's."""

    main: Path
    places: dict[KeyPath, Origin] = field(default_factory=dict)

    def add_file(self, file: Path, text: str) -> None:
        """Record every key that ``text``, the valid TOML text of ``file``, sets."""
        for path, line, is_table in key_lines(text):
            if not is_table or path not in self.places:  # a table stays where it was first opened
                self.places[path] = Origin(file, line)

    def find(self, path: KeyPath) -> Origin:
        """Where ``path`` was written; for a key that was not, the nearest table around it."""
        for length in range(len(path), 0, -1):
            origin = self.places.get(path[:length])
            if origin is not None:
                return origin
        return Origin(self.main, 0)


def key_lines(text: str) -> Iterator[tuple[KeyPath, int, bool]]:
    """Each key of a valid TOML text, the line its statement begins at, and whether it is a table; in file order."""
    table: KeyPath = ()
    elements: dict[KeyPath, int] = {}  # of each array of tables, the last one's number
    statement = ""
    begin = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not statement:
            begin = number
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # a value that goes on in the next line
        if statement.lstrip().startswith("["):
            table = _header_path(_innermost(parsed), statement.lstrip().startswith("[["), elements)
            yield from ((table[:length], begin, True) for length in range(1, len(table) + 1))
        else:
            yield from ((table + path, begin, is_table) for path, is_table in _paths(parsed))
        statement = ""


def _innermost(parsed: Mapping[str, object]) -> KeyPath:
    """The path of the one table a header statement opens; an array of tables counts as a table."""
    path: KeyPath = ()
    node: object = parsed
    while True:
        if isinstance(node, list):
            node = node[0]
        if not isinstance(node, Mapping) or not node:
            return path
        name, node = next(iter(node.items()))
        path += (name,)


def _header_path(names: KeyPath, is_array: bool, elements: dict[KeyPath, int]) -> KeyPath:
    """``names`` with the number of the element behind the name of each array of tables, as in ``ports.0.name``."""
    path: KeyPath = ()
    for depth, name in enumerate(names, start=1):
        path += (name,)
        if is_array and depth == len(names):
            elements[path] = elements.get(path, -1) + 1
        if path in elements:
            path += (str(elements[path]),)
    return path


def _paths(parsed: Mapping[str, object]) -> Iterator[tuple[KeyPath, bool]]:
    """The path of every key in ``parsed`` and whether it is a table, outer ones first."""
    for name, value in parsed.items():
        yield (name,), isinstance(value, Mapping)
        if isinstance(value, Mapping):
            yield from (((name, *rest), is_table) for rest, is_table in _paths(value))
