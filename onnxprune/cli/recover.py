"""``onnxprune recover ORIGINAL CUT --plan FILE --data D``: repair a model that was cut before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType
from rich.text import Text

from onnxprune.cli import gate, options, shared_options
from onnxprune.cli.data_options import DataOptions, data_options
from onnxprune.cli.layout import HeadedCommand, option
from onnxprune.cli.recovery_options import RecoveryOptions, recovery_options
from onnxprune.cli.shared_options import INPUT, OUTPUT
from onnxprune.errors import UsageError
from onnxprune.report import repairs, tables, whole
from onnxprune.report.console import Screen
from onnxprune.report.facts import Report

PAIR = "The pair"
_PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one repair."""

    original: Path
    cut: Path
    plan: Path | None
    approximate: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    data: DataOptions
    recovery: RecoveryOptions
    cache: Path | None
    seed: int
    min_fidelity: float | None
    output: Path | None
    explain: bool

    @property
    def mode(self) -> str:
        """How to repair."""
        return self.recovery.recover or "full"

    @property
    def target(self) -> Path:
        """Where the repaired model goes."""
        return self.output or self.cut.with_name(self.cut.name.removesuffix(".onnx") + ".recovered.onnx")

    def check(self) -> Path:
        """Everything that can be found wrong before the work starts (UsageError); gives the plan."""
        from onnxprune.model.save import check_output

        options.existing(self.original, "original")
        options.existing(self.cut, "cut model")
        options.folder("--cache", self.cache)
        if self.plan is None:
            raise UsageError(
                "a repair needs the plan of the cut, and there is no --plan",
                hint="Give the file that --plan wrote when the cut was made.",
            )
        options.existing(self.plan, "plan")
        self.data.check()
        if self.data.data is None and self.mode != "datafree":
            raise UsageError(
                "a repair needs calibration data, and there is no --data",
                hint="Give inputs with --data, a few hundred without labels are enough; or repair without, which is "
                "weaker, by --recover datafree.",
            )
        read = [self.cut, self.plan, *([self.data.data] if self.data.data is not None else [])]
        check_output(self.target, self.original, read)
        return self.plan


@click.command(cls=HeadedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("original", type=_PATH, metavar="ORIGINAL.onnx")
@click.argument("cut", type=_PATH, metavar="CUT.onnx")
@option(
    "--plan", heading=PAIR, type=_PATH, metavar="FILE.json", help="What was removed from where: the plan of the cut."
)
@option("--approximate", heading=PAIR, is_flag=True, help="The cut was made with --approximate.")
@shared_options.input_shapes
@data_options(INPUT, "to repair from and to measure on.")
@shared_options.cache
@shared_options.seed
@recovery_options("Recover accuracy", none=False, default="full")
@shared_options.min_fidelity
@option(
    "-o",
    "--output",
    heading=OUTPUT,
    type=_PATH,
    metavar="OUT.onnx",
    help="Where to write; default CUT.recovered.onnx beside the cut model.",
)
@option("--explain", heading=OUTPUT, is_flag=True, help="Say why layers were not repaired.")
@shared_options.as_json
@shared_options.quiet
@shared_options.verbose
@click.pass_obj
def recover(screen: Screen, /, as_json: bool, quiet: bool, verbose: int, **values: Any) -> None:
    """Repair a model that was cut before, from its original, the plan of the cut and inputs without labels."""
    request = Request(**values)
    result = _repair(request, request.check(), screen)
    report: Report = result.report
    hint = "Give more --data, or cut less."
    gate.check(report, request.min_fidelity, lambda: screen.show(*_parts(request, report, screen), Text("")), hint)
    result.save(request.target)
    screen.wrote.append(request.target)
    report.output = str(request.target)
    if screen.as_json:
        screen.emit({**report.to_dict(), "cut": str(request.cut), "plan": str(request.plan)})
    for warning in report.warnings:
        screen.warn(warning)
    wrote = Text.assemble(("wrote     ", "bold"), str(request.target))
    screen.show(*_parts(request, report, screen), wrote)


def _repair(request: Request, plan: Path, screen: Screen) -> Any:
    """Run the API on the request."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    with screen.progress() as progress:
        return op.repair(
            request.original,
            request.cut,
            plan=plan,
            recover=request.mode,
            memory_limit=request.recovery.memory_limit,
            cache=request.cache,
            input_shapes=options.unique("--input-shape", request.shapes) or None,
            **request.data.arguments(),
            seed=request.seed,
            approximate=request.approximate,
            progress=progress,
        )


def _parts(request: Request, report: Report, screen: Screen) -> list[RenderableType]:
    width, parts = screen.name_width, list[RenderableType]()
    if request.explain:
        parts += [tables.heading("Layers that were not repaired"), *repairs.left(report.repairs, name_width=width)]
        parts += [Text("")]
    return parts + whole.repaired(report, name_width=width, verbose=screen.verbosity > 0)
