"""``onnxprune sensitivity MODEL.onnx --data D``: what cutting each group alone does to the whole model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from onnxprune import documents
from onnxprune.cli import options, pages, shared_options
from onnxprune.cli.data_options import DataOptions, data_options
from onnxprune.cli.layout import HeadedCommand, option
from onnxprune.cli.recovery_options import RecoveryOptions, recovery_options
from onnxprune.cli.shared_options import INPUT, OUTPUT
from onnxprune.errors import UsageError
from onnxprune.report import sensitivities
from onnxprune.report.console import Screen, plain

WHAT = "What to cut"
_PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one measurement."""

    model: Path
    ratios: str
    criterion: str | None
    metric: str | None
    jobs: int | None
    approximate: bool
    exclude: tuple[str, ...]
    include: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    data: DataOptions
    cache: Path | None
    recovery: RecoveryOptions
    seed: int
    output: Path | None
    html: Path | None

    def check(self) -> None:
        """Everything that can be found wrong before the work starts; raises UsageError."""
        options.existing(self.model, "model")
        self.data.check()
        self.recovery.check(data=self.data.data is not None)
        options.folder("--cache", self.cache)
        pages.check(self.model, self.output, self.html)

    @property
    def shares(self) -> list[float]:
        """The shares to cut; raises UsageError."""
        found = sorted({options.ratio(part.strip(), "--ratios") for part in self.ratios.split(",")})
        if not found or found[0] <= 0:
            raise UsageError("--ratios: 0 cuts nothing", hint="For example --ratios 0.25,0.5,0.75.")
        return found


@click.command(cls=HeadedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=_PATH, metavar="MODEL.onnx")
@option(
    "--ratios", heading=WHAT, metavar="R,R,...", default="0.25,0.5,0.75,0.9", show_default=True, help="Shares to cut."
)
@option("--criterion", heading=WHAT, metavar="NAME", help="What matters least; default ziplm with --data, else l2.")
@option(
    "--exclude", heading=WHAT, multiple=True, metavar="PATTERN", help="Leave these layers or weights alone; repeatable."
)
@option(
    "--include", heading=WHAT, multiple=True, metavar="PATTERN", help="Cut only these layers or weights; repeatable."
)
@option("--approximate", heading=WHAT, is_flag=True, help="Also cut through LayerNorm, RMSNorm and the like.")
@shared_options.metric
@shared_options.jobs
@shared_options.input_shapes
@data_options(INPUT, "to repair from and to measure on (default: no repair, seeded synthetic ones).")
@shared_options.cache
@shared_options.seed
@recovery_options("Recover accuracy")
@option("-o", "--output", heading=OUTPUT, type=_PATH, metavar="FILE.json", help="Write the curves, for --sensitivity.")
@shared_options.html
@shared_options.as_json
@shared_options.quiet
@shared_options.verbose
@click.pass_obj
def sensitivity(screen: Screen, /, as_json: bool, quiet: bool, verbose: int, **values: Any) -> None:
    """Cut each group alone at several ratios, repair what reads it, and measure the whole model."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    request = Request(**values)
    request.check()
    shares = request.shares
    with screen.progress() as progress:
        found = op.sensitivity(
            request.model,
            ratios=shares,
            criterion=request.criterion,
            metric=request.metric,
            jobs=request.jobs or -1,
            approximate=request.approximate,
            include=request.include,
            exclude=request.exclude,
            input_shapes=options.unique("--input-shape", request.shapes) or None,
            **request.data.arguments(),
            recover=request.recovery.recover,
            memory_limit=request.recovery.memory_limit,
            cache=request.cache,
            seed=request.seed,
            progress=progress,
        )
    facts = plain(asdict(found))
    if request.output is not None:
        found.save(request.output)
    if request.html is not None:
        documents.write(request.html, sensitivities.page(facts, request.model.name))
    written = [("wrote     ", path) for path in (request.output, request.html) if path is not None]
    screen.wrote.extend([path for _, path in written])
    if screen.as_json:
        screen.emit({**facts, "model": str(request.model)})
    lines = [Text.assemble((label, "bold"), str(path)) for label, path in written]
    screen.show(*sensitivities.render(facts, name_width=screen.name_width, every=screen.verbosity > 0), *lines)
