"""``onnxprune recover ORIGINAL CUT --plan FILE --data D``: repair a model that was cut before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli import gate
from onnxprune.cli.options import Given, beside, command, existing
from onnxprune.errors import UsageError, argument
from onnxprune.report import repairs, tables, whole
from onnxprune.report.console import Screen
from onnxprune.report.facts import Report


@command("recover", original="ORIGINAL.onnx", cut="CUT.onnx")
def recover(screen: Screen, given: Given) -> None:
    """Repair a model that was cut before, from its original, the plan of the cut and inputs without labels."""
    target = given.output or beside(given.cut, "recovered")
    _check(given, target)
    result = _repair(given, screen)
    report: Report = result.report
    hint = f"Give more {argument('data')}, or cut less."
    gate.check(report, given.min_fidelity, lambda: screen.show(*_parts(given, report, screen), Text("")), hint)
    result.save(target)
    screen.wrote.append(target)
    report.output = str(target)
    if screen.as_json:
        screen.emit({**report.to_dict(), "cut": str(given.cut), "plan": str(given.plan)})
    for warning in report.warnings:
        screen.warn(warning)
    wrote = Text.assemble(("wrote     ", "bold"), str(target))
    screen.show(*_parts(given, report, screen), wrote)


def _check(given: Given, target: Path) -> None:
    """Everything that can be found wrong before the work starts; raises UsageError."""
    from onnxprune.model.save import check_output

    existing(given.original, "original")
    existing(given.cut, "cut model")
    if given.plan is None:
        raise UsageError(
            f"a repair needs the plan of the cut, and there is no {argument('plan')}",
            hint=f"Give the file that {argument('plan_file')} wrote when the cut was made.",
        )
    existing(given.plan, "plan")
    if given.data is None and given.recover != "datafree":
        given.check_together()
        raise UsageError(
            f"a repair needs calibration data, and there is no {argument('data')}",
            hint=f"Give inputs with {argument('data')}, a few hundred without labels are enough; or repair without, "
            f"which is weaker, by {argument('recover', 'datafree')}.",
        )
    given.check_together()
    check_output(target, given.original, [given.cut, *given.sources])


def _repair(given: Given, screen: Screen) -> Any:
    """Run the API on what was given."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    with screen.progress() as progress:
        return op.repair(given.original, given.cut, **given.arguments, progress=progress)


def _parts(given: Given, report: Report, screen: Screen) -> list[RenderableType]:
    width, parts = screen.name_width, list[RenderableType]()
    if given.explain:
        parts += [tables.heading("Layers that were not repaired"), *repairs.left(report.repairs, name_width=width)]
        parts += [Text("")]
    return parts + whole.repaired(report, name_width=width, verbose=screen.verbosity > 0)
