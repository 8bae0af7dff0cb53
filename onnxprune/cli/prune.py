"""``onnxprune MODEL.onnx``: cut, verify, write, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli import gate, options, shared_options
from onnxprune.cli.budget_options import budget_options
from onnxprune.cli.data_options import data_options
from onnxprune.cli.device_options import device_options
from onnxprune.cli.layout import HeadedCommand, option
from onnxprune.cli.recovery_options import recovery_options
from onnxprune.cli.request import Request, check
from onnxprune.cli.selection_options import selection_options
from onnxprune.cli.shared_options import CHECKS, INPUT, OUTPUT
from onnxprune.report import explain, repairs, structure, tables, whole
from onnxprune.report.console import Screen, plain
from onnxprune.report.facts import Report

WHAT = "What to cut"
BUDGET = "What the model may cost"
HOW = "How to choose"
RECOVERY = "Recover accuracy"
_PATH = click.Path(path_type=Path)


@click.command(cls=HeadedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=_PATH, metavar="MODEL.onnx")
@option(
    "--ratio",
    heading=WHAT,
    type=options.RatioType(),
    default=0.3,
    show_default=True,
    help="Share of units to remove: of every group, or of all together, see --scope.",
)
@option(
    "--criterion",
    heading=WHAT,
    metavar="NAME",
    help="What matters least; default l2, for a budget with --data ziplm. By weights: l1, l2, gm, lamp, bn, random; "
    "by feature maps of --data: wanda, obs, variance, activation, apoz, nuclear, hrank, cosine, snp, ziplm; or a "
    "registered name.",
)
@option(
    "--layer",
    "layers",
    heading=WHAT,
    type=options.LayerRatioType(),
    multiple=True,
    help="Another ratio for the layers or weights whose name matches; repeatable.",
)
@option(
    "--exclude", heading=WHAT, multiple=True, metavar="PATTERN", help="Leave these layers or weights alone; repeatable."
)
@option(
    "--include", heading=WHAT, multiple=True, metavar="PATTERN", help="Cut only these layers or weights; repeatable."
)
@option(
    "--approximate",
    heading=WHAT,
    is_flag=True,
    help="Also cut through LayerNorm, RMSNorm and the like, where the result is not exact.",
)
@option(
    "--apply-plan", heading=WHAT, type=_PATH, metavar="FILE.json", help="Remove what this plan says (prune by index)."
)
@budget_options(BUDGET)
@device_options(BUDGET)
@selection_options(HOW)
@shared_options.input_shapes
@data_options(INPUT, "to repair and validate with (default: no repair, seeded synthetic ones).")
@shared_options.cache
@shared_options.seed
@recovery_options(RECOVERY)
@option("--no-validate", heading=CHECKS, is_flag=True, help="Do not run the models: structural checks only.")
@shared_options.min_fidelity
@option(
    "-o",
    "--output",
    heading=OUTPUT,
    type=_PATH,
    metavar="OUT.onnx",
    help="Where to write; default MODEL.pruned.onnx beside the input.",
)
@option(
    "--plan", heading=OUTPUT, type=_PATH, metavar="FILE.json", help="Also write the plan: what is removed from where."
)
@option(
    "--explain", heading=OUTPUT, is_flag=True, help="Say why layers were not cut, or less than asked; show the groups."
)
@shared_options.as_json
@shared_options.quiet
@shared_options.verbose
@click.pass_context
def prune(ctx: click.Context, /, as_json: bool, quiet: bool, verbose: int, **values: Any) -> None:
    """Cut channels out of an ONNX model, exactly, and verify the result in onnxruntime."""
    screen: Screen = ctx.obj
    request = Request(**values)
    check(ctx, request)
    result = _cut(request, screen)
    report: Report = result.report
    _advise(request, report)
    hint = "Take a smaller --ratio, another --criterion, or --exclude the sensitive layers."
    gate.check(report, request.min_fidelity, lambda: screen.show(*_parts(request, report, screen), Text("")), hint)
    result.save(request.target, plan=request.plan)
    screen.wrote.extend([path for path in (request.target, request.plan) if path is not None])
    report.output = str(request.target)
    if screen.as_json:
        screen.emit({**report.to_dict(), "plan": str(request.plan) if request.plan else None})
    for warning in report.warnings:
        screen.warn(warning)
    screen.show(*_parts(request, report, screen), *_written(request))


def _cut(request: Request, screen: Screen) -> Any:
    """Run the API on the request."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    with screen.progress() as progress:
        return op.prune(
            request.model,
            criterion=request.criterion,
            ratio=None if request.budget.any or request.apply_plan is not None else request.ratio,
            **request.budget.arguments(request.min_fidelity),
            layers=options.unique("--layer", request.layers) or None,
            include=request.include,
            exclude=request.exclude,
            **request.selection.arguments(),
            plan=request.apply_plan,
            input_shapes=options.unique("--input-shape", request.shapes) or None,
            **request.data.arguments(),
            recover=request.recovery.recover,
            memory_limit=request.recovery.memory_limit,
            cache=request.cache,
            **request.device.arguments(),
            seed=request.seed,
            approximate=request.approximate,
            validate=not request.no_validate,
            # Quiet without JSON shows no latency, so the time to measure it is saved.
            latency=not request.no_validate and (screen.verbosity >= 0 or screen.as_json),
            progress=progress,
        )


def _advise(request: Request, report: Report) -> None:
    """Warn where a cut was asked for and nothing was cut: a run that changes nothing must not look like a success."""
    asked = (
        request.apply_plan is None
        and not request.budget.any
        and (request.ratio > 0 or any(share > 0 for _, share in request.layers))
    )
    if asked and report.totals.params_before == report.totals.params_after:
        report.warnings.append("no channel was removed, the model keeps its size; --explain says why")


def _parts(request: Request, report: Report, screen: Screen) -> list[RenderableType]:
    width, verbose = screen.name_width, screen.verbosity > 0
    parts: list[RenderableType] = []
    if request.explain:
        groups = [plain(group) for group in report.groups]
        short = explain.shortfalls(report.layers, groups, request.asked, request.selection.round_to)
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


def _written(request: Request) -> list[RenderableType]:
    paths = [("wrote     ", request.target)] + ([("plan      ", request.plan)] if request.plan else [])
    return [Text.assemble((label, "bold"), str(path)) for label, path in paths]
