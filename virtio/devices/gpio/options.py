"""Options of ``type = "gpio"``."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import Field, field_validator, model_validator

from virtio.claims import Claims
from virtio.device import DeviceOptions

LINES_MAX: Final = 1024
NAME_MAX: Final = 63


class GpioOptions(DeviceOptions):
    """Which lines the guest gets, and what is behind them."""

    backend: Literal["simulated", "chip"] = Field(
        "simulated", description='"simulated": lines that a program drives over control; "chip": lines of this host.'
    )
    lines: tuple[str | int, ...] = Field(
        min_length=1,
        max_length=LINES_MAX,
        description='The lines the guest gets, in its order. simulated: their names, "" for one without a name; '
        "chip: lines of the chip by name or by offset.",
        examples=[["button", "led"]],
    )
    chip: Path | None = Field(None, description="chip: the GPIO chip.", examples=["/dev/gpiochip0"])
    control: Path | None = Field(
        None,
        description="simulated: a Unix socket on which the lines are driven and watched, one command a line.",
        examples=["/run/hyperbell/pins.control"],
    )

    @field_validator("lines")
    @classmethod
    def _lines_are_told_apart(cls, value: tuple[str | int, ...]) -> tuple[str | int, ...]:
        named = [line for line in value if line != ""]
        for line in named:
            if isinstance(line, str) and not (line.isascii() and line.isprintable() and len(line) <= NAME_MAX):
                raise ValueError(f"a line's name is up to {NAME_MAX} printable ASCII characters, not {line!r}")
            if isinstance(line, str) and line != line.strip():
                raise ValueError(f"a line's name neither begins nor ends with a blank: {line!r}")
            if isinstance(line, int) and not 0 <= line < 1 << 16:
                raise ValueError(f"there is no line {line}")
            if named.count(line) > 1:
                raise ValueError(f"names the line {line!r} twice (5.18.6.1 wants names to be unique)")
        return value

    @model_validator(mode="after")
    def _keys_of_the_backend(self) -> GpioOptions:
        if (self.chip is not None) != (self.backend == "chip"):
            need = 'needs chip, for example: chip = "/dev/gpiochip0"' if self.chip is None else "has no chip"
            raise ValueError(f'backend = "{self.backend}" {need}')
        if self.backend == "chip":
            if self.control is not None:
                raise ValueError('backend = "chip" has no control: its lines are driven by the hardware')
            if "" in self.lines:
                raise ValueError('lines: with backend = "chip" every line has a name or an offset')
        else:
            for line in self.lines:
                if isinstance(line, int) or line.isdigit():
                    raise ValueError(f'lines: with backend = "simulated" a line has a name, not the number {line}')
        return self

    def claims(self, name: str) -> Claims:
        return Claims(sockets={("control",): self.control} if self.control is not None else {})
