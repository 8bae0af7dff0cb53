"""Random valid graphs are cut exactly or refused with reasons; nothing else ever happens."""

from __future__ import annotations

import pytest
from generate import generate
from oracle import assert_exact_cut, count_parameters

FOUND = (626, 758, 823, 861, 931, 1004, 1422, 1895, 2568)
"""Seeds that once found something."""


@pytest.mark.parametrize("seed", [*range(54), *FOUND])
def test_random_graphs_are_cut_exactly_or_refused(seed: int) -> None:
    model = generate(seed)
    ratio = (0.3, 0.5, 0.7)[seed % 3]
    criterion = "random" if seed >= 500 else ("l1", "l2", "gm", "random")[seed % 4]
    assert_exact_cut(model, ratio=ratio, criterion=criterion, seed=seed, expect_cut=None, tolerance=5e-5)


@pytest.mark.parametrize("seed", [*range(28), 598, 938])
def test_random_graphs_of_rarer_blocks(seed: int) -> None:
    model = generate(seed, rare=True)
    ratio = (0.3, 0.5, 0.7)[seed % 3]
    assert_exact_cut(model, ratio=ratio, criterion="random", seed=seed, expect_cut=None, tolerance=5e-5)


def test_random_graphs_differ_and_are_mostly_cut() -> None:
    """The generator does not only make what the tool refuses, nor the same thing again."""
    import onnxprune as op

    shrunk, operators = 0, set()
    for seed in range(100, 120):
        model = generate(seed)
        operators |= {n.op_type for n in model.graph.node}
        try:
            result = op.prune(model, ratio=0.5, criterion="random", validate=False)
        except op.BudgetError:
            continue
        shrunk += count_parameters(result.model) < count_parameters(model)
    assert shrunk >= 16
    assert len(operators) > 20
