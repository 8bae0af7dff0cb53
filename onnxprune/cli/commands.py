"""The commands: prune, factorize, sparsify, recover, inspect, compare, profile, sensitivity, sweep, criteria."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli import output
from onnxprune.cli.options import Given, beside, check_criterion, command, existing
from onnxprune.errors import BudgetError, Note, OnnxpruneError, UsageError, argument
from onnxprune.io import files
from onnxprune.report import numbers, page, reasons, sparsity, summary, tables
from onnxprune.report.console import Screen, plain
from onnxprune.report.facts import FAITHFUL, Report, SmallerRatio
from onnxprune.settings import settings_of

_EXAMPLES: dict[str, tuple[str, ...]] = {
    "prune": (
        "onnxprune model.onnx --ratio 0.3",
        "onnxprune model.onnx --ratio 0.5 --data images/ -o small.onnx",
        "onnxprune model.onnx --target macs=0.5 --data calibration.npz",
    ),
    "factorize": (
        "onnxprune factorize model.onnx --ratio 0.5",
        "onnxprune factorize model.onnx --method svd --energy 0.95 --data inputs.npz",
    ),
    "sparsify": (
        "onnxprune sparsify model.onnx --pattern 2:4 --data inputs.npz",
        "onnxprune sparsify model.onnx --ratio 0.7 --data images/ -o sparse.onnx",
    ),
    "recover": ("onnxprune recover model.onnx small.onnx --plan small.json --data inputs.npz",),
    "inspect": (
        "onnxprune inspect model.onnx",
        "onnxprune inspect model.onnx --input-shape x=1,3,224,224 -v",
    ),
    "compare": (
        "onnxprune compare model.onnx small.onnx --data calibration.npz",
        "onnxprune compare model.onnx int8.onnx --data inputs.npz --min-fidelity 95",
    ),
    "profile": (
        "onnxprune profile model.onnx -o device.json",
        "onnxprune model.onnx --target latency=0.6 --latency-table device.json",
    ),
    "sensitivity": (
        "onnxprune sensitivity model.onnx --data calibration.npz -o curves.json",
        "onnxprune model.onnx --target macs=0.5 --sensitivity curves.json",
    ),
    "criteria": ("onnxprune criteria", "onnxprune criteria --json"),
    "devices": ("onnxprune devices -v", "onnxprune devices --json"),
    "sweep": (
        "onnxprune sweep model.onnx --data calibration.npz --html sweep.html",
        "onnxprune sweep model.onnx --targets 0.75,0.5,0.25 --models pruned/",
    ),
}
"""Calls that the help of a command shows."""


@command("prune", "Prune the channels of a model (the default command).", _EXAMPLES["prune"], model="MODEL.onnx")
def prune(screen: Screen, given: Given) -> None:
    """Prune channels of an ONNX model exactly, and verify the result in onnxruntime."""
    target = given.output or beside(given.model, "pruned")
    _check(given, target, check_criterion)
    start = monotonic()
    with _showing_failure(given, screen, lambda report: _parts(given, report, screen)):
        result = _cut(given, screen)
    report: Report = result.report
    _advise(given, report)
    if screen.verbosity >= 0 or screen.as_json:
        _try_smaller(given, screen, report, monotonic() - start)
    hint = f"Use a smaller {argument('ratio')}, another {argument('criterion')}, or {argument('exclude')} the "
    hint += "sensitive layers."
    plan = str(given.plan_file) if given.plan_file else None
    _finish(screen, given, result, target, lambda: _parts(given, report, screen), hint, {"plan": plan}, given.plan_file)


@contextmanager
def _showing_failure(
    given: Given, screen: Screen, parts: Callable[[Report], Sequence[RenderableType]]
) -> Iterator[None]:
    """Show the report of a result that does not meet its gates, and write its pages, before the error goes on."""
    try:
        yield
    except BudgetError as error:
        if error.report is not None:
            screen.show(*parts(error.report), Text(""))
            output.write_pages(screen, given, error.report)
        raise


def _finish(
    screen: Screen,
    given: Given,
    result: Any,
    target: Path,
    parts: Callable[[], Sequence[RenderableType]],
    hint: str,
    names: Mapping[str, str | None],
    plan_file: Path | None = None,
) -> None:
    """Ask the gate, write the model and its plan, and show the report.

    Args:
        screen: target of the report.
        given: the options.
        result: of the run.
        target: the model file to write.
        parts: makes the report as renderables.
        hint: the next step where the gate is not met.
        names: files that JSON names beside the report.
        plan_file: path of the plan; None: it is not written.

    Raises:
        BudgetError: the gate is not met; nothing is written.
    """
    report: Report = result.report
    if given.values.get("dry_run"):
        _show_dry_run(screen, given, report, target, parts, names, plan_file)
        return
    gates = {"min_fidelity": given.min_fidelity, "max_drop": None if given.has_budget else given.max_drop}

    def show_failure() -> None:
        screen.show(*parts(), Text(""))
        output.write_pages(screen, given, report)

    output.check(report, show_failure, hint, **gates)
    result.save(target, plan=plan_file)
    screen.wrote.extend([path for path in (target, plan_file) if path is not None])
    report.output = str(target)
    pages = output.write_pages(screen, given, report)
    if screen.as_json:
        screen.emit({**report.to_dict(), **names})
    for warning in (*report.warnings, *output.damage(report)):
        screen.warn(warning)
    wrote = [("wrote     ", target)] + ([("plan      ", plan_file)] if plan_file else [])
    wrote += [("report    ", path) for path in pages]
    if not output.prints_markdown(given):
        screen.show(*parts(), *(Text.assemble((label, "bold"), str(path)) for label, path in wrote))


def _show_dry_run(
    screen: Screen,
    given: Given,
    report: Report,
    target: Path,
    parts: Callable[[], Sequence[RenderableType]],
    names: Mapping[str, str | None],
    plan_file: Path | None,
) -> None:
    """Show the report of a run that writes nothing, and what it left out; the arguments are those of ``_finish``."""
    skipped = ["timing"]
    if not given.has_budget:
        skipped += ["the proof of exactness"] if given.command == "prune" else []
        skipped += ["the comparison of outputs"]
        skipped += ["recovery"] if given.recover not in (None, "none") or given.data is not None else []
        gates = [name for name in ("min_fidelity", "metric", "max_drop") if given.values.get(name) is not None]
        skipped += [screen.spelled(Note(argument(name))) for name in gates]
    files = [str(path) for path in (target, plan_file) if path is not None]
    if screen.as_json:
        absent: dict[str, str | None] = dict.fromkeys(names)
        screen.emit({**report.to_dict(), **absent, "dry_run": {"skipped": skipped, "would_write": files}})
    for warning in report.warnings:
        screen.warn(warning)
    lines = [Text.assemble(("dry run   ", "bold"), "nothing was written; without --dry-run this run writes ", files[0])]
    lines += [Text.assemble(("skipped   ", "bold"), ", ".join(skipped))]
    screen.show(*parts(), *lines)


_GATES = ("min_fidelity", "max_drop")
"""Gates of runs without a budget; the command asks them itself, after it has the report to show."""


def _check(given: Given, target: Path, further: Callable[[Given], None] = lambda given: None) -> None:
    """Check everything that can be found wrong before the work starts.

    Args:
        given: the options.
        target: the model file to write.
        further: checks what this command alone has, before the files.

    Raises:
        UsageError: something is wrong.
    """
    from onnxprune.io.write import check_output

    existing(given.model, "model")
    given.check_together()
    given.check_recovery()
    further(given)
    check_output(target, given.model, given.sources)
    plan_file = given.values.get("plan_file")
    output.check_pages(given, target, plan_file, given.model)
    if plan_file is not None:
        output.check_plan(plan_file, target, given.model, given.sources)


def _cut(given: Given, screen: Screen) -> Any:
    """Run the API on what was given."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    arguments = dict(given.arguments)
    only_depth = given.depth is not None and "ratio" not in given.said
    if given.has_budget or given.plan is not None or only_depth or given.remove_dead:
        arguments["ratio"] = None
    if not given.has_budget:
        arguments |= dict.fromkeys(_GATES)  # they apply to what is shown first
    fixed = given.has_budget or given.remove_dead
    if not arguments["validate"] and arguments["criterion"] is None and not fixed:
        arguments["criterion"] = "l2"  # the default for data runs the model
    if given.dry_run and not given.has_budget:
        arguments |= {"validate": False, "recover": "none", "metric": None}
    if given.sensitivity == "measure":
        arguments["jobs"] = given.jobs or -1
    # Quiet without JSON shows no latency, so the time to measure it is saved.
    latency = arguments["validate"] and not given.dry_run and _timing(screen, given)
    with screen.progress() as progress:
        return op.prune(given.model, **arguments, latency=latency, progress=progress)


def _timing(screen: Screen, given: Given) -> bool | str:
    """Return whether to measure latency, and ``layers`` where a page shows the time of each layer."""
    if given.values.get("report") is not None:
        return "layers"
    return screen.verbosity >= 0 or screen.as_json


TRIAL_SECONDS, TRIAL_SHARE = 60.0, 1.2
"""Time to spend at most on finding out which smaller ratio would do, in seconds and in runs."""


def _try_smaller(given: Given, screen: Screen, report: Report, took: float) -> None:
    """Try smaller ratios where the model lost too much, as far as time allows; note the best one and what it keeps.

    The trials are whole runs from the same data, so that what they keep is measured and not guessed.

    Args:
        given: the options.
        screen: where progress goes.
        report: of the run; the answer is put into it.
        took: seconds of the run.
    """
    verdict = report.verdict
    decided = given.has_budget or given.plan is not None or given.layers or given.dry_run or given.data is None
    decided = decided or given.depth is not None or given.remove_dead or given.effort == "quick"
    if decided or verdict is None or verdict.word == "faithful" or report.interrupted:
        return
    each, begin = took - report.seconds.get("latency", 0.0), monotonic()
    end, part = begin + min(TRIAL_SECONDS, max(1.0, TRIAL_SHARE * took)), 2 if verdict.word == "degraded" else 4
    for _ in range(2):
        share = math.floor(100 * given.ratio / part) / 100
        if share <= 0 or monotonic() + each > end:
            return
        with screen.progress() as progress, suppress(OnnxpruneError):
            progress("a smaller ratio", 0.0)
            points = _points_at(given, share)
            progress("a smaller ratio", 1.0)
            best = verdict.points if report.smaller is None else report.smaller.points
            if points >= FAITHFUL or points > best:
                report.smaller = SmallerRatio(share, points)
            if points >= FAITHFUL and part < 4:
                return
            part = 2 if points >= FAITHFUL and part == 4 else 2 * part


def _points_at(given: Given, ratio: float) -> float:
    """Return the points of fidelity that another ratio keeps; 0 where none are measured."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    arguments = {**given.arguments, **dict.fromkeys((*_GATES, "metric"))}
    verdict = op.prune(given.model, **{**arguments, "ratio": ratio}, latency=False).report.verdict
    return 0.0 if verdict is None else verdict.points


def _advise(given: Given, report: Report) -> None:
    """Warn where a cut was asked for and nothing was cut: a run that changes nothing must not look like a success."""
    some = not given.remove_dead and (given.ratio > 0 or any(share > 0 for _, share in given.layers))
    asked = given.plan is None and not given.has_budget and some
    if asked and report.totals.params_before == report.totals.params_after:
        report.warnings.append(
            Note(f"no channel was removed, so the model keeps its size; {argument('explain')} shows the reasons")
        )


def _asked(given: Given, names: Sequence[str]) -> float | None:
    """Return the smallest ratio set for a group with these names: the last match in ``layers``, else the ratio.

    0 where a plan, a budget or a threshold over several groups decides; None when the group is excluded.
    """
    if given.plan is not None or given.has_budget or given.remove_dead:
        return 0.0
    if _match(names, given.exclude) or (given.include and not _match(names, given.include)):
        return None
    matching = [share for pattern, share in given.layers if _match(names, [pattern])]
    competing = given.data is not None and given.criterion is None if given.scope == "auto" else given.scope != "local"
    if not matching and competing:
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
        short = reasons.shortfalls(report.layers, groups, lambda names: _asked(given, names), given.round_to)
        parts += [tables.heading("Groups"), *tables.groups(groups, name_width=width)]
        parts += [
            tables.heading("Layers pruned less than asked"),
            *reasons.render(short, name_width=width),
        ]
        if report.barriers:
            parts += [tables.heading("Barriers")]
            parts += tables.barriers(plain(report.barriers), name_width=width, show_all=verbose)
        if report.repairs:
            parts += [tables.heading("Layers that were not recovered")]
            parts += tables.unrecovered_layers(report.repairs, name_width=width)
        parts += [tables.heading("Result")]
    return parts + _result_parts(report, screen)


def _result_parts(report: Report, screen: Screen) -> list[RenderableType]:
    """Render the summary, and with ``-v`` the tables before it."""
    width = screen.name_width
    details = tables.details(report, name_width=width) if screen.verbosity > 0 else []
    if report.sparsified and screen.verbosity > 0:
        details = [*sparsity.layers(report.sparsified, name_width=width), Text(""), *details]
    return [*details, *summary.summary(report, name_width=width, spelled=screen.spelled)]


@command(
    "factorize", "Factorize layers into smaller ones: SVD, Tucker, CP.", _EXAMPLES["factorize"], model="MODEL.onnx"
)
def factorize(screen: Screen, given: Given) -> None:
    """Factorize layers into smaller ones: SVD, Tucker, CP, spatial SVD."""
    target = given.output or beside(given.model, "factorized")
    _check(given, target)
    result = _factorized(given, screen)
    report: Report = result.report
    hint = f"Use a smaller {argument('ratio')}, give {argument('data')}, or {argument('exclude')} the sensitive layers."
    plan, parts = str(given.plan_file) if given.plan_file else None, _factorization_parts
    _finish(screen, given, result, target, lambda: parts(given, report, screen), hint, {"plan": plan}, given.plan_file)


def _factorized(given: Given, screen: Screen) -> Any:
    """Run the API on what was given."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    decided = {name for name, setting in settings_of("factorize").items() if "plan" in setting.conflicts}
    arguments = {k: v for k, v in given.arguments.items() if given.plan is None or k not in decided}
    arguments |= dict.fromkeys(_GATES)
    if given.dry_run:
        arguments |= {"validate": False, "recover": "none", "metric": None}
    # Quiet without JSON shows no latency, so the time to measure it is saved.
    latency = arguments["validate"] and _timing(screen, given)
    with screen.progress() as progress:
        return op.factorize(given.model, **arguments, latency=latency, progress=progress)


def _factorization_parts(given: Given, report: Report, screen: Screen) -> list[RenderableType]:
    width = screen.name_width
    parts = tables.unfactorized_layers(report.factorized, name_width=width) if given.explain else []
    return parts + _result_parts(report, screen)


@command("sparsify", "Set single weights to 0: anywhere, 2:4, blocks.", _EXAMPLES["sparsify"], model="MODEL.onnx")
def sparsify(screen: Screen, given: Given) -> None:
    """Set single weights to 0 in a pattern that a device has kernels for, and update the weights that stay."""
    target = given.output or beside(given.model, "sparse")
    _check(given, target)
    result = _sparse(given, screen)
    report: Report = result.report
    hint = f"Use a smaller {argument('ratio')}, give {argument('data')}, or {argument('exclude')} the sensitive layers."

    def parts() -> list[RenderableType]:
        width = screen.name_width
        explained = sparsity.left_out(report.sparsified, name_width=width) if given.explain else []
        return [*explained, *_result_parts(report, screen)]

    _finish(screen, given, result, target, parts, hint, {})


def _sparse(given: Given, screen: Screen) -> Any:
    """Run the API on what was given."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good
    from onnxprune.sparsification.scores import GRADIENTS as GRADIENT_SCORES

    arguments = {**given.arguments, **dict.fromkeys(_GATES)}
    if given.dry_run:
        arguments |= {"validate": False, "recover": "none", "finetune": None, "metric": None}
        arguments |= {"labels": None} if given.criterion not in GRADIENT_SCORES else {}
    # Quiet without JSON shows no latency, so the time to measure it is saved.
    latency = arguments["validate"] and (screen.verbosity >= 0 or screen.as_json)
    with screen.progress() as progress:
        return op.sparsify(given.model, **arguments, latency=latency, progress=progress)


@command(
    "recover",
    "Recover the accuracy of a model that was pruned before.",
    _EXAMPLES["recover"],
    original="ORIGINAL.onnx",
    cut="CUT.onnx",
)
def recover(screen: Screen, given: Given) -> None:
    """Recover the accuracy of a pruned model from its original, its plan and inputs without labels."""
    target = given.output or beside(given.cut, "recovered")
    _check_recovery(given, target)
    result = _repair(given, screen)
    report: Report = result.report
    hint = f"Give more {argument('data')}, or prune less."
    names = {"cut": str(given.cut), "plan": str(given.plan)}
    _finish(screen, given, result, target, lambda: _recovery_parts(given, report, screen), hint, names)


def _check_recovery(given: Given, target: Path) -> None:
    """Everything that can be found wrong before the work starts; raises UsageError."""
    from onnxprune.io.write import check_output

    existing(given.original, "original")
    existing(given.cut, "cut model")
    if given.plan is None:
        raise UsageError(
            f"recovery needs the plan of the pruned model, but {argument('plan')} is missing",
            hint=f"Give the file that {argument('plan_file')} wrote when the model was pruned.",
        )
    existing(given.plan, "plan")
    if given.data is None and given.recover != "datafree":
        given.check_together()
        raise UsageError(
            f"recovery needs calibration data, but {argument('data')} is missing",
            hint=f"Give inputs with {argument('data')} (a few hundred, without labels), or recover from synthetic "
            f"data, which is weaker: {argument('recover', 'datafree')}.",
        )
    given.check_together()
    check_output(target, given.original, [given.cut, *given.sources])
    output.check_pages(given, target, given.plan, given.original, given.cut)


def _repair(given: Given, screen: Screen) -> Any:
    """Run the API on what was given."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    arguments = {**given.arguments, **dict.fromkeys(_GATES)}
    with screen.progress() as progress:
        return op.recover(given.original, given.cut, **arguments, progress=progress)


def _recovery_parts(given: Given, report: Report, screen: Screen) -> list[RenderableType]:
    width, parts = screen.name_width, list[RenderableType]()
    if given.explain:
        parts += [
            tables.heading("Layers that were not recovered"),
            *tables.unrecovered_layers(report.repairs, name_width=width),
        ]
        parts += [Text("")]
    return parts + _result_parts(report, screen)


MOST_GROUPS = 20


@command("inspect", "Show what can be pruned, and what cannot and why.", _EXAMPLES["inspect"], model="MODEL.onnx")
def inspect(screen: Screen, given: Given) -> None:
    """List the groups that can be pruned, and the reasons for the others."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good
    from onnxprune.passes.sparsity import measure_sparsity

    model = existing(given.model, "model")
    arguments = given.arguments
    with screen.progress() as progress:
        progress("analyze", 0.0)
        analysis = op.analyze(model, **arguments)
        zeros = measure_sparsity(analysis)
        progress("analyze", 1.0)
    facts = {name: plain(getattr(analysis, name)) for name in ("groups", "barriers", "layers", "unlocks")}
    if screen.as_json:
        sums = {"bytes": model.stat().st_size, "parameters": analysis.parameters}
        screen.emit({"model": str(model), **sums, **facts, "sparsity": plain(zeros)})
    width, every = screen.name_width, screen.verbosity > 0
    shown = sparsity.inspected(zeros, name_width=width, list_all=every)
    screen.show(_title(model, analysis), *_inspection_parts(screen, facts, analysis.layers), *shown)


def _title(model: Path, analysis: Any) -> Text:
    """One line: the file, and the sums over it."""
    layers, macs = len(analysis.layers), sum(layer.macs_before for layer in analysis.layers)
    counted = "1 layer" if layers == 1 else f"{layers} layers"
    sums = f"{counted}, {numbers.count(analysis.parameters)} parameters, {numbers.count(macs)} MACs"
    return Text.assemble((str(model), "bold"), f"  {numbers.size(model.stat().st_size)}, {sums}")


def _inspection_parts(screen: Screen, facts: Mapping[str, Any], layers: Any) -> list[RenderableType]:
    width, every = screen.name_width, screen.verbosity > 0
    free = [group for group in facts["groups"] if group.get("prunable", True)]
    parts: list[RenderableType] = [tables.heading(f"Prunable groups ({len(free)})")]
    parts += tables.groups(facts["groups"], name_width=width, max_rows=None if every else MOST_GROUPS)
    parts += [tables.heading("Layers"), *tables.inspected(layers, name_width=width, show_all=every)]
    parts += [tables.heading(f"Barriers ({tables.fixed_channels(facts['barriers'])} channels cannot be removed)")]
    parts += tables.barriers(facts["barriers"], name_width=width, show_all=every)
    if facts["unlocks"]:
        parts += [tables.heading("Operators that block most channels"), tables.unlocks(facts["unlocks"])]
    return parts


@command(
    "compare",
    "Compare two models: fidelity, size, MACs, latency.",
    _EXAMPLES["compare"],
    original="ORIGINAL.onnx",
    model="MODEL.onnx",
)
def compare(screen: Screen, given: Given) -> None:
    """Compare two models with the same inputs and outputs, however the second was made; exit with 5 below a gate."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    existing(given.original, "original")
    existing(given.model, "model")
    given.check_together()
    output.check_pages(given, given.original, given.model)
    with _showing_failure(given, screen, lambda report: _compared(report, screen)), screen.progress() as progress:
        report = op.compare(given.original, given.model, **given.arguments, progress=progress)
    if screen.as_json:
        screen.emit(report.to_dict())
    for warning in (*report.warnings, *output.damage(report)):
        screen.warn(warning)
    pages = output.write_pages(screen, given, report)
    if not output.prints_markdown(given):
        screen.show(*_compared(report, screen), *(Text.assemble(("report    ", "bold"), str(p)) for p in pages))


def _compared(report: Report, screen: Screen) -> list[RenderableType]:
    """Render the summary, and below it what each of several outputs lost."""
    width, facts = screen.name_width, report.fidelity
    outputs = tables.fidelity(facts, name_width=width)[1:] if facts is not None else []
    return [*summary.summary(report, name_width=width, spelled=screen.spelled), *outputs]


@command("profile", "Measure the time of each layer by its channel count.", _EXAMPLES["profile"], model="MODEL.onnx")
def profile(screen: Screen, given: Given) -> None:
    """Measure the latency of every layer on this machine, by number of channels."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    output = given.output
    existing(given.model, "model")
    given.check_together()
    if output is not None and output.resolve() == given.model.resolve():
        raise UsageError(f"{argument('output')} is the model itself", hint="Give another path for the table.")
    with screen.progress() as progress:
        found = op.profile(given.model, **given.arguments, progress=progress)
    if output is not None:
        found.save(output)
        screen.wrote.append(output)
    if screen.as_json:
        screen.emit({**plain(found.facts), "table": str(output) if output else None})
    wrote = [Text.assemble(("wrote     ", "bold"), str(output))] if output else []
    screen.show(*tables.profile_table(found.facts, name_width=screen.name_width, show_all=screen.verbosity > 0), *wrote)


@command(
    "sensitivity", "Prune each group alone and measure what is lost.", _EXAMPLES["sensitivity"], model="MODEL.onnx"
)
def sensitivity(screen: Screen, given: Given) -> None:
    """Prune each group alone at several ratios, recover its readers, and measure the whole model."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    existing(given.model, "model")
    given.check_together()
    given.check_recovery()
    output.check_page(given.model, given.output, given.html)
    arguments = {**given.arguments, "jobs": given.jobs or -1}
    with screen.progress() as progress:
        found = op.sensitivity(given.model, **arguments, progress=progress)
    facts = plain(asdict(found))
    if given.output is not None:
        found.save(given.output)
    if given.html is not None:
        files.write_text(given.html, page.sensitivity_page(facts, given.model.name))
    paths = [path for path in (given.output, given.html) if path is not None]
    screen.wrote.extend(paths)
    written = [Text.assemble(("wrote     ", "bold"), str(path)) for path in paths]
    if screen.as_json:
        screen.emit({**facts, "model": str(given.model)})
    screen.show(*page.sensitivity_table(facts, name_width=screen.name_width, show_all=screen.verbosity > 0), *written)


@command("sweep", "Prune to several budgets and compare quality and cost.", _EXAMPLES["sweep"], model="MODEL.onnx")
def sweep(screen: Screen, given: Given) -> None:
    """Compress the model to several budgets and plot accuracy against cost."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    existing(given.model, "model")
    given.check_together()
    given.check_recovery()
    output.check_page(given.model, given.html)
    with screen.progress() as progress:
        found = op.sweep(given.model, **given.arguments, progress=progress)
    if given.html is not None:
        files.write_text(given.html, page.sweep_page(found))
    paths = [path for path in (given.folder, given.html) if path is not None]
    screen.wrote.extend(paths)
    if screen.as_json:
        screen.emit(plain(asdict(found)))
    screen.show(*page.render(found), *(Text.assemble(("wrote     ", "bold"), str(path)) for path in paths))


@command("criteria", "List the criteria that channels can be scored by.", _EXAMPLES["criteria"])
def criteria(screen: Screen, given: Given) -> None:
    """List the criteria that channels can be scored by, what each measures, and its source."""
    from onnxprune.importance.criteria import describe, names  # heavy: waits until it is needed

    described = [describe(name) for name in names()]
    if screen.as_json:
        screen.emit({"criteria": [asdict(one) for one in described]})
    screen.show(tables.criteria(described))


@command("devices", "List the devices whose kernels --round-to auto can follow.", _EXAMPLES["devices"])
def devices(screen: Screen, given: Given) -> None:
    """List the devices whose kernels --round-to auto can follow, and the multiples of channels that each likes."""
    from onnxprune.devices import get, names, this_machine  # heavy: waits until it is needed

    kernels, here = [get(name) for name in names()], this_machine().name
    if screen.as_json:
        screen.emit({"devices": [asdict(one) for one in kernels], "this_machine": here})
    screen.show(tables.devices(kernels, here, sources=screen.verbosity > 0))
