"""What differs between two configurations, key by key: what a reload tells the operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from config.loader import Config


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs; ``old`` or ``new`` is ``None`` where the key (or its whole table) is not there.

    ``key`` is "" when the table as a whole came or went.
    """

    table: str
    key: str
    old: object
    new: object


def changes(old: Config, new: Config) -> tuple[Change, ...]:
    """Every difference between ``old`` and ``new``, sorted by table and key."""
    before, after = _tables(old), _tables(new)
    found: list[Change] = []
    for table in sorted(before.keys() | after.keys()):
        if table not in before or table not in after:
            found.append(Change(table, "", before.get(table), after.get(table)))
            continue
        left, right = before[table], after[table]
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                found.append(Change(table, key, left.get(key), right.get(key)))
    return tuple(found)


def _tables(config: Config) -> Mapping[str, Mapping[str, Any]]:
    tables: dict[str, Mapping[str, Any]] = {"daemon": config.daemon.model_dump()}
    for name, worker in config.workers.items():
        tables[f"workers.{name}"] = worker.model_dump()
    for name, device in config.devices.items():
        # Whose device it is only matters to those who print options for front-ends.
        common = device.common.model_dump(exclude={"guest"})
        tables[f"devices.{name}"] = common | device.options.model_dump()
    return tables
