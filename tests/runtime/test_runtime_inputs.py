from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.graph.probes import InputSpec
from onnxprune.runtime.inputs import bind_shapes, synthetic, variations


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def bind(specs: Sequence[InputSpec], batch: int = 2, sequence: int = 7, **overrides: Sequence[int]) -> dict[str, Any]:
    return bind_shapes(specs, batch=batch, sequence=sequence, overrides=overrides)


@pytest.mark.parametrize(
    ("shape", "bound"),
    [
        ((1, 3, 8, 8), (1, 3, 8, 8)),
        (("N", 3, "H", "W"), (2, 3, 224, 224)),
        ((None, None, None, 3), (2, 224, 224, 3)),
        (("N", 64, "H", "W"), (2, 64, 64, 64)),
        (("N", 3, 320, "W"), (2, 3, 320, 320)),
        (("N", 1, "D", "H", "W"), (2, 1, 64, 64, 64)),
        (("N", "L"), (2, 7)),
        (("seq_len", "batch_size", 16), (7, 2, 16)),
        (("batch_size", 8, "past_sequence_length", 64), (2, 8, 7, 64)),
        (("N",), (2,)),
        ((2, None, 128), (2, 2, 128)),
        ((1, "T", 80), (1, 7, 80)),
        ((), ()),
    ],
)
def test_dynamic_dimensions_get_fitting_sizes(shape: tuple[Any, ...], bound: tuple[int, ...]) -> None:
    assert bind([spec("x", *shape)]) == {"x": bound}


def test_one_symbol_has_one_size_everywhere() -> None:
    shapes = bind([spec("a", "N", "T"), spec("b", "N", 3, "T", 5), spec("c", "T")])
    assert shapes == {"a": (2, 7), "b": (2, 3, 7, 5), "c": (7,)}


def test_sums_of_symbols_are_evaluated() -> None:
    specs = [
        spec("mask", "batch_size", "past_sequence_length + sequence_length"),
        spec("ids", "batch_size", "sequence_length"),
        spec("past", "batch_size", 4, "past_sequence_length", 8),
        spec("wide", "batch_size", "2*sequence_length - 1", "odd % name"),
    ]
    shapes = bind(specs)
    assert shapes["mask"] == (2, 14)
    assert shapes["wide"] == (2, 13, 7)


def test_overrides_bind_their_symbols_for_other_inputs() -> None:
    specs = [spec("a", "N", "T"), spec("b", "N", "T", 8)]
    assert bind(specs, b=(5, 11, 8)) == {"a": (5, 11), "b": (5, 11, 8)}


def test_override_may_give_a_rank_to_an_unknown_one() -> None:
    assert bind([spec("x")], x=(2, 3)) == {"x": (2, 3)}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"pixel": (1, 3, 8, 8)}, ["'pixel'", "Did you mean 'pixels'?"]),
        ({"pixels": (1, 3, 8)}, ["pixels=1,3,8", "3 sizes", "[N, 3, H, ?]"]),
        ({"pixels": (1, 4, 8, 8)}, ["axis 1 is fixed to 3", "not 4"]),
        ({"pixels": (0, 3, 8, 8)}, ["1 or more"]),
        ({"pixels": (2, 3, 8, 8), "flags": (3,)}, ["'N' is 3 here, 2"]),
    ],
)
def test_bad_overrides_say_what_is_wrong(overrides: Mapping[str, Sequence[int]], words: list[str]) -> None:
    specs = [spec("pixels", "N", 3, "H", None), spec("flags", "N")]
    with pytest.raises(UsageError) as caught:
        bind_shapes(specs, batch=2, sequence=7, overrides=overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_synthetic_is_seeded_and_independent_per_input() -> None:
    a, b = spec("a", 4, 5), spec("b", 4, 5)
    shapes = {"a": (4, 5), "b": (4, 5)}
    both, again, alone = synthetic([a, b], shapes), synthetic([b, a], shapes), synthetic([a], shapes)
    assert np.array_equal(both["a"], again["a"]) and np.array_equal(both["a"], alone["a"])
    assert not np.array_equal(both["a"], both["b"])
    assert not np.array_equal(both["a"], synthetic([a], shapes, seed=1)["a"])


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.complex64]
)
def test_synthetic_floats_are_normal_in_their_dtype(dtype: Any) -> None:
    array = synthetic([spec("x", 50, 40, dtype=dtype)], {"x": (50, 40)})["x"]
    assert array.dtype == dtype and array.shape == (50, 40)
    real = array.real.astype(np.float64) if np.dtype(dtype).kind == "c" else array.astype(np.float64)
    assert abs(real.mean()) < 0.1 and abs(real.std() - 1) < 0.1


def test_synthetic_integers_fill_their_bounds_and_no_more() -> None:
    specs = [spec("ids", 1000, dtype=np.int64), spec("kind", 1000, dtype=np.int32)]
    feed = synthetic(specs, {"ids": (1000,), "kind": (1000,)}, bounds={"ids": (-2, 3)})
    assert set(feed["ids"].tolist()) == {-2, -1, 0, 1, 2, 3}
    assert set(feed["kind"].tolist()) == {0, 1}
    assert feed["kind"].dtype == np.int32


def test_synthetic_pixels_masks_flags_and_words() -> None:
    specs = [
        spec("image", 1, 8, 8, 3, dtype=np.uint8),
        spec("attention_mask", 2, 8, dtype=np.int64),
        spec("pad_mask", 2, 8, dtype=bool),
        spec("float_attention_mask", 2, 8),
        spec("flag", 50, dtype=bool),
        spec("text", 20, dtype=object),
    ]
    feed = synthetic(specs, {s.name: tuple(int(d or 1) for d in s.shape) for s in specs})
    assert feed["image"].max() > 200 and feed["image"].dtype == np.uint8
    assert all((feed[name] == 1).all() for name in ("attention_mask", "pad_mask", "float_attention_mask"))
    assert feed["pad_mask"].dtype == bool
    assert 0 < feed["flag"].sum() < 50
    assert len(set(feed["text"].tolist())) > 1 and all(isinstance(word, str) for word in feed["text"])


def test_synthetic_scalar_has_no_axes() -> None:
    feed = synthetic([spec("x"), spec("i", dtype=np.int64), spec("s", dtype=object)], {"x": (), "i": (), "s": ()})
    assert all(isinstance(array, np.ndarray) and array.shape == () for array in feed.values())


@pytest.mark.parametrize(
    ("bounds", "word"),
    [({"id": (0, 1)}, "Did you mean 'ids'?"), ({"ids": (3, 1)}, "3..1"), ({"ids": (0, 300)}, "0..255")],
)
def test_bad_bounds_are_usage_errors(bounds: dict[str, tuple[int, int]], word: str) -> None:
    with pytest.raises(UsageError) as caught:
        synthetic([spec("ids", 2, dtype=np.uint8)], {"ids": (2,)}, bounds=bounds)
    assert word in str(caught.value)


def test_variations_are_seeded_differ_and_keep_types_bounds_and_masks() -> None:
    specs = [spec("x", 2, 50), spec("h", 2, 5, dtype=np.float16), spec("ids", 9, dtype=np.int64), spec("attn_mask", 4)]
    shapes = {"x": (2, 50), "h": (2, 5), "ids": (9,), "attn_mask": (4,)}
    feeds = list(variations(specs, shapes, bounds={"ids": (2, 5)}))
    again = list(variations(specs, shapes, bounds={"ids": (2, 5)}))
    feeds.append(synthetic(specs, shapes, bounds={"ids": (2, 5)}))
    for k, feed in enumerate(feeds):
        assert {name: (a.shape, a.dtype) for name, a in feed.items()} == {
            s.name: (shapes[s.name], s.dtype) for s in specs
        }
        assert feed["ids"].min() >= 2 and feed["ids"].max() <= 5
        assert (feed["attn_mask"] == 1).all()
        assert all(np.isfinite(feed[n]).all() for n in ("x", "h"))
        assert not any(np.array_equal(feed["x"], other["x"]) for other in feeds[:k])
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(feeds, again, strict=False))
    assert any(f["x"].min() >= 0 and f["x"].max() > 100 for f in feeds)  # pixels
    assert any(f["x"].min() >= 0 and f["x"].max() <= 1 for f in feeds)
