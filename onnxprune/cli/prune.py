"""``onnxprune MODEL.onnx``: cut, verify, write, report."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli import gate, plan_file
from onnxprune.cli.options import Given, beside, check_criterion, command, existing
from onnxprune.errors import Note, argument
from onnxprune.report import explain, repairs, structure, tables, whole
from onnxprune.report.console import Screen, plain
from onnxprune.report.facts import Report


@command("prune", model="MODEL.onnx")
def prune(screen: Screen, given: Given) -> None:
    """Cut channels out of an ONNX model, exactly, and verify the result in onnxruntime."""
    target = given.output or beside(given.model, "pruned")
    _check(given, target)
    result = _cut(given, screen)
    report: Report = result.report
    _advise(given, report)
    hint = f"Take a smaller {argument('ratio')}, another {argument('criterion')}, or {argument('exclude')} the "
    hint += "sensitive layers."
    gate.check(report, given.min_fidelity, lambda: screen.show(*_parts(given, report, screen), Text("")), hint)
    result.save(target, plan=given.plan_file)
    screen.wrote.extend([path for path in (target, given.plan_file) if path is not None])
    report.output = str(target)
    if screen.as_json:
        screen.emit({**report.to_dict(), "plan": str(given.plan_file) if given.plan_file else None})
    for warning in report.warnings:
        screen.warn(warning)
    wrote = [("wrote     ", target)] + ([("plan      ", given.plan_file)] if given.plan_file else [])
    written = [Text.assemble((label, "bold"), str(path)) for label, path in wrote]
    screen.show(*_parts(given, report, screen), *written)


def _check(given: Given, target: Path) -> None:
    """Everything that can be found wrong before the work starts; raises UsageError."""
    from onnxprune.model.save import check_output

    existing(given.model, "model")
    given.check_together()
    given.check_recovery()
    check_criterion(given)
    check_output(target, given.model, given.sources)
    if given.plan_file is not None:
        plan_file.check(given.plan_file, target, given.model, given.sources)


def _cut(given: Given, screen: Screen) -> Any:
    """Run the API on what was given."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    arguments = dict(given.arguments)
    if given.has_budget or given.plan is not None:
        arguments["ratio"] = None
    if not given.has_budget:
        arguments["min_fidelity"] = None  # a gate on what is shown first
    if given.sensitivity == "measure":
        arguments["jobs"] = given.jobs or -1
    # Quiet without JSON shows no latency, so the time to measure it is saved.
    latency = given.validate and (screen.verbosity >= 0 or screen.as_json)
    with screen.progress() as progress:
        return op.prune(given.model, **arguments, latency=latency, progress=progress)


def _advise(given: Given, report: Report) -> None:
    """Warn where a cut was asked for and nothing was cut: a run that changes nothing must not look like a success."""
    some = given.ratio > 0 or any(share > 0 for _, share in given.layers)
    asked = given.plan is None and not given.has_budget and some
    if asked and report.totals.params_before == report.totals.params_after:
        report.warnings.append(
            Note(f"no channel was removed, the model keeps its size; {argument('explain')} says why")
        )


def _asked(given: Given, names: Sequence[str]) -> float | None:
    """The least that was asked of a group with these names: the last of ``layers`` that matches, else the ratio.

    0 where a plan, a budget or a threshold over several groups decides; None when the group is excluded.
    """
    if given.plan is not None or given.has_budget:
        return 0.0
    if _match(names, given.exclude) or (given.include and not _match(names, given.include)):
        return None
    matching = [share for pattern, share in given.layers if _match(names, [pattern])]
    if not matching and given.scope != "local":
        return 0.0
    share: float = matching[-1] if matching else given.ratio
    return min(share, given.max_ratio or 1.0)


def _match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _parts(given: Given, report: Report, screen: Screen) -> list[RenderableType]:
    width, verbose = screen.name_width, screen.verbosity > 0
    parts: list[RenderableType] = []
    if given.explain:
        groups = [plain(group) for group in report.groups]
        short = explain.shortfalls(report.layers, groups, lambda names: _asked(given, names), given.round_to)
        parts += [tables.heading("Groups"), *structure.groups(groups, name_width=width)]
        parts += [
            tables.heading("Layers that were not cut, or less than asked"),
            *explain.render(short, name_width=width),
        ]
        if report.barriers:
            parts += [tables.heading("Barriers")]
            parts += structure.barriers(plain(report.barriers), name_width=width, every=verbose)
        if report.repairs:
            parts += [tables.heading("Layers that were not repaired")]
            parts += repairs.left(report.repairs, name_width=width)
        parts += [tables.heading("Cut")]
    return parts + whole.cut(report, name_width=width, verbose=verbose)
