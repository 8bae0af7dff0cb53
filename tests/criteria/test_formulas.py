"""Every criterion against its paper's formula, written out with loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from cases import LAYOUTS, Case, draw, scores

from onnxprune.importance import criteria


def weights_of(case: Case, channel: int) -> list[float]:
    return [float(w) for w in case.weights[channel].ravel()]


def values_of(case: Case, channel: int) -> list[float]:
    return [float(x) for x in case.maps[:, channel].ravel()]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def l1(case: Case, c: int) -> float:
    return math.fsum(abs(w) for w in weights_of(case, c))


def l2(case: Case, c: int) -> float:
    return math.sqrt(math.fsum(w * w for w in weights_of(case, c)))


def gm(case: Case, c: int) -> float:
    return math.fsum(math.dist(weights_of(case, c), weights_of(case, j)) for j in range(case.units.size))


def lamp(case: Case, c: int) -> float:
    every = [float(w) for w in case.weights.ravel()]
    return math.fsum(w * w / math.fsum(v * v for v in every if abs(v) >= abs(w)) for w in weights_of(case, c))


def nuclear(case: Case, c: int) -> float:
    rows = case.maps[:, c].reshape(len(case.maps), -1)
    return float(np.linalg.svd(rows, compute_uv=False).sum())


def hrank(case: Case, c: int) -> float:
    return mean([float(np.linalg.matrix_rank(sample[c])) for sample in case.maps])


def apoz(case: Case, c: int) -> float:
    return 1.0 - mean([float(x == 0) for x in values_of(case, c)])


def activation(case: Case, c: int) -> float:
    return mean([abs(x) for x in values_of(case, c)])


def variance(case: Case, c: int) -> float:
    values = values_of(case, c)
    centre = mean(values)
    return mean([(x - centre) ** 2 for x in values]) * math.fsum(w * w for w in weights_of(case, c))


def wanda(case: Case, c: int) -> float:
    norm = math.sqrt(mean([x * x for x in values_of(case, c)]))
    return math.fsum(abs(w) * norm for w in weights_of(case, c))


def obs(case: Case, c: int) -> float:
    """The unit's share; every part is a problem of its own."""
    if case.pairs:
        return mean([x * x for x in values_of(case, c)]) * math.fsum(w * w for w in weights_of(case, c))
    members = np.flatnonzero(case.units == case.units[c])
    grams = [columns.T @ columns / len(columns) for columns in case.columns]
    damping = 1e-3 * mean([float(np.diag(gram).mean()) for gram in grams])
    per_part, taps = case.units.size // case.parts, case.weights.shape[1]
    total = 0.0
    for part, gram in enumerate(grams):
        inverse = np.linalg.inv(gram + damping * np.eye(len(gram)))
        at = [int(m % per_part) * taps + t for m in members if m // per_part == part for t in range(taps)]
        flat = case.weights[part * per_part : (part + 1) * per_part].reshape(per_part * taps, -1)
        chosen = flat[at]
        total += float(np.trace(chosen.T @ np.linalg.inv(inverse[np.ix_(at, at)]) @ chosen))
    return total / len(members)


def ziplm(case: Case, c: int) -> float:
    """Remove the unit that raises the error of the best correction least, again and again, from scratch every time."""
    members = np.flatnonzero(case.units == case.units[c])
    if case.pairs:
        return obs(case, c) / math.sqrt(math.fsum(obs(case, i) for i in range(case.units.size)))
    covariances = [np.cov(columns.T, bias=True).reshape(columns.shape[1], -1) for columns in case.columns]
    damping = 1e-3 * mean([float(np.diag(covariance).mean()) for covariance in covariances])
    rows = len(case.columns[0])
    counted = math.sqrt(rows * min(rows, len(case.maps)))
    for covariance in covariances:
        for i, j in np.ndindex(covariance.shape):
            covariance[i, j] *= 1.0 if i == j else counted / (counted + len(covariance))
    per_part, taps = case.units.size // case.parts, case.weights.shape[1]
    total = energy = 0.0
    for part, covariance in enumerate(covariances):
        flat = case.weights[part * per_part : (part + 1) * per_part].reshape(per_part * taps, -1).astype(np.float64)
        energy += float(np.trace(flat.T @ covariance @ flat))
        inverse = np.linalg.inv(covariance + damping * np.eye(len(covariance)))
        owner = np.repeat(case.units[part * per_part : (part + 1) * per_part], taps)
        gone: list[int] = []
        before = highest = 0.0
        while case.units[c] in set(owner) - set(gone):
            errors = {}
            for unit in set(owner) - set(gone):
                at = np.flatnonzero(np.isin(owner, [*gone, unit]))
                left = flat[at]
                errors[unit] = float(np.trace(left.T @ np.linalg.inv(inverse[np.ix_(at, at)]) @ left))
            weakest = min(errors, key=errors.__getitem__)
            highest = max(highest, errors[weakest] - before)
            gone, before = [*gone, weakest], errors[weakest]
            if weakest == case.units[c]:
                total += highest
    return total / math.sqrt(energy) / len(members)


def cosine_of(case: Case, i: int, j: int) -> float:
    a, b = values_of(case, i), values_of(case, j)
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return abs(dot) / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def cosine(case: Case, c: int) -> float:
    strength = [math.fsum(x * x for x in values_of(case, j)) for j in range(case.units.size)]
    stronger = [j for j, s in enumerate(strength) if s > strength[c] and case.units[j] != case.units[c]]
    return 1.0 - max((cosine_of(case, c, j) for j in stronger), default=0.0)


def snp(case: Case, c: int) -> float:
    if case.pairs:
        return math.sqrt(mean([x * x for x in values_of(case, c)])) * abs(float(case.weights[c, 0, 0]))
    return 1.0 - max(cosine_of(case, c, j) for j in range(case.units.size) if case.classes[j] != case.classes[c])


def gradients_of(case: Case, sample: int, c: int) -> list[float]:
    return [float(g) for g in case.gradients[sample, c].ravel()]


def mean_gradients(case: Case, c: int) -> list[float]:
    return [mean(list(own)) for own in zip(*(gradients_of(case, n, c) for n in range(len(case.maps))), strict=True)]


def gradient(case: Case, c: int) -> float:
    return math.fsum(abs(g) for g in mean_gradients(case, c))


def snip(case: Case, c: int) -> float:
    return math.fsum(abs(w * g) for w, g in zip(weights_of(case, c), mean_gradients(case, c), strict=True))


def snip_momentum(case: Case, c: int) -> float:
    score = 0.0
    for n in range(len(case.maps)):
        score = score + 0.9 * math.fsum(
            abs(w * g) for w, g in zip(weights_of(case, c), gradients_of(case, n, c), strict=True)
        )
    return score


def gate(case: Case, n: int, c: int) -> float:
    return math.fsum(w * g for w, g in zip(weights_of(case, c), gradients_of(case, n, c), strict=True))


def taylor(case: Case, c: int) -> float:
    return mean([abs(gate(case, n, c)) for n in range(len(case.maps))])


def fisher(case: Case, c: int) -> float:
    return mean([gate(case, n, c) ** 2 / 2 for n in range(len(case.maps))])


def obd(case: Case, c: int) -> float:
    total = 0.0
    for n in range(len(case.maps)):
        pairs = zip(weights_of(case, c), gradients_of(case, n, c), strict=True)
        total += math.fsum(w * w * g * g / 2 for w, g in pairs)
    return total / len(case.maps)


FORMULAS: dict[str, Callable[[Case, int], float]] = {
    "l1": l1,
    "l2": l2,
    "gm": gm,
    "bn": l1,  # of one number per channel, which a scale is
    "lamp": lamp,
    "nuclear": nuclear,
    "hrank": hrank,
    "apoz": apoz,
    "activation": activation,
    "variance": variance,
    "wanda": wanda,
    "obs": obs,
    "ziplm": ziplm,
    "cosine": cosine,
    "snp": snp,
    "gradient": gradient,
    "snip": snip,
    "snip-momentum": snip_momentum,
    "taylor": taylor,
    "fisher": fisher,
    "obd": obd,
}


def test_every_criterion_has_its_formula_here() -> None:
    assert set(FORMULAS) == set(criteria.names()) - {"random"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_criterion_is_its_formula(name: str, layout: str) -> None:
    case = draw(layout, seed=5)
    found = scores(name, case)
    if found is not None:
        expected = [FORMULAS[name](case, c) for c in range(case.units.size)]
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 4, 200), (1, 4, 9), (6, 4, 9), (6, 4, 1), (3, 4, 100), (1, 1, 64)], ids=str)
@pytest.mark.parametrize("cut", [False, True])
def test_l2_of_every_layout(shape: tuple[int, int, int], cut: bool) -> None:
    """Numbers are summed in the order in which they lie; a part of a weight is a view with gaps."""
    whole = np.random.default_rng(1).standard_normal((shape[0], shape[1] + 3, shape[2])).astype(np.float32)
    blocks = whole[:, 1 : 1 + shape[1]] if cut else np.ascontiguousarray(whole[:, : shape[1]])
    found = criteria.get("l2")(criteria.Slot("w", 0, blocks, [], np.arange(shape[1]), shape[1]))
    wanted = [math.sqrt(sum(float(x) ** 2 for x in blocks[:, c].ravel())) for c in range(shape[1])]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_lamp_puts_all_equal_weights_into_the_sum() -> None:
    case = draw("dense")
    levels = np.round(case.weights)
    again = Case(levels, case.maps, case.units, case.classes)
    found = scores("lamp", again)
    total = [sum(w * w / (levels[abs(levels) >= abs(w)] ** 2).sum() for w in row.ravel() if w) for row in levels]
    assert found is not None
    assert np.allclose(found, total)


@pytest.mark.parametrize("layout", ["dense", "kernel", "rows"])
def test_obs_is_the_error_that_the_best_correction_leaves(layout: str) -> None:
    """Fit the outputs again with the columns that stay: ridge regression, no inverse of the whole."""
    case = draw(layout, seed=6)
    columns = case.columns[0]
    flat = case.weights.reshape(columns.shape[1], -1)
    damping = 1e-3 * float((columns**2).mean())
    unit = 2
    gone = np.repeat(case.units == unit, case.weights.shape[1])
    # Ridge pulls the correction to 0: rows of sqrt(damping) that want to see no change.
    ridge = np.sqrt(damping * len(columns)) * np.eye(columns.shape[1])
    stacked = np.concatenate([columns, ridge])
    lost = stacked[:, gone] @ flat[gone]
    correction = np.linalg.lstsq(stacked[:, ~gone], lost, rcond=None)[0]
    error = ((lost - stacked[:, ~gone] @ correction) ** 2).sum() / len(columns)
    found = scores("obs", case)
    assert found is not None
    assert found[case.units == unit].sum() == pytest.approx(error, rel=1e-6)


def test_obs_without_taps_in_the_gram_matrix_counts_every_tap_as_an_output() -> None:
    case = draw("kernel")
    taps = case.weights.shape[1]
    merged = Case(case.weights.reshape(12, 1, -1), case.maps, case.units, case.classes)
    slot = case.slot()
    assert slot.taps == taps
    found = criteria.get("obs")(slot, merged.statistics())
    expected = scores("obs", merged)
    assert found is not None
    assert expected is not None
    assert np.allclose(found, expected, rtol=1e-12)


def test_obs_sees_that_another_channel_can_take_over() -> None:
    case = draw("dense")
    maps = case.maps.copy()
    maps[:, 1] = maps[:, 0]
    before = scores("obs", case)
    found = scores("obs", Case(case.weights, maps, case.units, case.classes))
    assert before is not None
    assert found is not None
    assert (found[:2] < 0.02 * before[:2]).all()


def test_of_two_equal_channels_cosine_keeps_the_first() -> None:
    case = draw("dense")
    maps = case.maps.copy()
    maps[:, 7] = maps[:, 2]
    found = scores("cosine", Case(case.weights, maps, case.units, case.classes))
    assert found is not None
    assert found[7] == pytest.approx(0.0, abs=1e-12)
    assert found[2] > 0.01


def test_channels_that_go_together_do_not_stand_in_for_each_other() -> None:
    case = draw("dense")
    maps = case.maps.copy()
    maps[:, 7] = 2.0 * maps[:, 2]
    units = case.units.copy()
    units[7] = 2
    apart = scores("cosine", Case(case.weights, maps, case.units, case.classes))
    together = scores("cosine", Case(case.weights, maps, units, case.classes))
    assert apart is not None
    assert together is not None
    assert apart[2] == pytest.approx(0.0, abs=1e-12)
    assert together[2] > 0.01
