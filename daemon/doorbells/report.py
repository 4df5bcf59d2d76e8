"""What ``hyperbell doorbells`` found out on a host: the model of its JSON, and the file that the daemon reads again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, StrictFloat, ValidationError, model_validator

from config.schema import Table
from virtio.errors import HostError

VERSION: Final = 1
SIZE_MAX: Final = 1 << 20  # bytes of a file; one has about four thousand

Kind = Literal["mmio", "mmio-match", "pio", "hypercall", "exit", "cpuid"]
"""``mmio``: any value rings (KVM_IOEVENTFD of length 0); ``mmio-match``: by its value. The last two ring nothing."""

Target = Literal["kernel", "thread"]
"""``kernel``: to the eventfd, for which nobody waits; ``thread``: until a waiting thread has acknowledged."""

TARGETS: Final[tuple[Target, ...]] = ("kernel", "thread")
DOORBELLS: Final[tuple[Kind, ...]] = ("mmio", "mmio-match", "pio", "hypercall")

Nanoseconds = Annotated[StrictFloat, Field(ge=0, le=1e12, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Figure(Table):
    """One kind's rings to one target. Medians and percentiles are less the two time stamps themselves.

    ``spread``: how far apart the rounds' medians lie, as a share of the median: from their 10th to their 90th percent.
    """

    median_ns: Nanoseconds
    p99_ns: Nanoseconds
    median_cycles: Annotated[int, Field(ge=0)]
    p99_cycles: Annotated[int, Field(ge=0)]
    rings: Count
    spread: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]


class Measured(Table):
    """One kind: its figures, or why there are none."""

    kind: Kind
    kernel: Figure | None = None
    thread: Figure | None = None
    why_not: str | None = None

    @model_validator(mode="after")
    def _figures_or_a_reason(self) -> Measured:
        if (self.kernel is None) == (self.why_not is None):
            raise ValueError(f"the kind {self.kind} needs figures or a reason why not, and not both")
        return self

    def figure(self, target: Target) -> Figure | None:
        return self.kernel if target == "kernel" else self.thread


class Reason(Table):
    """Why the figures cannot be trusted. ``meaningless``: they say nothing at all; else they say less."""

    code: Literal["emulated-guest", "emulated-host", "nested", "noisy"]
    meaningless: bool
    text: str


class Host(Table):
    """Where it was measured. ``below``: the hypervisor that this machine is a guest of, or ""."""

    processor: str
    kernel: str
    below: str
    placement: str


class Report(Table):
    """Everything. ``tsc_khz`` is 0 when nothing could be measured."""

    hyperbell_doorbells: Literal[1]
    measured_at: str
    host: Host
    tsc_khz: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]
    stamps_cycles: Annotated[int, Field(ge=0)]
    trustworthy: bool
    reasons: tuple[Reason, ...]
    doorbells: tuple[Measured, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Report:
        kinds = [measured.kind for measured in self.doorbells]
        if len(set(kinds)) != len(kinds):
            raise ValueError("a kind stands there twice")
        if self.trustworthy != (self.measured_something and not self.reasons):
            raise ValueError("trustworthy is true when there are figures and no reason against them, and only then")
        return self

    @property
    def measured_something(self) -> bool:
        return any(measured.kernel is not None for measured in self.doorbells)

    @property
    def meaningless(self) -> bool:
        return any(reason.meaningless for reason in self.reasons)

    def find(self, kind: Kind) -> Measured | None:
        return next((measured for measured in self.doorbells if measured.kind == kind), None)

    def costs(self, target: Target) -> Mapping[str, float]:
        """Median seconds of every kind that was measured to ``target``."""
        figures = {measured.kind: measured.figure(target) for measured in self.doorbells}
        return {kind: figure.median_ns / 1e9 for kind, figure in figures.items() if figure is not None}


def to_json(report: Report) -> str:
    return report.model_dump_json(indent=2)


def save(report: Report, path: Path) -> None:
    """Write ``report`` to ``path``, whole or not at all. ``HostError`` says why it could not be done."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=".doorbells-", delete=False
        ) as new:
            try:
                new.write(to_json(report) + "\n")
                new.flush()
                os.fchmod(new.fileno(), 0o644)
                Path(new.name).replace(path)
            except BaseException:
                Path(new.name).unlink()
                raise
    except OSError as error:
        raise HostError(f"{path}: cannot be written: {error.strerror}", errno=error.errno or 0) from error


def load(path: Path) -> Report:
    """The report in the file ``path``; ``HostError`` in one line when there is none that can be used."""
    remedy = f"make it anew: hyperbell doorbells --save {path}"
    try:
        with path.open("rb") as file:
            text = file.read(SIZE_MAX + 1)
    except FileNotFoundError as error:
        raise HostError(
            f"{path} does not exist; make it: hyperbell doorbells --save {path}", errno=error.errno or 0
        ) from error
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror}", errno=error.errno or 0) from error
    if len(text) > SIZE_MAX:
        raise HostError(f"{path} is too large for a file of doorbells' costs; {remedy}")
    try:
        report = Report.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise HostError(f"{path} is no file of doorbells' costs that can be used ({what}); {remedy}") from error
    if not report.measured_something:
        raise HostError(f"{path} has no costs: no doorbell worked where it was made; {remedy}")
    return report
