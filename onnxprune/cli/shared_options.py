"""Options that several commands take, each said once."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune.cli import options
from onnxprune.cli.layout import option

INPUT = "Input"
CHECKS = "Checks"
OUTPUT = "Output"

input_shapes = option(
    "--input-shape",
    "shapes",
    heading=INPUT,
    type=options.ShapeType(),
    multiple=True,
    help="Shape of an input whose sizes are not in the model; repeatable.",
)
seed = option(
    "--seed", heading=INPUT, type=options.NumberType(0, "a seed"), default=0, help="Seed of everything random."
)
min_fidelity = option(
    "--min-fidelity",
    heading=CHECKS,
    type=options.CosineType(),
    help="Write nothing and exit with 5 when an output's cosine falls below X.",
)
as_json = option(
    "--json", "as_json", heading=OUTPUT, is_flag=True, help="One JSON object on stdout, all else on stderr."
)
quiet = option("-q", "--quiet", heading=OUTPUT, is_flag=True, help="Say nothing but errors.")
verbose = option("-v", "--verbose", heading=OUTPUT, count=True, help="List every layer; -vv shows tracebacks.")

metric = option(
    "--metric",
    heading=CHECKS,
    metavar="FILE.py:FUNCTION",
    help="A function from the path of a model to a number, higher is better; default points of fidelity.",
)
jobs = option(
    "--jobs",
    heading=CHECKS,
    type=options.NumberType(1, "how many processes to use"),
    help="Processes to measure sensitivities in; default one per processor.",
)
cache = option(
    "--cache",
    heading=INPUT,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep what is found out here: a repeated or interrupted run goes on from there.",
)
html = option(
    "--html",
    heading=OUTPUT,
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Also write a page with the plot; it needs nothing else.",
)
