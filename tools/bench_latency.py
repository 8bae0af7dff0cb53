"""Is a cut model as much faster as it is smaller? Measured speed-up against the reduction in MACs, trained models.

python tools/bench_latency.py TRAINED/models                      convolutional models, ratio 0.5, the default rounding
python tools/bench_latency.py TRAINED/models --only cifar10 --threads 1 --out latency.jsonl
python tools/bench_latency.py TRAINED/models --why                and where the rest of the reduction is lost

A model counts as convolutional when convolutions do most of its MACs. Original and cut model run in turn in onnxruntime
with its default optimisations, on inputs of the sizes that the analysis chose for dynamic dimensions. With one thread
(the default) the time is that which the thread works, so that other programs on the machine disturb least; with more it
is the clock's. The speed-up is the median ratio of the pairs of runs; the figure of a model is that speed-up over (MACs
before / MACs after). A cut model's subnormal weights are 0, as in every result; such a model is marked with a star.

``--why`` adds three columns: the share of the original's time that its convolutions take (of the sum over its nodes, by
onnxruntime's profiler), how much faster these alone became, and the reduction in MACs as wide vector units see it, with
the channels that a convolution gives rounded up to a multiple of 16, and those that it reads where they are 16 or more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench import files
from bench.workers import each
from rich.console import Console
from rich.table import Table

CONVOLUTIONS = ("Conv", "ConvTranspose", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger")
BLOCK = 16
"""Channels that onnxruntime's convolutions take at a time on processors with AVX-512; 8 with AVX2."""


class Task(NamedTuple):
    """One model."""

    path: Path
    ratio: float
    round_to: int | str
    threads: int
    seconds: float
    why: bool


def reasons(task: Task, pruned: Any, small: Path, feed: Any) -> dict[str, float]:
    """Share of time in convolutions, their own speed-up, and the reduction in MACs that their kernels do."""
    from onnxprune.channels.survivors import Survivors
    from onnxprune.runtime.latency import profile

    found = [[(t.op, t.seconds) for t in profile(path, [feed], runs=30)] for path in (task.path, small)]
    convolutions = [sum(s for op, s in times if op in CONVOLUTIONS) for times in found]
    before = _in_blocks(pruned.analysis, pruned.analysis.facts.shape)
    after = _in_blocks(pruned.analysis, Survivors(pruned.analysis.table, pruned.removal).shape)
    return {
        "share": convolutions[0] / max(1e-12, sum(s for _, s in found[0])),
        "conv_speedup": convolutions[0] / max(1e-12, convolutions[1]),
        "block_reduction": before / max(1, after),
    }


def _in_blocks(analysis: Any, shape: Any) -> int:
    """MACs of all layers with numbers of channels rounded up as kernels of blocks of ``BLOCK`` channels do."""
    from onnxprune.graph import cost

    def up(n: int) -> int:
        return -(-n // BLOCK) * BLOCK

    total = 0
    for node in analysis.graph.steps:
        macs = cost.macs(node, shape)
        if macs and node.op in CONVOLUTIONS:
            (_, channels, *_), weight = shape(node.outputs[0]), shape(node.inputs[cost.LAYERS[node.op][1]])
            macs = macs // channels * up(channels)
            if weight[1] >= BLOCK:
                macs = macs // weight[1] * up(weight[1])
        total += macs
    return total


def run_task(task: Task) -> dict[str, Any]:
    """Cut, then time both models; runs in a worker process, one at a time."""
    from bench.onnxprune_run import feed_for

    from onnxprune import Pipeline, errors
    from onnxprune.passes import Flush, Prune
    from onnxprune.runtime.latency import Device, latency

    try:
        passes = [Prune(ratio=task.ratio, round_to=task.round_to), Flush()]
        result = Pipeline(passes).run(task.path)
    except errors.OnnxpruneError as error:
        return {"status": "left" if error.exit_code == 5 else "failed", "message": str(error).split("\n")[0]}
    except Exception as error:
        return {"status": "failed", "message": f"{type(error).__name__}: {error}"[:200]}
    layers, totals = result.report.layers, result.report.totals
    share = sum(x.macs_before for x in layers if x.op in CONVOLUTIONS) / max(1, totals.macs_before)
    record: dict[str, Any] = {"conv_share": round(share, 3), "macs": totals.macs_before, "removed": 0.0}
    if share < 0.5:
        return record | {"status": "not convolutional"}
    if totals.macs_after >= 0.95 * totals.macs_before:
        return record | {"status": "hardly cut"}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        small = Path(folder) / "small.onnx"
        result.save(small)
        try:
            feed = feed_for(task.path, result.context.analysis)
            measure = {"runs": 5000, "device": Device(threads=task.threads), "budget_s": task.seconds, "steady": True}
            times = asdict(latency(task.path, small, [feed], **measure))
            why = reasons(task, result.final, small, feed) if task.why else {}
        except Exception as error:
            return record | {"status": "failed", "message": f"{type(error).__name__}: {error}"[:200]}
    reduction = totals.macs_before / max(1, totals.macs_after)
    speedup = times["paired"]
    low, high = times.pop("speedup_interval")
    removed = 1 - totals.params_after / max(1, totals.params_before)
    figures = {"reduction": reduction, "speedup": speedup, "figure": speedup / reduction, "removed": removed}
    figures |= {"low": low, "high": high}
    return record | {"status": "ok", **figures, "flushed": result.report.flushed, **times, **why}


def show(records: list[dict[str, Any]]) -> int:
    """The table and the median. Returns 1 where a model failed or none was measured."""
    console = Console()
    if not console.is_terminal:
        console.width = 180
    table = Table(title="Measured speed-up and reduction in MACs")
    why = any("share" in r for r in records)
    extra = ("convolutions", "their speed-up", "in blocks") if why else ()
    for column in (
        "model",
        "MACs (M)",
        "before ms",
        "after ms",
        "95 % interval",
        "speed-up",
        "MACs before/after",
        "figure",
        *extra,
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    measured = sorted((r for r in records if r["status"] == "ok"), key=lambda r: float(r["figure"]))
    for r in measured:
        times = [f"{r['before_ms']:.3f}", f"{r['after_ms']:.3f}", f"{r['low']:.2f} to {r['high']:.2f}"]
        table.add_row(
            r["model"] + (" *" if r["flushed"] else ""),
            f"{r['macs'] / 1e6:.1f}",
            *times,
            f"{r['speedup']:.2f}",
            f"{r['reduction']:.2f}",
            f"{r['figure']:.2f}",
            *((f"{r['share']:.0%}", f"{r['conv_speedup']:.2f}", f"{r['block_reduction']:.2f}") if why else ()),
        )
    console.print(table)
    for r in records:
        if r["status"] not in ("ok", "not convolutional"):
            console.print(f"{r['model']}: {r['status']} {r.get('message', '')}"[:200])
    if measured:
        console.print(
            f"{len(measured)} convolutional models, median figure {median(r['figure'] for r in measured):.2f}, "
            f"{sum(r['high'] < 1 for r in measured)} slower than before"
        )
    if measured and why:
        console.print(f"of the convolutions alone {median(r['conv_speedup'] / r['reduction'] for r in measured):.2f}")
    return int(not measured or any(r["status"] in ("failed", "crash", "timeout") for r in records))


def main() -> int:
    """Exit code 1 where a model failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of *.onnx")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="part of a name, or glob")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--round-to", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring per model")
    parser.add_argument("--why", action="store_true", help="show where the rest of the reduction is lost")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--out", type=Path, help="JSON lines, one per model")
    given = parser.parse_args()
    paths = files.find([given.folder], given.only)
    if not paths:
        parser.error(f"{given.folder}: no *.onnx whose name matches {given.only or 'anything'}")
    settings = (given.ratio, given.round_to, given.threads, given.seconds, given.why)
    records = []
    for task, found in each(run_task, [Task(p.resolve(), *settings) for p in paths], 1, given.timeout):
        records.append({"model": files.name(task.path), **found})
        print(f"{records[-1]['model']:<34} {found['status']:<18} {found.get('figure', float('nan')):.2f}", flush=True)
    if given.out:
        given.out.write_text("".join(json.dumps(r) + "\n" for r in records))
    return show(records)


if __name__ == "__main__":
    sys.exit(main())
