"""Break the package on purpose, one small change at a time, and report the changes that no test notices.

    python tools/mutate.py --modules 'labels*' 'channels/*' --count 60 --seed 1

Every mutant is one changed expression in a copy of the package: a comparison turned round, ``+`` for ``-``, ``and`` for
``or``, a constant off by one, a condition negated, ``min`` for ``max``, a statement left out. The tests run against a
copy until the first failure. A mutant that they all pass has survived: its line is printed, to be killed by a test or
to be understood as equivalent.
"""

from __future__ import annotations

import ast
import copy
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from queue import Queue

import click
import numpy as np

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
    """One change: the module, the line, the first line of the statement before and after, and the changed statement."""

    module: str
    line: int
    before: str
    after: str
    changed: ast.stmt


@dataclass(frozen=True)
class Outcome:
    """What the tests made of a mutant: ``killed``, ``survived`` or ``timeout`` (which counts as killed)."""

    mutant: Mutant
    verdict: str
    seconds: float


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Simple statements and the heads of compound ones, inside functions: what a module does when it is used."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    yield node


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


def mutants(path: Path) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    module = path.relative_to(ROOT).as_posix()
    pairs = ((s, c) for s in statements(ast.parse(path.read_text(encoding="utf-8"))) for c in changes(s))
    made = (Mutant(module, old.lineno, head(old), head(new), new) for old, new in pairs)
    return [mutant for mutant in made if mutant.before != mutant.after]


def draw(paths: list[Path], count: int, rng: np.random.Generator) -> Iterator[Mutant]:
    """Mutants of modules drawn by their size, each once."""
    sizes = np.array([path.stat().st_size for path in paths], float)
    numbers, counts = np.unique(rng.choice(len(paths), size=count, p=sizes / sizes.sum()), return_counts=True)
    for number, wanted in zip(numbers, counts, strict=True):
        choices = mutants(paths[number])
        yield from (choices[i] for i in rng.permutation(len(choices))[:wanted])


def head(statement: ast.stmt) -> str:
    """The first line of a statement."""
    return ast.unparse(ast.fix_missing_locations(statement)).splitlines()[0]


def render(mutant: Mutant) -> str:
    """The module with one statement changed."""
    tree = ast.parse((ROOT / mutant.module).read_text(encoding="utf-8"))
    old = next(s for s in statements(tree) if s.lineno == mutant.line and head(s) == mutant.before)
    return ast.unparse(ast.fix_missing_locations(_Replace(old, mutant.changed).visit(tree)))


def try_mutant(mutant: Mutant, place: Path, tests: tuple[str, ...], limit: float) -> Outcome:
    """Run the tests against a copy of the package with the mutant in it."""
    target = place / mutant.module
    original = target.read_text(encoding="utf-8")
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        target.write_text(render(mutant), encoding="utf-8")
        done = subprocess.run(
            command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=limit
        )
        verdict = "killed" if done.returncode else "survived"
    except subprocess.TimeoutExpired:
        verdict = "timeout"
    finally:
        target.write_text(original, encoding="utf-8")
    return Outcome(mutant, verdict, time.perf_counter() - start)


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
@click.option("--tests", multiple=True, default=("tests",), help="What runs against every mutant, quickest first.")
@click.option("--count", default=50, show_default=True, help="Mutants to draw.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option("--jobs", default=2, show_default=True, help="Mutants at a time.")
@click.option("--limit", default=600.0, show_default=True, help="Seconds for one mutant.")
def main(globs: tuple[str, ...], tests: tuple[str, ...], count: int, seed: int, jobs: int, limit: float) -> None:
    """Draw mutants, run the tests against each, and print those that survive."""
    paths = [p for p in sorted((ROOT / PACKAGE).rglob("*.py")) if any(matches(p, glob) for glob in globs)]
    drawn = list(draw(paths, count, np.random.default_rng(seed)))
    if not drawn:
        raise click.ClickException(f"no module of {PACKAGE} with code in functions matches {', '.join(globs)}")
    with tempfile.TemporaryDirectory() as folder:
        places: Queue[Path] = Queue()
        for i in range(jobs):
            places.put(copy_tree(Path(folder, str(i))))

        def work(mutant: Mutant) -> Outcome:
            place = places.get()
            try:
                return try_mutant(mutant, place, tests, limit)
            finally:
                places.put(place)

        survivors = 0
        with ThreadPoolExecutor(jobs) as pool:
            for number, outcome in enumerate(pool.map(work, drawn), start=1):
                survivors += outcome.verdict == "survived"
                mutant = outcome.mutant
                if outcome.verdict == "survived":
                    click.echo(f"SURVIVED {mutant.module}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}")
                click.echo(f"{number}/{len(drawn)} {outcome.verdict} in {outcome.seconds:.0f} s", err=True)
    click.echo(f"{len(drawn)} mutants: {len(drawn) - survivors} killed, {survivors} survived")


def matches(path: Path, glob: str) -> bool:
    """Whether a module's path inside the package fits a glob."""
    return fnmatch(path.relative_to(ROOT / PACKAGE).as_posix(), glob)


if __name__ == "__main__":
    main()
