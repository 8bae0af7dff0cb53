"""How long analysis and cut take without validation and files: beside torch-pruning, by number of nodes; and memory.

python tools/bench_speed.py                        six architectures of torchvision, and generated depths
python tools/bench_speed.py --only resnet50 --profile
python tools/bench_speed.py --no-architectures     the generated graphs only; needs nothing beyond onnxprune
python tools/bench_speed.py --memory               peak resident memory on a generated model of 4 GB (disk: about 7 GB)

Everything runs on one thread. Seconds are of processor time, which other programs disturb least (single stages: of the
clock); a time is the best of ``--repeats`` runs. torch-pruning's is its graph build plus its prune step on the torch
module, onnxprune's the analysis of the file's bytes, scoring, cut and reading every weight of the result.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.workers import each
from rich.console import Console
from rich.table import Table

ARCHITECTURES = ("resnet50", "densenet121", "mobilenet_v2", "vit_b_16", "convnext_tiny", "swin_t")
NODES = (100, 1_000, 10_000, 100_000)
PEER = "torch-pruning"


class Task(NamedTuple):
    """One measurement in a process of its own."""

    tool: str
    name: str
    ratio: float
    repeats: int
    profile: bool = False


def cut_seconds(data: bytes, ratio: float) -> dict[str, Any]:
    """Analysis and cut of a model's bytes with every resulting weight read. Seconds by stage and in all."""
    from onnxprune import Pipeline
    from onnxprune.passes import Prune

    start = time.process_time()
    result = Pipeline([Prune(ratio=ratio)]).run(data)
    middle = time.process_time()
    for weight in result.final.weights.values():
        weight.read()
    done = time.process_time()
    totals = result.report.totals
    stages = {**result.report.seconds, "read": done - middle}
    removed = 1 - totals.params_after / totals.params_before
    return {"seconds": done - start, "stages": stages, "removed": removed}


def best(data: bytes, task: Task) -> dict[str, Any]:
    """The fastest of the runs, after one that is not counted; with the profile of one more where asked."""
    cut_seconds(data, task.ratio)
    record = min((cut_seconds(data, task.ratio) for _ in range(task.repeats)), key=lambda r: float(r["seconds"]))
    if task.profile:
        profile = cProfile.Profile()
        profile.runcall(cut_seconds, data, task.ratio)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(45)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    return record


def run_task(task: Task) -> dict[str, Any]:
    """One record; runs in a worker process."""
    try:
        if task.tool == PEER:
            from bench.torch_models import torch_pruning_seconds

            return {"status": "ok", **torch_pruning_seconds(task.name, task.ratio, task.repeats)}
        if task.name.isdecimal():
            from bench.generated import residual

            data = residual(int(task.name)).SerializeToString()
            return {"status": "ok", "nodes": int(task.name), **best(data, task)}
        from bench.torch_models import export

        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            export(task.name, Path(folder) / "model.onnx")
            return {"status": "ok", **best((Path(folder) / "model.onnx").read_bytes(), task)}
    except Exception as error:  # a tool's failure is a result
        return {"status": "failed", "message": f"{type(error).__name__}: {error}"[:200]}


def architectures(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """The table against torch-pruning."""
    names = [n for n in ARCHITECTURES if not given.only or any(p in n for p in given.only)]
    tasks = [Task(tool, n, given.ratio, given.repeats, given.profile) for n in names for tool in ("onnxprune", PEER)]
    if given.no_peer:
        tasks = [t for t in tasks if t.tool != PEER]
    found = {(t.tool, t.name): r for t, r in each(run_task, tasks, 1, given.timeout)}
    table = Table(title=f"Analysis and cut at ratio {given.ratio}, one thread", min_width=100)
    for column in ("model", "onnxprune s", "of it", "removed", f"{PEER} s", "removed", "times faster"):
        table.add_column(column, justify="left" if column in ("model", "of it") else "right")
    for name in names:
        ours, theirs = found["onnxprune", name], found.get((PEER, name), {"status": "not run"})
        faster = theirs["seconds"] / ours["seconds"] if theirs["status"] == ours["status"] == "ok" else None
        table.add_row(name, *_cells(ours), *_peer_cells(theirs, given.timeout), f"{faster:.1f}" if faster else "")
    console.print(table)
    return [{"tool": tool, "name": name, **record} for (tool, name), record in found.items()]


def _cells(record: dict[str, Any]) -> list[str]:
    if record["status"] != "ok":
        return [record["status"], record.get("message", ""), ""]
    stages = " ".join(f"{k} {v:.2f}" for k, v in record["stages"].items())
    return [f"{record['seconds']:.3f}", stages, f"{record['removed']:.1%}"]


def _peer_cells(record: dict[str, Any], timeout: float) -> list[str]:
    if record["status"] == "ok":
        return [f"{record['seconds']:.2f}", f"{record['removed']:.1%}"]
    return [f"none after {timeout:g}" if record["status"] == "timeout" else record.get("message", record["status"]), ""]


def depths(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Time per node of generated graphs: flat where cost is linear."""
    tasks = [
        Task("onnxprune", str(n), given.ratio, 1 if n > 10_000 else given.repeats, given.profile) for n in given.nodes
    ]
    table = Table("nodes", "s", "µs per node", "of it", title="Generated residual graphs")
    records = []
    for task, record in each(run_task, tasks, 1, max(given.timeout, 600)):
        per_node = f"{record['seconds'] / int(task.name) * 1e6:.0f}" if record["status"] == "ok" else ""
        seconds, stages, _ = _cells(record)
        table.add_row(f"{int(task.name):,}", seconds, per_node, stages)
        records.append({"tool": "onnxprune", "name": task.name, **record})
    console.print(table)
    return records


_CHILD = """
import json, resource, sys, time
import onnxprune
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.perf_counter()
onnxprune.prune(sys.argv[1], ratio=float(sys.argv[3]), validate=sys.argv[4] == "True", latency=False).save(sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "idle": idle, "seconds": time.perf_counter() - start}))
"""


def memory(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Peak resident memory of a whole run on a model with external data, written included, in a process of its own."""
    from bench.generated import feed_forward

    records = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.folder) as folder:
        model, target = Path(folder) / "large.onnx", Path(folder) / "small.onnx"
        size = feed_forward(model, given.gigabytes)
        for validate in (False, True):
            command = [sys.executable, "-c", _CHILD, str(model), str(target), str(given.ratio), str(validate)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                console.print(f"failed: {done.stderr[-600:]}")
                records.append(
                    {"name": "memory", "validate": validate, "status": "failed", "message": done.stderr[-600:]}
                )
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            console.print(
                f"{size / 2**30:.2f} GiB of weights, {'with' if validate else 'without'} validation: peak "
                f"{found['peak'] / 2**30:.2f} GiB = {found['peak'] / size:.2f} x the weights, {found['seconds']:.1f} s"
            )
            records.append({"name": "memory", "validate": validate, "status": "ok", "bytes": size, **found})
    return records


def main() -> int:
    """Exit code 1 where a measurement of onnxprune failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="architectures whose name has it")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one tool on one architecture")
    parser.add_argument("--nodes", type=int, nargs="*", default=NODES, help="sizes of the generated graphs")
    parser.add_argument("--no-architectures", action="store_true")
    parser.add_argument("--no-peer", action="store_true", help="leave torch-pruning out")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, on stderr")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the generated model (GiB)")
    parser.add_argument("--folder", type=Path, help="where the generated model is written (default: temporary files)")
    parser.add_argument("--out", type=Path, help="JSON lines, one per measurement")
    given = parser.parse_args()
    os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")})  # for the workers
    console = Console()
    if not console.is_terminal:
        console.width = 150
    if given.memory:
        records = memory(given, console)
    else:
        records = [] if given.no_architectures else architectures(given, console)
        records += depths(given, console)
    if given.out:
        given.out.write_text("".join(json.dumps(r) + "\n" for r in records))
    return int(any(r["status"] != "ok" for r in records if r.get("tool") != PEER))


if __name__ == "__main__":
    sys.exit(main())
