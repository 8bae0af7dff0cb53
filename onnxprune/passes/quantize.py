"""Quantize: store weights in 8 bits, rounded so that the layers' outputs change least, and compute in 8 bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.propagate import infer_by_rule
from onnxprune.errors import BudgetError, ModelError, ValidationError, argument
from onnxprune.graph.inference import probe_at
from onnxprune.graph.view import Graph, Node
from onnxprune.io.constants import has_bare_initializers, placeholder
from onnxprune.io.read import load
from onnxprune.io.weights import ArrayWeight, FileWeight, Weight
from onnxprune.operators.contractions import Scale
from onnxprune.operators.registry import rule_of
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.grams import Reader, input_grams
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.recover import HAS_INPUTS, split_for
from onnxprune.passes.workspace import Workspace
from onnxprune.pipeline import SAME_REMOVAL, Context, HoldOut, Model, ModelParts, Pass, PassResult
from onnxprune.recovery.targets import Layer, RecoveryTarget, layer_target
from onnxprune.report.facts import Fact, Quantization, Remark
from onnxprune.runtime.capture import count
from onnxprune.runtime.quantizer import PREPARED, operators_for, quantize_file
from onnxprune.runtime.sessions import Feed, spread
from onnxprune.settings import checked, named_arguments
from onnxprune.sparsification.obs import inverse_factor, round_columns
from onnxprune.sparsification.scores import InputGram

TOP = 127
"""The largest code of a symmetric 8-bit weight; the smallest is its negative."""
_FIRST_OPSET = {"dynamic": 11, "qdq": 10}
"""Opsets that have the operators of each form."""
_PER_CHANNEL = 13
"""The first opset with a scale for each channel."""
_SMALL = 512
"""Weights with fewer elements save nothing as codes that are decoded when the model is loaded."""
_CODES = "_quantized"
"""End of the name of a weight's codes."""
_NEXT_TO_NOTHING = 1e-30
_RANGES = 512
"""Largest number of samples to find ranges of activations with."""


@named_arguments()
class Quantize(Pass):
    """Quantize a model to 8 bits with the quantizer of onnxruntime.

    BatchNormalization is folded into the convolution in front of it. With data, weights are rounded column by column so
    that the columns behind compensate its errors, and biases take up the remaining shift. Weights that
    no 8-bit kernel reads are stored as codes and decoded when the model is loaded. Zeros stay 0.

    Args:
        mode: ``dynamic`` (products of matrices in 8 bits, ranges of activations found at run time; convolutions are
            stored in 8 bits and computed in float) or ``qdq`` (everything around convolutions and products in 8 bits,
            ranges from the data, which are required).

    Raises:
        UsageError: another mode, or ``qdq`` without data.
        ModelError: the model is quantized already, its opset or IR version is too old, or it cannot be processed.
        BudgetError: there is no weight to quantize.
        ValidationError: a weight that was 0 is not 0 any more.
    """

    ensures = (SAME_REMOVAL,)

    def __init__(self, mode: str = "dynamic") -> None:
        self.mode = checked("quantize", mode)
        if mode == "qdq":
            self.requires = (HAS_INPUTS,)

    @property
    def label(self) -> str:
        """The pass with its mode."""
        return f"quantize {self.mode!r}"

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Round, correct and quantize."""
        per_channel = check_quantizable(model, self.mode)
        facts = Quantization(self.mode)
        split = None if context.calibration is None else split_for(context, model.analysis, "bias")
        with context.stage("quantize"):
            folded, facts.folded = fold_normalisations(model)
            work = _Work(context, model.analysis, Prepared(*folded))
            if not work.is_float:
                raise _nothing(model)
            facts.layers = len(work.layers)
            if split is not None:
                facts.samples = split.num_fit
                facts.rounded, facts.corrected = work.round(split.fit, per_channel)
            zeros = work.zeros()
            feeds = None if self.mode == "dynamic" or split is None else _first(split.fit)
            parts, facts.bytes_float = work.quantized(per_channel, feeds)
            facts.weights, facts.elements = _num_codes(parts)
            if not facts.weights:
                raise _nothing(model)
            _check_zeros(zeros, parts)
        notes: list[Fact] = [facts]
        if not per_channel:
            text = "no scale for each channel before opset 13: weights are rounded more coarsely"
            notes.append(Remark(f"quantized in opset {_opset(model.proto)}, which has {text}"))
        hold_out = model.hold_out
        if hold_out is None and split is not None:
            name = context.inputs().name
            outside = split.validation.inputs is not split.fit
            hold_out = HoldOut(split.validation.inputs, f"{name}, {'not' if outside else 'also'} used to quantize")
        return PassResult(model.with_parts(parts, as_pruned=model.as_pruned or model.parts, hold_out=hold_out), notes)


def quickly_quantized(context: Context, model: Model, mode: str) -> ModelParts:
    """Return a model as :class:`Quantize` stores it, weights rounded to the nearest code: of the same size and speed.

    Args:
        context: the run; ``qdq`` needs data.
        model: the float model.
        mode: ``dynamic`` or ``qdq``.

    Raises:
        ModelError, BudgetError: as of :class:`Quantize`.
    """
    per_channel = check_quantizable(model, mode)
    work = _Work(context, model.analysis, Prepared(*fold_normalisations(model)[0]))
    if not work.is_float:
        raise _nothing(model)
    feeds = None
    if context.calibration is not None:
        work.open_biases()
        first = itertools.islice(CalibrationBatches(context, model.analysis).batches(), 1)
        feeds = None if mode == "dynamic" else list(first)
    return work.quantized(per_channel, feeds)[0]


def coded_weights(parts: ModelParts) -> frozenset[str]:
    """Return the names that the weights of a quantized model had before they were codes."""
    return frozenset(name.removesuffix(_CODES) for name, w in parts[1].items() if _are_codes(w))


def check_quantizable(model: Model, mode: str) -> bool:
    """Return whether each channel can have a scale of its own.

    Raises:
        ModelError: the model is quantized already, or too old.
    """
    node = next((n for n in Graph.of(*model.parts).steps if _is_quantized(n)), None)
    if node is not None:
        raise ModelError(
            f"The model is quantized already: node {node.label!r} is a {node.op}.",
            hint=f"Drop {argument('quantize')}: the pruned model stays quantized.",
        )
    opset, first = _opset(model.proto), _FIRST_OPSET[mode]
    if opset < first or not has_bare_initializers(model.proto):
        what = f"opset {opset}" if opset < first else f"IR version {model.proto.ir_version}"
        least = f"opset {first}" if opset < first else "IR version 4"
        raise ModelError(
            f"{argument('quantize', mode)} needs {least} or newer, and the model has {what}.",
            hint="Convert it with onnx.version_converter.convert_version(model, 13), or export it again.",
        )
    return opset >= _PER_CHANNEL


def _is_quantized(node: Node) -> bool:
    rule = rule_of(node)
    return rule.quantized or rule.encodes or rule.decodes


def _opset(proto: onnx.ModelProto) -> int:
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)


def _first(feeds: Sequence[Feed]) -> list[Feed]:
    """Return as many of the calls as are enough to find ranges."""
    result: list[Feed] = []
    samples = 0
    for feed in feeds:
        result.append(feed)
        samples += count(feed)
        if samples >= _RANGES:
            break
    return result


# -- BatchNormalization ------------------------------------------------------------------------------------------------


def fold_normalisations(model: Model) -> tuple[ModelParts, int]:
    """Fold every BatchNormalization that alone reads a convolution or a product; return the model and their number.

    A quantized BatchNormalization rounds its output a second time, and its channels differ in range by orders of
    magnitude.
    """
    prepared = Prepared(*model.parts)
    graph, shape = prepared.graph, _shapes(model.analysis, prepared)
    folded: dict[str, str] = {}
    for node in graph.steps:
        scale = layer_target(graph, node, shape)
        front = graph.producer.get(node.inputs[0]) if node.inputs else None
        if isinstance(scale, str) or front is None or not _folds(graph, scale, front):
            continue
        target = layer_target(graph, front, shape)
        if isinstance(target, str) or isinstance(target.form, Scale):
            continue
        layer = Layer(graph, prepared.weights, target)
        matrix, bias = layer.read()
        gain, shift = (part.reshape(bias.shape) for part in Layer(graph, prepared.weights, scale).read())
        if layer.fixed_bias or prepared.weights[target.weight.root].dtype != np.float32:
            continue
        layer.write(matrix * gain[:, None, :], bias * gain + shift)
        folded[front.outputs[0]] = node.outputs[0]
    proto, weights = prepared.model()
    if not folded:
        return model.parts, 0
    _remove_nodes(proto, folded)
    read = {name for n in proto.graph.node for name in n.input} | {o.name for o in proto.graph.output}
    names = [t.name for t in proto.graph.initializer if t.name in read or t.name not in weights]
    tensors = [t for t in proto.graph.initializer if t.name in set(names)]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(tensors)
    return (proto, {name: weight for name, weight in weights.items() if name in set(names)}), len(folded)


def _folds(graph: Graph, scale: RecoveryTarget, front: Node) -> bool:
    """Return whether a normalisation has one output, alone reads a layer, and both lie in the main graph."""
    node, name = scale.node, front.outputs[0]
    if not isinstance(scale.form, Scale) or len([o for o in node.outputs if o]) > 1 or node.inputs[0] != name:
        return False
    if not rule_of(front).weights or graph.conditions(node.index) != graph.conditions(front.index):
        return False
    return len(graph.consumers.get(name, ())) == 1 and name not in graph.outputs and name not in graph.captured


def _remove_nodes(proto: onnx.ModelProto, folded: Mapping[str, str]) -> None:
    """Remove normalisations, given as {output of the layer: output of the normalisation}."""
    nodes = []
    for node in proto.graph.node:
        if node.input and node.output and folded.get(node.input[0]) == node.output[0]:
            continue
        if node.output and node.output[0] in folded:
            node.output[0] = folded[node.output[0]]
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)


def _shapes(analysis: Analysis, model: Prepared) -> Any:
    return probe_at(model.graph, analysis.facts.probes[0].inputs, infer_by_rule).shapes.get


# -- rounding ----------------------------------------------------------------------------------------------------------


class _FitBatches(CalibrationBatches):
    """The calls that are not held out."""

    def __init__(self, context: Context, analysis: Analysis, feeds: Sequence[Feed]) -> None:
        super().__init__(context, analysis)
        self._feeds = feeds

    @property
    def samples(self) -> int | None:
        """The number of samples."""
        return sum(map(count, self._feeds))

    def batches(self, batch_size: int | None = None) -> Iterator[Feed]:
        """Iterate over the calls as they were split."""
        return iter(self._feeds)

    def fingerprint(self) -> str | None:
        """Return nothing: sums over a part are not kept."""
        return None


@dataclass(slots=True)
class _Work:
    """A model on the way to being quantized: its layers with float weights."""

    context: Context
    analysis: Analysis
    model: Prepared

    @property
    def is_float(self) -> bool:
        """Whether any matrix holds numbers in single precision."""
        return any(w.dtype == np.float32 and len(w.shape) > 1 for w in self.model.weights.values())

    @property
    def layers(self) -> list[Layer]:
        """The layers whose weights can be read and written."""
        graph, shape = self.model.graph, _shapes(self.analysis, self.model)
        targets = [layer_target(graph, node, shape) for node in graph.steps if rule_of(node).weights]
        return [
            Layer(graph, self.model.weights, target)
            for target in targets
            if not isinstance(target, str)
            and not isinstance(target.form, Scale)
            and self.model.weights[target.weight.root].dtype == np.float32
        ]

    def round(self, feeds: Sequence[Feed], per_channel: bool) -> tuple[int, int]:
        """Round weights and correct biases; returns the numbers of layers rounded and of those corrected."""
        # A runtime scales outputs of a stack of matrices, or of transposed groups, together.
        layers = [layer for layer in self.layers if _has_own_scales(layer)]
        readers: dict[str, list[Reader]] = {
            layer.node.label: [(layer.node, layer.form, layer.read()[0].shape[1] // layer.form.taps)]
            for layer in layers
        }
        source = _FitBatches(self.context, self.analysis, feeds)
        grams = input_grams(self.context, self.analysis, self.model.graph, self.model.weights, readers, source)
        layers = [layer for layer in layers if layer.node.label in grams]
        rounded = spread(partial(_rounded, grams, per_channel), layers, heavy=False)
        for layer, (matrix, bias) in zip(layers, rounded, strict=True):
            layer.write(matrix, bias)
        return len(layers), sum(not layer.fixed_bias for layer in layers)

    def open_biases(self) -> None:
        """Give a bias to every layer that a correction would give one to; the values do not matter."""
        for layer in self.layers:
            if _has_own_scales(layer) and not layer.fixed_bias:
                matrix, bias = layer.read()
                if not bias.any():
                    layer.write(matrix, bias + _NEXT_TO_NOTHING)

    def quantized(self, per_channel: bool, feeds: Sequence[Feed] | None) -> tuple[ModelParts, int]:
        """Return the model in 8 bits, and the bytes of its float file.

        Args:
            per_channel: whether each output channel of a weight has a scale of its own.
            feeds: inputs to find ranges of activations with; None: they are found at run time.
        """
        with Workspace.of(self.context.analysis) as trial:
            parts, size = _converted(trial, self.model.model(), per_channel, feeds)
        return _stored_as_codes(parts, self.analysis, per_channel), size

    def zeros(self) -> dict[str, int]:
        """Return the number of zeros of every layer's weight that has any, by its name."""
        roots = {layer.target.weight.root for layer in self.layers}
        counts = {name: int((self.model.weights[name].read() == 0).sum()) for name in roots}
        return {name: zeros for name, zeros in counts.items() if zeros}


def _has_own_scales(layer: Layer) -> bool:
    """Return whether an axis of the weight has an index for each output of all parts."""
    parts, _, outputs = layer.read()[0].shape
    return bool(parts == 1 or layer.shape[0] == parts * outputs)


def _rounded(grams: Mapping[str, InputGram], per_channel: bool, layer: Layer) -> tuple[Any, Any]:
    """Return a layer's rounded matrix, and the bias that keeps the means of its outputs."""
    matrix, bias = layer.read()
    gram, taps = grams[layer.node.label], layer.form.taps
    mean = gram.mean if gram.full is not None else np.repeat(gram.mean, taps, axis=1)
    largest = np.abs(matrix).max(axis=1) if per_channel else np.full(bias.shape, np.abs(matrix).max())
    scale = np.where(largest > 0, largest, 1.0) / TOP
    new = np.empty_like(matrix)
    for k, part in enumerate(matrix):
        moments = gram.part(k, taps)
        if not layer.fixed_bias:  # the bias takes up the mean
            moments = moments - np.outer(mean[k], mean[k])
        new[k] = round_columns(part, inverse_factor(moments), scale[k], TOP) * scale[k]
    if layer.fixed_bias:
        return new, bias
    return new, bias + np.einsum("pn,pno->po", mean, matrix - new)


# -- conversion --------------------------------------------------------------------------------------------------------


def _converted(
    trial: Workspace, parts: ModelParts, per_channel: bool, feeds: Sequence[Feed] | None
) -> tuple[ModelParts, int]:
    """Return the model as onnxruntime quantizes it, and the bytes of its float file."""
    proto, weights = _with_initializers(parts)
    proto.metadata_props.add(key=PREPARED[0], value=PREPARED[1])
    source, size = trial.write(proto, weights, "float")
    external = size > 1 << 30
    bodies = any(a.HasField("g") for node in load(source).as_read.graph.node for a in node.attribute)
    operators = _operators(proto, feeds is not None, bodies)
    target = source.with_name("quantized.onnx")
    if operators:
        quantize_file(source, target, operators=operators, per_channel=per_channel, feeds=feeds, external=external)
    loaded = load(target if operators else source)
    result = {n: ArrayWeight(n, w.read()) if isinstance(w, FileWeight) else w for n, w in loaded.weights.items()}
    return (_as_before(loaded.proto, parts[0]), result), size


def _operators(proto: onnx.ModelProto, static: bool, bodies: bool) -> list[str]:
    """Return the types of the operators to quantize: none whose weights are in another precision."""
    half = {t.name for t in proto.graph.initializer if t.data_type != TensorProto.FLOAT and len(t.dims) > 1}
    others = {node.op_type for node in proto.graph.node if half & set(node.input)}
    present = {(node.op_type, node.domain) for node in proto.graph.node}
    return operators_for(present, others, static=static, bodies=bodies)


def _with_initializers(parts: ModelParts) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """Return a copy with constant float tensors as initializers, where a quantizer looks for weights."""
    proto, weights = onnx.ModelProto(), dict(parts[1])
    proto.CopyFrom(parts[0])
    view = Graph.of(parts[0], parts[1])
    for node in list(proto.graph.node):
        weight = view.weights.get(node.output[0]) if node.op_type == "Constant" else None
        if weight is not None and weight.dtype == np.float32 and len(weight.shape) > 1:
            proto.graph.node.remove(node)
            proto.graph.initializer.append(placeholder(weight))
            weights[weight.name] = weight
    # The quantizer of onnxruntime 1.22 transposes weights under their names, which shapes of theirs then contradict.
    shapes = [x for x in proto.graph.value_info if x.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(shapes)
    return proto, weights


def _as_before(proto: onnx.ModelProto, before: onnx.ModelProto) -> onnx.ModelProto:
    """Return the quantized model with the metadata of the original, without additions of the quantizer."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(result, name, getattr(before, name))
    del result.metadata_props[:]
    result.metadata_props.extend(before.metadata_props)
    known = {info.name for info in before.graph.value_info}
    outputs = {name for node in result.graph.node for name in node.output}
    infos = [info for info in before.graph.value_info if info.name in known & outputs]
    del result.graph.value_info[:]
    result.graph.value_info.extend(infos)
    used = {node.domain for node in result.graph.node} | {o.domain for o in before.opset_import}
    used |= {o.domain for function in result.functions for o in function.opset_import}
    imports = [o for o in result.opset_import if o.domain in used or o.domain in ("", "ai.onnx")]
    del result.opset_import[:]
    result.opset_import.extend(imports)
    return result


# -- weights that are only stored in 8 bits ----------------------------------------------------------------------------


def _stored_as_codes(parts: ModelParts, analysis: Analysis, per_channel: bool) -> ModelParts:
    """Return the model with the weights that are still float as codes, a scale for each channel or row, or one."""
    proto, weights = onnx.ModelProto(), dict(parts[1])
    proto.CopyFrom(parts[0])
    graph = Graph.of(parts[0], parts[1])
    shape = probe_at(graph, analysis.facts.probes[0].inputs, infer_by_rule).shapes.get
    for node in graph.steps:
        target = _table(graph, node) or _float_weight(graph, node, shape)
        if target is not None:
            _decode(proto, weights, target[0], target[1] if per_channel else None)
    return proto, weights


def _table(graph: Graph, node: Node) -> tuple[str, int] | None:
    """Return the table that a node looks up rows in, and the axis of its rows."""
    factoring = rule_of(node).factoring
    weight = graph.weights.get(node.inputs[0]) if factoring is not None and factoring.looks_up else None
    if weight is None or len(weight.shape) != 2 or int(node.attrs.get("axis", 0)) != 0:
        return None
    return (node.inputs[0], 0) if _is_worth(graph, node.inputs[0]) else None


def _float_weight(graph: Graph, node: Node, shape: Any) -> tuple[str, int] | None:
    """Return a layer's weight that is still float, and the axis of its output channels."""
    target = layer_target(graph, node, shape) if rule_of(node).weights else ""
    if isinstance(target, str) or isinstance(target.form, Scale) or target.weight.chain:
        return None
    name = target.weight.root
    if not _is_worth(graph, name):
        return None
    for axis, size in enumerate(graph.weights[name].shape):
        ones = [1] * len(graph.weights[name].shape)
        ones[axis] = size
        index = np.broadcast_to(np.arange(size, dtype=np.float64).reshape(ones), graph.weights[name].shape)
        matrix = target.form.matrix(index)
        if size > 1 and (matrix == matrix[:, :1]).all():
            return name, axis
    return None


def _is_worth(graph: Graph, name: str) -> bool:
    """Return whether a weight is an initializer in float32 that is large enough, and no output."""
    weight = graph.weights[name]
    stored = any(tensor.name == name for tensor in graph.proto.graph.initializer)
    large = int(np.prod(weight.shape)) >= _SMALL
    return stored and large and weight.dtype == np.float32 and name not in graph.outputs and name not in graph.captured


def _decode(proto: onnx.ModelProto, weights: MutableMapping[str, Weight], name: str, axis: int | None) -> None:
    """Store a weight as codes, with a scale for each index along an axis or one (None), ahead of all that read it."""
    if f"{name}_quantized" in weights:
        return
    value = weights.pop(name).read().astype(np.float64)
    others = tuple(a for a in range(value.ndim) if a != axis)
    largest = np.abs(value).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest, TOP) / TOP
    codes = np.clip(np.rint(value / scale), -TOP, TOP).astype(np.int8)
    shape = () if axis is None else (-1,)
    arrays: dict[str, np.ndarray[Any, Any]] = {"quantized": codes, "scale": scale.reshape(shape).astype(np.float32)}
    tensors = [t for t in proto.graph.initializer if t.name != name]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(tensors)
    for suffix, array in arrays.items():
        weight = ArrayWeight(f"{name}_{suffix}", array)
        weights[weight.name] = weight
        proto.graph.initializer.append(placeholder(weight))
    inputs = [f"{name}_quantized", f"{name}_scale"]
    node = helper.make_node("DequantizeLinear", inputs, [name], f"{name}_decode")
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))
    proto.graph.node.insert(0, node)


# -- checks ------------------------------------------------------------------------------------------------------------


def _num_codes(parts: ModelParts) -> tuple[int, int]:
    """Return the number of weights in 8 bits, and that of their elements."""
    sizes = [int(np.prod(w.shape)) for w in parts[1].values() if _are_codes(w)]
    return len(sizes), sum(sizes)


def _are_codes(weight: Weight) -> bool:
    return weight.dtype in (np.int8, np.uint8) and len(weight.shape) > 1


def _check_zeros(zeros: Mapping[str, int], parts: ModelParts) -> None:
    """Check that weights that were 0 are 0; raises ValidationError."""
    for name, expected in zeros.items():
        weight = next((w for n, w in parts[1].items() if n.startswith(f"{name}_") and _are_codes(w)), None)
        actual = expected if weight is None else int((weight.read() == 0).sum())
        if actual < expected:
            raise ValidationError(
                f"{name}: {expected} weights were 0, and {actual} are 0 after the quantization.",
                hint=f"Drop {argument('quantize')}; this is a fault: please report it with the model.",
            )


def _nothing(model: Model) -> BudgetError:
    """Return the error of a model without a weight to quantize."""
    matrices = [w for w in model.weights.values() if len(w.shape) > 1]
    floats = [int(np.prod(w.shape)) for w in matrices if w.dtype == np.float32]
    why = f"its matrices hold {', '.join(sorted({str(w.dtype) for w in matrices})) or 'nothing'}"
    if floats and max(floats) < _SMALL:
        why = (
            f"the largest matrix in float32 has {max(floats)} values, and below {_SMALL} codes with scales save nothing"
        )
    return BudgetError(
        f"No weight of this model can be quantized: {why}.",
        hint="Weights in float32 of convolutions, products and lookups can be.",
    )
