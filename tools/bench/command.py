"""A command of onnxprune as a user gives it: its report, its times and its memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run_command(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run ``onnxprune ARGUMENTS --json`` in a process of its own.

    Returns:
        ``seconds``, ``processor_seconds`` and ``memory`` (anonymous, bytes at most), and ``error`` where it failed; and
        its report, empty where there is none.
    """
    command = [sys.executable, "-m", "onnxprune", *arguments, "--json"]
    start, before = time.perf_counter(), _children()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = _Watch(process.pid)
    stdout, stderr = process.communicate()
    record: dict[str, Any] = {"seconds": time.perf_counter() - start, "memory": watch.stop()}
    record["processor_seconds"] = _children() - before
    report: dict[str, Any] = json.loads(stdout or "{}")
    if process.returncode:
        record["error"] = report.get("error") or stderr[-300:]
    return record, report


def speed(latency: Mapping[str, Any] | None) -> str:
    """Format how many times as fast a model is, with its interval."""
    latency = latency or {}
    low, high = latency.get("speedup_interval") or (float("nan"),) * 2
    return f"{latency.get('speedup') or float('nan'):.2f} ({low:.2f} to {high:.2f})"


class _Watch:
    """The largest anonymous memory of a process and all that it started, read ten times a second (Linux)."""

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
    """A process and all that it started, from any of its threads."""
    members = [pid]
    for member in members:
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += map(int, path.read_text().split())
            except OSError:  # the thread has ended
                continue
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
