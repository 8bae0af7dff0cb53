"""``onnxprune MODEL.onnx``: cut, verify, write, report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import click
from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli import options
from onnxprune.cli.data_options import data_options
from onnxprune.cli.layout import HeadedCommand, option
from onnxprune.cli.request import Request, check
from onnxprune.cli.selection_options import selection_options
from onnxprune.errors import BudgetError, ValidationError
from onnxprune.report import explain, structure, tables
from onnxprune.report.console import Screen, plain
from onnxprune.report.facts import Report

WHAT = "What to cut"
HOW = "How to choose"
INPUT = "Input"
CHECKS = "Checks"
OUTPUT = "Output"
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
    default="l2",
    show_default=True,
    metavar="NAME",
    help="What matters least, by weights: l1, l2, gm, lamp, bn, random; by feature maps of --data: wanda, obs, "
    "variance, activation, apoz, nuclear, hrank, cosine, snp; or a registered name.",
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
@selection_options(HOW)
@option(
    "--input-shape",
    "shapes",
    heading=INPUT,
    type=options.ShapeType(),
    multiple=True,
    help="Shape of an input whose sizes are not in the model; repeatable.",
)
@data_options(INPUT, "to validate with (default: seeded synthetic ones).")
@option("--seed", heading=INPUT, type=options.NumberType(0, "a seed"), default=0, help="Seed of everything random.")
@option("--no-validate", heading=CHECKS, is_flag=True, help="Do not run the models: structural checks only.")
@option(
    "--min-fidelity",
    heading=CHECKS,
    type=options.CosineType(),
    help="Write nothing and exit with 5 when an output's cosine falls below X.",
)
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
@option("--json", "as_json", heading=OUTPUT, is_flag=True, help="One JSON object on stdout, all else on stderr.")
@option("-q", "--quiet", heading=OUTPUT, is_flag=True, help="Say nothing but errors.")
@option("-v", "--verbose", heading=OUTPUT, count=True, help="List every layer; -vv shows tracebacks.")
@click.pass_context
def prune(ctx: click.Context, /, as_json: bool, quiet: bool, verbose: int, **values: Any) -> None:
    """Cut channels out of an ONNX model, exactly, and verify the result in onnxruntime."""
    screen: Screen = ctx.obj
    request = Request(**values)
    check(ctx, request)
    result = _cut(request, screen)
    report: Report = result.report
    _advise(request, report)
    _gate(request, report, screen)
    with _plan_file(request, result):
        result.save(request.target)
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
            ratio=request.ratio,
            layers=options.unique("--layer", request.layers) or None,
            include=request.include,
            exclude=request.exclude,
            **request.selection.arguments(),
            plan=request.apply_plan,
            input_shapes=options.unique("--input-shape", request.shapes) or None,
            **request.data.arguments(),
            seed=request.seed,
            approximate=request.approximate,
            validate=not request.no_validate,
            # Quiet without JSON shows no latency, so the time to measure it is saved.
            latency=not request.no_validate and (screen.verbosity >= 0 or screen.as_json),
            progress=progress,
        )


def _advise(request: Request, report: Report) -> None:
    """Warn where a cut was asked for and nothing was cut: a run that changes nothing must not look like a success."""
    asked = request.apply_plan is None and (request.ratio > 0 or any(share > 0 for _, share in request.layers))
    if asked and report.totals.params_before == report.totals.params_after:
        report.warnings.append("no channel was removed, the model keeps its size; --explain says why")


def _gate(request: Request, report: Report, screen: Screen) -> None:
    """Stop before anything is written when the cut is wrong (ValidationError) or not faithful enough (BudgetError)."""
    if report.exactness.passed is False:
        facts = report.exactness
        raise ValidationError(
            f"the cut model differs from the masked original by {facts.error:.1e} at output {facts.worst_output!r}, "
            f"allowed {facts.tolerance:.0e}",
            hint="This is a bug in onnxprune and nothing was written: please report it with the model.",
        )
    if request.min_fidelity is None:
        return
    if report.fidelity is None or not report.fidelity.outputs:
        note = report.fidelity.note if report.fidelity is not None else ""
        raise BudgetError(
            f"--min-fidelity {request.min_fidelity:g}: fidelity could not be measured{': ' + note if note else ''}",
            hint="Nothing was written. Give inputs with --data, or drop --min-fidelity.",
        )
    worst = report.fidelity.worst_cosine
    # Asked of every output, not of the worst: a cosine that is not a number has to fail the gate too.
    if not all(output.cosine >= request.min_fidelity for output in report.fidelity.outputs):
        screen.show(*_parts(request, report, screen), Text(""))
        raise BudgetError(
            f"worst cosine {worst:.4f} is below --min-fidelity {request.min_fidelity:g}",
            hint="Nothing was written. Take a smaller --ratio, another --criterion, or --exclude the sensitive layers.",
        )


@contextmanager
def _plan_file(request: Request, result: Any) -> Iterator[None]:
    """Have the plan on disk under a temporary name while the model is written, so that both come to be or neither."""
    if request.plan is None:
        yield
        return
    with NamedTemporaryFile(
        dir=request.plan.parent, prefix=f".{request.plan.name}.", suffix=".tmp", delete=False
    ) as file:
        waiting = Path(file.name)
    try:
        result.plan.save(waiting)
        yield
        # A temporary file is readable by its owner alone; a plan gets the rights any new file gets.
        mask = os.umask(0)
        os.umask(mask)
        waiting.chmod(0o666 & ~mask)
        waiting.replace(request.plan)
    finally:
        waiting.unlink(missing_ok=True)


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
        parts += [tables.heading("Cut")]
    return parts + tables.cut(report, name_width=width, verbose=verbose)


def _written(request: Request) -> list[RenderableType]:
    paths = [("wrote     ", request.target)] + ([("plan      ", request.plan)] if request.plan else [])
    return [Text.assemble((label, "bold"), str(path)) for label, path in paths]
