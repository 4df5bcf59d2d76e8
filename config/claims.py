"""What the loader reads of a device's options: the claims that are checked against those of other devices.

The device types' side is ``virtio.claims``, whose classes have these attributes; here is only what is asked of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable


class Shared(Protocol):
    """``thing`` has room for ``most`` devices, and one worker drives them; the option ``key`` names it."""

    @property
    def thing(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def most(self) -> int: ...


class Unique(Protocol):
    """``thing`` is one device only; the option ``key`` says so."""

    @property
    def thing(self) -> str: ...
    @property
    def key(self) -> str: ...


class Claims(Protocol):
    @property
    def shared(self) -> Shared | None: ...
    @property
    def unique(self) -> Unique | None: ...
    @property
    def sockets(self) -> Mapping[tuple[str, ...], Path]: ...
    @property
    def links(self) -> Mapping[tuple[str, ...], Path]: ...
    @property
    def derived(self) -> Mapping[str, Path]: ...
    @property
    def numbered(self) -> Path | None: ...
    @property
    def only_read(self) -> frozenset[str]: ...
    @property
    def read_only(self) -> bool | None: ...


@runtime_checkable
class Claiming(Protocol):
    """Options that claim something; a device type's own are such, see ``virtio.device.DeviceOptions``."""

    def claims(self, name: str) -> Claims: ...
    def faults_in_files(self, folder: Path) -> Iterable[tuple[str, str]]: ...


def claims_of(options: object, name: str) -> Claims | None:
    """The claims of the device called ``name``; None: its options are wrong, or claim nothing."""
    return options.claims(name) if isinstance(options, Claiming) else None


def faults_in_files_of(options: object, folder: Path) -> Iterable[tuple[str, str]]:
    """(option, what is wrong) of the files that belong to the options."""
    return options.faults_in_files(folder) if isinstance(options, Claiming) else ()
