"""Models come in and go out as objects of onnx-graphsurgeon and onnx-ir, with all that the file held."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from build import Net
from onnx import helper

import onnxprune as op
from onnxprune.io.interchange import to_graphsurgeon, to_onnx, to_onnx_ir


def described() -> onnx.ModelProto:
    """Two convolutions with everything that may be said about a model beside its graph."""
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8))
    model = net.model(net.conv(x, 8, 4))
    model.domain, model.model_version, model.doc_string = "com.acme", 7, "a model"
    helper.set_model_props(model, {"license": "none", "classes": "cat,dog"})
    model.graph.node[0].doc_string = "the first layer"
    model.graph.input[0].doc_string = "an image"
    model.graph.initializer[0].doc_string = "a kernel"
    note = model.graph.quantization_annotation.add()
    note.tensor_name = model.graph.node[0].output[0]
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=model.graph.initializer[0].name)
    return model


def said(model: onnx.ModelProto) -> tuple[object, ...]:
    graph = model.graph
    return (
        *(model.domain, model.model_version, model.doc_string, model.producer_name, model.ir_version),
        sorted((p.key, p.value) for p in model.metadata_props),
        [(n.op_type, n.doc_string) for n in graph.node],
        [(i.name, i.doc_string) for i in graph.input],
        sorted((t.name, t.doc_string) for t in graph.initializer),
        [a.tensor_name for a in graph.quantization_annotation],
    )


def run(model: onnx.ModelProto) -> np.ndarray:
    x = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    return np.asarray(ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0])


def test_a_graph_of_graphsurgeon_keeps_what_it_has_no_place_for() -> None:
    pytest.importorskip("onnx_graphsurgeon")
    model = described()
    graph = to_graphsurgeon(model)
    again = to_onnx(graph)
    assert said(again) == said(model)
    assert np.array_equal(run(again), run(model))


def test_annotations_of_tensors_that_an_edit_removed_go_with_them() -> None:
    pytest.importorskip("onnx_graphsurgeon")
    model = described()
    graph = to_graphsurgeon(model)
    for node in graph.nodes:
        node.outputs[0].name += "_renamed"
    again = to_onnx(graph)
    assert not again.graph.quantization_annotation
    assert again.domain == "com.acme"


def test_a_cut_in_the_middle_of_a_script() -> None:
    surgeon = pytest.importorskip("onnx_graphsurgeon")
    model = described()
    by_proto = op.prune(model, ratio=0.5, latency=False).model
    result = op.prune(surgeon.import_onnx(model), ratio=0.5, latency=False)
    by_graph = result.model
    assert np.array_equal(run(surgeon.export_onnx(result.graphsurgeon())), run(by_proto))
    assert [list(t.dims) for t in by_graph.graph.initializer] == [list(t.dims) for t in by_proto.graph.initializer]
    assert np.array_equal(run(by_graph), run(by_proto))


def test_onnx_ir_models_come_in() -> None:
    ir = pytest.importorskip("onnx_ir")
    model = described()
    assert said(to_onnx(to_onnx_ir(model))) == said(model)
    result = op.prune(ir.from_proto(model), ratio=0.5, latency=False)
    small = result.model
    assert said(to_onnx(result.onnx_ir())) == said(small)
    assert np.array_equal(run(small), run(op.prune(model, ratio=0.5, latency=False).model))


def test_a_graph_that_cannot_be_exported_is_refused_by_name() -> None:
    surgeon = pytest.importorskip("onnx_graphsurgeon")
    graph = surgeon.import_onnx(described())
    graph.inputs[0].dtype = None
    with pytest.raises(op.ModelError, match="cannot export"):
        op.prune(graph)


@pytest.mark.parametrize("model", [None, 3, ["a.onnx"], {"path": "a.onnx"}])
def test_other_objects_are_refused(model: object) -> None:
    with pytest.raises(op.UsageError, match=f"not {type(model).__name__}"):
        op.prune(model)  # type: ignore[arg-type]
