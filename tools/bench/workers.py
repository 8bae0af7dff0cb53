"""Worker processes with a time limit per task: a crash or a hang costs one model, not the run."""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

Record = dict[str, Any]

TASKS_PER_WORKER = 25  # a fresh process now and then gives back what libraries keep in memory


class Worker:
    """One process that answers task after task."""

    def __init__(self, run: Callable[[Any], Record]) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(run, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Any = None
        self.started = 0.0
        self.left = TASKS_PER_WORKER

    def send(self, task: Any) -> None:
        self.pipe.send(task)
        self.task, self.started, self.left = task, time.monotonic(), self.left - 1

    def stop(self) -> int | None:
        """End the process. Returns its exit code where it had ended by itself."""
        self.process.join(0.5 if self.pipe.closed else 0)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return code


def _serve(run: Callable[[Any], Record], pipe: Connection) -> None:
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            record = run(task)
        except Exception as error:  # what a task does not foresee costs that task
            record = {"status": "crash", "type": type(error).__name__, "message": str(error)[:400]}
        pipe.send(record)


def each(run: Callable[[Any], Record], tasks: Iterable[Any], jobs: int, timeout: float) -> Iterator[tuple[Any, Record]]:
    """(task, record) as they finish.

    Args:
        run: task -> record, importable.
        timeout: seconds for one task. A task over it gives ``{"status": "timeout"}``; one that raises, or whose process
            dies, ``{"status": "crash"}``.
    """
    queue, workers = iter(tasks), set[Worker]()
    idle: list[Worker] = []
    more = True
    while more or workers:
        while more and len(workers) < jobs:
            try:
                task = next(queue)
            except StopIteration:
                more = False
                break
            worker = idle.pop() if idle else Worker(run)
            worker.send(task)
            workers.add(worker)
        for worker, record in _finished(workers, timeout):
            workers.discard(worker)
            yield worker.task, record
            if record.get("status") in ("timeout", "crash") or worker.left <= 0:
                worker.stop()
            else:
                idle.append(worker)
    for worker in idle:
        worker.stop()


def _finished(workers: set[Worker], timeout: float) -> list[tuple[Worker, Record]]:
    """Workers that answered, died or ran out of time, after waiting for the next such event."""
    if not workers:
        return []
    now = time.monotonic()
    first = min(w.started for w in workers)
    ready = set(wait([w.pipe for w in workers], max(0.0, first + timeout - now)))
    done = []
    for worker in workers:
        seconds = time.monotonic() - worker.started
        if worker.pipe in ready:
            try:
                done.append((worker, worker.pipe.recv()))
            except (EOFError, ConnectionError):
                worker.process.join(5)
                message = f"the process died with exit code {worker.process.exitcode}"
                done.append((worker, {"status": "crash", "message": message, "total_seconds": round(seconds, 2)}))
        elif seconds >= timeout:
            message = f"no answer within {timeout:g} s"
            done.append((worker, {"status": "timeout", "message": message, "total_seconds": round(seconds, 2)}))
    return done
