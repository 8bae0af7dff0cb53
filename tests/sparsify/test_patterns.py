"""Patterns have exactly the zeros that they should; the OBS update is that of a literal implementation."""

import numpy as np
import pytest

from onnxprune.sparsification import scores as score
from onnxprune.sparsification.obs import inverse_factor, prune_columns
from onnxprune.sparsification.patterns import LOCKED, Pattern, by_taps, named


def gram(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(4 * n, n)) @ rng.normal(size=(n, n))
    return data.T @ data / len(data)


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:8", "7:8"])
def test_groups_keep_exactly_n_of_m(text: str) -> None:
    pattern = Pattern.of(text)
    scores = np.random.default_rng(0).random((2, 48, 5))
    zeros = pattern.zeros(scores, 0)
    counts = zeros.reshape(2, 48 // pattern.group, pattern.group, 5).sum(axis=2)
    assert (counts == pattern.group - pattern.nonzero).all()
    assert pattern.holds(zeros) and zeros.mean() == pattern.ratio
    groups = scores.reshape(2, -1, pattern.group, 5)
    lost = np.where(zeros.reshape(groups.shape), groups, 0).sum()
    assert lost == pytest.approx(np.sort(groups, axis=2)[:, :, : pattern.group - pattern.nonzero].sum())


@pytest.mark.parametrize("text", ["unstructured", "4x1", "1x4", "2x3"])
@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_blocks_and_single_weights_have_exact_counts(text: str, count: int) -> None:
    pattern = Pattern.of(text)
    scores = np.random.default_rng(1).random((2, 12, 8))
    zeros = pattern.zeros(scores, count)
    assert zeros.sum() == count * pattern.block
    assert pattern.holds(zeros)
    if pattern.block == 1:
        assert scores[zeros].max(initial=0) <= scores[~zeros].min()
        even = pattern.zeros(scores, count, per_output=True)
        assert even.sum() == count and np.ptp(even.sum(axis=1)) <= 1


def test_ties_and_locked_zeros() -> None:
    scores = np.ones((1, 4, 3))
    scores[0, 3, 2] = LOCKED
    zeros = Pattern().zeros(scores, 5)
    assert zeros.sum() == 5 and zeros[0, 3, 2]


@pytest.mark.parametrize(
    ("text", "channels", "outputs", "told"),
    [
        ("2:4", 6, 8, "6 input channels"),
        ("4x1", 8, 6, "6 outputs"),
        ("1x8", 4, 4, "4 input channels"),
        ("2:4", 8, 3, ""),
    ],
)
def test_sizes_that_a_pattern_does_not_fit(text: str, channels: int, outputs: int, told: str) -> None:
    why = Pattern.of(text).misfit(channels, outputs)
    assert (told in why) if told else not why


def test_what_zeros_show() -> None:
    rng = np.random.default_rng(2)
    scores = rng.random((1, 32, 8))
    for text in ("2:4", "1:4", "2:8", "4x1", "1x4"):
        pattern = Pattern.of(text)
        assert named(pattern.zeros(scores, 12), 32) == text
    assert named(Pattern().zeros(scores, 100), 32) == "unstructured"
    assert named(np.zeros((1, 8, 2), bool), 8) == ""


def test_progress_towards_n_of_m() -> None:
    assert [str(Pattern.of("2:8").at(share)) for share in (0.1, 0.5, 1.0)] == ["7:8", "5:8", "2:8"]


def test_energy_and_global_ranking() -> None:
    scores = np.asarray([4.0, 3.0, 2.0, 1.0]).reshape(1, 4, 1)
    assert score.blocks_by_energy(scores, Pattern(), 0.7) == 2  # 1 + 2 of 10
    assert score.blocks_by_energy(scores, Pattern(), 1.0) == 0
    other = np.asarray([100.0, 100.0, 1.0, 1.0]).reshape(1, 4, 1)
    assert score.blocks_globally([scores, other], Pattern(), 0.5, 0.9) == [2, 2]
    assert score.blocks_globally([scores, other], Pattern(), 0.9, 0.5) == [2, 2]  # no layer loses more than half


def literal(matrix: np.ndarray, hessian: np.ndarray, pattern: Pattern, zeros: np.ndarray | None) -> np.ndarray:
    """Prune column by column, each time with the inverse Hessian of the columns that are left (OBS)."""
    weights, n = matrix.copy(), len(matrix)
    chosen = np.zeros(weights.shape, bool) if zeros is None else zeros.copy()
    for j in range(n):
        if zeros is None and j % pattern.group == 0:
            # [H_j:^-1]_kk of a column k behind is what it is once those between are fixed: U_kk^2.
            own = [np.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + pattern.group)]
            group = np.square(weights[j : j + pattern.group]) / np.asarray(own)[:, None]
            chosen[j : j + pattern.group] = pattern.zeros(group[None], 0)[0]
        inverse = np.linalg.inv(hessian[j:, j:])
        for output in np.flatnonzero(chosen[j]):
            weights[j:, output] -= weights[j, output] / inverse[0, 0] * inverse[0]
            weights[j, output] = 0.0
    return weights


@pytest.mark.parametrize("text", ["2:4", "1:4"])
def test_obs_is_the_literal_update(text: str) -> None:
    rng, pattern, n = np.random.default_rng(3), Pattern.of(text), 24
    matrix, square = rng.normal(size=(n, 6)), gram(n)
    damped = square + 0.01 * np.trace(square) / n * np.eye(n)
    found = prune_columns(matrix, inverse_factor(square), pattern, 0, np.zeros(matrix.shape, bool))
    np.testing.assert_allclose(found, literal(matrix, damped, pattern, None), atol=1e-8)


@pytest.mark.parametrize("text", ["unstructured", "2x1", "1x2"])
def test_obs_of_several_blocks_of_columns(text: str) -> None:
    rng, pattern, n = np.random.default_rng(4), Pattern.of(text), 140
    matrix, square = rng.normal(size=(n, 4)), gram(n)
    frozen = rng.random(matrix.shape) < 0.05
    matrix[frozen] = 0
    count = n * 4 // pattern.block * 3 // 5
    found = prune_columns(matrix, inverse_factor(square), pattern, count, frozen)
    zeros = found == 0
    assert zeros.sum() == count * pattern.block if pattern.block == 1 else zeros.sum() >= count * pattern.block
    if pattern.block == 1:
        assert zeros[frozen].all()
        damped = square + 0.01 * np.trace(square) / n * np.eye(n)
        np.testing.assert_allclose(found, literal(matrix, damped, pattern, zeros), atol=1e-7)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "2x1"])
def test_obs_loses_less_than_scores_alone(text: str) -> None:
    rng, pattern, n = np.random.default_rng(6), Pattern.of(text), 200
    matrix, count = rng.normal(size=(n, 4)), n * 4 // pattern.block // 2
    square = np.power(0.9, np.abs(np.subtract.outer(np.arange(n), np.arange(n))))

    def error(new: np.ndarray) -> float:
        return float(np.sum((new - matrix) * (square @ (new - matrix))))

    found = prune_columns(matrix, inverse_factor(square), pattern, count, np.zeros(matrix.shape, bool))
    scores = score.wanda(matrix[None], np.diagonal(square)[None])
    assert error(found) < 0.4 * error(np.where(pattern.zeros(scores, count)[0], 0.0, matrix))


def test_a_gram_matrix_without_full_rank() -> None:
    data = np.random.default_rng(5).normal(size=(3, 16))
    factor = inverse_factor(data.T @ data)
    assert np.isfinite(factor).all() and (np.diagonal(factor) > 0).all()
    assert np.isfinite(inverse_factor(np.zeros((4, 4)))).all()


def test_the_order_of_columns() -> None:
    assert by_taps(3, 6).tolist() == [0, 3, 1, 4, 2, 5]
