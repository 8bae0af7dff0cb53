"""Second moments that rounding left without a root still whiten."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.factorization.decompositions import Metric, Svd, ridged, root


def rounded(n: int, seed: int = 0) -> np.ndarray:
    """Second moments of one direction and a little noise, off by more than the ridge as sums in float32 can be."""
    rng = np.random.default_rng(seed)
    gram = 1e-9 * np.eye(n)
    gram[0, 0] = 1.0
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    wrong = rng.standard_normal((n, n)) * 4e-6
    return np.asarray((turn @ gram @ turn.T + (wrong + wrong.T) / 2)[None])


def test_a_root_is_found_behind_rounding() -> None:
    moments = ridged(rounded(256))
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(moments)
    half = root(moments)
    assert np.abs(half @ half.transpose(0, 2, 1) - moments).max() < 1e-3


def test_a_root_that_exists_is_the_root() -> None:
    rows = np.random.default_rng(1).standard_normal((1, 40, 12))
    moments = rows.transpose(0, 2, 1) @ rows
    assert np.array_equal(root(moments), np.linalg.cholesky(moments))


def test_what_is_not_finite_has_none() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        root(np.full((1, 3, 3), -np.inf))


def test_layers_are_taken_apart_by_such_moments() -> None:
    kernel = np.random.default_rng(2).standard_normal((1, 256, 512))
    fit = Svd().fit(kernel, Metric(full=rounded(256)), 0)
    assert all(np.isfinite(f.array).all() for f in fit.factors((32,)))
