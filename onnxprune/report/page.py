"""Pages with plots: one file, light and dark, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import numbers, tables
from onnxprune.report.facts import SweepFacts, SweepPoint

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 560, 320, 64, 44, 52, 18
COLOURS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #7f7f7f #bcbd22 #003f5c #a05195".split()
_MOST_NAMED = 24
_STYLE = """:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --quiet: #59636e; --line: #d1d9e0;
  --soft: #f0f2f4; --grey: #9aa4ae; --strong: #2f6fd0; --warm: #f4b183; --cool: #b9dcc0; --grid: #e5e5e5; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1318; --ink: #e6edf3; --quiet: #9aa7b4; --line: #343b44;
  --soft: #1c222a; --grey: #66717d; --strong: #5e9bff; --warm: #96511f; --cool: #23583a; --grid: #2a3038; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
main.wide { display: block; } table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: 0.2em 0.9em; text-align: right; } th { border-bottom: 1px solid var(--grey); }
td:first-child, th:first-child { text-align: left; } svg { max-width: 100%; height: auto; }
svg text:not([fill]) { fill: var(--ink); } svg path[stroke="#e5e5e5"] { stroke: var(--grid); }
tr.best td { font-weight: bold; } .scroll { overflow-x: auto; }"""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, points (x, y, text under the pointer); ``line``: joined, else dots alone;
    ``dashed``: broken, without dots."""

    name: str
    points: Sequence[tuple[float, float, str]]
    line: bool = True
    dashed: bool = False


def chart(title: str, across: str, up: str, series: Sequence[Series], *, legend: bool = True) -> str:
    """Draw an SVG of some series over one pair of axes; points that are not finite are left out."""
    points = [p for s in series for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])]
    scale = _Scale([p[0] for p in points] or [0.0, 1.0], [p[1] for p in points] or [0.0, 1.0])
    named = series[:_MOST_NAMED] if legend and len(series) > 1 else []
    down = max(TOP + HEIGHT + BOTTOM, TOP + LEGEND * (len(named) + 1))
    parts = [_text(LEFT, 22, title, size=15), *_frame(scale, across, up)]
    for number, one in enumerate(series):
        parts += _drawn(one, scale, COLOURS[number % len(COLOURS)])
    for number, one in enumerate(named):
        y = TOP + 8 + LEGEND * number
        colour = COLOURS[number % len(COLOURS)]
        parts += [f'<path d="M{LEFT + WIDTH + 16} {y}h22" stroke="{colour}" stroke-width="2"/>']
        parts += [_text(LEFT + WIDTH + 44, y + 4, one.name)]
    wide = LEFT + WIDTH + (330 if named else 24)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {down}" width="{wide}" height="{down}"'
    return "\n".join([f'{head} font-family="sans-serif">', *parts, "</svg>"])


def heat_map(title: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]], what: str) -> str:
    """Draw an SVG with one row of cells per name, coloured by the logarithm of their values, the least white.

    Args:
        title: title of the plot.
        heads: names of the columns.
        rows: a name and its values, one per column; None where there is none.
        what: meaning of the values, for the legend.
    """
    known = [v for _, values in rows for v in values if v is not None and math.isfinite(v)]
    low, high = max(min(known, default=0.0), max(known, default=1.0) * _FAINTEST), max(known, default=1.0)
    wide, down = LEFT + _NAME + _CELL * len(heads) + 24, TOP + 2 * _ROW + _ROW * len(rows) + 8
    size = f'viewBox="0 0 {wide} {down}" width="{wide}" height="{down}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">']
    parts += [_text(0, 22, title, size=15), _text(0, TOP, f"{what}: white {low:.2g} or less, darkest {high:.2g}")]
    parts += [_text(_NAME + _CELL * (i + 0.5), TOP + _ROW, head, "middle") for i, head in enumerate(heads)]
    for number, (name, values) in enumerate(rows):
        y = TOP + _ROW * (number + 1) + 6
        parts.append(
            _text(_NAME - 8, y + 14, name if len(name) <= 44 else "\N{HORIZONTAL ELLIPSIS}" + name[-43:], "end")
        )
        for column, value in enumerate(values):
            if value is not None:
                parts.append(
                    _cell(_NAME + _CELL * column, y, value, _depth(value, low, high), f"{name}, {heads[column]}")
                )
    return "\n".join([*parts, "</svg>"])


_NAME, _CELL, _ROW, _FAINTEST = 330, 74, 20, 1e-6


def _depth(value: float, low: float, high: float) -> float:
    """Return the position of a value between the least (0) and the largest (1), by its logarithm."""
    if not math.isfinite(value) or value >= high:
        return 1.0
    return 0.0 if value <= low or high <= low else math.log(value / low) / math.log(high / low)


def _cell(x: float, y: float, value: float, depth: float, tooltip: str) -> str:
    red, green, blue = (round(255 - depth * (255 - full)) for full in (160, 20, 40))
    ink = "#fff" if depth > 0.6 else "#222"
    box = f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_ROW - 1}" fill="rgb({red},{green},{blue})">'
    place = f'x="{x + _CELL / 2:.1f}" y="{y + 14}" text-anchor="middle" font-size="11"'
    text = f'<text {place} fill="{ink}">{value:.2g}</text>'
    return f"{box}<title>{escape(tooltip)}: {value:.3g}</title></rect>{text}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], best: Collection[int] = ()) -> str:
    """Return an HTML table; the rows ``best`` are highlighted."""
    lines = ['<div class="scroll"><table>', _row("th", heads)]
    lines += [_row("td", row, "best" if number in best else "") for number, row in enumerate(rows)]
    return "\n".join([*lines, "</table></div>"])


def page(title: str, parts: Sequence[str], *, heading: bool = True, style: str = "") -> str:
    """Return a whole HTML page; the parts are HTML already.

    Args:
        title: of the page.
        parts: of its body, HTML.
        heading: whether the title stands above the parts.
        style: more rules of CSS.
    """
    name = escape(title)
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join([f"<h1>{name}</h1>", *parts] if heading else parts)
    return f"{head}\n<style>{_STYLE}{style}</style></head>\n<body>\n{body}\n</body></html>\n"


def paragraph(text: str) -> str:
    """Text as HTML."""
    return f"<p>{escape(text)}</p>"


class _Scale:
    """Map values to places; the axes end a little beyond the values."""

    def __init__(self, across: Sequence[float], up: Sequence[float]) -> None:
        self.x0, self.x1 = _padded(across)
        self.y0, self.y1 = _padded(up)

    def x(self, value: float) -> float:
        return LEFT + WIDTH * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return TOP + HEIGHT * (1 - (value - self.y0) / (self.y1 - self.y0))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers between two values."""
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if raw <= unit * m * (1 + 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(scale: _Scale, across: str, up: str) -> list[str]:
    parts = [f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>']
    for tick in ticks(scale.y0, scale.y1):
        y = scale.y(tick)
        parts += [f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#e5e5e5"/>', _text(LEFT - 6, y + 4, f"{tick:g}", "end")]
    for tick in ticks(scale.x0, scale.x1):
        parts.append(_text(scale.x(tick), TOP + HEIGHT + 17, f"{tick:g}", "middle"))
    parts.append(_text(LEFT + WIDTH / 2, TOP + HEIGHT + 38, across, "middle"))
    parts.append(_text(LEFT, TOP - 6, up))
    return parts


def _drawn(series: Series, scale: _Scale, colour: str) -> list[str]:
    places = [(scale.x(x), scale.y(y), t) for x, y, t in series.points if math.isfinite(x) and math.isfinite(y)]
    parts = []
    if series.line and len(places) > 1:
        at = " L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        dashes = ' stroke-dasharray="6 4"' if series.dashed else ""
        parts.append(f'<path d="M{at}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
    for x, y, tooltip in [] if series.dashed else places:
        title = f"<title>{escape(series.name)}: {escape(tooltip)}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{title}</circle>')
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _row(cell: str, values: Sequence[str], kind: str = "") -> str:
    cells = "".join(f"<{cell}>{escape(value)}</{cell}>" for value in values)
    return f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>"


_HEADS = ("target", "MACs", "parameters", "file size", "latency", "points", "cosine", "allocation by")


def render(facts: SweepFacts) -> list[RenderableType]:
    """Render the models of a sweep as a table; non-dominated ones are highlighted."""
    table = tables.table_of(*((head, "left" if head in ("target", "allocation by") else "right") for head in _HEADS))
    table.add_column("")
    for point in facts.points:
        if point.error:
            continue
        table.add_row(*_cells(facts, point), "Pareto-optimal" if point.best else "", style="bold" if point.best else "")
    note = f"points: {facts.what}; latency: median, {_threads(facts)}" if _timed(facts) else f"points: {facts.what}"
    parts: list[RenderableType] = [table, Text(""), Text(note, style="dim")]
    parts += [Text(f"{p.target}: {p.error}", style="yellow") for p in facts.points if p.error]
    return parts


def sweep_page(facts: SweepFacts) -> str:
    """Return a self-contained HTML page: points against MACs, size and latency, and the table."""
    good = [p for p in facts.points if not p.error]
    original = good[0]
    costs: list[tuple[str, Callable[[SweepPoint], float]]] = [
        ("share of the MACs", lambda p: p.macs / original.macs if original.macs else 1.0),
        ("share of the file size", lambda p: p.size / original.size if original.size else 1.0),
    ]
    if _timed(facts):
        costs.append((f"share of the latency ({_threads(facts)})", lambda p: p.ms / original.ms))
    name = facts.model.rpartition("/")[2]
    charts = [
        chart(f"{facts.what} against the {what}", what, facts.what, _series(facts, good, of)) for what, of in costs
    ]
    rows = [_cells(facts, p) for p in good]
    settings = ", ".join(f"{k} {v}" for k, v in facts.settings.items())
    failures = [paragraph(f"{p.target}: {p.error}") for p in facts.points if p.error]
    best = [number for number, p in enumerate(good) if p.best]
    bold = " Bold: Pareto-optimal, no other model is as good at fewer or equal MACs." if best else ""
    parts = [paragraph(f"{settings}.{bold}"), *charts]
    return page(f"Accuracy against cost of {name}", [*parts, table(_HEADS, rows, best), *failures])


def _series(facts: SweepFacts, points: Sequence[SweepPoint], cost: Callable[[SweepPoint], float]) -> list[Series]:
    def place(p: SweepPoint) -> tuple[float, float, str]:
        return cost(p), p.points, f"{p.target or 'original'}: {facts.what} {p.points:.4g}"

    best = [place(p) for p in sorted(points, key=cost) if p.best]
    # The original is what models are compared with, and none of those that compete.
    original = [place(p) for p in points if not p.target and not p.best]
    others = [place(p) for p in points if p.target and not p.best]
    named = [("frontier", best, True), ("original", original, False), ("dominated", others, False)]
    return [Series(name, points_of_name, line=line) for name, points_of_name, line in named if points_of_name]


def _cells(facts: SweepFacts, point: SweepPoint) -> list[str]:
    original = facts.points[0]
    share = f" ({point.macs / original.macs:.2f})" if original.macs and point is not original else ""
    ms = f"{point.ms:.3g} ms" if point.ms else numbers.DASH
    return [
        point.target or "original",
        numbers.count(point.macs) + share,
        numbers.count(point.params),
        numbers.size(point.size),
        ms,
        f"{point.points:.4g}",
        f"{point.cosine:.4f}" if isfinite(point.cosine) else numbers.DASH,
        point.answer or numbers.DASH,
    ]


def _timed(facts: SweepFacts) -> bool:
    return all(p.ms > 0 for p in facts.points if not p.error)


def _threads(facts: SweepFacts) -> str:
    return "1 thread" if facts.threads == 1 else f"{facts.threads} threads"


MAX_CURVES = 30
"""Groups that are listed where not every one is asked for."""
LINES = 12
"""Groups up to which a plot draws a line for each: there are so many colours. More are shown as a heat map."""


def sensitivity_table(facts: Mapping[str, Any], *, name_width: int, show_all: bool) -> list[RenderableType]:
    """Render the groups, the most sensitive first; ``facts`` is the sensitivity as plain data."""
    curves = _sorted(facts)
    shown = curves if show_all else curves[:MAX_CURVES]
    shares = _shares(facts)
    columns = [(f"ratio {share:g}", "right") for share in shares]
    table = tables.table_of(("group", "left"), ("units", "right"), *columns)
    names = numbers.distinct([curve["name"] for curve in curves])[: len(shown)]
    for name, curve in zip(names, shown, strict=True):
        cells = [_heat_cell(curve, share) for share in shares]
        table.add_row(numbers.shorten(name, name_width), str(curve["units"]), *cells)
    parts: list[RenderableType] = [_title(facts), Text(""), table]
    if len(shown) < len(curves):
        parts.append(Text(f"and {len(curves) - len(shown)} less sensitive ones (-v lists them)", style="dim"))
    return parts


def sensitivity_page(facts: Mapping[str, Any], model: str) -> str:
    """Return a self-contained HTML page: the loss of the model over the pruned share of each group."""
    curves, shares = _sorted(facts), _shares(facts)
    names, cut = numbers.distinct([c["name"] for c in curves]), [f"ratio {share:g}" for share in shares]
    rows = [[n, str(c["units"]), *(_heat_cell(c, s) for s in shares)] for n, c in zip(names, curves, strict=True)]
    parts = [paragraph(str(_title(facts))), *(_lines if len(curves) <= LINES else _map)(facts, names)]
    return page(f"Sensitivity of {model}", [*parts, table(["group", "units", *cut], rows)])


def _lines(facts: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Points and noise over the share that is cut, a line for every group."""
    pairs = list(zip(names, _sorted(facts), strict=True))
    series = [Series(n, [(0.0, facts["original"], "whole"), *_points(facts, c)]) for n, c in pairs]
    noise = [Series(n, [(0.0, 0.0, "whole"), *_noise(c)]) for n, c in pairs]
    across = "ratio: share of the group's units removed"
    return [
        chart(facts["what"], across, facts["what"], series),
        chart("Noise of the outputs", across, "share of the outputs' power", noise),
    ]


def _map(facts: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Draw the loss of the model and the noise of its outputs as heat maps, a row for every group."""
    curves, shares = _sorted(facts), _shares(facts)
    heads = [f"ratio {share:g}" for share in shares]
    lost, noise = [], []
    for name, curve in zip(names, curves, strict=True):
        nearest = [_nearest(curve, share) for share in shares]
        lost.append((name, [None if i is None else max(0.0, facts["original"] - curve["points"][i]) for i in nearest]))
        noise.append((name, [None if i is None else curve["noise"][i] for i in nearest]))
    return [
        heat_map("Noise of the outputs", heads, noise, "share of the outputs' power"),
        heat_map(f"Loss of {facts['what']}", heads, lost, "points lost"),
    ]


def _title(facts: Mapping[str, Any]) -> Text:
    settings = facts["settings"]
    how = f"each group pruned alone by {settings['criterion']}, its readers recovered ({settings['recover']})"
    return Text(
        f"{facts['what']} (original {facts['original']:.4g}) and noise of the outputs; {how}, {settings['data']}"
    )


def _sorted(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(facts["curves"], key=lambda curve: -sum(curve["noise"]))


def _shares(facts: Mapping[str, Any]) -> Sequence[float]:
    return sorted(facts["settings"]["shares"])


def _heat_cell(curve: Mapping[str, Any], share: float) -> str:
    """Points and noise at a share."""
    near = _nearest(curve, share)
    return numbers.DASH if near is None else f"{curve['points'][near]:.4g} ({curve['noise'][near]:.2g})"


def _nearest(curve: Mapping[str, Any], share: float) -> int | None:
    """Return the point nearest to the share asked for, which rarely is a whole number of units; None without points."""
    if not curve["shares"]:
        return None
    near = min(range(len(curve["shares"])), key=lambda i: abs(curve["shares"][i] - share))
    return None if abs(curve["shares"][near] - share) > 0.5 / curve["units"] + 0.13 else near


def _points(facts: Mapping[str, Any], curve: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    pairs = zip(curve["shares"], curve["points"], strict=True)
    return [(share, value, f"ratio {share:.2f}, {facts['what']} {value:.4g}") for share, value in pairs]


def _noise(curve: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    pairs = zip(curve["shares"], curve["noise"], strict=True)
    return [(share, value, f"ratio {share:.2f}, noise {value:.3g}") for share, value in pairs]
