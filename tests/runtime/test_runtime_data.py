from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.graph.probes import InputSpec
from onnxprune.runtime.capture import count
from onnxprune.runtime.data import open_source
from onnxprune.runtime.inputs import load_data
from onnxprune.runtime.sessions import open_session, run


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


X = spec("x", "N", 3)
ROWS = np.arange(30, dtype=np.float32).reshape(10, 3)


def message(source: Any, *specs: InputSpec, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_data(source, specs or [X], **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_npz_by_name_in_batches_with_a_short_last_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=ROWS, y=np.zeros(10, np.int64))
    feeds = load_data(tmp_path / "d.npz", [X], batch_size=4)
    assert [feed["x"].shape for feed in feeds] == [(4, 3), (4, 3), (2, 3)]
    assert np.array_equal(np.concatenate([feed["x"] for feed in feeds]), ROWS)
    assert all(list(feed) == ["x"] for feed in feeds)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_single_array_without_a_name_fits_a_single_input(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "d.npz", ROWS)
    np.save(tmp_path / "d.npy", ROWS)
    for source in (tmp_path / "d.npz", str(tmp_path / "d.npy"), ROWS, [ROWS], [{"x": ROWS}]):
        (feed,) = load_data(source, [X])
        assert np.array_equal(feed["x"], ROWS)


def test_a_wrong_name_is_refused_for_a_single_input_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", anything=ROWS)
    for source in (tmp_path / "d.npz", {"anything": ROWS}):
        with pytest.raises(UsageError, match="array 'anything', which is no input, and none for input 'x'"):
            load_data(source, [X])


def test_batches_have_the_fixed_leading_size_and_drop_the_rest() -> None:
    feeds = load_data(ROWS, [spec("x", 4, 3)], batch_size=7)
    assert [feed["x"].shape for feed in feeds] == [(4, 3), (4, 3)]


def test_limit_bounds_what_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", ROWS)
    feeds = load_data(tmp_path / "d.npy", [X], limit=5, batch_size=3)
    assert [len(feed["x"]) for feed in feeds] == [3, 2]
    assert len(load_data(tmp_path / "d.npy", [spec("x", 4, 3)], limit=1)) == 1
    (rows,) = next(open_source(tmp_path / "d.npy", [X]).parts()).values()
    asked = rows.read(2)
    assert asked.shape == (2, 3) and asked.base is not None and asked.nbytes == 24
    feeds = load_data([ROWS, ROWS, ROWS], [X], limit=12)
    assert sum(len(feed["x"]) for feed in feeds) == 12


def test_columns_first_and_scalar_arrays_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.asfortranarray(ROWS), rate=np.int64(16000))
    feeds = load_data(tmp_path / "d.npz", [X, spec("rate", dtype=np.int64)], limit=4, batch_size=2)
    assert len(feeds) == 2
    assert np.array_equal(feeds[1]["x"], ROWS[2:4]) and feeds[1]["x"].flags.c_contiguous
    assert all(feed["rate"].shape == () and feed["rate"] == 16000 for feed in feeds)


def test_array_without_sample_axis_is_one_sample() -> None:
    (feed,) = load_data({"x": ROWS[0]}, [X])
    assert np.array_equal(feed["x"], ROWS[:1])


def test_fixed_states_and_constants_go_along() -> None:
    state = np.arange(2 * 5 * 4, dtype=np.float32).reshape(10, 4)
    anchors = np.ones((7, 2), np.float32)
    specs = [X, spec("state", 2, 4), spec("anchors", 7, 2)]
    feeds = load_data({"x": ROWS[:5], "state": state, "anchors": anchors}, specs)
    assert len(feeds) == 5
    assert np.array_equal(feeds[3]["x"], ROWS[3:4]) and np.array_equal(feeds[3]["state"], state[6:8])
    assert all(feed["anchors"].shape == (7, 2) for feed in feeds)


def test_free_input_keeps_step_with_a_fixed_one_of_as_many_samples() -> None:
    feeds = load_data(
        {"a": np.zeros((11, 3), np.float32), "b": np.zeros((11, 3))}, [spec("a", 4, 3), spec("b", "N", 3)]
    )
    assert [(len(f["a"]), len(f["b"])) for f in feeds] == [(4, 4), (4, 4)]


STATE = spec("h", 2, None, 4)
EACH = np.arange(80, dtype=np.float32).reshape(10, 2, 4)  # a state of every sample


@pytest.mark.parametrize(
    ("array", "samples"),
    [
        (EACH.reshape(20, 1, 4), 10),  # recorded call by call
        (EACH.reshape(20, 1, 4)[:10], 5),  # and cut, with all arrays, to as many rows
        (EACH.transpose(1, 0, 2), 10),  # all samples of one call
        (EACH[:1].transpose(1, 0, 2), 10),  # one state for all
        (EACH[0], 10),
    ],
)
@pytest.mark.parametrize("state", [STATE, spec("h", 2, "N", 4), spec("h", 2, "batch", 4)])
def test_states_have_their_samples_along_the_second_axis(array: np.ndarray, samples: int, state: InputSpec) -> None:
    x = spec("x", None if state is STATE else state.shape[1], 3)
    each = EACH if array.size > 8 else EACH[:1].repeat(10, axis=0)
    for source in ({"h": array, "x": ROWS}, [{"h": array, "x": ROWS}]):
        feeds = load_data(source, [state, x], batch_size=4)
        assert [feed["h"].shape for feed in feeds] == [(2, len(feed["x"]), 4) for feed in feeds]
        assert np.array_equal(np.concatenate([feed["x"] for feed in feeds]), ROWS[:samples])
        states = np.concatenate([feed["h"] for feed in feeds], axis=1)
        assert np.array_equal(states.transpose(1, 0, 2), each[:samples])
        assert [count(feed) for feed in feeds] == [len(feed["x"]) for feed in feeds]


def test_states_that_do_not_fit_their_samples() -> None:
    x = spec("x", None, 3)
    text = message({"h": EACH.reshape(20, 1, 4)[:14], "x": ROWS}, STATE, x)
    assert text == "data holds different numbers of samples per input: 'h': 7, 'x': 10"
    text = message({"h": EACH[:1, :1], "x": ROWS}, STATE, x)
    assert text.startswith("array 'h' has shape [1, 1, 4]; input 'h' takes [2, ?, 4]")
    sequence = spec("x", 2, None, 3)  # one input: a batch of two sequences
    assert [feed["x"].shape for feed in load_data(ROWS.reshape(2, 5, 3), [sequence])] == [(2, 5, 3)]
    recorded = {"h": EACH.reshape(20, 1, 4)[:10], "x": ROWS}
    assert len(load_data(recorded, [spec("h", 2, 1, 4), spec("x", 1, 3)])) == 5


def test_folder_joins_samples_or_takes_one_file_per_input(tmp_path: Path) -> None:
    for index in range(4):
        np.save(tmp_path / f"{index}.npy", ROWS[index])
    feeds = load_data(tmp_path, [spec("x", 2, 3)])
    assert np.array_equal(np.concatenate([feed["x"] for feed in feeds]), ROWS[:4])
    named = tmp_path / "named"
    named.mkdir()
    np.save(named / "x.npy", ROWS)
    np.save(named / "k.npy", np.arange(10))
    (feed,) = load_data(named, [X, spec("k", "N", dtype=np.int64)])
    assert feed["k"].tolist() == list(range(10)) and len(feed["x"]) == 10


def test_folder_of_different_lengths_stays_apart(tmp_path: Path) -> None:
    for length in (5, 7):
        np.savez(tmp_path / f"{length}.npz", x=np.zeros((2, length), np.float32))
    assert [feed["x"].shape for feed in load_data(tmp_path, [spec("x", "N", "T")])] == [(2, 5), (2, 7)]


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (np.float64, np.float32),
        (np.float32, np.float16),
        (np.float32, ml_dtypes.bfloat16),
        (np.int32, np.int64),
        (np.int64, np.int32),
        (np.uint16, np.int32),
        (np.int64, np.uint8),
        (np.bool_, np.bool_),
        (np.str_, object),
    ],
)
def test_safe_casts_are_done(have: Any, want: Any) -> None:
    (feed,) = load_data({"x": np.array([[0, 1, 1]]).astype(have)}, [spec("x", "N", 3, dtype=want)])
    assert feed["x"].dtype == want and feed["x"].shape == (1, 3)


def test_bfloat16_survives_a_file(tmp_path: Path) -> None:
    array = ROWS.astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "d.npz", x=array)
    (feed,) = load_data(tmp_path / "d.npz", [spec("x", "N", 3, dtype=ml_dtypes.bfloat16)])
    assert feed["x"].dtype == ml_dtypes.bfloat16 and np.array_equal(feed["x"], array)


def test_loaded_arrays_run(tmp_path: Path) -> None:
    from runtime_models import model

    np.savez(tmp_path / "d.npz", x=ROWS)
    (feed,) = load_data(tmp_path / "d.npz", [X])
    session = open_session(model("agraph (float[N,3] x) => (float[N,3] y) { y = Neg(x) }"))
    assert np.array_equal(run(session, feed)["y"], -ROWS)


def test_wrong_names_suggest_the_nearest() -> None:
    specs = [spec("input_ids", "N", "T", dtype=np.int64), spec("mask", "N", "T")]
    text = message({"input_id": np.zeros((1, 2), int), "mask": np.zeros((1, 2))}, *specs)
    assert "'input_id'" in text and "Did you mean 'input_ids'?" in text
    assert "no array for input 'mask'" in message({"input_ids": np.zeros((1, 2), int)}, *specs)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 5), np.float32), "shape [4, 5]; input 'x' needs [samples, 3]"),
        (np.zeros((4, 1, 3), np.float32), "shape [4, 1, 3]"),
        (np.zeros((0, 3), np.float32), "no samples"),
        (np.zeros((4, 3), np.uint8), "dtype uint8; input 'x' needs float32"),
        (np.zeros((4, 3), bool), "dtype bool"),
        (np.full((4, 3), "a"), "needs float32"),
        (np.full((4, 3), None), "dtype object"),
        (np.full((4, 3), 1e300), "1e+300, too large"),
    ],
)
def test_arrays_that_do_not_fit(array: np.ndarray, words: str) -> None:
    assert words in message({"x": array})


@pytest.mark.parametrize(
    ("shape", "expected", "order"),
    [((2, 8, 8, 3), (3, 8, 8), "0, 3, 1, 2"), ((2, 3, 8, 9), (8, 9, 3), "0, 2, 3, 1"), ((2, 5, 8, 9), (8, 9, 3), "")],
)
def test_channels_at_the_other_end_are_told_how_to_move(
    shape: tuple[int, ...], expected: tuple[int, ...], order: str
) -> None:
    with pytest.raises(UsageError, match="needs") as caught:
        load_data({"x": np.zeros(shape, np.float32)}, [spec("x", "N", *expected)])
    assert caught.value.hint == (f"The axes fit in another order: array.transpose({order})." if order else "")


def test_integers_that_do_not_fit() -> None:
    text = message({"x": np.array([[1, 2, 300]])}, spec("x", "N", 3, dtype=np.uint8))
    assert "1..300" in text and "0..255" in text


def test_sample_counts_that_do_not_agree() -> None:
    two = [X, spec("z", "N", 2)]
    assert "'x': 10, 'z': 9" in message({"x": ROWS, "z": np.zeros((9, 2))}, *two)
    fixed = [spec("x", 2, 3), spec("z", "N", 2)]
    assert "different numbers of samples" in message({"x": ROWS, "z": np.zeros((9, 2))}, *fixed)
    assert "takes 16 at a time" in message(ROWS, spec("x", 16, 3))


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "absent.npz")
    assert "holds no .npz or .npy" in message(tmp_path)
    (tmp_path / "d.txt").write_text("1 2 3")
    assert "neither .npz nor .npy" in message(tmp_path / "d.txt")
    for name in ("e.npz", "e.npy"):
        (tmp_path / name).touch()
        assert "is empty" in message(tmp_path / name)
    assert "holds no arrays" in message([])
    assert "item 0 is a int" in message([3])
    assert "is a int" in message(3)
    assert "1 or more" in message(ROWS, limit=0)
    np.savez(tmp_path / "none.npz")
    assert "no array for input 'x'" in message(tmp_path / "none.npz")


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    assert "pickled objects" in message(tmp_path / "d.npz")


def test_every_truncation_and_flipped_byte_is_read_or_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=ROWS)
    np.save(tmp_path / "d.npy", ROWS)
    rng = np.random.default_rng(0)
    for name in ("d.npz", "d.npy"):
        whole = (tmp_path / name).read_bytes()
        damaged = [whole[:size] for size in range(1, len(whole), 7)]
        for _ in range(150):
            content = bytearray(whole)
            content[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(content))
        refused = 0
        for content in damaged:
            (tmp_path / ("bad" + name)).write_bytes(content)
            try:
                load_data(tmp_path / ("bad" + name), [X])
            except UsageError:
                refused += 1
        assert refused >= len(whole) // 7 - 1


def test_truncated_member_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    content = (tmp_path / "x.npy").read_bytes()[:-8]
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", content)
    assert "array 'x'" in message(tmp_path / "d.npz") and "truncated" in message(tmp_path / "d.npz")


def test_model_without_inputs_needs_no_data() -> None:
    assert load_data({"x": ROWS}, []) == [{}]


@pytest.mark.parametrize("kind", ["memory", "npz", "folder"])
def test_an_empty_cache_is_data(tmp_path: Path, kind: str) -> None:
    specs = [spec("ids", "N", "T", dtype=np.int64), spec("past", "N", 2, "P", 4)]
    arrays = {"ids": np.arange(15).reshape(5, 3), "past": np.zeros((5, 2, 0, 4), np.float64)}
    source: Any = arrays
    if kind == "npz":
        source = tmp_path / "d.npz"
        np.savez(source, **arrays)
    elif kind == "folder":
        source = tmp_path
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
    feeds = load_data(source, specs, batch_size=2)
    assert [feed["past"].shape for feed in feeds] == [(2, 2, 0, 4), (2, 2, 0, 4), (1, 2, 0, 4)]
    assert feeds[0]["past"].dtype == np.float32
    assert "holds no numbers" in message({"past": arrays["past"]}, specs[1])
    assert "no samples" in message({"ids": arrays["ids"], "past": np.zeros((0, 2, 1, 4))}, *specs)


def test_a_scalar_input_takes_one_number_or_one_per_sample() -> None:
    specs = [X, InputSpec("flag", np.dtype(bool), (), scalar=True)]
    flags = np.arange(10) % 3 == 0
    feeds = load_data({"x": ROWS, "flag": flags}, specs, batch_size=4)
    assert [feed["x"].shape for feed in feeds] == [(1, 3)] * 10
    assert all(feed["flag"].shape == () for feed in feeds)
    assert [bool(feed["flag"]) for feed in feeds] == flags.tolist()
    for one in (np.array(True), np.array([True])):
        feeds = load_data({"x": ROWS, "flag": one}, specs, batch_size=4)
        assert [feed["x"].shape[0] for feed in feeds] == [4, 4, 2]
        assert all(feed["flag"].shape == () and feed["flag"] for feed in feeds)
    fixed = [spec("x", 2, 3), specs[1]]
    feeds = load_data({"x": ROWS, "flag": flags[:5]}, fixed)
    assert [(feed["x"].shape, bool(feed["flag"])) for feed in feeds] == [((2, 3), bool(f)) for f in flags[:5]]
    assert "'flag': 7, 'x': 10" in message({"x": ROWS, "flag": flags[:7]}, *specs)
    assert "one number, or one per sample" in message({"x": ROWS, "flag": flags[:, None]}, *specs)
    (feed,) = load_data({"flag": True, "x": ROWS}, specs, batch_size=16)
    assert feed["flag"].shape == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, dtype: Any) -> None:
    rows = ROWS.copy()
    rows[7, 1] = value
    np.savez(tmp_path / "d.npz", x=rows)
    what = "NaN" if np.isnan(value) else "infinity"
    model = spec("x", "N", 3, dtype=dtype)
    for source, name in ((tmp_path / "d.npz", "array 'x' of"), ({"x": rows}, "array 'x'"), (rows, "the array")):
        said = message(source, model, batch_size=4)
        assert what in said and "in sample 7" in said and "input 'x'" in said and name in said
    said = message([{"x": ROWS}, {"x": rows}], X)
    assert "of data item 1" in said


def test_numbers_beside_the_samples_are_finite_too() -> None:
    said = message({"x": ROWS, "scale": np.array(np.nan)}, X, spec("scale"))
    assert "array 'scale'" in said and "NaN" in said


def test_a_mask_may_hide_positions_by_minus_infinity() -> None:
    rows = ROWS.copy()
    rows[0, 0] = -np.inf
    (feed,) = load_data(rows, [spec("attention_mask", "N", 3)])
    assert np.isneginf(feed["attention_mask"][0, 0])
    rows[0, 0] = np.inf
    assert "infinity" in message(rows, spec("attention_mask", "N", 3))
