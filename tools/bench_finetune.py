"""Fine-tuning on trained models: the metric of the closed form, and after training, as a mean over seeds.

python tools/bench_finetune.py TRAINED                              the table of docs/methods/finetune.md
python tools/bench_finetune.py TRAINED --case cifar10_resnet20:0.5:2560 --effort 600 --seeds 0,1,2

TRAINED holds models/*.onnx and evaluate.py, see tools/bench/labelled.py; inputs to train on are those that
``evaluate.py --record`` gives, never the ones measured on, and have no labels. Channels are chosen by a budget of MACs,
in any number (``--round-to 1``), without factorized layers, and recovered in closed form; every seed trains the same
pruned model. Everything goes into --out: points.jsonl (points that are there are not measured again: delete it after a
change of the package), pruned models and calibration data. The metrics are looked at for the table alone: training sees
its hold-out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench import files
from bench.labelled import evaluate, limit, recorded
from bench.recover_tables import figure
from bench.workers import each
from rich.console import Console
from rich.table import Table

CASES = (
    "cifar10_resnet20:0.3:512",
    "cifar10_resnet20:0.3:2560",
    "cifar10_resnet20:0.5:2560",
    "cifar10_resnet56:0.3:2560",
    "cifar10_mlperf_resnet8:0.5:2560",
    "mlperf_kws_dscnn:0.5:100000",
    "imagenet_mobilenet_v2_tf2:0.75:790",
    "imagenet_mobilenet_v1_050_160:0.75:790",
    "kwt1_keyword_transformer:0.5:100000",
    "yolox_nano:0.8:100000",
)


class Job(NamedTuple):
    """One model pruned to a share of its MACs from so many inputs, then trained with every seed that is missing."""

    home: Path
    path: Path
    data: Path
    share: float
    samples: int
    effort: str
    seeds: tuple[int, ...]
    out: Path


def run_job(job: Job) -> dict[str, Any]:
    """``{"points": [...]}``, the closed form first; runs in a worker process."""
    import onnxprune as op

    name = files.name(job.path)
    own = {"model": name, "share": job.share, "samples": job.samples, "effort": job.effort}
    given: dict[str, Any] = {"data": job.data, "samples": limit(job.data, job.samples)}
    stem = f"{name}-{job.share:g}-{job.samples}"
    small, plan = job.out / f"{stem}.onnx", job.out / f"{stem}.plan.json"
    try:
        if not small.exists():
            _prune(job, given, small, plan)
        points = [{**own, "seed": -1, "metrics": evaluate(job.home, name, small)}]
        for seed in job.seeds:
            start = time.process_time()
            result = op.finetune(job.path, small, plan=plan, finetune=job.effort, seed=seed, **given)
            used, facts = time.process_time() - start, result.report.finetuning
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                target = Path(folder) / "trained.onnx"
                result.save(target)
                metrics = evaluate(job.home, name, target)
            told = {"steps": facts.steps, "undone": facts.undone, "held_out": facts.after.points}
            points.append({**own, "seed": seed, "metrics": metrics, "processor_s": round(used, 1), **told})
    except Exception as error:  # a model that cannot be trained is a result
        return {"points": [{**own, "error": " ".join(str(error).split())[:300]}]}
    return {"points": points}


def _prune(job: Job, given: dict[str, Any], small: Path, plan: Path) -> None:
    import onnxprune as op

    channels_alone = {"round_to": 1, "factorize": False, "finetune": "none"}
    result = op.prune(job.path, target={"macs": job.share}, latency=False, **channels_alone, **given)
    result.save(small)
    result.plan.save(plan)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with models/*.onnx and evaluate.py")
    parser.add_argument("--case", action="append", default=[], metavar="MODEL:SHARE:SAMPLES")
    parser.add_argument("--effort", default="auto", help="steps or time, as --finetune takes them")
    parser.add_argument("--seeds", type=lambda text: tuple(int(x) for x in text.split(",")), default=(0, 1, 2))
    parser.add_argument("--timeout", type=float, default=7200, help="seconds per case")
    parser.add_argument("--out", type=Path, default=Path("bench_finetune"), help="folder for what is written")
    given = parser.parse_args()
    given.folder, given.cases = given.folder.resolve(), given.case or CASES
    return given


def jobs(given: argparse.Namespace, known: set[tuple[Any, ...]]) -> list[Job]:
    """Whatever is missing, one job per case."""
    result = []
    for case in given.cases:
        name, share, samples = case.split(":")
        path, size = given.folder / "models" / f"{name}.onnx", int(samples)
        seeds = tuple(s for s in given.seeds if (name, float(share), size, given.effort, s) not in known)
        folder = given.out / f"calibration-{size}"
        data = recorded(given.folder, name, [folder], size) if seeds and path.is_file() else None
        if data is not None:
            result.append(Job(given.folder, path, data, float(share), size, given.effort, seeds, given.out))
    return result


def table(points: list[dict[str, Any]], baselines: dict[str, float]) -> Table:
    """One row per case."""
    shown = Table(title="metric after fine-tuning, mean over seeds")
    for name in ("model", "MACs", "inputs", "original", "closed form", "trained", "worst", "best", "steps", "undone"):
        shown.add_column(name, justify="left" if name == "model" else "right")
    cases = dict.fromkeys((p["model"], p["share"], p["samples"], p["effort"]) for p in points if "metrics" in p)
    for case in cases:
        own = [p for p in points if (p["model"], p["share"], p["samples"], p["effort"]) == case and "metrics" in p]
        start = next(figure(p["metrics"]) for p in own if p["seed"] < 0)
        ends = [figure(p["metrics"]) for p in own if p["seed"] >= 0]
        figures = [baselines[case[0]], start, sum(ends) / len(ends), min(ends), max(ends)] if ends else [start]
        steps = [str(round(sum(p["steps"] for p in own if "steps" in p) / max(1, len(ends))))]
        undone = str(sum(p.get("undone", False) for p in own))
        shown.add_row(case[0], f"{case[1]:g}", str(case[2]), *(f"{x:.4f}" for x in figures), *steps, undone)
    return shown


def main() -> int:
    """Exit code 1 where nothing could be measured."""
    given = parsed()
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "points.jsonl"
    points = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    known = {(p["model"], p["share"], p["samples"], p["effort"], p.get("seed")) for p in points}
    with log.open("a") as file:
        for job, found in each(run_job, jobs(given, known), 1, given.timeout):
            new = found.get("points") or [{"model": files.name(job.path), "error": found.get("message")}]
            for point in new:
                print(json.dumps(point), file=file, flush=True)
                print(point, flush=True)
            points += new
    measured = [p for p in points if "metrics" in p]
    baselines = {name: figure(evaluate(given.folder, name, None)) for name in {p["model"] for p in measured}}
    console = Console()
    if not console.is_terminal:
        console.width = 150
    console.print(table(measured, baselines))
    return int(not measured)


if __name__ == "__main__":
    sys.exit(main())
