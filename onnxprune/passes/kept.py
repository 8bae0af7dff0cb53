"""Layers that a repair has fitted, kept on disk: a repair that was interrupted goes on behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnxprune import __version__
from onnxprune.model.weights import Weight
from onnxprune.recover.solve import Solution
from onnxprune.runtime.checkpoint import make_folder, read_arrays, write_arrays
from onnxprune.runtime.sessions import Feed

FORMAT = 1
"""Raised whenever layers are fitted in another way."""

Fitted = tuple[Solution, tuple[int, int, int]]
"""A layer's new weights, and the rows, unknowns and directions they were fitted from."""


class Kept:
    """Solutions level by level, in a folder of their own for everything that they depend on.

    Args:
        folder: made where it does not exist. key: names model, data and settings, see :func:`print_of`.

    Raises:
        UsageError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / f"repair-{hashlib.sha256(f'{__version__}:{FORMAT}:{key}'.encode()).hexdigest()[:32]}"
        make_folder(self._folder)

    def load(self, level: int, layers: Sequence[str]) -> list[Fitted] | None:
        """The solutions of these layers; None where they are not there."""
        file = read_arrays(self._path(level))
        try:
            if list(file["layers"]) == list(layers):
                return [_read(file, i) for i in range(len(layers))]
        except (KeyError, TypeError, ValueError):  # missing, or something else
            return None
        return None

    def save(self, level: int, layers: Sequence[str], found: Sequence[Fitted]) -> None:
        """Write the solutions of a level, all at once."""
        arrays = {"layers": np.asarray(layers, dtype=np.str_)}
        for i, (solution, extent) in enumerate(found):
            numbers = [solution.before, solution.after, np.nan if solution.ridge is None else solution.ridge]
            values = (solution.matrix, solution.bias, np.asarray(numbers), np.asarray(solution.how), np.asarray(extent))
            arrays |= {f"{i}.{name}": value for name, value in zip(_PARTS, values, strict=True)}
        write_arrays(self._path(level), arrays)

    def _path(self, level: int) -> Path:
        return self._folder / f"{level}.npz"


_PARTS = ("matrix", "bias", "numbers", "how", "extent")


def _read(file: Mapping[str, np.ndarray], i: int) -> Fitted:
    matrix, bias, numbers, how, extent = (file[f"{i}.{name}"] for name in _PARTS)
    before, after, ridge = map(float, numbers)
    rows, unknowns, directions = map(int, extent)
    solution = Solution(matrix, bias, before, after, str(how), None if np.isnan(ridge) else ridge)
    return solution, (rows, unknowns, directions)


def print_of(proto: onnx.ModelProto, weights: Mapping[str, Weight], feeds: Sequence[Feed]) -> str:
    """SHA-256 of a model and of inputs."""
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for name in sorted(weights):
        weight = weights[name]
        digest.update(f"{name}:{weight.onnx_type}:{weight.shape}".encode())
        text = weight.onnx_type == onnx.TensorProto.STRING
        digest.update(repr(weight.read().tolist()).encode() if text else weight.stored())
    for feed in feeds:
        for name, value in sorted(feed.items()):
            digest.update(f"{name}:{value.dtype}:{value.shape}".encode())
            digest.update(repr(value.tolist()).encode() if value.dtype == object else value.tobytes())
    return digest.hexdigest()
