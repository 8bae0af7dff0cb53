"""A repair that does harm is worse than none: few, noisy, constant or one-sided data."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from planted import Planted, draw, error, how, outputs, plan, repaired, weights

import onnxprune as op
from onnxprune.channels.plan import Plan
from onnxprune.recovery.regression import (
    RIDGES,
    FewRows,
    RidgeRegression,
    Sums,
    affine,
    least_squares,
    moments,
    shift,
    solve,
)

Array = NDArray[Any]
Case = tuple[onnx.ModelProto, Plan]


def layers(net: Planted) -> Case:
    """48 unknowns an output, and a third of what they meet is gone."""
    x = net.input("x", ["N", 24])
    y = net.linear(x, 24, 48, gemm=True)
    z = net.linear(net.op("Relu", y), 48, 48, gemm=True)
    end = net.linear(net.op("Relu", z), 48, 6, gemm=True)
    return net.model(end), plan((y, 1, 48, range(0, 48, 3)), (z, 1, 48, range(0, 48, 4)))


def convolutions(net: Planted) -> Case:
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 12)
    z = net.conv(net.op("Relu", y), 12, 12)
    end = net.linear(net.op("Flatten", net.op("Relu", z)), 432, 5, gemm=True)
    return net.model(end), plan((y, 1, 12, [0, 3, 6]), (z, 1, 12, [1, 2, 7]))


# -- on whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 4, 8, 40])
@pytest.mark.parametrize("build", [layers, convolutions])
def test_noise_and_more_unknowns_than_samples(build: Callable[[Planted], Case], samples: int) -> None:
    """On samples that nobody has seen: better on average and never much worse; one sample may say too little."""
    ratios = []
    for seed in range(3):
        model, removal = build(Planted(17, seed=seed))
        before, result = repaired(model, removal, draw(model, samples, seed + 10))
        fresh = draw(model, 100, 1)
        ratios.append(error(model, result.model, fresh) / error(model, before, fresh))
    allowed = 1.0 if samples >= 40 else 1.3
    assert max(ratios) <= allowed and np.exp(np.mean(np.log(ratios))) <= (1.03 if samples < 8 else 0.97), ratios


@pytest.mark.parametrize("build", [layers, convolutions])
def test_samples_that_are_all_the_same(build: Callable[[Planted], Case]) -> None:
    """The repair is exact there, and weights stay finite."""
    model, removal = build(Planted(17, seed=1))
    one = draw(model, 1)
    data = {n: np.repeat(v, 24, axis=0) for n, v in one.items()}
    before, result = repaired(model, removal, data)
    assert all(np.isfinite(w).all() for w in weights(result.model).values())
    for a, b, c in zip(outputs(model, one), outputs(before, one), outputs(result.model, one), strict=True):
        assert np.abs(a - c).max() <= 0.1 * np.abs(a - b).max()


def test_samples_of_zeros() -> None:
    model, removal = convolutions(Planted(17, seed=1))
    _, result = repaired(model, removal, {"x": np.zeros((24, 3, 6, 6), np.float32)})
    assert all(np.isfinite(w).all() for w in weights(result.model).values())


@pytest.mark.parametrize("build", [layers, convolutions])
def test_samples_of_one_class(build: Callable[[Planted], Case]) -> None:
    """Around one point the repair helps on others around that point."""
    model, removal = build(Planted(17, seed=2))
    centre = draw(model, 1, 5)["x"]
    near = [centre + 0.2 * draw(model, n, n)["x"] for n in (48, 200)]
    before, result = repaired(model, removal, {"x": near[0]})
    fresh = {"x": near[1]}
    assert error(model, result.model, fresh) < 0.6 * error(model, before, fresh), how(result)


@pytest.mark.parametrize("mode", ["bias", "bn", "lstsq", "full"])
def test_more_is_won_from_more_samples(mode: str) -> None:
    model, removal = convolutions(Planted(17, seed=2))
    fresh = draw(model, 100, 1)
    found = [repaired(model, removal, draw(model, n, 3), mode) for n in (10, 100)]
    few, many = (error(model, result.model, fresh) for _, result in found)
    assert many < 1.02 * few and many < error(model, found[0][0], fresh)


def test_a_sum_is_repaired_better_than_its_parts() -> None:
    """A branch makes up for what another lost."""
    net = Planted(17, seed=1)
    stream = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)
    for _ in range(2):
        inner = net.conv(net.op("Relu", stream), 8, 10)
        stream = net.op("Add", stream, net.conv(net.op("Relu", inner), 10, 8))
    model = net.model(net.conv(stream, 8, 4))
    removal = plan((stream, 1, 8, [1, 5]), (inner, 1, 10, [0, 4, 7]))
    fresh = draw(model, 100, 1)
    left = {
        m: error(model, repaired(model, removal, draw(model, 100, 3), m)[1].model, fresh) for m in ("lstsq", "full")
    }
    assert left["full"] < left["lstsq"]


def test_inputs_of_the_cut_model_make_up_for_what_others_lost() -> None:
    """Fitted from the original's own inputs every layer is right for data that it never meets."""
    model, removal = layers(Planted(17, seed=1))
    data, fresh = draw(model, 400, 3), draw(model, 100, 1)
    left = {}
    for symmetric in (False, True):
        stages = [op.passes.Prune(plan=removal), op.passes.Recover("lstsq", symmetric=symmetric)]
        left[symmetric] = error(model, op.Pipeline(stages).run(model, data=data).model, fresh)
    before = op.Pipeline([op.passes.Prune(plan=removal)]).run(model).model
    assert left[False] < left[True] < error(model, before, fresh)


# -- one problem -------------------------------------------------------------------------------------------------------


def problem(seed: int, rows: int, parts: int = 2, n: int = 6, o: int = 3, noise: float = 0.3) -> tuple[Array, Array]:
    rng = np.random.default_rng([seed, rows])
    data = rng.standard_normal((parts, rows, n)) + 0.5
    truth = np.random.default_rng(seed).standard_normal((parts, n, o))
    return data, data @ truth + 1.5 + noise * rng.standard_normal((parts, rows, o))


def sums(seed: int, rows: int, **settings: Any) -> Sums:
    return Sums.of(*problem(seed, rows, **settings))


@given(seed=st.integers(0, 30), rows=st.integers(1, 40), held=st.integers(1, 20),
       mode=st.sampled_from(["bias", "bn", "lstsq", "full"]), fixed=st.booleans())  # fmt: skip
@settings(max_examples=60)
def test_what_is_chosen_errs_less_on_held_out_rows(seed: int, rows: int, held: int, mode: str, fixed: bool) -> None:
    """Or the very weights that there are come back."""
    train, apart = sums(seed, rows), sums(seed, 1000 + held)
    matrix, bias = np.random.default_rng(seed).standard_normal((2, 6, 3)), np.zeros((2, 3))
    found = solve(train, apart, matrix, bias, mode=mode, fixed_bias=fixed)
    assert found.after <= found.before
    if found.how == "kept":
        assert found.matrix is matrix and found.bias is bias and found.after == found.before
    else:
        assert found.after < found.before * (1 - 1e-3)
        assert not fixed or not found.bias.any()
    assert np.isfinite(found.matrix).all() and np.isfinite(found.bias).all()


def test_errors_are_those_of_the_rows() -> None:
    data, target = problem(1, 50)
    rng = np.random.default_rng(0)
    matrix, bias = rng.standard_normal((2, 6, 3)), rng.standard_normal((2, 3))
    wanted = np.square(data @ matrix + bias[:, None] - target).sum(axis=1)
    np.testing.assert_allclose(Sums.of(data, target).error(matrix, bias), wanted, rtol=1e-9)
    half = Sums.of(data[:, :20], target[:, :20])
    rest = Sums.of(data[:, 20:], target[:, 20:])
    np.testing.assert_allclose((half + rest).error(matrix, bias), wanted, rtol=1e-9)
    half.add(rest)
    np.testing.assert_allclose(half.error(matrix, bias), wanted, rtol=1e-9)


def test_fits_are_those_of_the_formulas() -> None:
    """Ridge regression around the weights there are, means that vanish, and the best scale."""
    data, target = problem(2, 80)
    total, rng = Sums.of(data, target), np.random.default_rng(0)
    matrix, bias = rng.standard_normal((2, 6, 3)), rng.standard_normal((2, 3))
    fitted, shifted = least_squares(total, matrix, bias, 0.1)
    centred = data - data.mean(axis=1, keepdims=True)
    residual = (target - target.mean(axis=1, keepdims=True)) - centred @ matrix
    gram = np.matmul(centred.transpose(0, 2, 1), centred)
    step = 0.1 * np.einsum("pii->", gram) / 12
    change = np.linalg.solve(gram + step * np.eye(6), np.matmul(centred.transpose(0, 2, 1), residual))
    np.testing.assert_allclose(fitted, matrix + change, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose((data @ fitted + shifted[:, None] - target).mean(axis=1), 0.0, atol=1e-9)
    same, moved = shift(total, matrix, bias)
    assert same is matrix
    np.testing.assert_allclose((data @ same + moved[:, None] - target).mean(axis=1), 0.0, atol=1e-9)
    scaled, offset = affine(total, matrix, bias)
    best = total.error(scaled, offset)
    for factor in (0.99, 1.01):
        other, its = shift(total, scaled * factor, bias)
        assert (total.error(other, its) >= best).all()
    np.testing.assert_allclose(scaled / matrix, (scaled / matrix)[:, :1].repeat(6, axis=1))


def test_fits_without_a_bias_keep_it() -> None:
    """The best weights for a bias of 0 are not those for a free one."""
    data, target = problem(3, 80)
    total = Sums.of(data, target)
    matrix, bias = np.zeros((2, 6, 3)), np.zeros((2, 3))
    fitted, same = least_squares(total, matrix, bias, 1e-9, fixed_bias=True)
    assert same is bias
    wanted = np.stack([np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(data, target, strict=True)])
    np.testing.assert_allclose(fitted, wanted, rtol=1e-5, atol=1e-6)
    scaled, same = affine(total, fitted * 3.0, bias, fixed_bias=True)
    assert same is bias
    np.testing.assert_allclose(scaled, fitted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", RIDGES)
def test_dead_columns_are_no_obstacle(ridge: float) -> None:
    data, target = problem(4, 60)
    data[..., 2] = 0.0
    data[..., 4] = data[..., 5]
    fitted, shifted = least_squares(Sums.of(data, target), np.zeros((2, 6, 3)), np.zeros((2, 3)), ridge)
    assert np.isfinite(fitted).all() and np.isfinite(shifted).all()
    assert np.allclose(fitted[:, 2], 0.0), "what cannot matter stays as it is"
    np.testing.assert_allclose(fitted[:, 4], fitted[:, 5], rtol=1e-4, atol=1e-6)


def test_nothing_that_varies_leaves_everything_as_it_is() -> None:
    data, target = np.zeros((1, 10, 4)), np.zeros((1, 10, 2))
    matrix, bias = np.ones((1, 4, 2)), np.zeros((1, 2))
    found = solve(Sums.of(data, target), Sums.of(data, target), matrix, bias)
    assert found.how == "kept" and found.matrix is matrix


def test_large_products_in_short_runs_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    data, target = (a.astype(np.float32) for a in problem(5, 5000))
    double = Sums.of(data, target)
    monkeypatch.setattr("onnxprune.recovery.regression._DOUBLE", 0)
    single = Sums.of(data, target)
    for name in ("x", "y", "xx", "xy", "yy"):
        np.testing.assert_allclose(getattr(single, name), getattr(double, name), rtol=1e-5)


@pytest.mark.parametrize("fixed", (False, True))
@pytest.mark.parametrize("masked", (False, True))
def test_few_rows_give_what_sums_give(fixed: bool, masked: bool) -> None:
    data, target = problem(6, 30, n=40)
    data[..., 3] = data[..., 4]
    few, dense = FewRows(data, target), Sums.of(data, target)
    rng = np.random.default_rng(0)
    matrix, bias = rng.standard_normal((2, 40, 3)), np.zeros((2, 3))
    assert few.rows == dense.rows and few.directions() == dense.directions() == 29
    assert few.scale == pytest.approx(dense.scale)
    np.testing.assert_allclose(few.error(matrix, bias + 1), dense.error(matrix, bias + 1), rtol=1e-9)
    for one, other in zip(affine(few, matrix, bias, fixed), affine(dense, matrix, bias, fixed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    mask = rng.random(matrix.shape) < 0.7 if masked else None
    regressions = [RidgeRegression(sums, matrix, bias, fixed, mask) for sums in (few, dense)]
    for targets in ((), (2 * dense.xy, 2 * dense.y)):
        pairs = zip(*(regression.fit(1e-3, *targets) for regression in regressions), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5 if masked else 1e-8)


def test_few_rows_of_a_wide_layer_make_no_gram_matrix() -> None:
    data, target = problem(7, 24, parts=1, n=1500)
    blocks = [(data[:, at : at + 8].astype(np.float32), target[:, at : at + 8]) for at in (0, 8, 16)]
    matrix, bias = np.zeros((1, 1500, 3)), np.zeros((1, 3))
    tracemalloc.start()
    found = solve(moments(blocks[:2]), moments(blocks[2:]), matrix, bias)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.how != "kept" and peak < 1500**2 * 8 / 5
    assert isinstance(moments([(data[:, :, :8], target)]), Sums)
    many = (np.concatenate([a] * 70, axis=1) for a in (data, target))
    assert isinstance(moments([tuple(many)]), Sums)  # type: ignore[list-item]


class Counted(RidgeRegression):
    """A regression that lists the ridges it is fitted with."""

    def fit(self, ridge: float, xy: Any = None, y: Any = None) -> Any:
        self.__dict__.setdefault("tried", []).append(ridge)
        return super().fit(ridge, xy, y)


@pytest.mark.parametrize("noise", (1e-3, 30.0, 300.0))
def test_wide_layers_try_ridges_from_the_middle_outwards(noise: float) -> None:
    """The same choice as with all of them, from fewer fits; and the factor of a ridge serves further targets."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((1, 600, 300)) @ rng.standard_normal((1, 300, 300))
    target = data @ rng.standard_normal((1, 300, 2)) + noise * rng.standard_normal((1, 600, 2))
    train, held = Sums.of(data[:, :450], target[:, :450]), Sums.of(data[:, 450:], target[:, 450:])
    matrix, bias = np.zeros((1, 300, 2)), np.zeros((1, 2))
    regression = Counted(train, matrix, bias)
    found = solve(train, held, matrix, bias, mode="lstsq", regression=regression)
    errors = [held.error(*least_squares(train, matrix, bias, r)).sum() for r in RIDGES]
    assert found.ridge == RIDGES[int(np.argmin(errors))]
    tried = regression.__dict__["tried"]
    assert len(tried) == len(set(tried)) <= len(RIDGES) - 1
    other = Sums.of(data[:, :450], 2 * target[:, :450])
    again, shifted = regression.fit(0.1, other.xy, other.y)
    expected, offset = least_squares(other, matrix, bias, 0.1)
    np.testing.assert_allclose(again, expected, rtol=1e-9)
    np.testing.assert_allclose(shifted, offset, rtol=1e-9, atol=1e-9)
