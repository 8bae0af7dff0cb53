"""Tables of the metric against the share of MACs kept."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.criteria_points import Combination

PLAIN = ("l2", "local", "default", "none")  # what the others are compared with
Record = dict[str, Any]


def first(metrics: dict[str, float]) -> tuple[str, float]:
    """(name, value) of the most important metric."""
    return next(iter(metrics.items()))


def curves(points: Sequence[Record]) -> dict[Combination, dict[float, Record]]:
    """The points of one model by combination and share, in the order in which they were measured."""
    result: dict[Combination, dict[float, Record]] = {}
    for point in points:
        if "share" in point:
            result.setdefault(Combination(*(point[f] for f in Combination._fields)), {})[point["share"]] = point
    return result


def by_model(points: Sequence[Record]) -> dict[str, list[Record]]:
    result: dict[str, list[Record]] = {}
    for point in points:
        result.setdefault(point["model"], []).append(point)
    return {name: found for name, found in result.items() if any("share" in p for p in found)}


def show(points: Sequence[Record], console: Console) -> None:
    """A table per model, the best at the smallest share first, and what is gained over plain l2."""
    for name, found in by_model(points).items():
        base = next((p["baseline"] for p in found if "baseline" in p), {"": float("nan")})
        metric, value = first(base)
        lines = curves(found)
        shares = sorted({s for line in lines.values() for s in line}, reverse=True)
        title = f"{name}: {metric} against the share of MACs kept (uncut {value:.4f})"
        table = Table("criterion", "scope", "normalize", "cost", *(f"{s:g}" for s in shares), title=title)
        best = {s: max((_value(line.get(s)) for line in lines.values()), default=-1.0) for s in shares}
        order = sorted(lines, key=lambda c: [-_value(lines[c].get(s)) for s in reversed(shares)])
        for combination in order:
            cells = [_cell(lines[combination].get(s), best[s]) for s in shares]
            table.add_row(*combination, *cells)
        console.print(table)
        plain = lines.get(Combination(*PLAIN), {})
        for share in shares:
            top = max(lines, key=lambda c: _value(lines[c].get(share)))
            if "metrics" in plain.get(share, {}) and _value(lines[top].get(share)) >= 0:
                gain = best[share] - _value(plain[share])
                console.print(f"{share:g} of the MACs: best is {top}, {best[share]:.4f}, {gain:+.4f} to l2 local")
        errors = {(c, p["error"]) for c, line in lines.items() for p in line.values() if "error" in p}
        for combination, error in sorted(errors):
            console.print(f"[dim]{combination}: {error}", highlight=False)


def _value(point: Record | None) -> float:
    return first(point["metrics"])[1] if point and "metrics" in point else -1.0


def _cell(point: Record | None, best: float) -> str:
    value = _value(point)
    if value < 0:
        return "-"
    return f"[bold]{value:.4f}[/]" if value == best else f"{value:.4f}"


def write_csv(points: Sequence[Record], path: Path) -> None:
    """One row per point."""
    fields = ["model", "samples", *Combination._fields, "share", "macs_kept", "ratio", "metric", "value", "error"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        for point in points:
            metrics = point.get("metrics") or point.get("baseline")
            metric, value = first(metrics) if metrics else ("", "")
            whole = {"share": 1.0, "macs_kept": 1.0} if "baseline" in point else {}
            writer.writerow({**whole, **point, "metric": metric, "value": value})
