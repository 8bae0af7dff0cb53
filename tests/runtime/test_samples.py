"""Data as a stream: batches, several passes, bounded memory, sources of every kind."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.graph.probes import InputSpec
from onnxprune.runtime import data
from onnxprune.runtime.data import Samples, open_data


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


X = spec("x", "N", 3)
ROWS = np.arange(30, dtype=np.float32).reshape(10, 3)


def sizes(samples: Samples, batch_size: int | None = None) -> list[int]:
    return [len(feed["x"]) for feed in samples.batches(batch_size)]


def rows(samples: Samples) -> np.ndarray:
    return np.concatenate([feed["x"] for feed in samples])


class Reader:
    """The calibration data reader of onnxruntime, as far as its users rely on it."""

    def __init__(self, items: list[dict[str, np.ndarray]]) -> None:
        self.items = items
        self.left: Iterator[dict[str, np.ndarray]] = iter(items)
        self.asked = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        self.asked += 1
        return next(self.left, None)


class Rewinding(Reader):
    def rewind(self) -> None:
        self.left = iter(self.items)


class Again:
    """Something like a loader: every pass starts afresh."""

    passes = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        self.passes += 1
        return (ROWS[index : index + 1] for index in range(10))


def source(kind: str, folder: Path) -> Any:
    """The ten rows as every kind of source."""
    items = [{"x": ROWS[i : i + 1]} for i in range(10)]
    match kind:
        case "npy":
            np.save(folder / "d.npy", ROWS)
        case "columns":
            np.save(folder / "d.npy", np.asfortranarray(ROWS))
        case "npz":
            np.savez_compressed(folder / "d.npz", x=ROWS)
        case "columns-npz":
            np.savez_compressed(folder / "d.npz", x=np.asfortranarray(ROWS))
        case "folder":
            for index, piece in enumerate(np.split(ROWS, [1, 6])):
                np.savez(folder / f"{index}.npz", x=piece)
            return folder
        case "named":
            np.save(folder / "x.npy", ROWS)
            return folder
    if kind in FILES:
        return next(folder.glob("d.np?"))
    return {"list": items, "array": ROWS, "mapping": {"x": ROWS}}.get(kind) if kind in KNOWN else made(kind)


FILES = ["npy", "columns", "npz", "columns-npz", "folder", "named"]
KNOWN = [*FILES, "list", "array", "mapping"]
ONCE = ["reader", "generator"]
KINDS = [*KNOWN, "rewinding", "again", *ONCE]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_batches_in_every_pass(tmp_path: Path, kind: str) -> None:
    samples = open_data(source(kind, tmp_path), [X], batch_size=4)
    for _ in range(3):
        assert sizes(samples) == [4, 4, 2]
        assert np.array_equal(rows(samples), ROWS)
    assert sizes(samples, 7) == [7, 3]
    assert samples.samples == (10 if kind in KNOWN else None)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_a_fixed_size_are_made_of_single_samples_too(tmp_path: Path, kind: str) -> None:
    samples = open_data(source(kind, tmp_path), [spec("x", 4, 3)], batch_size=3)
    assert sizes(samples) == sizes(samples) == [4, 4]
    assert np.array_equal(rows(samples), ROWS[:8])
    assert samples.samples == (8 if kind in KNOWN else None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_of_samples_is_kept_to_or_refused(tmp_path: Path, kind: str) -> None:
    some = open_data(source(kind, tmp_path), [X], samples=5, batch_size=3)
    assert sizes(some) == sizes(some) == [3, 2]
    assert some.samples == (5 if kind in KNOWN else None)
    assert sizes(some.first(2)) == [2] and sizes(some.first(9)) == [3, 2]
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(UsageError, match="the data holds 10 samples, 11 were asked for"):
        list(open_data(source(kind, again), [X], samples=11))


@pytest.mark.parametrize("kind", KNOWN)
def test_too_few_samples_are_found_when_the_data_is_opened(tmp_path: Path, kind: str) -> None:
    data = source(kind, tmp_path)
    with pytest.raises(UsageError, match="the data holds 10 samples, 11 were asked for") as caught:
        open_data(data, [X], samples=11)
    assert "fewer samples" in caught.value.hint
    with pytest.raises(UsageError, match="needs \\[samples, 4\\]"):
        open_data(data, [spec("x", "N", 4)])
    with pytest.raises(UsageError, match="has 10 samples; input 'x' takes 16 at a time"):
        open_data(data, [spec("x", 16, 3)])


def test_samples_of_a_fixed_size_are_rounded_up_to_a_batch() -> None:
    fixed = open_data(ROWS, [spec("x", 4, 3)], samples=5)
    assert fixed.samples == 8 and sizes(fixed) == [4, 4]
    assert sizes(open_data(ROWS, [spec("x", 4, 3)], samples=10)) == [4, 4]  # there are ten, and no third batch


def test_an_iterator_without_an_end_is_read_no_further_than_asked() -> None:
    read = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            read.append(1)
            yield ROWS[:2]

    samples = open_data(endless(), [X], samples=5, batch_size=2)
    assert sizes(samples) == sizes(samples) == [2, 2, 1]
    assert len(read) == 3


@pytest.mark.parametrize("kind", ["generator", "reader", "rewinding", "again"])
def test_a_pass_that_was_given_up_changes_no_other(kind: str) -> None:
    samples = open_data(made(kind), [X], batch_size=4)
    assert np.array_equal(next(iter(samples))["x"], ROWS[:4])
    assert np.array_equal(rows(samples), ROWS)


@pytest.mark.parametrize("kind", ["generator", "reader", "npz"])
def test_two_passes_may_be_under_way_at_once(tmp_path: Path, kind: str) -> None:
    samples = open_data(source(kind, tmp_path), [X], batch_size=4)
    for one, other in zip(samples, samples, strict=True):
        assert np.array_equal(one["x"], other["x"])


def made(kind: str) -> Any:
    items = [{"x": ROWS[i : i + 1]} for i in range(10)]
    return {"generator": iter(items), "reader": Reader(items), "rewinding": Rewinding(items), "again": Again()}[kind]


def test_a_reader_that_can_rewind_is_rewound_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_StoredParts", None)
    reader = Rewinding([{"x": ROWS[:4]}, {"x": ROWS[4:]}])
    reader.get_next()  # someone has looked already
    samples = open_data(reader, [X])
    assert np.array_equal(rows(samples), ROWS) and np.array_equal(rows(samples), ROWS)
    again = Again()
    samples = open_data(again, [X])
    assert again.passes == 0 and sizes(samples) == sizes(samples) == [10] and again.passes == 2


def test_what_is_kept_of_an_iterator_is_more_than_memory_should_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_IN_MEMORY", 1 << 10)
    block = np.ones((64, 256), np.float32)
    words = np.array([["a"], ["b"]] * 32, dtype=object)
    samples = open_data(
        ({"x": block * i, "w": words} for i in range(64)), [spec("x", "N", 256), spec("w", "N", 1, dtype=object)]
    )
    tracemalloc.start()
    totals = [sum(float(feed["x"].sum()) for feed in samples) for _ in range(2)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert totals == [64 * 256 * sum(range(64))] * 2
    assert peak < 1 << 20  # 4 MiB went through
    assert next(iter(samples))["w"].tolist() == words[:16].tolist()


def test_an_iterator_may_fill_the_same_array_again_and_again() -> None:
    def loader() -> Iterator[np.ndarray]:
        buffer = np.empty((1, 3), np.float32)
        for row in ROWS:
            buffer[:] = row
            yield buffer

    samples = open_data(loader(), [X], batch_size=4)
    assert np.array_equal(rows(samples), ROWS) and np.array_equal(rows(samples), ROWS)


def test_sets_of_different_lengths_stay_apart_and_samples_of_one_kind_are_joined() -> None:
    items = [np.zeros((n, length), np.float32) for n, length in ((2, 5), (1, 5), (3, 7), (1, 5))]
    feeds = list(open_data(items, [spec("x", "N", "T")], batch_size=2))
    assert [feed["x"].shape for feed in feeds] == [(2, 5), (1, 5), (2, 7), (1, 7), (1, 5)]


def test_constants_stay_with_the_set_that_brought_them() -> None:
    items = [{"x": ROWS[:3], "k": np.int64(1)}, {"x": ROWS[3:], "k": np.int64(2)}]
    feeds = list(open_data(items, [X, spec("k", dtype=np.int64)]))
    assert [(len(feed["x"]), int(feed["k"])) for feed in feeds] == [(3, 1), (7, 2)]


def test_items_of_uneven_numbers_of_rows_are_not_mixed_up() -> None:
    """Boxes beside an image: joined by their rows alone, the boxes of one image would go to another."""
    items = [{"x": ROWS[i : i + 1], "boxes": np.full((k, 4), i, np.float32)} for i, k in enumerate((3, 5))]
    feeds = list(open_data(items, [spec("x", 1, 3), spec("boxes", "K", 4)]))
    assert [(feed["boxes"].shape, float(feed["boxes"].mean())) for feed in feeds] == [((3, 4), 0.0), ((5, 4), 1.0)]


def test_states_beside_samples_are_counted_as_their_samples() -> None:
    data = {"x": ROWS[:5], "state": np.zeros((10, 4), np.float32)}
    samples = open_data(data, [X, spec("state", 2, 4)], samples=3)
    assert samples.samples == 3 and len(list(samples)) == 3


def test_a_large_compressed_archive_is_streamed(tmp_path: Path) -> None:
    with np.load(compressed(tmp_path, 200 << 20)) as archive:
        assert list(archive.files) == ["x"]
    tracemalloc.start()
    samples = open_data(tmp_path / "zeros.npz", [spec("x", "N", 1024)], batch_size=256)
    assert samples.samples == 51200 and sum(sizes(samples)) == 51200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20


def compressed(folder: Path, size: int) -> Path:
    np.savez_compressed(folder / "zeros.npz", x=np.zeros((size // 4096, 1024), np.float32))
    return folder / "zeros.npz"


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", ROWS)
    np.savez_compressed(tmp_path / "d.npz", x=ROWS)
    base = open_data(ROWS, [X]).fingerprint()
    same = [tmp_path / "d.npy", tmp_path / "d.npz", {"x": ROWS, "labels": np.arange(10)}, [ROWS[:5], ROWS[5:]], Again()]
    assert base is not None and len(base) == 64
    assert {open_data(data, [X]).fingerprint() for data in same} == {base}
    changed = ROWS.copy()
    changed[9, 2] += 1
    assert open_data(ROWS[:9], [X]).fingerprint() == open_data(ROWS, [X], samples=9).fingerprint()
    others = [
        open_data(changed, [X]),
        open_data(ROWS, [X], samples=9),
        open_data(ROWS, [X], batch_size=4),
        open_data(ROWS.astype(np.float64), [spec("x", "N", 3, dtype=np.float64)]),
        open_data({"y": ROWS}, [spec("y", "N", 3)]),
    ]
    prints = {other.fingerprint() for other in others}
    assert len(prints | {base}) == 6 and None not in prints
    assert open_data(ROWS, [X]).fingerprint(4) == open_data(ROWS, [X], batch_size=4).fingerprint()


def test_fingerprints_tell_strings_apart() -> None:
    words = spec("w", "N", 2, dtype=object)
    prints = {open_data(np.array([pair]), [words]).fingerprint() for pair in (["ab", "c"], ["a", "bc"])}
    assert len(prints) == 2


@pytest.mark.parametrize("kind", ONCE)
def test_what_can_be_read_once_has_no_fingerprint(kind: str) -> None:
    assert open_data(made(kind), [X]).fingerprint() is None
    assert open_data(made("rewinding"), [X]).fingerprint() == open_data(ROWS, [X]).fingerprint()


def message(data: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        list(open_data(data, [X], **options))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_bad_data_has_its_own_message() -> None:
    assert "number of samples 0 must be 1 or more" in message(ROWS, samples=0)
    assert "batch size -1 must be 1 or more" in message(ROWS, batch_size=-1)
    assert "holds no arrays" in message(iter([]))
    assert "holds no arrays" in message(Reader([]))
    assert "item 1 is a set, not a mapping" in message(iter([ROWS, {1, 2}]))
    assert "item 0 is a tuple, not a mapping" in message(Rewinding([()]))  # type: ignore[list-item]
    assert "array 'y', which is no input" in message(Reader([{"y": ROWS}]))
    assert "has 3 samples; input 'x' takes 4" in message_of(iter([ROWS[:1]] * 3), spec("x", 4, 3))
    assert "is a int" in message(3)


def message_of(data: Any, *specs: InputSpec) -> str:
    with pytest.raises(UsageError) as caught:
        list(open_data(data, specs))
    return str(caught.value)


def test_a_model_without_inputs_is_called_once() -> None:
    samples = open_data(ROWS, [])
    assert list(samples) == [{}] and samples.samples == 1
