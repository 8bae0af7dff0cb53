"""What a long run has accumulated so far, on disk: a run that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import __version__, files
from onnxprune.errors import UsageError, argument
from onnxprune.statistics import Statistic

FORMAT = 3
"""Raised whenever statistics are measured in another way, so that what an older package left is not gone on from."""


class Checkpoint:
    """One file per set of statistics, named by a hash of the model, the data, what is asked of them, and the package.

    Args:
        folder: made where it does not exist. key: everything that the result depends on.

    Raises:
        UsageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, key: str) -> None:
        make_folder(folder)
        self._folder, self._key = folder, key

    def at(self, batch_size: int) -> Checkpoint:
        """The same for calls of this many samples: only whole calls are counted, so others cannot go on from there."""
        return Checkpoint(self._folder, f"{self._key}:{batch_size}")

    def _path(self, statistics: Mapping[str, Statistic]) -> Path:
        text = "\n".join([f"{__version__}:{FORMAT}", self._key, *sorted(statistics)])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"

    def load(self, statistics: Mapping[str, Statistic]) -> tuple[int, int]:
        """Fill the statistics from the file. Returns (batches, samples) they hold; (0, 0) without a usable file."""
        file = read_arrays(self._path(statistics))
        states: dict[str, dict[str, Any]] = {name: {} for name in statistics}
        try:
            done = int(file["batches"]), int(file["samples"])
            for entry, array in file.items():
                if "|" in entry:
                    name, _, part = entry.rpartition("|")
                    states[name][part] = array
        except (KeyError, TypeError, ValueError):  # missing, or something else
            return 0, 0
        for name, statistic in statistics.items():
            statistic.state = states[name]
        return done

    def save(self, statistics: Mapping[str, Statistic], batches: int, samples: int) -> None:
        """Write the file, replacing the one before at once."""
        path = self._path(statistics)
        arrays = {f"{name}|{part}": a for name, s in statistics.items() for part, a in s.state.items()}
        write_arrays(path, {"batches": np.int64(batches), "samples": np.int64(samples), **arrays})


def make_folder(folder: Path) -> None:
    """Make a folder to keep things in; raises UsageError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{argument('cache')} {str(folder)!r} cannot be made: {error.strerror}",
            hint="Give a folder that can be written.",
        ) from error


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a file; empty where it is missing or damaged, which only means to compute them anew."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # what a damaged archive raises depends on where it is damaged
        return {}


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as a file, replacing the one before at once; raises UsageError where it cannot be written."""
    try:
        with files.replacing(path) as replacement, replacement.open() as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UsageError(
            f"{argument('cache')} {str(path.parent)!r} cannot be written: {error.strerror}",
            hint=f"Free space, or drop {argument('cache')}.",
        ) from error
