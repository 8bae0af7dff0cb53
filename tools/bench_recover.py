"""Recovery on trained models: the metric after a cut, repaired in every way, without any training.

python tools/bench_recover.py TRAINED                                     every labelled model at MACs 0.7, 0.5, 0.3
python tools/bench_recover.py TRAINED --models '*resnet56' --modes none,bias,bn,symmetric,lstsq,full    the ablation;
    symmetric is lstsq from the original's inputs of a layer in place of the cut model's
python tools/bench_recover.py TRAINED --models cifar10 --macs 0.5 --samples 64,128,256,512,1024    more data, and a plot
python tools/bench_recover.py TRAINED --macs 0.7 --plain          against the best plain criterion that is not repaired
python tools/bench_recover.py TRAINED --macs 0.7 --unlabelled     models without labels too: cosine to the original
python tools/bench_recover.py TRAINED --combine l2,global,default,macs --modes none,datafree,full    without data

TRAINED holds models/*.onnx and evaluate.py, see tools/bench/labelled.py; inputs to repair from are those that
``evaluate.py --record`` gives, never the ones measured on. Channels are chosen by --combine. Everything goes into
--out: points.jsonl (points that are there are not measured again: delete it after a change of the package),
samples.svg, calibration data and captured statistics.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import files
from bench.criteria_points import Combination, Task, run_task
from bench.labelled import UNLABELLED, evaluate, recorded
from bench.recover_points import Job, run_job
from bench.recover_tables import figure, losses, plot, ways
from bench.workers import each
from rich.console import Console

Record = dict[str, Any]
# Cuts that anyone can have elsewhere: by weights and by what Wanda and activations say, layer by layer and globally.
PLAIN = [
    Combination(criterion, scope, "default", "none")
    for criterion in ("l2", "lamp", "activation", "wanda")
    for scope in ("local", "global")
]
_KEY = ("model", "share", "samples", *Combination._fields, "mode")


def measure(given: argparse.Namespace, paths: Sequence[Path], points: dict[tuple[Any, ...], Record]) -> None:
    """Whatever is missing, one job per model, share and number of samples."""
    jobs = []
    for path in paths:
        data = calibration(given, files.name(path))
        for samples in given.samples:
            for share in given.macs:
                own = (files.name(path), share, samples, *given.combine)
                missing = tuple(m for m in given.modes if (*own, m) not in points)
                if missing and data is not None:
                    cache = given.out / "cache"
                    jobs.append(Job(given.folder, path, data, given.combine, share, samples, missing, cache))
    with (given.out / "points.jsonl").open("a") as file:
        for job, found in each(run_job, jobs, given.jobs, given.timeout):
            for point in found.get("points") or [{"error": found.get("message"), "model": files.name(job.path)}]:
                print(json.dumps(point), file=file, flush=True)
                points[tuple(point.get(k) for k in _KEY)] = point
                print(
                    point["model"],
                    point.get("share"),
                    point.get("mode"),
                    point.get("error") or figure(point["metrics"]),
                )
            sys.stdout.flush()


def calibration(given: argparse.Namespace, name: str) -> Path | None:
    """Recorded inputs of a model, from the folder given or recorded now; None where that fails."""
    folders = [f for f in (given.calibration, given.out / "calibration") if f is not None]
    return recorded(given.folder, name, folders, max(given.samples))


def measure_plain(given: argparse.Namespace, paths: Sequence[Path], points: dict[tuple[Any, ...], Record]) -> None:
    """Cuts by plain criteria, nothing repaired."""
    tasks = []
    for path in paths:
        data = calibration(given, files.name(path))
        for combination in PLAIN if data is not None else []:
            own = (files.name(path), given.samples[0], *combination)
            missing = tuple(x for x in given.macs if _plain_key(*own, x) not in points)
            if missing:
                tasks.append(
                    Task(given.folder, path, data, given.samples[0], given.out / "cache", combination, missing)
                )
    with (given.out / "points.jsonl").open("a") as file:
        for task, found in each(run_task, tasks, given.jobs, given.timeout):
            for point in found.get("points") or []:
                print(json.dumps({**point, "mode": "plain"}), file=file, flush=True)
                points[tuple({**point, "mode": "plain"}.get(k) for k in _KEY)] = {**point, "mode": "plain"}
            print(files.name(task.path), task.combination, found.get("message", ""), flush=True)


def _plain_key(model: str, samples: int, *rest: Any) -> tuple[Any, ...]:
    *combination, share = rest
    return (model, share, samples, *combination, "plain")


def parsed() -> tuple[argparse.Namespace, list[Path]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words, numbers = (lambda text: tuple(text.split(","))), (lambda text: [float(x) for x in text.split(",")])
    parser.add_argument("folder", type=Path, help="folder with models/*.onnx and evaluate.py")
    parser.add_argument("--models", action="append", default=[], metavar="PATTERN", help="part of a name, or glob")
    parser.add_argument("--modes", type=words, default=("none", "full"))
    parser.add_argument("--macs", type=numbers, default=[0.7, 0.5, 0.3], help="shares to keep")
    parser.add_argument("--samples", type=lambda text: [int(x) for x in text.split(",")], default=[512])
    parser.add_argument(
        "--combine", type=words, default=("ziplm", "global", "none", "macs"), metavar="C,SCOPE,NORM,COST"
    )
    parser.add_argument("--plain", action="store_true", help="also cut by plain criteria, and say what share is lost")
    parser.add_argument("--unlabelled", action="store_true", help="also models that have no labels")
    parser.add_argument("--calibration", type=Path, help="folder with NAME.npz recorded before")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds per job")
    parser.add_argument("--out", type=Path, default=Path("bench_recover"), help="folder for what is written")
    parser.add_argument("--threads", type=int, default=0, help="of numpy (OMP_NUM_THREADS)")
    given = parser.parse_args()
    given.folder, given.combine = given.folder.resolve(), Combination(*given.combine)
    paths = files.find([given.folder / "models"], given.models)
    if not (given.folder / "evaluate.py").is_file() or not paths:
        parser.error(f"{given.folder}: needs evaluate.py and models/*.onnx that match {given.models or 'anything'}")
    return given, paths


def main() -> int:
    """Exit code 1 where nothing could be measured."""
    given, paths = parsed()
    if given.threads:
        os.environ.update({f"{x}_NUM_THREADS": str(given.threads) for x in ("OMP", "OPENBLAS", "MKL")})
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "points.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    points = {tuple(p.get(k) for k in _KEY): p for p in lines}
    first = {files.name(p): evaluate(given.folder, files.name(p), None) for p in paths}
    chosen = [p for p in paths if given.unlabelled or next(iter(first[files.name(p)])) != UNLABELLED]
    measure(given, chosen, points)
    if given.plain:
        measure_plain(given, chosen, points)
    console = Console()
    if not console.is_terminal:
        console.width = 190 if given.plain else 150
    baselines = {name: figure(metrics) for name, metrics in first.items()}
    found = [p for p in points.values() if p.get("samples") in given.samples and p.get("share") in given.macs]
    found = [p for p in found if p["model"] in first]
    plain = [p for p in found if p["mode"] == "plain"]
    asked = [p for p in found if tuple(p[k] for k in Combination._fields) == given.combine and p["mode"] in given.modes]
    console.print(ways(asked, given.modes, baselines, f"metric after a cut by {given.combine}, by way of recovery"))
    if given.plain:
        console.print(losses(asked, plain, baselines, given.modes[-1]))
    if len(given.samples) > 1:
        plot(asked, given.modes[-1], given.out / "samples.svg")
    return int(not any("metrics" in p for p in asked))


if __name__ == "__main__":
    sys.exit(main())
