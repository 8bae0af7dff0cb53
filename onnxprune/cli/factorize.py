"""``onnxprune factorize MODEL.onnx``: take layers apart, check, repair, write, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli import gate, plan_file
from onnxprune.cli.options import Given, beside, command, existing
from onnxprune.errors import argument
from onnxprune.report import factors as tables
from onnxprune.report.console import Screen
from onnxprune.report.facts import Report
from onnxprune.settings import settings_of


@command("factorize", model="MODEL.onnx")
def factorize(screen: Screen, given: Given) -> None:
    """Take layers apart into smaller ones: SVD, Tucker, CP, spatial SVD."""
    target = given.output or beside(given.model, "factorized")
    _check(given, target)
    result = _factorized(given, screen)
    report: Report = result.report
    hint = (
        f"Take a smaller {argument('ratio')}, give {argument('data')}, or {argument('exclude')} the sensitive layers."
    )
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
    check_output(target, given.model, given.sources)
    if given.plan_file is not None:
        plan_file.check(given.plan_file, target, given.model, given.sources)


def _factorized(given: Given, screen: Screen) -> Any:
    """Run the API on what was given."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    decided = {name for name, setting in settings_of("factorize").items() if "plan" in setting.conflicts}
    arguments = {k: v for k, v in given.arguments.items() if given.plan is None or k not in decided}
    # Quiet without JSON shows no latency, so the time to measure it is saved.
    latency = given.validate and (screen.verbosity >= 0 or screen.as_json)
    with screen.progress() as progress:
        return op.factorize(given.model, **arguments, latency=latency, progress=progress)


def _parts(given: Given, report: Report, screen: Screen) -> list[RenderableType]:
    width = screen.name_width
    parts = tables.left(report.factorized, name_width=width) if given.explain else []
    return parts + tables.whole(report, name_width=width, verbose=screen.verbosity > 0)
