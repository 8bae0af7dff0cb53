"""Tables and the plot of the recovery benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rich.table import Table

from bench.curves import COLOURS
from bench.labelled import UNLABELLED

Record = dict[str, Any]
WIDTH, HEIGHT, LEFT, TOP = 460, 300, 56, 44


def figure(metrics: Mapping[str, float]) -> float:
    """The first metric; where there are no labels the cosine to the original."""
    name = next(iter(metrics))
    return float(metrics["cos"] if name.startswith(UNLABELLED) and "cos" in metrics else metrics[name])


def ways(points: Sequence[Record], modes: Sequence[str], baselines: Mapping[str, float], title: str) -> Table:
    """One row per model, share and number of samples; a column per mode."""
    table = Table(title=title)
    for name in ("model", "before", "MACs", "samples", *modes, "seconds"):
        table.add_column(name, justify="left" if name == "model" else "right")
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for point in points:
        rows.setdefault((point["model"], point["share"], point["samples"]), {})[point["mode"]] = point
    for (model, share, samples), found in sorted(rows.items(), key=lambda r: (r[0][0], -r[0][1], r[0][2])):
        cells = [f"{figure(p['metrics']):.4f}" if (p := found.get(m)) and "metrics" in p else "-" for m in modes]
        kept = next((f"{p['macs']:.3f}" for p in found.values() if "macs" in p), f"{share:g} not reached")
        seconds = next((f"{p['recover_s']:.0f}" for m, p in found.items() if m == "full" and "recover_s" in p), "")
        table.add_row(model, f"{baselines[model]:.4f}", kept, str(samples), *cells, seconds)
    return table


def losses(
    points: Sequence[Record], plain: Sequence[Record], baselines: Mapping[str, float], mode: str, allowed: float = 0.25
) -> Table:
    """What a repaired cut loses, as a share of what the best cut by a plain criterion loses that is not repaired."""
    table = Table(title=f"loss with --recover {mode} as a share of the loss of the best plain criterion")
    for name in ("model", "before", "MACs", "best plain", "by", "repaired", "share of loss", "where it fails, why"):
        table.add_column(name, justify="right" if name in ("before", "MACs", "best plain", "repaired") else "left")
    for point in sorted((p for p in points if p["mode"] == mode), key=lambda p: (p["model"], -p["share"])):
        model, before = point["model"], baselines[point["model"]]
        rivals = [p for p in plain if p["model"] == model and p["share"] == point["share"] and "metrics" in p]
        best = max(rivals, key=lambda p: figure(p["metrics"]), default=None)
        lead = [model, f"{before:.4f}", f"{point['share']:g}"]
        if "metrics" not in point:
            table.add_row(*lead, *(["-"] * 4), point.get("error", ""))
            continue
        after = figure(point["metrics"])
        if best is None:
            table.add_row(*lead, "-", "", f"{after:.4f}", "", point.get("why", ""))
            continue
        other = figure(best["metrics"])
        share = (before - after) / (before - other) if before - other > 1e-9 else 0.0 if after >= before else math.inf
        failed = share > allowed
        by = " ".join(str(best[k]) for k in ("criterion", "scope", "normalize"))
        table.add_row(
            *lead, f"{other:.4f}", by, f"{after:.4f}", f"{share:.2f}", (point.get("why") or "-") if failed else ""
        )
    return table


def plot(points: Sequence[Record], mode: str, path: Path) -> None:
    """Metric against the number of samples, a line per model and share, as SVG."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for p in points:
        if p["mode"] == mode and "metrics" in p:
            lines.setdefault(f"{p['model']}, MACs {p['share']:g}", []).append((p["samples"], figure(p["metrics"])))
    lines = {name: sorted(line) for name, line in lines.items() if len(line) > 1}
    if not lines:
        return
    every = [at for line in lines.values() for at in line]
    first, last = (math.log2(f(n for n, _ in every)) for f in (min, max))
    low, high = (f(v for _, v in every) for f in (min, max))
    low, high = low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6

    def x(samples: int) -> float:
        return LEFT + WIDTH * (math.log2(samples) - first) / (last - first)

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - value) / (high - low)

    parts = [_text(LEFT, 22, f"--recover {mode}: metric against samples without labels", size=14)]
    for samples in sorted({n for n, _ in every}):
        parts += [_text(x(samples), TOP + HEIGHT + 16, str(samples), anchor="middle")]
        parts += [f'<path d="M{x(samples):.1f} {TOP}v{HEIGHT}" stroke="#e5e5e5"/>']
    for step in range(6):
        value = low + (high - low) * step / 5
        parts += [_text(LEFT - 6, y(value) + 4, f"{value:.3f}", anchor="end")]
    parts += [f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888888"/>']
    for number, (name, line) in enumerate(sorted(lines.items())):
        colour = COLOURS[number % len(COLOURS)]
        way = " L".join(f"{x(n):.1f} {y(v):.1f}" for n, v in line)
        parts += [f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="2"/>']
        parts += [f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="2.5" fill="{colour}"/>' for n, v in line]
        parts += [_text(LEFT + WIDTH + 14, TOP + 14 + 18 * number, name, colour=colour)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 300}" height="{TOP + HEIGHT + 40}"'
    body = ['<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>\n"]
    path.write_text("\n".join([f'{head} font-family="sans-serif">', *body]))


def _text(x: float, y: float, said: str, *, anchor: str = "start", size: int = 11, colour: str = "#000000") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {place}>{escape(said)}</text>"
