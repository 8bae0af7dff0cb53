"""Workspaces of checks: a temporary folder, models in it as files, and inputs to run them on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import ModelError, UsageError, argument
from onnxprune.graph.facts import integer_bounds
from onnxprune.graph.probes import InputSpec, input_specs
from onnxprune.io.files import clone, is_text, workspace
from onnxprune.io.read import Loaded, load
from onnxprune.io.weights import FileWeight, Weight
from onnxprune.io.write import assemble, lies_in, referring, save
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.pipeline import Context
from onnxprune.pruning.holding import random_operators, seed_random_nodes
from onnxprune.runtime import inputs, sessions

# From this size on, the original and the result are never in memory together.
_LARGE = 1 << 30
# Up to this size, models need no file at all.
_LIGHT = 32 << 20
_MAPPED_FROM = 1024


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder with models as files.

    Attributes:
        original: the original's file: its own, or a copy of a model in memory, as it was given.
    """

    analysis: Analysis
    loaded: Loaded
    folder: Path
    original: Path
    _stored: dict[int, FileWeight] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def of(cls, analysis: Analysis, loaded: Loaded | None = None) -> Iterator[Workspace]:
        """Open a trial of the analysed model, or of another with the same inputs; its files are deleted at the end."""
        loaded = loaded or analysis.loaded
        with workspace() as folder:
            path = loaded.path
            if path is None:
                path = folder / "original.onnx"
                if loaded.data is not None:
                    path.write_bytes(loaded.data)
                else:
                    save(loaded.as_read, loaded.weights, path)
            trial = cls(analysis, loaded, folder, path)
            if not is_text(str(path)):  # onnxruntime cannot be told of it
                trial = replace(trial, original=trial.copy_of_original())
            with sessions.frugal(trial.heavy):
                yield trial

    @property
    def large(self) -> bool:
        """Whether two such models had better not be in memory at once."""
        return self.loaded.size > _LARGE

    @property
    def heavy(self) -> bool:
        """Whether memory has room for one copy of the weights only."""
        return self.loaded.size > sessions.HEAVY

    @property
    def drawing(self) -> list[str]:
        """Types of operators that draw random numbers, other ones in every run."""
        return random_operators(self.loaded.as_read)

    @contextmanager
    def lend(self, proto: onnx.ModelProto, weights: Mapping[str, Weight], stem: str) -> Iterator[sessions.Openable]:
        """Lend a model to open sessions of: in memory where it is small, else with weights in files where they are.

        Random operators get a seed, so that all models that are lent draw the same numbers.
        """
        proto = seed_random_nodes(proto)
        if sum(weight.nbytes for weight in weights.values()) <= _LIGHT:
            yield bytes(assemble(proto, weights).SerializeToString())
            return
        if self.heavy and (model := self._referring(proto, weights)) is not None:
            yield model
            return
        path, _ = self.write(proto, weights, stem)
        yield path
        for file in self.folder.glob(f"{path.name}*"):
            file.unlink()

    @contextmanager
    def lend_original(self) -> Iterator[sessions.Openable]:
        """Lend the original to open sessions of: its file, or a copy with mapped weights where it is large.

        A large file with external weights is used as it is; a model that draws random numbers is a copy with a seed.
        """
        if not self.drawing and (not self.heavy or self.loaded.external):
            yield self.original
            return
        with self.lend(self.loaded.as_read, self.loaded.weights, "as_read") as model:
            yield model

    def _referring(self, proto: onnx.ModelProto, weights: Mapping[str, Weight]) -> sessions.Referring | None:
        """Return a model that refers to large weights in place: in the original's folder, or in a copy made once."""
        if not sessions.refers():
            return None
        folder = self.original.parent
        large = [w for w in self.loaded.weights.values() if w.nbytes >= _MAPPED_FROM]
        if all(lies_in(weight, folder) for weight in large):
            model = referring(proto, weights, folder, {}, _LIGHT)
            return None if model is None else sessions.Referring(model.SerializeToString(), folder)
        if not self._stored:
            self._store(large)
        model = referring(proto, weights, self.folder, self._stored, _LIGHT)
        return None if model is None else sessions.Referring(model.SerializeToString(), self.folder)

    def _store(self, large: Sequence[Weight]) -> None:
        """Copy the original's weights into a file that can be mapped."""
        path = self.folder / "stored.onnx"
        save(self.loaded.as_read, self.loaded.weights, path, external=True)
        copies = load(path).weights
        for weight in large:
            copy = copies.get(weight.name)
            if isinstance(copy, FileWeight):
                self._stored[id(weight)] = copy

    def copy_of_original(self) -> Path:
        """Copy the original to a file that others may change, under its own name, with its data beside it."""
        loaded = self.loaded
        if loaded.path is None:
            return self.original
        name = loaded.path.name if is_text(loaded.path.name) else "original.onnx"
        home, target = loaded.path.resolve().parent, self.folder / "copy" / name
        pairs = [(loaded.path, target), *((data, target.parent / data.relative_to(home)) for data in loaded.external)]
        try:
            for source, place in pairs:
                place.parent.mkdir(parents=True, exist_ok=True)
                clone(source, place)
        except OSError as error:
            raise UsageError(
                f"cannot copy the model to {str(self.folder)!r}: {error.strerror}",
                hint="Make room there, or set TMPDIR to another folder.",
            ) from error
        return target

    def write(self, proto: onnx.ModelProto, weights: Mapping[str, Weight], stem: str) -> tuple[Path, int]:
        """Write a model to a file; returns the path and the size in bytes."""
        path = self.folder / f"{stem}.onnx"
        return path, save(proto, weights, path, prefer_external=self.heavy or bool(self.loaded.external))

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Explain failures to run by the user's own file, or by the sizes of its open dimensions."""
        try:
            yield
        except ModelError as error:
            sessions.open_session(self.original, optimize=False)
            raise sizes_refused(self.analysis, error) from error


def sizes_refused(analysis: Analysis, error: ModelError) -> ModelError:
    """Return the error of a model that did not run on synthetic inputs, naming open dimensions as possible reasons."""
    probe = analysis.facts.probes[0]
    open_specs = [
        spec for spec in analysis.facts.settler.dimensions.specs if not all(isinstance(d, int) for d in spec.shape)
    ]
    if not open_specs or not error.message.startswith(sessions.CANNOT_RUN):
        return error
    shown = "; ".join(_described(spec, probe.inputs[spec.name]) for spec in open_specs[:3])
    more = f" and {len(open_specs) - 3} more inputs" if len(open_specs) > 3 else ""
    conflict = analysis.facts.conflict
    conflict_text = "" if conflict is None else f" {conflict}"
    sizes = " ".join(
        f"{argument('input_shapes')} {s.name}={','.join(map(str, probe.inputs[s.name]))}" for s in open_specs[:3]
    )
    return ModelError(
        f"The model has open dimensions and does not run at the sizes that were tried: {shown}{more}.{conflict_text} "
        f"{error.message.marked}",
        hint=f"Give valid sizes, in this form: {sizes}",
    )


def _described(spec: InputSpec, sizes: Sequence[int]) -> str:
    """Describe an input with the sizes of its open dimensions: ``pixels [batch = 2, 3, height = 64]``."""
    dims = [str(n) if isinstance(d, int) else f"{d or '?'} = {n}" for d, n in zip(spec.shape, sizes, strict=True)]
    return f"input {spec.name!r} [{', '.join(dims)}]"


def synthetic_feeds(context: Context, analysis: Analysis, refused: Collection[int] = ()) -> list[Any]:
    """Draw one seeded feed per probe, except the refused ones.

    Args:
        context: context of the run.
        analysis: analysis of the model.
        refused: indices of the probes at whose sizes the model is known not to run.
    """
    specs, facts = input_specs(analysis.graph), analysis.facts
    bounds = integer_bounds(analysis.graph, facts)
    probes = [probe for index, probe in enumerate(facts.probes) if index not in refused]
    return [inputs.synthetic(specs, probe.inputs, bounds=bounds, seed=context.seed) for probe in probes]


def timing_feed(context: Context, trial: Workspace) -> Any:
    """One call with one sample where the model leaves the number open and runs so: the user's data, else synthetic."""
    analysis = trial.analysis
    if context.calibration is not None:
        call = next(iter(CalibrationBatches(context, analysis).batches(1)), None)
        if call is not None:
            return call
    specs, facts = input_specs(analysis.graph), analysis.facts
    shapes = {
        name: tuple(1 if axis == 0 and facts.varies(name, 0) else n for axis, n in enumerate(shape))
        for name, shape in facts.probes[0].inputs.items()
    }
    bounds = integer_bounds(analysis.graph, facts)
    feed = inputs.synthetic(specs, shapes, bounds=bounds, seed=context.seed)
    if shapes != facts.probes[0].inputs and not sessions.runs(trial.original, feed):
        return synthetic_feeds(context, analysis)[0]
    return feed
