"""The house rules, held by looking at the source: which way imports go, who imports what, how long functions are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import onnx
import pytest

import onnxprune
from onnxprune.rules import known

ROOT = Path(onnxprune.__file__).parent
LONGEST_FUNCTION = 60

STAGES = [
    {"errors", "plugins", "garbage", "globs", "targets", "report.facts", "io.files"},
    {"settings"},
    {"operators.registry", "operators.codes", "operators.operands", "operators.contractions", "operators.kernels"},
    {"io"},
    {"graph"},
    {"labels"},
    {"operators", "rules"},
    {"channels"},
    {"factorization.decompositions", "factorization.ranks", "importance.statistics"},
    {"importance.criteria"},
    {"importance", "criteria", "statistics"},
    {"allocation", "devices"},
    {"pruning"},
    {"recovery", "factorization", "sparsification"},
    {"runtime"},
    {"gradients"},
    {"training"},
    {"pipeline"},
    {"passes"},
    {"search"},
    {"api"},
    {"report"},
    {"cli", "__main__", "olive"},
]
"""From low to high; a module imports its own stage and lower ones."""


@cache
def modules() -> dict[str, Path]:
    """Dotted names inside the package and their files."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that code imports when it runs, those inside functions too."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports name the whole path"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child)


def outside(name: str) -> set[str]:
    """Top-level packages that a module imports."""
    return {i.split(".")[0] for i in imports(tree(modules()[name]))}


@cache
def inside(name: str) -> set[str]:
    """Modules of the package that a module imports."""
    known = modules()
    result = set()
    for target in imports(tree(known[name])):
        parts = target.split(".")
        if parts[0] != "onnxprune":
            continue
        # The longest prefix that is a module: the rest are names within it.
        while len(parts) > 1 and ".".join(parts[1:]) not in known:
            parts.pop()
        result.add(".".join(parts[1:]))
    return result - {""}


def stage(name: str) -> int | None:
    """The stage of a module; None for the package itself."""
    found = [(len(s), i) for i, stems in enumerate(STAGES) for s in stems if name == s or name.startswith(s + ".")]
    return max(found)[1] if found else None


@pytest.mark.parametrize("name", [n for n in modules() if n])
def test_lower_stages_never_import_higher_ones(name: str) -> None:
    mine = stage(name)
    assert mine is not None, f"say in STAGES where {name} stands"
    higher = {other for other in inside(name) if (stage(other) or 0) > mine}
    assert not higher


def test_imports_have_no_cycles() -> None:
    edges = {name: inside(name) for name in modules() if name}
    # Importing a submodule runs its package first; a package that gathers its own modules is no cycle.
    edges = {n: {t for t in targets if not n.startswith(t + ".")} for n, targets in edges.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize(
    ("package", "owners"),
    [
        ("onnxruntime", ("runtime",)),
        ("PIL", ("runtime",)),
        (
            "onnx",
            (
                *("io", "graph", "channels", "pruning", "recovery", "factorization", "runtime"),
                *("gradients", "training", "pipeline", "passes", "search", "api"),
            ),
        ),
        ("rich", ("report", "cli")),
        ("click", ("cli",)),
        ("scipy", ("channels", "importance", "factorization", "allocation", "recovery", "sparsification")),
        ("tensorly", ("factorization",)),
    ],
)
def test_packages_have_owners(package: str, owners: tuple[str, ...]) -> None:
    offenders = [n for n in modules() if package in outside(n) and n.split(".")[0] not in owners]
    assert not offenders


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("importance.criteria", ("importance.criteria", "importance.statistics", "errors", "plugins")),
        ("importance.statistics", ("importance.statistics", "errors", "plugins")),
        ("operators.contractions", ("operators.contractions",)),
        ("operators.kernels", ()),
        ("factorization.decompositions", ("operators.kernels",)),
        ("factorization.ranks", ("factorization.decompositions", "operators.kernels")),
    ],
)
def test_some_modules_know_arrays_only(name: str, allowed: tuple[str, ...]) -> None:
    """A score is a function of numbers; a product of matrices and a kernel do not know their operator."""
    assert not outside(name) & {"onnx", "onnxruntime"}
    assert inside(name) <= set(allowed), inside(name)


@pytest.mark.parametrize("name", [n for n in modules() if n])
def test_functions_fit_a_screen(name: str) -> None:
    for node in ast.walk(tree(modules()[name])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # What a public call takes and means is read on its own page, however much it is.
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


MOST_PARAMETERS = 8
PUBLIC_CALLS = {"operators.contractions.Windows.__init__", "pipeline.Pipeline.run", "search.spec.BudgetSpec.of"}
PUBLIC_CALLS |= {"passes.regularize.Regularize.__init__"}
"""Public calls outside of ``api``: attributes of a convolution, options of a run, arguments of a budget and a pass."""
RECORDS_EXPECTED = {"training.loop.train"}
"""Parts of a training that its only caller and the tests bring one by one."""


def functions(node: ast.AST, path: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions below a node, with their dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            if isinstance(child, ast.FunctionDef):
                yield f"{path}.{child.name}", child
            yield from functions(child, f"{path}.{child.name}")
        else:
            yield from functions(child, path)


@pytest.mark.parametrize("name", [n for n in modules() if n and n != "api"])
def test_functions_take_few_parameters(name: str) -> None:
    for path, node in functions(tree(modules()[name]), name):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        names = [n for n in names if n not in ("self", "cls")]
        if path not in PUBLIC_CALLS | RECORDS_EXPECTED:
            assert len(names) <= MOST_PARAMETERS, f"{path} has {len(names)} parameters: which belong together?"


VAGUE = set(
    "found kept left gone seen taken made given wanted done asked held chosen whole rest own every some needed said "
    "told most shared".split()
)
"""Words that do not say what they name."""
OPERANDS = ("operators", "gradients", "graph.probes", "report.page")
"""Rooms in which ``left`` is the left operand of a product or an equation, or the left edge of a drawing."""
REPORTED = {"done", "asked", "chosen", "found"}
"""Fields of the report, which are keys of its JSON, too."""
PLANNED = {"kept"}
"""Fields of a plan, which are keys of its file, too."""


def bound(node: ast.AST) -> str:
    """The name that a node gives to something; empty where it gives none."""
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
        return node.id if isinstance(node, ast.Name) else node.attr
    if isinstance(node, ast.arg):
        return node.arg
    return node.name if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""


@pytest.mark.parametrize("name", [n for n in modules() if n])
def test_names_say_what_they_hold(name: str) -> None:
    fields = {"report.facts": REPORTED, "channels.plan": PLANNED}
    allowed = {"left"} if name.startswith(OPERANDS) else fields.get(name, set())
    for node in ast.walk(tree(modules()[name])):
        word = bound(node).strip("_")  # a constant has its docstring
        assert word not in VAGUE - allowed, f"line {getattr(node, 'lineno', 0)}: {word} says too little"


def test_there_is_no_drawer_for_everything() -> None:
    """No module is called utils, helpers, common or misc."""
    assert not {n for n in modules() if n.split(".")[-1] in ("utils", "helpers", "common", "misc")}


APART = (
    "operators",
    "gradients",
    "graph.canonical",
    "graph.restore",
    "io",
    "channels.constants",
    "runtime.fidelity",
    "runtime.quantizer",
)
"""Rules and gradients; rewriters of patterns; files and bodies; constant channels; meanings of outputs, from names;
what onnxruntime quantizes."""
STRUCTURE = {"Constant", "If", "Loop", "Scan", "SequenceMap"}
"""Operators that hold values or bodies and compute nothing themselves."""
PATTERNS = {
    "graph.facts": {"Equal"},
    "recovery.attention": {"Mul", "Div"},
    "recovery.targets": {"Add"},
    "pruning.branches": {"Relu"},
    "pruning.experts": {
        *("TopK", "ArgMax", "Equal", "OneHot", "Gather", "Slice", "Transpose", "ReduceSum", "ReduceMax"),
    },
}
"""Operators of a pattern that a module looks for: a number compared, a scale, a bias, an activation behind a sum, a
choice among experts and a question for one of them."""
OPERATORS = {schema.name for schema in onnx.defs.get_all_schemas()} | {name for _, name in known()}


def strings(node: ast.AST) -> set[str]:
    """Texts in an expression: one, or those of a collection, or the keys of a dictionary."""
    if isinstance(node, ast.Dict):
        return {text for key in node.keys if key is not None for text in strings(key)}
    if isinstance(node, (ast.Set, ast.List, ast.Tuple)):
        return {text for element in node.elts for text in strings(element)}
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


@pytest.mark.parametrize("name", [n for n in modules() if n and not n.startswith(APART)])
def test_what_is_known_of_an_operator_is_asked_of_its_rule(name: str) -> None:
    """No module compares types of operators or keeps a list of them: a rule of another package would not be in it."""
    allowed = STRUCTURE | PATTERNS.get(name, set())
    for node in ast.walk(tree(modules()[name])):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr in ("op", "op_type") for side in sides):
                operators = {text for side in sides for text in strings(side)} & OPERATORS
                assert not operators - allowed, f"line {node.lineno}: {operators}"
        elif isinstance(node, (ast.Set, ast.List, ast.Tuple, ast.Dict)):
            operators = strings(node) & OPERATORS - allowed
            assert len(operators) < 2, f"line {node.lineno}: {operators}"


VIEW = {"inputs", "outputs", "attrs", "repeats", "consumers", "producer", "weights", "nodes", "steps", "captured"}
"""Fields of nodes and of the graph view."""
VIEWS = {"graph", "node", "reader", "producer", "consumer", "original"}
"""Last part of the names of nodes and graph views, underscores aside; types tell mypy of the others."""
CHANGES = set("append extend insert pop popitem remove clear update setdefault add discard sort reverse".split())
CHANGES |= {"CopyFrom", "MergeFrom", "SetInParent", "ClearField"}


def changed(node: ast.AST) -> Iterator[ast.expr]:
    """What code changes: targets of assignments and deletions, and owners of methods that change them."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        for target in node.targets:
            yield from target.elts if isinstance(target, ast.Tuple) else [target]
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        yield node.target
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        yield node.func.value


def belongs_to_a_view(target: ast.expr) -> bool:
    """Whether an expression is a field of a node or of the graph view, an entry of one, or their protos."""
    parts = []
    while isinstance(target, (ast.Attribute, ast.Subscript, ast.Call)):
        if isinstance(target, ast.Attribute):
            parts.append(target.attr)
        target = target.func if isinstance(target, ast.Call) else target.value
    parts.append(target.id if isinstance(target, ast.Name) else "")
    path = [part.strip("_") for part in reversed(parts)]
    owners = pairwise(path)
    return any(owner in VIEWS and field in {*VIEW, "proto"} for owner, field in owners)


def test_the_graph_view_is_changed_by_its_editor_alone() -> None:
    for name in modules():
        if name != "graph.view":
            nodes = ast.walk(tree(modules()[name]))
            found = [ast.unparse(t) for node in nodes for t in changed(node) if belongs_to_a_view(t)]
            assert not found, f"{name} changes {found}: let graph.view.GraphEditor do it"


@pytest.mark.parametrize(
    "source",
    [
        "node.inputs[0] = name",
        "self._graph.consumers[name] = []",
        "del graph.proto.graph.node[:]",
        "weights[cut] = graph.weights[cut] = weight",
        "node.repeats += 1",
        "self.node.proto.input.extend([name])",
        "graph.consumers.setdefault(name, []).append(reader)",
    ],
)
def test_changes_of_a_view_are_recognised(source: str) -> None:
    assert any(belongs_to_a_view(target) for node in ast.walk(ast.parse(source)) for target in changed(node))
