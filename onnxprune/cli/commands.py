"""The commands: prune, factorize, sparsify, recover, inspect, compare, profile, sensitivity, sweep, criteria."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli import output
from onnxprune.cli.options import CommandOptions, beside, check_criterion, command, existing
from onnxprune.errors import BudgetError, Note, OnnxpruneError, UsageError, argument
from onnxprune.globs import last_match, reason_to_exclude
from onnxprune.io import files
from onnxprune.report import numbers, page, reasons, sparsity, summary, tables
from onnxprune.report.console import Screen, plain
from onnxprune.report.facts import FAITHFUL, Recovery, Report, SmallerRatio
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
    "train": (
        "onnxprune train model.onnx --data inputs.npz --ratio 0.5",
        "onnxprune train model.onnx --data images/ --regularize slimming --finetune 10m",
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
def prune(screen: Screen, options: CommandOptions) -> None:
    """Prune the channels of an ONNX model exactly, and verify the result."""
    target = options.output or beside(options.model, "pruned")
    _check(options, target, check_criterion)
    start = monotonic()
    with _showing_failure(options, screen, lambda report: _parts(options, report, screen)):
        result = _cut(options, screen)
    report: Report = result.report
    _advise(options, report)
    if screen.verbosity >= 0 or screen.as_json:
        _try_smaller(options, screen, report, monotonic() - start)
    hint = f"Use a smaller {argument('ratio')}, another {argument('criterion')}, or {argument('exclude')} the "
    hint += "sensitive layers."
    plan = str(options.plan_file) if options.plan_file else None
    _finish(
        screen,
        options,
        result,
        target,
        lambda: _parts(options, report, screen),
        hint,
        {"plan": plan},
        options.plan_file,
    )


@contextmanager
def _showing_failure(
    options: CommandOptions, screen: Screen, parts: Callable[[Report], Sequence[RenderableType]]
) -> Iterator[None]:
    """Show the report of a result that does not meet its gates, and write its pages, before the error goes on."""
    try:
        yield
    except BudgetError as error:
        if error.report is not None:
            screen.show(*parts(error.report), Text(""))
            output.write_pages(screen, options, error.report)
        raise


def _finish(
    screen: Screen,
    options: CommandOptions,
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
        options: options of the command.
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
    if options.values.get("dry_run"):
        _show_dry_run(screen, options, report, target, parts, names, plan_file)
        return
    gates = {"min_fidelity": options.min_fidelity, "max_drop": None if options.has_budget else options.max_drop}

    def show_failure() -> None:
        screen.show(*parts(), Text(""))
        output.write_pages(screen, options, report)

    output.check(report, show_failure, hint, **gates)
    result.save(target, plan=plan_file)
    config_file: Path | None = getattr(result, "config_file", None)
    screen.wrote.extend([path for path in (target, plan_file, config_file) if path is not None])
    report.output = str(target)
    pages = output.write_pages(screen, options, report)
    if screen.as_json:
        screen.emit({**report.to_dict(), **names})
    for warning in (*report.warnings, *output.damage(report)):
        screen.warn(warning)
    wrote = [("wrote     ", target)] + ([("plan      ", plan_file)] if plan_file else [])
    wrote += [("config    ", config_file)] if config_file else []
    wrote += [("map       ", Path(report.vocabulary.map))] if report.vocabulary is not None else []
    wrote += [("report    ", path) for path in pages]
    if not output.prints_markdown(options):
        screen.show(*parts(), *(Text.assemble((label, "bold"), str(path)) for label, path in wrote))


def _show_dry_run(
    screen: Screen,
    options: CommandOptions,
    report: Report,
    target: Path,
    parts: Callable[[], Sequence[RenderableType]],
    names: Mapping[str, str | None],
    plan_file: Path | None,
) -> None:
    """Show the report of a run that writes nothing, and its skipped stages; the arguments are those of ``_finish``."""
    skipped = ["timing"]
    if not options.has_budget:
        skipped += ["the proof of exactness"] if options.command == "prune" else []
        skipped += ["the comparison of outputs"]
        if options.recover not in (None, "none") or options.data is not None:
            skipped, report.recovery = [*skipped, "recovery"], Recovery()  # that it did not run is said once
        skipped += ["quantization"] if options.values.get("quantize") is not None else []
        gates = [name for name in ("min_fidelity", "metric", "max_drop") if options.values.get(name) is not None]
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


def _check(
    options: CommandOptions, target: Path, further: Callable[[CommandOptions], None] = lambda options: None
) -> None:
    """Check everything that can be found wrong before the work starts.

    Args:
        options: options of the command.
        target: the model file to write.
        further: checks the settings of this command alone, before the files.

    Raises:
        UsageError: something is wrong.
    """
    from onnxprune.io.write import check_output

    existing(options.model, "model")
    options.check_together()
    options.check_recovery()
    further(options)
    check_output(target, options.model, options.sources)
    plan_file = options.values.get("plan_file")
    output.check_pages(options, target, plan_file, options.model)
    if plan_file is not None:
        output.check_plan(plan_file, target, options.model, options.sources)


def _cut(options: CommandOptions, screen: Screen) -> Any:
    """Call the API with the options."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    arguments = dict(options.arguments)
    structure = (options.depth, options.experts, options.vocabulary)
    only_structure = any(x is not None for x in structure) and "ratio" not in options.typed
    if options.has_budget or options.plan is not None or only_structure or options.remove_dead:
        arguments["ratio"] = None
    if not options.has_budget:
        arguments |= dict.fromkeys(_GATES)  # they apply to what is shown first
    fixed = options.has_budget or options.remove_dead
    if not arguments["validate"] and arguments["criterion"] is None and not fixed:
        arguments["criterion"] = "l2"  # the default for data runs the model
    if options.dry_run and not options.has_budget:
        arguments |= {"validate": False, "recover": "none", "metric": None, "quantize": None}
    if options.sensitivity == "measure":
        arguments["jobs"] = options.jobs or -1
    # Quiet without JSON shows no latency, so the time to measure it is saved.
    latency = arguments["validate"] and not options.dry_run and _timing(screen, options)
    with screen.progress() as progress:
        return op.prune(options.model, **arguments, latency=latency, progress=progress)


def _timing(screen: Screen, options: CommandOptions) -> bool | str:
    """Return whether to measure latency, and ``layers`` where a page shows the time of each layer."""
    if options.values.get("report") is not None:
        return "layers"
    return screen.verbosity >= 0 or screen.as_json


TRIAL_SECONDS, TRIAL_SHARE = 60.0, 1.2
"""Time to spend at most on finding out which smaller ratio would do, in seconds and in runs."""


def _try_smaller(options: CommandOptions, screen: Screen, report: Report, took: float) -> None:
    """Try smaller ratios where the model lost too much, as far as time allows; note the best one and its fidelity.

    The trials are whole runs from the same data, so that their fidelity is measured and not guessed.

    Args:
        options: options of the command.
        screen: where progress goes.
        report: of the run; the answer is put into it.
        took: seconds of the run.
    """
    verdict = report.verdict
    decided = (
        options.has_budget or options.plan is not None or options.layers or options.dry_run or options.data is None
    )
    decided = decided or options.depth is not None or options.remove_dead
    decided = decided or options.vocabulary is not None or options.experts is not None
    decided = decided or options.effort == "quick"
    if decided or verdict is None or verdict.word == "faithful" or report.interrupted:
        return
    each, begin = took - report.seconds.get("latency", 0.0), monotonic()
    end, part = begin + min(TRIAL_SECONDS, max(1.0, TRIAL_SHARE * took)), 2 if verdict.word == "degraded" else 4
    for _ in range(2):
        share = math.floor(100 * options.ratio / part) / 100
        if share <= 0 or monotonic() + each > end:
            return
        with screen.progress() as progress, suppress(OnnxpruneError):
            progress("a smaller ratio", 0.0)
            points = _points_at(options, share)
            progress("a smaller ratio", 1.0)
            best = verdict.points if report.smaller is None else report.smaller.points
            if points >= FAITHFUL or points > best:
                report.smaller = SmallerRatio(share, points)
            if points >= FAITHFUL and part < 4:
                return
            part = 2 if points >= FAITHFUL and part == 4 else 2 * part


def _points_at(options: CommandOptions, ratio: float) -> float:
    """Return the points of fidelity that another ratio keeps; 0 where none are measured."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    arguments = {**options.arguments, **dict.fromkeys((*_GATES, "metric"))}
    verdict = op.prune(options.model, **{**arguments, "ratio": ratio}, latency=False).report.verdict
    return 0.0 if verdict is None else verdict.points


def _advise(options: CommandOptions, report: Report) -> None:
    """Warn where a cut was asked for and nothing was cut: a run that changes nothing must not look like a success."""
    wants_pruning = not options.remove_dead and (options.ratio > 0 or any(share > 0 for _, share in options.layers))
    is_pruning = options.plan is None and not options.has_budget and wants_pruning
    if is_pruning and report.totals.params_before == report.totals.params_after:
        report.warnings.append(
            Note(f"no channel was removed, so the model keeps its size; {argument('explain')} shows the reasons")
        )


def _requested_ratio(options: CommandOptions, names: Sequence[str]) -> float | None:
    """Return the smallest ratio set for a group with these names: the last match in ``layers``, else the ratio.

    0 where a plan, a budget or a threshold over several groups decides; None when the group is excluded.
    """
    if options.plan is not None or options.has_budget or options.remove_dead:
        return 0.0
    if reason_to_exclude(names, options.include, options.exclude):
        return None
    match = last_match(names, dict(options.layers))
    competing = (
        options.data is not None and options.criterion is None if options.scope == "auto" else options.scope != "local"
    )
    if match is None and competing:
        return 0.0
    share: float = options.ratio if match is None else match[1]
    return min(share, options.max_ratio or 1.0)


def _parts(options: CommandOptions, report: Report, screen: Screen) -> list[RenderableType]:
    width, verbose = screen.name_width, screen.verbosity > 0
    parts: list[RenderableType] = []
    if options.explain:
        groups = [plain(group) for group in report.groups]
        short = reasons.shortfalls(
            report.layers, groups, lambda names: _requested_ratio(options, names), options.round_to
        )
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
def factorize(screen: Screen, options: CommandOptions) -> None:
    """Factorize layers into smaller ones: SVD, Tucker, CP, spatial SVD."""
    target = options.output or beside(options.model, "factorized")
    _check(options, target)
    result = _factorized(options, screen)
    report: Report = result.report
    hint = f"Use a smaller {argument('ratio')}, give {argument('data')}, or {argument('exclude')} the sensitive layers."
    plan, parts = str(options.plan_file) if options.plan_file else None, _factorization_parts
    _finish(
        screen, options, result, target, lambda: parts(options, report, screen), hint, {"plan": plan}, options.plan_file
    )


def _factorized(options: CommandOptions, screen: Screen) -> Any:
    """Call the API with the options."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    decided = {name for name, setting in settings_of("factorize").items() if "plan" in setting.conflicts}
    arguments = {k: v for k, v in options.arguments.items() if options.plan is None or k not in decided}
    arguments |= dict.fromkeys(_GATES)
    if options.dry_run:
        arguments |= {"validate": False, "recover": "none", "metric": None, "quantize": None}
    # Quiet without JSON shows no latency, so the time to measure it is saved.
    latency = arguments["validate"] and _timing(screen, options)
    with screen.progress() as progress:
        return op.factorize(options.model, **arguments, latency=latency, progress=progress)


def _factorization_parts(options: CommandOptions, report: Report, screen: Screen) -> list[RenderableType]:
    width = screen.name_width
    parts = tables.unfactorized_layers(report.factorized, name_width=width) if options.explain else []
    return parts + _result_parts(report, screen)


@command("sparsify", "Set single weights to 0: anywhere, 2:4, blocks.", _EXAMPLES["sparsify"], model="MODEL.onnx")
def sparsify(screen: Screen, options: CommandOptions) -> None:
    """Set single weights to 0 in a pattern that a device has kernels for, and update the weights that stay."""
    target = options.output or beside(options.model, "sparse")
    _check(options, target)
    result = _sparse(options, screen)
    report: Report = result.report
    hint = f"Use a smaller {argument('ratio')}, give {argument('data')}, or {argument('exclude')} the sensitive layers."

    def parts() -> list[RenderableType]:
        width = screen.name_width
        explained = sparsity.left_out(report.sparsified, name_width=width) if options.explain else []
        return [*explained, *_result_parts(report, screen)]

    _finish(screen, options, result, target, parts, hint, {})


def _sparse(options: CommandOptions, screen: Screen) -> Any:
    """Call the API with the options."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good
    from onnxprune.sparsification.scores import GRADIENTS as GRADIENT_SCORES

    arguments = {**options.arguments, **dict.fromkeys(_GATES)}
    if options.dry_run:
        arguments |= {"validate": False, "recover": "none", "finetune": None, "metric": None}
        arguments["quantize"] = None
        arguments |= {"labels": None} if options.criterion not in GRADIENT_SCORES else {}
    # Quiet without JSON shows no latency, so the time to measure it is saved.
    latency = arguments["validate"] and (screen.verbosity >= 0 or screen.as_json)
    with screen.progress() as progress:
        return op.sparsify(options.model, **arguments, latency=latency, progress=progress)


@command("train", "Train until units are 0, and remove them.", _EXAMPLES["train"], model="MODEL.onnx")
def train(screen: Screen, options: CommandOptions) -> None:
    """Train a model with a penalty that brings whole units to 0, remove these exactly, and train on without it."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    target = options.output or beside(options.model, "trained")
    _check(options, target)
    arguments = {**options.arguments, **dict.fromkeys(_GATES)}
    with screen.progress() as progress:
        result = op.train(options.model, **arguments, latency=_timing(screen, options), progress=progress)
    hint = f"Use a smaller {argument('ratio')}, more time ({argument('finetune')}), or more {argument('data')}."
    _finish(screen, options, result, target, lambda: _result_parts(result.report, screen), hint, {})


@command(
    "recover",
    "Recover the accuracy of a model that was pruned before.",
    _EXAMPLES["recover"],
    original="ORIGINAL.onnx",
    cut="CUT.onnx",
)
def recover(screen: Screen, options: CommandOptions) -> None:
    """Recover the accuracy of a pruned model from its original, its plan and inputs without labels."""
    target = options.output or beside(options.cut, "recovered")
    _check_recovery(options, target)
    result = _repair(options, screen)
    report: Report = result.report
    hint = f"Give more {argument('data')}, or prune less."
    names = {"cut": str(options.cut), "plan": str(options.plan)}
    _finish(screen, options, result, target, lambda: _recovery_parts(options, report, screen), hint, names)


def _check_recovery(options: CommandOptions, target: Path) -> None:
    """Everything that can be found wrong before the work starts; raises UsageError."""
    from onnxprune.io.write import check_output

    existing(options.original, "original")
    existing(options.cut, "cut model")
    if options.plan is None:
        raise UsageError(
            f"recovery needs the plan of the pruned model, but {argument('plan')} is missing",
            hint=f"Give the file that {argument('plan_file')} wrote when the model was pruned.",
        )
    existing(options.plan, "plan")
    if options.data is None and options.recover != "datafree":
        options.check_together()
        raise UsageError(
            f"recovery needs calibration data, but {argument('data')} is missing",
            hint=f"Give inputs with {argument('data')} (a few hundred, without labels), or recover from synthetic "
            f"data, which is weaker: {argument('recover', 'datafree')}.",
        )
    options.check_together()
    check_output(target, options.original, [options.cut, *options.sources])
    output.check_pages(options, target, options.plan, options.original, options.cut)


def _repair(options: CommandOptions, screen: Screen) -> Any:
    """Call the API with the options."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    arguments = {**options.arguments, **dict.fromkeys(_GATES)}
    with screen.progress() as progress:
        return op.recover(options.original, options.cut, **arguments, progress=progress)


def _recovery_parts(options: CommandOptions, report: Report, screen: Screen) -> list[RenderableType]:
    width, parts = screen.name_width, list[RenderableType]()
    if options.explain:
        parts += [
            tables.heading("Layers that were not recovered"),
            *tables.unrecovered_layers(report.repairs, name_width=width),
        ]
        parts += [Text("")]
    return parts + _result_parts(report, screen)


MOST_GROUPS = 20


@command("inspect", "Show layers that can be pruned, and why others cannot.", _EXAMPLES["inspect"], model="MODEL.onnx")
def inspect(screen: Screen, options: CommandOptions) -> None:
    """List the groups that can be pruned, and the reasons for the others."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good
    from onnxprune.passes.depth import residual_branches
    from onnxprune.passes.sparsity import measure_sparsity

    model = existing(options.model, "model")
    arguments = options.arguments
    with screen.progress() as progress:
        progress("analyze", 0.0)
        analysis = op.analyze(model, **arguments)
        zeros, branches = measure_sparsity(analysis), residual_branches(analysis)
        progress("analyze", 1.0)
    facts = {name: plain(getattr(analysis, name)) for name in ("groups", "barriers", "layers", "unlocks")}
    if screen.as_json:
        sums = {"bytes": model.stat().st_size, "parameters": analysis.parameters}
        screen.emit({"model": str(model), **sums, **facts, "branches": plain(branches), "sparsity": plain(zeros)})
    width, list_all = screen.name_width, screen.verbosity > 0
    shown = tables.inspected_branches(branches, name_width=width, max_rows=None if list_all else MOST_GROUPS)
    shown += sparsity.inspected(zeros, name_width=width, list_all=list_all)
    screen.show(_title(model, analysis), *_inspection_parts(screen, facts, analysis.layers), *shown)


def _title(model: Path, analysis: Any) -> Text:
    """One line: the file, and the sums over it."""
    layers, macs = len(analysis.layers), sum(layer.macs_before for layer in analysis.layers)
    counted = "1 layer" if layers == 1 else f"{layers} layers"
    sums = f"{counted}, {numbers.count(analysis.parameters)} parameters, {numbers.count(macs)} MACs"
    return Text.assemble((str(model), "bold"), f"  {numbers.size(model.stat().st_size)}, {sums}")


def _inspection_parts(screen: Screen, facts: Mapping[str, Any], layers: Any) -> list[RenderableType]:
    width, list_all = screen.name_width, screen.verbosity > 0
    free = [group for group in facts["groups"] if group.get("prunable", True)]
    parts: list[RenderableType] = [tables.heading(f"Prunable groups ({len(free)})")]
    parts += tables.groups(facts["groups"], name_width=width, max_rows=None if list_all else MOST_GROUPS)
    parts += [tables.heading("Layers"), *tables.inspected(layers, name_width=width, show_all=list_all)]
    parts += [tables.heading(f"Barriers ({tables.fixed_channels(facts['barriers'])} channels cannot be removed)")]
    parts += tables.barriers(facts["barriers"], name_width=width, show_all=list_all)
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
def compare(screen: Screen, options: CommandOptions) -> None:
    """Compare two models with the same inputs and outputs, however the second was made; exit with 5 below a gate."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    existing(options.original, "original")
    existing(options.model, "model")
    options.check_together()
    output.check_pages(options, options.original, options.model)
    with _showing_failure(options, screen, lambda report: _compared(report, screen)), screen.progress() as progress:
        report = op.compare(options.original, options.model, **options.arguments, progress=progress)
    if screen.as_json:
        screen.emit(report.to_dict())
    for warning in (*report.warnings, *output.damage(report)):
        screen.warn(warning)
    pages = output.write_pages(screen, options, report)
    if not output.prints_markdown(options):
        screen.show(*_compared(report, screen), *(Text.assemble(("report    ", "bold"), str(p)) for p in pages))


def _compared(report: Report, screen: Screen) -> list[RenderableType]:
    """Render the summary, and below it the loss of each of several outputs."""
    width, facts = screen.name_width, report.fidelity
    outputs = tables.fidelity(facts, name_width=width)[1:] if facts is not None else []
    return [*summary.summary(report, name_width=width, spelled=screen.spelled), *outputs]


@command("profile", "Measure the time of each layer by its channel count.", _EXAMPLES["profile"], model="MODEL.onnx")
def profile(screen: Screen, options: CommandOptions) -> None:
    """Measure the latency of every layer on this machine, by number of channels."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    output = options.output
    existing(options.model, "model")
    options.check_together()
    if output is not None and output.resolve() == options.model.resolve():
        raise UsageError(f"{argument('output')} is the model itself", hint="Give another path for the table.")
    with screen.progress() as progress:
        times = op.profile(options.model, **options.arguments, progress=progress)
    if output is not None:
        times.save(output)
        screen.wrote.append(output)
    if screen.as_json:
        screen.emit({**plain(times.facts), "table": str(output) if output else None})
    wrote = [Text.assemble(("wrote     ", "bold"), str(output))] if output else []
    screen.show(*tables.profile_table(times.facts, name_width=screen.name_width, show_all=screen.verbosity > 0), *wrote)


@command("sensitivity", "Prune each group alone and measure the loss.", _EXAMPLES["sensitivity"], model="MODEL.onnx")
def sensitivity(screen: Screen, options: CommandOptions) -> None:
    """Prune each group alone at several ratios, recover its readers, and measure the whole model."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    existing(options.model, "model")
    options.check_together()
    options.check_recovery()
    output.check_page(options.model, options.output, options.html)
    arguments = {**options.arguments, "jobs": options.jobs or -1}
    with screen.progress() as progress:
        losses = op.sensitivity(options.model, **arguments, progress=progress)
    facts = plain(asdict(losses))
    if options.output is not None:
        losses.save(options.output)
    if options.html is not None:
        files.write_text(options.html, page.sensitivity_page(facts, options.model.name))
    paths = [path for path in (options.output, options.html) if path is not None]
    screen.wrote.extend(paths)
    written = [Text.assemble(("wrote     ", "bold"), str(path)) for path in paths]
    if screen.as_json:
        screen.emit({**facts, "model": str(options.model)})
    screen.show(*page.sensitivity_table(facts, name_width=screen.name_width, show_all=screen.verbosity > 0), *written)


@command("sweep", "Prune to several budgets and compare quality and cost.", _EXAMPLES["sweep"], model="MODEL.onnx")
def sweep(screen: Screen, options: CommandOptions) -> None:
    """Compress the model to several budgets and plot accuracy against cost."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    existing(options.model, "model")
    options.check_together()
    options.check_recovery()
    output.check_page(options.model, options.html)
    with screen.progress() as progress:
        points = op.sweep(options.model, **options.arguments, progress=progress)
    if options.html is not None:
        files.write_text(options.html, page.sweep_page(points))
    paths = [path for path in (options.folder, options.html) if path is not None]
    screen.wrote.extend(paths)
    if screen.as_json:
        screen.emit(plain(asdict(points)))
    screen.show(*page.render(points), *(Text.assemble(("wrote     ", "bold"), str(path)) for path in paths))


@command("criteria", "List the criteria that channels can be scored by.", _EXAMPLES["criteria"])
def criteria(screen: Screen, options: CommandOptions) -> None:
    """List the criteria that channels can be scored by, their meaning, and their sources."""
    from onnxprune.importance.criteria import describe, names  # heavy: waits until it is needed

    described = [describe(name) for name in names()]
    if screen.as_json:
        screen.emit({"criteria": [asdict(one) for one in described]})
    screen.show(tables.criteria(described))


@command("devices", "List the devices whose kernels --round-to auto can follow.", _EXAMPLES["devices"])
def devices(screen: Screen, options: CommandOptions) -> None:
    """List the devices whose kernels --round-to auto can follow, and the multiples of channels that each likes."""
    from onnxprune.devices import get, names, this_machine  # heavy: waits until it is needed

    kernels, here = [get(name) for name in names()], this_machine().name
    if screen.as_json:
        screen.emit({"devices": [asdict(one) for one in kernels], "this_machine": here})
    screen.show(tables.devices(kernels, here, sources=screen.verbosity > 0))
