"""A run: one context, passes from model to model, and the facts that they return.

``Pass(context, model) -> PassResult(model, facts, changed)``. The context and every model are immutable: a pass returns
another model, a trial is another model, and passes have no other way to affect each other. The requirements and
guarantees of a pass are declared on it and checked around every call.
"""

from __future__ import annotations

import inspect
import json
import logging
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan, PlanRotation, PlanVocabulary, map_text, rotated
from onnxprune.channels.survivors import Survivors
from onnxprune.errors import OnnxpruneError, PostconditionError, PreconditionError, UsageError, argument
from onnxprune.graph.probes import input_specs
from onnxprune.graph.resized import Resizing
from onnxprune.graph.view import Graph
from onnxprune.io.files import append_suffix, encode_text
from onnxprune.io.interchange import ModelSource, to_graphsurgeon, to_onnx_ir
from onnxprune.io.weights import Weight
from onnxprune.io.write import assemble, check_output, save
from onnxprune.plugins import Named
from onnxprune.pruning.model_config import ModelConfig, target_of
from onnxprune.recovery.importance import KnownImportances
from onnxprune.report.facts import (
    Exactness,
    Fact,
    Remark,
    Report,
    Sizes,
    SparsifiedLayer,
    StageTime,
    Timings,
    report_of,
)
from onnxprune.runtime.data import Samples, open_data
from onnxprune.runtime.diagnosis import explain_failures
from onnxprune.runtime.fidelity import KnownOutputs, Outputs
from onnxprune.runtime.images import ImageOptions
from onnxprune.runtime.latency import Device, device
from onnxprune.runtime.memory import return_freed_memory
from onnxprune.runtime.sessions import Feed, with_custom_ops
from onnxprune.settings import check_needs, checked, record_of

Progress = Callable[[str, float], None]
Mask = NDArray[np.bool_]
ModelParts = tuple[onnx.ModelProto, Mapping[str, Weight]]
"""A model without its weights, and the weights by name."""

# -- arguments of a run ------------------------------------------------------------------------------------------------


class Calibration:
    """The user's inputs, opened when first asked for; passes share the items of an iterator.

    Args:
        data: see :func:`onnxprune.prune`.
        analysis: analysis of the model.
        samples: number of samples to use, 1 or more; None for all.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays.
    """

    def __init__(
        self,
        data: Any,
        analysis: Analysis,
        samples: int | None = None,
        batch_size: int | None = None,
        images: ImageOptions | None = None,
    ) -> None:
        self.limit, self.batch_size, self.images = samples, batch_size, images
        self._data, self._analysis = data, analysis
        self._samples: Samples | None = None

    @property
    def path(self) -> Path | None:
        """The absolute path of the file or folder that these inputs are read from; None where they are no such."""
        return Path(self._data).resolve() if isinstance(self._data, (str, Path)) else None

    def open(self) -> Samples:
        """Open the inputs.

        Raises:
            UsageError: the inputs do not fit the model.
        """
        if self._samples is None:
            specs = input_specs(self._analysis.graph)
            self._samples = open_data(
                self._data, specs, samples=self.limit, batch_size=self.batch_size, images=self.images
            )
        return self._samples

    def first(self, samples: int) -> Calibration:
        """Return the same inputs limited to this many samples."""
        first = Calibration(None, self._analysis, self.limit, self.batch_size, self.images)
        first._samples = self.open().first(samples)
        return first

    def through(self, analysis: Analysis, change: Callable[[Feed], Feed]) -> Calibration:
        """Return the same inputs for another model, with a function applied to every call."""
        other = Calibration(None, analysis, self.limit, self.batch_size, self.images)
        other._samples = self.open().through(change)
        return other


_logger = logging.getLogger("onnxprune")


def _unlogged(text: str, *values: object) -> None:
    """Write nothing."""


class Stages:
    """Clock of the stages of a run, their progress, and interrupts.

    Args:
        listener: progress callback, called with (stage, fraction).
        logged: whether the logger ``onnxprune`` gets a line per stage, at level DEBUG.
        is_trial: whether it belongs to a trial within a run: an interrupt is then that of the run.

    Attributes:
        seconds: seconds per stage, by name.
        processor_seconds: seconds of all processors per stage, by name, without those of worker processes.
        interrupted: description of the work that an interrupt ended; empty where there was none.
        left_out: descriptions of the work that bounds on the effort left out.
        is_trial: whether it belongs to a trial within a run.
    """

    def __init__(self, listener: Progress | None = None, *, logged: bool = True, is_trial: bool = False) -> None:
        self._listener, self.is_trial = listener, is_trial
        self._log: Callable[..., None] = _logger.debug if logged else _unlogged
        self.seconds: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}
        self.interrupted = ""
        self.left_out: list[str] = []

    def leave_out(self, what: str) -> None:
        """Record work that was skipped by bounds, once, for the report."""
        if what not in self.left_out:
            self.left_out.append(what)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as a stage."""
        self.tell(name, 0.0)
        self._log("%s: started", name)
        start, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            took, used = time.perf_counter() - start, time.process_time() - processor
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            self.processor_seconds[name] = self.processor_seconds.get(name, 0.0) + used
        self._log("%s: done in %.3f s", name, took)
        self.tell(name, 1.0)

    def tell(self, name: str, fraction: float) -> None:
        """Call the listener, if there is one."""
        if self._listener is not None:
            self._listener(name, fraction)

    def timings(self) -> Timings:
        """Return the time that every stage took so far."""
        times = {name: StageTime(self.seconds[name], used) for name, used in self.processor_seconds.items()}
        return Timings(times, self.interrupted, tuple(self.left_out))

    def watched(self, listener: Progress) -> Stages:
        """Return the same clock with a second listener to its progress."""

        def tell(name: str, fraction: float) -> None:
            self.tell(name, fraction)
            listener(name, fraction)

        watched = Stages(tell, is_trial=self.is_trial)
        watched._log = self._log
        watched.seconds, watched.processor_seconds = self.seconds, self.processor_seconds
        watched.left_out = self.left_out
        return watched

    @contextmanager
    def until_interrupted(self, answer: Callable[[], str]) -> Iterator[None]:
        """Leave the block at an interrupt (SIGINT) where there is an answer to finish with.

        Args:
            answer: function that describes the answer so far, for the report; empty where there is none, and the
                interrupt goes on.

        Raises:
            KeyboardInterrupt: there is no answer, or the run is to end at once.
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            # Other signals that end a program are raised as interrupts with a number of their own.
            ends_at_once = getattr(stop, "number", signal.SIGINT) != signal.SIGINT
            self.interrupted = "" if self.is_trial or ends_at_once else answer()
            if not self.interrupted:
                raise
            self._log("interrupted: %s", self.interrupted)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let an interrupt (SIGINT) wait for the end of the block."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])


@dataclass(frozen=True, slots=True)
class Effort:
    """Bounds on the work of a run, counted and not timed, so that a run can be repeated.

    Attributes:
        name: its name.
        seconds: work of all trials of a search, in seconds of the machine that estimates are from.
        candidates: largest number of candidates to compare before any are tried around the best.
        trial_samples: largest number of samples that a candidate is recovered from.
        least_samples: fewest samples to measure output sensitivities on.
        samples: largest number of samples to recover from where the user sets none; None for all.
        rows: rows per unknown that a layer is fitted to.
        training: multiply-accumulates of a training that was not requested, forward and backward; 0: none.
    """

    name: str
    seconds: float
    candidates: int
    trial_samples: int
    least_samples: int
    samples: int | None
    rows: int
    training: float = 0.0


EFFORTS = {
    "quick": Effort("quick", 8.0, 1, 16, 8, 64, 20),
    "normal": Effort("normal", 30.0, 8, 128, 16, None, 50, 3e12),
    "thorough": Effort("thorough", 120.0, 8, 512, 16, None, 100, 1.5e13),
}
"""Bounds on the work of a run, by the name of the effort."""


class WorkShare:
    """The share of a stage that is done, by the work of its parts as it is known ahead.

    Args:
        tell: function that takes the share of the whole, 0 to 1, which never falls.
        work: work of every part in the order in which they are done, in any unit.
    """

    def __init__(self, tell: Callable[[float], None], work: Mapping[str, float]) -> None:
        self._tell, self._work = tell, work
        self._max_share = 0.0

    def part(self, name: str, fraction: float) -> None:
        """Report the share of a part, 0 to 1; the parts ahead of it are done."""
        names = list(self._work)
        before = sum(self._work[other] for other in names[: names.index(name)])
        finished = before + min(max(fraction, 0.0), 1.0) * self._work[name]
        share = finished / max(sum(self._work.values()), 1e-9)
        if share > self._max_share:
            self._max_share = min(share, 1.0)
            self._tell(self._max_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Arguments of every run beside the model and its passes: each once.

    Attributes:
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        data: inputs without labels, see :func:`onnxprune.prune`; None: without.
        samples: number of samples to use, 1 or more; None: the default of each pass.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes:1"``, where fidelity should not decide by itself; None: none.
        cache: folder of statistics, from which an interrupted or repeated run continues; None: not kept.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; None: 512 MiB.
        providers: onnxruntime providers for measurements of time; None: the CPU.
        threads: threads inside an operator for measurements of time, 1 or more; None: all processors.
        seed: seed of all random numbers, 0 or more.
        effort: bounds on the work: ``quick``, ``normal`` or ``thorough``.
        labels: labels of the samples in the order of ``data``, see :func:`onnxprune.prune`; None: without.
        resize_io: globs over inputs and outputs of the model that may lose channels; empty: none.
        cache_heads: whether the inputs and outputs of all caches may lose channels.
        model_config: configuration that came with the model, to be written with new sizes beside it; None: none.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.
    """

    input_shapes: Mapping[str, Sequence[int]] | None = None
    data: Any = None
    samples: int | None = None
    batch_size: int | None = None
    images: ImageOptions | None = None
    outputs: Mapping[str, Any] | None = None
    cache: str | Path | None = None
    memory_limit: int | None = None
    providers: Sequence[str] | None = None
    threads: int | None = None
    seed: int = 0
    effort: str = "normal"
    labels: Any = None
    resize_io: Sequence[str] = ()
    cache_heads: bool = False
    model_config: str | Path | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        names = ("data", "samples", "batch_size", "images", "seed", "resize_io", "cache_heads")
        values = {name: checked(name, getattr(self, name)) for name in names}
        check_needs("prune", values)
        checked("memory_limit", self.memory_limit)
        checked("effort", self.effort)


@dataclass(frozen=True, slots=True)
class Restriction:
    """A model that answers fewer questions than the user's, in the place of the original.

    Attributes:
        origin: analysis of the user's model.
        vocabulary: the tokens that are left.
    """

    origin: Analysis
    vocabulary: PlanVocabulary


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Context:
    """The arguments of a run; the same for all of its passes.

    Attributes:
        analysis: analysis of the original.
        source: the original: path, bytes or ModelProto.
        input_shapes: {input: shape} for dynamic inputs.
        calibration: the user's inputs; None without.
        seed: seed of all random numbers, 0 or more.
        cache: folder of statistics; None: not kept.
        memory_limit: bytes of activations to hold at a time; None: the default of each pass.
        device: device on which time is measured.
        stages: the clock and the progress bar.
        effort: bounds on the work.
        outputs: kinds of outputs that the user set, {output: (kind, axis or None)}.
        labels: labels of the inputs, an array or its file; None without.
        known: outputs of the original that were computed so far.
        importances: importances of positions in the original that were computed so far.
        restriction: the original that this one was made of before the first pass; None where it is the user's model.
        rotations: how ``analysis`` was made from the file of the original; empty: it is the file's.
    """

    analysis: Analysis
    source: ModelSource
    input_shapes: Mapping[str, Sequence[int]] | None = None
    calibration: Calibration | None = None
    seed: int = 0
    cache: Path | None = None
    memory_limit: int | None = None
    device: Device = field(default_factory=device)
    stages: Stages = field(default_factory=Stages)
    outputs: Outputs | None = None
    effort: Effort = EFFORTS["normal"]
    labels: Any = None
    known: KnownOutputs = field(default_factory=KnownOutputs)
    importances: KnownImportances = field(default_factory=KnownImportances)
    restriction: Restriction | None = None
    model_config: ModelConfig | None = None
    rotations: tuple[PlanRotation, ...] = ()

    @property
    def origin(self) -> Analysis:
        """The analysis of the user's model."""
        return self.analysis if self.restriction is None else self.restriction.origin

    def __repr__(self) -> str:
        data = "no data" if self.calibration is None else "data"
        return f"<Context: {self.analysis!r}, {data}, seed {self.seed}>"

    @classmethod
    def of(
        cls,
        model: ModelSource,
        run: RunSettings | None = None,
        *,
        approximate: bool = False,
        resizing: Resizing | None = None,
    ) -> Context:
        """Analyse a model for a run.

        Args:
            model: path, bytes or ModelProto.
            run: settings of the run; None: the defaults.
            approximate: whether channels may be removed through normalisations.
            resizing: inputs and outputs that may lose channels; None: as the settings have it.

        Raises:
            UsageError: an argument is invalid. ModelError: the model cannot be read.
        """
        run = run or RunSettings()
        execution, stages = device(run.providers, run.threads), Stages(run.progress)
        with stages.stage("analyze"), explain_failures(model):
            resizing = resizing or Resizing(tuple(run.resize_io), run.cache_heads)
            analysis = Analysis(model, input_shapes=run.input_shapes, approximate=approximate, resizing=resizing)
        config = None if run.model_config is None else ModelConfig(run.model_config)
        if config is not None:
            config.check(analysis)
        data = run.data, analysis, run.samples, run.batch_size, run.images
        return cls(
            analysis,
            model,
            run.input_shapes,
            calibration=None if run.data is None else Calibration(*data),
            seed=run.seed,
            cache=None if run.cache is None else Path(run.cache),
            memory_limit=run.memory_limit,
            known=KnownOutputs.within(run.memory_limit),
            device=execution,
            stages=stages,
            outputs=checked("outputs", run.outputs),
            effort=EFFORTS[run.effort],
            labels=run.labels,
            model_config=config,
        )

    def inputs(self) -> Samples:
        """Open the user's inputs.

        Raises:
            UsageError: there are no inputs, or they do not fit.
        """
        if self.calibration is None:
            raise UsageError(
                f"this needs calibration data, but {argument('data')} is missing",
                hint=f"Give it with {argument('data')}: arrays, images or anything that yields inputs.",
            )
        return self.calibration.open()

    def for_trial(self, samples: int | None = None, progress: Progress | None = None) -> Context:
        """Return the context of a trial, with a clock of its own whose progress is not shown.

        Args:
            samples: largest number of samples to use.
            progress: callback for the stages of the trial.
        """
        calibration = self.calibration
        if calibration is not None and samples is not None:
            calibration = calibration.first(samples)
        stages = Stages(progress, logged=False, is_trial=True)
        stages.left_out = self.stages.left_out
        return replace(self, calibration=calibration, stages=stages)

    def with_original(self, analysis: Analysis, rotations: Sequence[PlanRotation] = ()) -> Context:
        """Return the context with a model that computes the same in place of the original.

        Args:
            analysis: analysis of the model.
            rotations: how it was made.
        """
        source = assemble(analysis.loaded.proto, analysis.loaded.weights)
        return replace(self, analysis=analysis, source=source, rotations=tuple(rotations))

    def stage(self, name: str) -> Any:
        """Time a block as a stage of that name."""
        return self.stages.stage(name)

    def tell(self, name: str, fraction: float) -> None:
        """Report the progress of a stage, 0 to 1."""
        self.stages.tell(name, fraction)


# -- models, facts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HoldOut:
    """Inputs held out of the fit of a recovery, to compare the result on.

    Attributes:
        inputs: batches.
        name: their name in reports.
    """

    inputs: Sequence[Feed]
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model in a pipeline. A pass returns another one, and never changes this.

    Attributes:
        proto: the model without the data of its initializers.
        weights: its weights, by name.
        analysis: analysis of the model before pruning.
        removed: mask over the removed atoms of ``analysis`` [atoms], bool; None where no pass removed any.
        plan: the removed channels, and the factorized layers with their ranks.
        proof: whether the removal is exact; None where no pass has asked yet.
        refused: indices of the probes of ``analysis`` at whose sizes the proof found that the model does not run.
        as_pruned: the model that ``proof`` is about, before weights were changed for another reason; None: this one.
        hold_out: inputs to compare the result on, where a recovery was fitted to the others.
        files: files from which weights are read, besides the original's.
        locked: names of weights whose zeros stay 0 where other passes change them.
        sparsified: weights that a sparsification looked at, and their zeros.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, Weight]
    analysis: Analysis
    removed: Mask | None = None
    plan: Plan = field(default_factory=Plan)
    proof: Exactness | None = None
    refused: frozenset[int] = frozenset()
    as_pruned: ModelParts | None = None
    hold_out: HoldOut | None = None
    files: tuple[Path, ...] = ()
    locked: frozenset[str] = frozenset()
    sparsified: tuple[SparsifiedLayer, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    @classmethod
    def of(cls, analysis: Analysis) -> Model:
        """Return the model that was analysed, unchanged."""
        return cls(analysis.loaded.proto, analysis.loaded.weights, analysis)

    def __repr__(self) -> str:
        nodes, parameters = len(self.proto.graph.node), self.num_parameters
        steps = ["shortened"] * self.is_shortened + ["pruned"] * self.is_pruned + ["factorized"] * self.is_factorized
        steps += ["sparse"] * bool(self.locked)
        return f"<Model: {nodes} nodes, {parameters:,} parameters{''.join(', ' + step for step in steps)}>"

    def with_weights(self, weights: Mapping[str, Weight]) -> Model:
        """Return the model with other values in some weights.

        Args:
            weights: by name; all others stay.
        """
        return replace(self, weights={**self.weights, **weights})

    def with_parts(self, parts: ModelParts, **changes: Any) -> Model:
        """Return the model with another graph and all of its weights.

        Args:
            parts: graph and weights.
            changes: changes of other fields, by name.
        """
        return replace(self, proto=parts[0], weights=parts[1], **changes)

    @property
    def parts(self) -> ModelParts:
        """Graph and weights."""
        return self.proto, self.weights

    @property
    def num_parameters(self) -> int:
        """The number of elements of all weights."""
        return sum(int(np.prod(weight.shape)) for weight in self.weights.values())

    @property
    def is_pruned(self) -> bool:
        """Whether any channel was removed."""
        return self.removed is not None and bool(self.removed.any())

    @property
    def is_shortened(self) -> bool:
        """Whether any residual branch, or any expert, was removed."""
        return bool(self.plan.branches or self.plan.experts)

    @property
    def is_reduced(self) -> bool:
        """Whether anything was taken from the model that a recovery can make up for."""
        return self.is_pruned or self.is_shortened or self.is_factorized or bool(self.locked)

    @property
    def is_factorized(self) -> bool:
        """Whether any layer was factorized."""
        return bool(self.plan.factorized)

    @property
    def is_unproved(self) -> bool:
        """Whether there is a removal whose exactness was not checked."""
        return self.removed is not None and self.proof is None

    @property
    def is_analyzed(self) -> bool:
        """Whether ``analysis`` is the analysis of this very model."""
        loaded = self.analysis.loaded
        return self.proto is loaded.proto and all(loaded.weights.get(n) is w for n, w in self.weights.items())

    @property
    def removal(self) -> Mask:
        """The mask over the removed atoms of ``analysis`` [atoms], bool; all False where none was removed."""
        return np.zeros(self.analysis.units.component.size, bool) if self.removed is None else self.removed


@dataclass(frozen=True, slots=True, repr=False)
class PassResult:
    """The result of a pass.

    Attributes:
        model: the model for the next pass.
        facts: facts of the pass, see :data:`onnxprune.report.facts.Fact`.
        changed: whether ``model`` differs from the input of the pass.
        original: analysis of a model that computes the same as the original and takes its place for later passes;
            None: the original stays.
        rotations: rotations that produced it, for the plan.
    """

    model: Model
    facts: Sequence[Fact] = ()
    changed: bool = True
    original: Analysis | None = None
    rotations: tuple[PlanRotation, ...] = ()

    def __repr__(self) -> str:
        return f"<PassResult: {self.model!r}, {len(self.facts)} facts{', changed' if self.changed else ''}>"


# -- passes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Requirement:
    """A requirement of a pass.

    Attributes:
        what: completes "<the pass> needs ...".
        holds: function that returns whether it is met.
        hint: the next step for the user.
        of_context: whether it depends on the context alone, and is checked before the first pass runs.
    """

    what: str
    holds: Callable[[Context, Model], bool]
    hint: str = ""
    of_context: bool = False


@dataclass(frozen=True, slots=True)
class Guarantee:
    """A guarantee of a pass.

    Attributes:
        what: completes "<the pass> promises ...".
        holds: function of the models before and after the pass that returns whether it is kept.
    """

    what: str
    holds: Callable[[Model, Model], bool]


UNPRUNED = Requirement(
    "a model without removed channels",
    lambda _, model: model.removed is None,
    "Prune once: give one pass a plan or several ratios (layers=...).",
)
SAME_MODEL = Guarantee("the same model", lambda before, after: before.parts == after.parts)
SAME_REMOVAL = Guarantee("the same channels", lambda before, after: before.removed is after.removed)


class Pass(ABC):
    """A stage of a pipeline: a call from model to model.

    Attributes:
        requires: requirements, checked before the call.
        ensures: guarantees, checked after the call.
        approximate: whether channels may be removed through normalisations, which the analysis depends on.
    """

    requires: Sequence[Requirement] = ()
    ensures: Sequence[Guarantee] = ()
    approximate: bool = False

    @property
    def resized(self) -> Sequence[str]:
        """Inputs and outputs that a plan of the pass removes channels from."""
        return ()

    @abstractmethod
    def __call__(self, context: Context, model: Model) -> PassResult:
        """Run the stage, or raise an OnnxpruneError."""

    @property
    def label(self) -> str:
        """The name of the pass in messages."""
        return f"pass {type(self).__name__}"

    def __repr__(self) -> str:
        return f"<{self.label}>"


@runtime_checkable
class Restricting(Protocol):
    """A pass that puts another model in the place of the original before the first pass, and ends the run."""

    def restrict(self, context: Context) -> tuple[Context, Sequence[Fact]]:
        """Return the run on the other model, and facts."""

    def finish(self, context: Context, model: Model) -> Model:
        """Return the final model as the user gets it."""


class FunctionPass(Pass):
    """A function of context and model as a pass.

    Args:
        function: function that returns a :class:`PassResult`; may have attributes ``requires`` and ``ensures``.
    """

    def __init__(self, function: Callable[[Context, Model], PassResult]) -> None:
        self._function = function
        self.requires, self.ensures = getattr(function, "requires", ()), getattr(function, "ensures", ())

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Call the function."""
        return self._function(context, model)

    @property
    def label(self) -> str:
        """The function's name."""
        return f"pass {getattr(self._function, '__name__', type(self._function).__name__)}"


def as_pass(stage: Any) -> Pass:
    """Return a pass made from a pass, a function of context and model, or a registered name.

    Raises:
        UsageError: no pass has such a name, a class stands where an instance is meant, or a callable takes other
            arguments, such as the state that passes once changed.
    """
    if isinstance(stage, str):
        return get(stage)
    if isinstance(stage, Pass):
        return stage
    name = getattr(stage, "__name__", type(stage).__name__)
    if isinstance(stage, type):
        raise UsageError(f"Pass {name} is a class, expected an instance.", hint=f"Write {name}().")
    if not callable(stage):
        raise UsageError(f"{stage!r} is not a pass.", hint=_CONTRACT)
    count = _num_arguments(stage)
    if count == 1:
        raise UsageError(
            f"Pass {name} follows the old contract: it takes one argument, the state of a run.",
            hint=f"{_CONTRACT} In place of state.weights[name] = w, return model.with_weights({{name: w}}); facts take "
            "the place of state.report; context.analysis that of state.analyzed().",
        )
    if count not in (2, None):
        raise UsageError(f"Pass {name} takes {count} arguments.", hint=_CONTRACT)
    return FunctionPass(stage)


_CONTRACT = "A pass takes (context, model) and returns PassResult(model, facts); see CONTRIBUTING, 'Add a pass'."


def _num_arguments(function: Callable[..., Any]) -> int | None:
    """Return the number of positional arguments that a callable needs; None where it is any number, or unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


T = TypeVar("T", bound="Pass | type[Pass] | Callable[[Context, Model], PassResult]")
ENTRY_POINT = "onnxprune.passes"
_BUILT_IN: dict[str, Any] = {
    "depth": "onnxprune.passes.depth:Depth",
    "prune": "onnxprune.passes.prune:Prune",
    "factorize": "onnxprune.passes.factorize:Factorize",
    "exact": "onnxprune.passes.exact:Exact",
    "experts": "onnxprune.passes.experts:Experts",
    "finetune": "onnxprune.passes.finetune:Finetune",
    "flush": "onnxprune.passes.flush:Flush",
    "quantize": "onnxprune.passes.quantize:Quantize",
    "recover": "onnxprune.passes.recover:Recover",
    "regularize": "onnxprune.passes.regularize:Regularize",
    "remove-dead": "onnxprune.passes.remove_dead:RemoveDead",
    "rotate": "onnxprune.passes.rotate:Rotate",
    "sparsify": "onnxprune.passes.sparsify:Sparsify",
    "validate": "onnxprune.passes.validate:Validate",
    "vocabulary": "onnxprune.passes.vocabulary:Vocabulary",
}
_named: Named[Any] = Named("pass", ENTRY_POINT, _BUILT_IN)


def register(name: str) -> Callable[[T], T]:
    """Register a pass under a name, as a decorator.

    Args:
        name: for pipelines. The decorator takes a function of context and model, or a class made without arguments.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(stage: T) -> T:
        _named.add(name, stage)
        return stage

    return decorate


def unregister(name: str) -> None:
    """Unregister a pass, so that another can take its name."""
    _named.remove(name)


def get(name: str) -> Pass:
    """Return the pass of that name.

    Raises:
        UsageError: there is no such pass; the nearest name is suggested.
    """
    stage = _named.get(name)
    return as_pass(stage() if isinstance(stage, type) else stage)


def names() -> list[str]:
    """Return the names of all passes, sorted."""
    return _named.names()


# -- pipelines ---------------------------------------------------------------------------------------------------------


class Pipeline:
    """Passes in order; ``run`` gives the result, the input is never changed.

    Args:
        passes: such as ``passes.Prune(...)``, ``passes.Validate()``, functions of (context, model), or the names of
            registered ones.

    Raises:
        UsageError: no pass has such a name, or one is no pass.
    """

    def __init__(self, passes: Sequence[Pass | Callable[[Context, Model], PassResult] | str]) -> None:
        if isinstance(passes, (str, type)) or not isinstance(passes, Iterable):
            hint = "Give a list of passes, such as [Prune(ratio=0.3), Validate()]."
            raise UsageError(f"A pipeline is a list of passes, but {passes!r} is given.", hint=hint)
        self.passes = [as_pass(stage) for stage in passes]

    def __repr__(self) -> str:
        return f"<Pipeline: {' -> '.join(stage.label for stage in self.passes)}>"

    @with_custom_ops
    def run(
        self,
        model: ModelSource,
        *,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        data: Any = None,
        samples: int | None = None,
        batch_size: int | None = None,
        images: ImageOptions | None = None,
        cache: str | Path | None = None,
        memory_limit: int | None = None,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        seed: int = 0,
        outputs: Mapping[str, Any] | None = None,
        custom_op_libraries: Sequence[str | Path] = (),
        effort: str = "normal",
        labels: Any = None,
        resize_io: Sequence[str] = (),
        cache_heads: bool = False,
        progress: Progress | None = None,
    ) -> Result:
        """Run every pass on ``model``.

        Args:
            model: path, bytes or ModelProto.
            input_shapes: {input: shape} for dynamic inputs.
            data: inputs without labels, see ``onnxprune.prune``.
            samples: number of samples to use, 1 or more; None: the default of each pass.
            batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
            images: conversion of images to arrays.
            cache: folder of captured statistics, from which an interrupted or repeated run continues.
            memory_limit: bytes of activations that passes hold in memory at a time, 1,000,000 or more; None: 512 MiB.
            providers: onnxruntime providers for measurements of time; None: the CPU.
            threads: threads inside an operator for measurements of time, 1 or more; None: all processors.
            seed: seed of all random numbers, 0 or more.
            outputs: {output: kind}, such as ``"classes:1"``, where fidelity should not decide by itself.
            custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime.
            effort: bounds on the work: ``quick``, ``normal`` or ``thorough``.
            labels: labels of ``data``, classes or values, or their .npy or .npz file, for passes that learn from them.
            resize_io: globs over inputs and outputs of the model that may lose channels; empty: none.
            cache_heads: whether the inputs and outputs of all caches may lose channels.
            progress: callback, called with (stage, fraction), fraction in [0, 1].

        Raises:
            OnnxpruneError: bad input, a model that cannot be processed, or a check that failed.
        """
        return self.execute(model, record_of(RunSettings, locals()))

    def execute(self, model: ModelSource, run: RunSettings) -> Result:
        """Run every pass on ``model``, with settings as a record; see :meth:`run`."""
        planned = frozenset(name for stage in self.passes for name in stage.resized)
        context = Context.of(
            model,
            run,
            approximate=any(stage.approximate for stage in self.passes),
            resizing=Resizing(names=planned) if planned else None,
        )
        facts: list[Fact] = [Sizes(bytes_before=context.analysis.loaded.size)]
        restricting = [stage for stage in self.passes if isinstance(stage, Restricting)]
        for restriction in restricting:
            context, facts_of_restriction = restriction.restrict(context)
            facts += facts_of_restriction
        current = Model.of(context.analysis)
        for stage in self.passes:
            _require(stage, context, current, of_context=True)
        original_context = context
        for stage in self.passes:
            result = apply(stage, context, current)
            current = result.model
            facts += result.facts
            if result.original is not None:
                context = context.with_original(result.original, result.rotations)
        for restriction in restricting:
            current = restriction.finish(context, current)
        return Result(replace(original_context, rotations=context.rotations), current, facts)


def apply(stage: Pass, context: Context, model: Model) -> PassResult:
    """Call one pass, and check its requirements and guarantees.

    Raises:
        PreconditionError: a requirement is not met: the order of passes, or the call, is wrong.
        PostconditionError: a guarantee is not kept: the pass is wrong.
        OnnxpruneError: any error of the pass.
    """
    _require(stage, context, model, of_context=False)
    try:
        with explain_failures(context.analysis.loaded, context.analysis):
            result = stage(context, model)
    except Exception as error:
        if not isinstance(error, OnnxpruneError):
            error.add_note(f"in {stage.label}")
        raise
    return_freed_memory()
    if not isinstance(result, PassResult):
        raise PostconditionError(f"{_first(stage)} returned {type(result).__name__}.", hint=_CONTRACT)
    if not isinstance(result.model, Model):
        raise PostconditionError(
            f"{_first(stage)} returned {type(result.model).__name__} as the model.", hint=_CONTRACT
        )
    if not result.changed and result.model is not model:
        raise PostconditionError(f"{_first(stage)} returned another model with changed=False.")
    if result.changed:
        _check_weights(stage, model, result.model)
    for promise in stage.ensures:
        if not promise.holds(model, result.model):
            raise PostconditionError(f"{_first(stage)} ensures {promise.what}, but returned another.")
    return result


def _require(stage: Pass, context: Context, model: Model, *, of_context: bool) -> None:
    for need in stage.requires:
        if need.of_context == of_context and not need.holds(context, model):
            raise PreconditionError(f"{_first(stage)} needs {need.what}.", hint=need.hint)


def _check_weights(stage: Pass, before: Model, after: Model) -> None:
    """Check that every new weight has a place in the graph.

    Raises:
        PostconditionError: a weight has none.
    """
    new_names = after.weights.keys() - before.weights.keys()
    initializers = {tensor.name for tensor in after.proto.graph.initializer} if new_names else set()
    undeclared = next((name for name in sorted(new_names) if name not in initializers), None)
    if undeclared is not None:
        raise PostconditionError(
            f"{_first(stage)} returned a weight {undeclared!r} without an initializer in the model.",
            hint="Add the initializer to a copy of model.proto as well, or use the name of an existing initializer.",
        )


def _first(stage: Pass) -> str:
    """Capitalize the label for the beginning of a sentence."""
    return stage.label[:1].upper() + stage.label[1:]


class Result:
    """The result of a run: ``model``, ``plan``, ``report``, and ``save``.

    Attributes:
        context: context of the run.
        final: the model behind the last pass.
        facts: facts of all passes, in order.
        plan: the removed channels, and the factorized layers with their ranks.
        report: sizes, exactness, fidelity, speed, groups and barriers: the sum of the facts.
        model_config: configuration of the model with its new sizes; None where none was given.
        config_file: where ``save`` wrote it.
    """

    config_file: Path | None = None

    def __init__(self, context: Context, final: Model, facts: Sequence[Fact] = ()) -> None:
        self.context, self.final = context, final
        original = context.origin
        sizes = Sizes(params_before=original.parameters, params_after=final.num_parameters)
        if context.restriction is not None:
            sizes = replace(sizes, macs_before=sum(layer.macs_before for layer in original.layers))
        self.facts: tuple[Fact, ...] = (*facts, sizes, context.stages.timings())
        self.plan: Plan = final.plan
        if context.restriction is not None:
            digest = final.plan.model_sha256 or original.loaded.sha256
            self.plan = replace(final.plan, vocabulary=context.restriction.vocabulary, model_sha256=digest)
        if context.rotations:
            digest = original.loaded.sha256
            self.plan = replace(self.plan, rotations=list(context.rotations), model_sha256=digest)
            self.facts = (*self.facts, *rotated(self.plan))
        self.model_config: dict[str, Any] | None = None
        if context.model_config is not None:
            self.model_config, notes = self._configured(context.model_config)
            self.facts = (*self.facts, *map(Remark, notes))
        self.report: Report = report_of(self.facts, model=str(original.loaded.path or ""))
        self.report.network = original.network
        self._assembled: onnx.ModelProto | None = None

    def __repr__(self) -> str:
        totals = self.report.totals
        return f"<Result: {totals.params_after:,} of {totals.params_before:,} parameters, {self.final!r}>"

    def _configured(self, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
        """Return the configuration of the final model, and remarks."""
        analysis = self.final.analysis
        graph = Graph.of(self.final.proto, self.final.weights)
        attributes = {node.outputs[0]: node.attrs for node in graph.nodes if node.outputs}
        after = Survivors(analysis.table, self.final.removal)
        return config.rewritten(self.context.analysis, analysis, after.shape, attributes)

    @property
    def model(self) -> onnx.ModelProto:
        """The final model in memory, assembled on first access. For large models prefer ``save``."""
        if self._assembled is None:
            self._assembled = assemble(*self.final.parts)
        return self._assembled

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        """Return the page of the report, which a notebook shows."""
        return self.report._repr_html_()

    def graphsurgeon(self) -> Any:
        """Return the final model as an onnx_graphsurgeon.Graph, to go on with in a script that edits graphs.

        The graph carries the parts that it has no place for (metadata, domain, annotations), see
        :func:`onnxprune.io.interchange.to_graphsurgeon`.

        Example:
            >>> graph = onnxprune.prune(graph, ratio=0.3).graphsurgeon()  # doctest: +SKIP
        """
        return to_graphsurgeon(self.model)

    def onnx_ir(self) -> Any:
        """Return the final model as an onnx_ir.Model.

        Raises:
            UsageError: onnx-ir is not installed; it comes with the extra ``onnxprune[onnx-ir]``.
        """
        return to_onnx_ir(self.model)

    def save(self, path: str | Path, *, plan: str | Path | None = None) -> int:
        """Write the final model; weights are streamed, an existing file is replaced at once or not at all.

        Args:
            path: path of the model file.
            plan: path of the plan, which is replaced together with the model; None: no plan is written.

        Returns:
            number of bytes of the model written, external data included.

        Raises:
            UsageError: the target is the input, or cannot be written.
        """
        loaded = self.context.origin.loaded
        check_output(path, loaded.path, [*loaded.external, *self.final.files])
        companions = {Path(plan): encode_text(self.plan.text())} if plan is not None else {}
        if self.model_config is not None and self.context.model_config is not None:
            self.config_file = target_of(self.context.model_config.path, Path(path))
            companions[self.config_file] = encode_text(json.dumps(self.model_config, indent=2) + "\n")
        if self.plan.vocabulary is not None:
            names = append_suffix(Path(path), ".vocabulary.json")
            companions[names] = encode_text(map_text(self.plan.vocabulary))
        external = bool(loaded.external)
        size = save(*self.final.parts, path, prefer_external=external, companions=companions)
        if self.report.vocabulary is not None:
            self.report.vocabulary.map = str(names)
        self.report.totals.bytes_after = size
        self.report.output = str(path)
        return size
