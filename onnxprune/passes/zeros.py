"""Zeros of a model: keep them in recoveries and trainings, check that they are still there, store them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from onnx import SparseTensorProto, numpy_helper

from onnxprune.devices import Kernels, kernels_of
from onnxprune.errors import Note, UsageError, ValidationError, argument
from onnxprune.io.weights import SparseWeight, Weight
from onnxprune.passes.prepared import Prepared
from onnxprune.passes.sparsify import scan_layers
from onnxprune.pipeline import Context, Model, Pass, PassResult
from onnxprune.report.facts import Fact, Remark, Sparsification, SparsifiedLayer, ZerosFacts
from onnxprune.settings import named_arguments
from onnxprune.sparsification.devices import DEVICES, advice
from onnxprune.sparsification.layers import LayerScan, SparseLayer, find_layers
from onnxprune.sparsification.patterns import UNSTRUCTURED, Mask, Pattern, named

_PATTERNED = 0.25
"""Share of zeros from which on a layer without N:M is taken to be sparse on purpose."""
_MOSTLY = 0.5
"""Share of a model's parameters in such layers from which on the model is taken to be sparse on purpose."""
_PIECE = 1 << 20


@named_arguments()
class LockZeros(Pass):
    """Keep the zeros of weights at 0 in the recoveries and trainings behind this pass.

    Args:
        lock: True: keep them; False: let them change; None: let them change, with a warning where a recovery does so to
            a pattern of zeros. Where a training would, a model that holds it in most of its weights is an error,
            and a few layers (the filters of a spectrogram) keep theirs.
        trained: whether a training follows.

    Raises:
        UsageError: a training would break a pattern of zeros, and ``lock`` is None.
    """

    def __init__(self, lock: bool | None = True, *, trained: bool = False) -> None:
        self.lock, self.trained = lock, trained

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Find weights with zeros, and lock them."""
        if self.lock is False:
            return PassResult(model, changed=False)
        if self.lock:
            prepared = Prepared(*model.parts)
            layers = _with_zeros(scan_layers(model.analysis, prepared), prepared.weights)
            locked = frozenset(layer.source.root for layer, _ in layers) - model.locked
            return PassResult(replace(model, locked=model.locked | locked) if locked else model, changed=bool(locked))
        patterned = [(layer, zeros, name) for layer, zeros in _present(model) if (name := _pattern(layer, zeros))]
        if not patterned:
            return PassResult(model, changed=False)
        names = [name for _, _, name in patterned]
        common = max(set(names), key=names.count)
        what = (
            f"{len(names)} layer{'s' if len(names) > 1 else ''} of this model hold{'' if len(names) > 1 else 's'} zeros"
        )
        what += f" ({common})" if common != UNSTRUCTURED else ""
        if self.trained and sum(zeros.size for _, zeros, _ in patterned) < _MOSTLY * model.num_parameters:
            locked = frozenset(layer.source.root for layer, _, _ in patterned)
            note = Note(
                f"{what}, which stay 0: {argument('pattern_lock', False)} lets {argument('finetune')} fill them"
            )
            return PassResult(replace(model, locked=model.locked | locked), [Remark(note)])
        if self.trained:
            raise UsageError(
                f"{what}, which {argument('finetune')} would fill.",
                hint=f"Keep them with {argument('pattern_lock', True)}, or give them up with "
                f"{argument('pattern_lock', False)}.",
            )
        text = f"{what}, which recovery may fill: {argument('pattern_lock', True)} keeps them"
        return PassResult(model, [Remark(Note(text))], changed=False)


def _present(model: Model) -> Iterator[tuple[SparseLayer, Mask]]:
    """Return the layers with zeros that nothing keeps yet; of an unchanged model without another analysis."""
    if model.is_analyzed:
        graph = model.analysis.graph
        with_zeros = _with_zeros(find_layers(graph, model.analysis.facts.shape), graph.weights)
    else:
        prepared = Prepared(*model.parts)
        with_zeros = _with_zeros(scan_layers(model.analysis, prepared), prepared.weights)
    return ((layer, zeros) for layer, zeros in with_zeros if layer.source.root not in model.locked)


def _with_zeros(scan: LayerScan, weights: Mapping[str, Weight]) -> Iterator[tuple[SparseLayer, Mask]]:
    """Yield the layers with zeros, and where these lie."""
    for layer in scan.layers:
        zeros = layer.read(weights) == 0
        if zeros.any():
            yield layer, zeros


def _pattern(layer: SparseLayer, zeros: Mask) -> str:
    """Return the name of the pattern that a layer holds on purpose; empty for a few zeros, or channels that are 0."""
    alive = zeros[:, :, ~zeros.all(axis=(0, 1))]
    if not alive.size or not alive.any():
        return ""
    name = named(alive, layer.channels)
    return name if name != UNSTRUCTURED or alive.mean() >= _PATTERNED else ""


@named_arguments()
class StoreZeros(Pass):
    """Check that the zeros of a sparsification are still there, store them, and report their worth.

    Args:
        storage: ``dense``, or ``sparse``: tensors whose nonzero entries take less room become sparse initializers.
        device: device that the model is to run on, or its name; None: this machine's processor.

    Raises:
        ValidationError: a pass behind the sparsification changed zeros.
    """

    def __init__(self, storage: str = "dense", device: str | Kernels | None = None) -> None:
        self.storage, self.device = storage, device

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Check, count and store."""
        if not model.sparsified:
            return PassResult(model, changed=False)
        where = kernels_of(self.device).name
        with context.stage("zeros"):
            prepared = Prepared(*model.parts)
            layers = {layer.name: layer for layer in scan_layers(model.analysis, prepared).layers}
            records = [_checked(record, layers.get(record.name), prepared.weights) for record in model.sparsified]
            facts = _counted(layers.values(), prepared.weights)
            stored = _stored(model) if self.storage == "sparse" else {}
            facts.storage, facts.sparse_tensors = self.storage, len(stored)
            facts.device, facts.advice = where, _advice(where, records, layers)
            facts.where = "" if facts.advice or where not in DEVICES else DEVICES[where].where
            weights = {**model.weights, **stored}
            facts.weight_bytes = sum(map(_bytes, weights.values()))
            facts.deflated_bytes = sum(_deflated(w) for w in weights.values())
        results: list[Fact] = [Sparsification(records), facts]
        if self.device is not None and facts.advice:
            results.append(Remark(facts.advice))
        if self.storage == "sparse" and not stored:
            text = "no tensor is smaller as a sparse initializer, which stores 8 bytes of index for every nonzero entry"
            results.append(Remark(f"{text}: all are stored dense"))
        return PassResult(replace(model, weights=weights) if stored else model, results, changed=bool(stored))


def _checked(record: SparsifiedLayer, layer: SparseLayer | None, weights: Mapping[str, Weight]) -> SparsifiedLayer:
    """Return the zeros of a layer's weight now.

    Raises:
        ValidationError: zeros are gone, or the pattern does not hold.
    """
    if not record.pattern or layer is None:
        return record
    zeros = layer.read(weights) == 0
    now = replace(record, shape=list(layer.shape), elements=layer.size, zeros=int(zeros.sum()))
    if list(layer.shape) != record.shape:  # units of it were removed meanwhile
        return now
    pattern = Pattern.of(record.pattern)
    if now.zeros < record.zeros or (pattern.nonzero and not pattern.holds(zeros)):
        raise ValidationError(
            f"{record.name}: {record.zeros} weights were set to 0 in pattern {record.pattern}, and {now.zeros} are 0 "
            "at the end.",
            hint="A pass behind the sparsification changed zeros: it has to keep those of Model.locked.",
        )
    return now


def _counted(layers: Iterable[SparseLayer], weights: Mapping[str, Weight]) -> ZerosFacts:
    facts = ZerosFacts()
    for layer in layers:
        matrix = layer.read(weights)
        facts.elements += matrix.size
        facts.zeros += int((matrix == 0).sum())
    return facts


def _advice(device: str, records: Sequence[SparsifiedLayer], layers: Mapping[str, SparseLayer]) -> str:
    """Return the reason why the zeros bring no speed on a device; empty where they do."""
    patterned = [record for record in records if record.pattern]
    if not patterned:
        return ""
    channels = max(layers[r.name].channels for r in patterned if r.name in layers)
    return advice(device, Pattern.of(patterned[0].pattern), channels)


def _stored(model: Model) -> dict[str, Weight]:
    """Return the weights that are smaller by their nonzero entries, in that form."""
    names = {t.name for t in model.proto.graph.initializer}
    result: dict[str, Weight] = {}
    for name in sorted(names & model.weights.keys() & model.locked):
        weight = model.weights[name]
        if weight.dtype.kind != "f":
            continue
        dense = weight.read().ravel()
        places = np.flatnonzero(dense)
        if places.size * (weight.dtype.itemsize + places.itemsize) < weight.nbytes:
            values = numpy_helper.from_array(np.ascontiguousarray(dense[places]), name)
            indices = numpy_helper.from_array(places.astype(np.int64), f"{name}_indices")
            proto = SparseTensorProto(values=values, indices=indices, dims=weight.shape)
            result[name] = SparseWeight(proto, name, dense.size)
    return result


def _bytes(weight: Weight) -> int:
    if isinstance(weight, SparseWeight):
        return len(weight.proto.values.raw_data) + len(weight.proto.indices.raw_data)
    return weight.nbytes


def _deflated(weight: Weight) -> int:
    """Return the bytes of a weight after deflate at its fastest, as a zip file would store it."""
    if isinstance(weight, SparseWeight):
        pieces = [weight.proto.values.raw_data, weight.proto.indices.raw_data]
    elif weight.dtype.kind in "OSU":
        pieces = [str(weight.read().tolist()).encode()]
    else:
        pieces = [bytes(weight.stored())]
    size, press = 0, zlib.compressobj(1)
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), _PIECE):
            size += len(press.compress(view[start : start + _PIECE]))
    return size + len(press.flush())
