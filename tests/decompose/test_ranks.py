"""Ranks from a cost, an energy or noise: against going through all of them, and against what was planted."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.factorization.decompositions import METHODS, Method, Metric, Ranks, shape_of
from onnxprune.factorization.ranks import by_energy, by_vbmf, calibrated, dropped_energies, rounded, vbmf_rank, within
from onnxprune.operators.kernels import Geometry, Stage, elements


@given(st.floats(0.05, 0.95), st.integers(1, 3), st.sampled_from(["svd", "tucker", "spatial-svd"]))
def test_within_is_the_best_of_all_ranks(share: float, step: int, name: str) -> None:
    weight = np.random.default_rng(0).standard_normal((1, 6, 3, 3, 9)) * np.geomspace(1, 0.1, 9)
    method, shape = METHODS[name], shape_of(weight)
    fit = method.fit(weight, Metric(), 0)

    def cost(which: Method, ranks: Ranks) -> int:
        return elements(which.stages(shape, ranks))

    limit = share * elements([shape.as_stage()])
    found = within(method, cost, fit, limit, step)
    best = None
    ways = [[*range(0 if len(fit.modes) > 1 else 1, m.size + 1)] for m in fit.modes[:2]]
    for ranks in product(*ways):
        if not any(ranks) or any(r % step for r in ranks) or cost(method, ranks) > limit:
            continue
        loss = sum(float(dropped_energies(m)[r]) for m, r in zip(fit.modes, ranks, strict=False) if r)
        best = loss if best is None else min(best, loss)
    if found is None:
        assert best is None
        return
    assert found.cost == cost(method, found.ranks) <= limit
    assert not any(r % step for r in found.ranks)
    assert best is not None and found.loss == pytest.approx(best, abs=1e-9)


def test_large_kernels_get_spatial_ranks_where_that_is_cheaper() -> None:
    """A kernel that is the same filter along both axes for all channels needs one position of each."""
    draw = np.random.default_rng(0)
    weight = np.einsum("io,a,b->iabo", draw.standard_normal((8, 8)), draw.standard_normal(7), draw.standard_normal(7))
    method, shape = METHODS["tucker"], shape_of(weight[None])
    fit = method.fit(weight[None], Metric(), 0)
    found = within(method, lambda m, r: elements(m.stages(shape, r)), fit, 0.15 * weight.size, 1)
    assert found is not None and found.ranks[2:] == (1, 1) and found.loss < 1e-9


def test_energy_keeps_what_was_asked_for() -> None:
    weight = np.random.default_rng(0).standard_normal((1, 12, 3, 3, 16)) * np.geomspace(1, 0.01, 16)
    for name in ("svd", "tucker", "spatial-svd"):
        fit = METHODS[name].fit(weight, Metric(), 0)
        for share in (0.5, 0.9, 0.99, 1.0):
            for mode, rank in zip(fit.modes, by_energy(fit, share), strict=False):
                lost = dropped_energies(mode)
                assert lost[rank] <= 1 - share + 1e-9
                assert rank == 1 or lost[rank - 1] > 1 - share - 1e-9


@given(st.integers(0, 12), st.floats(0.05, 0.6), st.integers(0, 3))
def test_vbmf_finds_planted_ranks(rank: int, noise: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    matrix = draw.standard_normal((60, rank)) @ draw.standard_normal((rank, 150))
    matrix += noise * draw.standard_normal(matrix.shape)
    energies = np.linalg.svd(matrix, compute_uv=False) ** 2
    assert vbmf_rank(energies, 150) == rank


def test_vbmf_of_special_matrices() -> None:
    assert vbmf_rank(np.zeros(5), 10) == 0
    exact = np.linalg.svd(np.outer(np.arange(1.0, 20), np.arange(1.0, 31)), compute_uv=False) ** 2
    assert vbmf_rank(exact, 30) == 1


def test_vbmf_ranks_move_with_the_calibration() -> None:
    draw = np.random.default_rng(0)
    low = np.einsum(
        "ir,abrs,so->iabo",
        draw.standard_normal((24, 4)),
        draw.standard_normal((3, 3, 4, 6)),
        draw.standard_normal((6, 32)),
    )
    weight = (low + 0.3 * draw.standard_normal(low.shape))[None]
    fit = METHODS["tucker"].fit(weight, Metric(), 0)
    assert by_vbmf(fit) == (4, 6)
    assert by_vbmf(fit, 1.0) == (24, 32) and by_vbmf(fit, -1.0) == (1, 1)
    assert by_vbmf(fit, 0.5) == (14, 19) and by_vbmf(fit, -0.5) == (2, 3)
    assert calibrated(10, 20, 0.5) == 15 and calibrated(10, 20, -0.5) == 5 and calibrated(0, 20, 0.0) == 1


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 40))
def test_rounding_stays_within(rank: int, step: int, most: int) -> None:
    found = rounded(rank, step, most)
    assert 1 <= found <= most
    assert found % step == 0 or found == most or found == min(rank, most) or step > most


def test_costs_follow_strides() -> None:
    """1x1 in front of a stride runs at the input's size, behind it at the output's."""
    stages = [Stage("in", 1, 8, (1, 1), 4), Stage("core", 1, 4, (3, 3), 4, (0, 1)), Stage("out", 1, 4, (1, 1), 8)]
    assert Geometry(2, (8, 8), (4, 4)).macs(stages) == 2 * (64 * 32 + 16 * 144 + 16 * 32)
    assert Geometry(2, (4, 4), (8, 8), spreading=True).macs(stages) == 2 * (16 * 32 + 16 * 144 + 64 * 32)
    assert Geometry(3, looked_up=True).macs([Stage("core", 1, 100, (), 4), Stage("out", 1, 4, (), 8)]) == 96
