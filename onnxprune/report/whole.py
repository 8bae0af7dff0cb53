"""The whole report of a run, in the order in which it is read."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import budgets, factors, repairs, tables
from onnxprune.report.facts import Report


def cut(report: Report, *, name_width: int, verbose: bool) -> list[RenderableType]:
    """The whole report after a cut: layers, totals, exactness, fidelity."""
    fold = not verbose and len(report.layers) > tables.LONG
    parts: list[RenderableType] = []
    if report.layers:
        parts += [*tables.layers(report.layers, name_width=name_width, fold=fold), Text("")]
    if report.factorized:
        parts += [*factors.layers(report.factorized, name_width=name_width, verbose=verbose), Text("")]
    if verbose and report.repairs:
        parts += [*repairs.layers(report.repairs, name_width=name_width), Text("")]
    parts += [tables.totals(report.totals, report.latency)]
    note = tables.latency_note(report.latency)
    if note is not None:
        parts.append(note)
    slower = tables.speed_note(report)
    if slower is not None:
        parts.append(slower)
    if report.budget is not None:
        parts += [Text(""), *budgets.render(report.budget)]
    chosen = settings(report)
    parts += [Text(""), *([chosen] if chosen is not None else []), tables.exactness(report.exactness)]
    parts += tables.flushed(report.flushed)
    if report.product is not None:
        parts.append(factors.product(report))
    repaired = repairs.summary(report)
    if repaired is not None:
        parts.append(repaired)
    return [*parts, *tables.fidelity(report.fidelity, name_width=name_width)]


def settings(report: Report) -> Text | None:
    """One line: how the units were chosen."""
    said = report.settings
    if not said:
        return None
    how = [str(said["criterion"])]
    if "scope" not in said:
        return Text.assemble(("chosen    ", "bold"), f"by a plan (criterion {how[0]})")
    how += [f"{name.replace('_', ' ')} {said[name]}" for name in ("scope", "policy", "normalize")]
    usual = {"group_policy": "count", "reshape_axis": "head_dim", "cost": "none"}
    how += [f"{name.replace('_', ' ')} {said[name]}" for name, value in usual.items() if said[name] != value]
    if said["steps"] > 1:
        how.append(f"{said['steps']} steps, {said['schedule']}")
    return Text.assemble(("chosen    ", "bold"), "by ", ", ".join(how))


def repaired(report: Report, *, name_width: int, verbose: bool) -> list[RenderableType]:
    """The report after a repair of a model that was cut before: sums, what the repair did, fidelity."""
    parts: list[RenderableType] = []
    if verbose and report.repairs:
        parts += [*repairs.layers(report.repairs, name_width=name_width), Text("")]
    parts += [tables.totals(report.totals, None), Text(""), *tables.flushed(report.flushed)]
    if report.exactness.note:
        parts.append(Text.assemble(("the cut   ", "bold"), report.exactness.note))
    done = repairs.summary(report)
    return [*parts, *([done] if done is not None else []), *tables.fidelity(report.fidelity, name_width=name_width)]
