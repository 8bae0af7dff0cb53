"""Model files for the benchmarks: plain ones, and skeletons whose weights a ``zoo.py`` beside them draws anew."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
# Quantized weights are parameters too; int32 and int64 are shapes, indices and biases in all but a few models.
COUNTED = FLOATS | {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


def find(folders: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """Models in the folders (``*.onnx``, ``*.onnx.gz``) whose name contains or, as a glob, matches a pattern."""
    files = sorted(f for folder in folders for end in ("*.onnx", "*.onnx.gz") for f in folder.glob(end))
    return [f for f in files if not patterns or any(p in name(f) or fnmatch.fnmatch(name(f), p) for p in patterns)]


def name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".onnx")


def family(path: Path) -> str:
    """``tv_resnet50__ts`` is of ``tv``; plain models are of their folder."""
    if path.name.endswith(".gz"):
        return name(path).split("_")[0]
    return path.parent.parent.name if path.parent.name == "models" else path.parent.name


def read(path: Path) -> onnx.ModelProto:
    """The model with its weights; a skeleton's are drawn by the ``zoo.py`` in its folder."""
    if not path.name.endswith(".gz"):
        return onnx.load(path)
    model: onnx.ModelProto = _filler(path.parent / "zoo.py").fill(path)
    return model


@cache
def _filler(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("zoo_filler", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{path}: no such file; skeletons (*.onnx.gz) need the script that fills them")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def constants(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Initializers, and the tensors of Constant nodes under the names of their outputs; not those of bodies."""
    yield from _constants(model.graph, bodies=False)


def _constants(graph: onnx.GraphProto, bodies: bool) -> Iterator[tuple[str, onnx.TensorProto]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], a.t) for a in node.attribute if a.name == "value")
        for attribute in node.attribute if bodies else ():
            if attribute.HasField("g"):
                yield from _constants(attribute.g, bodies)


def parameters(model: onnx.ModelProto) -> int:
    """Elements of float and 8-bit constants, those of bodies too."""
    found = (t for _, t in _constants(model.graph, bodies=True))
    return sum(int(np.prod(t.dims, dtype=np.int64)) for t in found if t.data_type in COUNTED)
