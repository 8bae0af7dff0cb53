"""``onnxprune profile MODEL.onnx -o device.json``: measure what every layer takes at how many channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from onnxprune.cli import options, shared_options
from onnxprune.cli.data_options import DataOptions, data_options
from onnxprune.cli.device_options import DeviceOptions, device_options
from onnxprune.cli.layout import HeadedCommand, option
from onnxprune.cli.shared_options import INPUT, OUTPUT
from onnxprune.errors import UsageError
from onnxprune.report import profile as shown
from onnxprune.report.console import Screen, plain

MEASURING = "How to measure"


@click.command(cls=HeadedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.onnx")
@device_options(MEASURING)
@option(
    "--seconds",
    heading=MEASURING,
    type=options.NumberType(1, "how many seconds to measure"),
    default=60,
    show_default=True,
    help="How long to measure; 12 cuts are in any case.",
)
@shared_options.input_shapes
@data_options(INPUT, "one sample is run (default: seeded synthetic ones).")
@shared_options.seed
@option(
    "-o",
    "--output",
    heading=OUTPUT,
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Write the table, for --latency-table on another machine.",
)
@shared_options.as_json
@shared_options.quiet
@shared_options.verbose
@click.pass_obj
def profile(
    screen: Screen,
    /,
    model: Path,
    device: DeviceOptions,
    seconds: int,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    data: DataOptions,
    seed: int,
    output: Path | None,
    **_shown: Any,
) -> None:
    """Measure on this machine what every layer takes at how many channels."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    options.existing(model, "model")
    data.check()
    device.check()
    if output is not None and output.resolve() == model.resolve():
        raise UsageError("-o is the model itself", hint="Give another path for the table.")
    with screen.progress() as progress:
        found = op.profile(
            model,
            **device.arguments(),
            seconds=seconds,
            input_shapes=options.unique("--input-shape", shapes) or None,
            **data.arguments(),
            seed=seed,
            progress=progress,
        )
    if output is not None:
        found.save(output)
        screen.wrote.append(output)
    if screen.as_json:
        screen.emit({**plain(found.facts), "table": str(output) if output else None})
    wrote = [Text.assemble(("wrote     ", "bold"), str(output))] if output else []
    screen.show(*shown.render(found.facts, name_width=screen.name_width, every=screen.verbosity > 0), *wrote)
