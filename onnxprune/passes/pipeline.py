"""A pipeline runs passes over one model, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from onnxprune.passes.registry import get
from onnxprune.passes.state import Pass, Progress, Result, State
from onnxprune.runtime.images import ImageOptions


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
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Result:
        """Run every pass on ``model``.

        Args:
            model: path, bytes or ModelProto. input_shapes: {input: shape} for dynamic inputs.
            data, samples, batch_size, images: the user's inputs, see ``onnxprune.prune``. seed: of everything random.
            cache: folder that keeps captured statistics, so that an interrupted or repeated run need not start anew.
            progress: called with (stage, fraction).

        Raises:
            OnnxpruneError: bad input, a model that cannot be processed, or a check that failed.
        """
        state = State(model, input_shapes, data, seed, progress, samples=samples, batch_size=batch_size, images=images)
        state.cache = Path(cache) if cache is not None else None
        for stage in self.passes:
            stage(state)
        if state.analysis is None:
            state.analyzed()
        return Result(state)
