"""Laws of every decomposition: all of it at full rank, less error with more rank, the best there is at the end."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxprune.factorization.decompositions import METHODS, Metric, compose, features, shape_of

Real = NDArray[np.float64]
# Parts, channels of a part, kernel, outputs of a part.
KERNELS = [
    (1, 6, (3, 3), 8),
    (2, 4, (3, 2), 5),
    (1, 5, (3,), 7),
    (1, 4, (2, 3, 2), 3),
    (1, 6, (), 9),
    (2, 9, (), 4),
    (3, 4, (1, 1), 5),
    (4, 1, (5, 5), 1),
    (1, 4, (5, 5), 6),
    (1, 6, (1, 3), 4),
]
METRICS = ("plain", "shared", "full")


def kernel(parts: int, channels: int, space: tuple[int, ...], outputs: int, seed: int = 0) -> Real:
    return np.random.default_rng(seed).standard_normal((parts, channels, *space, outputs))


def gram(parts: int, n: int, rows: int, seed: int = 1) -> Real:
    draw = np.random.default_rng(seed)
    data = draw.standard_normal((parts, rows, n)) @ draw.standard_normal((parts, n, n))
    return data.transpose(0, 2, 1) @ data / rows


def metric(kind: str, weight: Real) -> Metric:
    parts, channels, *space, _ = weight.shape
    if kind == "plain":
        return Metric()
    if kind == "shared":
        return Metric(per_channel=gram(parts, channels, 40))
    return Metric(full=gram(parts, channels * prod(space), 300))


def cases() -> list[tuple[str, str, tuple[int, tuple[int, ...]]]]:
    found = []
    for number, sizes in enumerate(KERNELS):
        for name, method in METHODS.items():
            if not method.refusal(shape_of(kernel(*sizes))):
                found += [(name, kind, number) for kind in METRICS]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "kind", "number"), cases())
def test_all_of_it_at_full_rank(name: str, kind: str, number: int) -> None:
    weight = kernel(*KERNELS[number])
    method, shape, seen = METHODS[name], shape_of(weight), metric(kind, weight)
    ranks = method.limits(shape)
    full = [ranks]
    if name == "tucker":
        full += [(ranks[0], 0), (0, ranks[1])]
        full += [(*ranks, *shape.kernel)] if max(shape.kernel) >= 5 else []
    fit = method.fit(weight, seen, 0)
    for chosen in full:
        factors = fit.factors(chosen)
        assert [f.stage for f in factors] == method.stages(shape, chosen)
        assert all(f.array.shape[0] == f.stage.parts for f in factors)
        np.testing.assert_allclose(compose(factors, shape.parts, shape.inputs), weight, atol=1e-6)


@pytest.mark.parametrize(("name", "kind", "number"), [c for c in cases() if c[0] != "cp"])
def test_more_rank_is_less_error(name: str, kind: str, number: int) -> None:
    weight = kernel(*KERNELS[number])
    method, shape, seen = METHODS[name], shape_of(weight), metric(kind, weight)
    fit = method.fit(weight, seen, 0)
    limits = method.limits(shape)
    errors = []
    for share in (0.25, 0.5, 0.75, 1.0):
        ranks = tuple(max(1, round(share * n)) for n in limits)
        errors.append(seen.error(weight, compose(fit.factors(ranks), shape.parts, shape.inputs)))
    assert all(a >= b - 1e-9 for a, b in pairwise(errors))
    assert errors[0] < 1.0


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("sizes", [(1, 6, (3, 3), 8), (2, 4, (), 5), (1, 5, (), 12)])
def test_svd_is_the_best_there_is(kind: str, sizes: tuple[int, int, tuple[int, ...], int]) -> None:
    """Against the singular values of the whitened matrix, the slow way."""
    weight = kernel(*sizes)
    seen, shape = metric(kind, weight), shape_of(weight)
    matrix = weight.reshape(shape.parts, shape.columns, shape.outputs)
    rank = 2
    lost = whole = 0.0
    for part in range(shape.parts):
        if kind == "plain":
            moments = np.eye(shape.columns)
        elif kind == "shared":
            assert seen.per_channel is not None
            moments = np.kron(seen.per_channel[part], np.eye(prod(shape.kernel)))
        else:
            assert seen.full is not None
            moments = seen.full[part]
        values = np.linalg.svd(np.linalg.cholesky(moments).T @ matrix[part], compute_uv=False) ** 2
        lost, whole = lost + values[rank:].sum(), whole + values.sum()
    made = compose(METHODS["svd"].fit(weight, seen, 0).factors((rank,)), shape.parts, shape.inputs)
    assert seen.error(weight, made) == pytest.approx(lost / whole, rel=1e-6)


@pytest.mark.parametrize("name", ["tucker", "spatial-svd", "cp"])
def test_the_last_factor_is_the_best_there_is(name: str) -> None:
    """Against least squares on rows of data."""
    weight = kernel(1, 5, (3, 3), 7)
    draw = np.random.default_rng(5)
    data = draw.standard_normal((500, 45)) @ draw.standard_normal((45, 45))
    seen = Metric(full=(data.T @ data / 500)[None])
    ranks = (3, 0) if name == "tucker" else (6,)
    factors = METHODS[name].fit(weight, seen, 0).factors(ranks)
    made = compose(factors, 1, 5)
    rows = data.reshape(500, 1, 5, 3, 3).transpose(1, 2, 3, 4, 0)
    columns = features(factors[:-1], rows)[0].reshape(-1, 500).T
    target = data @ weight.reshape(45, 7)
    best, *_ = np.linalg.lstsq(columns, target, rcond=None)
    least = np.square(target - columns @ best).sum()
    # The ridge is part of the metric, not of these rows.
    assert np.square(data @ (weight - made).reshape(45, 7)).sum() <= least * 1.02 + 1e-9


@pytest.mark.parametrize("name", ["tucker", "cp", "spatial-svd", "svd"])
def test_data_make_it_better_where_it_counts(name: str) -> None:
    """With inputs that vary along few directions, the error on them is far below that of a plain decomposition."""
    weight = kernel(1, 8, (3, 3), 8)
    scale = np.repeat(np.geomspace(1.0, 1e-2, 8), 9)
    seen = Metric(full=np.diag(scale**2)[None])
    ranks = (4, 4) if name == "tucker" else (4 if name == "svd" else 10,)
    method = METHODS[name]
    plain, aware = (compose(method.fit(weight, m, 0).factors(ranks), 1, 8) for m in (Metric(), seen))
    assert seen.error(weight, aware) < 0.8 * seen.error(weight, plain)


def test_planted_rank_is_found() -> None:
    draw = np.random.default_rng(0)
    core = draw.standard_normal((3, 3, 3, 4))
    weight = np.einsum("rabs,ir,so->iabo", core, draw.standard_normal((9, 3)), draw.standard_normal((4, 10)))[None]
    made = compose(METHODS["tucker"].fit(weight, Metric(), 0).factors((3, 4)), 1, 9)
    np.testing.assert_allclose(made, weight, atol=1e-9)
    terms = [draw.standard_normal((n, 3)) for n in (9, 3, 3, 10)]
    weight = np.einsum("ir,ar,br,or->iabo", *terms)[None]
    made = compose(METHODS["cp"].fit(weight, Metric(), 0).factors((3,)), 1, 9)
    assert Metric().error(weight, made) < 1e-6


def test_the_same_seed_gives_the_same_factors() -> None:
    weight = kernel(1, 8, (3, 3), 8)
    for name, ranks in (("tucker", (4, 4)), ("cp", (6,)), ("spatial-svd", (5,)), ("svd", (3,))):
        one, other = (METHODS[name].fit(weight, Metric(), 3).factors(ranks) for _ in range(2))
        for a, b in zip(one, other, strict=True):
            assert np.array_equal(a.array, b.array)


@pytest.mark.parametrize("name", list(METHODS))
def test_zeros_stay_zeros(name: str) -> None:
    """A kernel of zeros (a layer that was switched off) is taken apart without complaint."""
    weight = np.zeros((1, 6, 3, 3, 8))
    ranks = (3, 3) if name == "tucker" else (4,)
    made = compose(METHODS[name].fit(weight, Metric(full=np.zeros((1, 54, 54))), 0).factors(ranks), 1, 6)
    assert np.isfinite(made).all() and not made.any()
