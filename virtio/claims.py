"""What a device's options claim: of this host, and of the other devices of a configuration, which is checked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shared:
    """Stands on ``thing`` ('the switch "lan"') with other devices, without a lock: one worker must drive all of them.

    ``key`` is the option that names it, ``most`` how many devices it has room for.
    """

    thing: str
    key: str
    most: int


@dataclass(frozen=True, slots=True)
class Unique:
    """``thing`` ('cid 3 of group "lab"') is one device only; ``key`` is the option that says so."""

    thing: str
    key: str


@dataclass(frozen=True, slots=True)
class Claims:
    """``sockets``: those the device makes, by the path of their key, the longest path of each key.

    ``links``: symbolic links that it makes, by the path of their key. ``derived``: sockets made beside those that the
    options name, by the option. ``numbered``: an underscore and the number of a port follow where the guest reaches the
    host. ``only_read``: options whose file several devices may have. ``read_only``: whether ``path`` is only read,
    where an option says it.
    """

    shared: Shared | None = None
    unique: Unique | None = None
    sockets: Mapping[tuple[str, ...], Path] = field(default_factory=dict)
    links: Mapping[tuple[str, ...], Path] = field(default_factory=dict)
    derived: Mapping[str, Path] = field(default_factory=dict)
    numbered: Path | None = None
    only_read: frozenset[str] = frozenset()
    read_only: bool | None = None
