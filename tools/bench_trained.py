"""Trained models: at ratio 0 each must give its baseline metric; at ratio 0.3 be cut exactly, or left with reasons.

python tools/bench_trained.py TRAINED                       a folder with models/*.onnx and evaluate.py
python tools/bench_trained.py TRAINED --only cifar10 --out trained.jsonl

``evaluate.py NAME --model FILE`` must print one JSON object of metrics, alone or after the name; it runs as a process
of its own. How peers do on the same files is a matter of ``bench_zoo.py TRAINED/models``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench import files
from bench.labelled import evaluate
from bench.workers import each
from rich.console import Console
from rich.table import Table

SAME = 1e-6  # a metric at ratio 0 against the baseline: nothing was computed differently


class Task(NamedTuple):
    """One model with the folder of its evaluate.py."""

    home: Path
    path: Path
    ratio: float


def run_task(task: Task) -> dict[str, Any]:
    """Baseline, the metric at ratio 0, the cut at the ratio and the metric after it; runs in a worker process."""
    from bench.onnxprune_run import cut

    from onnxprune import errors, prune

    name = files.name(task.path)
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        whole, small = Path(folder) / "whole.onnx", Path(folder) / "small.onnx"
        try:
            record["baseline"] = evaluate(task.home, name, None)
            prune(task.path, ratio=0.0, validate=False).save(whole)
            record["at_zero"] = evaluate(task.home, name, whole)
        except errors.BudgetError as error:  # nothing can be removed, so nothing is written and nothing can differ
            record["nothing"] = str(error)
        except Exception as error:
            record["zero_error"] = f"{type(error).__name__}: {error}"[:300]
        record |= cut(task.path, files.read(task.path), task.ratio, approximate=False, save=small)
        if small.exists():
            try:
                record["after"] = evaluate(task.home, name, small)
            except RuntimeError as error:
                record["after_error"] = str(error)
    return record


def unchanged(record: dict[str, Any]) -> bool:
    """Whether every metric at ratio 0 is the baseline's; models without anything to remove are not written at all."""
    if "nothing" in record:
        return True
    before, after = record.get("baseline"), record.get("at_zero")
    return bool(before and after) and all(abs(after[k] - v) <= SAME * max(1, abs(v)) for k, v in before.items())


def show(records: list[dict[str, Any]]) -> int:
    """The table. Returns 1 where a metric changed at ratio 0 or a cut failed."""
    console = Console()
    if not console.is_terminal:
        console.width = 170
    table = Table(title="Trained models")
    for column in (
        "model",
        "metric",
        "baseline",
        "ratio 0",
        "after",
        "parameters",
        "MACs",
        "exact",
        "status",
        "reason",
    ):
        table.add_column(column, overflow="fold")
    for record in records:
        table.add_row(*_row(record))
    console.print(table)
    same = sum(unchanged(r) for r in records)
    right = sum(r["status"] in ("cut", "small", "left") for r in records)
    cut = sum(r["status"] == "cut" for r in records)
    console.print(
        f"{len(records)} models: {same} keep their metric at ratio 0, {right} cut exactly or left with reasons, "
        f"{cut} lost more than 5 % of their parameters."
    )
    return int(same < len(records) or right < len(records))


def _row(record: dict[str, Any]) -> list[str]:
    metric, value = next(iter((record.get("baseline") or {"": float("nan")}).items()))
    zero = "not written" if "nothing" in record else _number(record.get("at_zero"), metric)
    reason = record.get("zero_error") or record.get("after_error") or record.get("message") or ""
    if not reason and record["status"] != "cut" and record.get("barriers"):
        reason = "{code}: {op}: {detail}".format(**record["barriers"][0])
    return [
        record["model"],
        metric,
        f"{value:.4g}",
        zero if unchanged(record) else f"[red]{zero}",
        _number(record.get("after"), metric),
        f"-{record.get('removed', 0):.1%}",
        f"-{record.get('macs_removed', 0):.1%}",
        f"{record['error']:.1e}" if "error" in record else "",
        record["status"],
        " ".join(reason.split())[:110],
    ]


def _number(metrics: dict[str, float] | None, key: str) -> str:
    return f"{metrics[key]:.4g}" if metrics else "-"


def main() -> int:
    """Exit code 1 where a model does not hold what is asked of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with models/*.onnx and evaluate.py")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="part of a name, or glob")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=900, help="seconds per model")
    parser.add_argument("--out", type=Path, help="JSON lines, one per model")
    given = parser.parse_args()
    paths = files.find([given.folder / "models"], given.only)
    if not (given.folder / "evaluate.py").is_file() or not paths:
        parser.error(
            f"{given.folder}: needs evaluate.py and models/*.onnx whose names match {given.only or 'anything'}"
        )
    records = []
    out = given.out.open("w") if given.out else None
    tasks = [Task(given.folder.resolve(), path.resolve(), given.ratio) for path in paths]
    for task, found in each(run_task, tasks, given.jobs, given.timeout):
        records.append({"model": files.name(task.path), **found})
        print(f"{records[-1]['model']:<32} {found['status']:<8} {found.get('total_seconds', 0):6.1f} s", flush=True)
        if out:
            print(json.dumps(records[-1]), file=out, flush=True)
    if out:
        out.close()
    return show(records)


if __name__ == "__main__":
    sys.exit(main())
