"""Line charts as SVG that needs nothing else, and pages that hold them: one file, no scripts, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 560, 320, 64, 44, 52, 18
COLOURS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #7f7f7f #bcbd22 #003f5c #a05195".split()
_MOST_NAMED = 24
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: 0.2em 0.9em; text-align: right; }
th { border-bottom: 1px solid #888; } td:first-child, th:first-child { text-align: left; } svg { max-width: 100%; }
tr.best td { font-weight: bold; }"""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, points (x, y, what is said where the pointer rests); ``line``: joined, else dots alone."""

    name: str
    points: Sequence[tuple[float, float, str]]
    line: bool = True


def chart(title: str, across: str, up: str, series: Sequence[Series]) -> str:
    """An SVG of some series over one pair of axes; points that are not finite are left out."""
    found = [p for s in series for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])]
    scale = _Scale([p[0] for p in found] or [0.0, 1.0], [p[1] for p in found] or [0.0, 1.0])
    named = series[:_MOST_NAMED] if len(series) > 1 else []
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
    """An SVG with one row of coloured cells per name; colours follow the logarithm of the values, white is the least.

    Args:
        title: what stands above.
        heads: names of the columns.
        rows: a name and its values, one per column; None where there is none.
        what: what the values are, for the legend.
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
    """Where a value stands between the least (0) and the largest (1), by its logarithm."""
    if not math.isfinite(value) or value >= high:
        return 1.0
    return 0.0 if value <= low or high <= low else math.log(value / low) / math.log(high / low)


def _cell(x: float, y: float, value: float, depth: float, said: str) -> str:
    red, green, blue = (round(255 - depth * (255 - full)) for full in (160, 20, 40))
    ink = "#fff" if depth > 0.6 else "#222"
    box = f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_ROW - 1}" fill="rgb({red},{green},{blue})">'
    place = f'x="{x + _CELL / 2:.1f}" y="{y + 14}" text-anchor="middle" font-size="11"'
    text = f'<text {place} fill="{ink}">{value:.2g}</text>'
    return f"{box}<title>{escape(said)}: {value:.3g}</title></rect>{text}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], best: Collection[int] = ()) -> str:
    """An HTML table; the rows ``best`` are set off."""
    lines = ["<table>", _row("th", heads)]
    lines += [_row("td", row, "best" if number in best else "") for number, row in enumerate(rows)]
    return "\n".join([*lines, "</table>"])


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML page; the parts are HTML already."""
    name = escape(title)
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
    body = "\n".join(parts)
    return f"{head}\n<style>{_STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n{body}\n</body></html>\n"


def paragraph(text: str) -> str:
    """Text as HTML."""
    return f"<p>{escape(text)}</p>"


class _Scale:
    """From values to places; the axes end a little beyond the values."""

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
        parts.append(f'<path d="M{at}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    for x, y, said in places:
        title = f"<title>{escape(series.name)}: {escape(said)}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{title}</circle>')
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _row(cell: str, values: Sequence[str], kind: str = "") -> str:
    cells = "".join(f"<{cell}>{escape(value)}</{cell}>" for value in values)
    return f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>"
