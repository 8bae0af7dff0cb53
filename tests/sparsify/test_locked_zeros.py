"""Zeros stay zeros: in the regression of a layer, in the fit with an activation, in the optimiser."""

import numpy as np
import pytest

from onnxprune.recovery.regression import Dense, RidgeRegression, Sums, masked_solve, solve
from onnxprune.training.step import Adam, Parameters


def literal(gram, cross, ridge, mask):
    """Each output's own normal equations."""
    result = np.zeros_like(cross)
    for part, matrix in enumerate(gram):
        for output in range(cross.shape[2]):
            own = np.flatnonzero(mask[part, :, output])
            square = matrix[np.ix_(own, own)] + ridge * np.eye(own.size)
            result[part, own, output] = np.linalg.solve(square, cross[part, own, output])
    return result


def test_masked_solve_is_the_regression_of_every_output_alone() -> None:
    rng = np.random.default_rng(0)
    data, target = rng.normal(size=(2, 200, 12)), rng.normal(size=(2, 200, 5))
    mask = rng.random((2, 12, 5)) < 0.5
    gram, cross = data.transpose(0, 2, 1) @ data, data.transpose(0, 2, 1) @ target
    found = masked_solve(Dense(gram), cross, 0.3, mask)
    np.testing.assert_allclose(found, literal(gram, cross, 0.3, mask), atol=1e-9)


@pytest.mark.parametrize("mode", ["bias", "bn", "lstsq", "full"])
@pytest.mark.parametrize("fixed_bias", [False, True])
def test_a_masked_recovery_keeps_zeros_and_never_raises_the_error(mode: str, fixed_bias: bool) -> None:
    rng = np.random.default_rng(1)
    data = rng.normal(size=(1, 400, 80)) @ rng.normal(size=(80, 80)) + 1
    matrix, bias = rng.normal(size=(1, 80, 6)), np.zeros((1, 6))
    target = data @ matrix
    zeros = rng.random(matrix.shape) < 0.5
    pruned = np.where(zeros, 0.0, matrix)
    train, hold_out = Sums.of(data[:, :300], target[:, :300]), Sums.of(data[:, 300:], target[:, 300:])
    solution = solve(train, hold_out, pruned, bias, mode=mode, fixed_bias=fixed_bias, mask=~zeros)
    assert not solution.matrix[zeros].any()
    assert solution.after <= solution.before
    if mode in ("lstsq", "full"):
        assert solution.after < 0.7 * solution.before
        regression = RidgeRegression(train, pruned, bias, fixed_bias, ~zeros)
        for ridge in (1e-6, 1e-2, 1.0):
            assert train.error(*regression.fit(ridge)).sum() <= train.error(pruned, bias).sum()


def test_the_optimiser_moves_no_locked_zero() -> None:
    rng = np.random.default_rng(2)
    values = {name: np.where(rng.random((4, 6)) < 0.5, 0, 1).astype(np.float32) for name in ("a", "b")}
    parameters = Parameters(values, locked=["a"])
    optimizer = Adam(parameters, np.ones_like(parameters.vector))
    for _ in range(3):
        optimizer.update(rng.normal(size=parameters.vector.size).astype(np.float32), 0.1)
    after = parameters.views(parameters.vector)
    assert not after["a"][values["a"] == 0].any()
    assert after["a"][values["a"] == 1].all() and after["b"].all()
    assert (parameters.scales().reshape(2, 4, 6)[0] == 0).sum() == (values["a"] == 0).sum()
