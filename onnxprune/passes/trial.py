"""What every check needs: a folder for a while, models in it as files, and inputs to run them on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxprune.analysis import Analysis
from onnxprune.errors import ModelError
from onnxprune.files import workspace
from onnxprune.graph.bounds import integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.model.save import save
from onnxprune.model.weights import Weight
from onnxprune.passes.calls import Calls
from onnxprune.passes.state import State
from onnxprune.runtime import inputs, sessions

# From this size on, the original and the result are never in memory together.
_LARGE = 1 << 30


@dataclass(frozen=True, slots=True)
class Trial:
    """A folder with models as files.

    Attributes:
        original: the original's file: its own, or a copy of what is only in memory.
    """

    analysis: Analysis
    folder: Path
    original: Path

    @classmethod
    @contextmanager
    def of(cls, analysis: Analysis) -> Iterator[Trial]:
        """A trial of the model that was analysed; its files go when it is over."""
        with workspace() as folder:
            loaded = analysis.loaded
            path = loaded.path
            if path is None:
                path = folder / "original.onnx"
                save(loaded.proto, loaded.weights, path)
            trial = cls(analysis, folder, path)
            with sessions.frugal(trial.large):
                yield trial

    @property
    def large(self) -> bool:
        """Whether two such models had better not be in memory at once."""
        return self.analysis.loaded.size > _LARGE

    def write(self, proto: onnx.ModelProto, weights: Mapping[str, Weight], stem: str) -> tuple[Path, int]:
        """A model as a file, and its bytes."""
        path = self.folder / f"{stem}.onnx"
        return path, save(proto, weights, path, prefer_external=bool(self.analysis.loaded.external))

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Where a model does not run, say so of the user's own file, unless that one does."""
        try:
            yield
        except ModelError:
            sessions.open_session(self.original, optimize=False)
            raise


def synthetic_feeds(state: State, analysis: Analysis) -> list[Any]:
    """One seeded feed per probe."""
    specs = input_specs(analysis.graph)
    bounds = integer_bounds(analysis.graph, analysis.facts)
    return [inputs.synthetic(specs, probe.inputs, bounds=bounds, seed=state.seed) for probe in analysis.facts.probes]


def timing_feed(state: State, trial: Trial) -> Any:
    """One call with one sample where the model leaves the number open and runs so: the user's data, else synthetic."""
    analysis = trial.analysis
    if state.data is not None:
        call = next(iter(Calls(state, analysis).batches(1)), None)
        if call is not None:
            return call
    specs, facts = input_specs(analysis.graph), analysis.facts
    shapes = {
        name: tuple(1 if axis == 0 and facts.varies(name, 0) else n for axis, n in enumerate(shape))
        for name, shape in facts.probes[0].inputs.items()
    }
    bounds = integer_bounds(analysis.graph, facts)
    feed = inputs.synthetic(specs, shapes, bounds=bounds, seed=state.seed)
    if shapes != facts.probes[0].inputs and not sessions.runs(trial.original, feed):
        return synthetic_feeds(state, analysis)[0]
    return feed
