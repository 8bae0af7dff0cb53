"""Data of other libraries: tensors, loaders of (inputs, labels), batches of tokenizers. None of them is imported."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.graph.probes import InputSpec
from onnxprune.runtime.data import open_data

X = InputSpec("x", np.dtype(np.float32), (None, 3))
IDS, MASK = (InputSpec(name, np.dtype(np.int64), (None, 4)) for name in ("input_ids", "attention_mask"))
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


class Torch:
    """A tensor as torch has them: on an accelerator, in a graph of gradients, of a type that numpy lacks."""

    def __init__(self, array: np.ndarray, *, grad: bool = False, device: str = "cpu", narrow: bool = False) -> None:
        self.array, self.grad, self.device, self.narrow = array, grad, device, narrow
        self.shape = array.shape

    def detach(self) -> Torch:
        return Torch(self.array, device=self.device, narrow=self.narrow)

    def cpu(self) -> Torch:
        return Torch(self.array, grad=self.grad, narrow=self.narrow)

    def float(self) -> Torch:
        return Torch(self.array.astype(np.float32), grad=self.grad, device=self.device)

    def numpy(self) -> np.ndarray:
        if self.grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        if self.device != "cpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if self.narrow:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __iter__(self) -> Iterator[Torch]:
        return (Torch(row) for row in self.array)

    def __len__(self) -> int:
        return len(self.array)


class CuPy:
    """An array that leaves its device only when told to."""

    def __array__(self) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def get(self) -> np.ndarray:
        return ROWS


class Exchanged:
    """An array that has nothing but the protocol of exchange."""

    def __dlpack__(self, **_: Any) -> Any:
        return ROWS.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return ROWS.__dlpack_device__()


class Loader:
    """A loader that shuffles anew in every pass, as torch's do."""

    batch_sampler = None

    def __init__(self, items: list[Any]) -> None:
        self.items, self.passes = items, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.items if self.passes % 2 else self.items[::-1])


class Indexed:
    """A data set: one sample and its label by number, no end but its length."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, i: int) -> tuple[Torch, int]:
        return Torch(ROWS[i % len(ROWS)]), i


def rows(source: Any, *specs: InputSpec) -> list[np.ndarray]:
    """Every input of all batches, joined."""
    feeds = list(open_data(source, specs or (X,)))
    return [np.concatenate([feed[spec.name] for feed in feeds]) for spec in specs or (X,)]


@pytest.mark.parametrize(
    "tensor",
    [Torch(ROWS), Torch(ROWS, grad=True), Torch(ROWS, device="cuda:0"), Torch(ROWS, narrow=True), CuPy(), Exchanged()],
    ids=["plain", "gradients", "accelerator", "bfloat16", "cupy", "dlpack"],
)
def test_a_tensor_is_an_array_wherever_one_may_stand(tensor: Any) -> None:
    for source in (tensor, {"x": tensor}, [tensor], iter([{"x": tensor}]), [(tensor, np.arange(4))]):
        (found,) = rows(source)
        assert found.dtype == np.float32 and np.array_equal(found, ROWS)


@pytest.mark.parametrize(
    "batch",
    [
        (Torch(ROWS), Torch(np.arange(4))),
        [Torch(ROWS), Torch(np.arange(4))],
        ({"x": Torch(ROWS)}, Torch(np.arange(4))),
        ((Torch(ROWS),), Torch(np.arange(4))),
        {"x": Torch(ROWS), "labels": Torch(np.arange(4)), "text": ["a", "b"], "spans": [[1], [2, 3]]},
    ],
    ids=["tuple", "list", "mapping and labels", "nested", "mapping with labels"],
)
def test_labels_of_a_loader_are_left_out_and_its_first_pass_is_kept(batch: Any) -> None:
    loader = Loader([batch, (ROWS + 100, None) if isinstance(batch, tuple) else {"x": ROWS + 100}])
    data = open_data(loader, (X,))
    first, second = ([feed["x"] for feed in data] for _ in range(2))
    assert np.array_equal(np.concatenate(first), np.concatenate([ROWS, ROWS + 100]))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)) and loader.passes == 1


def test_batches_of_a_tokenizer() -> None:
    ids = np.arange(8).reshape(2, 4)
    for source in (
        UserDict(input_ids=Torch(ids), attention_mask=Torch(np.ones((2, 4), np.int32)), token_type_ids=Torch(ids)),
        UserDict(input_ids=ids.tolist(), attention_mask=np.ones((2, 4), int).tolist(), offsets=[[1], [2, 3]]),
        {"input_ids": [Torch(row) for row in ids], "attention_mask": [[1] * 4] * 2, "sentence": ["a", "b"]},
        [{"input_ids": row.tolist(), "attention_mask": [1] * 4, "label": 1} for row in ids],
        [(ids, np.ones((2, 4), np.int64), "labels")],
    ):
        found, mask = rows(source, IDS, MASK)
        assert np.array_equal(found, ids) and mask.all() and mask.shape == (2, 4)


def test_data_sets_that_are_indexed() -> None:
    assert np.array_equal(rows(Indexed())[0], ROWS)


def test_what_is_no_data_is_named() -> None:
    def message(source: Any, *specs: InputSpec) -> str:
        with pytest.raises(UsageError) as caught:
            rows(source, *specs)
        return str(caught.value)

    ragged = message({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1, 0]]}, IDS, MASK)
    assert "array 'input_ids' cannot be read: its rows have different lengths" in ragged and "Pad them" in ragged
    assert "holds 1 arrays, and the model has 2 inputs: 'input_ids', 'attention_mask'" in message([(ROWS,)], IDS, MASK)
    assert "x" in message({"x": object()}) and "object" in message({"x": object()})

    class Split(list[Any]):
        features = None

    splits = message({"train": Split([{"x": ROWS}]), "test": Split()})
    assert "'train', 'test'" in splits and "datasets['train']" in splits


def test_nothing_is_imported_for_it() -> None:
    import subprocess
    import sys

    code = "import sys, onnxprune.runtime.data as d; assert not {'torch', 'tensorflow', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
