"""A pipeline runs passes over one model, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from onnxprune.errors import UsageError
from onnxprune.passes.registry import get
from onnxprune.passes.state import Pass, Progress, Result, State
from onnxprune.runtime.device import device
from onnxprune.runtime.images import ImageOptions

# Bytes of activations below which nothing works well.
LEAST_MEMORY = 1_000_000


class Pipeline:
    """Passes in order; ``run`` gives the result, the input is never changed.

    Args:
        passes: callables over :class:`State`, such as ``passes.Prune(...)``, ``passes.Validate()`` or your own, or the
            names of registered ones.

    Raises:
        UsageError: no pass has such a name.
    """

    def __init__(self, passes: Sequence[Pass | str]) -> None:
        self.passes = [get(stage) if isinstance(stage, str) else stage for stage in passes]

    def run(
        self,
        model: str | Path | bytes | onnx.ModelProto,
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
        progress: Progress | None = None,
    ) -> Result:
        """Run every pass on ``model``.

        Args:
            model: path, bytes or ModelProto. input_shapes: {input: shape} for dynamic inputs.
            data, samples, batch_size, images: the user's inputs, see ``onnxprune.prune``. seed: of everything random.
            cache: folder that keeps captured statistics, so that an interrupted or repeated run need not start anew.
            memory_limit: bytes of activations that passes may hold in memory at a time, 1,000,000 or more.
            providers, threads: of onnxruntime where time is measured: the CPU, all processors.
            progress: called with (stage, fraction).

        Raises:
            OnnxpruneError: bad input, a model that cannot be processed, or a check that failed.
        """
        state = start(
            model,
            input_shapes=input_shapes,
            data=data,
            samples=samples,
            batch_size=batch_size,
            images=images,
            cache=cache,
            memory_limit=memory_limit,
            providers=providers,
            threads=threads,
            seed=seed,
            progress=progress,
        )
        for stage in self.passes:
            stage(state)
        if state.analysis is None:
            state.analyzed()
        return Result(state)


def start(
    model: str | Path | bytes | onnx.ModelProto,
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
    progress: Progress | None = None,
) -> State:
    """A run that nothing was done in yet; the arguments are those of :meth:`Pipeline.run`.

    Raises:
        UsageError: one makes no sense.
    """
    state = State(model, input_shapes, data, seed, progress, samples=samples, batch_size=batch_size, images=images)
    state.cache = Path(cache) if cache is not None else None
    if memory_limit is not None and memory_limit < LEAST_MEMORY:
        raise UsageError(f"memory_limit {memory_limit} is too small", hint=f"Allowed: {LEAST_MEMORY} bytes or more.")
    state.memory_limit = memory_limit
    state.device = device(providers, threads)
    return state
