"""Every criterion on every model, from Python and from the command line: what is cut, what is refused, what breaks.

python tools/sweep_criteria.py TRAINED/models --calibration FOLDER              data: FOLDER/NAME.npz
python tools/sweep_criteria.py models --criteria wanda,obs --scope global       synthetic models: criteria of weights

A model without data gets the criteria that need none. The table has, per model and criterion, the share of parameters
that is left, or the exit code of a refusal, whose messages follow the table. Broken is: an error that nobody foresaw,
an exit code or a message that differs between the two ways, a refusal without a next step. Exit code 1 where there is
one.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from bench import files
from bench.labelled import limit
from bench.workers import each
from rich.console import Console
from rich.table import Table

from onnxprune.importance import criteria

Record = dict[str, Any]
BROKEN = "BROKEN"
INTERNAL = "InternalError"


class Task(NamedTuple):
    """One model, one criterion, one way to ask for it (``python`` or ``command``)."""

    path: Path
    data: Path | None
    criterion: str
    way: str
    ratio: float
    scope: str
    samples: int
    validate: bool


def run_task(task: Task) -> Record:
    """The outcome: ``exit`` 0 and ``left``, else an ``exit`` code with ``kind``, ``message`` and ``hint``."""
    samples = limit(task.data, task.samples) if task.data else None
    return by_command(task, samples) if task.way == "command" else by_python(task, samples)


def by_python(task: Task, samples: int | None) -> Record:
    from onnxprune import OnnxpruneError, prune

    options: dict[str, Any] = {} if task.data is None else {"data": task.data, "samples": samples}
    try:
        result = prune(
            task.path,
            criterion=task.criterion,
            ratio=task.ratio,
            scope=task.scope,
            validate=task.validate,
            latency=False,
            recover="none",
            **options,
        )
    except OnnxpruneError as error:
        return refusal(error.exit_code, type(error).__name__, error.message, error.hint)
    except Exception as error:
        return refusal(3, INTERNAL, f"{type(error).__name__}: {error}", "")
    totals = result.report.totals
    return {"exit": 0, "left": totals.params_after / max(totals.params_before, 1), "warnings": result.report.warnings}


def by_command(task: Task, samples: int | None) -> Record:
    from onnxprune.cli import main

    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        small = Path(folder) / "small.onnx"
        words = [str(task.path), "-o", str(small), "--criterion", task.criterion, "--ratio", str(task.ratio)]
        words += ["--scope", task.scope, "--json", "--recover", "none"]
        words += [] if task.validate else ["--no-validate"]
        words += [] if task.data is None else ["--data", str(task.data)]
        words += [] if samples is None else ["--samples", str(samples)]
        code, out, err = called(main, words)
        if (code == 0) != small.exists():
            return refusal(code, INTERNAL, f"exit code {code}, and the file was {'' if code else 'not '}written", "")
    said = json.loads(out) if out.strip() else {}
    if code:
        error = said.get("error", said)
        return refusal(code, error.get("type", INTERNAL), error.get("message", err), error.get("hint", ""))
    totals = said["totals"]
    return {"exit": 0, "left": totals["params_after"] / max(totals["params_before"], 1), "warnings": said["warnings"]}


def called(command: Any, words: list[str]) -> tuple[int, str, str]:
    """Exit code, what was printed, and what was said on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command(words, prog_name="onnxprune")
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def refusal(code: int, kind: str, message: str, hint: str) -> Record:
    return {"exit": code, "kind": kind, "message": message, "hint": hint}


def tasks(given: argparse.Namespace, paths: list[Path]) -> Iterator[Task]:
    for path in paths:
        data = given.calibration / f"{files.name(path)}.npz" if given.calibration else None
        data = data if data is not None and data.is_file() else None
        for name in given.criteria:
            if data is not None or not criteria.needs_of(criteria.get(name)):
                for way in given.ways:
                    yield Task(path, data, name, way, given.ratio, given.scope, given.samples, given.validate)


def fault(outcomes: dict[str, Record]) -> str:
    """What is broken about the outcomes of one model and criterion by way; empty for nothing."""
    for way, record in outcomes.items():
        if "exit" not in record:
            return f"{way}: {record.get('status')}: {record.get('message', '')}"
        if record.get("kind") == INTERNAL:
            return f"{way}: {record['message']}"
        if record["exit"] and (record["exit"] not in (2, 3, 5) or not record["hint"]):
            return f"{way}: exit code {record['exit']} without a next step: {record['message']}"
    python, command = outcomes.get("python"), outcomes.get("command")
    if python is None or command is None:
        return ""
    for name in ("exit", "left", "kind", "message"):
        if python.get(name) != command.get(name):
            return f"{name} differs: {python.get(name)!r} from Python, {command.get(name)!r} from the command line"
    return ""


def cell(outcomes: dict[str, Record]) -> str:
    if fault(outcomes):
        return BROKEN
    record = next(iter(outcomes.values()))
    return f"exit {record['exit']}" if record["exit"] else f"{record['left']:.2f}"


def show(found: dict[tuple[str, str], dict[str, Record]], names: list[str], console: Console) -> int:
    """The table, then every message once. Returns how many are broken."""
    table = Table("model", *names)
    for model in dict.fromkeys(model for model, _ in found):
        table.add_row(model, *(cell(found[model, n]) if (model, n) in found else "" for n in names))
    console.print(table)
    broken = {place: fault(outcomes) for place, outcomes in found.items() if fault(outcomes)}
    said: dict[str, list[str]] = {}
    for (model, name), outcomes in found.items():
        record = next(iter(outcomes.values()))
        if record.get("exit") and (model, name) not in broken:
            said.setdefault(f"{record['message']} {record['hint']}", []).append(f"{model} {name}")
    for text, places in said.items():
        console.print(f"{', '.join(places)}:\n    {text}", markup=False)
    for (model, name), text in broken.items():
        console.print(f"{BROKEN} {model} {name}: {text}", markup=False)
    return len(broken)


def listed(text: str) -> list[str]:
    return text.split(",")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders with *.onnx")
    parser.add_argument("--models", action="append", default=[], metavar="PATTERN", help="part of a name, or glob")
    parser.add_argument("--criteria", type=listed, default=criteria.names(), help="separated by commas; default: all")
    parser.add_argument("--ways", type=listed, default=["python", "command"], help="python, command")
    parser.add_argument("--calibration", type=Path, help="folder with NAME.npz for every model")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--scope", default="local")
    parser.add_argument("--validate", action="store_true", help="prove every cut, which takes longer")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=300, help="seconds per run")
    parser.add_argument("--out", type=Path, help="every outcome as a line of JSON")
    return parser.parse_args()


def main() -> int:
    """Exit code 1 where anything is broken."""
    given = parsed()
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for task, record in each(
        run_task, tasks(given, files.find(given.folders, given.models)), given.jobs, given.timeout
    ):
        name = files.name(task.path)
        found.setdefault((name, task.criterion), {})[task.way] = record
        if given.out is not None:
            with given.out.open("a") as file:
                print(json.dumps({"model": name, "criterion": task.criterion, "way": task.way, **record}), file=file)
    console = Console()
    if not console.is_terminal:
        console.width = 240
    broken = show(found, given.criteria, console)
    console.print(f"{len(found)} pairs of model and criterion, {broken} broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
