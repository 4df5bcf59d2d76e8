"""Device types for tests of the configuration, without any device behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from config.schema import DeviceType, DeviceTypes


class KnownTypes(DeviceTypes):
    """These types, and none from files."""

    def __init__(self, types: Mapping[str, DeviceType]) -> None:
        self._types = types

    def __getitem__(self, name: str) -> DeviceType:
        return self._types[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)

    def from_file(self, type_name: str, folder: Path) -> tuple[str, DeviceType] | None:
        return None
