"""Break the package on purpose, one small change at a time, and report the changes that no test notices.

    python tools/mutate.py --modules 'labels/*' --modules 'channels/*' --count 60 --seed 1 --map calls.json

Every mutant is one changed expression in a copy of the package: a comparison turned round, ``+`` for ``-``, ``and`` for
``or``, a constant off by one, a condition negated, ``min`` for ``max``, a statement left out. First the tests run once,
and the functions that each of them calls are recorded (``--map`` keeps the record for later runs). Every mutant meets
the quickest tests that call its function, until the first failure. A mutant that they all pass has survived: its line
is printed, to be killed by a test or to be understood as equivalent.
"""

from __future__ import annotations

import ast
import copy
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from queue import Queue
from types import FrameType
from typing import Any

import click
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "onnxprune"
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Mult: ast.Add,
        ast.FloorDiv: ast.Mult,
        ast.Div: ast.Mult,
        ast.Mod: ast.Add,
    },
    **{ast.And: ast.Or, ast.Or: ast.And},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "argmin": "argmax", "argmax": "argmin"}


@dataclass(frozen=True)
class Mutant:
    """One change: the module, the line, the first line of the statement before and after, and the changed statement.

    ``function`` is the line at which the innermost function around it begins, with its decorators.
    """

    module: str
    line: int
    function: int
    before: str
    after: str
    changed: ast.stmt


@dataclass(frozen=True)
class Outcome:
    """Verdict of the tests on a mutant: ``killed``, ``timeout`` (counts as killed), ``survived`` or ``untested``."""

    mutant: Mutant
    verdict: str
    seconds: float


def statements(tree: ast.Module) -> Iterator[tuple[ast.stmt, int]]:
    """Simple statements and the heads of compound ones, inside functions, each with the first line of its function."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
            for node in inner(function):
                if isinstance(node, ast.stmt):
                    yield node, first


def inner(function: ast.AST) -> Iterator[ast.AST]:
    """What a function holds, without the functions and classes within it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child
            yield from inner(child)


def changes(statement: ast.stmt) -> Iterator[ast.stmt]:
    """Every changed form of a statement; of a compound one only its own expressions change."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return
    if isinstance(statement, (ast.Expr, ast.AugAssign)):
        yield ast.Pass()
    own = {id(child) for block in blocks(statement) for part in block for child in ast.walk(part)}
    places = [i for i, node in enumerate(ast.walk(statement)) if id(node) not in own]
    for place in places:
        for variant in range(2):
            changed = copy.deepcopy(statement)
            if mutate(list(ast.walk(changed))[place], variant):
                yield changed


def blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """The bodies of a compound statement."""
    return [getattr(statement, field) for field in ("body", "orelse", "finalbody") if getattr(statement, field, None)]


def mutate(node: ast.AST, variant: int) -> bool:
    """Change a node in place; False where there is nothing to change."""
    if isinstance(node, ast.Compare) and variant == 0 and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()  # type: ignore[assignment]
        return True
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and variant == 0 and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()  # type: ignore[assignment]
        return True
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value = node.value + (1 if variant == 0 else -1)
        return True
    if isinstance(node, ast.Constant) and isinstance(node.value, bool) and variant == 0:
        node.value = not node.value
        return True
    if isinstance(node, (ast.If, ast.IfExp, ast.While)) and variant == 0:
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return True
    if isinstance(node, ast.Name) and node.id in NAMES and variant == 0:
        node.id = NAMES[node.id]
        return True
    if isinstance(node, ast.Attribute) and node.attr in NAMES and variant == 0:
        node.attr = NAMES[node.attr]
        return True
    return False


class _Replace(ast.NodeTransformer):
    """Put one statement in the place of another, told by its identity."""

    def __init__(self, old: ast.stmt, new: ast.stmt) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def draw(paths: list[Path], count: int, rng: np.random.Generator) -> Iterator[Mutant]:
    """Mutants of modules drawn by their size, each once."""
    sizes = np.array([path.stat().st_size for path in paths], float)
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    drawn: set[tuple[str, int, str]] = set()
    for number in rng.choice(len(paths), size=count, p=sizes / sizes.sum()):
        choices = list(statements(trees[number]))
        if not choices:
            continue
        old, first = choices[rng.integers(len(choices))]
        forms = [form for form in changes(old) if head(form) != head(old)]
        if not forms:
            continue
        new = forms[rng.integers(len(forms))]
        mutant = Mutant(paths[number].relative_to(ROOT).as_posix(), old.lineno, first, head(old), head(new), new)
        if (mutant.module, mutant.line, mutant.after) not in drawn:
            drawn.add((mutant.module, mutant.line, mutant.after))
            yield mutant


def head(statement: ast.stmt) -> str:
    """The first line of a statement."""
    return ast.unparse(ast.fix_missing_locations(statement)).splitlines()[0]


def render(mutant: Mutant) -> str:
    """The module with one statement changed."""
    tree = ast.parse((ROOT / mutant.module).read_text(encoding="utf-8"))
    old = next(s for s, _ in statements(tree) if s.lineno == mutant.line and head(s) == mutant.before)
    return ast.unparse(ast.fix_missing_locations(_Replace(old, mutant.changed).visit(tree)))


class Calls:
    """A plugin of pytest that records the functions of the package that every test calls, and its seconds.

    Args:
        place: folder of the copy of the package.
    """

    def __init__(self, place: Path) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self._package, self._codes = str(place / PACKAGE) + os.sep, set[tuple[str, int]]()
        self._cut = len(str(place)) + 1

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Trace calls while a test is set up, runs and ends."""
        self._codes.clear()
        start = time.perf_counter()
        sys.settrace(self._called)
        yield
        sys.settrace(None)
        calls = sorted({f"{name[self._cut :]}:{line}" for name, line in self._codes})
        self.tests[item.nodeid] = {"seconds": time.perf_counter() - start, "calls": calls}

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_filename.startswith(self._package):
            self._codes.add((code.co_filename, code.co_firstlineno))


def record(place: Path, tests: Sequence[str], target: Path) -> None:
    """Run tests in a copy and write what they call; in a process of its own."""
    plugin = Calls(place)
    run_tests(place, tests, [plugin])
    target.write_text(json.dumps(plugin.tests), encoding="utf-8")


def run_tests(place: Path, tests: Sequence[str], plugins: Sequence[Any] = ()) -> int:
    """Run tests against the package in a copy, and return pytest's exit status."""
    os.chdir(place)
    os.environ["PYTHONPATH"] = str(place)
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(place), str(place / "tests")]
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    options = ["-q", "-p", "no:cacheprovider", *([] if plugins else ["-x"])]
    return int(pytest.main([*options, *tests], plugins=list(plugins)))


def check(place: Path, tests: Sequence[str]) -> None:
    """Run tests as the whole of a process: its exit status says whether one failed."""
    sys.exit(run_tests(place, tests))


def selected(mutant: Mutant, calls: Mapping[str, Any], seconds: float) -> list[str]:
    """The quickest tests that call a mutant's function, for so many seconds together, and at least one."""
    key = f"{mutant.module}:{mutant.function}"
    rows = sorted((entry["seconds"], test) for test, entry in calls.items() if key in entry["calls"])
    total = np.cumsum([row[0] for row in rows]) if rows else np.zeros(0)
    return [test for (_, test), at in zip(rows, total, strict=True) if at <= max(seconds, total[0])]


def try_mutant(mutant: Mutant, place: Path, tests: Sequence[str], limit: float) -> Outcome:
    """Run the tests against a copy of the package with the mutant in it."""
    target = place / mutant.module
    original = target.read_text(encoding="utf-8")
    start = time.perf_counter()
    if not tests:
        return Outcome(mutant, "untested", 0.0)
    try:
        target.write_text(render(mutant), encoding="utf-8")
        process = _context().Process(target=check, args=(place, tests))
        process.start()
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            verdict = "timeout"
        else:
            verdict = "killed" if process.exitcode else "survived"
    finally:
        target.write_text(original, encoding="utf-8")
    return Outcome(mutant, verdict, time.perf_counter() - start)


def _context() -> Any:
    """Processes that begin with the heavy libraries in memory, and without the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["numpy", "onnx", "onnxruntime", "onnx.reference", "scipy.sparse.csgraph", "hypothesis"]
    )
    return context


def copy_tree(place: Path) -> Path:
    """A copy of what the tests need, to be broken."""
    pages = ("docs", "examples", "mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
    for name in (PACKAGE, "tests", "tools", "models", *pages, "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / name)
    return place


@click.command()
@click.option("--modules", "globs", multiple=True, default=("*",), help="Globs over paths inside the package.")
@click.option("--tests", multiple=True, default=("tests",), help="Tests to choose from.")
@click.option("--count", default=50, show_default=True, help="Mutants to draw.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option("--jobs", default=2, show_default=True, help="Mutants at a time.")
@click.option("--seconds", default=20.0, show_default=True, help="Seconds of tests for one mutant, as recorded.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds after which a mutant counts as endless.")
@click.option("--budget", default=0.0, show_default=True, help="Seconds after which no further mutant starts; 0: none.")
@click.option("--map", "kept", type=click.Path(path_type=Path), help="File of what tests call; written where missing.")
def main(
    globs: tuple[str, ...],
    tests: tuple[str, ...],
    count: int,
    seed: int,
    jobs: int,
    seconds: float,
    limit: float,
    budget: float,
    kept: Path | None,
) -> None:
    """Draw mutants, run the tests that call them against each, and print those that survive."""
    paths = [p for p in sorted((ROOT / PACKAGE).rglob("*.py")) if any(matches(p, glob) for glob in globs)]
    rng = np.random.default_rng(seed)
    drawn = list(draw(paths, count, rng))
    if not drawn:
        raise click.ClickException(f"no module of {PACKAGE} with code in functions matches {', '.join(globs)}")
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]  # an early end leaves no module out
    with tempfile.TemporaryDirectory() as folder:
        places: Queue[Path] = Queue()
        for i in range(jobs):
            places.put(copy_tree(Path(folder, str(i))))
        calls = recorded(places.queue[0], tests, kept or Path(folder, "calls.json"))
        end = time.perf_counter() + (budget or np.inf)

        def work(mutant: Mutant) -> Outcome | None:
            place = places.get()
            try:
                if time.perf_counter() > end:
                    return None
                return try_mutant(mutant, place, selected(mutant, calls, seconds), limit)
            finally:
                places.put(place)

        verdicts: list[str] = []
        with ThreadPoolExecutor(jobs) as pool:
            for outcome in pool.map(work, drawn):
                if outcome is None:
                    continue
                verdicts.append(outcome.verdict)
                mutant = outcome.mutant
                if outcome.verdict in ("survived", "untested"):
                    where = f"{mutant.module}:{mutant.line}"
                    click.echo(f"{outcome.verdict.upper()} {where}\n  - {mutant.before}\n  + {mutant.after}")
                click.echo(f"{len(verdicts)}/{len(drawn)} {outcome.verdict} in {outcome.seconds:.0f} s", err=True)
    number = {word: verdicts.count(word) for word in ("killed", "timeout", "survived", "untested")}
    dead = number["killed"] + number["timeout"]
    click.echo(f"{len(verdicts)} mutants: {dead} killed, {number['survived']} survived, {number['untested']} untested")


def recorded(place: Path, tests: Sequence[str], target: Path) -> Mapping[str, Any]:
    """What every test calls: read from a file, or recorded by running the tests once."""
    if not target.exists():
        process = _context().Process(target=record, args=(place, tests, target.resolve()))
        process.start()
        process.join()
    result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return result


def matches(path: Path, glob: str) -> bool:
    """Whether a module's path inside the package fits a glob."""
    return fnmatch(path.relative_to(ROOT / PACKAGE).as_posix(), glob)


if __name__ == "__main__":
    main()
