"""``onnxprune inspect MODEL.onnx``: groups, layers, barriers, and what would unlock most."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli.options import Given, command, existing
from onnxprune.report import structure, tables, units
from onnxprune.report.console import Screen, plain

MOST_GROUPS = 20


@command("inspect", model="MODEL.onnx")
def inspect(screen: Screen, given: Given) -> None:
    """Show what can be cut from a model, and what cannot and why."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    model = existing(given.model, "model")
    arguments = given.arguments
    with screen.progress() as progress:
        progress("analyze", 0.0)
        analysis = op.analyze(model, **arguments)
        progress("analyze", 1.0)
    facts = {name: plain(getattr(analysis, name)) for name in ("groups", "barriers", "layers", "unlocks")}
    if screen.as_json:
        sums = {"bytes": model.stat().st_size, "parameters": analysis.parameters}
        screen.emit({"model": str(model), **sums, **facts})
    screen.show(_title(model, analysis), *_parts(screen, facts, analysis.layers))


def _title(model: Path, analysis: Any) -> Text:
    """One line: the file, and the sums over it."""
    layers, macs = len(analysis.layers), sum(layer.macs_before for layer in analysis.layers)
    counted = "1 layer" if layers == 1 else f"{layers} layers"
    sums = f"{counted}, {units.count(analysis.parameters)} parameters, {units.count(macs)} MACs"
    return Text.assemble((str(model), "bold"), f"  {units.size(model.stat().st_size)}, {sums}")


def _parts(screen: Screen, facts: Mapping[str, Any], layers: Any) -> list[RenderableType]:
    width, every = screen.name_width, screen.verbosity > 0
    free = [group for group in facts["groups"] if group.get("prunable", True)]
    parts: list[RenderableType] = [tables.heading(f"Groups that can be cut ({len(free)})")]
    parts += structure.groups(facts["groups"], name_width=width, most=None if every else MOST_GROUPS)
    parts += [tables.heading("Layers"), *tables.inspected(layers, name_width=width, every=every)]
    parts += [tables.heading(f"Barriers ({structure.held(facts['barriers'])} channels have to stay)")]
    parts += structure.barriers(facts["barriers"], name_width=width, every=every)
    if facts["unlocks"]:
        parts += [tables.heading("Operators that would unlock most channels"), structure.unlocks(facts["unlocks"])]
    return parts
