"""Plots of a metric against the share of MACs kept, as SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench.criteria_points import Combination
from bench.criteria_tables import PLAIN, curves, first

WIDTH, HEIGHT, GAP, LEFT, TOP, LEGEND = 300, 230, 26, 52, 62, 18
COLOURS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #7f7f7f #bcbd22 #003f5c #a05195".split()
DASHES = ("", "6 3", "2 2", "8 3 2 3")
Record = dict[str, Any]


def draw(points: Sequence[Record], path: Path) -> None:
    """One panel per scope: a colour per criterion, dashes where normalisation or cost differ; grey: plain l2."""
    lines = {c: _line(found) for c, found in curves(points).items()}
    lines = {c: line for c, line in lines.items() if line}
    if not lines:
        return
    base = next((p["baseline"] for p in points if "baseline" in p), {"": float("nan")})
    metric, value = first(base)
    scopes = sorted({c.scope for c in lines}, key=["local", "global", "isomorphic", "slamp"].index)
    criteria = sorted({c.criterion for c in lines})
    kinds = sorted({(c.normalize, c.cost) for c in lines})
    low = min(x for line in lines.values() for x, _ in line)
    high = max([y for line in lines.values() for _, y in line] + ([value] if math.isfinite(value) else []))
    scale = _Scale(min(low, 0.9), high * 1.05 or 1.0)
    across = LEFT + len(scopes) * (WIDTH + GAP) + 150
    down = TOP + max(HEIGHT + 46, LEGEND * (len(criteria) + len(kinds) + 2))
    parts = [_text(LEFT, 24, f"{points[0]['model']}: {metric} against MACs kept, nothing repaired", size=15)]
    for number, scope in enumerate(scopes):
        x = LEFT + number * (WIDTH + GAP)
        parts += _frame(x, scope, scale, labels=number == 0)
        plain = lines.get(Combination(*PLAIN))
        if plain:
            parts.append(_path(x, scale, [*plain, (1.0, value)], "#bbbbbb", "", 4))
        for c, line in lines.items():
            if c.scope == scope:
                colour = COLOURS[criteria.index(c.criterion) % len(COLOURS)]
                dash = DASHES[kinds.index((c.normalize, c.cost)) % len(DASHES)]
                parts.append(_path(x, scale, [*line, (1.0, value)], colour, dash, 1.8, str(c)))
    x, y = LEFT + len(scopes) * (WIDTH + GAP), TOP + 8
    for name, colour in zip(criteria, COLOURS * 9, strict=False):
        parts += [_stroke(x, y, colour, ""), _text(x + 32, y + 4, name)]
        y += LEGEND
    for (normalize, cost), dash in zip(kinds, DASHES * 9, strict=False):
        said = ", ".join(filter(None, [normalize, f"cost {cost}" if cost != "none" else ""]))
        parts += [_stroke(x, y, "#000000", dash), _text(x + 32, y + 4, said)]
        y += LEGEND
    parts += [_stroke(x, y, "#bbbbbb", "", 4), _text(x + 32, y + 4, "l2 local")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{across}" height="{down}" font-family="sans-serif">'
    path.write_text("\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>\n"]))


class _Scale:
    """From (share of MACs, metric) to a place in a panel; fewer MACs to the right."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def x(self, share: float) -> float:
        return WIDTH * (1.0 - share) / (1.0 - self.low)

    def y(self, value: float) -> float:
        return TOP + HEIGHT * (1.0 - value / self.high)

    @property
    def ticks(self) -> list[float]:
        raw = self.high / 5
        unit = 10 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 5, 10) if raw <= unit * m)
        return [i * step for i in range(int(self.high / step) + 1)]


def _line(found: dict[float, Record]) -> list[tuple[float, float]]:
    return sorted((p["macs_kept"], first(p["metrics"])[1]) for p in found.values() if "metrics" in p)


def _frame(left: float, title: str, scale: _Scale, labels: bool) -> list[str]:
    parts = [_text(left + WIDTH / 2, TOP - 12, title, anchor="middle", size=13)]
    for tick in scale.ticks:
        y = scale.y(tick)
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#e5e5e5"/>')
        if labels:
            parts.append(_text(left - 6, y + 4, f"{tick:g}", anchor="end"))
    tenths = [i / 10 for i in range(math.ceil(scale.low * 10 - 1e-9), 11)]
    parts += [_text(left + scale.x(x), TOP + HEIGHT + 16, f"{x:g}", anchor="middle") for x in tenths]
    parts.append(_text(left + WIDTH / 2, TOP + HEIGHT + 34, "share of MACs kept", anchor="middle"))
    parts.append(f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888888"/>')
    return parts


def _path(
    left: float,
    scale: _Scale,
    line: Sequence[tuple[float, float]],
    colour: str,
    dash: str,
    width: float,
    title: str = "l2 local",
) -> str:
    at = " L".join(f"{left + scale.x(x):.1f} {scale.y(y):.1f}" for x, y in line if math.isfinite(y))
    style = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"'
    return f'<path d="M{at}" {style}><title>{escape(title)}</title></path>'


def _stroke(x: float, y: float, colour: str, dash: str, width: float = 1.8) -> str:
    return f'<path d="M{x} {y}h26" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
