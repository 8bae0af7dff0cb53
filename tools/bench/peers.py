"""Other pruners on the same models: onnxsim run here, torch-pruning's results read from a table."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from bench.files import parameters
from bench.survivors import Unclear, masked, worst_difference

CLOSE = 1e-3  # relative; what rounding makes of random weights through deep models stays under it


def have_onnxsim() -> bool:
    """Whether onnxsim with its structured pruning is installed."""
    try:
        import onnxsim.pruning  # noqa: F401
    except ImportError:
        return False
    return True


def onnxsim_version() -> str:
    from importlib.metadata import version

    return version("onnxsim")


def onnxsim_cut(model: onnx.ModelProto, ratio: float, feed: dict[str, Any]) -> dict[str, Any]:
    """Simplify, then prune channels and attention heads; shares are of the simplified model's parameters.

    ``exact`` is True or False where the survivors can be told from their values, else None with a ``note``; ``runs``
    says that outputs have the original's shapes.
    """
    import onnxsim
    from onnxsim import pruning

    start = time.perf_counter()
    simple, _ = onnxsim.simplify(model)
    middle = time.perf_counter()
    cut = pruning.apply_structured_pruning(simple, sparsity=ratio)
    cut = pruning.apply_attention_head_pruning(cut, sparsity=ratio)
    record: dict[str, Any] = {
        "removed": round(1 - parameters(cut) / max(1, parameters(simple)), 4),
        "seconds": {"simplify": round(middle - start, 3), "cut": round(time.perf_counter() - middle, 3)},
    }
    before, after = run(simple, feed), run(cut, feed)
    record["runs"] = [getattr(x, "shape", None) for x in before] == [getattr(x, "shape", None) for x in after]
    try:
        record["error"] = worst_difference(run(masked(simple, cut), feed), after)
        record["exact"] = record["error"] <= CLOSE
    except Unclear as why:
        record["exact"], record["note"] = None, str(why)
    return record


def run(model: onnx.ModelProto, feed: dict[str, Any]) -> list[Any]:
    """Outputs in onnxruntime, without its graph optimisations, which would change rounding."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    outputs: list[Any] = session.run(None, {k: v for k, v in feed.items() if k in names})
    return outputs


def torch_pruning_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results by model, without the exporter's suffix.

    Args:
        path: a csv with the columns model, status (ok, or what went wrong) and share_of_parameters_removed.
    """
    with path.open(newline="") as file:
        return {
            row["model"]: {
                "status": row["status"],
                "removed": float(row["share_of_parameters_removed"] or 0),
                "exact": row["status"] == "ok",
            }
            for row in csv.DictReader(file)
        }
