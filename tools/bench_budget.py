"""Do budgets keep more than the same ratio everywhere, and is predicted time what the clock says? Trained models.

python tools/bench_budget.py TRAINED                                      accuracy at MACs 0.5 with repair
python tools/bench_budget.py TRAINED --part latency --models cifar10_resnet56    latency=0.6, predicted and measured
python tools/bench_budget.py TRAINED --part search --models cifar10_resnet56     how long a search takes

TRAINED is a folder with ``models/*.onnx`` and an ``evaluate.py``, see ``tools/bench/labelled.py``. ``accuracy`` cuts
every model with labels to a share of its MACs: uniformly (the same share of every group), as ``onnxprune --target``
does, and as it does with ``--factorize`` (columns ``_f``); all are scored by the same criterion and repaired from the
same inputs. ``latency`` asks for a share of the time of one run, measures a table, and holds both its predictions and
the result against the clock. ``search`` times the choice of counts with sensitivities, measured and then kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench import files
from bench.labelled import UNLABELLED, evaluate, limit, recorded
from rich.console import Console
from rich.table import Table

from onnxprune.errors import OnnxpruneError
from onnxprune.io.write import save
from onnxprune.pipeline import Context, Model, RunSettings
from onnxprune.search import evaluation
from onnxprune.search.budget import Budget, Search
from onnxprune.search.evaluation import Evaluation, points_of_original
from onnxprune.search.latency import latency_table, rewritable_sizes
from onnxprune.search.spec import BudgetSpec
from onnxprune.targets import parse

CONVOLUTIONS = ("Conv", "ConvTranspose", "FusedConv")


def metric(given: argparse.Namespace, name: str, tried: Evaluation | None) -> float:
    """The first metric that evaluate.py prints, in per cent where it is a share."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        target = None
        if tried is not None:
            target = Path(folder) / "cut.onnx"
            save(*tried.model.parts, target)
        found = next(iter(evaluate(given.folder, name, target).values()))
    return 100 * found if 0 <= found <= 1 else found


def searching(
    given: argparse.Namespace, path: Path, target: str, sensitivity: str | None = None, *, factorize: bool = False
) -> Search:
    """A search on one model."""
    name = files.name(path)
    data = recorded(given.folder, name, given.data, given.samples)
    samples = None if data is None else limit(data, given.samples)
    context = Context.of(
        path, RunSettings(data=data, samples=samples, threads=given.threads, cache=given.out / "cache")
    )
    spec = BudgetSpec.of(target, sensitivity=sensitivity, jobs=given.jobs, factorize=factorize, trials=given.trials)
    mode = "none" if data is None else "full"
    budget = Budget(spec, given.criterion, recover=mode)
    prune = budget.prune(context)
    analysis = prune.prepared(context, Model.of(context.analysis))
    return Search(context, analysis, spec, prune, mode, points_of_original(analysis, spec.metric))


def accuracy(given: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Uniform and budget at one share of the MACs, both repaired in full."""
    name = files.name(path)
    search = searching(given, path, f"macs={given.macs}", given.sensitivity)
    start, work = time.perf_counter(), time.process_time()
    problem = search.problem(search.spec.targets)
    found = search.within(problem)
    seconds, work = time.perf_counter() - start, time.process_time() - work
    alike = next(a for a in problem.candidates() if a.name == "uniform" or len(problem.candidates()) == 1)
    other = evaluation.evaluate(search.context, problem.analysis, alike.removed, mode=search.mode)
    whole = problem.originals["macs"]
    before, uniform, budget = (metric(given, name, x) for x in (None, other, found.final))
    lost = before - uniform
    return {
        "before": before,
        "uniform": uniform,
        "budget": budget,
        "recovered": (budget - uniform) / lost if lost > 0 else None,
        **_apart(given, path, before, uniform),
        "macs_uniform": alike.costs["macs"] / whole,
        "macs": found.best.costs["macs"] / whole,
        "answer": found.best.name,
        "gap": found.best.allocation.gap if np.isfinite(found.best.allocation.bound) else None,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(work, 1),
    }


def _apart(given: argparse.Namespace, path: Path, before: float, uniform: float) -> dict[str, Any]:
    """The same budget where layers may be taken apart as well."""
    search = searching(given, path, f"macs={given.macs}", given.sensitivity, factorize=True)
    start = time.perf_counter()
    problem = search.problem(search.spec.targets)
    found = search.within(problem)
    seconds, both = time.perf_counter() - start, metric(given, files.name(path), found.final)
    lost = before - uniform
    return {
        "factorize": both,
        "recovered_f": (both - uniform) / lost if lost > 0 else None,
        "macs_f": found.best.costs["macs"] / problem.originals["macs"],
        "answer_f": found.best.name,
        "seconds_f": round(seconds, 1),
    }


def latency(given: argparse.Namespace, path: Path) -> dict[str, Any]:
    """A share of the time of one run: errors of the table, and what was reached."""
    search = searching(given, path, f"latency={given.latency}")
    layers = search.analysis.layers
    share = sum(x.macs_before for x in layers if x.op in CONVOLUTIONS) / max(1, sum(x.macs_before for x in layers))
    if share < 0.5:
        return {"error": "not convolutional"}
    table = latency_table(search.context, rewritable_sizes(search.analysis), seconds=given.seconds)
    problem = search.problem(search.spec.targets)
    reach = search.problem([parse("macs=0.5")]).candidates()
    record: dict[str, Any] = {"ms": 1e3 * table.seconds, "table_error": table.error, "macs_half": bool(reach)}
    answers = problem.candidates()
    if not answers:
        return record | {"error": f"least: latency={problem.reachable('latency') / problem.base('latency'):.3f}"}
    answer = answers[0]
    predicted = float(problem.costs["latency"].rows(answer.allocation.kept[None])[0, 0])
    measured = problem.measured(answer.allocation.kept, answer.removed)["latency"]
    return record | {
        "predicted": predicted / problem.base("latency"),
        "reached": measured / problem.base("latency"),
        "error_at_answer": abs(predicted - measured) / measured,
        "uniform_reached": next(
            (a.costs["latency"] / problem.base("latency") for a in answers if a.name == "uniform"), None
        ),
    }


def search(given: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Wall and processor seconds of a search, sensitivities measured and then kept; the last repair aside."""
    record: dict[str, Any] = {}
    for what in ("measured", "kept"):
        one = searching(given, path, f"macs={given.macs}", "measure")
        start, work = time.perf_counter(), time.process_time()
        problem = one.problem(one.spec.targets)
        found = one.within(problem)
        record |= {
            f"{what}_s": round(time.perf_counter() - start, 1),
            f"{what}_cpu_s": round(time.process_time() - work, 1),
            f"{what}_answer": found.best.name,
        }
    return record


PARTS = {"accuracy": accuracy, "latency": latency, "search": search}


def show(part: str, records: list[dict[str, Any]]) -> None:
    """One row per model."""
    console = Console()
    if not console.is_terminal:
        console.width = 170
    heads = list(dict.fromkeys(key for record in records for key in record if key != "part"))
    table = Table(*heads, title=part, box=None)
    for record in records:
        table.add_row(*(_cell(record.get(head)) for head in heads))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return "" if value is None else str(value)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=PARTS, default="accuracy")
    parser.add_argument("--models", action="append", default=[], help="names or globs; repeatable")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--latency", type=float, default=0.6)
    parser.add_argument("--criterion", default=None)
    parser.add_argument("--sensitivity", choices=["measure"], default=None)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60.0, help="to measure a latency table")
    parser.add_argument("--threads", type=int, default=1, help="when time is measured")
    parser.add_argument("--trials", type=int, default=None, help="answers to try around the best cut")
    parser.add_argument("--jobs", type=int, default=2, help="processes to measure sensitivities in")
    parser.add_argument("--data", action="append", type=Path, default=[], help="folders with recorded inputs NAME.npz")
    parser.add_argument("--out", type=Path, default=Path("bench_budget"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    given.data.append(given.out / "inputs")
    return given


def main() -> int:
    given = parsed()
    log = given.out / f"{given.part}.jsonl"
    records = []
    for path in files.find([given.folder / "models"], given.models):
        name = files.name(path)
        if given.part == "accuracy" and next(iter(evaluate(given.folder, name, None))) == UNLABELLED:
            continue
        try:
            found = PARTS[given.part](given, path)
        except OnnxpruneError as error:
            found = {"error": error.message[:90]}
        records.append({"model": name, **found})
        with log.open("a") as file:
            file.write(json.dumps(records[-1] | {"part": given.part}) + "\n")
        print(json.dumps(records[-1]), file=sys.stderr)
    show(given.part, records)
    return int(not any("error" not in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
