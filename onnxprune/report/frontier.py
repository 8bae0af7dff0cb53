"""A sweep as a table and as a page with plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import plot, tables, units
from onnxprune.report.facts import SweepFacts, SweepPoint

_HEADS = ("target", "MACs", "parameters", "file size", "latency", "points", "cosine", "counts by")


def render(facts: SweepFacts) -> list[RenderableType]:
    """The models as a table; those that no other beats are set off."""
    table = tables.table_of(*((head, "left" if head in ("target", "counts by") else "right") for head in _HEADS))
    table.add_column("")
    for point in facts.points:
        if point.error:
            continue
        table.add_row(
            *_cells(facts, point), "on the frontier" if point.best else "", style="bold" if point.best else ""
        )
    note = f"points: {facts.what}; latency: median, {_threads(facts)}" if _timed(facts) else f"points: {facts.what}"
    parts: list[RenderableType] = [table, Text(""), Text(note, style="dim")]
    parts += [Text(f"{p.target}: {p.error}", style="yellow") for p in facts.points if p.error]
    return parts


def page(facts: SweepFacts) -> str:
    """A self-contained HTML page: points against MACs, size and latency, and the table."""
    good = [p for p in facts.points if not p.error]
    whole = good[0]
    costs: list[tuple[str, Callable[[SweepPoint], float]]] = [
        ("share of the MACs", lambda p: p.macs / whole.macs if whole.macs else 1.0),
        ("share of the file size", lambda p: p.size / whole.size if whole.size else 1.0),
    ]
    if _timed(facts):
        costs.append((f"share of the latency ({_threads(facts)})", lambda p: p.ms / whole.ms))
    name = facts.model.rpartition("/")[2]
    charts = [
        plot.chart(f"{facts.what} against the {what}", what, facts.what, _series(facts, good, of)) for what, of in costs
    ]
    rows = [_cells(facts, p) for p in good]
    settings = ", ".join(f"{k} {v}" for k, v in facts.settings.items())
    left = [plot.paragraph(f"{p.target}: {p.error}") for p in facts.points if p.error]
    best = [number for number, p in enumerate(good) if p.best]
    bold = " Bold: no other model here is as good for no more MACs." if best else ""
    parts = [plot.paragraph(f"{settings}.{bold}"), *charts]
    return plot.page(f"What {name} loses by what it costs", [*parts, plot.table(_HEADS, rows, best), *left])


def _series(facts: SweepFacts, points: Sequence[SweepPoint], cost: Callable[[SweepPoint], float]) -> list[plot.Series]:
    def place(p: SweepPoint) -> tuple[float, float, str]:
        return cost(p), p.points, f"{p.target or 'original'}: {facts.what} {p.points:.4g}"

    best = [place(p) for p in sorted(points, key=cost) if p.best]
    # The original is what models are compared with, and none of those that compete.
    original = [place(p) for p in points if not p.target and not p.best]
    rest = [place(p) for p in points if p.target and not p.best]
    named = [("frontier", best, True), ("original", original, False), ("beaten by another", rest, False)]
    return [plot.Series(name, found, line=line) for name, found, line in named if found]


def _cells(facts: SweepFacts, point: SweepPoint) -> list[str]:
    whole = facts.points[0]
    share = f" ({point.macs / whole.macs:.2f})" if whole.macs and point is not whole else ""
    ms = f"{point.ms:.3g} ms" if point.ms else units.DASH
    return [
        point.target or "original",
        units.count(point.macs) + share,
        units.count(point.params),
        units.size(point.size),
        ms,
        f"{point.points:.4g}",
        f"{point.cosine:.4f}" if isfinite(point.cosine) else units.DASH,
        point.answer or units.DASH,
    ]


def _timed(facts: SweepFacts) -> bool:
    return all(p.ms > 0 for p in facts.points if not p.error)


def _threads(facts: SweepFacts) -> str:
    return "1 thread" if facts.threads == 1 else f"{facts.threads} threads"
