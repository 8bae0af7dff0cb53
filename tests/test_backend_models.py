"""onnx's own node tests as models: pruned or refused with a typed error, never anything else."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from oracle import assert_exact_cut

import onnxprune as op

pytestmark = pytest.mark.lenient
EVERY = int(os.environ.get("ONNXPRUNE_BACKEND_EVERY", "7"))
"""One model of so many is tried; set it to 1 for all of them."""


def node_models() -> list[tuple[str, onnx.ModelProto]]:
    """A sample of the node tests, spread over all operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    return [(c.name, c.model) for c in sorted(cases, key=lambda c: c.name)[::EVERY] if c.model is not None]


def between_layers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same node behind layers that make its inputs' last axes, and in front of layers that read its outputs'."""
    rng = np.random.default_rng(0)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    nodes = list(graph.node)
    del graph.node[:]
    for declared in graph.input:
        dims = _float_dims(declared)
        if not dims or dims[-1] < 2:
            continue
        weight = rng.standard_normal((3, dims[-1])).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(weight, f"{declared.name}__made"))
        before = f"{declared.name}__in"
        graph.node.append(onnx.helper.make_node("MatMul", [before, f"{declared.name}__made"], [declared.name]))
        declared.CopyFrom(onnx.helper.make_tensor_value_info(before, onnx.TensorProto.FLOAT, [*dims[:-1], 3]))
    graph.node.extend(nodes)
    for declared in graph.output:
        dims = _float_dims(declared)
        if not dims or dims[-1] < 2:
            continue
        weight = rng.standard_normal((dims[-1], 2)).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(weight, f"{declared.name}__read"))
        after = f"{declared.name}__out"
        graph.node.append(onnx.helper.make_node("MatMul", [declared.name, f"{declared.name}__read"], [after]))
        declared.CopyFrom(onnx.helper.make_tensor_value_info(after, onnx.TensorProto.FLOAT, [*dims[:-1], 2]))
    return result


def _float_dims(declared: onnx.ValueInfoProto) -> list[int]:
    kind = declared.type.tensor_type
    dims = [d.dim_value for d in kind.shape.dim]
    return dims if kind.elem_type == onnx.TensorProto.FLOAT and all(dims) else []


def prune_or_refuse(name: str, model: onnx.ModelProto, *, validate: bool = False) -> str | None:
    """What went wrong: a wrong cut, or anything but a typed error."""
    try:
        op.prune(model, ratio=0.5, criterion="l2", validate=validate, latency=False)
    except op.ValidationError as error:
        return f"{name}: {error}"
    except op.OnnxpruneError:
        return None
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return None


def test_node_models_are_pruned_or_refused() -> None:
    """As they are, and between layers: then every rule sees labels, in the oddest forms there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = node_models()
        assert len(models) > 100
        failures = [prune_or_refuse(n, m) for n, m in models]
        layered = [(n, between_layers(m)) for n, m in models]
        failures += [prune_or_refuse(f"{n} between layers", m, validate=True) for n, m in layered]
    assert not [f for f in failures if f]


def converted() -> list[Path]:
    """Models that ship with onnx as files: converted layers with weights."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    return sorted(folder.glob("pytorch-*/*/model.onnx")) + sorted(folder.glob("simple/*/model.onnx"))


@pytest.mark.skipif(not converted(), reason="this onnx ships no test data")
@pytest.mark.parametrize("part", range(4))
def test_converted_models_are_cut_exactly_or_refused(part: int) -> None:
    for path in converted()[part::8]:
        model = onnx.load(path)
        try:
            assert_exact_cut(model, expect_cut=None, tolerance=1e-4)
        except op.OnnxpruneError as error:
            assert error.exit_code != 4, f"{path.parent.name}: {error}"
