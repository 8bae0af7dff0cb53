"""Sensitivities as a table and as a page with a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import plot, tables, units

MOST = 30
"""Groups that are listed where not every one is asked for."""
LINES = 12
"""Groups up to which a plot draws a line for each: there are so many colours. More are shown as a heat map."""


def render(facts: Mapping[str, Any], *, name_width: int, every: bool) -> list[RenderableType]:
    """The groups, the most sensitive first; ``facts`` is the sensitivity as plain data."""
    curves = _sorted(facts)
    shown = curves if every else curves[:MOST]
    shares = _shares(facts)
    columns = [(f"cut {share:g}", "right") for share in shares]
    table = tables.table_of(("group", "left"), ("units", "right"), *columns)
    names = units.distinct([curve["name"] for curve in curves])[: len(shown)]
    for name, curve in zip(names, shown, strict=True):
        cells = [_cell(curve, share) for share in shares]
        table.add_row(units.shorten(name, name_width), str(curve["units"]), *cells)
    parts: list[RenderableType] = [_title(facts), Text(""), table]
    if len(shown) < len(curves):
        parts.append(Text(f"and {len(curves) - len(shown)} less sensitive ones (-v lists them)", style="dim"))
    return parts


def page(facts: Mapping[str, Any], model: str) -> str:
    """A self-contained HTML page: what the model loses over the share of each group that is cut."""
    curves, shares = _sorted(facts), _shares(facts)
    names, cut = units.distinct([c["name"] for c in curves]), [f"cut {share:g}" for share in shares]
    rows = [[n, str(c["units"]), *(_cell(c, s) for s in shares)] for n, c in zip(names, curves, strict=True)]
    parts = [plot.paragraph(str(_title(facts))), *(_lines if len(curves) <= LINES else _map)(facts, names)]
    return plot.page(f"Sensitivity of {model}", [*parts, plot.table(["group", "units", *cut], rows)])


def _lines(facts: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Points and noise over the share that is cut, a line for every group."""
    pairs = list(zip(names, _sorted(facts), strict=True))
    series = [plot.Series(n, [(0.0, facts["original"], "whole"), *_points(facts, c)]) for n, c in pairs]
    noise = [plot.Series(n, [(0.0, 0.0, "whole"), *_noise(c)]) for n, c in pairs]
    across = "share of the group's units that is cut"
    return [
        plot.chart(facts["what"], across, facts["what"], series),
        plot.chart("Noise of the outputs", across, "share of the outputs' power", noise),
    ]


def _map(facts: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What the model loses and the noise of its outputs as heat maps, a row for every group."""
    curves, shares = _sorted(facts), _shares(facts)
    heads = [f"cut {share:g}" for share in shares]
    lost, noise = [], []
    for name, curve in zip(names, curves, strict=True):
        nearest = [_nearest(curve, share) for share in shares]
        lost.append((name, [None if i is None else max(0.0, facts["original"] - curve["points"][i]) for i in nearest]))
        noise.append((name, [None if i is None else curve["noise"][i] for i in nearest]))
    return [
        plot.heat_map("Noise of the outputs", heads, noise, "share of the outputs' power"),
        plot.heat_map(f"What is lost of {facts['what']}", heads, lost, "points lost"),
    ]


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
    """Points and noise at a share."""
    near = _nearest(curve, share)
    return units.DASH if near is None else f"{curve['points'][near]:.4g} ({curve['noise'][near]:.2g})"


def _nearest(curve: Mapping[str, Any], share: float) -> int | None:
    """The point that is nearest to the share asked for, which rarely is a whole number of units; None where none is."""
    if not curve["shares"]:
        return None
    near = min(range(len(curve["shares"])), key=lambda i: abs(curve["shares"][i] - share))
    return None if abs(curve["shares"][near] - share) > 0.5 / curve["units"] + 0.13 else near


def _points(facts: Mapping[str, Any], curve: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    pairs = zip(curve["shares"], curve["points"], strict=True)
    return [(share, value, f"{share:.2f} cut, {facts['what']} {value:.4g}") for share, value in pairs]


def _noise(curve: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    pairs = zip(curve["shares"], curve["noise"], strict=True)
    return [(share, value, f"{share:.2f} cut, noise {value:.3g}") for share, value in pairs]
