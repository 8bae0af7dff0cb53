"""Rounding: the multiples of channels that a device's kernels like, per group of a model, and counts that keep to them.

The rule, for ``round_to="auto"``:

1. Every layer has multiples for the channels that it writes and reads, by the kernels of the device (:class:`Kernels`).
2. A group keeps the least common multiple of those of its layers, counted in its own steps: where a step stands for
   several channels (heads, groups of a convolution, a flattened map), fewer steps make a whole block.
3. A group of fewer than two multiples takes half the multiple, and again until two fit: 24 channels on AVX-512 may keep
   8 or 16, 16 channels 8, 8 channels 4, 2 channels 1. Any group may stay whole.
4. Where the cut alone decides (a ratio of every group), each group takes the allowed count nearest to its ratio, but
   one whole block rather than less of it where half a block or more is asked: below a block MACs go and hardly any
   time. Where that leaves less than 0.7 of the MACs to save, the nearest counts hold after all. Then the groups
   nearest to the middle of two counts take the other one, until the multiply-accumulates of the model (its units, where
   it has none) are as near as they get to those without rounding: :meth:`Rounding.balanced`. Not for that: a count
   further than 3/4 of the gap from the ratio, one below a whole block, or another for a group with a ratio of its own.

Measured by ``tools/bench_rounding.py`` with onnxruntime 1.32.0 on a processor with AVX-512, one thread, 28 x 28
positions: microseconds of 64 → n → n → 64 channels (matrix products 128 → n → n → 128, 64 rows):

============  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====
n                4     8    12    15    16    17    20    24    31    32    36    47    48    64
============  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====
3 x 3          337   413   478   519   476   734   791   778  1072   784  1121  1547  1154  1456
1 x 1           91   110   126   135   100   112   129   125   127   124   168   170   171   142
depthwise       93   116   119   158   110   152   131   136   194   140   171   260   172   126
3 x 3, int8    213   222   261   286   207   281   226   240   314   250   299   409   327   395
matrices        13    14    16    17    17    21    21    23    24    24    27    29    29    29
============  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====

A convolution takes as long as the next whole block of 16: 20, 24 and 28 channels cost what 32 do, so nothing between is
worth a channel. Counts that are no multiple of 4 leave the blocked layout and take up to 1.5 times as long (depthwise
up to 2.2 times) as the next that is. Below one block the time falls slowly and only for wide kernels.
"""

from __future__ import annotations

import functools
import json
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.costs import Macs, Sizes, total
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import Group
from onnxprune.errors import UsageError, argument
from onnxprune.graph import cost
from onnxprune.graph.view import Node
from onnxprune.labels.label import Ids
from onnxprune.plugins import Named

if TYPE_CHECKING:
    from onnxprune.allocation.selection import RankedGroup

AUTO = "auto"
ENTRY_POINT = "onnxprune.devices"


@dataclass(frozen=True, slots=True)
class Kernels:
    """Multiples of channels that the kernels of a device like, each 1 or more.

    Attributes:
        name: what ``--device`` calls it.
        writes: of the channels that a convolution writes.
        reads: of the channels that it reads.
        depthwise: of the channels of a depthwise convolution.
        grouped: of the channels that each group of another grouped convolution reads and writes.
        features: of the features that a matrix product, or a recurrent layer, writes.
        inner: of the features that a matrix product sums over.
        int8: other multiples for quantized layers, by these names.
        source: where the rule comes from.
    """

    name: str
    writes: int = 8
    reads: int = 4
    depthwise: int = 8
    grouped: int = 8
    features: int = 8
    inner: int = 4
    int8: Mapping[str, int] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        for name, value in [*((n, getattr(self, n)) for n in MULTIPLES), *self.int8.items()]:
            whole = isinstance(value, int) and not isinstance(value, bool)
            if name not in MULTIPLES:
                raise UsageError(f"device {self.name!r}: no multiple is called {name!r}", hint=_FIELDS)
            if not whole or value < 1:
                raise UsageError(f"device {self.name!r}: {name} is {value!r}", hint="Give a whole number from 1.")

    def of(self, kind: str, *, quantized: bool) -> int:
        """Return the multiple of one of :data:`MULTIPLES`, for a quantized layer or another."""
        return int(self.int8.get(kind, getattr(self, kind)) if quantized else getattr(self, kind))

    @classmethod
    def load(cls, path: str | Path) -> Kernels:
        """Read the multiples of a JSON file, an object with the names of the attributes; the rest has its default.

        Raises:
            UsageError: the file cannot be read or holds something else.
        """
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{argument('device')}: cannot read {str(path)!r}: {error}", hint=_FIELDS) from error
        names = {f.name for f in fields(cls)}
        if not isinstance(told, dict) or not told.keys() <= names or not isinstance(told.get("int8", {}), dict):
            raise UsageError(f"{argument('device')}: {str(path)!r} holds no multiples of a device", hint=_FIELDS)
        return cls(**{"name": Path(path).stem, **told})


MULTIPLES = ("writes", "reads", "depthwise", "grouped", "features", "inner")
_FIELDS = f'An object with any of name, {", ".join(MULTIPLES)}, int8 and source, such as {{"writes": 16}}.'


def _uniform(name: str, multiple: int, source: str, **others: Any) -> Kernels:
    return Kernels(name, **{**dict.fromkeys(MULTIPLES, multiple), **others}, source=source)


_MLAS = (
    "onnxruntime's CPU kernels (MLAS): float convolutions in a blocked layout of {} channels; padded to whole blocks, "
    "input channels in fours or no blocked layout; matrices packed in 16 columns. "
)
DEVICES: dict[str, Kernels] = {
    k.name: k
    for k in (
        # In the order of MULTIPLES.
        Kernels("avx512", 16, 4, 16, 16, 16, 4, {}, _MLAS.format(16) + "Measured: tools/bench_rounding.py."),
        Kernels("avx2", 8, 4, 8, 8, 16, 4, {"writes": 16}, _MLAS.format(8) + "SSE and AVX likewise."),
        Kernels("arm64", 8, 4, 8, 8, 8, 4, {}, "MLAS for Neon: products in tiles of 8 columns and 4 values."),
        _uniform(
            "tensorrt",
            8,
            "NVIDIA, Deep Learning Performance Guide: tensor cores want multiples of 8 with fp16 (4 with TF32) and of "
            "16 with int8; TensorRT packs channels in 8 (kHWC8) and 32 (kCHW32, int8).",
            int8=dict.fromkeys(MULTIPLES, 32),
        ),
        _uniform(
            "hexagon",
            32,
            "Qualcomm AI Engine Direct, HTP network design: activations are stored in crouton blocks of 32 channels.",
        ),
        _uniform(
            "ethos-u",
            16,
            "Arm Vela: feature maps in NHCWB16, bricks of 16 channels; 17 channels take the memory and cycles of 32.",
        ),
        _uniform(
            "ascend",
            16,
            "Huawei CANN: NC1HWC0 with C0 = 16 (32 with int8); the last block is padded.",
            int8=dict.fromkeys(MULTIPLES, 32),
        ),
        Kernels("xnnpack", 8, 4, 8, 8, 8, 4, {}, "XNNPACK: GEMM tiles of 8 columns (f32, qs8), depthwise in 8."),
        Kernels("openvino", 16, 16, 16, 16, 16, 4, {}, "oneDNN: nChw16c blocks with AVX-512 (8 with AVX2)."),
        _uniform(
            "coreml",
            16,
            "Measured by others on the Apple Neural Engine: channels are interleaved and padded; multiples of 16 fill "
            "its lanes.",
        ),
    )
}
"""The devices that come with the package; others are added by :func:`register`, a file, or another package."""

_named: Named[Kernels] = Named("device", ENTRY_POINT, DEVICES)
unregister, names, get = _named.remove, _named.names, _named.get


def register(kernels: Kernels) -> None:
    """Add a device under its name, for ``device=`` and ``--device``.

    Args:
        kernels: the multiples.

    Raises:
        ValueError: the name is taken.
    """
    _named.add(kernels.name, kernels)


_OF_PROVIDER = {
    "TensorrtExecutionProvider": "tensorrt",
    "NvTensorRTRTXExecutionProvider": "tensorrt",
    "CUDAExecutionProvider": "tensorrt",
    "QNNExecutionProvider": "hexagon",
    "CANNExecutionProvider": "ascend",
    "XnnpackExecutionProvider": "xnnpack",
    "OpenVINOExecutionProvider": "openvino",
    "CoreMLExecutionProvider": "coreml",
}


def kernels_of(device: str | Kernels | None, providers: Sequence[str] = ()) -> Kernels:
    """Return the multiples of a device.

    Args:
        device: a name, a JSON file, the multiples themselves, or None for the first of ``providers`` that has some,
            else this machine.
        providers: execution providers of onnxruntime that the model is timed on.

    Raises:
        UsageError: there is no such device.
    """
    if isinstance(device, Kernels):
        return device
    if device is not None:
        return Kernels.load(device) if device.endswith(".json") else get(device)
    known = next((_OF_PROVIDER[p] for p in providers if p in _OF_PROVIDER), None)
    return get(known) if known else this_machine()


def this_machine() -> Kernels:
    """Return the multiples of the processor that this process runs on."""
    return DEVICES[instruction_set()]


@functools.cache
def instruction_set() -> str:
    """Return ``avx512``, ``avx2`` (also for older x86 and unknown processors: the same multiples) or ``arm64``."""
    if platform.machine().lower() in ("arm64", "aarch64", "armv8l"):
        return "arm64"
    return "avx512" if _features() & {"avx512f", "avx512_skx", "x86_v4"} else "avx2"


def _features() -> set[str]:
    """Return what the processor has, in small letters: as numpy found it, else as the system lists it."""
    for module in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        with suppress(ImportError, AttributeError):
            has = __import__(module, fromlist=["x"]).__cpu_features__
            return {name.lower() for name, there in has.items() if there}
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return {word for line in lines if line.startswith("flags") for word in line.split(":", 1)[1].split()}
    return set()


# -- counts ------------------------------------------------------------------------------------------------------------


def rounded_counts(size: int, steps: int, multiple: int, *, step: int = 1, widest: float = 1.0) -> Ids:
    """Return numbers of steps that may be removed from a group, ascending, 0 first.

    Args:
        size: number of units.
        steps: number of equal steps in which the group can be pruned.
        multiple: the number of remaining steps is a multiple of it, or of a half of it where none such is allowed.
        step: the number of removed units is always a multiple of it.
        widest: the largest share to remove, 0 to 1.
    """
    counts = np.arange(steps)
    units = counts * (size // steps)
    allowed = (units % step == 0) & (units <= widest * size + 1e-9)
    while multiple > 1:
        even = allowed & ((steps - counts) % multiple == 0)
        if even[1:].any():
            even[0] = True
            return np.asarray(counts[even])
        multiple //= 2
    return np.asarray(counts[allowed])


def halved(multiple: int, steps: int) -> int:
    """Return the multiple for a group of so many steps: halved until two fit."""
    while multiple > 1 and steps < 2 * multiple:
        multiple //= 2
    return multiple


# -- the groups of a model ---------------------------------------------------------------------------------------------

_CONVOLUTIONS = ("Conv", "ConvTranspose", "QLinearConv", "ConvInteger", "FusedConv", "NhwcConv", "NhwcFusedConv")
_CHANNELS_LAST = ("NhwcConv", "NhwcFusedConv")
_QUANTIZED = ("QLinear", "Integer", "DynamicQuantize", "QGemm", "QAttention")
# Share of the gap between two allowed counts that the one taken may be away from the ratio.
_FAR = 0.75
# Groups that are moved to another count at most: each needs a row of costs.
_MOST_MOVED = 512
# Share of the MACs to save that has to be left where groups keep whole blocks.
_TOO_LITTLE = 0.7
# Groups of which all sets are tried; of more, rounds in which one is moved, or moved back; and the share of the cost
# that is near enough.
_FEW, _ROUNDS, _CLOSE = 10, 16, 0.01


class Rounding:
    """The multiples of the groups of one model on one device.

    Args:
        analysis: the analysis of the model.
        groups: the groups that may be pruned.
        kernels: the multiples of the device.

    Attributes:
        multiples: of the remaining steps of every group, by its id.
    """

    def __init__(self, analysis: Analysis, groups: Sequence[Group], kernels: Kernels) -> None:
        self.kernels = kernels
        self._analysis, self._groups = analysis, list(groups)
        self._sizes = Sizes(analysis, groups)
        own = [1] * len(groups)
        for node in analysis.graph.nodes:
            if cost.is_layer(node, analysis.graph):
                for name, axis, channels in self._wanted(node):
                    for column, multiple in self._in_steps(name, axis, channels):
                        own[column] = math.lcm(own[column], multiple)
        self._whole = {g.id: m if m <= g.steps else 1 for g, m in zip(groups, own, strict=True)}
        self.multiples = {g.id: halved(m, g.steps) for g, m in zip(groups, own, strict=True)}

    def _wanted(self, node: Node) -> list[tuple[str, int, int]]:
        """Return (tensor, axis, multiple of its channels) for what a layer writes and reads."""
        graph, shape = self._analysis.graph, self._analysis.facts.shape
        data, out = node.inputs[0], node.outputs[0]
        producer = graph.producer.get(data)
        quantized = any(q in node.op for q in _QUANTIZED) or (
            producer is not None and producer.op == "DequantizeLinear"
        )
        multiple = functools.partial(self.kernels.of, quantized=quantized)
        before, after = shape(data), shape(out)
        if not before or not after:
            return []
        if node.op not in _CONVOLUTIONS:
            axis = cost.channel_axis(node, graph, shape)
            last = 0 if node.op == "Gemm" and node.attrs.get("transA", 0) else len(before) - 1
            written = [] if axis is None else [(out, axis, multiple("features"))]
            return [*written, (data, last, multiple("inner"))]
        last = node.op in _CHANNELS_LAST or bool(node.attrs.get("channels_last", 0))
        axis, other = (len(after) - 1, len(before) - 1) if last else (1, 1)
        groups = int(node.attrs.get("group", 1))
        if groups == 1:
            return [(out, axis, multiple("writes")), (data, other, multiple("reads"))]
        if groups == before[other] == after[axis]:
            return [(out, axis, multiple("depthwise")), (data, other, multiple("depthwise"))]
        return [(out, axis, groups * multiple("grouped")), (data, other, groups * multiple("grouped"))]

    def _in_steps(self, name: str, axis: int, channels: int) -> list[tuple[int, int]]:
        """Return (column, multiple of its steps) of the groups along an axis that is to keep multiples of channels."""
        found = []
        for term, positions in self._sizes.terms(name, axis).items():
            for column in term:
                steps = int(self._sizes.steps[column])
                each = max(1, positions // steps)
                found.append((column, channels // math.gcd(channels, each)))
        return found

    def balanced(self, ranked: Mapping[int, RankedGroup], counts: Sequence[int], exact: Sequence[int]) -> list[int]:
        """Return counts of which some are the next allowed ones, so that the model costs what it would unrounded.

        Args:
            ranked: the groups, by their id.
            counts: steps that each of them loses, the allowed ones nearest to its ratio.
            exact: steps that each of them would lose without multiples.
        """
        blocks = self._in_blocks(ranked, counts, exact)
        if blocks == list(exact):
            return blocks
        columns = {g.id: i for i, g in enumerate(self._groups)}
        who = np.array([columns[n] for n in ranked], dtype=np.int64)
        given = list(ranked.values())
        # A group with a ratio of its own is rounded by itself: the others do not make up for it.
        wanted = np.where([g.is_local for g in given], counts, exact)
        before = [g.num_removed for g in given]
        whole, target, start = self._costs(who, np.stack([before, wanted, blocks]).astype(np.int64))
        if whole - start < _TOO_LITTLE * (whole - target):
            blocks, start = list(counts), float(self._costs(who, np.array([counts], np.int64))[0])
        now = np.asarray(blocks, dtype=np.int64)
        more = bool(start > target)
        moves = [_other(c, int(n), self._whole[i], more=more) for (i, c), n in zip(ranked.items(), now, strict=True)]
        order = sorted((far, i, other) for i, move in enumerate(moves) if move is not None for other, far in [move])
        movable = [(i, other) for _, i, other in order[:_MOST_MOVED]]
        if len(movable) <= _FEW:
            moved = np.array([[row >> i & 1 for i in range(len(movable))] for row in range(1 << len(movable))], bool)
            # All ways to move few groups, those of the nearest first.
            moved = moved[np.argsort(moved @ np.array([far for far, _, _ in order]), kind="stable")]
        else:
            moved = np.tri(len(movable) + 1, len(movable), -1, dtype=bool)
        best, off = self._nearest(who, now, movable, moved, target)
        for _ in range(_ROUNDS):
            if off <= _CLOSE * target or len(movable) <= _FEW:
                break
            best, off = self._nearest(
                who, now, movable, best ^ np.eye(len(movable) + 1, len(movable), -1, bool), target
            )
        return [int(c) for c in _moved(now, movable, best[None])[0]]

    def _in_blocks(self, ranked: Mapping[int, RankedGroup], counts: Sequence[int], exact: Sequence[int]) -> list[int]:
        """Return counts that keep one whole block of groups of which less is left, but half of it or more is asked."""
        result = [int(c) for c in counts]
        for i, (number, group) in enumerate(ranked.items()):
            block = self._whole[number]
            other = group.steps - block
            if not group.is_local and group.steps - result[i] < block <= 2 * (group.steps - exact[i]):
                result[i] = other if other >= group.num_removed and other in group.counts else result[i]
        return result

    def _nearest(
        self, who: Ids, now: Ids, movable: Sequence[tuple[int, int]], moved: NDArray[np.bool_], target: float
    ) -> tuple[NDArray[np.bool_], float]:
        """Return the first of several sets of moves [cuts, moves] whose cost is nearest to the target, and how far."""
        off = np.abs(self._costs(who, _moved(now, movable, moved)) - target)
        best = int(np.argmax(off <= off.min() + _CLOSE * target))
        return moved[best], float(off[best])

    def _costs(self, who: Ids, removed: Ids) -> NDArray[np.float64]:
        """Return multiply-accumulates [cuts], or units where the model has none, for removed steps [cuts, groups]."""
        kept = np.repeat(self._sizes.whole, len(removed), axis=0)
        kept[:, who] -= removed
        if self._macs is not None:
            return np.asarray(total(self._macs, kept), dtype=np.float64)
        each = np.array([g.size / g.steps for g in self._groups])
        return np.asarray(kept @ each, dtype=np.float64)

    @functools.cached_property
    def _macs(self) -> Macs | None:
        macs = Macs(self._sizes)
        return macs if float(total(macs, self._sizes.whole)[0]) > 0 else None


def _moved(now: Ids, movable: Sequence[tuple[int, int]], moved: NDArray[np.bool_]) -> Ids:
    """Return counts [cuts, groups] after moves [cuts, moves] of groups to their other counts."""
    result = np.repeat(now[None], len(moved), axis=0)
    for column, (group, other) in enumerate(movable):
        result[moved[:, column], group] = other
    return result


def _other(group: RankedGroup, count: int, multiple: int, *, more: bool) -> tuple[int, float] | None:
    """Return the allowed count on the other side of a group's ratio and how far from it; None where there is none.

    Args:
        group: the group.
        count: steps that it loses.
        multiple: steps of a whole block: what is less saves hardly any time.
        more: whether it is to lose more rather than less.
    """
    target = group.ratio * group.steps
    counts = group.counts[((group.steps - group.counts) % multiple == 0) | (group.counts == 0)]
    side = counts[counts > count] if more else counts[counts < count]
    if group.is_local or not side.size or (count >= target if more else count <= target):
        return None
    other = int(side[0] if more else side[-1])
    far = abs(other - target) / abs(other - count)
    return None if far > _FAR or other < group.num_removed else (other, far)
