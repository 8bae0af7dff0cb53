"""Streams that an orthogonal matrix can turn without changing the model, and the model with turned streams.

A stream is a group of channels that only linear operators and normalisations meet. Turn it by an orthogonal Q: every
weight with an axis of the stream is multiplied by Q along it, writers and readers alike, since the sum over channels
that a reader takes is the same in every basis. A root mean square is the same in every basis, too. Scales and shifts of
normalisations are not, and are folded into the readers behind them first. LayerNormalization subtracts the mean of the
channels: where all that is written into the stream is centred (times I - 11'/N), the mean is 0, and it is a
normalisation by the root mean square.

Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import Group
from onnxprune.graph.canonical import join_copies, weight_of
from onnxprune.graph.restore import restore
from onnxprune.graph.view import Node, numbered_name
from onnxprune.io.constants import add_constant, placeholder, set_constant
from onnxprune.io.elements import Array
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.operators.registry import Move, rule_of
from onnxprune.operators.turning import Treatment, Turning, is_square, reduced_axes, turning_of

Model = tuple[onnx.ModelProto, dict[str, Weight]]
Vector = NDArray[np.float64]
MICROSOFT = "com.microsoft"
_RMS_SINCE = 23


class CannotTurn(Exception):
    """A group of channels is no stream that can be turned; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A tensor as a function of the stream's channels: ``scale * x + shift``.

    Attributes:
        scale: one factor per channel [channels]; None: none.
        shift: one addend per channel [channels]; None: none.
        is_centred: whether the mean over the channels of ``x`` is 0 for all values of the stream.
        source: label of the node that scales.
    """

    scale: Vector | None = None
    shift: Vector | None = None
    is_centred: bool = False
    source: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether the tensor holds the channels as they are."""
        return self.scale is None and self.shift is None


@dataclass(frozen=True, slots=True)
class Site:
    """The place where the second moments of a stream are measured.

    Attributes:
        tensors: tensors whose sum is read, activations of the model.
        addend: constant that is added to them; "" for none.
        axis: axis of the channels.
        is_normalised: whether every position is divided by its root mean square, as what reads it does.
    """

    tensors: tuple[str, ...]
    addend: str
    axis: int
    is_normalised: bool


@dataclass(slots=True, eq=False)
class Stream:
    """One stream.

    Attributes:
        group: number of its group.
        name: tensor that stands for it in plans and reports: the first that it is written into.
        size: number of channels.
        places: {tensor: axes of the channels}.
        sites: where its second moments are taken.
        is_centred: whether everything that is written is centred.
        turned: constants that are turned.
        scales: {constant of a reader: (axis, scale of its rows)}.
        shifts: (reader, position of its weight, shift of its data).
        ones: (node, position) of constants that become 1.
        dropped: {tensor: the tensor that its readers read in place of it}.
        norms: nodes of LayerNormalization.
    """

    group: int
    name: str
    size: int
    places: Mapping[str, tuple[int, ...]]
    sites: list[Site] = field(default_factory=list)
    is_centred: bool = False
    turned: set[str] = field(default_factory=set)
    scales: dict[str, tuple[int, Vector]] = field(default_factory=dict)
    shifts: list[tuple[Node, int, Vector]] = field(default_factory=list)
    ones: list[tuple[Node, int]] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    norms: list[Node] = field(default_factory=list)


def find_streams(analysis: Analysis) -> tuple[list[Stream], dict[str, str]]:
    """Return the streams of a model, and why other groups that are normalised are none, {tensor: reason}."""
    places, mixed = _places(analysis)
    streams, reasons = [], {}
    normalised = _normalised(analysis)
    for group in analysis.units.groups:
        axes_by_tensor = places.get(group.id, {})
        first = next((o for n in analysis.graph.steps for o in n.outputs if o in axes_by_tensor), "")
        if not group.prunable or group.size < 2 or not first or normalised.isdisjoint(axes_by_tensor):
            continue
        try:
            if group.id in mixed:
                raise CannotTurn(mixed[group.id])
            streams.append(_Walk(analysis, group, first, axes_by_tensor).stream())
        except CannotTurn as why:
            reasons[first] = str(why)
    return streams, reasons


def _places(analysis: Analysis) -> tuple[dict[int, dict[str, tuple[int, ...]]], dict[int, str]]:
    """Return {group: {tensor: axes that hold all of its channels in order}}, and why other groups lie otherwise."""
    units, axes_by_stream, mixed = analysis.units, dict[int, dict[str, tuple[int, ...]]](), dict[int, str]()
    order = {group.id: group.units for group in units.groups}
    for name, labels in analysis.table.items().items():
        for label in labels:
            components = units.component[label.ids]
            numbers = units.group_of[components]
            low, high = int(numbers.min()), int(numbers.max())
            if high < 0:
                continue
            plain = low == high and not label.is_grid and np.array_equal(components.ravel(), order[high])
            if plain:
                axes_by_tensor = axes_by_stream.setdefault(high, {})
                axes_by_tensor[name] = (*axes_by_tensor.get(name, ()), label.pack)
                continue
            for number in np.unique(numbers[numbers >= 0]).tolist():
                mixed.setdefault(number, f"{name!r} holds its channels in another order, or beside others")
    return axes_by_stream, mixed


def _normalised(analysis: Analysis) -> set[str]:
    """Return the tensors that nodes normalise, or whose squares they sum, and the data of BatchNormalization."""
    treatments = {Treatment.ROOT_MEAN_SQUARE, Treatment.LAYER_NORM, Treatment.UNIT, Treatment.NORM}
    treatments.add(Treatment.SCALE_AND_SHIFT)
    turnings = [(n, turning_of(n)) for n in analysis.graph.steps]
    names = {name for n, t in turnings if t and t.treatment in treatments for name in n.inputs[: t.addends] if name}
    return names | {n.inputs[0] for n in analysis.graph.steps if _is_square(analysis, n)}


def _is_square(analysis: Analysis, node: Node) -> bool:
    """Return whether a node squares its first input."""
    return is_square(node, lambda i: _read(analysis.graph.weights.get(node.inputs[i])))


def _read(weight: Weight | None) -> Array | None:
    return None if weight is None else weight.read()


# -- is a group a stream -----------------------------------------------------------------------------------------------


class _Walk:
    """A walk over the nodes that meet a group of channels, in the order of the graph.

    Args:
        analysis: analysis of the model.
        group: the group.
        name: its first tensor.
        places: {tensor: axes of the channels}.
    """

    def __init__(self, analysis: Analysis, group: Group, name: str, places: Mapping[str, tuple[int, ...]]) -> None:
        self._analysis, self._graph = analysis, analysis.graph
        self._stream = Stream(group.id, name, group.size, places)
        self._frames: dict[str, Frame] = {}
        self._squares: set[str] = set()
        self._means: dict[str, str] = {}
        self._constant = set(self._graph.weights)
        self._fixed: set[str] = set()
        self._requests: dict[str, list[tuple[int, Vector | None]]] = {}
        self._uncentred: list[str] = []
        self._root_mean_squares: list[str] = []

    def stream(self) -> Stream:
        """Return the stream; raises CannotTurn where the group is none."""
        places, graph, stream = self._stream.places, self._graph, self._stream
        hidden = {n for n in places if n in graph.inner or n in graph.captured}
        if hidden:
            raise CannotTurn(f"{min(hidden)!r} lies in the body of a control-flow node")
        outside = next((n for n in (*graph.inputs, *graph.outputs) if n in places), "")
        if outside:
            raise CannotTurn(f"{outside!r} is an input or output of the model")
        for node in graph.steps:
            if all(not n or n in self._constant for n in node.inputs) and node.inputs:
                self._constant.update(o for o in node.outputs if o)
            elif any(n in places for n in (*node.inputs, *node.outputs)) or any(n in self._means for n in node.inputs):
                self._visit(node)
        if not stream.sites:
            raise CannotTurn("nothing normalises its channels")
        self._settle()
        return stream

    def _settle(self) -> None:
        """Decide the scales and shifts of the constants; raises CannotTurn where two readers need different ones."""
        stream = self._stream
        if stream.is_centred and (self._uncentred or self._root_mean_squares):
            reader = [*self._root_mean_squares, *self._uncentred][0]
            raise CannotTurn(f"{reader!r} reads it without its mean over channels being subtracted")
        for name in stream.places:
            if name not in self._graph.weights or name in self._fixed:
                continue
            if self._graph.weights[name].dtype.kind not in "fV":
                raise CannotTurn(f"the weight {name!r} is stored as codes")
            stream.turned.add(name)
        for name, requests in self._requests.items():
            scaled = [r for r in requests if r[1] is not None]
            if not scaled:
                continue
            axis, scale = scaled[0]
            assert scale is not None
            alike = all(a == axis and s is not None and np.array_equal(s, scale) for a, s in requests)
            if not alike or self._num_uses(name) != len(requests):
                raise CannotTurn(
                    f"the weight {name!r} is shared with a reader that has no scale in front of it, as in tied tables"
                )
            stream.scales[name] = axis, scale

    def _num_uses(self, name: str) -> int:
        """Return the number of nodes with data that read a constant, perhaps moved."""
        count = 0
        for node, _ in self._graph.consumers.get(name, ()):
            count += sum(map(self._num_uses, node.outputs)) if node.outputs[0] in self._constant else 1
        return count

    def _visit(self, node: Node) -> None:
        places = self._stream.places
        if rule_of(node).reads_sizes:
            return
        if any(n in self._means for n in node.inputs) and not self._subtracts_mean(node):
            raise CannotTurn(f"{node.label!r} reads the mean over its channels")
        handle = self._handler(node)
        if handle is None:
            raise CannotTurn(f"{node.op} {node.label!r} works on its channels one by one")
        handle(node)
        for name in node.outputs:
            if name in places and name not in self._frames and name not in self._squares:
                raise CannotTurn(f"{node.op} {node.label!r} works on its channels one by one")

    def _handler(self, node: Node) -> Callable[[Node], None] | None:
        """Return the method that handles a node; None for an operator that is not linear."""
        if any(n in self._squares for n in node.inputs):
            return self._read_squares
        if _is_square(self._analysis, node):
            return self._square
        turning = turning_of(node)
        if turning is None:
            return self._move if rule_of(node).moves is not None else None
        by: dict[Treatment, Callable[[Node], None]] = {
            Treatment.CONTRACT: self._contract,
            Treatment.ADD: self._add,
            Treatment.CHOOSE: self._add,
            Treatment.MULTIPLY: self._scale,
            Treatment.DIVIDE: self._scale,
            Treatment.MEAN: self._reduce,
            Treatment.SUM: self._reduce,
            Treatment.NORM: self._reduce,
            Treatment.UNIT: self._divide_by_norm,
            Treatment.ROOT_MEAN_SQUARE: self._normalise,
            Treatment.LAYER_NORM: self._normalise,
            Treatment.SCALE_AND_SHIFT: self._batch_norm,
            Treatment.FILL: self._fill,
        }
        return by.get(turning.treatment)

    def _divide_by_norm(self, node: Node) -> None:
        if node.attrs.get("p", 2) != 2:
            raise CannotTurn(f"{node.label!r} divides by another norm than the square root of the sum of squares")
        self._pass(node, self._plain(node, 0))
        self._take(node, (node.inputs[0],), "", int(node.attrs.get("axis", -1)))

    def _fill(self, node: Node) -> None:
        if any(n in self._stream.places for n in node.inputs) or np.any(np.asarray(node.attrs.get("value", 0.0))):
            raise CannotTurn(f"{node.label!r} gives all channels the same number")
        self._pass(node, Frame())

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _rank(self, name: str) -> int:
        shape = self._analysis.facts.shape(name)
        if shape is None:
            raise CannotTurn(f"the shape of {name!r} is not known")
        return len(shape)

    def _frame(self, name: str) -> Frame:
        return self._frames.get(name, Frame())

    def _pass(self, node: Node, frame: Frame) -> None:
        self._frames.update((o, frame) for o in node.outputs if o in self._stream.places)

    def _plain(self, node: Node, i: int) -> Frame:
        """Return the frame of an input that has to hold the channels as they are."""
        frame = self._frame(node.inputs[i])
        if not frame.is_plain:
            raise CannotTurn(
                f"{node.op} {node.label!r} reads what {frame.source!r} scales channel by channel, and is no layer that "
                "could take the scale up"
            )
        return frame

    def _take(self, node: Node, tensors: tuple[str, ...], addend: str, axis: int, *, normalised: bool = True) -> None:
        """Take second moments of the data of a node, unless another node reads the same."""
        rank = self._rank(tensors[0])
        axis %= rank
        if self._stream.places.get(tensors[0]) != (axis,):
            raise CannotTurn(f"{node.op} {node.label!r} normalises over other axes than its channels")
        site = Site(tensors, addend, axis, normalised)
        if site not in self._stream.sites:
            self._stream.sites.append(site)

    def _vector(self, name: str) -> Vector | None:
        """Return a constant with one value per channel; None for other tensors."""
        if name not in self._constant or name not in self._stream.places:
            return None
        value = weight_of(self._graph, name)
        if value is None or value.size != self._stream.size:
            return None
        return np.asarray(value, np.float64).ravel()

    def _keep(self, name: str) -> None:
        """Leave the constants that a vector is computed from as they are."""
        if name in self._graph.weights:
            self._fixed.add(name)
        elif name in self._graph.producer:
            for source in self._graph.producer[name].inputs:
                self._keep(source)

    # -- operators -------------------------------------------------------------------------------------------------

    def _contract(self, node: Node) -> None:
        places = self._stream.places
        contracted = _contracted(node, [self._rank(n) if n else 0 for n in node.inputs])
        passed: list[Frame] = []
        for i, name in enumerate(node.inputs):
            if name not in places or name in self._constant:
                continue
            axes = places[name]
            if len(axes) > 1:
                raise CannotTurn(f"{name!r} has its channels twice")
            if axes[0] in contracted[i]:
                self._read(node, i, contracted)
            else:
                passed.append(self._plain(node, i))
        bias = _turning(node).bias
        bias_name = node.inputs[bias] if bias is not None and bias < len(node.inputs) else ""
        if bias_name and bias_name not in places and node.outputs[0] in places:
            raise CannotTurn(f"{node.label!r} adds a number to all channels")
        self._pass(node, Frame(is_centred=bool(passed) and all(f.is_centred for f in passed)))

    def _read(self, node: Node, i: int, contracted: Sequence[set[int]]) -> None:
        """Fold the scale and the shift of a layer's data into its weight and bias."""
        frame, places = self._frame(node.inputs[i]), self._stream.places
        if not frame.is_centred:
            self._uncentred.append(node.label)
        other = next((k for k, n in enumerate(node.inputs) if k != i and set(places.get(n, ())) & contracted[k]), None)
        if other is None or node.inputs[other] not in self._constant:
            if not frame.is_plain or other is None:
                raise CannotTurn(f"{node.label!r} multiplies its scaled channels with another tensor")
            return
        root, axis = self._root(node.inputs[other], next(iter(set(places[node.inputs[other]]) & contracted[other])))
        self._requests.setdefault(root, []).append((axis, frame.scale))
        if frame.shift is not None:
            is_matrix = self._rank(node.inputs[other]) == 2 or rule_of(node).slides
            if not is_matrix or any(node.attrs.get("pads", ())) or "equation" in node.attrs:
                raise CannotTurn(f"{node.label!r} has no bias that could take the shift of {frame.source!r} up")
            self._stream.shifts.append((node, other, frame.shift))

    def _root(self, name: str, axis: int) -> tuple[str, int]:
        """Return the constant behind moved values, and its axis of the channels."""
        while name not in self._graph.weights:
            node = self._graph.producer[name]
            moves = rule_of(node).moves
            if moves is None or not moves.keeps_all:
                raise CannotTurn(f"a weight is computed by {node.label!r}")
            if moves is Move.ORDER and set(node.attrs) <= {"perm"}:
                rank = self._rank(name)
                axis = int(node.attrs.get("perm", list(range(rank))[::-1])[axis])
            elif moves not in (Move.SAME, Move.CAST):
                raise CannotTurn(f"a weight is reshaped by {node.label!r}")
            name = node.inputs[0]
        return name, axis

    def _normalise(self, node: Node) -> None:
        turning, graph = _turning(node), self._graph
        count, skip = turning.addends, turning.addends > 1
        places = self._stream.places
        if any(o and graph.consumers.get(o) for o in node.outputs[1:3]):
            raise CannotTurn(f"the statistics of {node.label!r} are read")
        frames = [self._plain(node, i) for i in range(count)]
        scale = self._vector(node.inputs[count])
        is_layer_norm = turning.treatment is Treatment.LAYER_NORM
        shift_name = node.inputs[count + 1] if is_layer_norm and len(node.inputs) > count + 1 else ""
        bias_at = count + 2 if is_layer_norm else count + 1
        bias = node.inputs[bias_at] if skip and len(node.inputs) > bias_at else ""
        shift = self._vector(shift_name) if shift_name else None
        if scale is None or (shift_name and shift is None) or not all(n in places for n in node.inputs[:count]):
            raise CannotTurn(f"the scale of {node.label!r} is no constant with one value per channel")
        self._take(node, tuple(node.inputs[:count]), bias, int(node.attrs.get("axis", -1)))
        for name in filter(None, (node.inputs[count], shift_name)):
            self._keep(name)
        if is_layer_norm:
            self._stream.is_centred = True
            self._stream.norms.append(node)
        else:
            self._root_mean_squares += [] if all(f.is_centred for f in frames) else [node.label]
            self._stream.ones.append((node, count))
        frame = _scaled(Frame(is_centred=is_layer_norm or all(f.is_centred for f in frames)), scale, shift, node.label)
        self._frames[node.outputs[0]] = frame
        if len(node.outputs) > 3 and node.outputs[3]:
            self._frames[node.outputs[3]] = Frame()

    def _batch_norm(self, node: Node) -> None:
        vectors = [self._vector(n) for n in node.inputs[1:5]]
        if any(v is None for v in vectors) or self._stream.places.get(node.inputs[0]) != (1,):
            raise CannotTurn(f"the statistics of {node.label!r} are no constants")
        scale, bias, mean, variance = (np.asarray(v) for v in vectors)
        gain = scale / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
        before = self._frame(node.inputs[0])
        for name in node.inputs[1:5]:
            self._keep(name)
        self._take(node, (node.inputs[0],), "", 1, normalised=False)
        self._frames[node.outputs[0]] = _scaled(before, gain, bias - mean * gain, node.label)
        self._stream.dropped[node.outputs[0]] = node.inputs[0]

    def _square(self, node: Node) -> None:
        frame = self._plain(node, 0)
        axes = self._stream.places[node.inputs[0]]
        self._take(node, (node.inputs[0],), "", axes[0])
        if not frame.is_centred:
            self._root_mean_squares.append(node.label)
        self._squares.update(node.outputs)

    def _read_squares(self, node: Node) -> None:
        """Squares are summed over the channels, and nothing else is done with them."""
        if rule_of(node).moves in (Move.SAME, Move.CAST):
            self._squares.update(node.outputs)
            return
        axes = self._axes(node)
        turning = turning_of(node)
        sums = turning is not None and turning.treatment in (Treatment.MEAN, Treatment.SUM)
        if not sums or axes is None or not set(self._stream.places[node.inputs[0]]) <= set(axes):
            raise CannotTurn(f"{node.op} {node.label!r} reads the squares of its channels one by one")

    def _axes(self, node: Node) -> list[int] | None:
        """Return the axes of a reduction; None where they are not known."""
        weights = self._graph.weights
        return reduced_axes(node, self._rank(node.inputs[0]), lambda i: _read(weights.get(node.inputs[i])))

    def _reduce(self, node: Node) -> None:
        axes, stream_axes = self._axes(node), self._stream.places.get(node.inputs[0], ())
        if axes is None or len(stream_axes) != 1:
            raise CannotTurn(f"the axes of {node.label!r} are not known")
        frame, treatment = self._frame(node.inputs[0]), _turning(node).treatment
        if stream_axes[0] in axes:
            self._plain(node, 0)
            if treatment is Treatment.NORM:
                self._root_mean_squares += [] if frame.is_centred else [node.label]
                self._take(node, (node.inputs[0],), "", stream_axes[0])
            elif treatment is Treatment.MEAN and axes == [stream_axes[0]]:
                self._means[node.outputs[0]] = node.inputs[0]
            else:
                raise CannotTurn(f"{node.op} {node.label!r} sums its channels")
            return
        if treatment is Treatment.NORM:
            raise CannotTurn(f"{node.op} {node.label!r} works on its channels one by one")
        if frame.shift is not None and treatment is Treatment.SUM:
            raise CannotTurn(f"{node.label!r} sums positions with a shift")
        self._pass(node, frame)

    def _subtracts_mean(self, node: Node) -> bool:
        """Return whether a node subtracts a tensor's mean over channels from it."""
        turning = turning_of(node)
        is_difference = turning is not None and turning.treatment is Treatment.ADD and turning.sign < 0
        return is_difference and self._means.get(node.inputs[1]) == node.inputs[0]

    def _scale(self, node: Node) -> None:
        places, divides = self._stream.places, _turning(node).treatment is Treatment.DIVIDE
        touched = [i for i, n in enumerate(node.inputs) if n in places]
        vectors = {i: v for i in touched if (v := self._vector(node.inputs[i])) is not None}
        data = [i for i in touched if i not in vectors]
        if len(data) != 1 or node.inputs[data[0]] in self._constant or (divides and data[0] == 1):
            raise CannotTurn(f"{node.op} {node.label!r} works on its channels one by one")
        frame = self._frame(node.inputs[data[0]])
        if not vectors:  # one number for every position
            other = node.inputs[1 - data[0]]
            if frame.shift is not None and not self._is_number(other):
                raise CannotTurn(f"{node.label!r} scales positions that are shifted")
            if frame.shift is not None:
                factor = float(np.asarray(weight_of(self._graph, other), np.float64).ravel()[0])
                frame = replace(frame, shift=frame.shift * (1 / factor if divides else factor))
            self._pass(node, frame)
            return
        (i, vector), *_ = vectors.items()
        self._keep(node.inputs[i])
        vector = 1.0 / vector if divides else vector
        scaled = _scaled(frame, vector, None, node.label)
        if not scaled.is_plain:
            self._stream.ones.append((node, i))
        self._pass(node, scaled)

    def _is_number(self, name: str) -> bool:
        value = weight_of(self._graph, name) if name in self._constant else None
        return value is not None and value.size == 1 and bool(np.asarray(value, np.float64).ravel()[0])

    def _add(self, node: Node) -> None:
        if self._subtracts_mean(node):
            self._plain(node, 0)
            self._stream.is_centred = True
            self._stream.dropped[node.outputs[0]] = node.inputs[0]
            self._frames[node.outputs[0]] = Frame(is_centred=True)
            return
        places, turning = self._stream.places, _turning(node)
        first = 1 if turning.treatment is Treatment.CHOOSE else 0
        inputs = list(range(first, len(node.inputs)))
        if any(node.inputs[i] not in places for i in inputs) or (first and node.inputs[0] in places):
            raise CannotTurn(f"{node.op} {node.label!r} adds the same number to all channels")
        framed = [i for i in inputs if not self._frame(node.inputs[i]).is_plain]
        if not framed:
            frames = [self._frame(node.inputs[i]) for i in inputs]
            self._pass(node, Frame(is_centred=all(f.is_centred for f in frames)))
            return
        shift = (
            self._vector(node.inputs[1 - framed[0]]) if len(inputs) == 2 and len(framed) == 1 and not first else None
        )
        if shift is None or (turning.sign < 0 and framed[0] == 1):
            source = self._frame(node.inputs[framed[0]]).source
            raise CannotTurn(
                f"{node.label!r} adds to what {source!r} scales channel by channel: a normalisation behind the sum has "
                "a scale that no layer could take up"
            )
        self._keep(node.inputs[1 - framed[0]])
        before = self._frame(node.inputs[framed[0]])
        shift = shift * turning.sign
        total = shift if before.shift is None else before.shift + shift
        self._frames[node.outputs[0]] = replace(before, shift=total)
        self._stream.dropped[node.outputs[0]] = node.inputs[framed[0]]

    def _move(self, node: Node) -> None:
        places, moves = self._stream.places, rule_of(node).moves
        data = [n for n in (node.inputs if moves is Move.JOIN else node.inputs[:1]) if n]
        if any(n not in places for n in data) or not any(o in places for o in node.outputs):
            raise CannotTurn(f"{node.op} {node.label!r} joins its channels with others, or takes some of them")
        if any(n in places for n in node.inputs if n not in data):
            raise CannotTurn(f"{node.op} {node.label!r} adds the same number to all channels")
        frames = [self._frame(n) for n in data]
        if any(f is not frames[0] and not (f.is_plain and frames[0].is_plain) for f in frames):
            raise CannotTurn(f"{node.label!r} joins tensors that are scaled differently")
        self._pass(node, frames[0] if all(f is frames[0] for f in frames) else Frame())


def _scaled(frame: Frame, scale: Vector, shift: Vector | None, label: str) -> Frame:
    """Return a frame behind a scale and a shift; a scale that is the same for all channels stays where it is."""
    is_uniform = frame.is_plain and bool((scale == scale[0]).all()) and (shift is None or not shift.any())
    if is_uniform:
        return frame
    total = None if frame.shift is None else frame.shift * scale
    if shift is not None and shift.any():
        total = shift if total is None else total + shift
    return replace(frame, scale=scale if frame.scale is None else frame.scale * scale, shift=total, source=label)


def _contracted(node: Node, ranks: Sequence[int]) -> list[set[int]]:
    """Return the axes that a contraction sums over, by input."""
    summed = _turning(node).summed
    axes = None if summed is None else summed(node, ranks)
    if axes is None:
        raise CannotTurn(
            f"{node.op} {node.label!r} works on parts of its channels, or has a form that is not supported"
        )
    return axes


def _turning(node: Node) -> Turning:
    """Return the treatment of turned channels by a node, which is known."""
    turning = turning_of(node)
    assert turning is not None
    return turning


# -- the model with turned streams -------------------------------------------------------------------------------------


def turned_model(analysis: Analysis, streams: Sequence[Stream], matrices: Sequence[Vector]) -> Model:
    """Return the model whose streams are turned: with x its channels in a row, it holds x Q in place of x.

    Args:
        analysis: analysis of the model.
        streams: streams of it.
        matrices: Q of each [channels, channels], orthogonal.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(analysis.graph.proto)
    initializers = {t.name for t in proto.graph.initializer}
    weights = {name: w for name, w in analysis.graph.weights.items() if name in initializers}
    turning = _Turning(analysis, proto, weights)
    for stream in streams:
        turning.fold(stream)
    for stream, matrix in zip(streams, matrices, strict=True):
        centre = np.eye(stream.size) - 1.0 / stream.size if stream.is_centred else np.eye(stream.size)
        turning.turn(stream, centre @ matrix)
    turning.finish()
    restore(proto, weights, analysis.unshared, analysis.folds, analysis.hoists)
    join_copies(proto, weights, analysis.copies)
    return proto, weights


class _Turning:
    """Changes of constants and nodes of a copy of a graph."""

    def __init__(self, analysis: Analysis, proto: onnx.ModelProto, weights: dict[str, Weight]) -> None:
        self._analysis, self._graph, self._proto, self._weights = analysis, analysis.graph, proto, weights
        self._values: dict[str, Array] = {}
        self._new: dict[str, Array] = {}
        self._biases: list[tuple[str, str]] = []
        self._sources: dict[str, str] = {}
        self._replaced: dict[int, list[onnx.NodeProto]] = {}
        self._names = {*self._graph.weights, *self._graph.producer, *self._graph.inputs}

    def _value(self, name: str) -> Array:
        if name not in self._values:
            self._values[name] = np.asarray(self._graph.weights[name].read(), np.float64)
        return self._values[name]

    def _node(self, node: Node) -> onnx.NodeProto:
        proto: onnx.NodeProto = self._proto.graph.node[node.index]
        return proto

    def _name(self, stem: str) -> str:
        return numbered_name(stem, self._names)

    def _constant(self, stem: str, value: Array) -> str:
        name = self._name(stem)
        self._new[name] = value
        return name

    def fold(self, stream: Stream) -> None:
        """Move scales and shifts of normalisations into the layers that read them."""
        for node, position, shift in stream.shifts:
            self._shift(node, position, shift)
        for name, (axis, scale) in stream.scales.items():
            value = self._value(name)
            self._values[name] = value * scale.reshape([-1 if a == axis else 1 for a in range(value.ndim)])
        for node, position in stream.ones:
            kind = self._type(node.inputs[position])
            self._node(node).input[position] = self._constant(f"{node.outputs[0]}_ones", np.ones(stream.size, kind))
        for node in stream.norms:
            self._replaced[node.index] = self._root_mean_square(node, stream.size)
        self._sources.update(stream.dropped)

    def _type(self, name: str) -> Any:
        value = weight_of(self._graph, name)
        return np.float32 if value is None else value.dtype

    def _shift(self, node: Node, position: int, shift: Vector) -> None:
        """Add a layer's output for a constant to its bias."""
        weight = np.asarray(weight_of(self._graph, node.inputs[position]), np.float64)
        kind = self._type(node.inputs[position])
        if rule_of(node).slides:
            delta = weight.sum(axis=tuple(range(2, weight.ndim))) @ shift
        else:
            (axis,) = _contracted(node, [self._rank(n) if n else 0 for n in node.inputs])[position]
            delta = np.tensordot(shift, weight, (0, axis)) * float(node.attrs.get("alpha", 1.0))
        bias = _turning(node).bias
        if bias is not None:
            has_bias = len(node.inputs) > bias and node.inputs[bias]
            delta = delta / float(node.attrs.get("beta", 1.0) or 1.0) if has_bias else delta
            self._connect_bias(node, bias, delta, kind)
            return
        readers = self._graph.consumers.get(node.outputs[0], ())
        turning = turning_of(readers[0][0]) if len(readers) == 1 else None
        if turning is not None and turning.treatment is Treatment.ADD and turning.sign > 0:
            adder, at = readers[0]
            other = adder.inputs[1 - at] if len(adder.inputs) == 2 else ""
            value = self._graph.weights.get(other)
            if value is not None and value.shape == delta.shape:
                self._connect_bias(adder, 1 - at, delta, kind)
                return
        self._append(node, delta.astype(kind))

    def _rank(self, name: str) -> int:
        return len(self._analysis.facts.shape(name) or ())

    def _connect_bias(self, node: Node, position: int, delta: Array, kind: Any) -> None:
        target = self._node(node)
        old = target.input[position] if len(target.input) > position else ""
        value = delta
        if old:
            before = self._new[old] if old in self._new else np.asarray(self._graph.weights[old].read(), np.float64)
            value = np.asarray(before, np.float64) + delta
        name = self._constant(old or f"{node.outputs[0]}_bias", value)
        self._new[name] = value.astype(kind)
        while len(target.input) <= position:
            target.input.append("")
        target.input[position] = name
        self._biases.append((name, node.outputs[0]))

    def _append(self, node: Node, delta: Array) -> None:
        """Put an Add behind a layer without bias."""
        result, product = node.outputs[0], self._name(f"{node.outputs[0]}_product")
        name = self._constant(f"{result}_bias", delta)
        layer = onnx.NodeProto()
        layer.CopyFrom(self._node(node))
        layer.output[0] = product
        label = f"{node.name}_bias" if node.name else ""
        self._replaced[node.index] = [layer, helper.make_node("Add", [product, name], [result], name=label)]
        self._biases.append((name, result))

    def _root_mean_square(self, node: Node, size: int) -> list[onnx.NodeProto]:
        """Return nodes that divide by the root mean square, in place of a LayerNormalization of a centred tensor."""
        kind = self._type(node.inputs[2 if _turning(node).addends > 1 else 1])
        ones = self._constant(f"{node.outputs[0]}_ones", np.ones(size, kind))
        epsilon = float(node.attrs.get("epsilon", 1e-12 if _turning(node).addends > 1 else 1e-5))
        if _turning(node).addends > 1:
            inputs = [*node.inputs[:2], ones, *[n for n in node.inputs[4:5] if n]]
            kind_of = "SkipSimplifiedLayerNormalization"
            replacement = helper.make_node(
                kind_of, inputs, list(node.outputs), node.name, domain=MICROSOFT, epsilon=epsilon
            )
            return [replacement]
        x, y = node.inputs[0], node.outputs[0]
        if self._graph.opsets.get("", 1) >= _RMS_SINCE:
            replacement = helper.make_node("RMSNormalization", [x, ones], [y], node.name, axis=-1, epsilon=epsilon)
            return [replacement]
        square, mean, total, root, quotient = (self._name(f"{y}_{k}") for k in ("square", "mean", "sum", "root", "rms"))
        two, small = (
            self._constant(f"{y}_two", np.asarray(2, kind)),
            self._constant(f"{y}_epsilon", np.asarray(epsilon, kind)),
        )
        operands: list[str] = [square]
        attributes: dict[str, Any] = {"keepdims": 1}
        if self._graph.opsets.get("", 1) >= 18:
            operands.append(self._constant(f"{y}_axes", np.asarray([-1], np.int64)))
        else:
            attributes["axes"] = [-1]
        label: Callable[[str], str] = lambda part: f"{node.name}/{part}" if node.name else ""  # noqa: E731
        return [
            helper.make_node("Pow", [x, two], [square], label("Pow")),
            helper.make_node("ReduceMean", operands, [mean], label("ReduceMean"), **attributes),
            helper.make_node("Add", [mean, small], [total], label("Add")),
            helper.make_node("Sqrt", [total], [root], label("Sqrt")),
            helper.make_node("Div", [x, root], [quotient], label("Div")),
            helper.make_node("Mul", [quotient, ones], [y], label("Mul")),
        ]

    def turn(self, stream: Stream, matrix: Vector) -> None:
        """Multiply the constants of a stream by a matrix along its axes."""
        for name in stream.turned:
            value = self._value(name)
            for axis in stream.places[name]:
                value = np.moveaxis(np.tensordot(value, matrix, (axis, 0)), -1, axis)
            self._values[name] = value
        for name, tensor in self._biases:
            if tensor in stream.places:
                value = self._new[name]
                self._new[name] = (np.asarray(value, np.float64) @ matrix).astype(value.dtype)

    def finish(self) -> None:
        """Write nodes and constants."""
        nodes = self._proto.graph.node
        written = onnx.GraphProto()
        for index, node in enumerate(nodes):
            if node.output and node.output[0] in self._sources:
                continue
            for proto in self._replaced.get(index, [node]):
                for i, name in enumerate(proto.input):
                    while name in self._sources:
                        name = self._sources[name]
                    proto.input[i] = name
                written.node.append(proto)
        del nodes[:]
        nodes.extend(written.node)
        for node in nodes:
            if node.op_type == "Constant" and node.output[0] in self._values:
                set_constant(node, self._weight(node.output[0]))
        for name in self._values:
            if name in self._weights:
                self._weights[name] = self._weight(name)
        dims = {t.name: t for t in self._proto.graph.initializer}
        for name in self._values.keys() & dims.keys():
            if dims[name].raw_data or len(dims[name].float_data):
                dims[name].CopyFrom(placeholder(self._weights[name]))
        for name, value in self._new.items():
            add_constant(self._proto, self._weights, name, value)
        self._drop_dead()

    def _weight(self, name: str) -> Weight:
        kind = self._graph.weights[name].dtype
        return ArrayWeight(name, np.ascontiguousarray(self._values[name]).astype(kind))

    def _drop_dead(self) -> None:
        """Remove nodes and constants that nothing reads any more, such as means that are 0 and old scales."""
        graph, protected = self._proto.graph, {o.name for o in self._proto.graph.output} | self._graph.captured
        while True:
            read = {n for node in graph.node for n in node.input} | protected
            dead = [i for i, n in enumerate(graph.node) if n.output and not any(o in read for o in n.output)]
            known = {o for n in self._graph.nodes for o in n.outputs if o and not self._graph.consumers.get(o)}
            dead = [i for i in dead if not any(o in known for o in graph.node[i].output)]
            for i in reversed(dead):
                del graph.node[i]
            if not dead:
                break
        unread = {t.name for t in graph.initializer if t.name not in read and self._graph.consumers.get(t.name)}
        _remove(graph.initializer, unread)
        _remove(graph.input, unread)
        for name in unread:
            self._weights.pop(name, None)


def _remove(items: Any, names: Iterable[str]) -> None:
    removed = set(names)
    for i in reversed(range(len(items))):
        if items[i].name in removed:
            del items[i]
