"""docs/metrics.md, made from the metrics themselves: ``make pages``."""

from __future__ import annotations

from typing import Final

from daemon.metrics.page import StateCollector
from daemon.state import DaemonState
from kit.project import ROOT

PAGE: Final = ROOT / "docs" / "metrics.md"
_HEAD: Final = """# Metrics

`make pages` writes this page. The metrics are at the address `[daemon] metrics`, by default
<http://127.0.0.1:9477/metrics>. [doorbells.md](doorbells.md) has those of the costs of doorbells, which are there only
where `doorbell_costs` is set.

| metric | labels | meaning |
|---|---|---|
"""


def metrics_page() -> str:
    """The page as it should be."""
    rows = []
    for family in StateCollector(lambda: DaemonState((), ())).collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = " ".join(f"`{label}`" for label in getattr(family, "_labelnames", ()))
        kind = " (histogram)" if family.type == "histogram" else ""
        rows.append(f"| `{name}`{kind} | {labels} | {family.documentation} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(metrics_page(), encoding="utf-8")
