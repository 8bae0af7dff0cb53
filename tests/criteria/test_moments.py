"""Means of values, squares and magnitudes: every shape and layout, and values at the ends of float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxprune.importance import statistics

Array = NDArray[Any]


def maps_of(seed: int) -> Array:
    """Maps behind a ReLU; the last channel is 0 throughout."""
    drawn = np.random.default_rng(seed).normal(0.3, 1.0, size=(7, 5, 6, 4))
    drawn[:, -1] = 0.0
    return np.maximum(drawn, 0.0).astype(np.float32)


def result_of(name: str, maps: Array) -> dict[str, Array]:
    statistic = statistics.get(name)()
    statistic.update(maps)
    return statistic.result()


def test_moments_are_means_over_samples_and_positions() -> None:
    maps = maps_of(0) - np.float32(0.1) * (maps_of(1) > 1)
    found = result_of("moments", maps)
    assert_moments(found, maps)


def assert_moments(found: dict[str, Array], maps: Array) -> None:
    for channel in range(maps.shape[1]):
        values = maps[:, channel].astype(np.float64).ravel()
        magnitude = abs(values).mean()
        assert found["mean"][channel] == pytest.approx(values.mean(), abs=1e-6 * magnitude)
        assert found["square"][channel] == pytest.approx((values**2).mean(), rel=1e-6)
        assert found["magnitude"][channel] == pytest.approx(magnitude, rel=1e-6)
        assert found["active"][channel] == (values != 0).mean()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("sign", [0.0, -9.0])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "between"])
@pytest.mark.parametrize("space", [(), (1,), (3, 5), (4, 4), (13, 17), (140, 30), (7, 11, 5)])
@pytest.mark.parametrize("samples", [1, 3, 300])
def test_moments_of_every_shape_and_layout(
    samples: int, space: tuple[int, ...], layout: str, sign: float, dtype: type
) -> None:
    """Positions that are few or many, that do or do not part into equal runs, in any order in memory."""
    if samples == 300 and len(space) and np.prod(space) > 20:
        samples = 17
    drawn = np.random.default_rng(0).normal(0.3, 1.0, size=(samples, 3, *space))
    drawn[:, -1] = 0.0
    maps = np.maximum(drawn, sign).astype(dtype)
    if layout == "channels last":
        maps = np.moveaxis(np.ascontiguousarray(np.moveaxis(maps, 1, -1)), -1, 1)
    elif layout == "between" and space:
        maps = np.moveaxis(np.ascontiguousarray(np.moveaxis(maps, 1, 2)), 2, 1)
    found = result_of("moments", maps)
    assert_moments(found, maps)
    for name, value in found.items():
        alone = result_of(name, maps)
        assert list(alone) == [name]
        assert np.allclose(alone[name], value, rtol=1e-6, atol=0.0)


def test_a_flag_counter_does_not_run_over() -> None:
    """More samples than a byte counts, more rows, and many positions of one sample; all of them active."""
    for shape in [(700, 2, 20), (700, 2), (1, 2, 70_000), (2, 2, 255 * 128), (300, 2, 3)]:
        assert (result_of("active", np.ones(shape, np.float32))["active"] == 1.0).all()
        assert (result_of("active", np.zeros(shape, np.float32))["active"] == 0.0).all()


@pytest.mark.parametrize("scale", [1e-25, 1e-38])
def test_squares_too_small_for_float32_are_measured(scale: float) -> None:
    maps = maps_of(0) * np.float32(scale)
    assert_moments(result_of("moments", maps), maps)
