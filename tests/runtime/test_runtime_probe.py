from __future__ import annotations

import numpy as np
import pytest
from runtime_models import mlp, model

from onnxprune.errors import ModelError, UsageError
from onnxprune.runtime.probe import probe_feeds


def test_two_batch_sizes_where_the_batch_is_free() -> None:
    feeds, note = probe_feeds(mlp(np.random.default_rng(0)))
    assert [feed["x"].shape for feed in feeds] == [(2, 4), (3, 4)] and note == ""
    again, _ = probe_feeds(mlp(np.random.default_rng(0)))
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(feeds, again, strict=True))


def test_one_feed_where_every_shape_is_fixed() -> None:
    feeds, _ = probe_feeds(model("agraph (float[2,3] x) => (float[2,3] y) { y = Relu(x) }"))
    assert len(feeds) == 1
    feeds, _ = probe_feeds(mlp(np.random.default_rng(0)), overrides={"x": (5, 4)})
    assert [feed["x"].shape for feed in feeds] == [(5, 4)]


def test_baked_in_batch_falls_back_to_one_and_says_so() -> None:
    text = "agraph (float[N,4] x) => (float[1,2,2] y) { y = Reshape(x, s) }"
    feeds, note = probe_feeds(model(text, s=np.array([1, 2, 2])))
    assert [feed["x"].shape for feed in feeds] == [(1, 4)]
    assert "x=2,4" in note and "reshape" in note


def test_no_size_that_runs_is_a_model_error_with_the_way_out() -> None:
    text = "agraph (float[N,T] x) => (float[7,11] y) { y = Reshape(x, s) }"
    with pytest.raises(ModelError, match="x=2,16") as caught:
        probe_feeds(model(text, s=np.array([7, 11])))
    assert "--input-shape" in caught.value.hint
    feeds, _ = probe_feeds(model(text, s=np.array([7, 11])), overrides={"x": (7, 11)})
    assert len(feeds) == 1


def test_bounds_reach_the_inputs_and_bad_overrides_are_usage_errors() -> None:
    text = "agraph (int64[N] i) => (float[N,2] y) { y = Gather<axis=0>(t, i) }"
    table = model(text, t=np.zeros((50, 2), np.float32))
    feeds, _ = probe_feeds(table, bounds={"i": (40, 49)})
    assert all(feed["i"].min() >= 40 and feed["i"].max() <= 49 for feed in feeds)
    with pytest.raises(UsageError, match="no such input"):
        probe_feeds(table, overrides={"ids": (3,)})
