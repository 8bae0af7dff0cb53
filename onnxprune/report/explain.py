"""Why a layer was left alone or lost less than was asked for, in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import units, words
from onnxprune.report.facts import LayerFacts


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One layer that lost fewer channels than asked: ``lost`` of ``channels`` went, ``asked`` were to go.

    ``why`` is a sentence that many layers may share, ``detail`` what it means for this one.
    """

    layer: str
    channels: int
    lost: int
    asked: int
    why: str
    detail: str = ""
    advice: str = ""


def shortfalls(
    facts: Sequence[LayerFacts],
    groups: Sequence[Mapping[str, Any]],
    asked: Callable[[Sequence[str]], float | None],
    round_to: int = 1,
) -> list[Shortfall]:
    """Layers that lost less than asked, with the reason.

    Args:
        facts: the layers after the cut. groups: the groups with ``removed`` units each.
        asked: from the node and tensor names of a group to the ratio asked for it; None where it is excluded.
        round_to: the multiple that was to be kept.
    """
    found = []
    for layer in facts:
        lost = layer.channels_before - layer.channels_after
        group = _home(layer, groups)
        names = [layer.name, *group.get("layers", ()), *(slot["tensor"] for slot in group.get("slots", ()))]
        share = asked(names)
        # Halves may be rounded either way, so the smaller of the two counts is what was asked at least.
        want = math.ceil((share or 0.0) * layer.channels_before - 0.5)
        reason = layer.reason or ("excluded" if share is None else "")
        # A reason on a layer that lost nothing is told even where no ratio was asked for (a plan applied by index).
        if lost >= want and (lost or not reason):
            continue
        why = words.reason(reason) if reason else _constraint(layer, group, round_to)
        detail = words.split(reason)[1]
        found.append(Shortfall(layer.name, layer.channels_before, lost, want, why, detail, words.advice(reason)))
    return found


def _home(layer: LayerFacts, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The group of a layer's outputs, empty when there is none. Groups list readers too: size and loss must fit."""
    for group in groups:
        removed = group.get("removed", 0)
        lost = removed if isinstance(removed, int) else len(removed)
        fits = group.get("size") == layer.channels_before and lost == layer.channels_before - layer.channels_after
        if fits and layer.name in group.get("layers", ()):
            return group
    return {}


def _constraint(layer: LayerFacts, group: Mapping[str, Any], round_to: int) -> str:
    """Why a group that may be cut was cut less: its steps, ``--round-to``, the last unit."""
    size = int(group.get("size", layer.channels_before))
    steps = int(group.get("steps", size))
    if layer.channels_after == 1 or steps == 1:
        return "The last unit of a group always stays."
    if round_to > 1:
        return f"--round-to {round_to} keeps a multiple of {round_to}, and the nearest such count is this one."
    if 0 < steps < layer.channels_before:
        return f"Its group goes in {steps} equal steps only, and the nearest step is this one."
    return "It shares its channels with other layers, or its group was given a smaller ratio."


def render(found: Sequence[Shortfall], *, name_width: int) -> list[RenderableType]:
    """The shortfalls, those with the same reason together, most channels first."""
    if not found:
        return [Text("every layer lost what was asked", style="green")]
    by_reason: dict[tuple[str, str], list[Shortfall]] = {}
    for item in found:
        by_reason.setdefault((item.why, item.advice), []).append(item)
    parts: list[RenderableType] = []
    for (why, step), items in sorted(by_reason.items(), key=lambda pair: -sum(item.channels for item in pair[1])):
        parts.append(Text.assemble((why, "bold"), f" {step}" if step else ""))
        for item in items:
            name = units.shorten(item.layer, name_width)
            asked = f", {item.asked} asked" if item.asked else ""
            detail = f" ({item.detail})" if item.detail else ""
            parts.append(Text(f"  {name}: {item.lost} of {item.channels} channels removed{asked}{detail}"))
    return parts
