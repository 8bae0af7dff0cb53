"""What a repair did: one line for the model, a table of layers, and why layers were left as they were."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import units
from onnxprune.report.facts import Fidelity, Recovery, Repair, Report
from onnxprune.report.tables import table_of

_BY = {
    "bias": "by their means",
    "bn": "by scale and shift",
    "lstsq": "by least squares",
    "full": "by least squares",
    "datafree": "by least squares",
}
_HOW = {"bias": "means", "affine": "scale and shift", "lstsq": "least squares", "kept": "kept"}
# Held-out error, as a share of the variance, that is rounding: the cut did not reach the layer.
_UNTOUCHED = 1e-9
_NO_BETTER = "Nothing that was tried lowered the error on held-out samples."


def summary(report: Report) -> Text | None:
    """One line: was the cut repaired, from what, and what that did to the outputs."""
    facts = report.recovery
    if not facts.why:
        return None
    if facts.mode == "none" or facts.before is None:
        why = facts.why if facts.mode == "none" else "nothing was cut"
        advice = "; with --data the cut can be repaired, with --recover datafree less well without"
        advice = advice if facts.why == "no data was given" else ""
        return Text.assemble(("repaired  ", "bold"), "no: ", why, advice)
    done, reached = _counts(report.repairs)
    chosen = "" if facts.why == "asked for" else f", --recover {facts.mode} since {facts.why}"
    samples = f"{facts.samples} sample{'' if facts.samples == 1 else 's'}"
    if facts.inputs:
        samples = f"{facts.samples} {facts.inputs}, the weaker form (from --data it is better)"
    how = f"{done} of {reached} layers {_BY.get(facts.mode, 'by ' + facts.mode)} from {samples}{chosen}"
    if facts.undone:
        return Text.assemble(("repaired  ", "bold"), ("undone", "yellow"), f": {how}, {_change(facts)}")
    return Text.assemble(("repaired  ", "bold"), f"{how}: {_change(facts)}")


def _counts(repairs: Sequence[Repair]) -> tuple[int, int]:
    """Layers with new weights, and layers that the cut reached."""
    return sum(r.done for r in repairs), sum(not _untouched(r) for r in repairs)


def _untouched(repair: Repair) -> bool:
    return repair.how == "kept" and repair.before <= _UNTOUCHED


def _change(facts: Recovery) -> str:
    """Fidelity before and after, on the same inputs."""
    before, after = facts.before, facts.after
    if before is None or after is None or not before.outputs:
        return "fidelity not measured"
    said = f"fidelity {before.worst_cosine:.4f} {units.ARROW} {after.worst_cosine:.4f}"
    one, other = _top1(before), _top1(after)
    if one is not None and other is not None:
        said += f", top-1 agreement {100 * one:.1f} {units.ARROW} {100 * other:.1f} %"
    return said


def _top1(facts: Fidelity) -> float | None:
    return facts.outputs[0].top1 if len(facts.outputs) == 1 else None


def layers(repairs: Sequence[Repair], *, name_width: int) -> list[RenderableType]:
    """The table of layers that were tried: what was fitted, held-out error before and after."""
    if all(r.how.startswith("left") or _untouched(r) for r in repairs):
        return []
    table = table_of(("layer", "left"), ("repaired by", "left"), ("held-out error", "right"))
    for name, item in zip(units.distinct([r.layer for r in repairs]), repairs, strict=True):
        if item.how.startswith("left") or _untouched(item):
            continue
        error = units.change(_share(item.before), _share(item.after))
        style = "" if item.done else "dim"
        table.add_row(units.shorten(name, name_width), _how(item.how), error, style=style)
    note = "held-out error: what is left of the original's signal at the layer, as a share of its variance"
    return [table, Text(note, style="dim")]


def _how(how: str) -> str:
    first, *rest = how.split(" ", 1)
    word = _HOW.get(first.rstrip(","), first)
    return f"{word}, ridge {rest[0]}" if first == "lstsq" and rest else " ".join([word, *rest])


def _share(error: float) -> str:
    return f"{100 * error:.2f} %"


def left(repairs: Sequence[Repair], *, name_width: int) -> list[RenderableType]:
    """Layers that a repair left as they were, those with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for item in repairs:
        if item.how.startswith("left"):
            why = item.how.partition(":")[2].strip()
            by_reason.setdefault(f"{why[:1].upper()}{why[1:]}.", []).append(item.layer)
        elif item.how == "kept" and not _untouched(item):
            by_reason.setdefault(_NO_BETTER, []).append(item.layer)
    parts: list[RenderableType] = []
    for why, names in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
        parts.append(Text(why, style="bold"))
        parts += [Text(f"  {units.shorten(name, name_width)}") for name in names]
    return parts or [Text("every layer that the cut reached was repaired", style="green")]
