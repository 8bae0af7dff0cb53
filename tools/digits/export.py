"""From a trained network to a clean ONNX file: dynamic batch, BatchNorm kept, no trace of the machine."""

from __future__ import annotations

import io
import logging
import warnings

import onnx
import torch
from onnx import GraphProto, ModelProto
from torch import nn

INPUT, OUTPUT, BATCH_DIM = "input", "logits", "batch"


def export(model: nn.Module, *, opset: int, dynamo: bool) -> ModelProto:
    """Export `model` with the named exporter of torch. Raises onnx.checker.ValidationError if it comes out wrong."""
    example = torch.zeros(2, 1, 8, 8)
    # Said on every export and not about these networks: torchvision is not installed, the tracing exporter is the older
    # one, a recurrent layer may fix the batch size (make_models.py runs two sizes and compares).
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proto = _by_capture(model, example, opset) if dynamo else _by_tracing(model, example, opset)
    strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _by_tracing(model: nn.Module, example: torch.Tensor, opset: int) -> ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        model,
        (example,),
        buffer,
        # In its own evaluation mode the exporter folds BatchNorm into the convolution before it;
        # PRESERVE takes the mode from the network, which is evaluation too, and leaves the node alone.
        training=torch.onnx.TrainingMode.PRESERVE,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_axes={INPUT: {0: BATCH_DIM}, OUTPUT: {0: BATCH_DIM}},
        opset_version=opset,
        dynamo=False,
    )
    return onnx.load_from_string(buffer.getvalue())


def _by_capture(model: nn.Module, example: torch.Tensor, opset: int) -> ModelProto:
    program = torch.onnx.export(
        model,
        (example,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim(BATCH_DIM)},),
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export(dynamo=True) returned no program")
    return program.model_proto


def strip(proto: ModelProto) -> None:
    """Remove doc strings and metadata, where exporters keep source paths and stack traces."""
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")
    _strip_graph(proto.graph)
    for function in proto.functions:
        function.ClearField("doc_string")
        function.ClearField("metadata_props")


def _strip_graph(graph: GraphProto) -> None:
    graph.ClearField("doc_string")
    graph.ClearField("metadata_props")
    for entries in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for entry in entries:
            entry.ClearField("doc_string")
            entry.ClearField("metadata_props")
