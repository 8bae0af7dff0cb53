"""Sensitivities as a table and as a page with a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import plot, tables, units

MOST = 30
"""Groups that are listed where not every one is asked for."""


def render(facts: Mapping[str, Any], *, name_width: int, every: bool) -> list[RenderableType]:
    """The groups, the most sensitive first; ``facts`` is the sensitivity as plain data."""
    curves = _sorted(facts)
    shown = curves if every else curves[:MOST]
    shares = _shares(facts)
    columns = [(f"cut {share:g}", "right") for share in shares]
    table = tables.table_of(("group", "left"), ("units", "right"), *columns)
    for curve in shown:
        cells = [_cell(curve, share) for share in shares]
        table.add_row(units.shorten(curve["name"], name_width), str(curve["units"]), *cells)
    parts: list[RenderableType] = [_title(facts), Text(""), table]
    if len(shown) < len(curves):
        parts.append(Text(f"and {len(curves) - len(shown)} less sensitive ones (-v lists them)", style="dim"))
    return parts


def page(facts: Mapping[str, Any], model: str) -> str:
    """A self-contained HTML page: what the model loses over the share of each group that is cut."""
    series = [plot.Series(c["name"], [(0.0, facts["original"], "whole"), *_points(facts, c)]) for c in _sorted(facts)]
    noise = [plot.Series(c["name"], [(0.0, 0.0, "whole"), *_noise(c)]) for c in _sorted(facts)]
    heads = ["group", "units", *(f"cut {s:g}" for s in _shares(facts))]
    rows = [[c["name"], str(c["units"]), *(_cell(c, s) for s in _shares(facts))] for c in _sorted(facts)]
    across = "share of the group's units that is cut"
    parts = [plot.paragraph(str(_title(facts))), plot.chart(facts["what"], across, facts["what"], series)]
    parts += [plot.chart("Noise of the outputs", across, "share of the outputs' power", noise)]
    return plot.page(f"Sensitivity of {model}", [*parts, plot.table(heads, rows)])


def _title(facts: Mapping[str, Any]) -> Text:
    settings = facts["settings"]
    how = f"each group cut alone by {settings['criterion']}, layers that read it repaired ({settings['recover']})"
    return Text(
        f"{facts['what']} (original {facts['original']:.4g}) and noise of the outputs; {how}, {settings['data']}"
    )


def _sorted(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(facts["curves"], key=lambda curve: -sum(curve["noise"]))


def _shares(facts: Mapping[str, Any]) -> Sequence[float]:
    return sorted(facts["settings"]["shares"])


def _cell(curve: Mapping[str, Any], share: float) -> str:
    """Points and noise at the share that is nearest to the one asked for, which rarely is a whole number of units."""
    if not curve["shares"]:
        return units.DASH
    near = min(range(len(curve["shares"])), key=lambda i: abs(curve["shares"][i] - share))
    if abs(curve["shares"][near] - share) > 0.5 / curve["units"] + 0.13:
        return units.DASH
    return f"{curve['points'][near]:.4g} ({curve['noise'][near]:.2g})"


def _points(facts: Mapping[str, Any], curve: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    pairs = zip(curve["shares"], curve["points"], strict=True)
    return [(share, value, f"{share:.2f} cut, {facts['what']} {value:.4g}") for share, value in pairs]


def _noise(curve: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    pairs = zip(curve["shares"], curve["noise"], strict=True)
    return [(share, value, f"{share:.2f} cut, noise {value:.3g}") for share, value in pairs]
