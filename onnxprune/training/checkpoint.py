"""State of an interrupted training in a file, so that it goes on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, argument
from onnxprune.runtime.capture import make_folder, read_arrays, write_arrays
from onnxprune.runtime.sessions import Array
from onnxprune.training.loop import Keeper

FORMAT = 4
"""Raised whenever the state of a training has another meaning."""


class OtherDataError(UsageError):
    """A training that was interrupted on other data (exit code 2)."""


class Checkpoint:
    """The state of one training in a file.

    Args:
        path: the file.
        data: fingerprint of the data.
        weights: the weights before any step.
    """

    def __init__(self, path: Path, data: str, weights: Array) -> None:
        make_folder(path.parent)
        self._path, self._data = path, data
        self._weights = hashlib.sha256(weights.tobytes()).hexdigest()

    def load(self) -> Mapping[str, Any] | None:
        """Return the state of a training that was broken off; None where there is none.

        Raises:
            UsageError: it was one on other data.
        """
        arrays = read_arrays(self._path)
        if not arrays or "data" not in arrays:
            return None
        if str(arrays["data"]) != self._data:
            raise OtherDataError(
                f"{argument('finetune')} was interrupted on other data, and cannot go on with these",
                hint=f"Give the same {argument('data')}, or delete {str(self._path)!r} to begin anew.",
            )
        return arrays if str(arrays["start"]) == self._weights else None

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep the state in place of the one before."""
        write_arrays(self._path, {**state, "data": np.asarray(self._data), "start": np.asarray(self._weights)})

    def clear(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a training: its state is kept beside that of the parts in front of it.

    Attributes:
        keeper: where the state of all parts is kept.
        state: the state of the parts in front of it.
    """

    keeper: Keeper
    state: Mapping[str, Any]

    def load(self) -> Mapping[str, Any] | None:
        """Return the state that this part had when the training was broken off; None where it had not begun."""
        arrays = self.keeper.load() or {}
        part = {name.removeprefix(_PART): value for name, value in arrays.items() if name.startswith(_PART)}
        return part or None

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep the state, beside that of the parts in front."""
        self.keeper.save({**self.state, **{f"{_PART}{name}": value for name, value in state.items()}})

    def clear(self) -> None:
        """Leave the state to the part behind this one, or to the end of the training."""


_PART = "part."


def part_of(keeper: Keeper | None, state: Mapping[str, Any]) -> Part | None:
    """Return where the state of a part of a training is kept; None where none is."""
    return None if keeper is None else Part(keeper, dict(state))


def stored(keeper: Keeper | None) -> Mapping[str, Any]:
    """Return the state of a training that was broken off; empty where there is none."""
    return (None if keeper is None else keeper.load()) or {}
