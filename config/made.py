"""The paths among a device's options: all of them, and those at which the device makes a file itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from config.claims import claims_of

Key = tuple[str, ...]


class Made(NamedTuple):
    """A socket that the device makes at ``path``, or a symbolic link. ``key`` is the option that says so."""

    key: Key
    path: Path
    is_link: bool


def made_by(options: object, name: str) -> Iterator[Made]:
    """What the device called ``name`` makes."""
    own = claims_of(options, name)
    if own is None:
        return
    named = dict(paths_in(options))
    for key, longest in own.sockets.items():
        yield Made(key, named.get(key, longest), False)
    for option, path in own.derived.items():
        yield Made((option,), path, False)
    for key, path in own.links.items():
        yield Made(key, path, True)


def paths_in(value: object) -> Iterator[tuple[Key, Path]]:
    """Every path among the options ``value``, with its key."""
    for key, found in _leaves(value):
        if isinstance(found, Path):
            yield key, found


def texts_in(value: object) -> Iterator[tuple[Key, str]]:
    """Every string and path among the options ``value``, with its key."""
    for key, found in _leaves(value):
        if isinstance(found, str | Path):
            yield key, str(found)


def _leaves(value: object) -> Iterator[tuple[Key, object]]:
    inner: Iterable[tuple[str, object]] = ()
    if isinstance(value, BaseModel):
        inner = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, tuple | list):
        inner = ((str(index), item) for index, item in enumerate(value))
    else:
        yield (), value
    for name, item in inner:
        yield from (((name, *key), found) for key, found in _leaves(item))
