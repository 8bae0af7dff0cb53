"""Factorization of trained models: the metric against MACs kept for every method, without any training.

python tools/bench_factorize.py TRAINED --models '*resnet56' --macs 0.8,0.6,0.4       every method, beside pruning
python tools/bench_factorize.py TRAINED --ways auto --kinds repair --macs 0.75 --timed     is every model faster?
python tools/bench_factorize.py --speed          seconds for a 512x512x3x3 kernel and for a ResNet-50 of random weights

TRAINED holds models/*.onnx and evaluate.py, see tools/bench/labelled.py; data are what ``evaluate.py --record`` gives,
never what is measured on. Points go to --out, and those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench import files
from bench.factor_points import PRUNE, Job, run_job
from bench.labelled import UNLABELLED, evaluate, recorded
from bench.workers import each
from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
WAYS = ("svd", "tucker", "cp", "spatial-svd", "auto", PRUNE)
KINDS = ("plain", "data", "repair")
_KEY = ("model", "way", "kind", "share", "samples")


def measure(given: argparse.Namespace, paths: Sequence[Path], points: dict[tuple[Any, ...], Record]) -> None:
    """Whatever is missing."""
    jobs = []
    for path in paths:
        folders = [f for f in (given.calibration, given.out / "calibration") if f is not None]
        data = recorded(given.folder, files.name(path), folders, given.samples)
        if data is not None:
            jobs += [
                Job(given.folder, path, data, way, kind, share, given.samples, given.timed)
                for share in given.macs
                for way in given.ways
                for kind in given.kinds
                if (files.name(path), way, kind, share, given.samples) not in points
            ]
    with (given.out / "points.jsonl").open("a") as file:
        for job, found in each(run_job, jobs, given.jobs, given.timeout):
            own = dict(zip(_KEY, (files.name(job.path), job.way, job.kind, job.share, job.samples), strict=True))
            point = {**own, "error": found.get("message"), **found}
            print(json.dumps(point), file=file, flush=True)
            points[tuple(point[k] for k in _KEY)] = point
            print(*own.values(), point.get("macs", ""), point["error"] or point["metrics"], flush=True)


def show(given: argparse.Namespace, points: Sequence[Record], baselines: dict[str, float], console: Console) -> None:
    """One row per model, share and kind; a column per way."""
    table = Table(title="metric after factorization (speed: latency before / after)")
    for name in ("model", "before", "MACs", "data", *given.ways):
        table.add_column(name, justify="left" if name in ("model", "data") else "right")
    rows: dict[tuple[str, float, str], dict[str, Record]] = {}
    for point in points:
        rows.setdefault((point["model"], point["share"], point["kind"]), {})[point["way"]] = point
    order = sorted(rows.items(), key=lambda r: (r[0][0], -r[0][1], KINDS.index(r[0][2])))
    for (model, share, kind), found in order:
        table.add_row(model, f"{baselines[model]:.4f}", f"{share:g}", kind, *(_cell(found.get(w)) for w in given.ways))
    console.print(table)


def _cell(point: Record | None) -> str:
    if point is None or "metrics" not in point:
        return "-"
    value = float(next(iter(point["metrics"].values())))
    speed = f" {point['speed']:.2f}x" if "speed" in point else ""
    off = f" ({point['macs']:.2f})" if abs(point["macs"] - point["share"]) > 0.03 else ""
    return f"{value:.4f}{off}{speed}"


def speed() -> int:
    """Seconds for one large kernel by every method, and for all of a ResNet-50."""
    from bench.torch_free import resnet50

    import onnxprune as op
    from onnxprune.factorization.decompositions import METHODS, Metric

    kernel = np.random.default_rng(0).standard_normal((1, 512, 3, 3, 512)) / 68
    METHODS["tucker"].fit(kernel[:, :8, :, :, :8], Metric(), 0).factors((4, 4))  # loads what is loaded once
    for name, ranks in (("svd", (200,)), ("spatial-svd", (400,)), ("tucker", (200, 200)), ("cp", (64,))):
        start = time.perf_counter()
        METHODS[name].fit(kernel, Metric(), 0).factors(ranks)
        print(f"512x512x3x3 {name} {ranks}: {time.perf_counter() - start:.2f} s")
    for method in ("tucker", "svd", "spatial-svd", "auto"):
        start = time.perf_counter()
        take = op.passes.Factorize(method, ratio=0.4, timed=False)
        found = op.Pipeline([take]).run(resnet50())
        kept = found.report.totals.macs_after / found.report.totals.macs_before
        print(f"ResNet-50 {method}: {time.perf_counter() - start:.1f} s, MACs kept {kept:.2f}")
    return 0


def parsed() -> tuple[argparse.Namespace, list[Path]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("folder", type=Path, nargs="?", help="folder with models/*.onnx and evaluate.py")
    parser.add_argument("--models", action="append", default=[], metavar="PATTERN", help="part of a name, or glob")
    parser.add_argument("--ways", type=words, default=WAYS)
    parser.add_argument("--kinds", type=words, default=KINDS)
    parser.add_argument("--macs", type=lambda t: [float(x) for x in t.split(",")], default=[0.8, 0.6, 0.4])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--timed", action="store_true", help="auto goes by measured speed too")
    parser.add_argument("--calibration", type=Path, help="folder with NAME.npz recorded before")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per point")
    parser.add_argument("--out", type=Path, default=Path("bench_factorize"), help="folder for what is written")
    parser.add_argument("--speed", action="store_true", help="measure seconds instead")
    given = parser.parse_args()
    if given.speed:
        return given, []
    if given.folder is None or not (given.folder / "evaluate.py").is_file():
        parser.error(f"{given.folder}: needs evaluate.py and models/*.onnx")
    given.folder = given.folder.resolve()
    return given, files.find([given.folder / "models"], given.models)


def main() -> int:
    """Exit code 1 where nothing could be measured."""
    given, paths = parsed()
    if given.speed:
        return speed()
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "points.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    points = {tuple(p.get(k) for k in _KEY): p for p in lines}
    first = {files.name(p): evaluate(given.folder, files.name(p), None) for p in paths}
    measure(given, [p for p in paths if next(iter(first[files.name(p)])) != UNLABELLED], points)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    asked = [p for p in points.values() if p["model"] in first and p["share"] in given.macs and p["way"] in given.ways]
    asked = [p for p in asked if p["kind"] in given.kinds and p["samples"] == given.samples]
    show(given, asked, {n: float(next(iter(m.values()))) for n, m in first.items()}, console)
    return int(not any("metrics" in p for p in asked))


if __name__ == "__main__":
    sys.exit(main())
