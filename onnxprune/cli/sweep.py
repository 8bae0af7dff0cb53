"""``onnxprune sweep MODEL.onnx --data D --targets 0.9,0.8,...``: what the model loses by what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from onnxprune import documents
from onnxprune.cli import options, pages, shared_options
from onnxprune.cli.data_options import DataOptions, data_options
from onnxprune.cli.device_options import DeviceOptions, device_options
from onnxprune.cli.layout import HeadedCommand, option
from onnxprune.cli.recovery_options import RecoveryOptions, recovery_options
from onnxprune.cli.shared_options import CHECKS, INPUT, OUTPUT
from onnxprune.report import frontier
from onnxprune.report.console import Screen, plain

WHAT = "What the models may cost"
KINDS = ("macs", "params", "size", "latency", "peak-memory")
_PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one sweep."""

    model: Path
    targets: str
    kind: str
    criterion: str | None
    metric: str | None
    approximate: bool
    factorize: bool
    trials: int | None
    exclude: tuple[str, ...]
    include: tuple[str, ...]
    round_to: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    data: DataOptions
    cache: Path | None
    recovery: RecoveryOptions
    device: DeviceOptions
    seed: int
    models: Path | None
    html: Path | None

    def check(self) -> None:
        """Everything that can be found wrong before the work starts; raises UsageError."""
        options.existing(self.model, "model")
        self.data.check()
        self.recovery.check(data=self.data.data is not None)
        self.device.check()
        pages.check(self.model, self.html)
        options.folder("--models", self.models)
        options.folder("--cache", self.cache)

    @property
    def shares(self) -> list[float]:
        """The shares to cut to; raises UsageError."""
        from onnxprune.budget.target import shares

        return list(shares(self.targets))


@click.command(cls=HeadedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=_PATH, metavar="MODEL.onnx")
@option(
    "--targets",
    heading=WHAT,
    metavar="S,S,...",
    default="0.9,0.8,0.7,0.6,0.5,0.4,0.3",
    show_default=True,
    help="Shares of the original's cost.",
)
@option("--kind", heading=WHAT, type=click.Choice(KINDS), default="macs", show_default=True, help="Of which cost.")
@option("--criterion", heading=WHAT, metavar="NAME", help="What matters least; default ziplm with --data, else l2.")
@option("--exclude", heading=WHAT, multiple=True, metavar="PATTERN", help="Leave these alone; repeatable.")
@option("--include", heading=WHAT, multiple=True, metavar="PATTERN", help="Cut only these; repeatable.")
@option(
    "--round-to",
    heading=WHAT,
    type=options.NumberType(1, "what to keep a multiple of"),
    default=1,
    help="Keep a multiple of N per group where it can be had.",
)
@option("--factorize", heading=WHAT, is_flag=True, help="Take layers apart as well, for --kind macs, params and size.")
@option(
    "--trials",
    heading=WHAT,
    type=options.NumberType(0, "how many answers to try"),
    help="Answers to try around the best cut of each; default: with a repair half a minute's worth, else none.",
)
@option("--approximate", heading=WHAT, is_flag=True, help="Also cut through LayerNorm, RMSNorm and the like.")
@shared_options.metric
@device_options(CHECKS)
@shared_options.input_shapes
@data_options(INPUT, "to repair from and to measure on (default: no repair, seeded synthetic ones).")
@shared_options.cache
@shared_options.seed
@recovery_options("Recover accuracy")
@option("--models", heading=OUTPUT, type=_PATH, metavar="DIR", help="Keep the models here: NAME.SHARE.onnx.")
@shared_options.html
@shared_options.as_json
@shared_options.quiet
@shared_options.verbose
@click.pass_obj
def sweep(screen: Screen, /, as_json: bool, quiet: bool, verbose: int, **values: Any) -> None:
    """Cut the model to a row of budgets and show what it loses by what it costs."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    request = Request(**values)
    request.check()
    shares = request.shares
    with screen.progress() as progress:
        found = op.sweep(
            request.model,
            targets=shares,
            kind=request.kind,
            criterion=request.criterion,
            metric=request.metric,
            approximate=request.approximate,
            factorize=request.factorize,
            trials=request.trials,
            include=request.include,
            exclude=request.exclude,
            round_to=request.round_to,
            input_shapes=options.unique("--input-shape", request.shapes) or None,
            **request.data.arguments(),
            **request.device.arguments(),
            recover=request.recovery.recover,
            memory_limit=request.recovery.memory_limit,
            cache=request.cache,
            seed=request.seed,
            folder=request.models,
            progress=progress,
        )
    if request.html is not None:
        documents.write(request.html, frontier.page(found))
    written = [path for path in (request.models, request.html) if path is not None]
    screen.wrote.extend(written)
    if screen.as_json:
        screen.emit(plain(asdict(found)))
    screen.show(*frontier.render(found), *(Text.assemble(("wrote     ", "bold"), str(path)) for path in written))
