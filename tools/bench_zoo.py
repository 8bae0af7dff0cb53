"""Cut every model of a folder and count: cut and exact, left with reasons, failed. Peers run where they are installed.

python tools/bench_zoo.py ZOO                                     a folder of *.onnx.gz with its zoo.py, or of *.onnx
python tools/bench_zoo.py ZOO --only tv_ --out zoo.jsonl          models whose name contains tv_ (or glob)
python tools/bench_zoo.py ZOO --torch-pruning-csv ZOO/torch_pruning_1.6.1.csv    compare with recorded results
python tools/bench_zoo.py --summary zoo.jsonl                     the tables of an earlier run
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from bench import files, peers, zoo_tables
from bench.workers import each

OURS, APPROXIMATE, ROUNDED = zoo_tables.OURS, zoo_tables.APPROXIMATE, zoo_tables.ROUNDED
ONNXSIM, TORCH = "onnxsim", "torch-pruning"


class Task(NamedTuple):
    """One model for one tool."""

    tool: str
    path: Path
    ratio: float


def run_task(task: Task) -> dict[str, Any]:
    """One record; runs in a worker process."""
    from bench.onnxprune_run import cut, feed_for

    from onnxprune import analyze

    model = files.read(task.path)
    record: dict[str, Any] = {"parameters": files.parameters(model), "nodes": len(model.graph.node)}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        if task.tool != ONNXSIM:
            return record | cut(path, model, task.ratio, task.tool != OURS, round_up=task.tool == ROUNDED)
        try:
            found = peers.onnxsim_cut(model, task.ratio, feed_for(path, analyze(path)))
        except Exception as error:  # a peer's failure is a result
            return record | {"status": "failed", "message": f"{type(error).__name__}: {error}"[:300]}
        works = found["runs"] and found["exact"] is not False
        status = "wrong" if not works else "cut" if found["removed"] > 0.05 else "small"
        return record | found | {"status": status}


def measure(given: argparse.Namespace, paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Records as they come: every model with every tool.

    Where a peer took more, once more with --approximate, and where it still did, with the peer's rounding as well.
    """
    tools = [OURS, *([ONNXSIM] if given.onnxsim and peers.have_onnxsim() else [])]
    recorded = peers.torch_pruning_results(given.torch_pruning_csv) if given.torch_pruning_csv else {}
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for path in paths:
        name = files.name(path)
        if found := recorded.get(name.rsplit("__", 1)[0]):
            yield {"model": name, "family": files.family(path), "tool": TORCH, **found}
            theirs[name] = found["removed"] if found["exact"] else 0.0
    tasks = [Task(tool, path, given.ratio) for path in paths for tool in tools]
    for task, record in each(run_task, tasks, given.jobs, given.timeout):
        name = files.name(task.path)
        if task.tool == OURS:
            ours[name] = record.get("removed", 0.0)
        elif record["status"] in ("cut", "small"):
            theirs[name] = max(theirs.get(name, 0.0), record["removed"])
        yield {"model": name, "family": files.family(task.path), "tool": task.tool, **record}
    for tool in (APPROXIMATE, ROUNDED):
        behind = {n for n, share in theirs.items() if share > ours.get(n, 0.0) + zoo_tables.SLACK}
        again = [Task(tool, p, given.ratio) for p in paths if files.name(p) in behind]
        for task, record in each(run_task, again, given.jobs, given.timeout):
            name = files.name(task.path)
            ours[name] = max(ours.get(name, 0.0), record.get("removed", 0.0))
            yield {"model": name, "family": files.family(task.path), "tool": tool, **record}


def show_progress(record: dict[str, Any]) -> None:
    share = f"{record['removed']:6.1%}" if "removed" in record else "      "
    seconds = f"{record.get('total_seconds', 0):6.1f} s"
    message = " ".join(str(record.get("message", "")).split())[:90] if record["status"] not in ("cut", "small") else ""
    print(f"{record['model']:<44} {record['tool']:<24} {record['status']:<8} {share} {seconds}  {message}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of *.onnx or *.onnx.gz")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="part of a name, or a glob; repeatable"
    )
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--jobs", type=int, default=2, help="worker processes, each with one thread")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per model and tool")
    parser.add_argument("--out", type=Path, help="JSON lines, one per model and tool")
    parser.add_argument("--torch-pruning-csv", type=Path, help="recorded results of torch-pruning")
    parser.add_argument("--no-onnxsim", dest="onnxsim", action="store_false", help="leave onnxsim out though installed")
    parser.add_argument("--summary", type=Path, metavar="JSONL", help="print the tables of an earlier run")
    given = parser.parse_args()
    if not given.summary and not given.folders:
        parser.error("name a folder of models")
    for folder in given.folders:
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    return given


def main() -> int:
    """Exit code 1 where a model failed, so that a script can stop on it."""
    given = arguments()
    if given.summary:
        records = [json.loads(line) for line in given.summary.read_text().splitlines()]
        return zoo_tables.show(records)
    paths = files.find(given.folders, given.only)
    if not paths:
        print(f"error: no model in {', '.join(map(str, given.folders))} matches {given.only}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    records = []
    out = given.out.open("w") if given.out else None
    for record in measure(given, paths):
        records.append(record)
        if record["tool"] != TORCH:
            show_progress(record)
        if out:
            print(json.dumps(record), file=out, flush=True)
    if out:
        out.close()
    return zoo_tables.show(records)


if __name__ == "__main__":
    sys.exit(main())
