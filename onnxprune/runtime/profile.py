"""Where the time goes: seconds per node of one model, from onnxruntime's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from onnxprune.errors import ModelError
from onnxprune.runtime.sessions import Feed, run

_SUFFIX = "_kernel_time"


@dataclass(frozen=True, slots=True)
class NodeTime:
    """Median seconds per run of one node as onnxruntime ran it: ``name`` and ``op`` after its own fusions."""

    name: str
    op: str
    seconds: float


def profile(model: Path | bytes, feeds: Sequence[Feed], *, runs: int = 7) -> list[NodeTime]:
    """Seconds of every node, with all graph optimisations and one thread; the first run is not counted.

    Args:
        model: path, or the serialised model. feeds: the first one is run. runs: how often.

    Raises:
        ModelError: the model does not load or run.
    """
    if not feeds:
        raise ModelError("a profile needs at least one input to run on")
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        source = model if isinstance(model, bytes) else str(model)
        try:
            session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise ModelError(f"onnxruntime cannot profile the model: {str(error).splitlines()[0]}") from error
        try:
            for _ in range(runs + 1):
                run(session, feeds[0])
        finally:
            written = Path(session.end_profiling())
        events = json.loads(written.read_text())
    return _per_node(events, runs)


def _per_node(events: Sequence[dict[str, object]], runs: int) -> list[NodeTime]:
    times: dict[tuple[str, str], list[float]] = {}
    for event in events:
        name, arguments = str(event.get("name", "")), event.get("args")
        if event.get("cat") == "Node" and name.endswith(_SUFFIX) and isinstance(arguments, dict):
            key = name.removesuffix(_SUFFIX), str(arguments.get("op_name", ""))
            times.setdefault(key, []).append(float(str(event["dur"])) * 1e-6)
    result = []
    for (name, op), found in times.items():
        # A node in a loop runs several times per run; names may repeat, too.
        each = max(1, len(found) // (runs + 1))
        usable = len(found) // each * each
        sums = np.asarray(found[:usable]).reshape(-1, each).sum(axis=1)
        result.append(NodeTime(name, op, float(np.median(sums[1:] if sums.size > 1 else sums))))
    return result
