"""Files that commands write beside models, and the gates that a result has to pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnxprune.cli.options import CommandOptions
from onnxprune.errors import BudgetError, Note, UsageError, ValidationError, argument
from onnxprune.io import files
from onnxprune.report import run_page
from onnxprune.report.console import Screen, versions
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
    gate = argument("max_drop" if min_fidelity is None else "min_fidelity")
    show()
    if report.metric is None and (report.fidelity is None or not report.fidelity.outputs):
        hint = f"Give inputs with {argument('data')}, or drop {gate}."
    raise BudgetError(short, hint=f"Nothing was written. {hint}", report=report)


def damage(report: Report) -> list[str]:
    """Return the warning about a damaged model, with the next step; empty for any other."""
    verdict = report.verdict
    if verdict is None or verdict.word != "damaged":
        return []
    step = f"; {verdict.next_step.marked if isinstance(verdict.next_step, Note) else verdict.next_step}"
    lost = f"the model is damaged, {verdict.points:.1f} of 100 points of fidelity: {verdict.reason}"
    return [Note(f"{lost}{step}" if verdict.next_step else lost)]


def check_page(model: Path, *targets: Path | None) -> None:
    """Check whether these files can be written without harm; raises UsageError."""
    from onnxprune.io.write import check_output

    paths = [target for target in targets if target is not None]
    if len({target.resolve() for target in paths}) < len(paths):
        raise UsageError("two outputs are the same file", hint="Give different paths.")
    for target in paths:
        check_output(target, model)


def check_pages(options: CommandOptions, *others: Path | None) -> None:
    """Check whether the report and the Markdown can be written beside other files.

    Args:
        options: options of the command.
        others: files that the command reads or writes.

    Raises:
        UsageError: a page is one of the others, cannot be written, or would share stdout with JSON.
    """
    from onnxprune.io.write import check_output

    if prints_markdown(options) and options.values.get("json"):
        raise UsageError(
            f"{argument('markdown', '-')} and {argument('json')} both write to stdout",
            hint=f"Give a file with {argument('markdown')}.",
        )
    known = {path.resolve() for path in others if path is not None}
    for name in ("report", "markdown"):
        path: Path | None = options.values.get(name)
        if path is None or str(path) == "-":
            continue
        if path.resolve() in known:
            raise UsageError(
                f"{argument(name)}: {str(path)!r} is a file that the command reads or writes", hint="Give another path."
            )
        known.add(path.resolve())
        check_output(path, path.with_name(path.name + ".onnx"))


def prints_markdown(options: CommandOptions) -> bool:
    """Return whether Markdown takes the place of the summary on stdout."""
    return str(options.values.get("markdown")) == "-"


def write_pages(screen: Screen, options: CommandOptions, report: Report) -> list[Path]:
    """Write the report and the Markdown that were asked for, also of a model that misses a gate.

    Args:
        screen: target of Markdown for ``-``.
        options: options of the command.
        report: of the run.

    Returns:
        the files that were written.
    """
    pages: list[Path] = []
    path: Path | None = options.values.get("report")
    if path is not None:
        about = {"command line": ["onnxprune", *screen.about.get("command_line", ())], "versions": versions()}
        files.write_text(path, run_page.run_page(report, about, screen.spelled), "the report")
        pages.append(path)
    path = options.values.get("markdown")
    if path is not None:
        text = run_page.markdown(report, screen.spelled)
        if str(path) == "-":
            screen.out.file.write(text)
        else:
            files.write_text(path, text, "the Markdown")
            pages.append(path)
    screen.wrote.extend(pages)
    return pages


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
