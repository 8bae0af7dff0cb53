"""How long and how much memory a budget takes for a detector of 3 M parameters at 640 px with 64 images.

python tools/bench_detector.py                          default options, then --effort quick
python tools/bench_detector.py --side 320 --images 16   smaller
python tools/bench_detector.py --options "--finetune none"

The model has random weights (``tools/bench/detector.py``), so times and memory are what it is for, not accuracy.
Limits: 10 minutes and 2 minutes on two idle cores, 2 GB of memory that belongs to processes alone (anonymous).
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench.command import run_command, speed
from bench.detector import detector, normalise, scenes

LIMITS = {"normal": 600, "quick": 120}
"""Seconds."""
MOST_MEMORY = 2 * 2**30
"""Bytes."""


def main() -> None:
    """Make the model and its images, run both commands and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=640, help="of an image in pixels, a multiple of 32")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--target", default="macs=0.8")
    parser.add_argument("--effort", choices=LIMITS, action="append", help="one of the two commands alone")
    parser.add_argument("--options", default="", help="further options of onnxprune, in one text")
    parser.add_argument("--out", type=Path, help="JSON lines, one per command, with times of every stage")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        model, images = detector(given.side), scenes(given.images, given.side)
        normalise(model, images[:1])
        onnx.save(model, folder / "detector.onnx")
        np.savez(folder / "images.npz", images=images)
        del model, images
        print("| effort | seconds | of limit | processor seconds | memory, GB | of limit | MACs left | times as fast |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|")
        for effort in given.effort or LIMITS:
            record = run(folder, effort, ["--target", given.target, *shlex.split(given.options)])
            print(_row(record), flush=True)
            if given.out:
                with given.out.open("a") as file:
                    print(json.dumps(record), file=file)


def run(folder: Path, effort: str, options: list[str]) -> dict[str, Any]:
    """Prune the model of a folder; return times and memory, and of the report what matters here."""
    arguments = ["prune", str(folder / "detector.onnx"), "--data", str(folder / "images.npz")]
    record, report = run_command([*arguments, "-o", str(folder / "small.onnx"), "--effort", effort, *options])
    keys = ("totals", "latency", "finetuning", "verdict", "left_out", "timings")
    return {"effort": effort, **record, **{key: report.get(key) for key in keys}}


def _row(record: dict[str, Any]) -> str:
    """Format one command's row."""
    start = f"| {record['effort']} | {record['seconds']:.0f} | {record['seconds'] / LIMITS[record['effort']]:.2f} "
    start += (
        f"| {record['processor_seconds']:.0f} | {record['memory'] / 1e9:.2f} | {record['memory'] / MOST_MEMORY:.2f} "
    )
    if "error" in record:
        return start + f"| failed: {str(record['error'])[:80]} | |"
    totals = record["totals"]
    return start + f"| {totals['macs_after'] / totals['macs_before']:.2f} | {speed(record['latency'])} |"


if __name__ == "__main__":
    main()
