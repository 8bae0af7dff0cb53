"""Criteria and scopes on trained models: the metric against the share of MACs kept, without any repair.

python tools/bench_criteria.py TRAINED                           every criterion and scope, every model with labels
python tools/bench_criteria.py TRAINED --models '*resnet56' --criteria l2,wanda --scopes local,global --macs 0.7,0.5
python tools/bench_criteria.py TRAINED --models '*resnet56' --combine wanda:global:none --combine l2:local
python tools/bench_criteria.py --speed                           seconds of gm and nuclear on 2048 channels
python tools/bench_criteria.py --speed TRAINED --models '*resnet20'          and capture beside plain forward passes

TRAINED holds models/*.onnx and evaluate.py, see tools/bench/labelled.py. A ratio is bisected until the asked share of
the multiply-accumulates is left; a point is left out where that share cannot be had. Everything goes into --out:
points.jsonl (one point per line; points that are there are not measured again, so delete it after a change of the
package), table.csv, one plot per model (SVG), recorded calibration data and captured statistics.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import files
from bench.criteria_costs import capture_overhead, wide_layer
from bench.criteria_points import Combination, Task, run_task
from bench.criteria_tables import show, write_csv
from bench.curves import draw
from bench.labelled import UNLABELLED, recorded
from bench.workers import each
from rich.console import Console
from rich.table import Table

from onnxprune import OnnxpruneError, settings
from onnxprune.importance import criteria

SHARES = "0.9,0.8,0.7,0.6,0.5"
Record = dict[str, Any]


def combinations(given: argparse.Namespace) -> list[Combination]:
    """What to measure; where every group stands for itself, dividing by costs changes little and is left out."""
    if given.combine:
        return [_combination(text) for text in given.combine]
    return [
        Combination(c, s, n, cost)
        for c in given.criteria or criteria.names()
        for s in given.scopes
        for n in given.normalize
        for cost in given.cost
        if s != "local" or cost == "none" or given.cost == [cost]
    ]


def _combination(text: str) -> Combination:
    criterion, scope, normalize, cost = [*text.split(":"), *["local", "default", "none"][text.count(":") :]][:4]
    return Combination(criterion, scope, normalize, cost)


def calibration(given: argparse.Namespace, name: str) -> Path | None:
    """Recorded inputs of a model, from the folder given or recorded now; None where that fails."""
    folders = [f for f in (given.calibration, given.out / "calibration") if f is not None]
    return recorded(given.folder, name, folders, given.samples)


def key(point: Record) -> tuple[Any, ...]:
    return tuple(point.get(n) for n in ("model", "samples", *Combination._fields, "share"))


class Results:
    """Points measured so far, on disk and in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.points: dict[tuple[Any, ...], Record] = {}
        for line in lines:
            try:
                point = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was stopped
                continue
            self.points[key(point)] = point

    def add(self, points: Sequence[Record]) -> None:
        with self.path.open("a") as file:
            for point in points:
                self.points[key(point)] = point
                print(json.dumps(point), file=file, flush=True)


def tasks(given: argparse.Namespace, paths: Sequence[Path], results: Results) -> Iterator[Task]:
    """What is missing, model by model; models without labels end with their baseline."""
    for path in paths:
        name = files.name(path)
        base = results.points.get(key({"model": name, "samples": given.samples}))
        if base is None:
            yield Task(given.folder, path, None, given.samples, given.out / "cache", None, ())
        elif next(iter(base["baseline"])) != UNLABELLED:
            data: Path | None = None
            for combination in combinations(given):
                own = {"model": name, "samples": given.samples, **combination._asdict()}
                missing = tuple(s for s in given.macs if key({**own, "share": s}) not in results.points)
                if missing:
                    data = data or calibration(given, name)
                    yield Task(given.folder, path, data, given.samples, given.out / "cache", combination, missing)


def measure(given: argparse.Namespace, paths: Sequence[Path], results: Results) -> None:
    """Baselines first, then every point that is missing."""
    for _ in range(2):
        for task, found in each(run_task, list(tasks(given, paths, results)), given.jobs, given.timeout):
            points = found.get("points")
            if points is None:  # a crash or a timeout: not written down, so that the next run tries again
                print(f"{files.name(task.path)} {task.combination or 'baseline'}: {found.get('message')}", flush=True)
                continue
            results.add(points)
            for point in points:
                said = point.get("error") or str(_value(point))
                print(f"{point['model']:<28} {task.combination or 'baseline'!s:<44} {point.get('share', 1)} {said}")
            sys.stdout.flush()


def _value(point: Record) -> float:
    return round(float(next(iter((point.get("metrics") or point["baseline"]).values()))), 4)


def speed(given: argparse.Namespace, paths: Sequence[Path], console: Console) -> None:
    """Capture beside plain passes, statistic by statistic and model by model, and seconds on a wide layer."""
    for name, (cpu, wall) in wide_layer().items():
        console.print(f"{name}: {cpu:.2f} s of processor, {wall:.2f} s")
    table = Table(title="capture / plain forward passes: processor time, wall time", title_justify="left")
    for column in ("model", "plain, s", *given.statistics):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for path in paths:
        data = calibration(given, files.name(path))
        if data is None:
            continue
        try:
            times = capture_overhead(path, data, given.samples, given.statistics)
        except OnnxpruneError as error:
            console.print(f"{files.name(path)}: {error}", markup=False)
            continue
        plain = times["plain"]
        ratios = [f"{times[n].cpu / plain.cpu:.2f} {times[n].wall / plain.wall:.2f}" for n in given.statistics]
        table.add_row(files.name(path), f"{plain.cpu:.2f} {plain.wall:.2f}", *ratios)
    if table.row_count:
        console.print(table)


def parsed() -> tuple[argparse.Namespace, list[Path]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words, shares = (lambda text: text.split(",")), (lambda text: [float(x) for x in text.split(",")])
    parser.add_argument("folder", type=Path, nargs="?", help="folder with models/*.onnx and evaluate.py")
    parser.add_argument("--models", action="append", default=[], metavar="PATTERN", help="part of a name, or glob")
    parser.add_argument("--criteria", type=words, default=[], help="separated by commas; default: all")
    parser.add_argument("--scopes", type=words, default=list(settings.words("scope")))
    parser.add_argument("--normalize", type=words, default=["default"], help="several may be given")
    parser.add_argument("--cost", type=words, default=["none"], help="several may be given; with local scope only none")
    parser.add_argument("--combine", action="append", metavar="CRITERION:SCOPE[:NORMALIZE[:COST]]", help="only these")
    parser.add_argument("--macs", type=shares, default=shares(SHARES), help="shares to keep")
    parser.add_argument("--samples", type=int, default=512, help="of calibration data")
    parser.add_argument("--calibration", type=Path, help="folder with NAME.npz recorded before")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per model and combination")
    parser.add_argument(
        "--out", type=Path, default=Path("bench_criteria"), help="folder for everything that is written"
    )
    parser.add_argument("--speed", action="store_true", help="seconds of capture and of wide layers, nothing else")
    parser.add_argument(
        "--statistics",
        type=words,
        default=["mean", "square", "active", "moments", "similarity", "gram", "nuclear"],
        help="for --speed; rank, which is many times slower than the model itself, only where named",
    )
    parser.add_argument("--threads", type=int, default=0, help="of numpy and onnxruntime's helpers (OMP_NUM_THREADS)")
    given = parser.parse_args()
    if given.folder is None:
        if not given.speed:
            parser.error("needs a folder with models/*.onnx and evaluate.py")
        return given, []
    given.folder = given.folder.resolve()
    paths = files.find([given.folder / "models"], given.models)
    if not (given.folder / "evaluate.py").is_file() or not paths:
        parser.error(
            f"{given.folder}: needs evaluate.py and models/*.onnx whose names match {given.models or 'anything'}"
        )
    for c in combinations(given):
        criteria.get(c.criterion)
        for name in ("scope", "normalize", "cost"):
            if getattr(c, name) not in (*settings.words(name), "default"):
                parser.error(f"{c}: {name} may be {', '.join(settings.words(name))}")
    return given, paths


def main() -> int:
    """Exit code 1 where a baseline could not be measured."""
    given, paths = parsed()
    if given.threads:
        os.environ.update({f"{x}_NUM_THREADS": str(given.threads) for x in ("OMP", "OPENBLAS", "MKL")})
    given.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    if given.speed:
        speed(given, paths, console)
        return 0
    results = Results(given.out / "points.jsonl")
    measure(given, paths, results)
    names = [files.name(p) for p in paths]
    points = [p for p in results.points.values() if p["model"] in names and p["samples"] == given.samples]
    missing = set(names) - {p["model"] for p in points if "baseline" in p}
    show(points, console)
    write_csv(points, given.out / "table.csv")
    for name in names:
        draw([p for p in points if p["model"] == name], given.out / f"{name}.svg")
    for name in sorted(missing):
        console.print(f"[red]{name}: no baseline")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
