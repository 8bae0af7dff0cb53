"""Atoms that follow each other are taken as runs: what they say is what atom by atom says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnxprune as op
from onnxprune.channels import groups
from onnxprune.labels.atoms import Atoms

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("name", ["attention", "concat", "depthwise", "recurrent", "residual"])
def test_labels_know_where_their_atoms_start(name: str) -> None:
    table = op.analyze(MODELS / f"{name}.onnx").table
    every = np.arange(table.atoms.count)
    runs = 0
    for labels in table.items().values():
        for label in labels:
            np.testing.assert_array_equal(label.of(every), label.ids)
            runs += label.start >= 0
    assert runs


@pytest.mark.parametrize("seed", range(30))
def test_components_are_those_of_single_atoms(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same partition with the same numbers, whatever part of the edges joins whole births."""
    monkeypatch.setattr(groups, "_MANY", 1)
    rng, atoms = np.random.default_rng(seed), Atoms()
    runs = [atoms.new(int(n), "w", 0) for n in rng.choice([1, 2, 5, 8], size=12)]
    for _ in range(int(rng.integers(0, 14))):
        a, b = (runs[k] for k in rng.integers(0, len(runs), 2))
        size = min(a.size, b.size)
        kind = rng.integers(4)
        if kind == 0:
            a, b = rng.permutation(a)[:size], b[:size]
        elif kind == 1:
            a, b = a[:size], b[b.size - size :]
        elif a.size != b.size:
            continue
        atoms.unite(a, b)
    sides = [np.concatenate([np.zeros(0, np.int64), *(edge[k] for edge in atoms.edges)]) for k in (0, 1)]
    expected, number = groups._join_components(atoms.count, sides[0], sides[1])
    found, count = groups._components(atoms)
    assert count == number
    np.testing.assert_array_equal(found, expected)
