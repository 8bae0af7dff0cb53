"""Files that commands write beside models, and the gates that a result has to pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnxprune.errors import BudgetError, UsageError, ValidationError, argument
from onnxprune.report.facts import Report


def check(report: Report, least: float | None, show: Callable[[], None], hint: str) -> None:
    """Stop before anything is written when the cut is wrong (ValidationError) or not faithful enough (BudgetError).

    Args:
        report: report of the run.
        least: value of ``--min-fidelity``, a centred cosine up to 1, or points up to 100; None: no limit.
        show: function that prints the report of a result below the limit.
        hint: advice for a result below the limit.
    """
    if report.exactness.passed is False:
        facts = report.exactness
        raise ValidationError(
            f"the pruned model differs from the masked original by {facts.error:.1e} at output "
            f"{facts.worst_output!r}, allowed {facts.tolerance:.0e}",
            hint="This is a bug in onnxprune and nothing was written: please report it with the model.",
            report=report,
        )
    if least is None:
        return
    if report.fidelity is None or not report.fidelity.outputs:
        note = report.fidelity.note if report.fidelity is not None else ""
        raise BudgetError(
            f"{argument('min_fidelity')} {least:g}: fidelity could not be measured{': ' + note if note else ''}",
            hint=f"Nothing was written. Give inputs with {argument('data')}, or drop {argument('min_fidelity')}.",
            report=report,
        )
    short = report.fidelity.shortfall(least)
    if short:
        show()
        raise BudgetError(
            f"{short} is below {argument('min_fidelity')} {least:g}",
            hint=f"Nothing was written. {hint}",
            report=report,
        )


def damage(report: Report) -> list[str]:
    """Return the warning about a damaged model; empty for any other."""
    verdict = report.verdict
    if verdict is None or verdict.word != "damaged":
        return []
    return [f"the model is damaged, {verdict.points:.1f} of 100 points: {verdict.reason}"]


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
