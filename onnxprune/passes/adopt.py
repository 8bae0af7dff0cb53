"""Adopt: take a model that was cut before, with the plan that says how, in place of cutting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from onnxprune.errors import UsageError
from onnxprune.graph.view import Graph
from onnxprune.model.load import load
from onnxprune.passes.describe import fill_report
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.state import State
from onnxprune.plan import Plan
from onnxprune.planning import atoms_removed, make_plan, read_plan
from onnxprune.rewrite.cut import CannotRewrite


class Adopt:
    """Go on from a cut model in a file: what a plan makes of the original, with the same weights or trained further.

    Args:
        cut: the cut model: path, bytes or ModelProto. plan: a plan or its file.
        approximate: the cut was made through normalisations.

    Raises:
        UsageError: the plan is another model's, or does not lead from the original to this cut.
    """

    def __init__(
        self, cut: str | Path | bytes | onnx.ModelProto, plan: Plan | str | Path, *, approximate: bool = False
    ) -> None:
        self.cut, self.approximate = cut, approximate
        self.plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan

    def __call__(self, state: State) -> None:
        """Take the cut model in place of the original."""
        analysis = state.analyzed(self.approximate)
        removed = atoms_removed(analysis.units, read_plan(analysis, self.plan))
        with state.stage("compare"):
            loaded = load(self.cut)
            try:
                wanted = Graph.of(*cut_model(analysis, removed))
            except CannotRewrite as stop:
                raise UsageError(f"The plan cannot be carried out on the original: {stop}.") from stop
            changed, of = check_pair(wanted, Graph.of(loaded.proto, loaded.weights))
        state.removed = state.proved = removed
        state.proto, state.weights = loaded.proto, dict(loaded.weights)
        state.read_from = [*([loaded.path] if loaded.path else []), *loaded.external]

        def describe() -> None:
            state.plan = make_plan(analysis, removed, self.plan.criterion)
            state.report.settings = {"criterion": self.plan.criterion}
            fill_report(analysis, removed, state.weights, state)
            same = "its weights are the original's" if not changed else f"{changed} of its {of} weights were changed"
            state.report.exactness.note = f"came as a file, {same}"

        state.later.append(describe)


def check_pair(wanted: Graph, given: Graph) -> tuple[int, int]:
    """Hold a cut model against what the plan makes of the original; how many floating weights differ, of how many.

    Weights may have other values, and nodes an optional input more (a bias that an earlier repair added).

    Raises:
        UsageError: another tensor, shape or operator; names the first.
    """
    added = _check_nodes(wanted, given)
    for name, weight in wanted.weights.items():
        have = given.weights.get(name)
        if have is None:
            raise _stranger(f"the cut model has no tensor {name!r}")
        if have.shape != weight.shape:
            raise _stranger(f"tensor {name!r} is {list(have.shape)}, the plan makes it {list(weight.shape)}")
        if have.dtype != weight.dtype:
            raise _stranger(f"tensor {name!r} holds {have.dtype}, the original's {weight.dtype}")
    for name in given.weights:
        if name not in wanted.weights and name not in added:
            raise _stranger(f"the cut model has a tensor {name!r} more")
    return _compare_values(wanted, given)


def _check_nodes(wanted: Graph, given: Graph) -> set[str]:
    """Same operators, reading the same; gives names of optional inputs that came on top."""
    added: set[str] = set()
    made: Mapping[str, object] = given.producer
    for node in wanted.steps:
        name = next((o for o in node.outputs if o), "")
        if name not in made:
            raise _stranger(f"the cut model has no tensor {name!r}")
        other = given.producer[name]
        own = [n for n in node.inputs if n]
        if (other.op, other.domain) != (node.op, node.domain) or own != [n for n in other.inputs if n][: len(own)]:
            raise _stranger(f"tensor {name!r} is made by another {other.op} than the original's {node.op}")
        added.update(n for n in other.inputs if n and n not in own)
    known = {o for node in wanted.steps for o in node.outputs}
    for node in given.steps:
        for name in node.outputs:
            if name and name not in known:
                raise _stranger(f"the cut model has a tensor {name!r} more")
    return added


def _compare_values(wanted: Graph, given: Graph) -> tuple[int, int]:
    changed = total = 0
    for name, weight in wanted.weights.items():
        kind = weight.dtype.kind
        if kind in "fV" or weight.dtype.itemsize == 1:
            total += 1
            changed += not np.array_equal(weight.read(), given.weights[name].read())
        elif kind in "iub" and not np.array_equal(weight.read(), given.weights[name].read()):
            raise _stranger(f"tensor {name!r} (sizes or indices) has other values than the plan gives it")
    return changed, total


def _stranger(what: str) -> UsageError:
    return UsageError(
        f"The plan does not belong to this pair: {what}.",
        hint="Give the plan that was written (--plan) when this cut was made, the original of that cut, and "
        "--approximate if it was given then.",
    )
