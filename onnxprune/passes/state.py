"""What flows through a pipeline: the analysis of the original, the current model, the plan and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.documents import encoded
from onnxprune.errors import UsageError
from onnxprune.graph.probes import input_specs
from onnxprune.model.save import assemble, check_output, save
from onnxprune.model.weights import Weight
from onnxprune.plan import Plan
from onnxprune.report.facts import Report
from onnxprune.runtime.data import Samples, open_data
from onnxprune.runtime.device import Device, device
from onnxprune.runtime.images import ImageOptions
from onnxprune.runtime.sessions import Feed

Progress = Callable[[str, float], None]


@dataclass(slots=True)
class State:
    """The run so far. Passes read it, change it and return nothing.

    ``later`` holds what describes the run (plan, report): it is done when ``plan`` or ``report`` is first read.
    ``analysis`` is of the model that channels are cut from; ``factorized`` says that layers were taken apart, ``stale``
    that this happened after the analysis.
    ``proved`` is the removal that exactness was asked of; ``unrepaired`` the model before a repair changed its weights;
    ``judged_on`` the inputs to compare the result on, with a name for them, where a repair has used the others;
    ``read_from`` the files that weights are read from besides the original's. ``memory_limit``: bytes of activations.
    ``device``: where time is measured.
    """

    source: str | Path | bytes | onnx.ModelProto
    input_shapes: Mapping[str, Sequence[int]] | None = None
    data: Any = None
    seed: int = 0
    progress: Progress | None = None
    samples: int | None = None
    batch_size: int | None = None
    images: ImageOptions | None = None
    cache: Path | None = None
    memory_limit: int | None = None
    device: Device = field(default_factory=device)
    analysis: Analysis | None = None
    proto: onnx.ModelProto | None = None
    weights: dict[str, Weight] = field(default_factory=dict)
    removed: NDArray[np.bool_] | None = None
    proved: NDArray[np.bool_] | None = None
    unrepaired: tuple[onnx.ModelProto, dict[str, Weight]] | None = None
    factorized: bool = False
    stale: bool = False
    judged_on: tuple[Sequence[Feed], str] | None = None
    read_from: list[Path] = field(default_factory=list)
    later: list[Callable[[], None]] = field(default_factory=list)
    _original: Analysis | None = None
    _plan: Plan = field(default_factory=Plan)
    _report: Report = field(default_factory=Report)
    _samples: Samples | None = None

    def __post_init__(self) -> None:
        """Refuse what only data give a meaning."""
        given = [name for name in ("samples", "batch_size", "images") if getattr(self, name) is not None]
        if given and self.data is None:
            raise UsageError(f"{given[0]} says how to read data, and there is no data", hint="Give data, or drop it.")

    @property
    def plan(self) -> Plan:
        """What was removed from where."""
        self._describe()
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = plan

    @property
    def report(self) -> Report:
        """What was found out so far."""
        self._describe()
        return self._report

    def _describe(self) -> None:
        waiting, self.later = self.later, []
        for describe in waiting:
            describe()

    def analyzed(self, approximate: bool = False) -> Analysis:
        """The analysis of the original, made when first asked for."""
        if self.analysis is None:
            with self.stage("analyze"):
                self.analysis = Analysis(self.source, input_shapes=self.input_shapes, approximate=approximate)
            loaded = self.analysis.loaded
            self._report.model = str(loaded.path or "")
            self._report.totals.bytes_before = loaded.size
            self.proto, self.weights = loaded.proto, dict(loaded.weights)
        return self.analysis

    def renewed(self, approximate: bool = False) -> Analysis:
        """The analysis of the model as it is now: made anew where layers were taken apart since."""
        if self.stale:
            assert self.proto is not None
            self._original = self.original
            with self.stage("analyze"):
                model = assemble(self.proto, self.weights)
                self.analysis = Analysis(model, input_shapes=self.input_shapes, approximate=approximate)
            # Plans name the model that came in.
            self.analysis.loaded = replace(self.analysis.loaded, digest=lambda: self.original.loaded.sha256)
            self.removed, self.proved, self.unrepaired, self.stale = None, None, None, False
        return self.analyzed(approximate)

    @property
    def original(self) -> Analysis:
        """The analysis of the model that came in, whatever was made of it since."""
        return self._original or self.analyzed()

    @property
    def gone(self) -> NDArray[np.bool_]:
        """Mask over atoms of what was removed; of none where nothing was."""
        return np.zeros(self.analyzed().table.atoms.count, bool) if self.removed is None else self.removed

    @property
    def changed(self) -> bool:
        """Whether the model says anything else than the original."""
        return self.factorized or (self.removed is not None and bool(self.removed.any()))

    def calibration(self) -> Samples:
        """The user's data for the inputs of the original, opened once: passes share what is kept of an iterator.

        Raises:
            UsageError: there is no data, or it does not fit.
        """
        if self.data is None:
            raise UsageError(
                "this needs calibration data, and there is none",
                hint="Give it with --data (Python: data=...): arrays, images or anything that yields inputs.",
            )
        if self._samples is None:
            specs = input_specs(self.analyzed().graph)
            self._samples = open_data(
                self.data, specs, samples=self.samples, batch_size=self.batch_size, images=self.images
            )
        return self._samples

    def branch(
        self, proto: onnx.ModelProto, weights: dict[str, Weight], removed: NDArray[np.bool_], samples: int | None = None
    ) -> State:
        """A run of its own that goes on from here with a cut model; this one does not notice.

        Args:
            samples: use only so many of the data.
        """
        data = None if self.data is None else self.calibration()
        return replace(
            self,
            proto=proto,
            weights=weights,
            removed=removed,
            proved=None,
            unrepaired=None,
            judged_on=None,
            progress=None,
            later=[],
            _plan=Plan(),
            _report=Report(),
            _samples=data if data is None or samples is None else data.first(samples),
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and tell the progress bar."""
        self.tell(name, 0.0)
        start = time.perf_counter()
        yield
        self._report.seconds[name] = self._report.seconds.get(name, 0.0) + time.perf_counter() - start
        self.tell(name, 1.0)

    def tell(self, name: str, fraction: float) -> None:
        """Report progress, if anyone listens."""
        if self.progress is not None:
            self.progress(name, fraction)


class Pass(Protocol):
    """A stage of a pipeline: a callable over the state."""

    def __call__(self, state: State) -> None:
        """Do the stage's work on the state, or raise an OnnxpruneError."""
        ...


class Result:
    """What a run gives back: ``model``, ``plan``, ``report``, and ``save``."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._model: onnx.ModelProto | None = None

    @property
    def plan(self) -> Plan:
        """What was removed from where."""
        return self._state.plan

    @property
    def report(self) -> Report:
        """Sizes, exactness, fidelity, speed, groups and barriers."""
        return self._state.report

    @property
    def model(self) -> onnx.ModelProto:
        """The final model in memory, put together when first asked for. For large models prefer ``save``."""
        if self._model is None:
            assert self._state.proto is not None
            self._model = assemble(self._state.proto, self._state.weights)
        return self._model

    def save(self, path: str | Path, *, plan: str | Path | None = None) -> int:
        """Write the final model; weights are streamed, an existing file is replaced at once or not at all.

        Args:
            path: the model file. plan: where to write the plan, which is replaced together with the model.

        Returns:
            bytes of the model written, external data included.

        Raises:
            UsageError: the target is the input, or cannot be written.
        """
        state = self._state
        assert state.proto is not None
        loaded = state.original.loaded
        check_output(path, loaded.path, [*loaded.external, *state.read_from])
        companions = {Path(plan): encoded(self.plan.text())} if plan is not None else {}
        external = bool(loaded.external)
        size = save(state.proto, state.weights, path, prefer_external=external, companions=companions)
        state.report.totals.bytes_after = size
        state.report.output = str(path)
        return size
