"""Options of ``type = "input"``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, field_validator, model_validator

from virtio.claims import Claims
from virtio.device import DeviceOptions
from virtio.devices.input.codes import EV_ABS, GROUPS, parse_code
from virtio.devices.input.reports import ReportParser
from virtio.devices.input.timed import read_script
from virtio.errors import HostError

TEXT_MAX: Final = 128  # 5.8.4: the config space's room for a string


class InputOptions(DeviceOptions):
    """What the guest's keyboard, mouse or tablet is, and what is behind it."""

    backend: Literal["script", "evdev"] = Field(
        "script", description='"script": events sent over control, or in a file; "evdev": an input device of this host.'
    )
    events: tuple[str, ...] = Field(
        ("keyboard",),
        min_length=1,
        max_length=1024,
        description='script: what it can do: "keyboard", "mouse", "tablet", or single events such as "KEY_A".',
        examples=[["keyboard"]],
    )
    range: tuple[int, int] = Field((0, 32767), description="script: least and largest value of its absolute axes.")
    label: str = Field("hyperbell input", max_length=TEXT_MAX, description="script: the name the guest sees.")
    control: Path | None = Field(
        None,
        description="script: a Unix socket that takes events, one report a line.",
        examples=["/run/hyperbell/keyboard.control"],
    )
    script: Path | None = Field(
        None,
        description="script: a file of such lines, wait SECONDS and repeat, played to each driver that starts.",
        examples=["/etc/hyperbell/keyboard.events"],
    )
    evdev: Path | None = Field(None, description="evdev: the device.", examples=["/dev/input/event3"])
    grab: bool = Field(True, description="evdev: whether the host itself no longer sees its events.")

    @field_validator("events")
    @classmethod
    def _events_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in GROUPS:
                parse_code(name)
        return value

    @field_validator("range")
    @classmethod
    def _range_has_an_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not -(1 << 31) <= value[0] < value[1] < 1 << 31:
            raise ValueError("the first value must be less than the second, and both fit in 32 bits")
        return value

    @field_validator("label")
    @classmethod
    def _label_has_room(cls, value: str) -> str:
        if len(value.encode()) > TEXT_MAX:
            raise ValueError(f"has room for {TEXT_MAX} bytes")
        return value

    @model_validator(mode="after")
    def _keys_of_the_backend(self) -> InputOptions:
        if (self.evdev is not None) != (self.backend == "evdev"):
            need = 'needs evdev, for example: evdev = "/dev/input/event3"' if self.evdev is None else "has no evdev"
            raise ValueError(f'backend = "{self.backend}" {need}')
        others = ("events", "range", "label", "control", "script") if self.backend == "evdev" else ("grab",)
        for key in others:
            if key in self.model_fields_set:
                raise ValueError(f'backend = "{self.backend}" has no {key}')
        return self

    def claims(self, name: str) -> Claims:
        return Claims(
            sockets={("control",): self.control} if self.control is not None else {}, only_read=frozenset({"script"})
        )

    def faults_in_files(self, folder: Path) -> Iterator[tuple[str, str]]:
        if self.script is not None:
            try:
                read_script(folder / self.script, self.reports())
            except HostError as error:
                yield "script", str(error)

    def reports(self) -> ReportParser:
        return ReportParser(self.codes(), self.range)

    def codes(self) -> dict[int, set[int]]:
        """The codes of each event type that ``events`` means."""
        found: dict[int, set[int]] = {}
        for name in self.events:
            for each in GROUPS.get(name, (name,)):
                kind, code = parse_code(each)
                found.setdefault(kind, set()).add(code)
        return found

    def axes(self) -> set[int]:
        return self.codes().get(EV_ABS, set())
