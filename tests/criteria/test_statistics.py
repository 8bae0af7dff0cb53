"""Accumulators: what they measure, that batches do not matter, that a run can be resumed, that NaN is noticed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxprune.errors import ModelError, UsageError
from onnxprune.importance import statistics
from onnxprune.importance.statistics import Means, NotFinite

NAMES = statistics.names()
Array = NDArray[Any]


def maps_of(seed: int, samples: int = 7, channels: int = 5, space: tuple[int, ...] = (6, 4)) -> Array:
    """float32 maps behind a ReLU; the last channel is 0 throughout."""
    drawn = np.random.default_rng(seed).normal(0.3, 1.0, size=(samples, channels, *space))
    drawn[:, -1] = 0.0
    return np.maximum(drawn, 0.0).astype(np.float32)


def batch_of(name: str, seed: int, samples: int = 7) -> Array:
    """A batch as that statistic takes it: maps, or columns of two parts."""
    maps = maps_of(seed, samples)
    if not statistics.get(name).columns:
        return maps
    return maps[:, :4].reshape(samples, 2, 2, -1).transpose(1, 0, 3, 2).reshape(2, -1, 2)


def result_of(name: str, *batches: Array) -> dict[str, Array]:
    statistic = statistics.get(name)()
    for batch in batches:
        statistic.update(batch)
    return statistic.result()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PIECE", 30)
    monkeypatch.setattr(statistics, "PIECE", 30)
    monkeypatch.setattr(statistics, "ROWS", 5)


def test_similarity_is_the_mean_product_of_two_channels() -> None:
    maps = maps_of(0)
    found = result_of("similarity", maps)["similarity"]
    rows = np.moveaxis(maps, 1, 0).reshape(5, -1).astype(np.float64)
    for i in range(5):
        for j in range(5):
            assert found[i, j] == pytest.approx((rows[i] * rows[j]).mean(), rel=1e-6)


def test_gram_is_the_mean_product_of_two_columns_of_a_part() -> None:
    columns = batch_of("gram", 0)
    found = result_of("gram", columns)
    wide = columns.astype(np.float64)
    for part in range(2):
        expected = sum(np.outer(row, row) for row in wide[part]) / wide.shape[1]
        assert np.allclose(found["gram"][part], expected, rtol=1e-6)
        assert np.allclose(found["column_mean"][part], wide[part].mean(axis=0), rtol=1e-12)


def test_products_of_many_rows_keep_their_digits() -> None:
    rows = np.abs(np.random.default_rng(0).normal(size=(1, 20_000, 16))).astype(np.float32)
    wide = rows[0].astype(np.float64)
    assert np.allclose(result_of("gram", rows)["gram"][0], wide.T @ wide / len(wide), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("space", [(6, 4), (2, 3, 4), (9,), ()])
def test_nuclear_norm_is_that_of_samples_by_positions(space: tuple[int, ...]) -> None:
    maps = maps_of(0, space=space)
    found = result_of("nuclear", maps)["nuclear"]
    for channel in range(maps.shape[1]):
        rows = maps[:, channel].reshape(len(maps), -1).astype(np.float64)
        assert found[channel] == pytest.approx(np.linalg.norm(rows, "nuc"), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 5, 40])
@pytest.mark.parametrize("shape", [(16, 49), (100, 64), (256, 300)])
def test_nuclear_norms_of_low_rank_keep_their_digits(shape: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(rank)
    exact = rng.normal(size=(3, shape[0], rank)) @ rng.normal(size=(3, rank, shape[1]))
    for matrices in (exact, exact.astype(np.float32).astype(np.float64)):
        expected = np.linalg.svd(matrices, compute_uv=False).sum(axis=1)
        assert np.allclose(statistics.nuclear_norms(matrices), expected, rtol=4e-7, atol=0.0)


def test_nuclear_norms_of_batches_are_weighted_by_their_samples() -> None:
    first, second = maps_of(0, samples=6), maps_of(1, samples=2)
    one, two = (result_of("nuclear", batch)["nuclear"] for batch in (first, second))
    assert np.allclose(result_of("nuclear", first, second)["nuclear"], (6 * one + 2 * two) / 8)


@pytest.mark.parametrize("space", [(6, 4), (4, 6), (1, 5), (3, 2, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rank_is_that_of_numpy(space: tuple[int, ...], dtype: type) -> None:
    maps = maps_of(0, space=space).astype(dtype)
    # Rows that repeat: float32 leaves rounding of them behind.
    maps[:, 0, -1] = maps[:, 0, 0] * dtype(1 / 3)
    found = result_of("rank", maps)["rank"]
    for channel in range(maps.shape[1]):
        ranks = []
        for sample in maps[:, channel].astype(np.float64):
            values = np.linalg.svd(sample.reshape(space[0], -1), compute_uv=False)
            limit = values.max() * max(space[0], int(np.prod(space[1:]))) * np.finfo(dtype).eps
            ranks.append((values > limit).sum())
        assert found[channel] == pytest.approx(np.mean(ranks), rel=1e-12)
    if space == (6, 4):
        assert found[-1] == 0


def test_rank_does_not_count_what_float32_rounded() -> None:
    rng = np.random.default_rng(0)
    low = (rng.normal(size=(4, 3, 14, 2)) @ rng.normal(size=(4, 3, 2, 14))).astype(np.float32)
    assert (result_of("rank", low)["rank"] == 2).all()


@pytest.mark.parametrize("space", [(), (9,)])
def test_maps_without_two_axes_of_space_have_no_rank(space: tuple[int, ...]) -> None:
    assert result_of("rank", maps_of(0, space=space)) == {}


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", ["moments", "similarity", "gram", "rank"])
def test_batches_of_any_size_give_what_one_pass_gives(name: str, sizes: list[int], seed: int) -> None:
    whole = batch_of(name, seed, samples=sum(sizes))
    axis = 1 if statistics.get(name).columns else 0
    each = whole.shape[axis] // sum(sizes)
    parts = np.split(whole, np.cumsum(sizes)[:-1] * each, axis=axis)
    once, apart = result_of(name, whole), result_of(name, *parts)
    assert once.keys() == apart.keys()
    for key, value in once.items():
        assert np.allclose(apart[key], value, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_do_not_show(name: str, request: pytest.FixtureRequest) -> None:
    batch = batch_of(name, 3)
    whole = result_of(name, batch)
    request.getfixturevalue("small_pieces")
    for key, value in result_of(name, batch).items():
        assert np.allclose(value, whole[key], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_continues_to_the_bit(name: str) -> None:
    batches = [batch_of(name, seed, samples) for seed, samples in enumerate((3, 5, 1, 4))]
    first = statistics.get(name)()
    for batch in batches[:2]:
        first.update(batch)
    file = io.BytesIO()
    np.savez(file, **first.state)
    file.seek(0)
    second = statistics.get(name)()
    second.state = dict(np.load(file, allow_pickle=False))
    for batch in batches[2:]:
        second.update(batch)
    expected = result_of(name, *batches)
    assert expected
    found = second.result()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value.dtype == np.float64
        assert np.array_equal(found[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_someone_holds_does_not_change(name: str) -> None:
    statistic = statistics.get(name)()
    statistic.update(batch_of(name, 0))
    held = statistic.state
    before = {key: value.copy() for key, value in held.items()}
    assert all(type(value) is np.ndarray for value in held.values())
    statistic.update(batch_of(name, 1))
    assert all(np.array_equal(held[key], value) for key, value in before.items())


@pytest.mark.parametrize("bad", [(np.nan,), (np.inf,), (-np.inf,), (np.inf, -np.inf)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite_are_refused(name: str, dtype: type, bad: tuple[float, ...]) -> None:
    statistic = statistics.get(name)()
    statistic.update(batch_of(name, 0))
    before = {key: value.copy() for key, value in statistic.state.items()}
    batch = batch_of(name, 1).astype(dtype)
    batch[0].flat[: len(bad)] = bad
    with pytest.raises(NotFinite, match="feature map holds NaN or infinity") as caught:
        statistic.update(batch)
    assert isinstance(caught.value, ModelError)
    assert all(np.array_equal(statistic.state[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_large_float32_values_are_no_infinity(name: str) -> None:
    """Squares of these, and their sum, do not fit into float32."""
    scale = np.float32(2.0**120)
    power = {"square": 2, "similarity": 2, "gram": 2, "active": 0, "rank": 0, "rows": 0}
    batch = batch_of(name, 0)
    plain, large = result_of(name, batch), result_of(name, batch * scale)
    for key, value in plain.items():
        assert np.allclose(large[key], value * float(scale) ** power.get(key, 1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_in_memory_does_not_matter(name: str) -> None:
    batch = batch_of(name, 0)
    turned = np.moveaxis(np.ascontiguousarray(np.moveaxis(batch, 1, -1)), -1, 1)
    for key, value in result_of(name, batch).items():
        assert np.allclose(result_of(name, turned)[key], value, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.int64, bool])
@pytest.mark.parametrize("name", NAMES)
def test_other_types_are_measured_as_numbers(name: str, dtype: type) -> None:
    batch = np.round(batch_of(name, 0)).astype(dtype)
    expected = result_of(name, batch.astype(np.float64))
    for key, value in result_of(name, batch).items():
        assert np.allclose(value, expected[key], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_adds_nothing(name: str) -> None:
    batch = batch_of(name, 0)
    empty = batch[:, :0] if statistics.get(name).columns else batch[:0]
    assert result_of(name, empty) == {}
    expected = result_of(name, batch)
    assert all(np.array_equal(value, expected[key]) for key, value in result_of(name, empty, batch, empty).items())


@pytest.fixture
def _forget() -> Iterator[None]:
    yield
    statistics.unregister("acme_peak")


@pytest.mark.usefixtures("_forget")
def test_a_statistic_of_ones_own_is_a_few_lines() -> None:
    @statistics.register("acme_peak")
    class Peak(Means):
        """Mean over samples of the largest value, [channels]."""

        def measure(self, maps: Array) -> tuple[int, dict[str, Array]]:
            return len(maps), {"peak": maps.max(axis=(2, 3)).sum(axis=0, dtype=np.float64)}

    assert statistics.get("acme_peak") is Peak
    assert (Peak.name, Peak.columns) == ("acme_peak", False)
    maps = maps_of(0)
    assert np.allclose(result_of("acme_peak", maps[:3], maps[3:])["peak"], maps.max(axis=(2, 3)).mean(axis=0))
    with pytest.raises(ValueError, match="already registered"):
        statistics.register("acme_peak")(Peak)


def test_built_in_statistics_know_their_names() -> None:
    assert {"moments", "nuclear", "rank", "similarity", "gram"} <= set(NAMES)
    assert [statistics.get(name).name for name in NAMES] == NAMES
    assert [name for name in NAMES if statistics.get(name).columns] == ["gram"]


def test_an_unknown_statistic_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="moments"):
        statistics.get("momnets")
