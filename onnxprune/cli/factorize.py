"""``onnxprune factorize MODEL.onnx``: take layers apart, check, repair, write, report."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli import gate, options, plan_file, shared_options
from onnxprune.cli.data_options import DataOptions, data_options
from onnxprune.cli.factor_options import FactorOptions, factor_options
from onnxprune.cli.layout import HeadedCommand, option
from onnxprune.cli.recovery_options import RecoveryOptions, recovery_options
from onnxprune.cli.shared_options import CHECKS, INPUT, OUTPUT
from onnxprune.errors import UsageError
from onnxprune.report import factors as tables
from onnxprune.report.console import Screen
from onnxprune.report.facts import Report

HOW = "How to take layers apart"
FAR = "How far"
WHICH = "Which layers"
_PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one factorization."""

    model: Path
    output: Path | None
    factors: FactorOptions
    plan: Path | None
    apply_plan: Path | None
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    data: DataOptions
    recovery: RecoveryOptions
    seed: int
    explain: bool
    no_validate: bool
    min_fidelity: float | None

    @property
    def target(self) -> Path:
        """Where the result goes."""
        return self.output or self.model.with_name(self.model.name.removesuffix(".onnx") + ".factorized.onnx")

    def check(self, ctx: click.Context) -> None:
        """Everything that can be found wrong before the work starts; raises UsageError."""
        from onnxprune.model.save import check_output

        options.existing(self.model, "model")
        sources = [path for path in (self.apply_plan, self.data.data) if path is not None]
        if self.apply_plan is not None:
            options.existing(self.apply_plan, "plan")
            for entry in fields(FactorOptions):
                if ctx.get_parameter_source(entry.name) is ParameterSource.COMMANDLINE:
                    flag = "--layer" if entry.name == "layers" else f"--{entry.name.replace('_', '-')}"
                    raise UsageError(
                        f"{flag} has no meaning with --apply-plan",
                        hint="The plan already says what is factorized and how: drop one of the two.",
                    )
        self.data.check()
        self.recovery.check(data=self.data.data is not None)
        if self.min_fidelity is not None and self.no_validate:
            raise UsageError(
                "--min-fidelity needs the models to run, and --no-validate forbids it", hint="Drop one of the two."
            )
        check_output(self.target, self.model, sources)
        if self.plan is not None:
            plan_file.check(self.plan, self.target, self.model, sources)


@click.command(cls=HeadedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=_PATH, metavar="MODEL.onnx")
@factor_options(HOW, FAR, WHICH)
@option("--apply-plan", heading=WHICH, type=_PATH, metavar="FILE.json", help="Take apart what this plan says.")
@shared_options.input_shapes
@data_options(INPUT, "errors then count at the layers' outputs, and what is left is repaired.")
@shared_options.seed
@recovery_options("Recover accuracy")
@option("--no-validate", heading=CHECKS, is_flag=True, help="Do not compare the models' outputs or time them.")
@shared_options.min_fidelity
@option(
    "-o",
    "--output",
    heading=OUTPUT,
    type=_PATH,
    metavar="OUT.onnx",
    help="Where to write; default MODEL.factorized.onnx beside the input.",
)
@option("--plan", heading=OUTPUT, type=_PATH, metavar="FILE.json", help="Also write the plan: methods and ranks.")
@option("--explain", heading=OUTPUT, is_flag=True, help="Say of every layer that stays why it does.")
@shared_options.as_json
@shared_options.quiet
@shared_options.verbose
@click.pass_context
def factorize(ctx: click.Context, /, as_json: bool, quiet: bool, verbose: int, **values: Any) -> None:
    """Take layers apart into smaller ones: SVD, Tucker, CP, spatial SVD."""
    screen: Screen = ctx.obj
    request = Request(**values)
    request.check(ctx)
    result = _factorized(request, screen)
    report: Report = result.report
    hint = "Take a smaller --ratio, give --data, or --exclude the sensitive layers."
    gate.check(report, request.min_fidelity, lambda: screen.show(*_parts(request, report, screen), Text("")), hint)
    result.save(request.target, plan=request.plan)
    screen.wrote.extend([path for path in (request.target, request.plan) if path is not None])
    report.output = str(request.target)
    if screen.as_json:
        screen.emit({**report.to_dict(), "plan": str(request.plan) if request.plan else None})
    for warning in report.warnings:
        screen.warn(warning)
    wrote = [("wrote     ", request.target)] + ([("plan      ", request.plan)] if request.plan else [])
    written = [Text.assemble((label, "bold"), str(path)) for label, path in wrote]
    screen.show(*_parts(request, report, screen), *written)


def _factorized(request: Request, screen: Screen) -> Any:
    """Run the API on the request."""
    arguments = request.factors.arguments() if request.apply_plan is None else {}
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    with screen.progress() as progress:
        return op.factorize(
            request.model,
            **arguments,
            plan=request.apply_plan,
            input_shapes=options.unique("--input-shape", request.shapes) or None,
            **request.data.arguments(),
            recover=request.recovery.recover,
            memory_limit=request.recovery.memory_limit,
            seed=request.seed,
            validate=not request.no_validate,
            # Quiet without JSON shows no latency, so the time to measure it is saved.
            latency=not request.no_validate and (screen.verbosity >= 0 or screen.as_json),
            progress=progress,
        )


def _parts(request: Request, report: Report, screen: Screen) -> list[RenderableType]:
    width = screen.name_width
    parts = tables.left(report.factorized, name_width=width) if request.explain else []
    return parts + tables.whole(report, name_width=width, verbose=screen.verbosity > 0)
