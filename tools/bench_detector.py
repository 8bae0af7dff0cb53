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
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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
    """Prune the model of a folder and watch the memory of the command.

    Returns:
        of the JSON report what matters here, with ``seconds``, ``processor_seconds`` and ``memory`` (bytes).
    """
    command = [sys.executable, "-m", "onnxprune", "prune", str(folder / "detector.onnx"), "--json"]
    command += ["--data", str(folder / "images.npz"), "-o", str(folder / "small.onnx"), "--effort", effort, *options]
    start, before = time.perf_counter(), _children()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = _Watch(process.pid)
    stdout, stderr = process.communicate()
    seconds = time.perf_counter() - start
    record = {"effort": effort, "seconds": seconds, "processor_seconds": _children() - before, "memory": watch.stop()}
    report = json.loads(stdout or "{}")
    if process.returncode:
        return record | {"error": report.get("error") or stderr[-300:]}
    return record | {
        key: report.get(key) for key in ("totals", "latency", "finetuning", "verdict", "left_out", "timings")
    }


class _Watch:
    """The largest anonymous memory of a process and its children, read ten times a second (Linux)."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._ended = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End and return bytes."""
        self._ended.set()
        self._thread.join()
        return self._peak

    def _read(self) -> None:
        while not self._ended.wait(0.1):
            self._peak = max(self._peak, sum(map(_anonymous, _family(self._pid))))


def _family(pid: int) -> list[int]:
    """A process and all that it started."""
    members = [pid]
    for member in members:
        try:
            text = Path(f"/proc/{member}/task/{member}/children").read_text()
        except OSError:
            continue
        members += map(int, text.split())
    return members


def _anonymous(pid: int) -> int:
    """Bytes of a process that no file stands for; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def _children() -> float:
    """Return the processor seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _row(record: dict[str, Any]) -> str:
    """Format one command's row."""
    start = f"| {record['effort']} | {record['seconds']:.0f} | {record['seconds'] / LIMITS[record['effort']]:.2f} "
    start += (
        f"| {record['processor_seconds']:.0f} | {record['memory'] / 1e9:.2f} | {record['memory'] / MOST_MEMORY:.2f} "
    )
    if "error" in record:
        return start + f"| failed: {str(record['error'])[:80]} | |"
    totals, latency = record["totals"], record["latency"] or {}
    low, high = latency.get("speedup_interval") or (float("nan"),) * 2
    speedup = latency.get("speedup") or float("nan")
    return start + f"| {totals['macs_after'] / totals['macs_before']:.2f} | {speedup:.2f} ({low:.2f} to {high:.2f}) |"


if __name__ == "__main__":
    main()
