"""What the demo prints: one line for each thing done, a summary at the end, the reason when it fails."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from guest.boot.console import ConsoleLine
from guest.boot.service import Metrics, log_tail
from virtio.devices.blk.device import Blk
from virtio.spec import RING_FEATURES

GREEN, RED, BOLD, DIM, PLAIN = "32", "31", "1", "2", "0"


class Report:
    """Writes to ``out``; colours only on a terminal and without NO_COLOR, check marks only where they can be shown."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._colours = out.isatty() and not os.environ.get("NO_COLOR")
        unicode = (out.encoding or "ascii").lower().replace("-", "") == "utf8"
        self._mark, self._cross, self._dash = ("✓", "✗", "·") if unicode else ("ok", "FAILED", "-")
        self._micro = "µs" if unicode else "us"

    def say(self, text: str) -> None:
        """Something in progress, or a fact."""
        self._print(f"  {self._paint(DIM, self._dash)} {text}")

    def done(self, text: str, seconds: float | None = None) -> None:
        """A step that held what it promised."""
        time = "" if seconds is None else self._paint(DIM, f" ({seconds:.1f} s)")
        self._print(f"  {self._paint(GREEN, self._mark)} {text}{time}")

    def failed(self, reason: str, log: Path | None = None) -> None:
        """The end of a run that failed, with the tail of the daemon's log if the reason does not carry it."""
        self._print(f"  {self._paint(RED, self._cross)} {reason}")
        if log is not None and log.exists() and "daemon's log" not in reason:
            self._print("\n  | ".join(["the end of the daemon's log:", *log_tail(log)]))

    def console(self, line: ConsoleLine) -> None:
        """One line of the guest's console."""
        self._print(self._paint(DIM, f"    {line.seconds:7.2f}  {line.text}"))

    def summary(self, facts: Mapping[str, str], metrics: Metrics, address: str, stay: bool) -> None:
        """What was served and how: ``facts`` are the guest's results, ``metrics`` the last scrape before it left."""
        self._print("")
        self._print(self._paint(BOLD, "  What the guest saw"))
        size_mib = int(facts["info.size"]) // (1024 * 1024)
        self._row("kernel", f"Linux {facts['kernel']}")
        self._row("disk", f"{size_mib} MiB, {facts['cache']}, {facts['queues']} queues, serial {facts['serial']}")
        self._features(facts["disk_features"], Blk.feature_bits)
        self._row("entropy", f"{facts['rng']}, first bytes {facts['one.first'][:16]}")
        self._features(facts["entropy_features"], {})
        self._print("")
        self._print(self._paint(BOLD, "  What the daemon served"))
        self._print(self._paint(DIM, f"  {'':<22}{'requests':>9}{'bytes':>11}{'p50':>11}{'p99':>11}"))
        for device in ("disk", "entropy"):
            for op, count in sorted(metrics.by("op", "hyperbell_requests_total", device=device).items()):
                if count:
                    self._request_row(metrics, device, op, count)
        for device in ("disk", "entropy"):
            self._row(device, self._doorbells(metrics, device))
        self._print("")
        until = "until Ctrl-C" if stay else "while the daemon ran; 'python -m guest.demo --stay' keeps it"
        self._row("metrics", f"{address} ({until})")
        self._print("")

    def _request_row(self, metrics: Metrics, device: str, op: str, count: float) -> None:
        labels = {"device": device, "op": op}
        moved = metrics.total("hyperbell_request_bytes_total", **labels)
        times = [
            metrics.quantile(fraction, "hyperbell_request_duration_seconds", **labels) for fraction in (0.50, 0.99)
        ]
        latency = "".join(f"{self._duration(time):>11}" for time in times)
        self._print(f"  {device:<9} {op:<12}{count:>9.0f}{human(moved):>11}{latency}")

    def _duration(self, seconds: float | None) -> str:
        if seconds is None:
            return ""
        if seconds < 1e-3:
            return f"{seconds * 1e6:.0f} {self._micro}"
        return f"{seconds * 1e3:.1f} ms"

    def _doorbells(self, metrics: Metrics, device: str) -> str:
        def total(name: str) -> int:
            return int(metrics.total(name, device=device))

        return (
            f"{total('hyperbell_kicks_total')} kicks, "
            f"{total('hyperbell_wakeups_total')} wake-ups ({total('hyperbell_empty_wakeups_total')} for nothing), "
            f"{total('hyperbell_notifications_sent_total')} notifications sent, "
            f"{total('hyperbell_notifications_suppressed_total')} suppressed"
        )

    def _features(self, bits: str, device_features: Mapping[str, int]) -> None:
        for line in textwrap.wrap(", ".join(feature_names(bits, device_features)), 96):
            self._row("", self._paint(DIM, line))

    def _row(self, name: str, text: str) -> None:
        self._print(f"  {name:<9} {text}")

    def _paint(self, colour: str, text: str) -> str:
        return f"\033[{colour}m{text}\033[{PLAIN}m" if self._colours else text

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def human(count: float) -> str:
    """Bytes for people, 4 significant places at most; nothing for none."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B" if count else ""


def feature_names(bits: str, device_features: Mapping[str, int]) -> list[str]:
    """The names of what was negotiated, from the text of a virtio device's ``features`` file in sysfs: bit 0 first.

    ``device_features`` names the device type's own bits; a bit that nobody names is said by its number.
    """
    names = {bit: name for table in (device_features, RING_FEATURES) for name, bit in table.items()}
    return [
        names.get(bit, f"bit {bit}").replace("VIRTIO_F_", "").replace("VIRTIO_BLK_F_", "")
        for bit, set_ in enumerate(bits)
        if set_ == "1"
    ]
