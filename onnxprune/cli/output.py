"""Files that commands write beside models, and the gates that a result has to pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnxprune.errors import BudgetError, UsageError, ValidationError, argument
from onnxprune.report.facts import Report


def check(
    report: Report, show: Callable[[], None], hint: str, *, min_fidelity: float | None, max_drop: float | None
) -> None:
    """Stop before anything is written when the cut is wrong (ValidationError) or not faithful enough (BudgetError).

    Args:
        report: report of the run.
        show: function that prints the report of a result that does not pass a gate.
        hint: advice for such a result.
        min_fidelity: gate on fidelity, see :meth:`Report.shortfall`; None: no limit.
        max_drop: gate on the metric or the points; None: no limit.
    """
    if report.exactness.passed is False:
        facts = report.exactness
        raise ValidationError(
            f"the pruned model differs from the masked original by {facts.error:.1e} at output "
            f"{facts.worst_output!r}, allowed {facts.tolerance:.0e}",
            hint="This is a bug in onnxprune and nothing was written: please report it with the model.",
            report=report,
        )
    short = report.shortfall(min_fidelity, max_drop)
    if not short:
        return
    asked = argument("max_drop" if min_fidelity is None else "min_fidelity")
    show()
    if report.metric is None and (report.fidelity is None or not report.fidelity.outputs):
        hint = f"Give inputs with {argument('data')}, or drop {asked}."
    raise BudgetError(short, hint=f"Nothing was written. {hint}", report=report)


def damage(report: Report) -> list[str]:
    """Return the warning about a damaged model; empty for any other."""
    verdict = report.verdict
    if verdict is None or verdict.word != "damaged":
        return []
    return [f"the model is damaged, {verdict.points:.1f} of 100 points of fidelity: {verdict.reason}"]


def check_page(model: Path, *targets: Path | None) -> None:
    """Check whether these files can be written without harm; raises UsageError."""
    from onnxprune.io.write import check_output

    given = [target for target in targets if target is not None]
    if len({target.resolve() for target in given}) < len(given):
        raise UsageError("two outputs are the same file", hint="Give different paths.")
    for target in given:
        check_output(target, model)


def check_plan(plan: Path, target: Path, model: Path, sources: Sequence[Path]) -> None:
    """Check whether a plan can be written to ``plan`` beside the model at ``target``; raises UsageError."""
    from onnxprune.io.write import check_output

    if plan.resolve() == target.resolve():
        raise UsageError(
            f"{argument('plan_file')} and {argument('output')} are the same file {str(plan)!r}",
            hint="Give two different paths.",
        )
    try:
        check_output(plan, model, sources)
    except UsageError as error:
        what = error.message.removeprefix("the output ")
        raise UsageError(f"{argument('plan_file')}: {what}", hint="Choose another path for the plan.") from None
