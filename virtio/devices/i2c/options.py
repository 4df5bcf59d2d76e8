"""Options of ``type = "i2c"``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from virtio.claims import Claims
from virtio.device import DeviceOptions

FIRST_ADDRESS: Final = 0x03
LAST_ADDRESS: Final = 0x77
LAST_TEN_BIT_ADDRESS: Final = 0x3FF

Address = Annotated[int, Field(ge=FIRST_ADDRESS, le=LAST_TEN_BIT_ADDRESS)]


_KEYS: Final = {
    "registers": ("registers", "byte_order", "auto_increment"),
    "eeprom": ("size", "page", "path", "read_only"),
}


class RegisterOptions(DeviceOptions):
    """One register of a simulated chip."""

    number: int = Field(ge=0, le=0xFF, description="What the guest writes first to choose it.")
    size: int = Field(1, ge=1, le=4, description="Bytes it has.")
    value: int = Field(0, ge=0, le=0xFFFFFFFF, description="What it holds at first.")
    writable: int = Field(0xFFFFFFFF, ge=0, le=0xFFFFFFFF, description="The bits that the guest may change.")

    @model_validator(mode="after")
    def _value_fits(self) -> RegisterOptions:
        if self.value >> 8 * self.size:
            raise ValueError(f"value = {self.value:#x} has no room in {self.size} bytes (size)")
        return self


class ChipOptions(DeviceOptions):
    """A simulated chip."""

    kind: Literal["registers", "eeprom"] = Field(
        "registers",
        description='"registers": a map of registers, as a sensor has; "eeprom": a memory, a 24C02.',
    )
    address: Address = Field(description="Its address on the bus, without the read/write bit.", examples=[0x48])
    registers: tuple[RegisterOptions, ...] = Field((), max_length=256, description="registers: what the chip has.")
    byte_order: Literal["big", "little"] = Field(
        "big", description="registers: which byte of a larger register comes first."
    )
    auto_increment: bool = Field(
        True, description="registers: whether further bytes are of the next register, or of the same one again."
    )
    size: int = Field(256, ge=16, le=65536, description="eeprom: bytes, a power of two.")
    page: int = Field(8, ge=1, le=256, description="eeprom: bytes of a page, within which one write stays.")
    path: Path | None = Field(
        None, description="eeprom: the file with its contents, made if it is not there; none: forgotten at the end."
    )
    read_only: bool = Field(False, description="eeprom: its write-protect pin is high.")

    @field_validator("size", "page")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"must be a power of two, not {value}")
        return value

    @field_validator("address")
    @classmethod
    def _not_reserved(cls, value: int) -> int:
        if LAST_ADDRESS < value <= 0x7F:
            raise ValueError(f"{value:#x} is one of the addresses that I2C reserves; from 0x80 on they have ten bits")
        return value

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> ChipOptions:
        own = {
            "registers": ("registers", "byte_order", "auto_increment"),
            "eeprom": ("size", "page", "path", "read_only"),
        }
        for kind, keys in own.items():
            for key in keys:
                if kind != self.kind and key in self.model_fields_set:
                    raise ValueError(f'a chip of kind = "{self.kind}" has no {key}')
        if self.kind == "registers":
            numbers = [register.number for register in self.registers]
            if not numbers:
                raise ValueError('a chip of kind = "registers" needs registers')
            for number in numbers:
                if numbers.count(number) > 1:
                    raise ValueError(f"registers: number {number} is there twice")
        elif self.page > self.size:
            raise ValueError(f"a page of {self.page} bytes is larger than the memory of {self.size} (size)")
        return self


class I2cOptions(DeviceOptions):
    """The bus and its chips."""

    backend: Literal["simulated", "adapter"] = Field(
        "simulated", description='"simulated": chips described here; "adapter": chips behind an adapter of this host.'
    )
    chips: tuple[ChipOptions, ...] = Field((), max_length=112, description="simulated: the chips on the bus.")
    control: Path | None = Field(
        None,
        description="simulated: a Unix socket on which registers are read and set, one command a line.",
        examples=["/run/hyperbell/bus.control"],
    )
    adapter: Path | None = Field(None, description="adapter: its character device.", examples=["/dev/i2c-1"])
    addresses: tuple[Address, ...] = Field(
        (), max_length=112, description="adapter: the chips that the guest may talk to.", examples=[[0x50]]
    )

    @model_validator(mode="after")
    def _keys_of_the_backend(self) -> I2cOptions:
        if (self.adapter is not None) != (self.backend == "adapter"):
            need = 'needs adapter, for example: adapter = "/dev/i2c-1"' if self.adapter is None else "has no adapter"
            raise ValueError(f'backend = "{self.backend}" {need}')
        if self.backend == "adapter":
            if self.chips or self.control is not None:
                raise ValueError('backend = "adapter" has neither chips nor control: its chips are real')
            if not self.addresses:
                raise ValueError('backend = "adapter" needs addresses, the chips that the guest may talk to')
        elif self.addresses:
            raise ValueError('backend = "simulated" has no addresses: its chips have them')
        found = [chip.address for chip in self.chips]
        for address in found:
            if found.count(address) > 1:
                raise ValueError(f"chips: two of them have the address {address:#x}")
        return self

    def claims(self, name: str) -> Claims:
        return Claims(sockets={("control",): self.control} if self.control is not None else {})
